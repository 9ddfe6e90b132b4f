"""Optimizers against NumPy float64, with the decay masks; schedules against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from transformer_jax.config import ModelConfig, OptimConfig
from transformer_jax.models.decoder import Decoder
from transformer_jax.training.optimizer import decay_mask, make_optimizer, make_schedule

STEPS = 5
DECAYED = ("embedding", "matrix", "stacked")
SHAPES = {
    "embedding": ((7, 4), ("vocab", "embed")),
    "matrix": ((4, 6), ("embed", "mlp")),
    "stacked": ((3, 4, 6), ("embed", "mlp")),  # the layer axis has no name
    "bias": ((6,), ("mlp",)),
    "stacked_bias": ((3, 6), ("mlp",)),
    "scale": ((4,), (None,)),
    "stacked_scale": ((3, 4), (None,)),
}


def config(name, **changes):
    settings = dict(peak_lr=0.03, schedule="cosine", warmup_steps=2, end_lr=0.2, weight_decay=0.3, beta1=0.8, beta2=0.9,
                    epsilon=1e-6, muon_lr=0.05, clip_norm=None)
    return OptimConfig(name=name, **(settings | changes))


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    return {name: nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32), axes=axes)
            for name, (shape, axes) in SHAPES.items()}


def gradients(step):
    rng = np.random.default_rng(100 + step)
    return {name: nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32), axes=axes)
            for name, (shape, axes) in SHAPES.items()}


def values(tree):
    return {name: np.asarray(variable[...], np.float64) for name, variable in tree.items()}


def run(config, steps=STEPS):
    """Weights after every step."""
    optimizer = make_optimizer(config, steps)
    params = parameters()
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    history = [values(params)]
    for step in range(steps):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
        history.append(values(params))
    return history


def learning_rate(step, peak, warmup=2, steps=STEPS, end=0.2):
    """Linear warmup and cosine decay, written anew."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (end + (1 - end) * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup))))


def adamw(w, m, v, g, step, decay):
    m = 0.8 * m + 0.2 * g
    v = 0.9 * v + 0.1 * g**2
    direction = m / (1 - 0.8 ** (step + 1)) / (np.sqrt(v / (1 - 0.9 ** (step + 1))) + 1e-6)
    return w - learning_rate(step, 0.03) * (direction + decay * w), m, v


def lion(w, m, v, g, step, decay):
    direction = np.sign(0.8 * m + 0.2 * g)
    return w - learning_rate(step, 0.03) * (direction + decay * w), 0.9 * m + 0.1 * g, v


def sgd(w, m, v, g, step, decay):
    g = g + decay * w
    m = 0.8 * m + g
    return w - learning_rate(step, 0.03) * (g + 0.8 * m), m, v


@pytest.mark.parametrize("rule", [adamw, lion, sgd], ids=lambda rule: rule.__name__)
def test_against_numpy(rule):
    history = run(config(rule.__name__))
    for name in SHAPES:
        w = history[0][name]
        m = v = np.zeros_like(w)
        for step in range(STEPS):
            g = values(gradients(step))[name]
            w, m, v = rule(w, m, v, g, step, 0.3 if name in DECAYED else 0.0)
            np.testing.assert_allclose(history[step + 1][name], w, rtol=2e-5, atol=2e-6, err_msg=f"{name} {step}")


def test_decay_mask_of_a_whole_model():
    model_config = ModelConfig(vocab_size=11, max_len=8, num_layers=2, num_heads=2, model_dim=8, tie_embeddings=False)
    shapes = jax.eval_shape(lambda key: Decoder(model_config, key=key), jax.random.key(0))
    masked = {jax.tree_util.keystr(path, simple=True, separator="/"): decayed
              for path, decayed in jax.tree_util.tree_leaves_with_path(decay_mask(shapes))}
    assert len(masked) == len(jax.tree.leaves(shapes)) > 10
    decayed = [path for path, is_decayed in masked.items() if is_decayed]
    others = [path for path, is_decayed in masked.items() if not is_decayed]
    assert all("kernel" in path or "embeddings" in path for path in decayed)
    assert all("bias" in path or "norm" in path for path in others)
    assert any("embeddings/position" in path for path in decayed) and any("norm/scale" in path for path in others)


