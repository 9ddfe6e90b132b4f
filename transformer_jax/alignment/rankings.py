"""Ranked responses as arrays, which reward models and DPO learn from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Self

import numpy as np

from transformer_jax.data.conversations import AnyTokenizer, Message, encode_conversation
from transformer_jax.data.evaluation import fixed_batches
from transformer_jax.data.packing import padding_id
from transformer_jax.data.preferences import Comparison
from transformer_jax.json_files import located


@dataclasses.dataclass(frozen=True, eq=False)
class Rankings:
    """Ranked responses to N prompts, as arrays.

    Each row holds one text, a prompt followed by one response, and is padded on the right to T
    tokens. K is the largest number of responses to a prompt.

    Attributes:
      tokens_NKT: token ids, int32.
      segment_ids_NKT: 1 for tokens, 0 for padding, int32.
      mask_NKT: True for the tokens of the response, including its ``</s>``.
      ranks_NK: 1 for the best response; responses with the same rank are tied; 0 if there is no
        response. int32.
      reference_logprobs_NK: log probability of each response under a reference model, in nats, for
        DPO; ``None`` until ``with_reference`` computes it.
    """

    tokens_NKT: np.ndarray
    segment_ids_NKT: np.ndarray
    mask_NKT: np.ndarray
    ranks_NK: np.ndarray
    reference_logprobs_NK: np.ndarray | None = None

    @classmethod
    def build(cls, comparisons: Sequence[Comparison], tokenizer: AnyTokenizer, max_len: int) -> Self:
        """Encodes comparisons with the chat template.

        Args:
          comparisons: the comparisons, as ``transformer_jax.data.read_comparisons`` reads them.
          tokenizer: a tokenizer with role tokens.
          max_len: the context length of the model, in tokens. Rows are only as long as the longest
            text needs.

        Returns:
          The rankings, without log probabilities of a reference model.

        Raises:
          ValueError: if there is no comparison, a text is longer than the context, or the tokenizer
            has no role tokens.
        """
        if not comparisons:
            raise ValueError("got no comparisons; expected at least one to learn from")
        encoded = []
        for number, comparison in enumerate(comparisons, start=1):
            if not isinstance(comparison, Comparison):
                raise ValueError(f"comparison {number} is a {type(comparison).__name__}; expected a tj.data.Comparison")
            prompt = [dataclasses.replace(message, is_learned=False) for message in comparison.prompt]
            with located(f"comparison {number}"):
                encoded.append([encode_conversation((*prompt, Message("assistant", response)), tokenizer)
                                for response in comparison.responses])
        longest = 0
        for number, responses in enumerate(encoded, start=1):
            length = max(len(ids) for ids, _ in responses)
            if length > max_len:
                raise ValueError(f"comparison {number}: a response and its prompt have {length} tokens together, which "
                                 f"is more than the model's context of {max_len} tokens; shorten the comparison or "
                                 "leave it out")
            longest = max(longest, length)
        num_responses = max(map(len, encoded))
        row_length = min(-(-longest // 8) * 8, max_len)  # a multiple of 8, so that fewer shapes are compiled
        tokens_NKT = np.full((len(encoded), num_responses, row_length), padding_id(tokenizer), np.int32)
        segment_ids_NKT = np.zeros_like(tokens_NKT)
        mask_NKT = np.zeros(tokens_NKT.shape, bool)
        ranks_NK = np.zeros(tokens_NKT.shape[:2], np.int32)
        for n, (comparison, responses) in enumerate(zip(comparisons, encoded, strict=True)):
            given = comparison.ranks or range(len(responses))
            ranks_NK[n, :len(responses)] = np.unique(given, return_inverse=True)[1] + 1
            for k, (ids, is_learned) in enumerate(responses):
                tokens_NKT[n, k, :len(ids)] = ids
                segment_ids_NKT[n, k, :len(ids)] = 1
                mask_NKT[n, k, :len(ids)] = is_learned
        return cls(tokens_NKT, segment_ids_NKT, mask_NKT, ranks_NK)

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of the tokens, segment ids, mask and ranks, in hexadecimal."""
        digest = hashlib.sha256(repr(self.tokens_NKT.shape).encode())
        for array in (self.tokens_NKT, self.segment_ids_NKT, self.mask_NKT, self.ranks_NK):
            digest.update(array.astype("<i4").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.tokens_NKT)

    def __getitem__(self, indices: np.ndarray | slice) -> dict[str, np.ndarray]:
        """Returns a batch of B prompts.

        It has ``tokens``, ``segment_ids`` and ``mask`` ``[B, K, T]``, ``ranks`` ``[B, K]``, and
        ``reference_logprobs`` ``[B, K]`` if ``with_reference`` has computed them.
        """
        batch = {"tokens": self.tokens_NKT[indices], "segment_ids": self.segment_ids_NKT[indices],
                 "mask": self.mask_NKT[indices], "ranks": self.ranks_NK[indices]}
        if self.reference_logprobs_NK is not None:
            batch["reference_logprobs"] = self.reference_logprobs_NK[indices]
        return batch

    def batches(self, batch_size: int) -> list[dict[str, np.ndarray]]:
        """Returns all rankings in order, in batches of equal size, for evaluation.

        Args:
          batch_size: number of prompts in a batch.

        Returns:
          The batches, as indexing returns them. The last batch is padded with prompts that have no
          responses.

        Raises:
          ValueError: If ``batch_size`` is not positive.
        """
        return list(fixed_batches(len(self), batch_size, lambda rows: self[rows.start:rows.stop]))
