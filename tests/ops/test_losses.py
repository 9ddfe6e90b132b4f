"""Cross entropies against float64 formulas, against each other, and by the memory they need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax import ops

cross_entropy = jax.jit(ops.cross_entropy, static_argnames=("label_smoothing", "z_loss"))
linear_cross_entropy = jax.jit(ops.linear_cross_entropy, static_argnums=(3, 4, 5))

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
    """Temporary memory of the compiled loss and gradient at 4 x 1024 tokens and GPT-2's vocabulary; nothing runs."""
    shapes = (jax.ShapeDtypeStruct((4, 1024, dim), jnp.float32), jax.ShapeDtypeStruct((50_257, dim), jnp.float32),
              jax.ShapeDtypeStruct((4, 1024), jnp.int32))
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


@pytest.mark.parametrize("dim", [64, 768])
def test_no_logits_are_held(dim):
    chunked = megabytes(lambda h, u, t: linear_cross_entropy(h, u, t).sum(), dim)
    assert chunked <= 100
    assert megabytes(lambda h, u, t: cross_entropy(h @ u.T, t).sum(), dim) > 800
