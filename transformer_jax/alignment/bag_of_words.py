"""A naive Bayes classifier of texts, which can judge a Transformer because it works differently.

It sees which words a text contains, and ignores their order.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence


class BagOfWords:
    """Estimates from its words whether a text is good; usable as a reward or a judge.

    Source: McCallum and Nigam (1998), multinomial naive Bayes. Here each distinct word of a text
    counts once.

    Attributes:
      log_odds: the contribution of each known word to the log odds, in nats.
    """

    def __init__(self, good: Sequence[str], bad: Sequence[str], smoothing: float = 1.0):
        """Counts the words of good and bad texts.

        Args:
          good: texts that should get a high score.
          bad: texts that should get a low score.
          smoothing: a number that is added to every count, so that no probability is 0.

        Raises:
          ValueError: if the good texts or the bad texts contain no word.
        """
        counts = [collections.Counter(word for text in texts for word in set(text.split())) for texts in (good, bad)]
        if not all(counts):
            raise ValueError(f"got {len(good)} good and {len(bad)} bad texts; expected texts with at least one word "
                             "of each kind")
        words = counts[0] | counts[1]
        totals = [math.log(sum(count.values()) + smoothing * len(words)) for count in counts]
        self.log_odds = {word: math.log((counts[0][word] + smoothing) / (counts[1][word] + smoothing))
                         - totals[0] + totals[1] for word in words}

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Scores texts by the sum of the log odds of their distinct words.

        Args:
          texts: the texts to score.

        Returns:
          One score per text, in nats. Words that were in no training text contribute 0.
        """
        return [sum(self.log_odds.get(word, 0.0) for word in sorted(set(text.split()))) for text in texts]
