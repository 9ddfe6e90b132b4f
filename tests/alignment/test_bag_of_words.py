"""The bag-of-words judge, compared with its formula."""

import math

import pytest

from transformer_jax.alignment.bag_of_words import BagOfWords

GOOD, BAD = ["a fine film fine", "fine cast"], ["a dull film"]


def test_log_odds_of_words_by_hand():
    """Good texts have a, film, cast once and fine twice, once each text; bad ones a, dull, film."""
    judge = BagOfWords(GOOD, BAD)
    num_words, num_good, num_bad = 5, 5, 3
    for word, good, bad in (("fine", 2, 0), ("dull", 0, 1), ("film", 1, 1)):
        expected = math.log((good + 1) / (num_good + num_words)) - math.log((bad + 1) / (num_bad + num_words))
        assert judge([word]) == [pytest.approx(expected)]


def test_a_text_is_the_sum_of_its_different_words():
    judge = BagOfWords(GOOD, BAD)
    assert judge(["fine dull fine unheard"])[0] == pytest.approx(judge(["fine"])[0] + judge(["dull"])[0])
    assert judge([""]) == [0.0] and judge(["fine"])[0] > 0 > judge(["dull"])[0]


def test_both_kinds_are_needed():
    with pytest.raises(ValueError, match="2 good and 1 bad texts; expected texts with at least one word of each kind"):
        BagOfWords(GOOD, [" "])
