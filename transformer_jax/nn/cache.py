"""The key/value cache of decoding: an immutable pytree whose methods return a changed copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from transformer_jax.config import ModelConfig
from transformer_jax.nn.positions import position_encoding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The keys and values of earlier tokens. All rows append at the same slot.

    Rows of different lengths are aligned on the right: padding (segment id 0) comes first.

    Attributes:
      keys: One array ``[B * K, S, H]`` for each layer, after rotation. Rows and heads share an axis
        because XLA:CPU updates such an array in place; it would copy an array with two batch axes
        four times for each token. A layer with a sliding window has only as many places as its
        window, and the token of slot i is at the place i modulo the window.
        With latent attention, one array ``[B, S, R]`` holds the latent and the rotated key that all
        heads share.
      values: One array ``[B * K, S, H]`` for each layer; ``()`` with latent attention.
      segment_ids_BS: The segment id of each slot; 0 for an empty slot or padding.
      length: The number of slots in use, an integer scalar.
      positions_BS: The position of each slot's token in its text; ``None`` if neither a bias of
        the position encoding nor a sliding window needs it.
      memory_keys: The keys of the encoder's output, computed once: one array ``[B * K, S', H]`` for
        each layer. Without an encoder it is empty.
      memory_values: The values of the encoder's output, in the same form.
      memory_ids_BS: The segment ids of the encoder's tokens ``[B, S']``; 0 for padding.
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
    def empty(cls, config: ModelConfig, batch_size: int, capacity: int, *, keeps_all: bool = False) -> Self:
        """Makes an empty cache.

        Args:
          config: The model's config.
          batch_size: The number of rows, B.
          capacity: The number of slots of each row, S.
          keeps_all: Whether layers with a sliding window keep all tokens instead of their window.
            They always do if the position encoding has a bias, which is made for all tokens.

        Returns:
          The cache.
        """
        windows = config.windows(config.num_decoder_layers or config.num_layers)
        has_bias = position_encoding(config).has_bias
        sizes = [capacity if window is None or keeps_all or has_bias else min(window, capacity) for window in windows]
        latent, heads = config.latent, batch_size * config.num_kv_heads
        shapes = [(heads, size, config.head_dim) if latent is None else
                  (batch_size, size, latent.cached_width(config)) for size in sizes]

        def slots() -> jax.Array:  # each array has its own memory, so that a cache can be donated
            return jnp.zeros((batch_size, capacity), jnp.int32)

        return cls(keys=tuple(jnp.zeros(shape, config.dtype) for shape in shapes),
                   values=() if latent else tuple(jnp.zeros(shape, config.dtype) for shape in shapes),
                   segment_ids_BS=slots(), length=jnp.zeros((), jnp.int32),
                   positions_BS=slots() if has_bias or any(windows) else None)

    @property
    def capacity(self) -> int:
        """The number of slots of each row."""
        return self.segment_ids_BS.shape[1]

    def keeps_window(self, layer: int) -> bool:
        """Finds out whether a layer keeps only the tokens of its sliding window.

        Args:
          layer: The index of the layer.

        Returns:
          True if it does; False if it keeps all tokens, or if there is no such layer.
        """
        return layer < len(self.keys) and self.keys[layer].shape[1] < self.capacity

    def slots(self, layer: int, num_new: int) -> jax.Array:
        """Finds the slots of the keys that ``extend`` returns for a layer that keeps its window.

        Args:
          layer: The index of the layer.
          num_new: The number of new tokens.

        Returns:
          The slot of each key, integers ``[S]``; negative for a key that does not exist.
        """
        size = self.keys[layer].shape[1]
        if num_new == 1:
            return self.length - (self.length - jnp.arange(size)) % size
        return self.length - size + jnp.arange(size + num_new)

    def extend(self, layer: int, k_BTKH: Float[Array, "B T K H"],
               v_BTKH: Float[Array, "B T K H"] | None = None) -> tuple[Self, jax.Array, jax.Array]:
        """Writes the new keys and values of one layer, and returns those that the new tokens may
        attend to.

        Args:
          layer: The index of the layer.
          k_BTKH: The keys of the new tokens ``[B, T, K, H]``, or their latents ``[B, T, 1, R]``.
          v_BTKH: The values of the new tokens ``[B, T, K, H]``; ``None`` for latents.

        Returns:
          The changed cache, whose ``length`` is unchanged (see ``advance``); and keys and values
          ``[B, S, K, H]`` of all slots. A layer that keeps its window returns those of the slots
          that ``slots`` lists. For latents both are the same array.
        """
        if not self.keeps_window(layer) or k_BTKH.shape[1] == 1:
            cache = self.append_layer(layer, k_BTKH, v_BTKH)
            return cache, *cache.layer(layer)
        size, num_new = self.keys[layer].shape[1], k_BTKH.shape[1]
        in_order = (self.length + jnp.arange(size)) % size
        last = self.length + num_new - 1
        kept = last - (last - jnp.arange(size)) % size - self.length + size

        def both(stored: tuple[jax.Array, ...], new_BTKH: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
            new = _rows_and_heads(new_BTKH).astype(stored[layer].dtype)
            every = jnp.concatenate([stored[layer][:, in_order], new], axis=1)
            return (*stored[:layer], every[:, kept], *stored[layer + 1:]), self._view(every)

        keys, k_BSKH = both(self.keys, k_BTKH)
        if v_BTKH is None:
            return dataclasses.replace(self, keys=keys), k_BSKH, k_BSKH
        values, v_BSKH = both(self.values, v_BTKH)
        return dataclasses.replace(self, keys=keys, values=values), k_BSKH, v_BSKH

    def append_layer(self, layer: int, k_BTKH: Float[Array, "B T K H"],
                     v_BTKH: Float[Array, "B T K H"] | None = None) -> Self:
        """Writes the new keys and values of one layer into the first free slots.

        Of a layer that keeps only its window, this writes one token; ``extend`` writes several.

        Args:
          layer: The index of the layer.
          k_BTKH: The keys of the new tokens ``[B, T, K, H]``, or their latents ``[B, T, 1, R]``.
          v_BTKH: The values of the new tokens ``[B, T, K, H]``; ``None`` for latents.

        Returns:
          The changed cache. Its ``length`` is unchanged, see ``advance``.
        """
        def write(stored: tuple[jax.Array, ...], new_BTKH: jax.Array) -> tuple[jax.Array, ...]:
            new = _rows_and_heads(new_BTKH).astype(stored[layer].dtype)
            written = jax.lax.dynamic_update_slice_in_dim(stored[layer], new, self.length % stored[layer].shape[1],
                                                          axis=1)
            return (*stored[:layer], written, *stored[layer + 1:])

        values = self.values if v_BTKH is None else write(self.values, v_BTKH)
        return dataclasses.replace(self, keys=write(self.keys, k_BTKH), values=values)

    def layer(self, layer: int) -> tuple[jax.Array, jax.Array]:
        """Returns the keys and values of one layer.

        Args:
          layer: The index of the layer.

        Returns:
          Keys and values of all slots, each ``[B, S, K, H]``; latents ``[B, S, 1, R]`` as both.
        """
        return self._view(self.keys[layer]), self._view((self.values or self.keys)[layer])

    def memory_layer(self, layer: int) -> tuple[jax.Array, jax.Array]:
        """Returns the keys and values of the encoder's output for one layer.

        Args:
          layer: The index of the layer.

        Returns:
          Keys and values, each ``[B, S', K, H]``.
        """
        return self._view(self.memory_keys[layer]), self._view(self.memory_values[layer])

    def _view(self, stored: jax.Array) -> jax.Array:
        """Converts a stored array to ``[B, S, K, H]``."""
        return stored.reshape(self.segment_ids_BS.shape[0], -1, *stored.shape[1:]).swapaxes(1, 2)

    def with_memory(self, keys_and_values: Sequence[tuple[jax.Array, jax.Array]], ids_BS: Shaped[Array, "B S"]) -> Self:
        """Stores the keys and values of the encoder's output.

        Args:
          keys_and_values: For each layer, keys and values ``[B, S', K, H]``.
          ids_BS: The segment ids of the encoder's tokens ``[B, S']``; 0 for padding.

        Returns:
          The changed cache.
        """
        keys, values = (tuple(map(_rows_and_heads, arrays)) for arrays in zip(*keys_and_values, strict=True))
        return dataclasses.replace(self, memory_keys=keys, memory_values=values, memory_ids_BS=ids_BS)

    def resized(self, rows_B: Int[Array, " B"], num_slots: int) -> Self:
        """Selects rows and adds empty slots.

        Args:
          rows_B: The indices of the rows to keep. A row may occur more than once.
          num_slots: The number of slots to add to each row.

        Returns:
          The changed cache.
        """
        B = self.segment_ids_BS.shape[0]

        def take(stored: jax.Array) -> jax.Array:
            return stored.reshape(B, -1, *stored.shape[1:])[rows_B].reshape(-1, *stored.shape[1:])

        def longer(stored: jax.Array) -> jax.Array:
            added = num_slots if stored.shape[1] == self.capacity else 0  # a window does not grow
            return jnp.pad(take(stored), ((0, 0), (0, added), (0, 0)))

        def more_slots(stored_BS: jax.Array) -> jax.Array:
            return jnp.pad(stored_BS[rows_B], ((0, 0), (0, num_slots)))

        return dataclasses.replace(
            self, keys=tuple(map(longer, self.keys)), values=tuple(map(longer, self.values)), length=self.length,
                       segment_ids_BS=more_slots(self.segment_ids_BS),
                       positions_BS=None if self.positions_BS is None else more_slots(self.positions_BS),
                       memory_keys=tuple(map(take, self.memory_keys)),
                       memory_values=tuple(map(take, self.memory_values)),
                       memory_ids_BS=None if self.memory_ids_BS is None else self.memory_ids_BS[rows_B])

    def append_segments(self, segment_ids_BT: Shaped[Array, "B T"], positions_BT: Int[Array, "#B T"]) -> Self:
        """Writes the segment ids and positions of new tokens into the first free slots.

        The layers write the keys and values of these tokens afterwards, with ``append_layer``.

        Args:
          segment_ids_BT: The segment ids of the new tokens ``[B, T]``; 0 for padding.
          positions_BT: The positions of the new tokens in their text ``[B, T]``.

        Returns:
          The changed cache.
        """
        def write(stored_BS: jax.Array, new_BT: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(stored_BS, new_BT.astype(jnp.int32), self.length, axis=1)

        return dataclasses.replace(
            self, segment_ids_BS=write(self.segment_ids_BS, segment_ids_BT),
            positions_BS=None if self.positions_BS is None else write(self.positions_BS, positions_BT))

    def advance(self, num_tokens: int) -> Self:
        """Counts new tokens as stored, after every layer has written their keys and values.

        Args:
          num_tokens: The number of new tokens in each row.

        Returns:
          The changed cache.
        """
        return dataclasses.replace(self, length=self.length + num_tokens)

    def without_last(self, num_tokens: Int[Array, ""] | int) -> Self:
        """Removes the last tokens of every row.

        Args:
          num_tokens: The number of tokens. No layer may keep only its sliding window, because the
            tokens have taken the places of older ones there.

        Returns:
          The changed cache.
        """
        length = self.length - num_tokens
        is_kept_S = jnp.arange(self.capacity) < length
        return dataclasses.replace(self, length=length, segment_ids_BS=jnp.where(is_kept_S, self.segment_ids_BS, 0))


def _rows_and_heads(x_BSKH: jax.Array) -> jax.Array:
    """Merges the axes of rows and heads, the form in which the cache stores arrays."""
    B, S, K, H = x_BSKH.shape
    return x_BSKH.swapaxes(1, 2).reshape(B * K, S, H)
