"""Multi-head attention: four projections around :func:`transformer_jax.ops.attend`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ModelConfig
from transformer_jax.nn.layers import Linear, Norm
from transformer_jax.ops.attention import Bias, attend
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.ops.positions import rotary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """What all layers share: the mask, the bias of positions, the rotation of queries and keys."""

    mask: AttentionMask
    bias: Bias = None
    rotary_angles: tuple[jax.Array, jax.Array] | None = None


class Attention(nnx.Module):
    """Multi-head self-attention, grouped-query when the config has fewer key heads (Ainslie et al., 2023)."""

    def __init__(self, config: ModelConfig, *, key: jax.Array, output_std: float):
        query_key, key_key, value_key, output_key = jax.random.split(key, 4)
        D, H = config.model_dim, config.head_dim
        self.config = config
        self.query = Linear(D, config.num_heads * H, ("embed", "heads"), config, key=query_key)
        self.key = Linear(D, config.num_kv_heads * H, ("embed", "kv_heads"), config, key=key_key)
        self.value = Linear(D, config.num_kv_heads * H, ("embed", "kv_heads"), config, key=value_key)
        self.output = Linear(config.num_heads * H, D, ("heads", "embed"), config, key=output_key, std=output_std)
        self.query_norm = Norm(H, config, "rmsnorm") if config.use_qk_norm else None
        self.key_norm = Norm(H, config, "rmsnorm") if config.use_qk_norm else None

    def project(self, x_BTD: jax.Array, context: AttentionContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries ``[B, T, N, H]``, keys and values ``[B, T, K, H]``, normed and rotated as configured."""
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        if self.key is None:  # joined, see unstack
            joined_BTNH = self.query(x_BTD).reshape(*x_BTD.shape[:-1], N + 2 * K, H)
            q_BTNH, k_BTKH, v_BTKH = jnp.split(joined_BTNH, (N, N + K), axis=-2)
        else:
            q_BTNH, k_BTKH, v_BTKH = (linear(x_BTD).reshape(*x_BTD.shape[:-1], -1, H)
                                      for linear in (self.query, self.key, self.value))
        if self.query_norm is not None:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        if context.rotary_angles is not None:
            q_BTNH, k_BTKH = rotary(q_BTNH, context.rotary_angles), rotary(k_BTKH, context.rotary_angles)
        return q_BTNH, k_BTKH, v_BTKH

    def attend(self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, context: AttentionContext,
               bias: Bias, key: jax.Array | None) -> jax.Array:
        """The output of each head, ``[B, T, N, H]``."""
        return attend(q_BTNH, k_BSKH, v_BSKH, context.mask, bias=bias, dropout=self.config.dropout, key=key)

    def merge(self, heads_BTNH: jax.Array) -> jax.Array:
        """The heads' outputs joined and projected back, ``[B, T, D]``."""
        return self.output(jnp.reshape(heads_BTNH, (*heads_BTNH.shape[:2], -1)))
