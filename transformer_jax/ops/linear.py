"""The matrix product of a dense layer, with the gradient written so that no operand is transposed in memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x_MD: jax.Array, kernel_DF: jax.Array, precision: str | None = None) -> jax.Array:
    """``x_MD @ kernel_DF``; ``[..., D]`` is taken too.

    JAX derives the kernel's gradient as a transposed ``[F, D]`` product, which XLA:CPU then copies into place; here
    it is ``x^T g`` itself.

    Args:
      x_MD: one row a token.
      kernel_DF: the weights.
      precision: of the product and of those of its gradient; ``None``: JAX's default.

    Returns:
      ``[M, F]``.
    """
    return _product(x_MD, kernel_DF, (x_MD.ndim - 1,), (0,), precision)


def _product(a: jax.Array, b: jax.Array, axes_a: Sequence[int], axes_b: Sequence[int],
             precision: str | None) -> jax.Array:
    return jax.lax.dot_general(a, b, ((axes_a, axes_b), ((), ())), precision=precision)


def _forward(x_MD: jax.Array, kernel_DF: jax.Array,
             precision: str | None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return linear(x_MD, kernel_DF, precision), (x_MD, kernel_DF)


def _backward(precision: str | None, saved: tuple[jax.Array, jax.Array],
              gradient_MF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_MD, kernel_DF = saved
    rows = range(x_MD.ndim - 1)
    return (_product(gradient_MF, kernel_DF, (len(rows),), (1,), precision),
            _product(x_MD, gradient_MF, rows, rows, precision))


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
