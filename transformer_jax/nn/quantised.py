"""Weights of 8 or 4 bits for decoding on CPUs.

Decoding token by token waits for weights from memory, so that fewer bytes are faster even though
they must be converted. The kernel is stored in blocks of columns. A block is converted to the type
of the activations in the processor's cache, and then multiplied there: XLA:CPU has a fast product
for floats, but none for integers.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from transformer_jax.nn.layers import Linear, parameter
from transformer_jax.sharding import as_rows

Weights = Literal["int8", "int4"]
# A converted block of this size fits the second-level cache of a core.
_BLOCK_BYTES, _LEAST_COLUMNS = 1 << 19, 64
# 4-bit numbers share a scale with this many others of their column.
_GROUP = 32


class QuantisedLinear(nnx.Module):
    """A linear map whose kernel has 8 or 4 bits a weight; only its values are rounded.

    With 8 bits each output has a scale, and with 4 bits each group of 32 inputs of an output. The
    scale is the largest absolute weight divided by 127 or 7, and weights are rounded to the nearest
    multiple of it.

    Attributes:
      numbers: int8 ``[blocks, in, columns]``, or two 4-bit numbers in a byte, uint8
        ``[blocks, in / 2, columns]``: those of the first half of the inputs in the low bits.
      scales: ``[blocks, 1, columns]``, or ``[blocks, in / 32, columns]``.
      bias: ``[out]``, or ``None``.
      out_dim: The number of outputs; the last block may have unused columns.
    """

    def __init__(self, kernel_DF: jax.Array, bias: nnx.Param | None, weights: Weights):
        D, self.out_dim = kernel_DF.shape
        columns = max(_LEAST_COLUMNS, _BLOCK_BYTES // (4 * D) // _LEAST_COLUMNS * _LEAST_COLUMNS)
        columns = min(columns, self.out_dim)
        numbers_DF, scales_GF = quantise(kernel_DF, weights)
        if weights == "int4":
            shifted_DF = (numbers_DF + 8).astype(jnp.uint8)
            numbers_DF = shifted_DF[:D // 2] | (shifted_DF[D // 2:] << 4)
        self.numbers = parameter(_in_blocks(numbers_DF, columns), (None, None, None))
        self.scales = parameter(_in_blocks(scales_GF, columns), (None, None, None))
        self.bias = nnx.data(bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the map to ``[..., in]`` and returns ``[..., out]``."""
        rows_MD = as_rows(x)
        is_packed = self.numbers[...].dtype == jnp.uint8

        def block(_: None, stored: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
            numbers, scales = stored
            if not is_packed:
                return None, rows_MD @ numbers.astype(x.dtype) * scales.astype(x.dtype)
            half, (low_scales, high_scales) = numbers.shape[0], jnp.split(scales, 2)
            low, high = (numbers & 15).astype(x.dtype) - 8, (numbers >> 4).astype(x.dtype) - 8
            return None, (rows_MD[:, :half] @ _scaled(low, low_scales)
                          + rows_MD[:, half:] @ _scaled(high, high_scales))

        _, products_NMF = jax.lax.scan(block, None, (self.numbers[...], self.scales[...]))
        rows = products_NMF.swapaxes(0, 1).reshape(rows_MD.shape[0], -1)[:, :self.out_dim]
        if self.bias is not None:
            rows = rows + self.bias[...].astype(x.dtype)
        return rows.reshape(*x.shape[:-1], self.out_dim)


def quantise(kernel_DF: Float[Array, "D F"], weights: Weights) -> tuple[jax.Array, jax.Array]:
    """Rounds a kernel to multiples of scales.

    Args:
      kernel_DF: The kernel ``[in, out]``.
      weights: ``"int8"`` or ``"int4"``.

    Returns:
      The multiples, int8 ``[in, out]``, and the scales, float32 ``[groups, out]``.

    Raises:
      ValueError: For ``"int4"``, if the number of inputs is not a multiple of 64.
    """
    D, F = kernel_DF.shape
    size, largest = (D, 127) if weights == "int8" else (_GROUP, 7)
    if D % size or (weights == "int4" and D % (2 * size)):
        raise ValueError(f"weights='int4' needs layers whose inputs are a multiple of {2 * _GROUP}, but one has {D}; "
                         "use weights='int8'")
    kernel_GSF = kernel_DF.astype(jnp.float32).reshape(-1, size, F)
    scales_GF = jnp.abs(kernel_GSF).max(1) / largest
    divisors_GF = jnp.where(scales_GF == 0, 1, scales_GF)
    numbers_GSF = jnp.round(kernel_GSF / divisors_GF[:, None])
    return numbers_GSF.reshape(D, F).astype(jnp.int8), scales_GF


def rounded(kernel_DF: Float[Array, "D F"], weights: Weights) -> jax.Array:
    """Returns a kernel with the values that ``quantise`` rounds it to, in its own type."""
    numbers_DF, scales_GF = quantise(kernel_DF, weights)
    return _scaled(numbers_DF.astype(jnp.float32), scales_GF).astype(kernel_DF.dtype)


def with_quantised_linears(model: nnx.Module, weights: Weights) -> nnx.Module:
    """Replaces the linear maps of a model in the form for decoding, and its unembedding.

    Args:
      model: The model, whose layers have separate weights.
      weights: ``"int8"`` or ``"int4"``.

    Returns:
      A new model. Its embeddings, norms and biases are not rounded.
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    for _, module in list(nnx.iter_modules(model)):
        for name, child in list(vars(module).items()):
            if type(child) is Linear:
                setattr(module, name, QuantisedLinear(child.kernel[...], child.bias, weights))
            elif name == "decoding_DV" and child is not None:
                setattr(module, name, QuantisedLinear(child[...], None, weights))
    return model


def _scaled(numbers_DF: jax.Array, scales_GF: jax.Array) -> jax.Array:
    """Multiplies each group of inputs with its scales."""
    groups_GSF = numbers_DF.reshape(scales_GF.shape[0], -1, scales_GF.shape[1])
    return (groups_GSF * scales_GF[:, None].astype(numbers_DF.dtype)).reshape(numbers_DF.shape)


def _in_blocks(x_DF: jax.Array, columns: int) -> jax.Array:
    """Splits an array into blocks of columns ``[blocks, D, columns]``, the last one padded."""
    D, F = x_DF.shape
    padded = jnp.pad(x_DF, ((0, 0), (0, math.ceil(F / columns) * columns - F)))
    return padded.reshape(D, -1, columns).swapaxes(0, 1)
