"""Encodes the runs of a text (see ``split_runs``) with a SentencePiece model."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from transformer_jax.data.sentencepiece_pieces import spans_of_runs, with_plain_spaces
from transformer_jax.data.sentencepiece_training import (
    ISOLATED,
    ISOLATED_PIECES,
    SPACE,
    isolated_or_special,
    split_runs,
)
from transformer_jax.data.tokens import Span

_BLOCK_CHARS = 1 << 20


class RunEncoder:
    """Encodes runs with a model, and isolated characters with tokens of their own."""

    def __init__(self, model: Any, unk_id: int, special: Mapping[str, list[int]]):
        """Computes the tokens of the isolated characters.

        Args:
          model: A SentencePieceProcessor.
          unk_id: The token for characters that the model does not know.
          special: The id of each special token by name, in a list.
        """
        self._model = model
        self._unk_id = unk_id
        self._has_bytes = model.is_byte(model.piece_to_id("<0x00>"))
        self._space_bytes = self._byte_ids(SPACE)  # how SentencePiece spells the mark of a space
        self._isolated = {char: self._isolated_ids(char) for char in "\0" + SPACE + ISOLATED_PIECES}
        self._isolated_or_special = isolated_or_special(special)
        self._special = special

    def encode_text(self, text: str, allow_special: bool) -> list[int]:
        """Encodes a text; ``allow_special`` turns names of special tokens into these tokens."""
        pattern = self._isolated_or_special if allow_special else ISOLATED
        fixed = {**self._isolated, **self._special} if allow_special else self._isolated
        return self._encode(list(split_runs(text, pattern)), fixed)

    def spans(self, text: str, start: int) -> list[Span]:
        """Returns the character span of each token of a text that begins at a position."""
        return spans_of_runs(self._model, split_runs(text, ISOLATED), self._isolated, self._space_bytes, start)

    def encode_documents(self, documents: Iterable[str], start_id: int) -> Iterator[np.ndarray]:
        """Encodes documents about a million characters at a time, on all cores.

        Args:
          documents: Texts of any length.
          start_id: The token before each document.

        Yields:
          int32 arrays. Together they are the token stream.
        """
        fixed: Mapping[str | None, list[int]] = self._isolated | {None: [start_id]}
        block: list[str | None] = []
        num_chars = 0
        for document in documents:
            for run in itertools.chain([None], split_runs(document, ISOLATED)):
                block.append(run)
                num_chars += len(run or "")
                if num_chars >= _BLOCK_CHARS:
                    yield np.asarray(self._encode(block, fixed, parallel=True), np.int32)
                    block, num_chars = [], 0
        if block:
            yield np.asarray(self._encode(block, fixed, parallel=True), np.int32)

    def _encode(self, runs: Sequence[Any], fixed: Mapping[Any, list[int]], *, parallel: bool = False) -> list[int]:
        """Encodes runs, those in ``fixed`` to the tokens that it gives."""
        ordinary = [run for run in runs if run not in fixed]
        # Threads cost 50 us for each call, which is too much for a prompt.
        encoded = self._model.encode(ordinary, num_threads=-1) if parallel else map(self._model.encode, ordinary)
        encoded = iter(encoded)
        plain = (fixed[run] if run in fixed else self._with_plain_spaces(next(encoded)) for run in runs)
        return list(itertools.chain.from_iterable(plain))

    def _byte_ids(self, text: str) -> list[int]:
        """Returns the byte tokens that spell a text; none without byte fallback."""
        if not self._has_bytes:
            return []
        return [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]

    def _isolated_ids(self, char: str) -> list[int]:
        """Returns the tokens of an isolated character."""
        token = self._model.piece_to_id(char) if char in ISOLATED_PIECES else self._unk_id
        return [token] if token != self._unk_id else self._byte_ids(char) or [self._unk_id]

    def _with_plain_spaces(self, ids: list[int]) -> list[int]:
        """Replaces the byte tokens of SentencePiece's mark of a space by the byte token of a
        space."""
        return with_plain_spaces(ids, ids, self._space_bytes, lambda _: self._byte_ids(" ")[0])
