"""Comparisons as arrays: what reward models and DPO learn from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Self

import numpy as np

from transformer_jax.data.conversations import Message, encode_conversation
from transformer_jax.data.preferences import Comparison
from transformer_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Rankings:
    """Ranked responses, each with its prompt before it, a text a row, padded on the right.

    Attributes:
      tokens_NKT: K is the largest number of responses to a prompt.
      segment_ids_NKT: 1 for tokens, 0 for padding.
      mask_NKT: True for the tokens of the response, its ``</s>`` included.
      ranks_NK: 1 is the best, equal ranks are a tie, 0 is no response.
      reference_logprobs_NK: log P of each response under a reference model, if it was measured; for
        DPO.
    """

    tokens_NKT: np.ndarray
    segment_ids_NKT: np.ndarray
    mask_NKT: np.ndarray
    ranks_NK: np.ndarray
    reference_logprobs_NK: np.ndarray | None = None

    @classmethod
    def build(cls, comparisons: Sequence[Comparison], tokenizer: Tokenizer, max_len: int) -> Self:
        """Encodes comparisons by the chat template.

        Args:
          comparisons: see :func:`transformer_jax.data.preferences.read_comparisons`.
          tokenizer: one with role tokens.
          max_len: the context of the model; rows are only as long as the longest text needs.

        Raises:
          ValueError: no comparison, a text that is longer than the context, or a tokenizer without
            role tokens.
        """
        if not comparisons:
            raise ValueError("there is no comparison to learn from")
        encoded = [[encode_conversation((*comparison.prompt, Message("assistant", response)), tokenizer)
                    for response in comparison.responses] for comparison in comparisons]
        longest = 0
        for number, responses in enumerate(encoded, start=1):
            length = max(len(ids) for ids, _ in responses)
            if length > max_len:
                raise ValueError(f"comparison {number} has a response that makes {length} tokens with its prompt, more "
                                 f"than the model's context of {max_len}; leave it out or shorten it")
            longest = max(longest, length)
        most = max(map(len, encoded))
        tokens_NKT = np.full((len(encoded), most, min(-(-longest // 8) * 8, max_len)), tokenizer.pad_id, np.int32)
        segment_ids_NKT = np.zeros_like(tokens_NKT)
        mask_NKT = np.zeros(tokens_NKT.shape, bool)
        ranks_NK = np.zeros(tokens_NKT.shape[:2], np.int32)
        for n, (comparison, responses) in enumerate(zip(comparisons, encoded, strict=True)):
            given = comparison.ranks or range(len(responses))
            ranks_NK[n, :len(responses)] = np.unique(given, return_inverse=True)[1] + 1
            prompt_len = len(encode_conversation(comparison.prompt, tokenizer)[0]) + 1
            for k, (ids, _) in enumerate(responses):
                tokens_NKT[n, k, :len(ids)] = ids
                segment_ids_NKT[n, k, :len(ids)] = 1
                mask_NKT[n, k, prompt_len:len(ids)] = True
        return cls(tokens_NKT, segment_ids_NKT, mask_NKT, ranks_NK)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what is learned from, in hexadecimal."""
        digest = hashlib.sha256(repr(self.tokens_NKT.shape).encode())
        for array in (self.tokens_NKT, self.segment_ids_NKT, self.mask_NKT, self.ranks_NK):
            digest.update(array.astype("<i4").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.tokens_NKT)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Batches with ``tokens``, ``segment_ids`` and ``mask`` ``[B, K, T]``, ``ranks`` and, where
        they were measured, ``reference_logprobs`` ``[B, K]``."""
        batch = {"tokens": self.tokens_NKT[indices], "segment_ids": self.segment_ids_NKT[indices],
                 "mask": self.mask_NKT[indices], "ranks": self.ranks_NK[indices]}
        if self.reference_logprobs_NK is not None:
            batch["reference_logprobs"] = self.reference_logprobs_NK[indices]
        return batch

    def batches(self, batch_size: int) -> list[dict[str, np.ndarray]]:
        """All comparisons in order, for evaluation; the last batch is filled up with rows without
        responses."""
        found = []
        for start in range(0, len(self), batch_size):
            batch = self[start:start + batch_size]
            missing = batch_size - len(batch["ranks"])
            found.append({name: np.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) for name, x in batch.items()})
        return found
