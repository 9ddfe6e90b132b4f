"""Blocks of queries and keys, for attention in memory linear in the length.

The names of axes are those of ``transformer_jax.ops.chunked_attention``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Settings:
    """The values that are constants when a program is compiled.

    ``rows`` and ``columns`` are the numbers of queries and of keys in a block.
    """

    scale: float
    dropout: float
    precision: Any
    num_queries: int
    num_keys: int
    rows: int
    columns: int
    bias_tree: Any
    cap: float | None = None

    @property
    def num_row_blocks(self) -> int:
        """The number of blocks of queries."""
        return -(-self.num_queries // self.rows)

    @property
    def num_column_blocks(self) -> int:
        """The number of blocks of keys."""
        return -(-self.num_keys // self.columns)


def row_blocks(settings: Settings, x_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """Splits queries into blocks ``[X, B, K, G * R, H]`` of R queries each; the last is padded."""
    B, T, N, H = x_BTNH.shape
    X, R = settings.num_row_blocks, settings.rows
    x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, X * R - T), (0, 0), (0, 0)))
    x_BXRKGH = x_BTNH.reshape(B, X, R, num_kv_heads, N // num_kv_heads, H)
    return x_BXRKGH.transpose(1, 0, 3, 4, 2, 5).reshape(X, B, num_kv_heads, -1, H)


def from_row_blocks(settings: Settings, x_XBKQH: jax.Array) -> jax.Array:
    """Joins the blocks of queries, the inverse of ``row_blocks``."""
    X, B, K, Q, H = x_XBKQH.shape
    x_XBKGRH = x_XBKQH.reshape(X, B, K, Q // settings.rows, settings.rows, H)
    return x_XBKGRH.transpose(1, 0, 4, 2, 3, 5).reshape(B, X * settings.rows, -1, H)[:, :settings.num_queries]


def sinks_of_block(settings: Settings, sinks_N: jax.Array | None, num_kv_heads: int) -> jax.Array | None:
    """Returns the sink of each query of a block, float32 ``[K, G * R, 1]``."""
    if sinks_N is None:
        return None
    return jnp.repeat(sinks_N.astype(jnp.float32).reshape(num_kv_heads, -1), settings.rows, axis=1)[..., None]


def padded_to_blocks(settings: Settings, x_BSKH: jax.Array) -> jax.Array:
    """Pads keys or values to whole blocks, and moves the axis of heads: ``[B, K, S, H]``."""
    missing = settings.num_column_blocks * settings.columns - settings.num_keys
    return jnp.pad(x_BSKH, ((0, 0), (0, missing), (0, 0), (0, 0))).swapaxes(1, 2)


def key_block(settings: Settings, x_BKSH: jax.Array, j: jax.Array) -> jax.Array:
    """Returns block j of keys or values."""
    return jax.lax.dynamic_slice_in_dim(x_BKSH, j * settings.columns, settings.columns, axis=2)


def add_to_block(settings: Settings, x_BKSH: jax.Array, block_BKCH: jax.Array, j: jax.Array) -> jax.Array:
    """Adds an array to block j."""
    sum_BKCH = key_block(settings, x_BKSH, j) + block_BKCH
    return jax.lax.dynamic_update_slice_in_dim(x_BKSH, sum_BKCH, j * settings.columns, axis=2)
