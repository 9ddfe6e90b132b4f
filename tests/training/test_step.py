"""One training step: gradients, accumulation, the non-finite guard, donation, tracing."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer_jax.config import LossConfig, ModelConfig, OptimConfig
from transformer_jax.models.decoder import Decoder
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import TrainState, abstract_state, init_state
from transformer_jax.training.step import make_eval_step, make_train_step

B, T, V = 8, 12, 17
MODEL = ModelConfig(vocab_size=V, max_len=T, num_layers=1, num_heads=2, model_dim=16)
OPTIMIZERS = {
    "sgd": optax.sgd(0.25),  # the gradient is -4 times the change of the weights
    "adamw": make_optimizer(OptimConfig(peak_lr=1e-2, schedule="constant", warmup_steps=0, clip_norm=1.0), 20),
    "clipped": make_optimizer(OptimConfig(name="sgd", peak_lr=1.0, schedule="constant", warmup_steps=0,
                                          weight_decay=0.0, beta1=0.0, clip_norm=0.01), 20),
    "none": optax.set_to_zero(),
}
TRACES = collections.Counter()


def start(optimizer, **changes):
    """A fresh state of always the same weights, since a step takes its state away."""
    model = jax.eval_shape(lambda key: Decoder(MODEL.replace(**changes), key=key), jax.random.key(0))
    params = jax.tree.unflatten(jax.tree.structure(model), [jnp.copy(leaf) for leaf in jax.tree.leaves(weights())])
    counters = {name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "skipped_in_a_row")}
    return TrainState(params=params, opt_state=OPTIMIZERS[optimizer].init(params), key=jax.random.key(3), **counters)


@functools.cache
def weights():
    return jax.jit(lambda key: Decoder(MODEL, key=key))(jax.random.key(3))


@functools.cache
def make_step(optimizer, accumulation=1):
    """One compiled step serves many tests."""
    def loss_fn(params, batch, key):
        TRACES[optimizer, accumulation] += 1
        return next_token_loss()(params, batch, key)

    return make_train_step(loss_fn, OPTIMIZERS[optimizer], accumulation)


def make_batch(seed=0, weights=None):
    rng = np.random.default_rng(seed)
    batch = {name: jnp.asarray(rng.integers(V, size=(B, T)), jnp.int32) for name in ("tokens", "targets")}
    if weights == "ones":
        batch["weights"] = jnp.ones((B, T))
    elif weights == "random":
        batch["weights"] = jnp.asarray(rng.random((B, T)) * (rng.random((B, T)) > 0.3), jnp.float32)
    elif weights == "sparse":  # the sum of their weights is less than one token
        batch["weights"] = jnp.zeros((B, T)).at[1, 2].set(0.25).at[6, 3].set(0.5)
    return batch


@jax.jit
def mean_loss(model, batch):
    """Written anew: the weighted mean of the negative log probabilities."""
    log_p = jax.nn.log_softmax(model(batch["tokens"]).logits, axis=-1)
    losses = -jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
    return jnp.average(losses, weights=batch.get("weights"))


GRADIENT = jax.jit(jax.value_and_grad(mean_loss))


def norm(tree):
    return np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(tree)))


def assert_close(tree, expected, rtol, atol):
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("weights", [None, "random", "sparse"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_update_is_the_gradient_of_the_mean_loss(weights, accumulation):
    state = start("sgd")
    params = jax.tree.map(jnp.copy, state.params)
    batch = make_batch(weights=weights)
    loss, gradient = GRADIENT(params, batch)
    state, metrics = make_step("sgd", accumulation)(state, batch)
    assert_close(jax.tree.map(lambda old, new: 4 * (old - new), params, state.params), gradient, rtol=1e-4, atol=1e-6)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(norm(gradient), rel=1e-5)
    assert int(state.step) == 1 and int(state.skipped) == int(metrics["skipped"]) == 0


@pytest.mark.parametrize("weights", [None, "random"])
def test_accumulation_equals_the_large_batch(weights):
    """Over several steps, within float32 rounding."""
    ends = []
    for accumulation in (1, 4):
        state, losses = start("sgd"), []
        for i in range(5):
            state, metrics = make_step("sgd", accumulation)(state, make_batch(i, weights))
            losses.append(float(metrics["loss"]))
        ends.append((losses, state.params))
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-6)
    assert_close(ends[0][1], ends[1][1], rtol=1e-5, atol=1e-6)


def test_no_weight_at_all_changes_nothing_but_the_step():
    state = start("sgd")
    before = tree_digest(state.params)
    state, metrics = make_step("sgd")(state, make_batch() | {"weights": jnp.zeros((B, T))})
    assert float(metrics["loss"]) == 0.0 and tree_digest(state.params) == before
    assert int(state.skipped) == 0 and int(state.step) == 1


def test_clipping_bounds_the_update_and_the_metric_is_from_before():
    state = start("clipped")
    params = jax.tree.map(jnp.copy, state.params)
    state, metrics = make_step("clipped")(state, make_batch(weights="ones"))
    assert float(metrics["grad_norm"]) > 0.1
    assert norm(jax.tree.map(jnp.subtract, params, state.params)) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_is_not_finite_is_skipped_and_counted(accumulation):
    state, step = start("adamw"), make_step("adamw", accumulation)
    good = make_batch(weights="ones")
    nan, inf = (good | {"weights": good["weights"].at[5, 3].set(value)} for value in (np.nan, np.inf))
    counts = []
    for i, batch in enumerate((good, nan, inf, good, nan)):
        digests = tree_digest(state.params), tree_digest(state.opt_state)
        state, metrics = step(state, batch)
        kept = (tree_digest(state.params), tree_digest(state.opt_state)) == digests
        assert kept == (batch is not good)
        assert int(state.step) == i + 1
        counts.append((int(metrics["skipped"]), int(metrics["skipped_in_a_row"])))
        assert counts[-1] == (int(state.skipped), int(state.skipped_in_a_row))
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.long
@pytest.mark.parametrize("accumulation", [1, 4])
def test_further_sums_come_out_as_means(accumulation):
    """The mean uses the same weights as the loss, for any number of microbatches."""
    def loss_fn(params, batch, key):
        loss, weight = next_token_loss()(params, batch, key)
        return loss, weight, {"double": 2.0 * loss, "place": (batch["weights"] * jnp.arange(T)).sum()}

    batch = make_batch(weights="random")
    step = make_train_step(loss_fn, OPTIMIZERS["none"], accumulation)
    _, metrics = step(start("none"), batch)
    assert float(metrics["double"]) == pytest.approx(2 * float(metrics["loss"]), rel=1e-6)
    places = np.broadcast_to(np.arange(T), (B, T))
    assert float(metrics["place"]) == pytest.approx(np.average(places, weights=batch["weights"]), rel=1e-5)
    sums = make_eval_step(loss_fn)(start("none").params, batch)
    assert float(sums[2]["double"]) == pytest.approx(2 * float(sums[0]), rel=1e-6)


def test_weights_to_begin_with_are_copied():
    """A donated state takes none of the arrays that it was made of."""
    model = weights()
    before = tree_digest(model)
    state = init_state(jax.tree_util.Partial(lambda model, key: model, model), OPTIMIZERS["adamw"], jax.random.key(0))
    assert tree_digest(state.params) == before
    make_step("adamw")(state, make_batch(weights="ones"))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(model)) and tree_digest(model) == before


def test_the_old_state_is_donated():
    state = start("adamw")
    new, _ = make_step("adamw")(state, make_batch(weights="ones"))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_trace_over_many_steps(accumulation):
    state, step = start("adamw"), make_step("adamw", accumulation)
    state, _ = step(state, make_batch(weights="ones"))
    traces = TRACES["adamw", accumulation]
    for i in range(50):
        state, _ = step(state, make_batch(i, weights="random"))
    assert TRACES["adamw", accumulation] == traces > 0 and step.func._cache_size() == 1


def test_dropout_depends_on_the_key_and_the_step_only():
    step = make_step("none")

    def losses(seed, num_steps=3, first=0):
        state = dataclasses.replace(start("none", dropout=0.5), key=jax.random.key(seed), step=jnp.int32(first))
        losses = []
        for _ in range(num_steps):
            state, metrics = step(state, make_batch())
            losses.append(float(metrics["loss"]))
        return losses

    assert losses(1) == losses(1)
    assert len(set(losses(1))) == 3  # the weights and the batch stay: only the dropout changes
    assert losses(1, num_steps=1, first=2) == losses(1)[2:]
    assert not set(losses(2)) & set(losses(1))


def test_bfloat16_compute_keeps_float32_weights():
    state = start("adamw", dtype="bfloat16")
    reference = float(mean_loss(start("adamw").params, make_batch(weights="ones")))
    state, metrics = make_step("adamw")(state, make_batch(weights="ones"))
    leaves = jax.tree.leaves((state.params, state.opt_state))
    assert {str(leaf.dtype) for leaf in leaves} == {"float32", "int32"}
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32
    assert float(metrics["loss"]) == pytest.approx(reference, rel=2e-2)
    assert float(metrics["loss"]) != reference


def test_smoothing_and_z_loss_by_their_formulas():
    params = start("sgd").params
    batch = make_batch(weights="random")
    logits = np.asarray(jax.jit(lambda model, tokens: model(tokens).logits)(params, batch["tokens"]), np.float64)
    log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.eye(V)[np.asarray(batch["targets"])] * 0.9 + 0.1 / V
    losses = -(target * (logits - log_z)).sum(-1) + 1e-2 * log_z[..., 0] ** 2
    total, weight = make_eval_step(next_token_loss(LossConfig(label_smoothing=0.1, z_loss=1e-2)))(params, batch)
    assert float(total) == pytest.approx((losses * np.asarray(batch["weights"])).sum(), rel=1e-5)
    assert float(weight) == pytest.approx(np.asarray(batch["weights"], np.float64).sum(), rel=1e-6)


def test_the_chunked_loss_of_a_large_vocabulary_is_the_same():
    params, batch = start("sgd").params, make_batch(weights="random")
    plain = make_eval_step(next_token_loss())(params, batch)
    chunked = make_eval_step(next_token_loss(LossConfig(most_logits=0)))(params, batch)
    np.testing.assert_allclose(chunked, plain, rtol=1e-6)


def test_abstract_state_is_that_of_init_state():
    state = init_state(lambda key: Decoder(MODEL, key=key), OPTIMIZERS["adamw"], jax.random.key(0))
    abstract = abstract_state(lambda key: Decoder(MODEL, key=key), OPTIMIZERS["adamw"])
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    described = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (abstract, state)]
    assert described[0] == described[1]
