"""Conversations in rows of fixed length, for supervised fine-tuning."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from transformer_jax.data.conversations import Conversation, encode_conversation
from transformer_jax.data.packing import lay_out
from transformer_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class PackedConversations:
    """Rows in which conversations lie end to end, kept apart by segment ids; a source for
    `make_batches`.

    Each is encoded by `encode_conversation`, and its every token predicts the next one. What is
    learned is what the assistant says.

    Attributes:
        tokens: Ids [R, T] in the smallest unsigned type that holds the vocabulary; 0 after the last
          conversation.
        targets: The ids one place on, likewise.
        is_learned: Which targets are to be learned, bool [R, T].
        segment_ids: 1, 2, ... for the conversations of a row and 0 for padding, unsigned [R, T].
        num_read: How many conversations there were.
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
        cls, conversations: Sequence[Conversation], tokenizer: Tokenizer, length: int
    ) -> "PackedConversations":
        """Tokenises conversations and packs them; one longer than a row is left out whole, and
        counted.

        Args:
            conversations: For instance what `read_demonstrations` returns.
            tokenizer: One with role tokens.
            length: T, tokens of a row: at most the context of the model.

        Raises:
            ValueError: no conversation, one without an answer of the assistant, none that fits a
                row, or a tokenizer without role tokens.
        """
        if not conversations:
            raise ValueError("there is no conversation to make rows of")
        examples, shortest = [], None
        for number, conversation in enumerate(conversations, start=1):
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
        (tokens, targets, is_learned), segment_ids = lay_out(examples, length)
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
        """SHA-256 of the rows in hexadecimal."""
        digest = hashlib.sha256(repr(self.tokens.shape).encode())
        for array in (self.tokens, self.targets, self.is_learned, self.segment_ids):
            digest.update(array.astype("<u4").tobytes())
        return digest.hexdigest()

    def summary(self) -> str:
        """Returns one line: how many conversations were read and left out, and how densely the rows
        are filled."""
        length = self.tokens.shape[1]
        return (
            f"{self.num_read:,} conversations, {self.num_overlong:,} longer than the context of {length} tokens left "
            f"out, {len(self):,} rows, {100 * (self.segment_ids != 0).mean():.0f} % full, {self.is_learned.sum():,} "
            "tokens to learn"
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int | Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Returns `tokens`, `targets` and `segment_ids`, int32, and `weights`, float32, 1 for
        targets to be learned.

        Args:
            index: One row, for arrays [T], or B of them, for arrays [B, T].
        """
        return {
            "tokens": self.tokens[index].astype(np.int32),
            "targets": self.targets[index].astype(np.int32),
            "segment_ids": self.segment_ids[index].astype(np.int32),
            "weights": self.is_learned[index].astype(np.float32),
        }
