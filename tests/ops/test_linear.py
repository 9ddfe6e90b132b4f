"""The dense product and the exact GELU, whose gradients are written by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.ops.linear import gelu, linear, relu_squared


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_linear_and_its_gradients_are_the_matrix_formulas():
    x, kernel, gradient = normal(7, 5), normal(5, 11, seed=1), normal(7, 11, seed=2)
    out, pull = jax.vjp(linear, jnp.float32(x), jnp.float32(kernel))
    d_x, d_kernel = pull(jnp.float32(gradient))
    np.testing.assert_allclose(out, x @ kernel, atol=3e-6)
    np.testing.assert_allclose(d_x, gradient @ kernel.T, atol=5e-6)
    np.testing.assert_allclose(d_kernel, x.T @ gradient, atol=5e-6)


def test_the_squared_relu_and_its_gradient():
    x = np.linspace(-3, 3, 13)
    np.testing.assert_allclose(relu_squared(jnp.float32(x)), np.maximum(x, 0) ** 2, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(relu_squared))(jnp.float32(x)), 2 * np.maximum(x, 0), atol=1e-6)


def test_gelu_and_its_gradient_are_x_times_the_normal_distribution():
    x = np.linspace(-6, 6, 101)
    cdf = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x])
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(gelu(jnp.float32(x)), x * cdf, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(jnp.float32(x)), cdf + x * density, atol=2e-6)
