"""Exact and near duplicates, beside the exact Jaccard similarity of all pairs."""

import random

import numpy as np
import pytest

from transformer_jax.data import deduplicate
from transformer_jax.data.deduplication import NearIndex, digest, shingles

pytest.importorskip("datasketch", reason="near duplicates need the extra 'corpus'")


def jaccard(a, b):
    """The similarity of two texts, from sets that are made here."""
    def parts(text):
        words = text.lower().split()
        return {tuple(words[i:i + 5]) for i in range(max(1, len(words) - 4))}

    return len(parts(a) & parts(b)) / len(parts(a) | parts(b))


def random_text(draw, num_words=200):
    return " ".join(f"word{draw.randrange(5000)}" for _ in range(num_words))


def changed(draw, text, num_changes):
    words = text.split()
    for place in draw.sample(range(len(words)), num_changes):
        words[place] = f"new{draw.randrange(5000)}"
    return " ".join(words)


@pytest.fixture(scope="module")
def planted():
    """100 texts, and then 300 copies of them with 1 to 12 changed words each."""
    draw = random.Random(0)
    originals = [random_text(draw) for _ in range(100)]
    copies = [(index % 100, changed(draw, originals[index % 100], 1 + index % 12)) for index in range(300)]
    return originals, copies


def test_planted_near_duplicates_are_found_with_the_recall_that_the_formula_gives(planted):
    originals, copies = planted
    index = NearIndex(0.8)
    for number, text in enumerate(originals):
        index.add(number, index.signature(text))
    found = [index.find(index.signature(text)) for _, text in copies]
    exact = np.array([jaccard(originals[source], text) for source, text in copies])
    is_found = np.array([hit is not None for hit in found])
    assert all(hit[0] == source for hit, (source, _) in zip(found, copies, strict=True) if hit is not None)
    errors = np.array([hit[1] - similarity for hit, similarity in zip(found, exact, strict=True) if hit is not None])
    assert np.abs(errors).max() < 0.15 and abs(errors.mean()) < 0.02  # the standard error of one is 0.035 at 0.8
    far = np.abs(exact - 0.8) > 0.08
    assert far.sum() > 150 and (exact > 0.88).sum() > 40 and (exact < 0.72).sum() > 40
    assert is_found[exact > 0.88].all() and not is_found[exact < 0.72].any()
    assert (is_found == (exact >= 0.8)).mean() > 0.9  # also where an estimate can fall on the other side


def test_signatures_estimate_the_similarity_of_long_texts():
    """Longer than the part that is hashed at once."""
    draw = random.Random(1)
    text = random_text(draw, 9000)
    other = text[: len(text) // 2]
    index = NearIndex(0.3)
    index.add(7, index.signature(text))
    number, similarity = index.find(index.signature(other))
    assert number == 7 and similarity == pytest.approx(jaccard(text, other), abs=0.15)


def test_deduplicate_keeps_the_first_of_each():
    draw = random.Random(2)
    a, b = random_text(draw), random_text(draw)
    near = changed(draw, a, 1)
    found = deduplicate([a, b, f"  {a.upper()}\n", near, "!", "?!", "!", random_text(draw), "caf\u00e9", "cafe\u0301"])
    assert found.kept == [0, 1, 4, 5, 7, 8]
    assert [(text.index, text.of, text.is_exact) for text in found.duplicates] == [
        (2, 0, True), (3, 0, False), (6, 4, True), (9, 8, True)]
    assert found.duplicates[1].similarity == pytest.approx(jaccard(a, near), abs=0.12)
    assert deduplicate([a, near], threshold=1.0).kept == [0, 1]
    assert deduplicate([a, near, b], threshold=0.01).kept == [0, 2]


def test_a_text_is_compared_by_five_consecutive_words():
    assert list(shingles("The cat, the DOG and a bird.")) == [
        "the cat the dog and", "cat the dog and a", "the dog and a bird"]
    assert list(shingles("Two words")) == ["two words"] and list(shingles("...")) == ["..."]
    assert digest("A  b\n") == digest("a B") != digest("ab")


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1, float("nan")])
def test_bad_thresholds(threshold):
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], the smallest similarity of duplicates"):
        deduplicate(["a"], threshold)


def test_bad_texts():
    for texts, message in (([], "the list is empty"), ("text", "expected a list of texts"), ([3], "text 1 of 1 is of")):
        with pytest.raises(ValueError, match=message):
            deduplicate(texts)
