"""Token ids: whether a vocabulary has them, and their text as they come one by one."""

import codecs
from collections.abc import Iterable
from typing import Protocol

import numpy as np


class DecodesBytes(Protocol):
    """A tokenizer that knows the bytes of its tokens."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the UTF-8 bytes of the tokens."""
        ...


def checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Returns token ids, which may be an array, as a list; ValueError for one that the vocabulary does not have."""
    tokens = np.asarray(ids if hasattr(ids, "__array__") else list(ids)).tolist()
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {vocab_size} tokens")
    return tokens


class StreamDecoder:
    """Decodes tokens one at a time into whole characters; the strings together are `decode` of all the tokens."""

    def __init__(self, tokenizer: DecodesBytes):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Takes the next token and returns the characters that are now complete, often none or several."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """Returns U+FFFD for an incomplete last character, else nothing."""
        return self._decoder.decode(b"", final=True)
