"""The new tokens of one row on the host, their text, and why the text ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from transformer_jax.data.tokens import TextTokenizer, text_after
from transformer_jax.decoding.batch import decodable


class NewText:
    """The tokens that were drawn after a prompt, and the text that they give.

    Attributes:
      start: the tokens before the first new one.
      tokens: the new tokens.
      logprobs: the log-probability of each new token.
      text: the complete characters of the new tokens, without a stop string. If it is not needed
        before it is complete, it stays empty until the text ends.
      reason: ``"eos"``, ``"stop"``, ``"length"`` or ``"grammar"``; ``None`` while the text goes on.
    """

    def __init__(self, start: Sequence[int], tokenizer: TextTokenizer | None, end_ids: Set[int], stop: Sequence[str],
                 *, incremental: bool):
        self.start = list(start)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.reason: str | None = None
        self._tokenizer, self._end_ids, self._stop = tokenizer, end_ids, stop
        self._decoder = None
        if tokenizer is not None and incremental:
            self._decoder = tokenizer.stream_decoder(decodable(self.start, tokenizer))

    def append(self, token: int, logprob: float) -> None:
        """Adds a token, and ends the text at an end token or at a stop string."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self._end_ids:
            self.end("eos")
        elif self._decoder is not None:
            self.text += self._decoder.push(token)
            text = self.text + (self._decoder.pending() if self._stop else "")
            found = [text.find(string) for string in self._stop if string in text]
            if found:
                self.text, self.reason = text[:min(found)], "stop"

    def end(self, reason: str) -> None:
        """Ends the text for a reason, and completes it."""
        self.reason = reason
        if self._decoder is not None:
            self.text += self._decoder.finish()
        elif self._tokenizer is not None:
            tokens = self.tokens[:-1] if reason == "eos" else self.tokens
            self.text = text_after(self._tokenizer, decodable(self.start, self._tokenizer), tokens)

    @property
    def num_final(self) -> int:
        """Number of characters of the text that no later token can change."""
        return len(self.text) - (_held_back(self.text, self._stop) if self.reason is None else 0)


def _held_back(text: str, stop: Iterable[str]) -> int:
    """Returns the length of the longest ending of the text that may be the beginning of a stop
    string."""
    return max((size for string in stop for size in range(1, len(string)) if text.endswith(string[:size])), default=0)
