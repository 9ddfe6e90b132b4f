"""The transformer block: attention and feed-forward layers around the residual stream."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from transformer_jax.config import ModelConfig
from transformer_jax.nn.attention import Attention, AttentionContext
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.experts import make_feed_forward, with_feed_forward
from transformer_jax.nn.latent_attention import LatentAttention, read_latents
from transformer_jax.nn.layers import Norm, dropout
from transformer_jax.nn.sites import Intervene, Sites
from transformer_jax.nn.windows import placed
from transformer_jax.ops.attention import Bias
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.ops.positions import PositionBias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerTrace:
    """The intermediate values of a layer, each of a size linear in the length of the text.

    Under ``jax.jit`` a value that nothing reads is not computed for the trace.

    Attributes:
      residual: The residual stream that enters the layer ``[B, T, D]``.
      queries: The queries after normalization and rotation ``[B, T, N, H]``.
      keys: The keys after normalization and rotation ``[B, S, K, H]``.
      values: The values ``[B, S, K, H]``.
      head_output: The weighted sum of values of each head, before the output projection
        ``[B, T, N, H]``.
      attention_output: What attention adds to the residual stream ``[B, T, D]``.
      mlp_output: What the feed-forward layer adds to the residual stream ``[B, T, D]``.
      bias: The bias ``[B or 1, N, T, S]`` that an intervention returned; ``None`` if no
        intervention changed the bias.
      cross: The trace of cross-attention, whose ``residual`` is the stream that enters
        cross-attention and whose ``mlp_output`` is ``None``. Without an encoder it is ``None``.
      residual_middle: The residual stream between attention and the feed-forward layer
        ``[B, T, D]``; ``None`` where the two are computed side by side. A custom block may leave it
        ``None``.
      mlp_input: What the feed-forward layer reads: the normalized stream, or in post-norm models the
        stream ``[B, T, D]``. A custom block may leave it ``None``.
      neurons: The feed-forward layer's neurons after the activation (and the gate) ``[B, T, F]``;
        ``None`` if a custom feed-forward layer has no method ``neurons``, and with experts.
      router_logits: The logits of a mixture of experts, float32 ``[B, T, E]``; ``None`` without
        experts, like the next two.
      router_probabilities: The probability of each expert, float32 ``[B, T, E]``.
      experts: The chosen experts of each token, int32 ``[B, T, k]``.
      sinks: The sink of each head ``[N]``; ``None`` without sinks.
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
    mlp_input: jax.Array | None = None
    router_logits: jax.Array | None = None
    router_probabilities: jax.Array | None = None
    experts: jax.Array | None = None
    sinks: jax.Array | None = None
    residual_middle: jax.Array | None = None


