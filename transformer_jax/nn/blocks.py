"""The block: two residual lines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ModelConfig
from transformer_jax.nn.attention import Attention, AttentionContext
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.layers import Linear, Norm, dropout
from transformer_jax.ops.linear import gelu
from transformer_jax.ops.positions import LinearBias

Intervene = Callable[[str, jax.Array | int, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerTrace:
    """What a layer computed on the way, all of linear size; unread under jit, it costs nothing.

    Attributes:
      residual: the stream that entered the layer ``[B, T, D]``.
      queries: after norm and rotation ``[B, T, N, H]``.
      keys: ``[B, S, K, H]``.
      values: ``[B, S, K, H]``.
      head_output: each head's mix of values, before the output projection ``[B, T, N, H]``.
      attention_output: what attention added to the stream ``[B, T, D]``.
      mlp_output: what the feed-forward layer added ``[B, T, D]``.
      bias: the bias ``[B or 1, N, T, S]`` that an intervention saw; ``None`` without one.
    """

    residual: jax.Array
    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    head_output: jax.Array
    attention_output: jax.Array
    mlp_output: jax.Array
    bias: jax.Array | None


class FeedForward(nnx.Module):
    """Two linear maps around a nonlinearity, or the gated three of SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig, *, key: jax.Array, output_std: float):
        up_key, gate_key, down_key = jax.random.split(key, 3)
        D, F = config.model_dim, config.mlp_dim
        self.activation = config.activation
        self.up = Linear(D, F, ("embed", "mlp"), config, key=up_key)
        self.gate = Linear(D, F, ("embed", "mlp"), config, key=gate_key) if config.activation == "swiglu" else None
        self.down = Linear(F, D, ("mlp", "embed"), config, key=down_key, std=output_std)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        up_BTF = self.up(x_BTD)
        if self.gate is not None:
            return self.down(jax.nn.silu(self.gate(x_BTD)) * up_BTF)
        if self.activation == "relu":
            return self.down(jax.nn.relu(up_BTF))
        return self.down(gelu(up_BTF) if self.activation == "gelu" else jax.nn.gelu(up_BTF))


class Block(nnx.Module):
    """Self-attention and a feed-forward layer, each added to the residual stream."""

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        output_std = config.init_std / math.sqrt(2 * config.num_layers)
        self.config = config
        self.attention_norm = Norm(config.model_dim, config)
        self.attention = Attention(config, key=attention_key, output_std=output_std)
        self.mlp_norm = Norm(config.model_dim, config)
        self.mlp = FeedForward(config, key=mlp_key, output_std=output_std)

    def __call__(self, x_BTD: jax.Array, context: AttentionContext, layer: jax.Array | int, *,
                 cache: KVCache | None = None, key: jax.Array | None = None,
                 intervene: Intervene | None = None) -> tuple[jax.Array, LayerTrace, KVCache | None]:
        """The residual stream after this layer, what was seen on the way, and the cache with this layer's keys."""
        weight_key, attention_key, mlp_key = (None,) * 3 if key is None else jax.random.split(
            jax.random.fold_in(key, layer), 3)

        def seen(site: str, value: jax.Array) -> jax.Array:
            return value if intervene is None else intervene(site, layer, value)

        pre = self.config.norm_position == "pre"
        residual_BTD = x_BTD = seen("residual", x_BTD)

        q_BTNH, k_BSKH, v_BSKH = self.attention.project(self.attention_norm(x_BTD) if pre else x_BTD, context)
        if cache is not None:
            cache = cache.append_layer(layer, k_BSKH, v_BSKH)
            k_BSKH, v_BSKH = cache.layer(layer)
        bias = context.bias
        if intervene is not None:
            bias = seen("attention_bias", _materialize(bias, q_BTNH, k_BSKH))
        heads_BTNH = seen("head_output", self.attention.attend(q_BTNH, k_BSKH, v_BSKH, context, bias, weight_key))
        attention_BTD = seen("attention_output", self.attention.merge(heads_BTNH))
        x_BTD = x_BTD + dropout(attention_BTD, self.config.dropout, attention_key)
        x_BTD = x_BTD if pre else self.attention_norm(x_BTD)

        mlp_BTD = seen("mlp_output", self.mlp(self.mlp_norm(x_BTD) if pre else x_BTD))
        x_BTD = x_BTD + dropout(mlp_BTD, self.config.dropout, mlp_key)
        x_BTD = x_BTD if pre else self.mlp_norm(x_BTD)

        trace = LayerTrace(residual=residual_BTD, queries=q_BTNH, keys=k_BSKH, values=v_BSKH, head_output=heads_BTNH,
                           attention_output=attention_BTD, mlp_output=mlp_BTD,
                           bias=None if intervene is None else bias)
        return x_BTD, trace, cache


def _materialize(bias: LinearBias | jax.Array | None, q_BTNH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
    T, N, S = q_BTNH.shape[1], q_BTNH.shape[2], k_BSKH.shape[1]
    if isinstance(bias, LinearBias):
        return bias.materialize(T, S)
    return jnp.zeros((1, N, T, S), jnp.float32) if bias is None else bias
