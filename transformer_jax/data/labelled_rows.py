"""Rows of token ids with labels, for classification."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np

from transformer_jax.data.evaluation import fixed_batches
from transformer_jax.data.labelled import Labelled, LabelledText, LabelledWords, label_names
from transformer_jax.data.packing import padding_id
from transformer_jax.data.tokens import Form, Span, TextTokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledRows:
    """Texts with labels as arrays, one text a row, padded on the right.

    Attributes:
      tokens_NT: Token ids, int32.
      segment_ids_NT: 1 for tokens, 0 for padding, int32.
      labels_N: The number of the label of each text, int32; for words [N, T], with the label of a
        word at its first token.
      weights_N: 1 where there is a label, float32, in the shape of the labels.
      num_cut: The number of texts that were cut, because they were longer than a row.
    """

    tokens_NT: np.ndarray
    segment_ids_NT: np.ndarray
    labels_N: np.ndarray
    weights_N: np.ndarray
    num_cut: int

    @classmethod
    def build(cls, examples: Sequence[Labelled], labels: Sequence[str], tokenizer: TextTokenizer, form: Form,
              max_len: int) -> Self:
        """Encodes texts or words with their labels.

        Args:
          examples: The examples, at least one.
          labels: The names of all labels, in the order of their numbers.
          tokenizer: The tokenizer of the model.
          form: How the model reads a text.
          max_len: The longest row. Rows are only as long as the longest text needs.

        Returns:
          The rows.

        Raises:
          ValueError: If an example has another label.
        """
        numbers = {label: number for number, label in enumerate(labels)}
        unknown = [label for label in label_names(examples) if label not in numbers]
        if unknown:
            raise ValueError(f"the examples have the label {unknown[0]!r}, which the model does not know; its labels "
                             f"are {', '.join(labels)}")
        rows = [getattr(tokenizer, f"encode_{form}")(example.texts[0]) for example in examples]
        length = min(max(map(len, rows)), max_len)
        tokens_NT = np.full((len(rows), length), padding_id(tokenizer), np.int32)
        segment_ids_NT = np.zeros_like(tokens_NT)
        of_words = isinstance(examples[0], LabelledWords)
        labels_N = np.zeros(tokens_NT.shape if of_words else len(rows), np.int32)
        weights_N = np.zeros(labels_N.shape, np.float32)
        for row, (ids, example) in enumerate(zip(rows, examples, strict=True)):
            last, ids = length - (len(ids) > length), cut(ids, length)  # the last token of a cut row is not a word's
            tokens_NT[row, :len(ids)], segment_ids_NT[row, :len(ids)] = ids, 1
            if isinstance(example, LabelledText):
                labels_N[row], weights_N[row] = numbers[example.label], 1
                continue
            places = first_tokens(example.words, tokenizer.spans(example.texts[0], form))
            for place, label in zip(places, example.labels, strict=True):
                if place is not None and place < last:
                    labels_N[row, place], weights_N[row, place] = numbers[label], 1
        return cls(tokens_NT, segment_ids_NT, labels_N, weights_N, sum(len(ids) > length for ids in rows))

    @property
    def digest(self) -> str:
        """The SHA-256 digest of the arrays, in hexadecimal."""
        arrays = (self.tokens_NT, self.segment_ids_NT, self.labels_N)
        return hashlib.sha256(b"".join([repr(self.tokens_NT.shape).encode(), *map(np.ndarray.tobytes, arrays)])
                              ).hexdigest()

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def __getitem__(self, indices: Any) -> dict[str, np.ndarray]:
        """Returns ``tokens``, ``segment_ids``, ``labels`` and ``weights`` of some rows."""
        return {"tokens": self.tokens_NT[indices], "segment_ids": self.segment_ids_NT[indices],
                "labels": self.labels_N[indices], "weights": self.weights_N[indices]}

    def batches(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields every row once, in order, in batches of one shape.

        Args:
          batch_size: Rows of every batch. The last batch is filled with zeros, also in ``weights``.

        Returns:
          An iterator over batches.
        """
        return fixed_batches(len(self), batch_size, lambda rows: self[rows.start:rows.stop])


def cut(ids: Sequence[int], length: int) -> list[int]:
    """Cuts token ids that are longer than a row, but keeps the last token, which may be special."""
    return list(ids) if len(ids) <= length else [*ids[:length - 1], ids[-1]]


def first_tokens(words: Sequence[str], spans: Sequence[Span]) -> list[int | None]:
    """Finds the first token of each word, from the character spans of the tokens.

    Args:
      words: The words of a text, which has a space between two words.
      spans: The span of each token of the text.

    Returns:
      The index of the token, or ``None`` for a word that the tokenizer leaves out.
    """
    found: list[int | None] = []
    token = start = 0
    for word in words:
        while token < len(spans) and (spans[token][1] <= start or spans[token][0] == spans[token][1]):
            token += 1
        inside = token < len(spans) and spans[token][0] < start + len(word)
        found.append(token if inside else None)
        start += len(word) + 1
    return found
