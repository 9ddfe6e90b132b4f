"""Smoothing of n-gram counts: how probability is left for n-grams that the text does not
contain."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from transformer_jax.baselines.ngram_counts import NgramCounts
from transformer_jax.settings import check_choice, require

_DISCOUNT_OF_FEW_COUNTS = 0.75  # for texts that are too small to estimate a discount


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """How the counts of n-grams become probabilities.

    Attributes:
      name: ``kneser_ney``: interpolated Kneser-Ney, in which a discount is subtracted from every
        count, and the probability that this frees goes to shorter contexts (Chen and Goodman,
        1998). ``add_k``: ``k`` is added to every count; no shorter context is used.
      k: The number that ``add_k`` adds. With 1 this is Laplace smoothing. With 0 it is the maximum
        likelihood estimate, which gives the probability 0 to what the text does not contain.
      discounts: For ``kneser_ney``, one discount for each length of n-grams, from length 1.
        ``None`` estimates three discounts for each length (for n-grams that occur once, twice, and
        more often) from the counts, which is called modified Kneser-Ney.
    """

    name: str = "kneser_ney"
    k: float = 1.0
    discounts: tuple[float, ...] | None = None

    def __post_init__(self):
        check_choice(self, "name", ("kneser_ney", "add_k"))
        require(0 <= self.k < np.inf, f"k={self.k} must be 0 or a positive number")
        require(all(0 <= discount <= 1 for discount in self.discounts or ()),
                f"discounts={self.discounts} must be numbers from 0 to 1")


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """The numbers from which an n-gram model computes probabilities.

    The probability of a token after a context is ``own + left_over * P``. ``P`` is the probability
    after the context without its first token or, if ``uses_shorter`` is false, 1 / V.

    Attributes:
      own: For each length from 1, the part of the probability that belongs to each n-gram.
      left_over: For each length from 1, the probability that each context leaves for ``P``. The
        contexts are the n-grams that are one token shorter.
      uses_shorter: Whether ``P`` comes from the shorter context.
    """

    own: tuple[np.ndarray, ...]
    left_over: tuple[np.ndarray, ...]
    uses_shorter: bool


def smooth(counts: NgramCounts, smoothing: Smoothing) -> Weights:
    """Computes the weights of an n-gram model from its counts.

    Args:
      counts: The counts.
      smoothing: The method and its settings.

    Returns:
      The weights.

    Raises:
      ValueError: If there is not one discount for each length.
    """
    if smoothing.name == "add_k":
        return _add_k(counts, smoothing.k)
    return kneser_ney(counts, smoothing.discounts)


def kneser_ney(counts: NgramCounts, discounts: Sequence[float] | None = None) -> Weights:
    """Computes the weights of interpolated Kneser-Ney smoothing (Chen and Goodman, 1998).

    The longest n-grams have their own counts. The count of a shorter n-gram is the number of
    different tokens that occur before it, because a shorter context is used only where the longer
    one fails. Nothing occurs before the beginning of a document, so an n-gram that begins there
    keeps its own count.

    Args:
      counts: The counts of the n-grams.
      discounts: One discount for each length from 1, or ``None`` to estimate them.

    Returns:
      The weights.

    Raises:
      ValueError: If there is not one discount for each length.
    """
    if discounts is not None and len(discounts) != counts.order:
        raise ValueError(f"{len(discounts)} discounts are given for n-grams of the lengths 1 to {counts.order}; give "
                         f"{counts.order} discounts, or none")
    own, left_over = [], []
    for length, adjusted in enumerate(_adjusted_counts(counts), start=1):
        if discounts is None:
            discount_C = _estimated_discounts(adjusted)
        else:
            discount_C = np.array([0.0, *[float(discounts[length - 1])] * 3])
        discount = np.minimum(discount_C[np.minimum(adjusted, 3)], adjusted)
        prefixes, num_contexts = _contexts(counts, length)
        totals = np.bincount(prefixes, adjusted, num_contexts)
        is_seen = totals > 0
        divisors = np.where(is_seen, totals, 1.0)
        own.append((adjusted - discount) / divisors[prefixes])
        left_over.append(np.where(is_seen, np.bincount(prefixes, discount, num_contexts) / divisors, 1.0))
    return Weights(tuple(own), tuple(left_over), uses_shorter=True)


def _add_k(counts: NgramCounts, k: float) -> Weights:
    """Computes the weights of add-k smoothing."""
    own, left_over = [], []
    for length, counted in enumerate(counts.counts, start=1):
        prefixes, num_contexts = _contexts(counts, length)
        added = k * counts.vocab_size
        totals = np.bincount(prefixes, counted, num_contexts) + added
        is_seen = totals > 0
        divisors = np.where(is_seen, totals, 1.0)
        own.append(counted / divisors[prefixes])
        left_over.append(np.where(is_seen, added / divisors, 1.0))
    return Weights(tuple(own), tuple(left_over), uses_shorter=False)


def _contexts(counts: NgramCounts, length: int) -> tuple[np.ndarray, int]:
    """Returns the context of each n-gram of a length, and the number of contexts."""
    if length == 1:
        return np.zeros(counts.vocab_size, np.int64), 1
    return counts.prefixes(length), len(counts.counts[length - 2])


def _adjusted_counts(counts: NgramCounts) -> list[np.ndarray]:
    """Returns the counts of Kneser-Ney smoothing for each length from 1."""
    adjusted = [np.bincount(suffixes, minlength=len(shorter))
                for suffixes, shorter in zip(counts.suffixes, counts.counts, strict=False)]
    if counts.end_of_text_id is not None:
        for place, firsts in enumerate(counts.first_tokens(), start=1):
            if place < len(adjusted):
                adjusted[place] = np.where(firsts == counts.end_of_text_id, counts.counts[place], adjusted[place])
    return [*adjusted, counts.counts[-1]]


def _estimated_discounts(adjusted: np.ndarray) -> np.ndarray:
    """Estimates the discounts of n-grams with the counts 0, 1, 2 and at least 3 (Chen and Goodman,
    1998, equation 26); a small text gets a single discount."""
    one, two, three, four = (int((adjusted == count).sum()) for count in (1, 2, 3, 4))
    if not (one and two):
        return np.array([0.0, *[_DISCOUNT_OF_FEW_COUNTS] * 3])
    single = one / (one + 2 * two)
    if not (three and four):
        return np.array([0.0, single, single, single])
    estimated = np.array([0.0, 1 - 2 * single * two / one, 2 - 3 * single * three / two, 3 - 4 * single * four / three])
    return np.clip(estimated, 0.0, [0, 1, 2, 3])
