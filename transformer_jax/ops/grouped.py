"""Matrix products of rows that are sorted by group, where each group has a matrix of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer_jax.derivatives import with_gradient
from transformer_jax.ops.attention import platform

# The number of rows of one product on a CPU, where a group has as many; see
# docs/decisions/2026-11-29_experts.md.
_BLOCK = 64


def grouped_matmul(rows_RD: Float[Array, "R D"], kernels_EDF: Float[Array, "E D F"], sizes_E: Int[Array, " E"],
                   precision: str | None = None) -> Float[Array, "R F"]:
    """Multiplies every row with the matrix of its group.

    On a CPU ``jax.lax.ragged_dot`` multiplies every row with all matrices, so there a loop
    multiplies blocks of rows of one group.

    Args:
      rows_RD: The rows, sorted by group.
      kernels_EDF: The matrix of each group.
      sizes_E: The number of rows in each group. Rows after the last group belong to none; their
        results and gradients are not defined.
      precision: The precision of the products.

    Returns:
      The products ``[R, F]``.
    """
    @jax.custom_jvp
    def products(rows_RD: jax.Array, kernels_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
        return _products(rows_RD, kernels_EDF, sizes_E, 0, precision)

    @products.defjvp
    def tangent(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        whole = functools.partial(_products, axis=0, precision=precision, is_counted=False)
        return products(*primals), jax.jvp(whole, primals, tangents)[1]

    def gradients(args: tuple, kept: tuple, gradient_RF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
        rows_RD, kernels_EDF, sizes_E = args
        return (_products(gradient_RF, kernels_EDF, sizes_E, 1, precision),
                _outer_products(rows_RD, gradient_RF, sizes_E, precision).astype(kernels_EDF.dtype), None)

    if platform() != "cpu":
        return jax.lax.ragged_dot(rows_RD, kernels_EDF, sizes_E, precision=precision)
    return with_gradient(products, gradients, rows_RD, kernels_EDF, sizes_E)


class _Blocks:
    """The blocks of rows, each within one group, in ascending order of their first row.

    A block reaches into the next group if its group has fewer rows left.
    """

    def __init__(self, num_rows: int, sizes_E: jax.Array):
        per_group = -(-num_rows // sizes_E.shape[0])
        self.size = min(_BLOCK, max(8, 1 << (per_group - 1).bit_length()))
        self.num_rows, self.most = num_rows, num_rows // self.size + sizes_E.shape[0]
        self.sizes_E, blocks_E = sizes_E, -(-sizes_E // self.size)
        self.starts_E, self.ends_E = jnp.cumsum(sizes_E) - sizes_E, jnp.cumsum(blocks_E)
        self.firsts_E = self.ends_E - blocks_E

    def place(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the group of a block, its first row, and the number of rows of the group from
        there on. A block after the last one has its first row after all rows."""
        group = jnp.searchsorted(self.ends_E, index, side="right")
        before = (index - self.firsts_E[group]) * self.size
        start = jnp.where(index < self.ends_E[-1], self.starts_E[group] + before, self.num_rows)
        return group, start, self.sizes_E[group] - before


def _products(rows_RD: jax.Array, kernels_EDF: jax.Array, sizes_E: jax.Array, axis: int,
              precision: str | None, *, is_counted: bool = True) -> jax.Array:
    """Contracts rows with the given axis of the matrix of their group, block by block.

    The loop ends after the last block. With ``is_counted=False`` it ends after the largest possible
    number of blocks, so that JAX can differentiate it in reverse mode.
    """
    blocks, width = _Blocks(rows_RD.shape[0], sizes_E), kernels_EDF.shape[2 - axis]
    padded = jnp.pad(rows_RD, ((0, blocks.size), (0, 0)))  # for the last block

    def step(index: jax.Array, out: jax.Array) -> jax.Array:
        group, start, _ = blocks.place(index)
        block = jax.lax.dynamic_slice(padded, (start, jnp.zeros_like(start)), (blocks.size, rows_RD.shape[1]))
        kernel = jax.lax.dynamic_index_in_dim(kernels_EDF, group, 0, keepdims=False)
        product = jax.lax.dot_general(block, kernel, (((1,), (axis,)), ((), ())), precision=precision)
        # The rows of a block beyond its group are written again by the block of the next group.
        return jax.lax.dynamic_update_slice(out, product, (start, jnp.zeros_like(start)))

    out = jnp.zeros((padded.shape[0], width), rows_RD.dtype)
    return jax.lax.fori_loop(0, blocks.ends_E[-1] if is_counted else blocks.most, step, out)[:rows_RD.shape[0]]


def _outer_products(rows_RD: jax.Array, gradient_RF: jax.Array, sizes_E: jax.Array,
                    precision: str | None) -> jax.Array:
    """Sums the outer products of rows and gradients within each group, float32 ``[E, D, F]``."""
    D, F, blocks = rows_RD.shape[1], gradient_RF.shape[1], _Blocks(rows_RD.shape[0], sizes_E)
    rows, gradients = (jnp.pad(x, ((0, blocks.size), (0, 0))) for x in (rows_RD, gradient_RF))

    def step(index: jax.Array, sums: jax.Array) -> jax.Array:
        group, start, left = blocks.place(index)
        zero = jnp.zeros_like(start)
        block = jax.lax.dynamic_slice(rows, (start, zero), (blocks.size, D))
        gradient = jax.lax.dynamic_slice(gradients, (start, zero), (blocks.size, F))
        is_inside = (jnp.arange(blocks.size) < left)[:, None]
        outer = jax.lax.dot_general(jnp.where(is_inside, block, 0), jnp.where(is_inside, gradient, 0),
                                    (((0,), (0,)), ((), ())), precision=precision,
                                    preferred_element_type=jnp.float32)
        total = outer + jax.lax.dynamic_index_in_dim(sums, group, 0, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(sums, total, group, 0)

    return jax.lax.fori_loop(0, blocks.ends_E[-1], step, jnp.zeros((sizes_E.shape[0], D, F), jnp.float32))
