"""What the families' calls have in common: checks, positions, masks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from transformer_jax.config import ModelConfig
from transformer_jax.nn.cache import KVCache
from transformer_jax.ops.masks import AttentionMask


@dataclasses.dataclass(frozen=True)
class CausalInputs:
    """Where each token of a causal stack stands, what it may attend to, and the cache that knows of
    it."""

    positions_BT: jax.Array
    segment_ids_BT: jax.Array | None
    mask: AttentionMask
    cache: KVCache | None
    key_positions_BS: jax.Array | None = None  # where the places of keys are not their positions

    @classmethod
    def of(cls, config: ModelConfig, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None,
           positions_BT: jax.Array | None, cache: KVCache | None,
           visible_BTS: jax.Array | None) -> CausalInputs:
        """The arguments are those of :meth:`transformer_jax.Decoder.__call__`."""
        check_token_array(tokens_BT, config.max_len if cache is None else cache.capacity,
                          "config.max_len" if cache is None else "the cache")
        mask = AttentionMask(is_causal=True, window=config.sliding_window,
                             query_start=None if cache is None else cache.length)
        if cache is None:
            if visible_BTS is not None:
                raise ValueError("visible_BTS says which slots of a cache are seen; there is no cache")
            if segment_ids_BT is not None:
                mask &= AttentionMask.segments(segment_ids_BT)
            positions_BT = positions_in_segments(tokens_BT, segment_ids_BT) if positions_BT is None else positions_BT
            return cls(positions_BT, segment_ids_BT, mask, None)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            seen_B1 = (cache.segment_ids_BS != 0).sum(1, keepdims=True)
            positions_BT = jnp.maximum(seen_B1 + jnp.cumsum(segment_ids_BT != 0, axis=1) - 1, 0)
        cache = cache.append_segments(segment_ids_BT, positions_BT)
        if visible_BTS is not None:
            return cls(positions_BT, segment_ids_BT, AttentionMask.explicit(visible_BTS), cache, cache.positions_BS)
        mask &= AttentionMask.segments(segment_ids_BT, cache.segment_ids_BS)
        return cls(positions_BT, segment_ids_BT, mask, cache)


def check_config(config: ModelConfig, family: str) -> None:
    """Raises ValueError for the config of another family, or without the size of its vocabulary."""
    if config.family != family:
        raise ValueError(f"the config has family={config.family!r}; this model is of family {family!r}")
    if config.vocab_size is None:
        raise ValueError("config.vocab_size is not set: config.replace(vocab_size=tokenizer.vocab_size)")


def check_token_array(tokens_BT: jax.Array, room: int, whose: str) -> None:
    """Raises ValueError for tokens that are no integers ``[B, T]``, or longer than there is room
    for."""
    if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise ValueError(f"tokens are integers [B, T], not {tokens_BT.dtype} {tuple(tokens_BT.shape)}")
    if tokens_BT.shape[1] > room:
        raise ValueError(f"{tokens_BT.shape[1]} tokens are longer than the {room} that {whose} has room for")


def positions_in_segments(tokens_BT: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """Positions that restart where the segment id changes, int32 ``[B, T]``; without ids there is
    one segment."""
    places_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    if segment_ids_BT is None:
        return places_BT
    changes_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    starts_BT = jnp.concatenate([jnp.ones_like(changes_BT[:, :1]), changes_BT], axis=1)
    return places_BT - jax.lax.cummax(jnp.where(starts_BT, places_BT, 0), axis=1)
