"""Mixtures of corpora: rows are drawn from each corpus with a given weight."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

_RESOLUTION = 1 << 32  # weights are rounded to multiples of 1 / _RESOLUTION of their sum


class Rows(Protocol):
    """The rows of one corpus, such as ``Windows`` or ``LineRows``."""

    @property
    def num_tokens(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, indices_B: np.ndarray, /) -> Mapping[str, np.ndarray]: ...


class Drawn(NamedTuple):
    """How much of a corpus was drawn.

    Attributes:
      rows: The number of rows.
      tokens: The number of tokens in these rows, without padding.
      epochs: How often the whole corpus was drawn.
    """

    rows: int
    tokens: float
    epochs: float


class Mixture:
    """The rows of several corpora, one corpus after the other, and the weights to draw them with.

    ``make_batches`` draws from a mixture. The corpora take turns in a fixed order, so that after
    any number n of rows, a corpus with the share w has given n * w rows, up to one row for each
    corpus. Every corpus has its own shuffled epochs. grain's own ``MapDataset.mix`` works in the
    same way, but its shares can be wrong by 1 %, because it rounds the weights to multiples of a
    hundredth of the smallest one.

    Attributes:
      parts: The rows of each corpus, by its name.
      shares: The share of each corpus in the rows that are drawn; their sum is 1.

    Args:
      parts: The rows of each corpus, by its name. All rows must have the same arrays.
      weights: The weight of each corpus, by its name. They are divided by their sum. None means the
        number of rows of the corpus, so that all corpora have the same number of epochs.

    Raises:
      ValueError: If there is no corpus, a corpus has no rows or no weight, a weight has no corpus,
        or a weight is not a positive finite number.
    """

    def __init__(self, parts: Mapping[str, Rows], weights: Mapping[str, float] | None = None):
        if not parts:
            raise ValueError("a mixture needs at least one corpus, but got none")
        weights = {name: float(len(rows)) for name, rows in parts.items()} if weights is None else weights
        check_names(parts, weights)
        for name, rows in parts.items():
            if not len(rows):
                raise ValueError(f"the corpus {name!r} has no rows; give it more text, or leave it out")
            if not (math.isfinite(weights[name]) and weights[name] > 0):
                raise ValueError(f"the weight {weights[name]} of the corpus {name!r} must be positive and finite")
        self.parts = dict(parts)
        total = math.fsum(weights[name] for name in parts)
        self.shares = {name: weights[name] / total for name in parts}
        self._whole_shares = [max(1, round(share * _RESOLUTION)) for share in self.shares.values()]
        self._starts = np.cumsum([0, *map(len, parts.values())])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, indices_B: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Returns rows by their number, where the rows of a corpus follow those of the one before.

        Args:
          indices_B: The numbers of B rows.

        Returns:
          The arrays by name, ``[B, ...]``.
        """
        indices_B = np.asarray(indices_B)
        corpus_B = np.searchsorted(self._starts, indices_B, side="right") - 1
        rows: dict[str, np.ndarray] = {}
        for number, part in enumerate(self.parts.values()):
            places = np.flatnonzero(corpus_B == number)
            for name, array in part[indices_B[places] - self._starts[number]].items() if places.size else ():
                if name not in rows:
                    rows[name] = np.empty((len(indices_B), *array.shape[1:]), array.dtype)
                rows[name][places] = array
        return rows

    def counts(self, num_rows: int) -> list[int]:
        """Counts the rows of each corpus among the first rows that are drawn.

        Args:
          num_rows: The number of rows.

        Returns:
          The number of rows of each corpus, in the order of ``parts``.
        """
        counts, left, share_left = [], num_rows, sum(self._whole_shares)
        for share in self._whole_shares:
            others = left * (share_left - share) // share_left
            counts.append(left - others)
            left, share_left = others, share_left - share
        return counts

    def order(self, orders: Sequence[Any]) -> Callable[[int], int]:
        """Makes a function that says which row is drawn at which position.

        Args:
          orders: For each corpus, a sequence with the order of its own rows, as numbers from 0; it
            repeats the epochs of the corpus without end.

        Returns:
          A function from a position to the number of a row of the mixture.
        """
        def row(position: int) -> int:
            before, after = self.counts(position), self.counts(position + 1)
            corpus = next(number for number, count in enumerate(before) if after[number] != count)
            return int(self._starts[corpus]) + int(orders[corpus][before[corpus]])

        return row

    def drawn(self, num_rows: int) -> dict[str, Drawn]:
        """Computes how much of each corpus is among the first rows that are drawn.

        The table 2.2 of Brown et al. 2020 ("Language Models are Few-Shot Learners") gives these
        numbers for GPT-3.

        Args:
          num_rows: The number of rows.

        Returns:
          Rows, tokens and epochs by the name of the corpus.
        """
        counts = zip(self.parts.items(), self.counts(num_rows), strict=True)
        return {name: Drawn(count, count / len(rows) * rows.num_tokens, count / len(rows))
                for (name, rows), count in counts}

    def table(self, num_rows: int) -> str:
        """Formats the weights, and the tokens and epochs of a run, in a table.

        Args:
          num_rows: The number of rows that the run draws.

        Returns:
          One line for each corpus, after a line with headings.
        """
        width = max(map(len, ["corpus", *self.parts]))
        lines = [f"{'corpus':{width}}  {'weight':>7}  {'tokens':>15}  {'tokens drawn':>15}  {'epochs':>7}"]
        for name, (_, tokens, epochs) in self.drawn(num_rows).items():
            lines.append(f"{name:{width}}  {self.shares[name]:7.2%}  {self.parts[name].num_tokens:15,}  "
                         f"{tokens:15,.0f}  {epochs:7.2f}")
        return "\n".join(lines)


class TextsOfCorpora:
    """The texts of all corpora, one corpus after the other. Each iteration reads them again.

    Args:
      corpora: The texts of each corpus, by its name.
    """

    def __init__(self, corpora: Mapping[str, Iterable[str]]):
        self._corpora = corpora

    def __iter__(self) -> Iterator[str]:
        for texts in self._corpora.values():
            yield from texts


def check_names(corpora: Iterable[str], weighted: Iterable[str]) -> None:
    """Checks that the same corpora have texts and weights.

    Args:
      corpora: The names of the corpora that have texts.
      weighted: The names of the corpora that have a weight.

    Raises:
      ValueError: If a name is in one of them only.
    """
    corpora, weighted = list(corpora), list(weighted)
    for name in weighted:
        if name not in corpora:
            raise ValueError(f"the mixture names the corpus {name!r}, but the data has no texts for it; the data has "
                             f"{', '.join(map(repr, corpora))}")
    for name in corpora:
        if name not in weighted:
            raise ValueError(f"the data has the corpus {name!r}, but the mixture gives it no weight; the mixture has "
                             f"{', '.join(map(repr, weighted))}")
