"""The quality filter, beside scikit-learn's own pipeline and the formula of its random rule."""

import random

import numpy as np
import pytest

from transformer_jax.data import QualityClassifier
from transformer_jax.data.quality import is_kept

pytest.importorskip("sklearn", reason="the quality filter needs the extra 'corpus'")

GOOD_WORDS, BAD_WORDS = ["river", "morning", "letter", "answered"], ["click", "buy", "cheap", "offer"]
COMMON = ["the", "and", "with", "from", "house"]


def texts(words, seed, count=60):
    draw = random.Random(seed)
    return [" ".join(draw.choices(words + COMMON * 3, k=12)) for _ in range(count)]


@pytest.fixture(scope="module")
def classifier():
    return QualityClassifier.train(texts(GOOD_WORDS, 0), texts(BAD_WORDS, 1))


def test_scores_are_those_of_scikit_learns_pipeline(classifier):
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(HashingVectorizer(n_features=2**18, alternate_sign=False),
                             LogisticRegression(C=10, solver="liblinear", random_state=0))
    pipeline.fit(texts(GOOD_WORDS, 0) + texts(BAD_WORDS, 1), [True] * 60 + [False] * 60)
    new = [*texts(GOOD_WORDS, 2), *texts(BAD_WORDS, 3), "", "unheard"]
    scores = classifier(new)
    assert scores == pytest.approx(pipeline.predict_proba(new)[:, 1], abs=1e-12)
    assert (scores[:60] > 0.5).mean() > 0.9 and (scores[60:120] < 0.5).mean() > 0.9
    assert [float(classifier([text])[0]) for text in new] == scores.tolist()  # one by one: the same bits


def test_a_stored_classifier_is_the_same(classifier, tmp_path):
    classifier.save(tmp_path / "quality.npz")
    new = texts(GOOD_WORDS, 4)
    assert (QualityClassifier.load(tmp_path / "quality.npz")(new) == classifier(new)).all()
    for content in (b"damaged", (tmp_path / "quality.npz").read_bytes()[:1000]):
        (tmp_path / "damaged.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged.npz is not a classifier that QualityClassifier.save wrote"):
            QualityClassifier.load(tmp_path / "damaged.npz")


@pytest.mark.parametrize("score", [0.0, 0.5, 0.8, 0.95, 1.0])
def test_texts_are_kept_with_the_probability_of_the_pareto_distribution(score):
    """P(pareto(9) > 1 - score) is (1 + (1 - score)) ** -9."""
    count, expected = 4000, (2 - score) ** -9
    kept = sum(is_kept(score, number) for number in range(count))
    assert abs(kept - count * expected) <= 4 * np.sqrt(count * expected * (1 - expected))
    assert [is_kept(0.9, number, 1) for number in range(50)] == [is_kept(0.9, number, 1) for number in range(50)]
    assert [is_kept(0.9, number, 1) for number in range(50)] != [is_kept(0.9, number, 2) for number in range(50)]


def test_both_kinds_of_examples_are_needed():
    for good, bad, message in (([], ["a"], "there is no good text"), (["a"], [], "there is no bad text"),
                               (["a"], [3], "bad text 1 of 1 is of type int")):
        with pytest.raises(ValueError, match=message):
            QualityClassifier.train(good, bad)
