"""The embedding space against NumPy."""

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.inspection.space import analogy, nearest, pca, read_analogies, similarity, static_embeddings

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(30, 8)).astype(np.float32) * RNG.uniform(0.1, 5, (30, 1)).astype(np.float32)
UNIT = VECTORS / np.linalg.norm(VECTORS.astype(np.float64), axis=-1, keepdims=True)


def test_static_embeddings_are_the_table():
    config = tj.ModelConfig(vocab_size=9, max_len=4, num_layers=1, num_heads=1, model_dim=4)
    model = tj.Decoder(config, key=jax.random.key(0))
    np.testing.assert_array_equal(static_embeddings(model), model.embeddings.token[...])


def test_nearest_are_those_of_the_largest_cosine():
    queries = RNG.normal(size=(3, 8)).astype(np.float32)
    cosines = queries / np.linalg.norm(queries, axis=-1, keepdims=True) @ UNIT.T
    rows, found = nearest(VECTORS, queries, 4)
    np.testing.assert_array_equal(rows, np.argsort(-cosines)[:, :4])
    np.testing.assert_allclose(found, -np.sort(-cosines)[:, :4], atol=1e-6)
    rows, _ = nearest(VECTORS, VECTORS[5], 3, exclude=[5])
    np.testing.assert_array_equal(rows, np.argsort(-(UNIT[5] @ UNIT.T))[1:4])
    rows, _ = nearest(VECTORS, queries, 2, exclude=np.argsort(-cosines)[:, :2])
    np.testing.assert_array_equal(rows, np.argsort(-cosines)[:, 2:4])
    np.testing.assert_allclose(similarity(VECTORS, VECTORS), UNIT @ UNIT.T, atol=1e-6)


def test_analogies():
    # Royalty and gender as two directions: king - man + woman.
    royal, female = np.eye(6)[:2]
    words = ["man", "woman", "king", "queen", "apple", "pear"]
    table = np.array([np.eye(6)[2], np.eye(6)[2] + female, np.eye(6)[2] + royal, np.eye(6)[2] + royal + female,
                      np.eye(6)[3], np.eye(6)[3] + 0.1 * royal], np.float32)
    man, woman, king = range(3)
    rows, _ = analogy(table, king, man, woman)
    assert words[rows[0]] == "queen"
    several, cosines = jax.jit(analogy, static_argnums=4)(VECTORS, np.arange(4), np.arange(4, 8), np.arange(8, 12), 5)
    for q in range(4):
        scores = (UNIT[q] - UNIT[q + 4] + UNIT[q + 8]) @ UNIT.T
        scores[[q, q + 4, q + 8]] = -np.inf
        np.testing.assert_array_equal(several[q], np.argsort(-scores)[:5])
    assert (cosines[:, :-1] >= cosines[:, 1:]).all()


def test_principal_components():
    found = jax.jit(pca, static_argnums=1)(VECTORS, 3)
    centred = VECTORS.astype(np.float64) - VECTORS.mean(0)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    np.testing.assert_allclose(found.explained, (variances[::-1] / variances.sum())[:3], rtol=1e-5)
    np.testing.assert_allclose(np.abs(found.components @ axes[:, ::-1][:, :3]), np.eye(3), atol=1e-4)
    np.testing.assert_allclose(found.projected, centred @ np.asarray(found.components, np.float64).T, atol=1e-5)
    np.testing.assert_allclose(found.mean, VECTORS.mean(0), atol=1e-6)
    assert all(row[np.abs(row).argmax()] > 0 for row in np.asarray(found.components))
    with pytest.raises(ValueError, match="num_components=9 must be from 1 to 8"):
        pca(VECTORS, 9)


def test_analogies_are_read(corpora):
    path = corpora / "analogies_en" / "questions-words.txt"
    if not path.exists():
        pytest.skip("no analogies")
    sections = read_analogies(path)
    assert len(sections) == 14 and sum(map(len, sections.values())) == 19_544
    assert sections["capital-common-countries"][0].tolist() == ["Athens", "Greece", "Baghdad", "Iraq"]


def test_a_file_that_holds_no_analogies(tmp_path):
    (tmp_path / "words.txt").write_text(": one\na b c d\na b c\n")
    with pytest.raises(ValueError, match="line 3: 'a b c'; expected ': section'"):
        read_analogies(tmp_path / "words.txt")
