"""Multi-head attention: four projections around :func:`transformer_jax.ops.attend`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ModelConfig
from transformer_jax.nn.layers import Linear, Norm, for_single_tokens, joined, parameter
from transformer_jax.ops.attention import Bias, attend
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.ops.positions import LinearBias, RelativeBias, alibi_slopes, rotary, rotary_angles
from transformer_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """What all layers share.

    Attributes:
      mask: which keys each query may attend to.
      bias: the bias of positions.
      rotary_angles: the rotation of queries and keys.
      memory_BSD: the encoder's output, where a layer attends to one and no cache holds its keys.
      memory_mask: which places of the memory each query may attend to.
    """

    mask: AttentionMask
    bias: Bias = None
    rotary_angles: tuple[jax.Array, jax.Array] | None = None
    memory_BSD: jax.Array | None = None
    memory_mask: AttentionMask | None = None

    @classmethod
    def of(cls, config: ModelConfig, mask: AttentionMask, positions_BT: jax.Array, *,
           key_positions_BS: jax.Array | None = None, relative: RelativePositions | None = None,
           **memory: Any) -> Self:
        """With the bias or the rotation that the config's kind of positions asks for.

        ``key_positions_BS`` are given where the places of keys are not their positions,
        ``relative`` is the stack's.
        """
        bias = angles = None
        positions = None if key_positions_BS is None else (positions_BT, key_positions_BS)
        if config.positions == "alibi":
            bias = LinearBias(alibi_slopes(config.num_heads), mask.query_start, positions)
        elif config.positions == "relative":
            bias = RelativeBias(relative.table[...], config.relative_max_distance, relative.is_causal,
                                mask.query_start, positions)
        elif config.positions == "rope":
            angles = rotary_angles(positions_BT, config.head_dim, config.rope_base, config.rope_scaling)
        return cls(mask, bias, angles, **memory)


class RelativePositions(nnx.Module):
    """What the layers of a stack share of ``positions="relative"``: the table of the bias,
    ``[buckets, N]``."""

    def __init__(self, config: ModelConfig, *, key: jax.Array, is_causal: bool):
        self.is_causal = is_causal
        std = 1 / math.sqrt(config.model_dim) if config.init_std is None else config.init_std
        table_RN = std * jax.random.normal(key, (config.relative_buckets, config.num_heads))
        self.table = parameter(table_RN.astype(config.param_dtype), (None, None))


class Attention(nnx.Module):
    """Multi-head attention, grouped-query when the config has fewer key heads (Ainslie et al.,
    2023)."""

    def __init__(self, config: ModelConfig, *, key: jax.Array, output_scale: float):
        query_key, key_key, value_key, output_key = jax.random.split(key, 4)
        D, H = config.model_dim, config.head_dim
        self.config = config
        self.query = Linear(D, config.num_heads * H, ("embed", "heads"), config, key=query_key,
                            has_bias=config.use_qkv_bias)
        self.key = Linear(D, config.num_kv_heads * H, ("embed", "kv_heads"), config, key=key_key,
                          has_bias=config.use_qkv_bias)
        self.value = Linear(D, config.num_kv_heads * H, ("embed", "kv_heads"), config, key=value_key,
                            has_bias=config.use_qkv_bias)
        self.output = Linear(config.num_heads * H, D, ("heads", "embed"), config, key=output_key,
                             scale=output_scale)
        self.query_norm = Norm(H, config, "rmsnorm") if config.use_qk_norm else None
        self.key_norm = Norm(H, config, "rmsnorm") if config.use_qk_norm else None

    def project(self, x_BTD: jax.Array, context: AttentionContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries ``[B, T, N, H]``, keys and values ``[B, T, K, H]``, normed and rotated as
        configured."""
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        if self.key is None:  # joined, see for_single_tokens
            joined_BTNH = self.query(x_BTD).reshape(*x_BTD.shape[:-1], N + 2 * K, H)
            q_BTNH, k_BTKH, v_BTKH = jnp.split(joined_BTNH, (N, N + K), axis=-2)
        else:
            q_BTNH, k_BTKH, v_BTKH = (self._heads(linear, x_BTD) for linear in (self.query, self.key, self.value))
        if self.query_norm is not None:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        q_BTNH = self._scaled(q_BTNH)
        if context.rotary_angles is not None:
            q_BTNH, k_BTKH = rotary(q_BTNH, context.rotary_angles), rotary(k_BTKH, context.rotary_angles)
        return q_BTNH, k_BTKH, v_BTKH

    def project_queries(self, x_BTD: jax.Array) -> jax.Array:
        """Queries alone, ``[B, T, N, H]``, not rotated: for attention to a memory."""
        q_BTNH = self._heads(self.query, x_BTD)
        return self._scaled(q_BTNH if self.query_norm is None else self.query_norm(q_BTNH))

    def _scaled(self, q_BTNH: jax.Array) -> jax.Array:
        """Queries whose scores over sqrt(H), as all attention here takes them, are those of the
        config's scale."""
        scale = self.config.attention_scale
        return q_BTNH if scale is None else q_BTNH * (scale * math.sqrt(self.config.head_dim))

    def project_memory(self, memory_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values ``[B, S, K, H]`` of an encoder's output."""
        k_BSKH, v_BSKH = self._heads(self.key, memory_BSD), self._heads(self.value, memory_BSD)
        return (k_BSKH if self.key_norm is None else self.key_norm(k_BSKH)), v_BSKH

    def _heads(self, linear: Linear, x_BTD: jax.Array) -> jax.Array:
        return linear(x_BTD).reshape(*x_BTD.shape[:-1], -1, self.config.head_dim)

    def attend(self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask, bias: Bias,
               key: jax.Array | None) -> jax.Array:
        """The output of each head, ``[B, T, N, H]``."""
        config = self.config
        rate = config.dropout if config.attention_dropout is None else config.attention_dropout
        # Where a mesh divides the tokens of a row, its queries stay divided and see the keys of
        # all.
        q_BTNH = constrain(q_BTNH, "batch", "sequence", "heads", None)
        k_BSKH, v_BSKH = (constrain(x_BSKH, "batch", None, "kv_heads", None) for x_BSKH in (k_BSKH, v_BSKH))
        return attend(q_BTNH, k_BSKH, v_BSKH, mask, bias=bias, dropout=rate, key=key,
                      implementation=config.attention_implementation, precision=config.precision)

    def merge(self, heads_BTNH: jax.Array) -> jax.Array:
        """The heads' outputs joined and projected back, ``[B, T, D]``."""
        return self.output(jnp.reshape(heads_BTNH, (*heads_BTNH.shape[:2], -1)))

    def for_single_tokens(self, *, of_memory: bool = False) -> Self:
        """The same attention in the form in which a token loop reads its weights fastest.

        Queries, keys and values come from one joined product; not those ``of_memory``, whose keys
        and values are computed once, of many tokens together.
        """
        attention = jax.tree.map(lambda leaf: leaf, self)
        if of_memory:
            attention.query = for_single_tokens(self.query)
        else:
            attention.query = for_single_tokens(joined(self.query, self.key, self.value))
            attention.key = attention.value = None
        attention.output = for_single_tokens(self.output)
        return attention