def test_muon_orthogonalises_hidden_matrices_and_leaves_the_rest_to_adamw():
    settings = config("muon", schedule="constant", warmup_steps=0, weight_decay=0.0)
    history = run(settings)
    # Five Newton-Schulz iterations bring the singular values near 1, not to it: between 0.6 and 1.2
    # (Jordan, 2024).
    for step in range(STEPS):
        for update in history[step]["stacked"] - history[step + 1]["stacked"]:
            singular = np.linalg.svd(update, compute_uv=False) / (0.05 * np.sqrt(6 / 4))
            assert singular.min() > 0.6 and singular.max() < 1.25
    # Each layer of the stack has its own update: the polar factor of its own gradient.
    g = values(gradients(0))["stacked"]
    for layer in range(3):
        u, _, vt = np.linalg.svd(g[layer], full_matrices=False)
        update = (history[0]["stacked"] - history[1]["stacked"])[layer]
        assert np.sum(update * (u @ vt)) / np.linalg.norm(update) / np.linalg.norm(u @ vt) > 0.97
    adam = run(config("adamw", schedule="constant", warmup_steps=0, weight_decay=0.0))
    for name in SHAPES:
        same = all(np.array_equal(a[name], b[name]) for a, b in zip(history, adam, strict=True))
        assert same == (name != "stacked"), name


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_decay_is_times_the_learning_rate_and_on_matrices_only(name):
    """One step with and without: the difference is exactly -rate * decay * weight, where there is
    decay."""
    plain, decayed = (run(config(name, weight_decay=decay), steps=5)[1] for decay in (0.0, 0.3))
    start = values(parameters())
    for parameter in SHAPES:
        rate = learning_rate(0, 0.05 if name == "muon" and parameter == "stacked" else 0.03)
        expected = -rate * 0.3 * start[parameter] if parameter in DECAYED else 0.0 * start[parameter]
        np.testing.assert_allclose(decayed[parameter] - plain[parameter], expected, atol=5e-7, err_msg=parameter)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd", "muon"])
def test_falls_on_a_quadratic(name):
    """Least squares: each optimizer reduces the loss of a stacked matrix and a bias to a small part
    of its first value."""
    rng = np.random.default_rng(0)
    goal = jnp.asarray(rng.normal(size=(2, 40, 40)), jnp.float32)
    params = {"w": nnx.Param(jnp.zeros((2, 40, 40)), axes=("embed", "mlp")),
              "b": nnx.Param(jnp.zeros(3), axes=("mlp",))}
    optimizer = make_optimizer(OptimConfig(name=name, peak_lr=0.1, muon_lr=0.4, schedule="linear", end_lr=0.0,
                                           beta2=0.95, warmup_steps=5, weight_decay=0.0, clip_norm=None), 120)

    def loss(params):
        return jnp.sum((params["w"][...] - goal) ** 2) / 2 + jnp.sum((params["b"][...] - 1.0) ** 2) / 2

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, before = optimizer.init(params), float(loss(params))
    for _ in range(120):
        params, state = step(params, state)
    assert float(loss(params)) < 0.02 * before
    np.testing.assert_allclose(np.asarray(params["b"][...]), 1.0, atol=0.05)


def test_adafactor_keeps_factored_moments():
    params = {"w": nnx.Param(jnp.zeros((2, 64, 48)), axes=("embed", "mlp"))}
    state = make_optimizer(config("adafactor"), STEPS).init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 2 * (64 + 48) + 10


def test_clipping_by_global_norm():
    norm = np.sqrt(sum(np.sum(g**2) for g in values(gradients(0)).values()))
    settings = dict(schedule="constant", warmup_steps=0, weight_decay=0.0, beta1=0.0)
    plain, clipped, loose = (run(config("sgd", clip_norm=clip, **settings), steps=1) for clip in (None, 2.0, 1e6))
    for name in SHAPES:
        np.testing.assert_allclose(clipped[1][name] - clipped[0][name],
                                   (plain[1][name] - plain[0][name]) * 2.0 / norm, atol=1e-6)
        np.testing.assert_array_equal(loose[1][name], plain[1][name])


# Schedules


def schedule(name, steps=100, **changes):
    function = jax.jit(make_schedule(OptimConfig(schedule=name, peak_lr=0.5, **(
        dict(warmup_steps=10, end_lr=0.1, decay_fraction=0.25) | changes)), steps))
    return np.array([float(function(step)) for step in range(steps + 1)])


def test_warmup_is_linear_and_the_first_step_learns():
    for name in ("constant", "linear", "cosine", "noam", "wsd"):
        np.testing.assert_allclose(schedule(name)[:10], 0.5 * np.arange(1, 11) / 10, rtol=1e-6)


@pytest.mark.parametrize(("name", "formula"), [
    ("constant", lambda t: np.full_like(t, 0.5)),
    ("linear", lambda t: 0.5 + (0.05 - 0.5) * t / 90),
    ("cosine", lambda t: 0.05 + 0.45 * 0.5 * (1 + np.cos(np.pi * t / 90))),
    ("wsd", lambda t: np.where(t <= 65, 0.5, 0.5 + (0.05 - 0.5) * (t - 65) / 25)),
])
def test_closed_formulas(name, formula):
    np.testing.assert_allclose(schedule(name)[10:], formula(np.arange(91.0)), rtol=1e-5)


def test_noam_is_the_papers_up_to_scale():
    s = np.arange(1, 102, dtype=np.float64)
    paper = 512**-0.5 * np.minimum(s**-0.5, s * 10**-1.5)
    np.testing.assert_allclose(schedule("noam"), 0.5 * paper / paper.max(), rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 10, 60])
def test_every_decay_starts_at_the_peak_and_arrives_at_the_end(name, warmup):
    rates = schedule(name, warmup_steps=warmup, decay_fraction=0.9)
    assert rates.max() == rates[max(warmup - 1, 0)] == 0.5
    assert rates[-1] == pytest.approx(0.05, rel=1e-5) and (np.diff(rates[max(warmup, 1):]) <= 0).all()


def test_no_warmup():
    assert schedule("cosine", warmup_steps=0)[0] == 0.5
