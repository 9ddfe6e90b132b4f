"""Words of texts in lower case, and rows of words from which frequent ones are left out at
random."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> str:
    """Returns the words of a text in lower case, without punctuation, with a space before each.

    Args:
      text: The text.

    Returns:
      The words. A tokenizer of words gives every word the same token, also the first one, because
      there is a space before each.
    """
    return "".join(f" {word}" for word in _WORD.findall(text.lower()))


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of documents; each iteration reads the documents again.

    Attributes:
      documents: The documents.
    """

    documents: Iterable[str]

    def __iter__(self) -> Iterator[str]:
        return map(words_of, self.documents)


class WordRows:
    """Rows of words that follow each other, without rare words and special tokens.

    Args:
      tokens: The tokens of a corpus: for each document ``end_of_text_id``, then its words.
      is_kept_V: True for the tokens that are not left out.
      end_of_text_id: The token that begins a document.
      length: T, the number of words in a row.

    Raises:
      ValueError: If there are fewer words than one row needs.
    """

    def __init__(self, tokens: np.ndarray, is_kept_V: np.ndarray, end_of_text_id: int, length: int):
        tokens = np.asarray(tokens)
        places = np.flatnonzero(is_kept_V[tokens])
        if len(places) < length:
            raise ValueError(f"the text has {len(places):,} words that are frequent enough, but one row needs "
                             f"{length:,}; give more text, or lower model.min_count or model.max_len")
        self._words = tokens[places].astype(np.int32)
        self._segments = np.cumsum(tokens == end_of_text_id, dtype=np.int32)[places]
        self._length = length

    def __len__(self) -> int:
        return len(self._words) // self._length

    def __getitem__(self, indices_B: np.ndarray) -> dict[str, np.ndarray]:
        """Returns ``tokens`` and ``segment_ids`` of rows, int32 ``[B, T]``."""
        end = len(self) * self._length
        return {"tokens": self._words[:end].reshape(-1, self._length)[indices_B],
                "segment_ids": self._segments[:end].reshape(-1, self._length)[indices_B]}


@dataclasses.dataclass(frozen=True)
class Subsampling:
    """Leaves out frequent words of rows at random, and cuts the rest into blocks (Mikolov et al.,
    2013, section 2.3). It transforms batches of ``WordRows``.

    Attributes:
      keep_V: The probability with which each word is kept.
      num_steps: S, the number of microbatches that a batch is cut into.
      num_blocks: The blocks of a microbatch.
      block: L, the number of words in a block.
      num_rows: The rows of a whole batch; each process transforms a share of them.
    """

    keep_V: np.ndarray
    num_steps: int
    num_blocks: int
    block: int
    num_rows: int

    def __call__(self, batch: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Transforms a batch.

        Args:
          batch: ``tokens`` and ``segment_ids`` ``[B, T]``.
          rng: Draws the words that are left out.

        Returns:
          ``tokens`` and ``segment_ids``, int32 ``[num_blocks * L, S]``: in column s the blocks of
          microbatch s, which come from different places of the batch. Words that do not fit are
          dropped, and the segment of unused places is 0.
        """
        words = batch["tokens"]
        is_kept = rng.random(words.shape, np.float32) < self.keep_V[words]
        num_blocks = self.num_blocks * len(words) // self.num_rows
        rows = np.broadcast_to(np.arange(1, len(words) + 1, dtype=np.int64)[:, None], words.shape)
        # A segment is a row and a document in it: neighbouring rows come from different places.
        segments = rows * (1 << 20) + batch["segment_ids"] % (1 << 20)
        return {"tokens": self._cut(words[is_kept], num_blocks),
                "segment_ids": self._cut(segments[is_kept].astype(np.int32), num_blocks)}

    def _cut(self, values: np.ndarray, num_blocks: int) -> np.ndarray:
        """Cuts a stream into blocks, and deals them out to the microbatches in turn."""
        filled = np.zeros(num_blocks * self.num_steps * self.block, np.int32)
        filled[:min(len(values), len(filled))] = values[:len(filled)]
        return np.ascontiguousarray(filled.reshape(num_blocks, self.num_steps, self.block).transpose(0, 2, 1)).reshape(
            num_blocks * self.block, self.num_steps)
