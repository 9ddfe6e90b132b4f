"""The matrix product of a dense layer, with the gradient written so that no operand is transposed
in memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x_MD: jax.Array, kernel_DF: jax.Array, precision: str | None = None) -> jax.Array:
    """``x_MD @ kernel_DF``; ``[..., D]`` is taken too.

    JAX derives the kernel's gradient as a transposed ``[F, D]`` product, which XLA:CPU then copies
    into place; here it is ``x^T g`` itself.

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def float32_logits(x_MD: jax.Array, table_VD: jax.Array, precision: str | None = None) -> jax.Array:
    """``x_MD @ table_VD.T`` in float32, whose gradient is rounded to the type of ``x_MD`` before it
    is multiplied.

    Args:
      x_MD: hidden states; ``[..., D]`` is taken too.
      table_VD: the unembedding, in the same type.
      precision: see :func:`linear`.

    Returns:
      float32 ``[M, V]``.
    """
    return jax.lax.dot_general(x_MD, table_VD, (((x_MD.ndim - 1,), (1,)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)


def _logits_backward(precision: str | None, saved: tuple[jax.Array, jax.Array],
                     gradient_MV: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_MD, table_VD = saved
    gradient_MV, rows = gradient_MV.astype(x_MD.dtype), range(x_MD.ndim - 1)
    return (_product(gradient_MV, table_VD, (len(rows),), (0,), precision),
            _product(gradient_MV, x_MD, rows, rows, precision))


float32_logits.defvjp(lambda x_MD, table_VD, precision: (float32_logits(x_MD, table_VD, precision), (x_MD, table_VD)),
                      _logits_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x * P(normal <= x), by erf: ``jax.nn.gelu`` takes three passes by erfc on
    XLA:CPU.

    Source: Hendrycks and Gimpel (2016).
    """
    return x * _normal_cdf(x)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    density = math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * x * x)
    return (gradient * (_normal_cdf(x) + x * density),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