class Block(nnx.Module):
    """A transformer block: self-attention, optional cross-attention, and a feed-forward layer.

    The output of each is added to the residual stream. ``config.residual`` decides whether the
    feed-forward layer reads the stream after or before attention.
    """

    def __init__(self, config: ModelConfig, *, key: jax.Array, num_layers: int, has_memory: bool = False):
        attention_key, mlp_key = jax.random.split(key)
        base_layers = num_layers if config.mup is None else config.mup.base_layers or num_layers
        scale = 1 / math.sqrt(2 * base_layers) if config.norm_position == "pre" else 1.0
        if config.mup is not None:
            scale *= config.mup.output_scale(config)
        reads_norm, writes_norm = config.norm_position != "output", config.norm_position in ("both", "output")
        self.config = config
        self.attention_norm = Norm(config.model_dim, config) if reads_norm else None
        self.attention_output_norm = Norm(config.model_dim, config) if writes_norm else None
        self.attention = (Attention(config, key=attention_key, output_scale=scale) if config.latent is None else
                          LatentAttention(config, config.latent, key=attention_key, output_scale=scale))
        self.cross_norm = Norm(config.model_dim, config) if has_memory else None
        self.cross_attention = (Attention(config, key=jax.random.fold_in(key, 2), output_scale=scale)
                                if has_memory else None)
        has_mlp_norm = reads_norm and config.residual != "parallel_shared"
        self.mlp_norm = Norm(config.model_dim, config) if has_mlp_norm else None
        self.mlp_output_norm = Norm(config.model_dim, config) if writes_norm else None
        self.mlp = make_feed_forward(config, key=mlp_key, output_scale=scale)

    def __call__(self, x_BTD: Float[Array, "B T D"], context: AttentionContext, layer: jax.Array | int, *,
                 cache: KVCache | None = None, key: jax.Array | None = None,
                 intervene: Intervene | None = None) -> tuple[jax.Array, LayerTrace, KVCache | None]:
        """Applies the block.

        Args:
          x_BTD: The residual stream that enters the layer ``[B, T, D]``.
          context: The mask and the positions; for cross-attention, the encoder's output too.
          layer: The index of the layer, which may be traced.
          cache: The keys and values of earlier tokens.
          key: The PRNG key of dropout. ``None`` switches dropout off.
          intervene: Reads and changes intermediate values, see ``transformer_jax.nn.sites``.

        Returns:
          The residual stream after the layer, the trace, and the cache with this layer's new keys
          and values.
        """
        keys = (None,) * 5 if key is None else jax.random.split(jax.random.fold_in(key, layer), 5)
        pre, post = self.config.norm_position in ("pre", "both"), self.config.norm_position == "post"
        rate, sites = self.config.dropout, Sites(intervene, layer)

        x_BTD = sites("residual", x_BTD)
        read_BTD = self.read_by_attention(x_BTD, layer)
        trace, cache = self_attention(self.attention, x_BTD, read_BTD, context, sites, cache=cache, key=keys[0],
                                      output_norm=self.attention_output_norm)
        if self.config.residual != "sequential":
            read_BTD = read_BTD if self.mlp_norm is None else self.mlp_norm(x_BTD)
            trace = with_feed_forward(trace, self.mlp, read_BTD, sites)
            x_BTD = x_BTD + dropout(trace.attention_output, rate, keys[1])
            return x_BTD + dropout(cast(jax.Array, trace.mlp_output), rate, keys[4]), trace, cache

        x_BTD = x_BTD + dropout(trace.attention_output, rate, keys[1])
        x_BTD = cast(Norm, self.attention_norm)(x_BTD) if post else x_BTD

        if self.cross_attention is not None:
            cross_norm = cast(Norm, self.cross_norm)
            cross = memory_attention(self.cross_attention, x_BTD, cross_norm(x_BTD) if pre else x_BTD, context, sites,
                                     cache=cache, key=keys[2])
            x_BTD = x_BTD + dropout(cross.attention_output, rate, keys[3])
            x_BTD = cross_norm(x_BTD) if post else x_BTD
            trace = dataclasses.replace(trace, cross=cross)

        x_BTD = sites("residual_middle", x_BTD)
        trace = dataclasses.replace(trace, residual_middle=x_BTD)
        read_BTD = cast(Norm, self.mlp_norm)(x_BTD) if pre else x_BTD
        trace = with_feed_forward(trace, self.mlp, read_BTD, sites, self.mlp_output_norm)
        x_BTD = x_BTD + dropout(cast(jax.Array, trace.mlp_output), rate, keys[4])
        return cast(Norm, self.mlp_norm)(x_BTD) if post else x_BTD, trace, cache

    def read_by_attention(self, x_BTD: Float[Array, "*tokens D"],
                          layer: jax.Array | int) -> Float[Array, "*tokens D"]:
        """Computes what attention reads: the normalized stream, or in post-norm models the stream.

        Args:
          x_BTD: The residual stream that enters the layer.
          layer: The index of the layer, which may be traced.

        Returns:
          The input of attention.
        """
        if self.attention_norm is None or self.config.norm_position == "post":
            return x_BTD
        read_BTD = self.attention_norm(x_BTD)
        return read_BTD if self.config.use_first_norm else jnp.where(layer == 0, x_BTD, read_BTD)

    def for_single_tokens(self) -> Self:
        """Rearranges the weights so that decoding token by token reads them fastest.

        Returns:
          A copy of the block that computes the same function.
        """
        block = jax.tree.map(lambda leaf: leaf, self)
        block.attention, block.mlp = prepared(self.attention), prepared(self.mlp)
        return block


def prepared(module: Any) -> Any:
    """Returns the form of a module for decoding token by token.

    Args:
      module: A part of a model.

    Returns:
      The result of ``module.for_single_tokens()``, or the module itself if it has no such method.
    """
    return module.for_single_tokens() if hasattr(module, "for_single_tokens") else module


