"""Cross entropies against float64 formulas, against each other, and by the memory they need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from transformer_jax import ops

cross_entropy = jax.jit(ops.cross_entropy, static_argnames=("label_smoothing", "z_loss"))
linear_cross_entropy = jax.jit(ops.linear_cross_entropy, static_argnums=(3, 4, 5, 7), static_argnames="cap")

B, T, D, V = 2, 3, 8, 11
SETTINGS = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 0.05)]


def reference(logits, targets, label_smoothing=0.0, z_loss=0.0):
    """-sum over v of wanted_v log p_v, plus z_loss log(Z)^2, token by token in float64."""
    logits = np.asarray(logits, np.float64)
    losses = np.zeros(targets.shape)
    for index in np.ndindex(targets.shape):
        row = logits[index]
        log_z = row.max() + np.log(np.exp(row - row.max()).sum())
        wanted = np.full(row.size, label_smoothing / row.size)
        wanted[targets[index]] += 1.0 - label_smoothing
        losses[index] = -(wanted * (row - log_z)).sum() + z_loss * log_z**2
    return losses


def example(scale=3.0):
    rng = np.random.default_rng(0)
    hidden, unembedding, weights = rng.normal(size=(B, T, D)), scale * rng.normal(size=(V, D)), rng.normal(size=(B, T))
    targets = rng.integers(V, size=(B, T))
    targets[0, 0], targets[1, 1] = 0, V - 1
    return (*(jnp.asarray(x, jnp.float32) for x in (hidden, unembedding)), jnp.asarray(targets),
            jnp.asarray(weights, jnp.float32))


@pytest.mark.parametrize(("label_smoothing", "z_loss"), SETTINGS)
def test_equal_the_formula(label_smoothing, z_loss):
    hidden, unembedding, targets, _ = example()
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64).T
    expected = reference(logits, np.asarray(targets), label_smoothing, z_loss)
    plain = cross_entropy(jnp.asarray(logits, jnp.float32), targets, label_smoothing=label_smoothing, z_loss=z_loss)
    np.testing.assert_allclose(plain, expected, rtol=2e-6, atol=2e-6)
    for chunk in (1, 4, V, 100):
        chunked = linear_cross_entropy(hidden, unembedding, targets, label_smoothing, z_loss, chunk)
        np.testing.assert_allclose(chunked, expected, rtol=2e-6, atol=2e-6)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    np.testing.assert_allclose(cross_entropy(jnp.full((2, 50_257), 7.0), jnp.asarray([0, 50_256])), np.log(50_257),
                               rtol=1e-6)


def test_large_logits_do_not_overflow():
    logits, targets = jnp.asarray([[1e4, 0.0], [-1e4, 0.0]]), jnp.asarray([0, 0])
    np.testing.assert_allclose(cross_entropy(logits, targets), [0.0, 1e4])
    np.testing.assert_allclose(linear_cross_entropy(logits, jnp.eye(2), targets, 0.0, 0.0, 1), [0.0, 1e4])


@pytest.mark.parametrize("chunk", [1, 4, V, 100])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [SETTINGS[0], SETTINGS[3]])
def test_gradients_of_both_are_equal(label_smoothing, z_loss, chunk):
    hidden, unembedding, targets, weights = example(scale=1.0)

    def plain(hidden, unembedding):
        losses = cross_entropy(hidden @ unembedding.T, targets, label_smoothing=label_smoothing, z_loss=z_loss)
        return (losses * weights).sum()

    def chunked(hidden, unembedding):
        return (linear_cross_entropy(hidden, unembedding, targets, label_smoothing, z_loss, chunk) * weights).sum()

    gradients = (jax.jit(jax.grad(loss, (0, 1)))(hidden, unembedding) for loss in (chunked, plain))
    for got, wanted in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-6)


def test_gradient_equals_the_float64_formula():
    hidden, unembedding, targets, weights = example(scale=1.0)
    smoothing, z_loss = 0.2, 0.03
    h, u = np.asarray(hidden, np.float64).reshape(-1, D), np.asarray(unembedding, np.float64)
    logits = h @ u.T
    log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = smoothing / V + (1 - smoothing) * np.eye(V)[np.asarray(targets).reshape(-1)]
    d_logits = np.exp(logits - log_z) * (1 + 2 * z_loss * log_z) - wanted
    d_logits *= np.asarray(weights, np.float64).reshape(-1, 1)

    def loss(hidden, unembedding):
        return (linear_cross_entropy(hidden, unembedding, targets, smoothing, z_loss, 4) * weights).sum()

    d_hidden, d_unembedding = jax.grad(loss, (0, 1))(hidden, unembedding)
    np.testing.assert_allclose(d_hidden.reshape(-1, D), d_logits @ u, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(d_unembedding, d_logits.T @ h, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("chunk", "parts", "cap"), [(3, 1, None), (3, 2, 0.9), (6, 3, None), (None, 4, None)])
def test_a_bias_a_cap_and_a_vocabulary_in_parts(chunk, parts, cap):
    rng = np.random.default_rng(1)
    hidden, unembedding, bias = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, D), (12, D), (12,)))
    targets = jnp.asarray([0, 5, 6, 11, 7])

    def plain(hidden, unembedding, bias):
        logits = hidden @ unembedding.T + bias
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        return cross_entropy(logits, targets, label_smoothing=0.1, z_loss=0.02).sum()

    def chunked(hidden, unembedding, bias):
        return linear_cross_entropy(hidden, unembedding, targets, 0.1, 0.02, chunk, bias, parts, cap=cap).sum()

    got, wanted = (jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(hidden, unembedding, bias) for loss in (chunked, plain))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def test_weights_of_zero_give_no_gradient():
    hidden, unembedding, targets, _ = example()
    weights = jnp.zeros((B, T)).at[0, 1].set(1.0)
    gradient = jax.grad(lambda h: (linear_cross_entropy(h, unembedding, targets, 0.0, 0.0, 4) * weights).sum())(hidden)
    assert (gradient[0, 1] != 0).any() and (gradient.at[0, 1].set(0) == 0).all()


def test_bfloat16_hidden_states_have_a_float32_loss():
    hidden, unembedding, targets, _ = example(scale=1.0)
    hidden = hidden.astype(jnp.bfloat16)
    loss, (d_hidden, d_unembedding) = jax.value_and_grad(
        lambda h, u: linear_cross_entropy(h, u, targets, 0.0, 0.0, 4).sum(), (0, 1))(hidden, unembedding)
    assert loss.dtype == d_unembedding.dtype == jnp.float32 and d_hidden.dtype == jnp.bfloat16
    rounded = np.asarray(unembedding.astype(jnp.bfloat16), np.float64)
    expected = reference(np.asarray(hidden, np.float64) @ rounded.T, np.asarray(targets)).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)  # products of bfloat16 are exact in float32


def megabytes(loss, dim):
    """Temporary memory of the compiled loss and gradient at 4 x 1024 tokens and GPT-2's vocabulary;
    nothing runs."""
    shapes = (jax.ShapeDtypeStruct((4, 1024, dim), jnp.float32), jax.ShapeDtypeStruct((50_257, dim), jnp.float32),
              jax.ShapeDtypeStruct((4, 1024), jnp.int32))
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def test_chunks_are_smaller_where_tokens_are_many():
    """64 x 1024 tokens of GPT-2: at most half a gigabyte beside hidden states, table and their
    gradients."""
    shapes = (jax.ShapeDtypeStruct((64 * 1024, 768), jnp.bfloat16), jax.ShapeDtypeStruct((50_257, 768), jnp.float32),
              jax.ShapeDtypeStruct((64 * 1024,), jnp.int32))
    loss = jax.value_and_grad(lambda h, u, t: linear_cross_entropy(h, u, t).sum(), argnums=(0, 1))
    chunk_bytes = [eqn.outvars[0].aval.size * 4 for eqn in _all_eqns(jax.make_jaxpr(loss)(*shapes).jaxpr)
                   if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.shape[0] == 64 * 1024]
    assert chunk_bytes and max(chunk_bytes) <= 2**28


def _all_eqns(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _all_eqns(inner)


@pytest.mark.parametrize("dim", [64, 768])
def test_no_logits_are_held(dim):
    chunked = megabytes(lambda h, u, t: linear_cross_entropy(h, u, t).sum(), dim)
    assert chunked <= 100
    assert megabytes(lambda h, u, t: cross_entropy(h @ u.T, t).sum(), dim) > 800
