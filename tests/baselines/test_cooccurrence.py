"""One-hot vectors and co-occurrences of two sentences that are counted by hand."""

import numpy as np
import pytest
from PIL import Image

from transformer_jax.baselines import count_cooccurrences, matrix_bytes


@pytest.fixture(scope="module")
def found():
    return count_cooccurrences(["O gato bebe leite.", "O cachorro bebe água."], window=1)


def test_the_matrix_of_two_sentences(found):
    assert found.words == ("o", "gato", "bebe", "leite", "cachorro", "água")
    assert found.counts_VV.tolist() == [
        [0, 1, 0, 0, 1, 0],  # o: beside gato and beside cachorro
        [1, 0, 1, 0, 0, 0],
        [0, 1, 0, 1, 1, 1],
        [0, 0, 1, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
    ]
    wider = count_cooccurrences(["a b a a"], window=2).counts_VV
    assert wider.tolist() == [[4, 2 + 1], [3, 0]]  # a-a: distance 2 and distance 1, in both directions


def test_similar_words_have_similar_rows_but_one_hot_vectors_do_not(found):
    assert found.similarity("gato", "cachorro") == pytest.approx(1)
    assert found.similarity("gato", "bebe") == pytest.approx(0)
    assert found.one_hot("gato").tolist() == [0, 1, 0, 0, 0, 0]
    assert found.one_hot("gato") @ found.one_hot("cachorro") == 0
    assert count_cooccurrences(["a", "b"]).similarity("a", "b") == 0


def test_the_table_and_the_figure_show_every_count(found, tmp_path):
    lines = found.table().splitlines()
    assert lines[0].split() == list(found.words)
    for word, row, line in zip(found.words, found.counts_VV, lines[1:], strict=True):
        assert line.split() == [word, *map(str, row)]
    assert len({len(line) for line in lines}) == 1
    found.plot(tmp_path / "matrix.png")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "matrix.png").convert("L")))) > 20


def test_the_matrix_does_not_scale():
    assert matrix_bytes(52_000) == 10_816_000_000 and matrix_bytes(1_000_000) == 4 * 10**12


@pytest.mark.parametrize(("make", "message"), [
    (lambda: count_cooccurrences(["..."]), "the sentences have no words"),
    (lambda: count_cooccurrences("one sentence"), "expected a list of sentences"),
    (lambda: count_cooccurrences(["a b"], window=0), "window=0 must be at least 1"),
    (lambda: count_cooccurrences(["a b"]).one_hot("c"), "there is no word 'c'"),
])
def test_wrong_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
