"""The key/value cache of decoding: a frozen pytree with pure append."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp

from transformer_jax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens read so far; every row appends at the same place.

    Ragged rows are aligned on the right: padding (segment id 0) comes first.

    Attributes:
      keys: one ``[B * K, S, H]`` a layer, after rotation. Rows and heads share an axis because
        XLA:CPU updates such an array in place, where it copies one with two batch axes four times a
        token.
      values: likewise.
      segment_ids_BS: 0 where nothing, or padding, is stored.
      length: number of slots in use, a scalar.
      positions_BS: where what is stored stands in its text; ``None`` where no bias asks for it.
      memory_keys: keys of an encoder's output, computed once, one ``[B * K, S', H]`` a layer;
        without an encoder, none.
      memory_values: likewise.
      memory_ids_BS: segment ids of the encoder's tokens, 0 for padding.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    segment_ids_BS: jax.Array
    length: jax.Array
    memory_keys: tuple[jax.Array, ...] = ()
    memory_values: tuple[jax.Array, ...] = ()
    memory_ids_BS: jax.Array | None = None
    positions_BS: jax.Array | None = None

    @classmethod
    def empty(cls, config: ModelConfig, batch_size: int, capacity: int) -> Self:
        """A cache with room for ``capacity`` tokens a row."""
        shape = (batch_size * config.num_kv_heads, capacity, config.head_dim)
        layers = range(config.num_decoder_layers or config.num_layers)
        slots_BS = jnp.zeros((batch_size, capacity), jnp.int32)
        return cls(keys=tuple(jnp.zeros(shape, config.dtype) for _ in layers),
                   values=tuple(jnp.zeros(shape, config.dtype) for _ in layers),
                   segment_ids_BS=slots_BS, length=jnp.zeros((), jnp.int32),
                   positions_BS=slots_BS if config.positions in ("alibi", "relative") else None)

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.segment_ids_BS.shape[1]

    def append_layer(self, layer: int, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Self:
        """The cache with one layer's new keys and values written after the ``length`` already
        there."""
        def write(stored: tuple[jax.Array, ...], new_BTKH: jax.Array) -> tuple[jax.Array, ...]:
            new = _rows_and_heads(new_BTKH).astype(stored[layer].dtype)
            written = jax.lax.dynamic_update_slice_in_dim(stored[layer], new, self.length, axis=1)
            return (*stored[:layer], written, *stored[layer + 1:])

        return dataclasses.replace(self, keys=write(self.keys, k_BTKH), values=write(self.values, v_BTKH))

    def layer(self, layer: int) -> tuple[jax.Array, jax.Array]:
        """One layer's keys and values ``[B, S, K, H]``."""
        return self._view(self.keys[layer]), self._view(self.values[layer])

    def memory_layer(self, layer: int) -> tuple[jax.Array, jax.Array]:
        """One layer's keys and values of the encoder's output ``[B, S', K, H]``."""
        return self._view(self.memory_keys[layer]), self._view(self.memory_values[layer])

    def _view(self, stored: jax.Array) -> jax.Array:
        return stored.reshape(self.segment_ids_BS.shape[0], -1, *stored.shape[1:]).swapaxes(1, 2)

    def with_memory(self, keys_and_values: Sequence[tuple[jax.Array, jax.Array]], ids_BS: jax.Array) -> Self:
        """The cache with every layer's keys and values ``[B, S', K, H]`` of an encoder's output."""
        keys, values = (tuple(map(_rows_and_heads, arrays)) for arrays in zip(*keys_and_values, strict=True))
        return dataclasses.replace(self, memory_keys=keys, memory_values=values, memory_ids_BS=ids_BS)

    def resized(self, rows_B: jax.Array, num_slots: int) -> Self:
        """The cache of some rows, with so many slots more."""
        B = self.segment_ids_BS.shape[0]

        def take(stored: jax.Array) -> jax.Array:
            return stored.reshape(B, -1, *stored.shape[1:])[rows_B].reshape(-1, *stored.shape[1:])

        def longer(stored: jax.Array) -> jax.Array:
            return jnp.pad(take(stored), ((0, 0), (0, num_slots), (0, 0)))

        def more_slots(stored_BS: jax.Array) -> jax.Array:
            return jnp.pad(stored_BS[rows_B], ((0, 0), (0, num_slots)))

        return KVCache(keys=tuple(map(longer, self.keys)), values=tuple(map(longer, self.values)), length=self.length,
                       segment_ids_BS=more_slots(self.segment_ids_BS),
                       positions_BS=None if self.positions_BS is None else more_slots(self.positions_BS),
                       memory_keys=tuple(map(take, self.memory_keys)),
                       memory_values=tuple(map(take, self.memory_values)),
                       memory_ids_BS=None if self.memory_ids_BS is None else self.memory_ids_BS[rows_B])

    def append_segments(self, segment_ids_BT: jax.Array, positions_BT: jax.Array) -> Self:
        """The cache with the ids and positions of new tokens written; their keys follow layer by
        layer."""
        def write(stored_BS: jax.Array, new_BT: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(stored_BS, new_BT.astype(jnp.int32), self.length, axis=1)

        return dataclasses.replace(
            self, segment_ids_BS=write(self.segment_ids_BS, segment_ids_BT),
            positions_BS=None if self.positions_BS is None else write(self.positions_BS, positions_BT))

    def advance(self, num_tokens: int) -> Self:
        """The cache with its new tokens counted, once every layer has written them."""
        return dataclasses.replace(self, length=self.length + num_tokens)


def _rows_and_heads(x_BSKH: jax.Array) -> jax.Array:
    B, S, K, H = x_BSKH.shape
    return x_BSKH.swapaxes(1, 2).reshape(B * K, S, H)
