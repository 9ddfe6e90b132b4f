"""The matrix products of dense layers, with gradients that transpose no operand in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer_jax.derivatives import with_gradient


def linear(x_MD: Float[Array, "*rows D"], kernel_DF: Float[Array, "D F"],
           precision: str | None = None) -> Float[Array, "*rows F"]:
    """Computes ``x_MD @ kernel_DF``.

    JAX would derive the kernel's gradient as a product ``[F, D]`` that is then transposed, which
    XLA:CPU does with a copy. Here the gradient is computed as ``x^T g`` directly.

    Args:
      x_MD: One row for each token, ``[M, D]`` or ``[..., D]``.
      kernel_DF: The weights ``[D, F]``.
      precision: The precision of the product and of the products of its gradient; ``None`` is
        JAX's default.

    Returns:
      ``[M, F]`` or ``[..., F]``.
    """
    def product(x_MD: jax.Array, kernel_DF: jax.Array) -> jax.Array:
        return _product(x_MD, kernel_DF, (x_MD.ndim - 1,), (0,), precision)

    def gradients(args: tuple[jax.Array, jax.Array], kept: tuple,
                  gradient_MF: jax.Array) -> tuple[jax.Array, jax.Array]:
        (x_MD, kernel_DF), rows = args, range(gradient_MF.ndim - 1)
        return (_product(gradient_MF, kernel_DF, (len(rows),), (1,), precision),
                _product(x_MD, gradient_MF, rows, rows, precision))

    return with_gradient(product, gradients, x_MD, kernel_DF)


def _product(a: jax.Array, b: jax.Array, axes_a: Sequence[int], axes_b: Sequence[int],
             precision: str | None) -> jax.Array:
    """Contracts the given axes of two arrays."""
    return jax.lax.dot_general(a, b, ((axes_a, axes_b), ((), ())), precision=precision)


def float32_logits(x_MD: Float[Array, "*rows D"], table_VD: Float[Array, "V D"],
                   precision: str | None = None) -> Float[Array, "*rows V"]:
    """Computes the logits ``x_MD @ table_VD.T`` in float32.

    The gradient of the logits is rounded to the type of ``x_MD`` before it is multiplied.

    Args:
      x_MD: Hidden states ``[M, D]`` or ``[..., D]``.
      table_VD: The unembedding ``[V, D]``, in the same type.
      precision: See ``linear``.

    Returns:
      float32 ``[M, V]`` or ``[..., V]``.
    """
    def product(x_MD: jax.Array, table_VD: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x_MD, table_VD, (((x_MD.ndim - 1,), (1,)), ((), ())), precision=precision,
                                   preferred_element_type=jnp.float32)

    def gradients(args: tuple[jax.Array, jax.Array], kept: tuple,
                  gradient_MV: jax.Array) -> tuple[jax.Array, jax.Array]:
        (x_MD, table_VD), rows = args, range(gradient_MV.ndim - 1)
        gradient_MV = gradient_MV.astype(x_MD.dtype)
        return (_product(gradient_MV, table_VD, (len(rows),), (0,), precision),
                _product(gradient_MV, x_MD, rows, rows, precision))

    return with_gradient(product, gradients, x_MD, table_VD)


def soft_cap(x: Float[Array, "*shape"], cap: float | Float[Array, ""]) -> Float[Array, "*shape"]:
    """Computes ``cap * tanh(x / cap)``, which is near x for small x and stays below the cap.

    Source: Bello et al. (2016); Gemma Team (2024), Gemma 2.

    Args:
      x: Any array.
      cap: The limit of the absolute values, above 0.

    Returns:
      An array of the same shape and type.
    """
    return cap * jnp.tanh(x / cap)


@jax.custom_jvp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes the exact GELU, x * P(normal <= x), with ``erf``.

    ``jax.nn.gelu`` uses ``erfc``, which takes three passes over the array on XLA:CPU.

    Source: Hendrycks and Gimpel (2016).

    Args:
      x: Any array.

    Returns:
      An array of the same shape and type.
    """
    return x * _normal_cdf(x)


def relu_squared(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Computes the square of ReLU.

    Source: So et al. (2021), Primer.

    Args:
      x: Any array.

    Returns:
      An array of the same shape and type.
    """
    return jnp.square(jax.nn.relu(x))


def _normal_cdf(x: jax.Array) -> jax.Array:
    """Computes the cumulative distribution function of the standard normal distribution."""
    return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


@gelu.defjvp
def _gelu_tangent(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Computes the value and the derivative of ``gelu``."""
    x, = primals
    density = math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * x * x)
    return gelu(x), tangents[0] * (_normal_cdf(x) + x * density)
