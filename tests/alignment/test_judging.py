"""Win rates with their intervals, ratings, diversity: against counting, published figures and the
likelihood itself."""

import itertools
import math

import numpy as np
import pytest

from transformer_jax.alignment.judging import distinct_n, elo_ratings, win_rate


def test_win_rate_counts_ties_half():
    rate, low, high = win_rate([1, 2, 3, 4], [0, 2, 4, 3])
    assert rate == (1 + 0.5 + 0 + 1) / 4 and low < rate < high


@pytest.mark.parametrize(("wins", "n", "low", "high"), [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                                        (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_the_wilson_interval_is_the_published_one(wins, n, low, high):
    """Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method
    3."""
    scores = np.arange(n) < wins
    found = win_rate(scores, 1 - scores)
    assert found[0] == pytest.approx(wins / n)
    assert found[1:] == pytest.approx((low, high), abs=5e-5)


def test_a_sure_winner_stays_within_bounds():
    assert win_rate([1.0] * 10, [0.0] * 10)[::2] == (1.0, 1.0)


def test_bad_scores():
    for a, b in (([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])):
        with pytest.raises(ValueError, match="expected one score per prompt for each model"):
            win_rate(a, b)
    with pytest.raises(ValueError, match="a score of the judge is NaN"):
        win_rate([1.0], [float("nan")])
    with pytest.raises(ValueError, match=r"got scores of \['base'\]; expected at least two models"):
        elo_ratings({"base": [1.0]})


def test_two_models_are_apart_by_the_log_odds():
    """7.5 wins against 3.5, the added halves included."""
    ratings = elo_ratings({"a": [1] * 7 + [0] * 3, "b": [0] * 7 + [1] * 3})
    assert ratings["a"] - ratings["b"] == pytest.approx(400 * math.log10(7.5 / 3.5))
    assert ratings["a"] + ratings["b"] == pytest.approx(2000)


def test_ratings_have_the_largest_likelihood():
    """No small step in any direction makes the games more probable."""
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(skill, 1.0, size=80) for name, skill in (("base", 0), ("sft", 0.5), ("ppo", 1.5))}
    ratings = elo_ratings(scores)
    assert ratings["base"] < ratings["sft"] < ratings["ppo"]

    def log_likelihood(ratings):
        total = 0.0
        for a, b in itertools.permutations(scores, 2):
            wins = win_rate(scores[a], scores[b])[0] * 80 + 0.5
            total -= wins * math.log1p(10 ** ((ratings[b] - ratings[a]) / 400))
        return total

    for name in scores:
        for step in (-1.0, 1.0):
            assert log_likelihood(ratings | {name: ratings[name] + step}) < log_likelihood(ratings)


def test_a_model_that_always_wins_has_a_finite_rating():
    ratings = elo_ratings({"a": [1.0] * 5, "b": [0.0] * 5})
    assert ratings["a"] - ratings["b"] == pytest.approx(400 * math.log10(11))


def test_distinct_n():
    assert distinct_n(["a b a b", "a b"], 2) == 2 / 4
    assert distinct_n(["a b a b", "a b"], 1) == 2 / 6
    assert distinct_n(["a", ""], 2) == 0.0
