"""The block: its residual lines."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ModelConfig
from transformer_jax.nn.attention import Attention, AttentionContext
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.layers import Linear, Norm, dropout, for_single_tokens, recomputed
from transformer_jax.nn.sites import Intervene, Sites
from transformer_jax.ops.attention import Bias
from transformer_jax.ops.linear import gelu
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.ops.positions import PositionBias

_ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu, "gelu": gelu, "gelu_tanh": jax.nn.gelu,
                "swiglu": jax.nn.silu, "geglu": jax.nn.gelu}


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
      bias: the bias ``[B or 1, N, T, S]`` that an intervention put in place; ``None`` where none
        did.
      cross: the same of attention to the encoder's output, ``residual`` being the stream that
        entered it; it has no ``mlp_output``. ``None`` without an encoder.
      neurons: the feed-forward layer's, after the activation (and the gate) ``[B, T, F]``; ``None``
        where a feed-forward layer of one's own has none.
    """

    residual: jax.Array
    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    head_output: jax.Array
    attention_output: jax.Array
    mlp_output: jax.Array | None
    bias: jax.Array | None
    cross: LayerTrace | None = None
    neurons: jax.Array | None = None


class FeedForward(nnx.Module):
    """Two linear maps around a nonlinearity, or the gated three of SwiGLU and GEGLU (Shazeer,
    2020)."""

    def __init__(self, config: ModelConfig, *, key: jax.Array, output_scale: float):
        up_key, gate_key, down_key = jax.random.split(key, 3)
        D, F = config.model_dim, config.mlp_dim
        self.activation = config.activation
        self.up = Linear(D, F, ("embed", "mlp"), config, key=up_key)
        gated = config.activation in ("swiglu", "geglu")
        self.gate = Linear(D, F, ("embed", "mlp"), config, key=gate_key) if gated else None
        self.down = Linear(F, D, ("mlp", "embed"), config, key=down_key, scale=output_scale)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.merge(self.neurons(x_BTD))

    def neurons(self, x_BTD: jax.Array) -> jax.Array:
        """The neurons after the activation, and the gate where there is one, ``[B, T, F]``."""
        up_BTF = self.up(x_BTD)
        activate = recomputed(_ACTIVATIONS[self.activation])
        return activate(up_BTF) if self.gate is None else activate(self.gate(x_BTD)) * up_BTF

    def merge(self, neurons_BTF: jax.Array) -> jax.Array:
        """What the neurons add to the stream, ``[B, T, D]``."""
        return self.down(neurons_BTF)

    def for_single_tokens(self) -> Self:
        """The same layer in the form in which a token loop reads its weights fastest."""
        mlp = jax.tree.map(lambda leaf: leaf, self)
        mlp.up, mlp.down = for_single_tokens(self.up), for_single_tokens(self.down)
        mlp.gate = None if self.gate is None else for_single_tokens(self.gate)
        return mlp


class Block(nnx.Module):
    """Self-attention, attention to an encoder's output where there is one, and a feed-forward
    layer.

    Each is added to the residual stream.
    """

    def __init__(self, config: ModelConfig, *, key: jax.Array, num_layers: int, has_memory: bool = False):
        attention_key, mlp_key = jax.random.split(key)
        scale = 1 / math.sqrt(2 * num_layers) if config.norm_position == "pre" else 1.0
        self.config = config
        self.attention_norm = Norm(config.model_dim, config)
        self.attention = Attention(config, key=attention_key, output_scale=scale)
        self.cross_norm = Norm(config.model_dim, config) if has_memory else None
        self.cross_attention = (Attention(config, key=jax.random.fold_in(key, 2), output_scale=scale)
                                if has_memory else None)
        self.mlp_norm = Norm(config.model_dim, config)
        self.mlp = FeedForward(config, key=mlp_key, output_scale=scale)

    def __call__(self, x_BTD: jax.Array, context: AttentionContext, layer: jax.Array | int, *,
                 cache: KVCache | None = None, key: jax.Array | None = None,
                 intervene: Intervene | None = None) -> tuple[jax.Array, LayerTrace, KVCache | None]:
        """The residual stream after this layer, what was seen on the way, and the cache with this
        layer's keys."""
        keys = (None,) * 5 if key is None else jax.random.split(jax.random.fold_in(key, layer), 5)
        pre, rate, seen = self.config.norm_position == "pre", self.config.dropout, Sites(intervene, layer)

        x_BTD = seen("residual", x_BTD)
        trace, cache = self_attention(self.attention, x_BTD, self.attention_norm(x_BTD) if pre else x_BTD, context,
                                      seen, cache=cache, key=keys[0])
        x_BTD = x_BTD + dropout(trace.attention_output, rate, keys[1])
        x_BTD = x_BTD if pre else self.attention_norm(x_BTD)

        if self.cross_attention is not None:
            cross = memory_attention(self.cross_attention, x_BTD, self.cross_norm(x_BTD) if pre else x_BTD, context,
                                     seen, cache=cache, key=keys[2])
            x_BTD = x_BTD + dropout(cross.attention_output, rate, keys[3])
            x_BTD = x_BTD if pre else self.cross_norm(x_BTD)
            trace = dataclasses.replace(trace, cross=cross)

        mlp_BTD, neurons_BTF = feed_forward(self.mlp, self.mlp_norm(x_BTD) if pre else x_BTD, seen)
        x_BTD = x_BTD + dropout(mlp_BTD, rate, keys[4])
        x_BTD = x_BTD if pre else self.mlp_norm(x_BTD)
        return x_BTD, dataclasses.replace(trace, mlp_output=mlp_BTD, neurons=neurons_BTF), cache

    def for_single_tokens(self) -> Self:
        """The same block with the parts that have a form for decoding token by token in that
        form."""
        block = jax.tree.map(lambda leaf: leaf, self)
        block.attention, block.mlp = prepared(self.attention), prepared(self.mlp)
        if self.cross_attention is not None:
            block.cross_attention = self.cross_attention.for_single_tokens(of_memory=True)
        return block


