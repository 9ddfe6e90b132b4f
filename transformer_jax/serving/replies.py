"""What is asked of the engine, and its reply, which grows while it is generated."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.mask_guesses import Constraint, GuessedRow
from transformer_jax.decoding.new_text import NewText
from transformer_jax.serving.edits import TextEdits
from transformer_jax.serving.prompts import PromptScores


@dataclasses.dataclass(frozen=True)
class TextRequest:
    """One text to generate.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: the largest number of tokens to add; with 0, the prompt is only scored.
      sampling: how tokens are drawn.
      key: a PRNG key, or the array of its data (``jax.random.key_data``); the tokens are those that
        ``tj.generate`` draws with this key for the row. It is needed unless decoding is greedy.
      stop: strings at which the text ends.
      end_ids: the token ids that end the text; ``None`` for those of the tokenizer.
      wants_alternatives: whether to return the most probable tokens in the place of each new one.
      scores_prompt: whether to compute the log-probabilities of the prompt's tokens.
      constraint: the grammar that the text follows, or ``None``.
      edits: changes to the model's computation for this text, or ``None``.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 100
    sampling: Sampling = Sampling()
    key: jax.Array | np.ndarray | None = None
    stop: Sequence[str] = ()
    end_ids: Sequence[int] | None = None
    wants_alternatives: bool = False
    scores_prompt: bool = False
    constraint: Constraint | None = None
    edits: TextEdits | None = None


class Reply:
    """The text that answers a request. The engine's thread adds to it; others read it.

    Attributes:
      request: the request.
      new: the new tokens, their log-probabilities and their text.
      grammar: the state of the grammar that the text follows, or ``None``.
      top_tokens: for each new token, the most probable tokens in its place.
      top_logprobs: the log-probabilities of these tokens.
      prompt_scores: the log-probabilities of the prompt's tokens, if they were requested.
      num_reused: the number of the prompt's tokens that were already in a stored cache.
      error: why the text could not be completed, or ``None``.
    """

    def __init__(self, request: TextRequest, new: NewText, grammar: GuessedRow | None = None,
                 listener: Callable[[], Any] | None = None):
        """Makes a reply without tokens.

        Args:
          request: the request.
          new: the text, without tokens.
          grammar: the grammar that the text follows, at its beginning.
          listener: called after every change, in the engine's thread.
        """
        self.request, self.new, self.grammar = request, new, grammar
        self.top_tokens: list[list[int]] = []
        self.top_logprobs: list[list[float]] = []
        self.prompt_scores: PromptScores | None = None
        self.num_reused = 0
        self.error: Exception | None = None
        self.is_cancelled = False
        self._is_done = False
        self._listener = listener
        self._changed = threading.Condition()

    @property
    def is_done(self) -> bool:
        """True if nothing is added any more: the text has ended, failed or was cancelled."""
        return self._is_done

    def cancel(self) -> None:
        """Asks the engine to stop; the slot is free after its current step."""
        self.is_cancelled = True

    def result(self, timeout: float | None = None) -> NewText:
        """Waits for the end of the text.

        Args:
          timeout: seconds to wait; ``None`` has no limit.

        Returns:
          The new text.

        Raises:
          TimeoutError: if the text has not ended in time.
          Exception: the reply's ``error``, if it has one.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_done, timeout):
                raise TimeoutError(f"the reply is not complete after {timeout} s")
        if self.error is not None:
            raise self.error
        return self.new

    def pieces(self) -> Iterator[str]:
        """Yields the text piece by piece, as soon as no later token can change it.

        Returns:
          An iterator over pieces of the text.

        Raises:
          Exception: the reply's ``error``, if it has one.
        """
        num_yielded = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda shown=num_yielded: self._is_done or self.new.num_final > shown)
                is_done, text = self._is_done, self.new.text[:self.new.num_final]
            if len(text) > num_yielded:
                yield text[num_yielded:]
                num_yielded = len(text)
            if is_done:
                self.result()
                return

    def seen(self) -> tuple[str, int, bool]:
        """Reads the present state of the reply.

        Returns:
          The text that no later token can change, the number of new tokens, and whether the reply
          is complete.
        """
        with self._changed:
            return self.new.text[:self.new.num_final], len(self.new.tokens), self._is_done

    def add(self, tokens: Sequence[int], logprobs: Sequence[float], top_tokens: Sequence[list[int]],
            top_logprobs: Sequence[list[float]]) -> int:
        """Adds tokens until the text ends. Only the engine calls this, and then ``changed``.

        Args:
          tokens: the tokens.
          logprobs: their log-probabilities.
          top_tokens: the most probable tokens in the place of each one.
          top_logprobs: the log-probabilities of these tokens.

        Returns:
          How many tokens were added.
        """
        new, before = self.new, len(self.new.tokens)
        with self._changed:
            for token, logprob, top_ids, top in zip(tokens, logprobs, top_tokens, top_logprobs, strict=True):
                if new.reason is not None:
                    break
                self.top_tokens.append(top_ids)
                self.top_logprobs.append(top)
                new.append(token, logprob)
                if self.grammar is not None:
                    self.grammar.push(token)
                    if self.grammar.is_complete and new.reason is None:
                        new.end("grammar")
                if new.reason is None and len(new.tokens) == self.request.max_new_tokens:
                    new.end("length")
        return len(new.tokens) - before

    def changed(self, *, is_done: bool = False, error: Exception | None = None) -> None:
        """Tells those who wait that the reply has changed. Only the engine calls this.

        Args:
          is_done: whether nothing follows.
          error: why the text could not be completed, or ``None``.
        """
        with self._changed:
            self.error = error
            self._is_done = is_done or error is not None
            self._changed.notify_all()
        if self._listener is not None:
            self._listener()
