"""Which model answers better: win rates under a judge, Elo ratings, distance from the base,
diversity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np


def win_rate(scores_a: Sequence[float], scores_b: Sequence[float], z: float = 1.96) -> tuple[float, float, float]:
    """How often A's answer is better than B's to the same prompt; a tie is half a win.

    Args:
      scores_a: the judge's score of A's answer to each prompt.
      scores_b: likewise of B's.
      z: standard deviations of the interval; 1.96 for 95 %.

    Returns:
      The rate, and the lower and upper end of its Wilson (1927) score interval.

    Raises:
      ValueError: for no score, not as many of both, or one that is not a number.
    """
    a, b = np.asarray(scores_a, np.float64), np.asarray(scores_b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"scores of shapes {a.shape} and {b.shape}; expected one a prompt of each model")
    if np.isnan(a).any() or np.isnan(b).any():
        raise ValueError("a judge's score is NaN; it must be a number")
    n = len(a)
    rate = float((0.5 + 0.5 * np.sign(a - b)).mean())
    center = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return rate, max(center - half, 0.0), min(center + half, 1.0)


def elo_ratings(scores: Mapping[str, Sequence[float]], mean: float = 1000.0) -> dict[str, float]:
    """Ratings of several models that answered the same prompts: 400 points are odds of 10 to 1.

    The maximum likelihood of the Bradley-Terry model over all pairs of answers to a prompt (Hunter,
    2004, equation 3), with half a win each way added to every pair of models: else one that always
    wins would rate infinitely high.

    Args:
      scores: the judge's scores by model, in the order of the prompts.
      mean: of the ratings.

    Raises:
      ValueError: fewer than two models, or as in :func:`win_rate`.
    """
    if len(scores) < 2:
        raise ValueError(f"ratings compare models; expected two or more, got {list(scores)}")
    names = list(scores)
    num_prompts = len(scores[names[0]])
    wins = np.array([[0.0 if a == b else win_rate(scores[a], scores[b])[0] * num_prompts + 0.5 for b in names]
                     for a in names])
    games = wins + wins.T
    strengths = np.ones(len(names))
    for _ in range(10_000):
        updated = wins.sum(1) / (games / (strengths[:, None] + strengths)).sum(1)
        updated /= np.exp(np.log(updated).mean())
        done = np.abs(np.log(updated / strengths)).max() < 1e-12
        strengths = updated
        if done:
            break
    return dict(zip(names, (mean + 400 * np.log10(strengths)).tolist(), strict=True))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams, in all texts together; 0 where there is none.

    Source: Li et al. (2016), "A diversity-promoting objective function for neural conversation
      models".
    """
    grams = [tuple(words[start:start + n]) for words in map(str.split, texts) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
