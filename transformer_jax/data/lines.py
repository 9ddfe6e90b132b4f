"""Lines of text in rows of fixed length, for masked language modelling."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from transformer_jax.data.packing import lay_out
from transformer_jax.data.tokenizer import Tokenizer

_LINE_END = re.compile("\r\n?|\n")


def text_lines(documents: Iterable[str]) -> list[str]:
    """Returns the lines of all documents, blank ones left out and the line ends LF, CRLF and CR
    taken off."""
    return [line for document in documents for line in _LINE_END.split(document) if line.strip()]


def split_lines(documents: Iterable[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """Cuts the lines of all documents, blank ones left out, in two, of which the second is the
    validation split.

    Args:
        documents: Texts, such as `read_documents` gives; see `text_lines`.
        validation_fraction: The last fraction of the lines; the cut is at line `int(n * (1 -
          validation_fraction))`.

    Raises:
        ValueError: the fraction is not within (0, 1), or leaves one part without lines.
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
    """Rows of lines, each `<s>` tokens `</s>`, several in a row where they fit, kept apart by
    segment ids.

    Attributes:
        tokens: Ids [R, T] in the smallest unsigned type that holds the vocabulary; `pad_id` after
          the last line.
        segment_ids: 1, 2, ... for the lines of a row and 0 for padding, unsigned [R, T].
        num_lines: How many lines were given.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    num_lines: int

    @classmethod
    def build(cls, lines: Sequence[str], tokenizer: Tokenizer, length: int) -> "LineRows":
        """Tokenises lines and packs them.

        Args:
            lines: For instance one part of `split_lines`; from the empty line nothing is made.
            tokenizer: Encodes them; names of special tokens in them are ordinary text.
            length: T, tokens of a row; a line of more, `<s>` and `</s>` included, is cut into
              several such blocks.

        Raises:
            ValueError: `length` below 3, or no text.
        """
        if length < 3:
            raise ValueError(f"length={length} must be at least 3: <s>, a token and </s>")
        blocks = []
        for ids in tokenizer.encode_batch(lines):
            for start in range(0, len(ids), length - 2):
                blocks.append([tokenizer.bos_id, *ids[start : start + length - 2], tokenizer.eos_id])
        if not blocks:
            raise ValueError("there is no line of text to make rows of")
        (tokens,), segment_ids = lay_out([np.array([block]) for block in blocks], length)
        tokens = np.where(segment_ids, tokens, tokenizer.pad_id)
        return cls(
            tokens.astype(np.min_scalar_type(tokenizer.vocab_size - 1)),
            segment_ids.astype(np.min_scalar_type(length)),
            len(lines),
        )

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the rows in hexadecimal."""
        digest = hashlib.sha256(repr(self.tokens.shape).encode())
        for array in (self.tokens, self.segment_ids):
            digest.update(array.astype("<u4").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int | Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Returns `tokens` and `segment_ids`, int32.

        Args:
            index: One row, for arrays [T], or B of them, for arrays [B, T].
        """
        return {"tokens": self.tokens[index].astype(np.int32), "segment_ids": self.segment_ids[index].astype(np.int32)}
