"""Checks, positions and masks that the calls of all model families share."""

from __future__ import annotations

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from transformer_jax.config import ModelConfig, ModelSettings
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.positions import position_encoding
from transformer_jax.ops.checks import check_ids
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.settings import check_type, shown


@dataclasses.dataclass(frozen=True)
class CausalInputs:
    """The inputs of a causal stack: positions, segment ids, mask, and the cache with the new tokens
    in it.

    Attributes:
      positions_BT: the position of each token.
      segment_ids_BT: the segment of each token, 0 for padding; ``None`` for one segment.
      mask: the keys that each token may attend to, but for the sliding windows of layers.
      cache: the cache, extended by the segment ids and positions of these tokens; ``None`` without
        a cache.
      are_in_order: True if the distance between two tokens of a text equals the distance between
        their places among the keys, see ``transformer_jax.nn.positions.Places``.
    """

    positions_BT: jax.Array
    segment_ids_BT: jax.Array | None
    mask: AttentionMask
    cache: KVCache | None
    are_in_order: bool = True

    @classmethod
    def of(cls, config: ModelConfig, tokens_BT: Int[Array, "B T"], segment_ids_BT: Shaped[Array, "B T"] | None,
           positions_BT: Int[Array, "#B T"] | None, cache: KVCache | None,
           visible_BTS: Bool[Array, "B T S"] | None) -> CausalInputs:
        """Checks the arguments of ``transformer_jax.Decoder.__call__`` and derives the inputs from
        them."""
        check_token_array(tokens_BT, config.max_len if cache is None else cache.capacity,
                          "config.max_len" if cache is None else "the cache")
        check_values(config, tokens_BT, positions_BT)
        mask = AttentionMask(is_causal=True, query_start=None if cache is None else cache.length)
        are_in_order = positions_BT is None
        if cache is None:
            if visible_BTS is not None:
                raise ValueError("visible_BTS was given without a cache; it selects slots of a cache, so pass "
                                 "cache=... too")
            if segment_ids_BT is not None:
                mask &= AttentionMask.segments(segment_ids_BT)
            positions_BT = positions_in_segments(tokens_BT, segment_ids_BT) if positions_BT is None else positions_BT
            return cls(positions_BT, segment_ids_BT, mask, None, are_in_order=are_in_order)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            num_cached_B1 = (cache.segment_ids_BS != 0).sum(1, keepdims=True)
            positions_BT = jnp.maximum(num_cached_B1 + jnp.cumsum(segment_ids_BT != 0, axis=1) - 1, 0)
            check_values(config, None, positions_BT)
        cache = cache.append_segments(segment_ids_BT, positions_BT)
        if visible_BTS is not None:
            mask = AttentionMask.explicit(visible_BTS)
            if cache.positions_BS is not None:  # windows then count positions, not slots
                mask = dataclasses.replace(mask, positions=(positions_BT, cache.positions_BS))
            return cls(positions_BT, segment_ids_BT, mask, cache, are_in_order=False)
        mask &= AttentionMask.segments(segment_ids_BT, cache.segment_ids_BS)
        return cls(positions_BT, segment_ids_BT, mask, cache, are_in_order)


def check_config(config: ModelSettings, family: str, key: jax.Array) -> None:
    """Raises ValueError if the config is for another family or has no ``vocab_size``, or if the key
    is not a PRNG key."""
    check_type("config", config, ModelSettings, "a tj.ModelConfig, such as tj.presets.get(name)")
    if config.family != family:
        raise ValueError(f"the config has family={config.family!r}, but this model needs family={family!r}; pass "
                         "another config, or let tj.make_model(config, key=key) choose the class")
    if not hasattr(key, "dtype"):
        raise ValueError(f"key={shown(key)} is not a PRNG key; pass jax.random.key(seed)")
    if config.vocab_size is None:
        raise ValueError("config.vocab_size is not set; use config.replace(vocab_size=tokenizer.vocab_size)")


def check_token_array(tokens_BT: Int[Array, "B T"], room: int, owner: str) -> None:
    """Raises ValueError if tokens are not an array of integers ``[B, T]``, if there are none, or if there are
    more than ``room``."""
    if not hasattr(tokens_BT, "ndim"):
        raise ValueError(f"tokens are of type {type(tokens_BT).__name__}; expected an integer array [B, T], such as "
                         "jnp.asarray([[3, 5]]). tj.forward and tj.trace accept texts and lists too")
    if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B, T], but they are {tokens_BT.dtype} {tuple(tokens_BT.shape)}")
    if not tokens_BT.size:
        raise ValueError(f"there are no tokens: an array {tuple(tokens_BT.shape)} has no rows, or rows without a "
                         "token; pass one row or more, of one token or more")
    if tokens_BT.shape[1] > room:
        raise ValueError(f"{tokens_BT.shape[1]} tokens are longer than the {room} that {owner} has room for")


def check_values(config: ModelConfig, tokens_BT: jax.Array | None, positions_BT: jax.Array | None = None,
                 token_types_BT: jax.Array | None = None) -> None:
    """Raises ValueError if token ids, positions or token types are beyond their tables, or if
    positions are not integers ``[B or 1, T]``.

    Values that are traced, as under ``jit``, are not known and therefore not checked.
    """
    if positions_BT is not None and (positions_BT.ndim != 2 or not jnp.issubdtype(positions_BT.dtype, jnp.integer)):
        raise ValueError(f"positions must be integers [B or 1, T], but they are {positions_BT.dtype} "
                         f"{tuple(positions_BT.shape)}")
    check_ids("token id", tokens_BT, config.vocab_size or 0, "the vocabulary")
    num_positions = None if positions_BT is None else position_encoding(config).num_positions(config)
    if num_positions is not None:
        check_ids("position", positions_BT, num_positions, f"the table of positions={config.positions!r}")
    if token_types_BT is not None:
        if not config.num_token_types:
            raise ValueError("token_types_BT was given, but config.num_token_types is 0, so the model has no token "
                             "types; leave it out")
        check_ids("token type", token_types_BT, config.num_token_types, "the table")


def tokens_of(tokens_BT: jax.Array | None, embeddings_BTD: jax.Array | None, config: ModelConfig,
              name: str = "embeddings_BTD") -> jax.Array:
    """Returns the token ids, or zeros of the same shape if embeddings take their place.

    Raises:
      ValueError: if both or neither are given, or if the embeddings are not floats ``[B, T, D]``.
    """
    if (tokens_BT is None) == (embeddings_BTD is None):
        given = "both were given" if embeddings_BTD is not None else "neither was given"
        raise ValueError(f"pass either token ids or {name}=...; {given}")
    if embeddings_BTD is None:
        return cast(jax.Array, tokens_BT)
    shape, dtype = np.shape(embeddings_BTD), jnp.result_type(embeddings_BTD)
    if len(shape) != 3 or shape[2] != config.embedding_dim or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be floats [B, T, {config.embedding_dim}] (config.embedding_dim), but they are "
                         f"{dtype} {shape}")
    return jnp.zeros(shape[:2], jnp.int32)


def positions_in_segments(tokens_BT: Int[Array, "B T"], segment_ids_BT: Shaped[Array, "B T"] | None) -> jax.Array:
    """Returns positions that restart where the segment id changes, int32 ``[B, T]``.

    Without segment ids, each row is one segment.
    """
    indices_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    if segment_ids_BT is None:
        return indices_BT
    changes_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    starts_BT = jnp.pad(changes_BT, ((0, 0), (1, 0)), constant_values=True)
    return indices_BT - jax.lax.cummax(jnp.where(starts_BT, indices_BT, 0), axis=1)
