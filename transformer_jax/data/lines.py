"""Rows of fixed length that are filled with lines of text, for masked language modelling."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from transformer_jax.data.packing import pack_rows, padding_id
from transformer_jax.data.text import check_texts
from transformer_jax.data.tokenizer import Tokenizer

_LINE_END = re.compile("\r\n?|\n")


def text_lines(documents: Iterable[str]) -> list[str]:
    """Splits documents into lines.

    Args:
      documents: Texts, for instance those of ``read_documents``.

    Returns:
      The lines of all documents, without the line endings (LF, CRLF and CR) and without blank
      lines.
    """
    return [line for document in documents for line in _LINE_END.split(document) if line.strip()]


def split_lines(documents: Iterable[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """Splits the lines of documents into a training part and a validation part.

    Args:
      documents: Texts, for instance those of ``read_documents``. Blank lines are left out.
      validation_fraction: The fraction of the n lines, at the end, for validation. The second part
        starts at line ``int(n * (1 - validation_fraction))``.

    Returns:
      The lines for training and the lines for validation.

    Raises:
      ValueError: If the fraction is not between 0 and 1, or if a part would have no lines.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}")
    lines = text_lines(documents)
    cut = int(len(lines) * (1 - validation_fraction))
    if not 0 < cut < len(lines):
        raise ValueError(f"validation_fraction={validation_fraction} of {len(lines)} lines leaves a part empty")
    return lines[:cut], lines[cut:]


@dataclasses.dataclass(frozen=True, eq=False)
class LineRows:
    """Rows of lines, in the form that ``make_batches`` accepts.

    Each line is ``<s>``, its tokens and ``</s>``. Several lines share a row if they fit, and
    segment ids tell them apart.

    Attributes:
      tokens: Token ids [R, T], in the smallest unsigned type that holds the vocabulary. Padding
        follows the last line.
      segment_ids: 1, 2, ... for the lines of a row and 0 for padding, unsigned [R, T].
      num_lines: Number of lines that were given to ``build``.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    num_lines: int

    @classmethod
    def build(cls, lines: Sequence[str], tokenizer: Tokenizer, length: int) -> "LineRows":
        """Tokenizes lines and packs them into rows.

        Args:
          lines: Lines of text, for instance one part of ``split_lines``. Empty lines are skipped.
          tokenizer: Encodes the lines. Names of special tokens in them are ordinary text.
          length: T, the number of tokens in a row. A line that is longer, with ``<s>`` and
            ``</s>``, is split into several blocks, each of which has its own ``<s>`` and ``</s>``.

        Returns:
          The rows.

        Raises:
          ValueError: If ``length`` is below 3, if there is no text, or if a line is not a string.
        """
        before, after = tokenizer.frame("masked")
        room = length - len(before) - len(after)
        if room < 1:
            raise ValueError(f"length={length} must be at least {length - room + 1}: <s>, a token and </s>")
        blocks = []
        for ids in tokenizer.encode_batch(check_texts(lines, "line of text"), allow_special=False):
            for start in range(0, len(ids), room):
                blocks.append([*before, *ids[start : start + room], *after])
        if not blocks:
            raise ValueError("there is no line of text to make rows of")
        (tokens,), segment_ids = pack_rows([np.array([block]) for block in blocks], length)
        tokens = np.where(segment_ids, tokens, padding_id(tokenizer))
        return cls(
            tokens.astype(np.min_scalar_type(tokenizer.vocab_size - 1)),
            segment_ids.astype(np.min_scalar_type(length)),
            len(lines),
        )

    @functools.cached_property
    def num_tokens(self) -> int:
        """The number of tokens in all rows, without padding."""
        return int(np.count_nonzero(self.segment_ids))

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 digest of the rows, in hexadecimal."""
        digest = hashlib.sha256(repr(self.tokens.shape).encode())
        for array in (self.tokens, self.segment_ids):
            digest.update(array.astype("<u4").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int | Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Returns ``tokens`` and ``segment_ids``, int32.

        Args:
          index: One row, for arrays [T], or B rows, for arrays [B, T].

        Returns:
          The arrays by name.
        """
        return {"tokens": self.tokens[index].astype(np.int32), "segment_ids": self.segment_ids[index].astype(np.int32)}
