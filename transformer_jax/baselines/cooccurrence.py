"""One-hot vectors and the matrix of co-occurrences, the first ways to write words as numbers, and
why they do not scale."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from transformer_jax.data.text import check_texts
from transformer_jax.data.words import words_of


@dataclasses.dataclass(frozen=True, eq=False)
class Cooccurrences:
    """How often words stand near each other.

    Attributes:
      words: The words in the order of their first occurrence; word i has row and column i.
      counts_VV: The number of times that the word of the column is at most ``window`` words from
        the word of the row, in the same sentence; int64 ``[V, V]``.
      window: The largest distance between two words.
    """

    words: tuple[str, ...]
    counts_VV: np.ndarray
    window: int

    def one_hot(self, word: str) -> np.ndarray:
        """Returns the vector of a word that is 1 at the place of the word and 0 elsewhere.

        Args:
          word: One of the words.

        Returns:
          A vector of length V.

        Raises:
          ValueError: If there is no such word.
        """
        return np.eye(len(self.words), dtype=np.int64)[self._place(word)]

    def similarity(self, word: str, other: str) -> float:
        """Computes the cosine of the angle between the rows of two words. With one-hot vectors it
        would be 0 for every pair of different words.

        Args:
          word: One of the words.
          other: Another one.

        Returns:
          The cosine; 0 if one of the words never stands near another.

        Raises:
          ValueError: If there is no such word.
        """
        first, second = (self.counts_VV[self._place(each)] for each in (word, other))
        lengths = float(np.linalg.norm(first) * np.linalg.norm(second))
        return float(first @ second) / lengths if lengths else 0.0

    def table(self) -> str:
        """Formats the matrix as lines of text, with the words at the left and at the top.

        Returns:
          One line for each word, after a line with all words.
        """
        width = max(map(len, self.words))
        columns = [max(len(word), len(str(column.max()))) for word, column in zip(self.words, self.counts_VV.T,
                                                                                  strict=True)]
        head = " " * width + "".join(f"  {word:>{size}}" for word, size in zip(self.words, columns, strict=True))
        rows = [f"{word:<{width}}" + "".join(f"  {count:>{size}}" for count, size in zip(row, columns, strict=True))
                for word, row in zip(self.words, self.counts_VV, strict=True)]
        return "\n".join([head, *rows])

    def plot(self, path: str | pathlib.Path) -> None:
        """Draws the matrix.

        Args:
          path: The picture; its ending chooses the format.
        """
        from matplotlib.figure import Figure

        size = 0.45 * len(self.words) + 1.5
        figure = Figure(figsize=(size, size), layout="constrained")
        axes = figure.subplots()
        axes.imshow(self.counts_VV, cmap="Blues")
        for (row, column), count in np.ndenumerate(self.counts_VV):
            is_dark = count > 0.6 * self.counts_VV.max()
            axes.text(column, row, str(count), ha="center", va="center", color="white" if is_dark else "black")
        axes.set_xticks(range(len(self.words)), list(self.words), rotation=60, ha="right")
        axes.set_yticks(range(len(self.words)), list(self.words))
        axes.set_title(f"words at most {self.window} apart", fontsize=10)
        figure.savefig(path, dpi=120)

    def _place(self, word: str) -> int:
        if word not in self.words:
            raise ValueError(f"there is no word {word!r}; the words are {', '.join(self.words[:20])}")
        return self.words.index(word)


def count_cooccurrences(sentences: Sequence[str], *, window: int = 2) -> Cooccurrences:
    """Counts how often words stand near each other. The matrix is dense, so this is for a few
    sentences; see ``matrix_bytes``.

    Args:
      sentences: The sentences. Words are in lower case and without punctuation.
      window: The largest distance between two words.

    Returns:
      The words and the matrix.

    Raises:
      ValueError: If there is no word, or the window is not positive.
    """
    if window < 1:
        raise ValueError(f"window={window} must be at least 1")
    split = [words_of(sentence).split() for sentence in check_texts(sentences, "sentence")]
    words = list(dict.fromkeys(word for sentence in split for word in sentence))
    if not words:
        raise ValueError("the sentences have no words; give sentences with letters or digits")
    places = {word: place for place, word in enumerate(words)}
    counts_VV = np.zeros((len(words), len(words)), np.int64)
    for sentence in split:
        tokens = np.array([places[word] for word in sentence], np.int64)
        for distance in range(1, window + 1):
            np.add.at(counts_VV, (tokens[:-distance], tokens[distance:]), 1)
            np.add.at(counts_VV, (tokens[distance:], tokens[:-distance]), 1)
    return Cooccurrences(tuple(words), counts_VV, window)


def matrix_bytes(vocab_size: int, *, itemsize: int = 4) -> int:
    """Computes the memory of a dense matrix of co-occurrences.

    Args:
      vocab_size: V, the number of words.
      itemsize: The bytes of a count.

    Returns:
      ``V * V * itemsize``: it grows with the square of the vocabulary, but a table of word vectors
      only in proportion to it.
    """
    return vocab_size * vocab_size * itemsize
