"""Sparse autoencoders: the formulas in float64, planted features, exact resume, dead features and
shardings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from tests.features.planted import mean_maximum_cosine, planted
from transformer_jax.config import EvalConfig, MeshConfig, OptimConfig, SparseAutoencoderConfig
from transformer_jax.features.objective import after_update, objective
from transformer_jax.sharding import make_mesh
from transformer_jax.training.loop import to_devices
from transformer_jax.training.optimizer import make_optimizer

ACTIVATIONS = ["relu", "topk", "batch_topk", "jumprelu", "gated"]
OPTIM = OptimConfig(peak_lr=3e-3, weight_decay=0.0, warmup_steps=20, schedule="linear")
X, DIRECTIONS = planted(4000, dim=24, num_features=36, k=2)
ROWS = tj.features.Rows({"x": X})


def config_of(activation, **changes):
    model = tj.features.fit_config(ROWS, "x", **{
        "num_features": 36, "activation": activation, "k": 2, "dead_after": 2000,
        "sparsity": 3.0 if activation == "gated" else 1.0} | changes)
    return tj.ExperimentConfig(model=model, steps=700, batch_size=128, log_every=1000, optim=OPTIM,
                               eval=EvalConfig(every=10_000))


def moved(activation, **changes):
    """A model whose weights are all different from zero."""
    config = SparseAutoencoderConfig(site="x", input_dim=6, num_features=9, k=3, activation=activation, **changes)
    leaves, structure = jax.tree.flatten(tj.features.SparseAutoencoder(config, key=jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    model = jax.tree.unflatten(structure, [leaf + 0.1 * jnp.abs(jax.random.normal(key, leaf.shape))
                                           for key, leaf in zip(keys, leaves, strict=True)])
    model.silent.set_value(jnp.zeros(9))
    return model


def loss64(model, x):
    """The loss of each kind in float64, without that of dead features."""
    config, x = model.config, np.asarray(x, np.float64)
    we, be, wd, bd = (np.asarray(value[...], np.float64) for value in (
        model.encoder, model.encoder_bias, model.decoder, model.decoder_bias))
    pre = (x - bd) @ we.T + be
    relu, penalty = np.maximum(pre, 0), 0.0
    if config.activation == "relu":
        features, penalty = relu, config.sparsity * relu.sum()
    elif config.activation == "topk":
        features = np.where(pre >= np.sort(pre)[:, -config.k, None], relu, 0)
    elif config.activation == "batch_topk":
        features = np.where(relu >= np.sort(relu.ravel())[-config.k * len(x)], relu, 0)
    elif config.activation == "jumprelu":
        threshold = np.asarray(model.threshold[...], np.float64)
        features, penalty = np.where(pre > threshold, pre, 0), config.sparsity * (pre > threshold).sum()
    else:
        magnitude = (x - bd) @ (we.T * np.exp(np.asarray(model.magnitude_scale[...]))) + np.asarray(
            model.magnitude_bias[...])
        features = np.where(pre > 0, np.maximum(magnitude, 0), 0)
        penalty = config.sparsity * relu.sum() + np.square(x - relu @ wd - bd).sum()
    return np.square(x - features @ wd - bd).sum() + penalty, (features != 0).sum()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_losses_and_gradients_are_those_of_the_formulas(activation):
    model, x = moved(activation), np.random.default_rng(3).normal(size=(8, 6)).astype(np.float32)
    gradient, (loss, weight, sums) = jax.jit(jax.grad(lambda model: (lambda loss, *others: (
        loss, (loss, *others)))(*objective(model, {"x": x})), has_aux=True))(model)
    expected, active = loss64(model, x)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert weight == 8 and sums["l0"] == active == sums["active_F"].sum()
    # The threshold has no true gradient, and the gate's reconstruction leaves the decoder fixed.
    for name in ("encoder", "decoder", "encoder_bias", "magnitude_scale", "magnitude_bias"):
        if getattr(model, name) is None or (activation == "gated" and name == "decoder"):
            continue
        index = (2, 1)[: getattr(model, name).ndim]
        ends = []
        for sign in (1, -1):
            other = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model)
            values = np.asarray(getattr(model, name)[...], np.float64).copy()
            values[index] += sign * 1e-6
            getattr(other, name).set_value(values)
            ends.append(loss64(other, x)[0])
        np.testing.assert_allclose(getattr(gradient, name)[...][index], (ends[0] - ends[1]) / 2e-6, rtol=2e-3,
                                   atol=2e-3, err_msg=name)
    assert float(jnp.abs(gradient.silent[...]).max()) == 0


def test_the_threshold_of_jumprelu_gets_the_estimated_gradient():
    model, x = moved("jumprelu", bandwidth=0.5, sparsity=0.7), np.random.default_rng(3).normal(size=(8, 6))
    gradient = jax.grad(lambda model: objective(model, {"x": jnp.asarray(x, jnp.float32)})[0])(model)
    we, be, wd, bd, theta = (np.asarray(value[...], np.float64) for value in (
        model.encoder, model.encoder_bias, model.decoder, model.decoder_bias, model.threshold))
    pre = (x - bd) @ we.T + be
    near = (np.abs(pre - theta) < 0.25) / 0.5
    of_features = -2 * (x - np.where(pre > theta, pre, 0) @ wd - bd) @ wd.T
    np.testing.assert_allclose(gradient.threshold[...], -(near * (of_features * theta + 0.7)).sum(0), atol=1e-4)


@pytest.mark.long
def test_planted_features_are_recovered(one_device):
    bundle = tj.train(config_of("topk"), ROWS)
    assert mean_maximum_cosine(DIRECTIONS, bundle.model) > 0.95
    found = tj.features.measure(bundle.model, ROWS)
    assert found.explained_variance > 0.85 and found.l0 == pytest.approx(2, abs=0.01) and found.dead < 0.15
    np.testing.assert_allclose(np.linalg.norm(bundle.model.decoder[...], axis=1), 1, atol=1e-5)
    assert found.density.shape == (36,) and found.l0 == pytest.approx(found.density.sum())


@pytest.mark.long
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "topk"])
def test_every_kind_recovers_planted_features(activation, one_device):
    """With 48 features for 36 directions; twelve are not needed and may stay dead."""
    rows = tj.features.Rows({"x": planted(8000, dim=24, num_features=36, k=2)[0]})
    changes = {"bandwidth": 0.5, "first_threshold": 0.5} if activation == "jumprelu" else {}
    bundle = tj.train(config_of(activation, num_features=48, **changes).replace(steps=2500), rows)
    assert mean_maximum_cosine(DIRECTIONS, bundle.model) > 0.95
    found = tj.features.measure(bundle.model, rows)
    assert found.explained_variance > 0.94 and found.l0 < 4.5 and found.dead < 0.3


@pytest.mark.long
def test_a_stopped_run_continues_to_the_same_bits(tmp_path, one_device):
    config = config_of("topk").replace(steps=8, optim=dataclasses.replace(OPTIM, schedule="constant"))
    whole = tj.train(config, ROWS, workdir=tmp_path / "whole")
    tj.train(config, ROWS, steps=4, workdir=tmp_path / "parts")
    parts = tj.train(config, ROWS, steps=8, workdir=tmp_path / "parts")
    loaded = tj.load(tmp_path / "parts")
    for other in (parts, loaded):
        jax.tree.map(np.testing.assert_array_equal, other.model, whole.model)
    assert loaded.tokenizer is None and loaded.config == config.model
    assert tj.evaluate(loaded, ROWS)["l0"] == 2
    with pytest.raises(ValueError, match="learns from activations"):
        tj.train(config, ["a text"])
    with pytest.raises(ValueError, match="not one of the activations given, y"):
        tj.train(config, tj.features.Rows({"y": X}))


def test_dead_features_are_counted_and_revived():
    model = moved("topk", dead_after=10, revival=1.0)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(8, 6)), jnp.float32)
    model.encoder_bias.set_value(jnp.full(9, 0.1).at[4].set(-100.0))
    model.decoder_bias.set_value(jnp.zeros(6))

    def step(model):
        gradient, sums = jax.grad(lambda model: (lambda loss, weight, sums: (loss, sums))(
            *objective(model, {"x": x})), has_aux=True)(model)
        means = {name: value / 8 for name, value in sums.items()}
        return gradient, *after_update(model, means, jnp.float32(8))

    gradient, model, metrics = step(model)
    assert model.silent[...][4] == 8 and not model.is_dead[4] and metrics["dead"] == 0
    assert float(jnp.abs(gradient.encoder[...][4]).max()) == 0
    _, model, metrics = step(model)
    assert model.silent[...][4] == 10 and metrics["dead"] == pytest.approx(1 / 9)
    gradient, _, _ = step(model)
    assert float(jnp.abs(gradient.encoder[...][4]).max()) > 0
    # The only dead feature explains the error of the others. Its weight is 1 of the 3 features that
    # could explain the 6 values.
    features = np.asarray(model.encode(x), np.float64)
    error = x - features @ np.asarray(model.decoder[...]) - np.asarray(model.decoder_bias[...])
    written = (x @ np.asarray(model.encoder[...])[4] - 100.0)[:, None] * np.asarray(model.decoder[...])[4]
    plain = jax.tree.unflatten(jax.tree.structure(tj.features.SparseAutoencoder(
        model.config.replace(revival=0.0), key=jax.random.key(0))), jax.tree.leaves(model))
    added = objective(model, {"x": x})[0] - objective(plain, {"x": x})[0]
    np.testing.assert_allclose(added, np.square(written - error).sum() / 3, rtol=1e-3)


@pytest.mark.long
def test_activations_that_are_never_on_disk_resume_to_the_same_bits(tmp_path, one_device):
    model = tj.Decoder(tj.ModelConfig(vocab_size=23, max_len=16, num_layers=1, num_heads=2, model_dim=8),
                       key=jax.random.key(0))
    texts = [np.random.default_rng(number).integers(1, 23, 3 + number % 9).tolist() for number in range(30)]

    def stream():
        return tj.inspection.ActivationBatches(model, texts, "final", batch_size=32, buffer_size=64)

    config = tj.ExperimentConfig(
        model=tj.features.fit_config(stream(), "final", num_features=16, k=2), steps=7, batch_size=32,
        optim=dataclasses.replace(OPTIM, schedule="constant"), eval=EvalConfig(every=3))
    whole = tj.train(config, stream())
    tj.train(config, stream(), steps=4, workdir=tmp_path)
    parts = tj.train(config, stream(), steps=7, workdir=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, parts.model, whole.model)


@pytest.mark.long
@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_features_are_sharded_over_the_tensor_axis(activation):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config = config_of(activation, num_features=32, dead_after=1).replace(mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    task = tj.tasks.make(config)
    losses = []
    for where in (None, mesh):
        state = tj.init_training(config, task, mesh=where)
        step = tj.make_train_step(task.loss, make_optimizer(config.optim, config.steps),
                                  after_update=task.after_update())
        with jax.set_mesh(make_mesh(devices=jax.devices()[:1]) if where is None else where):
            for start in (0, 64):
                state, metrics = step(state, to_devices({"x": X[start:start + 64]}, where))
        losses.append((metrics["loss"], metrics["explained_variance"], metrics["dead"]))
        if where is not None:
            assert state.params.encoder[...].sharding.shard_shape((32, 24)) == (16, 12)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_wrong_settings_are_refused():
    for changes, message in (
            ({"k": 40, "num_features": 36}, "k=40 is more than num_features=36"),
            ({"scale": 3.0}, "not a power of two"),
            ({"activation": "tanh"}, "activation='tanh'"), ({"target": "y"}, "subtract_bias=True is only for"),
            ({"target_scale": 2.0}, "is only for transcoders")):
        with pytest.raises(ValueError, match=message):
            SparseAutoencoderConfig(site="x", **changes)
    with pytest.raises(ValueError, match="'y' is not one of the activations given, x"):
        tj.features.fit_config(ROWS, "y")
    with pytest.raises(ValueError, match="expected one row for each token"):
        tj.features.Rows({"x": X, "y": X[:3]})