def self_attention(attention: Attention, x_BTD: Float[Array, "B T D"], read_BTD: Float[Array, "B T D"],
                   context: AttentionContext,
                   sites: Sites, *, cache: KVCache | None = None, key: jax.Array | None = None,
                   gate_BTNH: Float[Array, "B T N H"] | None = None,
                   output_norm: Norm | None = None) -> tuple[LayerTrace, KVCache | None]:
    """Computes self-attention, and calls the intervention at every site of attention.

    Args:
      attention: The module that holds the weights.
      x_BTD: The residual stream ``[B, T, D]``, which is only stored in the trace.
      read_BTD: The input of attention ``[B, T, D]``, such as the normalized stream.
      context: The mask and the positions.
      sites: The sites of this layer, ``Sites(intervene, layer)``.
      cache: The keys and values of earlier tokens.
      key: The PRNG key of the dropout of attention weights. ``None`` switches dropout off.
      gate_BTNH: Factors for the output of each head, for gated attention. They must broadcast to
        ``[B, T, N, H]``.
      output_norm: A norm of what attention adds to the stream, or ``None``.

    Returns:
      The trace and the cache with the new keys and values. The caller must add the trace's
      ``attention_output`` to the stream. The trace's ``mlp_output`` and ``neurons`` are ``None``.
    """
    if isinstance(attention, LatentAttention):
        q_BTNH, k_BSKH, v_BSKH, cache, attend = read_latents(attention, read_BTD, context, sites, cache)
    else:
        q_BTNH, k_BSKH, v_BSKH = attention.project(read_BTD, context)
        q_BTNH, k_BSKH, v_BSKH = sites("queries", q_BTNH), sites("keys", k_BSKH), sites("values", v_BSKH)
        attend = attention.attend
        if cache is not None:
            layer = cast(int, sites.layer)  # with a cache, a Python loop runs over the layers
            cache, k_BSKH, v_BSKH = cache.extend(layer, k_BSKH, v_BSKH)
    slots = None if cache is None or context.slots_S is None else (context.slots_S, cache.capacity)
    trace = _attention_trace(attention, x_BTD, q_BTNH, k_BSKH, v_BSKH, context.mask, context.bias, key, sites,
                             gate_BTNH, output_norm, slots, attend=attend)
    return trace, cache


def memory_attention(attention: Attention, x_BTD: Float[Array, "B T D"], read_BTD: Float[Array, "B T D"],
                     context: AttentionContext,
                     sites: Sites, *, cache: KVCache | None = None, key: jax.Array | None = None) -> LayerTrace:
    """Computes cross-attention to the encoder's output.

    The arguments are those of ``self_attention``. The keys and values come from the cache if there
    is one, otherwise from ``context.memory_BSD``.

    Returns:
      The trace of cross-attention.
    """
    q_BTNH = sites("cross_queries", attention.project_queries(read_BTD))
    k_BSKH, v_BSKH = (attention.project_memory(cast(jax.Array, context.memory_BSD)) if cache is None
                      else cache.memory_layer(cast(int, sites.layer)))
    k_BSKH, v_BSKH = sites("cross_keys", k_BSKH), sites("cross_values", v_BSKH)
    return _attention_trace(attention, x_BTD, q_BTNH, k_BSKH, v_BSKH, cast(AttentionMask, context.memory_mask), None,
                            key, sites, site_prefix="cross_")


def _attention_trace(attention: Attention, x_BTD: jax.Array, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array,
                     mask: AttentionMask, bias: Bias, key: jax.Array | None, sites: Sites,
                     gate_BTNH: jax.Array | None = None, output_norm: Norm | None = None,
                     slots: tuple[jax.Array, int] | None = None, *, site_prefix: str = "",
                     attend: Callable | None = None) -> LayerTrace:
    """Computes attention from queries, keys and values, and returns every step as a trace.

    If the keys are only those of a window, ``slots`` is the slot of each and the number of slots.
    Interventions and the trace then see all slots, as in a layer without a window. ``attend``
    computes the same as the method of the module, perhaps in another way.
    """
    changed_bias = None
    if sites.intervene is not None:
        materialized = _materialize(bias, q_BTNH, k_BSKH.shape[1] if slots is None else slots[1])
        changed_bias = sites(f"{site_prefix}attention_bias", materialized)
        # If the intervention returns the bias unchanged, the structure is used instead of the
        # array, so that the program is the same as without an intervention.
        bias, changed_bias = (bias, None) if changed_bias is materialized else (changed_bias, changed_bias)
        if slots is not None and changed_bias is not None:
            bias = jnp.take(changed_bias, jnp.maximum(slots[0], 0), axis=3)
    heads_BTNH = (attend or attention.attend)(q_BTNH, k_BSKH, v_BSKH, mask, bias, key)
    heads_BTNH = sites(f"{site_prefix}head_output", heads_BTNH if gate_BTNH is None else heads_BTNH * gate_BTNH)
    output_BTD = attention.merge(heads_BTNH)
    output_BTD = sites(f"{site_prefix}attention_output", output_BTD if output_norm is None else output_norm(output_BTD))
    if slots is not None:
        k_BSKH, v_BSKH = placed(k_BSKH, *slots), placed(v_BSKH, *slots)
    return LayerTrace(residual=x_BTD, queries=q_BTNH, keys=k_BSKH, values=v_BSKH, head_output=heads_BTNH,
                      attention_output=output_BTD, mlp_output=None, bias=changed_bias,
                      sinks=None if (sinks := getattr(attention, "sinks", None)) is None else sinks[...])


def _materialize(bias: PositionBias | jax.Array | None, q_BTNH: jax.Array, S: int) -> jax.Array:
    """Converts any bias to an array for S keys that an intervention can change."""
    T, N = q_BTNH.shape[1:3]
    if isinstance(bias, PositionBias):
        return bias.materialize(T, S)
    return jnp.zeros((1, N, T, S), jnp.float32) if bias is None else bias
