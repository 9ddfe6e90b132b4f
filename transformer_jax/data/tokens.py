"""The interface of tokenizers, and decoding of tokens that come one at a time."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

# How a model uses a text: a decoder continues it, an encoder-decoder reads it or generates it, or
# an encoder reads it with masks.
Form = Literal["prompt", "source", "target", "masked"]
Span = tuple[int, int]
_LONGEST_WINDOW = 64  # the most tokens that are decoded again with each new one


class StreamsText(Protocol):
    """A decoder of tokens that come one at a time."""

    def push(self, token: int) -> str:
        """Takes the next token and returns the characters that are now complete."""
        ...

    def pending(self) -> str:
        """Returns the text that the next token could still change."""
        ...

    def finish(self) -> str:
        """Returns the rest of the text, if no token follows."""
        ...


class TextTokenizer(Protocol):
    """What decoding and inspection need from a tokenizer.

    Both ``Tokenizer`` and the tokenizers from Hugging Face have these methods. A tokenizer of your
    own may have them too.

    Attributes:
      vocab_size: Number of token ids.
      bos_id: The token that begins a text, or None if there is no such token.
      eos_id: The token that ends a text, or None.
      pad_id: The padding token, or None.
      mask_id: The mask token, or None.
    """

    vocab_size: int
    bos_id: Any
    eos_id: Any
    pad_id: Any
    mask_id: Any

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        ...

    @property
    def start_id(self) -> int:
        """The token from which the first token of a text is predicted."""
        ...

    @property
    def mask_token(self) -> str | None:
        """The name of the mask token, or None."""
        ...

    def encode(self, text: str, *, allow_special: bool = ...) -> list[int]:
        """Encodes a text.

        Args:
          text: Any Unicode string.
          allow_special: Whether names of special tokens in the text become these tokens.

        Returns:
          The token ids.
        """
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Encodes a text that a decoder continues.

        Args:
          text: The text.

        Returns:
          The token ids, at least one.
        """
        ...

    def encode_source(self, text: str) -> list[int]:
        """Encodes a text that an encoder-decoder reads.

        Args:
          text: The text.

        Returns:
          The token ids, with the special tokens that the model expects around a source.
        """
        ...

    def encode_target(self, text: str, *, after: Sequence[int] = ..., allow_special: bool = ...) -> list[int]:
        """Encodes a text that an encoder-decoder generates.

        Args:
          text: The text.
          after: The tokens that start the target.
          allow_special: Whether names of special tokens in the text become these tokens.

        Returns:
          The token ids that follow ``after``, without the token that ends the target.
        """
        ...

    def encode_masked(self, text: str) -> list[int]:
        """Encodes a text that an encoder reads.

        Args:
          text: The text. The name of the mask token becomes this token.

        Returns:
          The token ids, with the special tokens that the model expects around the text.
        """
        ...

    def frame(self, form: Form) -> tuple[list[int], list[int]]:
        """Returns the special tokens around a text.

        Args:
          form: How the model uses the text.

        Returns:
          The tokens before the text and the tokens after it.
        """
        ...

    def spans(self, text: str, form: Form = ...) -> list[Span]:
        """Returns the character span of each token of a text.

        Args:
          text: The text.
          form: How the model uses the text.

        Returns:
          For each token, the first character and the one after the last.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes tokens.

        Args:
          ids: The token ids.

        Returns:
          The text.
        """
        ...

    def stream_decoder(self, after: Iterable[int] = ...) -> StreamsText:
        """Creates a decoder of tokens that come one at a time.

        Args:
          after: The tokens before the first one, whose text is not returned.

        Returns:
          The decoder.
        """
        ...

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns a string to display for each token.

        Args:
          ids: The token ids.

        Returns:
          One string for each token.
        """
        ...


class Decodes(Protocol):
    """A tokenizer that can decode tokens."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of tokens."""
        ...


def checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Returns token ids as a list. Raises ValueError if an id is outside the vocabulary."""
    tokens = np.asarray(ids if hasattr(ids, "__array__") else list(ids)).tolist()
    for token in tokens:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {vocab_size} tokens")
    return tokens


class StreamDecoder:
    """Decodes tokens one at a time into complete characters.

    The strings together are the text that follows the text of ``after`` when all tokens are decoded
    together. Decoding only the new tokens could give a different text, because many tokenizers
    remove the space that begins a text.

    Args:
      tokenizer: Decodes tokens.
      after: The tokens before the first one, whose text is not returned.
      is_byte: Tells whether a token is a byte that can only be decoded together with the bytes next
        to it. Tokenizers from Hugging Face with byte fallback need this, because one invalid byte
        replaces all bytes next to it. The text of such a run of bytes is returned after the next
        token. None means that no token is such a byte.
      margin: Number of characters at the end of the text that a later token may still change, for
        instance if spaces before punctuation are removed from decoded text.
    """

    def __init__(self, tokenizer: Decodes, after: Iterable[int] = (), is_byte: Callable[[int], bool] | None = None,
                 margin: int = 0):
        self._tokenizer = tokenizer
        self._is_byte = is_byte
        self._margin = margin
        self._in_run = False
        self._window = list(after)  # the last tokens, on which the text of the next one depends
        self._shown = tokenizer.decode(self._window)  # the part of the window's text that was returned

    def push(self, token: int) -> str:
        """Takes the next token.

        Args:
          token: The token id.

        Returns:
          The characters that are now complete. There may be none or several.
        """
        self._window.append(token)
        if self._is_byte is not None:
            # A token without text, such as a special token, does not end a run of bytes.
            self._in_run = self._is_byte(token) or (self._in_run and not self._tokenizer.decode([token]))
            if self._in_run:
                return ""
        text = self._text()
        new = self._show(text[:max(len(text) - self._margin, 0)])
        if len(self._window) > _LONGEST_WINDOW:
            self._shorten(text)
        return new

    def pending(self) -> str:
        """Returns the text that is not complete yet.

        Returns:
          The text that ``finish`` would return, without an incomplete last character.
        """
        return _beyond(self._shown, self._text())

    def finish(self) -> str:
        """Returns the rest of the text, if no token follows.

        Returns:
          The text. An incomplete last character becomes U+FFFD.
        """
        return self._show(self._tokenizer.decode(self._window))

    def _text(self) -> str:
        # A final U+FFFD may be the first bytes of a character whose other bytes are still to come.
        """Returns the text of the window, without an incomplete last character."""
        return self._tokenizer.decode(self._window).rstrip("\ufffd")

    def _show(self, text: str) -> str:
        """Returns the new part of a text, and records that it was returned."""
        new = _beyond(self._shown, text)
        if new:
            self._shown = text
        return new

    def _shorten(self, text: str) -> None:
        """Removes the first tokens of the window, if the text of the others does not depend on
        them."""
        if not text.startswith(self._shown) or len(text) - len(self._shown) > self._margin:
            return
        for start in range(len(self._window) - _LONGEST_WINDOW // 2, len(self._window)):
            end = self._tokenizer.decode(self._window[start:])
            num_shown = len(end) - (len(text) - len(self._shown))
            if num_shown > 0 and text.endswith(end):
                self._window, self._shown = self._window[start:], end[:num_shown]
                return


def text_after(tokenizer: Decodes, before: Iterable[int], tokens: Iterable[int]) -> str:
    """Decodes all tokens together and returns the text that follows the text of ``before``."""
    before = list(before)
    return _beyond(tokenizer.decode(before), tokenizer.decode([*before, *tokens]))


def _beyond(text: str, longer: str) -> str:
    """Returns the part of ``longer`` that follows what it shares with ``text``."""
    if longer.startswith(text):
        return longer[len(text):]
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, longer, strict=False))
    return longer[sum(1 for _ in shared):]
