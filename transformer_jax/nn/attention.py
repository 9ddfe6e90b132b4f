"""Multi-head attention: ``transformer_jax.ops.attend`` with the four linear projections."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from transformer_jax.config import ModelConfig
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.layers import Linear, Norm, joined, parameter
from transformer_jax.nn.positions import Places, position_encoding
from transformer_jax.nn.windows import layer_mask
from transformer_jax.ops.attention import Bias, attend
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """The inputs of attention that all layers of a stack share.

    Attributes:
      mask: Which keys each query may attend to.
      bias: What the position encoding adds to the scores.
      rotation: What the position encoding needs to rotate queries and keys.
      memory_BSD: The encoder's output ``[B, S, D]``, for cross-attention without a cache. With a
        cache it is ``None``, because the cache holds its keys and values.
      memory_mask: Which tokens of the encoder each query may attend to.
      slots_S: In a layer whose cache keeps only its sliding window: the slot of each key.
      places: The context of each place in ``config.layer_pattern``, if layers need contexts of
        their own.
    """

    mask: AttentionMask
    bias: Bias = None
    rotation: Any = None
    memory_BSD: jax.Array | None = None
    memory_mask: AttentionMask | None = None
    slots_S: jax.Array | None = None
    places: tuple[AttentionContext, ...] = ()

    def of_layer(self, layer: int) -> AttentionContext:
        """Returns the context of a layer.

        Args:
          layer: The index of the layer.

        Returns:
          The context for the layer's place in the pattern.
        """
        return self.places[layer % len(self.places)] if self.places else self

    @classmethod
    def of(cls, config: ModelConfig, mask: AttentionMask, positions_BT: Int[Array, "#B T"], *, weights: Any = None,
           cache: KVCache | None = None, are_in_order: bool = True, **memory: Any) -> Self:
        """Makes the context with the bias or the rotation of the position encoding.

        Args:
          config: The model's config, whose field ``positions`` names the encoding.
          mask: Which keys each query may attend to, but for sliding windows.
          positions_BT: The positions of the queries.
          weights: The weights of a learned encoding, which the stack holds.
          cache: The cache, with the positions of the queries in it. ``None`` means that the queries
            and the keys are the same tokens.
          are_in_order: See ``transformer_jax.nn.positions.Places``.
          **memory: The fields ``memory_BSD`` and ``memory_mask``, for cross-attention.

        Returns:
          The context.
        """
        key_positions_BS = None if cache is None else cache.positions_BS
        places = Places(positions_BT, positions_BT if key_positions_BS is None else key_positions_BS, mask.query_start,
                        are_in_order)
        bias = position_encoding(config).bias(config, weights, places)
        kinds = config.of_places()
        contexts = []
        for layer, kind in enumerate(kinds):
            own_mask, slots_S = layer_mask(mask, kind.sliding_window, cache, layer, positions_BT.shape[1])
            rotation = position_encoding(kind).rotation(kind, weights, positions_BT)
            contexts.append(cls(own_mask, bias, rotation, **memory, slots_S=slots_S))
        if len(contexts) == 1 and contexts[0].slots_S is None:
            return contexts[0]
        # The trace shows the keys of all tokens, so its mask has the window of the config.
        shared = dataclasses.replace(mask, window=config.sliding_window)
        return cls(shared, bias, None, **memory, places=tuple(contexts))

    def map(self, function: Callable[[AttentionContext], AttentionContext]) -> AttentionContext:
        """Applies a function to this context and to those of all places.

        Args:
          function: Returns a changed context.

        Returns:
          The changed context.
        """
        return dataclasses.replace(function(self), places=tuple(function(place) for place in self.places))


class Attention(nnx.Module):
    """Multi-head attention.

    If the config has fewer key heads than query heads, groups of query heads share a key head
    (Ainslie et al., 2023).
    """

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
        sinks_N = jnp.zeros(config.num_heads, config.param_dtype)
        self.sinks = parameter(sinks_N, ("heads",)) if config.use_sinks else None
        of_all = config.qk_norm_width == "all"
        kind = config.norm if config.norm.startswith("rmsnorm") else "rmsnorm"
        self.query_norm = Norm(config.num_heads * H if of_all else H, config, kind) if config.use_qk_norm else None
        self.key_norm = Norm(config.num_kv_heads * H if of_all else H, config, kind) if config.use_qk_norm else None

    def project(self, x_BTD: Float[Array, "B T D"],
                context: AttentionContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes queries, keys and values, with the config's normalization and rotation.

        Args:
          x_BTD: The input of the layer ``[B, T, D]``.
          context: Gives the rotation of the position encoding.

        Returns:
          Queries ``[B, T, N, H]``, keys ``[B, T, K, H]`` and values ``[B, T, K, H]``.
        """
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        if self.key is None:  # for_single_tokens concatenated the three kernels
            joined_BTNH = self.query(x_BTD).reshape(*x_BTD.shape[:-1], N + 2 * K, H)
            q_BTNH, k_BTKH, v_BTKH = jnp.split(joined_BTNH, (N, N + K), axis=-2)
        else:
            q_BTNH, k_BTKH, v_BTKH = (self._heads(linear, x_BTD) for linear in (self.query, self.key, self.value))
        q_BTNH, k_BTKH, v_BTKH = map(self._clipped, (q_BTNH, k_BTKH, v_BTKH))
        q_BTNH, k_BTKH = self._normalized(self.query_norm, q_BTNH), self._normalized(self.key_norm, k_BTKH)
        q_BTNH = self._scaled(q_BTNH)
        if context.rotation is not None:
            q_BTNH, k_BTKH = position_encoding(self.config).rotate(q_BTNH, k_BTKH, context.rotation)
        return q_BTNH, k_BTKH, v_BTKH

    def project_queries(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """Computes the queries of cross-attention, without rotation.

        Args:
          x_BTD: The input of the layer ``[B, T, D]``.

        Returns:
          Queries ``[B, T, N, H]``.
        """
        return self._scaled(self._normalized(self.query_norm, self._clipped(self._heads(self.query, x_BTD))))

    def _clipped(self, x_BTNH: jax.Array) -> jax.Array:
        """Clips queries, keys or values to the config's limit."""
        most = self.config.limits.projections
        return x_BTNH if most is None else jnp.clip(x_BTNH, -most, most)

    def _normalized(self, norm: Norm | None, x_BTNH: jax.Array) -> jax.Array:
        """Normalizes queries or keys: each head alone, or all heads together."""
        if norm is None or self.config.qk_norm_width == "head":
            return x_BTNH if norm is None else norm(x_BTNH)
        return norm(x_BTNH.reshape(*x_BTNH.shape[:-2], -1)).reshape(x_BTNH.shape)

    def _scaled(self, q_BTNH: jax.Array) -> jax.Array:
        """Multiplies queries so that the default scale 1 / sqrt(H) gives the config's scale."""
        config = self.config
        scale = config.attention_scale if config.mup is None else config.mup.attention_scale(config)
        return q_BTNH if scale is None else q_BTNH * (scale * math.sqrt(self.config.head_dim))

    def project_memory(self, memory_BSD: Float[Array, "B S D"]) -> tuple[jax.Array, jax.Array]:
        """Computes the keys and values of cross-attention.

        Args:
          memory_BSD: The encoder's output ``[B, S, D]``.

        Returns:
          Keys and values, each ``[B, S, K, H]``.
        """
        k_BSKH, v_BSKH = (self._clipped(self._heads(linear, memory_BSD)) for linear in (self.key, self.value))
        return self._normalized(self.key_norm, k_BSKH), v_BSKH

    def _heads(self, linear: Linear, x_BTD: jax.Array) -> jax.Array:
        """Applies a projection and splits its output into heads."""
        return linear(x_BTD).reshape(*x_BTD.shape[:-1], -1, self.config.head_dim)

    def attend(self, q_BTNH: Float[Array, "B T N H"], k_BSKH: Float[Array, "B S K H"], v_BSKH: Float[Array, "B S K V"],
               mask: AttentionMask, bias: Bias,
               key: jax.Array | None) -> Float[Array, "B T N V"]:
        """Computes attention with the config's implementation, precision and dropout.

        Args:
          q_BTNH: Queries ``[B, T, N, H]``.
          k_BSKH: Keys ``[B, S, K, H]``.
          v_BSKH: Values ``[B, S, K, V]``; without latent attention, V is H.
          mask: Which keys each query may attend to.
          bias: What is added to the scores.
          key: The PRNG key of dropout. ``None`` switches dropout off.

        Returns:
          The output of each head ``[B, T, N, V]``.
        """
        config = self.config
        rate = config.dropout if config.attention_dropout is None else config.attention_dropout
        # If the mesh shards the tokens of a row, the queries stay sharded, and each device gathers
        # the keys of all tokens.
        q_BTNH = constrain(q_BTNH, "batch", "sequence", "heads", None)
        k_BSKH, v_BSKH = (constrain(x_BSKH, "batch", None, "kv_heads", None) for x_BSKH in (k_BSKH, v_BSKH))
        return attend(q_BTNH, k_BSKH, v_BSKH, mask, bias=bias, dropout=rate, key=key,
                      implementation=config.attention_implementation, precision=config.precision,
                      cap=config.limits.scores, sinks_N=None if self.sinks is None else self.sinks[...])

    def merge(self, heads_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """Concatenates the outputs of the heads and applies the output projection.

        Args:
          heads_BTNH: The outputs of the heads ``[B, T, N, H]``.

        Returns:
          What attention adds to the residual stream ``[B, T, D]``.
        """
        return self.output(jnp.reshape(heads_BTNH, (*heads_BTNH.shape[:2], -1)))

    def for_single_tokens(self) -> Self:
        """Rearranges the weights so that decoding token by token reads them fastest: one matrix
        product computes queries, keys and values together.

        Returns:
          A copy of the module that computes the same function.
        """
        attention = jax.tree.map(lambda leaf: leaf, self)
        attention.query = joined(self.query, self.key, self.value)
        attention.key = attention.value = None
        return attention
