"""The masks of layers with a sliding window, whose caches hold only their window."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer_jax.nn.cache import KVCache
from transformer_jax.ops.masks import AttentionMask


def layer_mask(mask: AttentionMask, window: int | None, cache: KVCache | None, layer: int,
               num_new: int) -> tuple[AttentionMask, jax.Array | None]:
    """Makes the mask of a layer from the mask that all layers share.

    Args:
      mask: The mask of all layers, without a window.
      window: The sliding window of the layer, or ``None``.
      cache: The cache, with the segment ids of the new tokens in it.
      layer: The index of the layer.
      num_new: The number of new tokens.

    Returns:
      The mask for the keys that ``KVCache.extend`` returns for this layer. If these are only those
      of its window, also the slot of each of these keys ``[S]``, which is negative for a key that
      does not exist; otherwise ``None``.

    Raises:
      ValueError: If the caller selects slots (``visible_BTS``), but the layer keeps only its
        window.
    """
    if cache is None or not cache.keeps_window(layer):
        return dataclasses.replace(mask, window=window), None
    if mask.allowed_BNTS is not None:
        raise ValueError("visible_BTS selects slots of a cache, but a layer with a sliding window keeps only its "
                         "window; make the cache with model.start_cache(rows, capacity, keeps_all=True)")
    slots_S = cache.slots(layer, num_new)
    pairs = tuple((query_ids_BT, jnp.where(slots_S < 0, 0, key_ids_BS[:, jnp.maximum(slots_S, 0)]))
                  for query_ids_BT, key_ids_BS in mask.segment_pairs)
    if num_new == 1:  # the new token and those before it in its window are exactly the keys that are kept
        return AttentionMask(segment_pairs=pairs), slots_S
    return dataclasses.replace(mask, window=window, query_start=window, segment_pairs=pairs), slots_S


def placed(x_BSKH: Float[Array, "B S K H"], slots_S: Int[Array, " S"],
           num_slots: int) -> Float[Array, "B T K H"]:
    """Puts the keys or values of a window at their slots among those of all tokens.

    Args:
      x_BSKH: Keys or values ``[B, S, K, H]``.
      slots_S: The slot of each key; negative for a key that does not exist.
      num_slots: The number of slots.

    Returns:
      ``[B, num_slots, K, H]``, which is 0 at all other slots.
    """
    B, _, K, H = x_BSKH.shape
    slots_S = jnp.where(slots_S < 0, num_slots, slots_S)
    return jnp.zeros((B, num_slots, K, H), x_BSKH.dtype).at[:, slots_S].set(x_BSKH, mode="drop")
