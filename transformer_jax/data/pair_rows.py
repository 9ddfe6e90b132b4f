"""Pairs of texts as rows of token ids, for sentence embeddings."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Self

import numpy as np

from transformer_jax.data.evaluation import fixed_batches
from transformer_jax.data.labelled_rows import cut
from transformer_jax.data.packing import padding_id
from transformer_jax.data.tokens import Form, TextTokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class PairRows:
    """The two texts of each pair, each padded on the right.

    Attributes:
      tokens_N2T: Token ids, int32.
      segment_ids_N2T: 1 for tokens, 0 for padding, int32.
    """

    tokens_N2T: np.ndarray
    segment_ids_N2T: np.ndarray

    @classmethod
    def build(cls, pairs: Iterable[tuple[str, str]], tokenizer: TextTokenizer, form: Form, max_len: int) -> Self:
        """Encodes pairs.

        Args:
          pairs: The pairs, at least one.
          tokenizer: The tokenizer of the model.
          form: How the model reads a text.
          max_len: The longest row; longer texts are cut. Rows are only as long as the longest text
            needs.

        Returns:
          The rows.
        """
        encode = getattr(tokenizer, f"encode_{form}")
        rows = [cut(encode(text), max_len) for pair in pairs for text in pair]
        tokens_MT = np.full((len(rows), max(map(len, rows))), padding_id(tokenizer), np.int32)
        segment_ids_MT = np.zeros_like(tokens_MT)
        for row, ids in enumerate(rows):
            tokens_MT[row, :len(ids)], segment_ids_MT[row, :len(ids)] = ids, 1
        shape = (-1, 2, tokens_MT.shape[1])
        return cls(tokens_MT.reshape(shape), segment_ids_MT.reshape(shape))

    @property
    def digest(self) -> str:
        """The SHA-256 digest of the tokens, in hexadecimal."""
        return hashlib.sha256(repr(self.tokens_N2T.shape).encode() + self.tokens_N2T.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.tokens_N2T)

    def __getitem__(self, indices: Any) -> dict[str, np.ndarray]:
        """Returns ``tokens`` and ``segment_ids`` of some pairs."""
        return {"tokens": self.tokens_N2T[indices], "segment_ids": self.segment_ids_N2T[indices]}

    def batches(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields every pair once, in order, in batches of one shape.

        Args:
          batch_size: Pairs of every batch. The last batch is filled with padding.

        Returns:
          An iterator over batches.
        """
        return fixed_batches(len(self), batch_size, lambda rows: self[rows.start:rows.stop])
