"""The matrix product of a dense layer, with the gradient written so that no operand is transposed in memory."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


@jax.custom_vjp
def linear(x_MD: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    """``x_MD @ kernel_DF``.

    JAX derives the kernel's gradient as a transposed ``[F, D]`` product, which XLA:CPU then copies into place; here
    it is ``x^T g`` itself.

    Args:
      x_MD: one row a token.
      kernel_DF: the weights.

    Returns:
      ``[M, F]``.
    """
    return _product(x_MD, kernel_DF, 1, 0)


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())))


def _forward(x_MD: jax.Array, kernel_DF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return linear(x_MD, kernel_DF), (x_MD, kernel_DF)


def _backward(saved: tuple[jax.Array, jax.Array], gradient_MF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_MD, kernel_DF = saved
    return _product(gradient_MF, kernel_DF, 1, 1), _product(x_MD, gradient_MF, 0, 0)


linear.defvjp(_forward, _backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x * P(normal <= x), by erf: ``jax.nn.gelu`` takes three passes by erfc on XLA:CPU.

    Source: Hendrycks and Gimpel (2016).
    """
    return x * _normal_cdf(x)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    density = math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * x * x)
    return (gradient * (_normal_cdf(x) + x * density),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
