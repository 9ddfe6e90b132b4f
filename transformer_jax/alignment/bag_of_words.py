"""A judge of another kind than what it judges: a naive Bayes classifier that sees words and no
order."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence


class BagOfWords:
    """Log odds that a text is of the good kind, from which words are in it; a reward or a judge.

    Source: McCallum and Nigam (1998), multinomial naive Bayes, over the different words of a text.
    """

    def __init__(self, good: Sequence[str], bad: Sequence[str], smoothing: float = 1.0):
        """Counts the words of both kinds.

        Args:
          good: texts of the one kind.
          bad: texts of the other.
          smoothing: added to every count.

        Raises:
          ValueError: when there is no word of one kind.
        """
        counts = [collections.Counter(word for text in texts for word in set(text.split())) for texts in (good, bad)]
        if not all(counts):
            raise ValueError(f"{len(good)} good and {len(bad)} bad texts; expected texts with words of both kinds")
        words = counts[0] | counts[1]
        totals = [math.log(sum(count.values()) + smoothing * len(words)) for count in counts]
        self.log_odds = {word: math.log((counts[0][word] + smoothing) / (counts[1][word] + smoothing))
                         - totals[0] + totals[1] for word in words}

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """The sum over the different words of each text; words never met say nothing."""
        return [sum(self.log_odds.get(word, 0.0) for word in sorted(set(text.split()))) for text in texts]
