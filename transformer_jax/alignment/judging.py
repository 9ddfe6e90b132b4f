"""Measures of how well models answer: win rates under a judge, Elo ratings, and diversity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

Scores = Sequence[float] | Float[np.ndarray, " prompts"]


def win_rate(scores_a: Scores, scores_b: Scores, z: float = 1.96) -> tuple[float, float, float]:
    """Computes how often model A's answer scores higher than model B's answer to the same prompt.

    A tie counts as half a win.

    Args:
      scores_a: the judge's scores of A's answers, one per prompt.
      scores_b: the judge's scores of B's answers, in the same order of prompts.
      z: width of the interval in standard deviations; 1.96 gives a 95 % interval.

    Returns:
      The win rate of A in [0, 1], and the lower and the upper end of its Wilson (1927) score
      interval.

    Raises:
      ValueError: if there are no scores, the two models do not have the same number of scores, or a
        score is NaN.
    """
    a, b = np.asarray(scores_a, np.float64), np.asarray(scores_b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"got scores of the shapes {a.shape} and {b.shape}; expected one score per prompt for each "
                         "model, for the same prompts")
    if np.isnan(a).any() or np.isnan(b).any():
        raise ValueError("a score of the judge is NaN; every score must be a number, so check the judge")
    n = len(a)
    rate = float((0.5 + 0.5 * np.sign(a - b)).mean())
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return rate, max(center - half, 0.0), min(center + half, 1.0)


def elo_ratings(scores: Mapping[str, Scores], mean: float = 1000.0) -> dict[str, float]:
    """Computes Elo ratings of several models that answered the same prompts.

    A difference of 400 points means odds of 10 to 1. The ratings are the maximum likelihood
    estimate of the Bradley-Terry model over all pairs of answers to a prompt (Hunter, 2004,
    equation 3). For every pair of models, half a win is added to both sides, because otherwise the
    rating of a model that always wins would be infinite.

    Args:
      scores: the judge's scores by the name of the model, in the same order of prompts.
      mean: the mean of all ratings.

    Returns:
      The rating of each model, by its name.

    Raises:
      ValueError: if there are fewer than two models, or if ``win_rate`` rejects the scores.
    """
    if len(scores) < 2:
        raise ValueError(f"got scores of {list(scores)}; expected at least two models, because ratings compare models")
    names = list(scores)
    num_prompts = len(scores[names[0]])
    wins = np.array([[0.0 if a == b else win_rate(scores[a], scores[b])[0] * num_prompts + 0.5 for b in names]
                     for a in names])
    games = wins + wins.T
    strengths = np.ones(len(names))
    for _ in range(10_000):
        updated = wins.sum(1) / (games / (strengths[:, None] + strengths)).sum(1)
        updated /= np.exp(np.log(updated).mean())
        converged = np.abs(np.log(updated / strengths)).max() < 1e-12
        strengths = updated
        if converged:
            break
    return dict(zip(names, (mean + 400 * np.log10(strengths)).tolist(), strict=True))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Computes the diversity of texts: the fraction of their n-grams that are distinct.

    Source: Li et al. (2016), "A diversity-promoting objective function for neural conversation
      models".

    Args:
      texts: the texts, whose n-grams are counted together. White space separates words.
      n: number of words in an n-gram.

    Returns:
      The fraction, in (0, 1]; 0 if no text has n words.
    """
    grams = [tuple(words[start:start + n]) for words in map(str.split, texts) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
