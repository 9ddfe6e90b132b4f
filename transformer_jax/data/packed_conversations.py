"""Rows of fixed length that are filled with conversations, for supervised fine-tuning."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from transformer_jax.data.conversations import AnyTokenizer, Conversation, encode_conversation
from transformer_jax.data.packing import pack_rows
from transformer_jax.json_files import located


@dataclasses.dataclass(frozen=True, eq=False)
class PackedConversations:
    """Rows of conversations, in the form that ``make_batches`` accepts.

    Several conversations share a row, and segment ids tell them apart. ``encode_conversation``
    encodes each conversation. Each token predicts the next one, and only the assistant's text is
    learned.

    Attributes:
      tokens: Token ids [R, T], in the smallest unsigned type that holds the vocabulary. They are 0
        after the last conversation.
      targets: The next token of each position, in the same form.
      is_learned: Whether each target is learned, bool [R, T].
      segment_ids: 1, 2, ... for the conversations of a row and 0 for padding, unsigned [R, T].
      num_read: Number of conversations that were read.
      num_overlong: How many of them are left out because they have more than T + 1 tokens.
    """

    tokens: np.ndarray
    targets: np.ndarray
    is_learned: np.ndarray
    segment_ids: np.ndarray
    num_read: int
    num_overlong: int

    @classmethod
    def build(
        cls, conversations: Sequence[Conversation], tokenizer: AnyTokenizer, length: int
    ) -> "PackedConversations":
        """Tokenizes conversations and packs them into rows.

        A conversation that is longer than a row is left out, and is counted in ``num_overlong``.

        Args:
          conversations: The conversations, for instance those of ``read_demonstrations``.
          tokenizer: A tokenizer with role tokens, or a tokenizer from Hugging Face.
          length: T, the number of tokens in a row, at most the context of the model.

        Returns:
          The rows.

        Raises:
          ValueError: If there is no conversation, if one has no answer of the assistant, if none
            fits into a row, or if the tokenizer has no role tokens.
        """
        if not conversations:
            raise ValueError("there is no conversation to make rows of")
        examples, shortest = [], None
        for number, conversation in enumerate(conversations, start=1):
            with located(f"conversation {number}"):
                ids, is_learned = encode_conversation(conversation, tokenizer)
            if not any(is_learned):
                raise ValueError(f"conversation {number} has no answer of the assistant to learn")
            shortest = len(ids) if shortest is None else min(shortest, len(ids))
            if len(ids) <= length + 1:
                examples.append(np.array([ids[:-1], ids[1:], is_learned[1:]]))
        if not examples:
            raise ValueError(
                f"none of {len(conversations):,} conversations fits a row: the shortest has {shortest} tokens, and a "
                f"context of {length} takes {length + 1}"
            )
        (tokens, targets, is_learned), segment_ids = pack_rows(examples, length)
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
        return cls(
            tokens.astype(dtype),
            targets.astype(dtype),
            is_learned.astype(bool),
            segment_ids.astype(np.min_scalar_type(length)),
            len(conversations),
            len(conversations) - len(examples),
        )

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 digest of the rows, in hexadecimal."""
        digest = hashlib.sha256(repr(self.tokens.shape).encode())
        for array in (self.tokens, self.targets, self.is_learned, self.segment_ids):
            digest.update(array.astype("<u4").tobytes())
        return digest.hexdigest()

    def summary(self) -> str:
        """Describes the rows in one line.

        Returns:
          How many conversations were read and left out, and how much of the rows is filled.
        """
        length = self.tokens.shape[1]
        return (
            f"{self.num_read:,} conversations, {self.num_overlong:,} longer than the context of {length} tokens left "
            f"out, {len(self):,} rows, {100 * (self.segment_ids != 0).mean():.0f} % full, {self.is_learned.sum():,} "
            "tokens to learn"
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int | Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Returns ``tokens``, ``targets`` and ``segment_ids``, int32, and ``weights``, float32,
        which is 1 for targets that are learned.

        Args:
          index: One row, for arrays [T], or B rows, for arrays [B, T].

        Returns:
          The arrays by name.
        """
        return {
            "tokens": self.tokens[index].astype(np.int32),
            "targets": self.targets[index].astype(np.int32),
            "segment_ids": self.segment_ids[index].astype(np.int32),
            "weights": self.is_learned[index].astype(np.float32),
        }
