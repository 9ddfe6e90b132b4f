"""Probes, erasure, similarity, steering and lenses, compared with scikit-learn, formulas in float64
and whole forward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from tests.compiles import count_compiles
from transformer_jax import inspection

RNG = np.random.default_rng(0)
N, D = 120, 6
LABELS = RNG.integers(0, 3, N)
FEATURES = (RNG.normal(size=(N, D)) @ RNG.normal(size=(D, D)) + 3.0).astype(np.float32)
FEATURES[:, 2] += 2.0 * (LABELS == 1)
CONFIG = tj.ModelConfig(vocab_size=11, max_len=6, num_layers=2, num_heads=2, model_dim=8, init_std=0.5)
TOKENS = RNG.integers(0, 11, (4, 6), np.int32)


@pytest.fixture(scope="module")
def model():
    return tj.Decoder(CONFIG, key=jax.random.key(0))


def last_logit(logits_BTV):
    return logits_BTV[:, -1, 3].mean()


def test_a_probe_is_the_logistic_regression_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs the extra 'corpus'")
    probed = inspection.probe(FEATURES, LABELS, folds=4)
    mean, deviation = FEATURES.mean(0), FEATURES.std(0)
    theirs = linear_model.LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit((FEATURES - mean) / deviation, LABELS)
    scores = FEATURES @ probed.weights + probed.bias
    ours = np.exp(scores - np.logaddexp.reduce(scores, 1, keepdims=True))
    np.testing.assert_allclose(ours, theirs.predict_proba((FEATURES - mean) / deviation), atol=2e-3)


def test_cross_validation_and_the_control_task_do_not_reward_memorizing():
    noise = RNG.normal(size=(80, 40)).astype(np.float32)
    random_labels = RNG.integers(0, 2, 80)
    with count_compiles() as compiles:
        probed = inspection.probe(noise, random_labels, types_N=np.arange(80))
        inspection.probe(noise, 1 - random_labels, types_N=np.arange(80), seed=1)
    assert len(compiles) < 20 and probed.accuracy < 0.7 and abs(probed.selectivity) < 0.35
    right = inspection.probe(np.eye(4, dtype=np.float32)[LABELS], np.array(list("abc"))[LABELS])
    assert right.accuracy == 1 and right.interval[0] > 0.96 and np.isnan(right.control_accuracy)
    assert right.majority == np.bincount(LABELS).max() / N


def test_a_sparse_probe_finds_the_planted_feature():
    features = RNG.normal(size=(N, 20)).astype(np.float32)
    features[:, 13] += 3.0 * (LABELS == 2)
    probed = inspection.probe(features, LABELS == 2, k=1)
    assert probed.features.tolist() == [13] and probed.accuracy > 0.85
    assert np.flatnonzero(np.abs(probed.weights).max(1)).tolist() == [13]


def test_the_interval_of_wilson():
    low, high = inspection.wilson_interval(0.8, 50)  # statsmodels 0.14: 0.6696, 0.8876
    np.testing.assert_allclose((low, high), (0.66961, 0.88757), atol=1e-4)


def test_after_erasure_no_covariance_is_left_and_the_change_is_least():
    eraser = inspection.leace(FEATURES, LABELS)
    erased = eraser(FEATURES.astype(np.float64))
    onehot = np.eye(3)[LABELS]
    covariance = (erased - erased.mean(0)).T @ (onehot - onehot.mean(0)) / N
    assert np.abs(covariance).max() < 1e-12
    assert np.linalg.matrix_rank(eraser.removed, tol=1e-9) == 2
    x = FEATURES - FEATURES.mean(0, dtype=np.float64)
    cross = x.T @ (onehot - onehot.mean(0)) / N
    basis = np.linalg.svd(cross, full_matrices=False)[0][:, :2]
    orthogonal = x - x @ basis @ basis.T  # another map that removes the covariance
    np.testing.assert_allclose(orthogonal.T @ onehot, 0, atol=1e-9)
    assert np.square(erased - FEATURES).sum() < np.square(orthogonal - x).sum()
    assert inspection.probe(erased, LABELS == 1).accuracy < inspection.probe(FEATURES, LABELS == 1).accuracy
    assert not inspection.leace(FEATURES, np.zeros(N)).removed.any()


def test_erasing_inside_a_model(model):
    trace = tj.trace(model, TOKENS)
    stream_ND = np.asarray(trace["layers.1.residual"]).reshape(-1, 8)
    eraser = inspection.leace(stream_ND, TOKENS.ravel() % 2)
    after = tj.trace(model, TOKENS, intervene=inspection.erase(1, eraser))["layers.1.residual"]
    np.testing.assert_allclose(np.asarray(after).reshape(-1, 8), eraser(stream_ND), atol=1e-4)


def test_similarity_is_1_for_rotations_and_as_defined():
    rotation = np.linalg.qr(RNG.normal(size=(D, D)))[0]
    for measure in (inspection.cka, inspection.procrustes):
        np.testing.assert_allclose(measure(FEATURES, 3 * FEATURES @ rotation + 1), 1, atol=1e-6)
        assert measure(FEATURES, RNG.normal(size=(N, D))) < 0.5
    other = RNG.normal(size=(N, 3))
    center = np.eye(N) - 1 / N  # the definition with kernel matrices
    k, m = center @ FEATURES @ FEATURES.T @ center, center @ other @ other.T @ center
    np.testing.assert_allclose(inspection.cka(FEATURES, other),
                               (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()), rtol=1e-5)
    grid = inspection.layer_similarity(np.stack([FEATURES, FEATURES**2]), FEATURES[None])
    assert grid.shape == (2, 1) and grid[0, 0] > 0.999


def test_doses_of_a_steering_vector(model):
    direction = inspection.mean_difference(FEATURES[:3, :1] * np.ones((3, 8)), np.zeros((2, 8)))
    doses = [-1.0, 0.0, 2.0]
    with count_compiles() as compiles:
        found = inspection.dose_response(model, TOKENS, last_logit, layer=1, direction_D=direction, doses=doses)
    assert len(compiles) == 1 and found.random.shape == (5, 3)
    for dose, response in zip(doses, found.response, strict=True):
        steered = tj.forward(model, TOKENS, intervene=inspection.steer(1, direction, dose))
        np.testing.assert_allclose(response, last_logit(steered), atol=1e-5)
    np.testing.assert_allclose(found.random[:, 1], found.response[1], atol=1e-6)


@pytest.mark.long
def test_an_untrained_lens_is_the_logit_lens_and_training_improves_it(model, tmp_path):
    trace = tj.trace(model, TOKENS)
    rows = RNG.integers(0, 11, (32, 6), np.int32)
    untrained = inspection.Translators(2, 8)
    before = inspection.logit_lens(model, trace).probabilities
    np.testing.assert_array_equal(inspection.logit_lens(model, untrained(trace)).probabilities, before)
    lens = tj.runs.train_tuned_lens(model, rows, steps=30, workdir=tmp_path)
    losses = [inspection.translation_losses(model, each, (jnp.asarray(TOKENS),)).mean() for each in (untrained, lens)]
    assert losses[1] < 0.5 * losses[0]
    np.testing.assert_array_equal(inspection.logit_lens(model, lens(trace)).probabilities[-1], before[-1])
    again = tj.runs.train_tuned_lens(model, rows, steps=30, workdir=tmp_path)
    np.testing.assert_array_equal(again.kernel[...], lens.kernel[...])


def test_the_jacobian_lens_of_a_linear_model_is_exact(model):
    linear = jax.tree.map(lambda leaf: leaf, model)
    blocks = linear.stack.blocks
    blocks.attention.output.kernel[...] = jnp.zeros_like(blocks.attention.output.kernel[...])
    blocks.mlp.down.kernel[...] = jnp.zeros_like(blocks.mlp.down.kernel[...])
    np.testing.assert_allclose(inspection.jacobian_lens(linear, TOKENS).kernel[...], 0, atol=1e-6)
    lens = inspection.jacobian_lens(model, TOKENS)
    offset = np.zeros(8, np.float32)
    offset[3] = 1e-2
    moved = [tj.trace(model, TOKENS, intervene=inspection.steer(1, sign * offset))["final"] for sign in (1, -1)]
    slope = np.asarray(moved[0] - moved[1]).sum(1).mean(0) / 2e-2 / 6  # a step at all positions at once
    np.testing.assert_allclose(slope, lens.kernel[1, 3] + np.eye(8)[3], atol=2e-2)


def test_wrong_arguments(model):
    for wrong, message in ((lambda: inspection.probe(FEATURES, LABELS[1:]), "expected"),
                           (lambda: inspection.probe(FEATURES, np.ones(N)), "two different labels"),
                           (lambda: inspection.probe(FEATURES, LABELS, folds=1), "folds=1"),
                           (lambda: inspection.probe(FEATURES, LABELS, k=99), "k=99"),
                           (lambda: inspection.leace(FEATURES, LABELS[1:]), "expected"),
                           (lambda: inspection.cka(FEATURES, FEATURES[1:]), "same N examples"),
                           (lambda: inspection.cka(FEATURES, np.ones((N, 1))), "equal features"),
                           (lambda: inspection.dose_response(model, TOKENS, last_logit, layer=9, direction_D=np.ones(8),
                                                             doses=[1.0]), "layers=9")):
        with pytest.raises(ValueError, match=message):
            wrong()
