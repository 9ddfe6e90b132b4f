"""Cross entropies against float64 formulas, against each other, and by the memory they need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.ops import cross_entropy, linear_cross_entropy

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
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, unembedding = jax.random.normal(keys[0], (B, T, D)), scale * jax.random.normal(keys[1], (V, D))
    targets = jax.random.randint(keys[2], (B, T), 0, V).at[0, 0].set(0).at[1, 1].set(V - 1)
    return hidden, unembedding, targets, jax.random.normal(keys[3], (B, T))


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
    np.testing.assert_allclose(linear_cross_entropy(logits, jnp.eye(2), targets, chunk=1), [0.0, 1e4])


@pytest.mark.parametrize("chunk", [1, 4, 5, V, 100])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), SETTINGS)
def test_gradients_of_both_are_equal(label_smoothing, z_loss, chunk):
    hidden, unembedding, targets, weights = example(scale=1.0)

    def plain(hidden, unembedding):
        losses = cross_entropy(hidden @ unembedding.T, targets, label_smoothing=label_smoothing, z_loss=z_loss)
        return (losses * weights).sum()

    def chunked(hidden, unembedding):
        return (linear_cross_entropy(hidden, unembedding, targets, label_smoothing, z_loss, chunk) * weights).sum()

    for got, wanted in zip(jax.grad(chunked, (0, 1))(hidden, unembedding), jax.grad(plain, (0, 1))(hidden, unembedding),
                           strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-6)


def test_gradient_equals_the_float64_formula():
    hidden, unembedding, targets, weights = example(scale=1.0)
    smoothing, z_loss = 0.2, 0.03
    h, u = np.asarray(hidden, np.float64).reshape(-1, D), np.asarray(unembedding, np.float64)
    logits = h @ u.T
    log_z = np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = smoothing / V + (1 - smoothing) * np.eye(V)[np.asarray(targets).reshape(-1)]
    d_logits = np.asarray(weights, np.float64).reshape(-1, 1) * (np.exp(logits - log_z) * (1 + 2 * z_loss * log_z) - wanted)
    d_hidden, d_unembedding = jax.grad(
        lambda h, u: (linear_cross_entropy(h, u, targets, smoothing, z_loss, 4) * weights).sum(), (0, 1))(hidden, unembedding)
    np.testing.assert_allclose(d_hidden.reshape(-1, D), d_logits @ u, atol=3e-6)
    np.testing.assert_allclose(d_unembedding, d_logits.T @ h, atol=3e-6)


def test_weights_of_zero_give_no_gradient():
    hidden, unembedding, targets, _ = example()
    weights = jnp.zeros((B, T)).at[0, 1].set(1.0)
    gradient = jax.grad(lambda h: (linear_cross_entropy(h, unembedding, targets, chunk=4) * weights).sum())(hidden)
    assert (gradient[0, 1] != 0).any() and (gradient.at[0, 1].set(0) == 0).all()


def test_bfloat16_hidden_states_have_a_float32_loss():
    hidden, unembedding, targets, _ = example(scale=1.0)
    hidden = hidden.astype(jnp.bfloat16)
    loss, (d_hidden, d_unembedding) = jax.value_and_grad(
        lambda h, u: linear_cross_entropy(h, u, targets, chunk=4).sum(), (0, 1))(hidden, unembedding)
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
