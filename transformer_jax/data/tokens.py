"""Token ids: what makes them of a text, whether a vocabulary has them, and their text as they come
one by one."""

import codecs
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np


class StreamsText(Protocol):
    """Text of tokens that come one at a time."""

    def push(self, token: int) -> str:
        """Takes the next token and returns the characters that are now complete."""
        ...

    def finish(self) -> str:
        """Returns what is left when no token follows."""
        ...


class TextTokenizer(Protocol):
    """What decoding and inspection need of a tokenizer: ours, one of Hugging Face, or one of your
    own."""

    vocab_size: int
    bos_id: Any  # an id, or `None` where the tokenizer has no such token; so are the next three
    eos_id: Any
    pad_id: Any
    mask_id: Any

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        ...

    def encode(self, text: str, *, allow_special: bool = ...) -> list[int]:
        """Returns the token ids of a text."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the token ids that a decoder continues."""
        ...

    def encode_source(self, text: str) -> list[int]:
        """Returns the token ids of what an encoder-decoder translates."""
        ...

    def encode_masked(self, text: str) -> list[int]:
        """Returns the token ids that an encoder reads; the name of the mask is one token."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of tokens."""
        ...

    def stream_decoder(self) -> StreamsText:
        """Returns a decoder of tokens that come one at a time."""
        ...

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns a string to show for each token."""
        ...


class DecodesBytes(Protocol):
    """A tokenizer that knows the bytes of its tokens."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the UTF-8 bytes of the tokens."""
        ...


def checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Returns token ids, which may be an array, as a list; ValueError for one that the vocabulary
    does not have."""
    tokens = np.asarray(ids if hasattr(ids, "__array__") else list(ids)).tolist()
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {vocab_size} tokens")
    return tokens


class StreamDecoder:
    """Decodes tokens one at a time into whole characters; the strings together are `decode` of all
    the tokens."""

    def __init__(self, tokenizer: DecodesBytes):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Takes the next token and returns the characters that are now complete, often none or
        several."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """Returns U+FFFD for an incomplete last character, else nothing."""
        return self._decoder.decode(b"", final=True)