def prepared(module: Any) -> Any:
    """The form of a module for decoding token by token: what its ``for_single_tokens()`` gives,
    else the module."""
    return module.for_single_tokens() if hasattr(module, "for_single_tokens") else module


def self_attention(attention: Attention, x_BTD: jax.Array, read_BTD: jax.Array, context: AttentionContext,
                   seen: Sites, *, cache: KVCache | None = None, key: jax.Array | None = None,
                   gate_BTNH: jax.Array | None = None) -> tuple[LayerTrace, KVCache | None]:
    """Attention of the tokens to themselves and to those in the cache; every site of attention is
    called.

    Args:
      attention: the weights.
      x_BTD: the residual stream, which is only noted in the trace.
      read_BTD: what attention reads, such as the stream after a norm.
      context: the mask and the positions.
      seen: the intervention, ``Sites(intervene, layer)``.
      cache: the earlier keys and values.
      key: switches the dropout of attention weights on.
      gate_BTNH: factors of the output of each head, for gated attention; what broadcasts to
        ``[B, T, N, H]``.

    Returns:
      The trace, whose ``attention_output`` is to be added to the stream and whose ``mlp_output``
      and ``neurons`` are still ``None``; and the cache with the new keys and values.
    """
    q_BTNH, k_BSKH, v_BSKH = attention.project(read_BTD, context)
    q_BTNH, k_BSKH, v_BSKH = seen("queries", q_BTNH), seen("keys", k_BSKH), seen("values", v_BSKH)
    if cache is not None:
        cache = cache.append_layer(seen.layer, k_BSKH, v_BSKH)
        k_BSKH, v_BSKH = cache.layer(seen.layer)
    return _mix(attention, x_BTD, q_BTNH, k_BSKH, v_BSKH, context.mask, context.bias, key, seen, gate_BTNH), cache


def memory_attention(attention: Attention, x_BTD: jax.Array, read_BTD: jax.Array, context: AttentionContext,
                     seen: Sites, *, cache: KVCache | None = None, key: jax.Array | None = None) -> LayerTrace:
    """Attention to an encoder's output, whose keys and values the cache holds where there is
    one."""
    q_BTNH = seen("cross_queries", attention.project_queries(read_BTD))
    k_BSKH, v_BSKH = (attention.project_memory(context.memory_BSD) if cache is None
                      else cache.memory_layer(seen.layer))
    k_BSKH, v_BSKH = seen("cross_keys", k_BSKH), seen("cross_values", v_BSKH)
    return _mix(attention, x_BTD, q_BTNH, k_BSKH, v_BSKH, context.memory_mask, None, key, seen, site="cross_")


def feed_forward(mlp: Any, read_BTD: jax.Array, seen: Sites) -> tuple[jax.Array, jax.Array | None]:
    """What a feed-forward layer adds to the stream ``[B, T, D]``, and its neurons ``[B, T, F]``.

    A layer of one's own that has no methods ``neurons`` and ``merge`` is called as it is, and has
    no neurons.
    """
    if not hasattr(mlp, "neurons"):
        return seen("mlp_output", mlp(read_BTD)), None
    neurons_BTF = seen("neurons", mlp.neurons(read_BTD))
    return seen("mlp_output", mlp.merge(neurons_BTF)), neurons_BTF


def _mix(attention: Attention, x_BTD: jax.Array, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array,
         mask: AttentionMask, bias: Bias, key: jax.Array | None, seen: Sites, gate_BTNH: jax.Array | None = None, *,
         site: str = "") -> LayerTrace:
    """Attention from queries, keys and values to what it adds to the stream, as a trace."""
    changed = None
    if seen.intervene is not None:
        whole = _materialize(bias, q_BTNH, k_BSKH)
        changed = seen(f"{site}attention_bias", whole)
        # Returned as it was, it is not used: the bias stays structure, and the program that without
        # an intervention.
        bias, changed = (bias, None) if changed is whole else (changed, changed)
    heads_BTNH = attention.attend(q_BTNH, k_BSKH, v_BSKH, mask, bias, key)
    heads_BTNH = seen(f"{site}head_output", heads_BTNH if gate_BTNH is None else heads_BTNH * gate_BTNH)
    return LayerTrace(residual=x_BTD, queries=q_BTNH, keys=k_BSKH, values=v_BSKH, head_output=heads_BTNH,
                      attention_output=seen(f"{site}attention_output", attention.merge(heads_BTNH)), mlp_output=None,
                      bias=changed)


def _materialize(bias: PositionBias | jax.Array | None, q_BTNH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
    T, N, S = q_BTNH.shape[1], q_BTNH.shape[2], k_BSKH.shape[1]
    if isinstance(bias, PositionBias):
        return bias.materialize(T, S)
    return jnp.zeros((1, N, T, S), jnp.float32) if bias is None else bias
