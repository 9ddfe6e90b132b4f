"""Multi-head latent attention, whose cache stores one short vector for each token."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Self, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer_jax.config import LatentConfig, ModelConfig
from transformer_jax.nn.attention import Attention, AttentionContext
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.layers import Linear, Norm
from transformer_jax.nn.sites import Sites
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.sharding import gather_weight


class Expansion(Linear):
    """A linear map from a latent ``[R]`` to the keys or the values of all heads ``[N, H]``.

    Decoding does not apply it to the latents of the cache, but to the queries or the outputs of
    heads, which are few. It has a type of its own so that ``nn/quantised.py``, whose kernels can
    only be multiplied from one side, leaves it as it is.
    """

    def kernel_RNH(self, num_heads: int, dtype: jnp.dtype) -> Float[Array, "R N H"]:
        """Returns the kernel with an axis of heads.

        Args:
          num_heads: N.
          dtype: The type of the result.

        Returns:
          The gathered kernel ``[R, N, H]``.
        """
        kernel = gather_weight(self.kernel[...].astype(dtype), self.kernel.axes)
        return kernel.reshape(kernel.shape[0], num_heads, -1)


class LatentAttention(Attention):
    """Multi-head latent attention, see ``transformer_jax.config.LatentConfig``.

    In the names of axes, R is the width of what a cache stores: the latent of keys and values,
    followed by the rotated key that all heads share.

    Attributes:
      query_latent: The map to the latent of queries; ``None`` if they have none.
      query_latent_norm: The norm of this latent.
      query: The map to the queries of all heads.
      latent: The map to the latent of keys and values.
      latent_norm: The norm of this latent.
      rotated_key: The map to the channels of the key that are rotated.
      key: The map from the latent to the channels of the keys that are not rotated.
      value: The map from the latent to the values.
      output: The output projection.
    """

    def __init__(self, config: ModelConfig, latent: LatentConfig, *, key: jax.Array, output_scale: float):
        keys = jax.random.split(key, 7)
        D, N, bias = config.model_dim, config.num_heads, config.use_qkv_bias
        self.config, self.settings, self.sinks = config, latent, None

        def norm(dim: int) -> Norm:
            return Norm(dim, config, "rmsnorm", latent.norm_epsilon)

        has_latent = latent.query_dim is not None
        self.query_latent = (Linear(D, latent.query_dim, ("embed", None), config, key=keys[0], has_bias=bias)
                             if latent.query_dim is not None else None)
        self.query_latent_norm = norm(latent.query_dim) if latent.query_dim is not None else None
        self.query = Linear(latent.query_dim or D, N * cast(int, config.head_dim),
                            ("latent" if has_latent else "embed", "heads"), config, key=keys[1], has_bias=False)
        self.latent = Linear(D, latent.dim, ("embed", None), config, key=keys[2], has_bias=bias)
        self.latent_norm = norm(latent.dim)
        self.rotated_key = Linear(D, cast(int, config.rope_layout.dim), ("embed", None), config, key=keys[3],
                                  has_bias=bias)
        self.key = Expansion(latent.dim, N * latent.plain_width(config), ("latent", "heads"), config, key=keys[4],
                             has_bias=False)
        self.value = Expansion(latent.dim, N * latent.value_width(config), ("latent", "heads"), config, key=keys[5],
                               has_bias=False)
        self.output = Linear(N * latent.value_width(config), D, ("heads", "embed"), config, key=keys[6],
                             scale=output_scale)

    def queries(self, x_BTD: Float[Array, "B T D"], context: AttentionContext) -> Float[Array, "B T N H"]:
        """Computes the queries, whose last channels are rotated.

        Args:
          x_BTD: The input of the layer ``[B, T, D]``.
          context: Gives the rotation.

        Returns:
          Queries ``[B, T, N, H]``.
        """
        if self.query_latent is not None and self.query_latent_norm is not None:
            x_BTD = self.query_latent_norm(self.query_latent(x_BTD))
        plain_BTNH, rotated_BTNH = jnp.split(self._heads(self.query, x_BTD), [self._plain_width], axis=-1)
        return self._scaled(jnp.concatenate([plain_BTNH, context.rotation(rotated_BTNH)], axis=-1))

    def latents(self, x_BTD: Float[Array, "B T D"], context: AttentionContext) -> Float[Array, "B T 1 R"]:
        """Computes what a cache stores of each token.

        Args:
          x_BTD: The input of the layer ``[B, T, D]``.
          context: Gives the rotation.

        Returns:
          The normalized latent and the rotated key ``[B, T, 1, R]``.
        """
        rotated_BT1H = context.rotation(self.rotated_key(x_BTD)[:, :, None])
        return jnp.concatenate([self.latent_norm(self.latent(x_BTD))[:, :, None], rotated_BT1H], axis=-1)

    def expanded(self, latents_BS1R: Float[Array, "B S 1 R"]) -> tuple[jax.Array, jax.Array]:
        """Computes the keys and values of all heads.

        Args:
          latents_BS1R: The result of ``latents``.

        Returns:
          Keys ``[B, S, N, H]`` and values ``[B, S, N, V]``.
        """
        B, S, N = *latents_BS1R.shape[:2], self.config.num_heads
        latent_BSR, rotated_BSH = jnp.split(latents_BS1R[:, :, 0], [self.settings.dim], axis=-1)
        plain_BSNH = self.key(latent_BSR).reshape(B, S, N, -1)
        shared_BSNH = jnp.broadcast_to(rotated_BSH[:, :, None], (B, S, N, rotated_BSH.shape[-1]))
        return jnp.concatenate([plain_BSNH, shared_BSNH], axis=-1), self.value(latent_BSR).reshape(B, S, N, -1)

    def project(self, x_BTD: Float[Array, "B T D"],
                context: AttentionContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes queries, keys and values.

        Args:
          x_BTD: The input of the layer ``[B, T, D]``.
          context: Gives the rotation.

        Returns:
          Queries and keys ``[B, T, N, H]``, and values ``[B, T, N, V]``.
        """
        return self.queries(x_BTD, context), *self.expanded(self.latents(x_BTD, context))

    def attend_to_latents(self, q_BTNH: Float[Array, "B T N H"], latents_BS1R: Float[Array, "B S 1 R"],
                          mask: AttentionMask, key: jax.Array | None, bias: jax.Array | None = None) -> jax.Array:
        """Computes attention without the keys and values of heads.

        The inner product of a query with a key is that of a longer query with the latent, and the
        weighted sum of values is a map of the weighted sum of latents.

        Args:
          q_BTNH: Queries ``[B, T, N, H]``.
          latents_BS1R: The result of ``latents`` for the keys.
          mask: Which keys each query may attend to.
          key: The PRNG key of dropout. ``None`` switches dropout off.
          bias: What is added to the scores.

        Returns:
          The output of each head ``[B, T, N, V]``.
        """
        N, dtype = self.config.num_heads, q_BTNH.dtype
        plain_BTNH, rotated_BTNH = jnp.split(q_BTNH, [self._plain_width], axis=-1)
        longer_BTNR = jnp.einsum("BTNH,RNH->BTNR", plain_BTNH, self.key.kernel_RNH(N, dtype),
                                 precision=self.config.precision)
        longer_BTNR = jnp.concatenate([longer_BTNR, rotated_BTNH], axis=-1)
        # ``attend`` divides scores by the square root of the width, which is longer now.
        longer_BTNR *= math.sqrt(latents_BS1R.shape[-1] / q_BTNH.shape[-1])
        # The latents are also the values. Their rotated channels are multiplied in vain, but a copy
        # of the others would read and write the whole cache for each token.
        sums_BTNR = self.attend(longer_BTNR, latents_BS1R, latents_BS1R, mask, bias, key)[..., :self.settings.dim]
        return jnp.einsum("BTNR,RNH->BTNH", sums_BTNR, self.value.kernel_RNH(N, dtype), precision=self.config.precision)

    def is_short(self, num_queries: int) -> bool:
        """Finds out whether ``attend_to_latents`` needs fewer operations than keys and values.

        Args:
          num_queries: The number of queries of a row.

        Returns:
          True for few queries, such as those of one token.
        """
        H, V, R = cast(int, self.config.head_dim), self.settings.value_width(self.config), self.settings.dim
        more = 2 * self.settings.cached_width(self.config) - H - V
        return num_queries * more <= R * (self._plain_width + V)

    def for_single_tokens(self) -> Self:
        """Returns the form for decoding token by token.

        Returns:
          The module itself.
        """
        return self

    @property
    def _plain_width(self) -> int:
        """The number of channels of a head that are not rotated."""
        return self.settings.plain_width(self.config)


def read_latents(attention: LatentAttention, read_BTD: Float[Array, "B T D"], context: AttentionContext, sites: Sites,
                 cache: KVCache | None) -> tuple[jax.Array, jax.Array, jax.Array, KVCache | None, Callable]:
    """Computes queries, keys and values, and calls the intervention at their sites.

    With a cache, the keys and values of all slots are computed again from the latents in it, so the
    intervention sees those of all slots. If it changes none of them and the queries are few, they
    are not computed at all unless the trace is read.

    Args:
      attention: The module that holds the weights.
      read_BTD: The input of attention ``[B, T, D]``.
      context: The mask and the positions.
      sites: The sites of this layer.
      cache: The latents of earlier tokens, or ``None``.

    Returns:
      Queries, keys and values; the cache with the new latents; and the function that computes
      attention from them, with the arguments of ``Attention.attend``.
    """
    q_BTNH, latents_BS1R = attention.queries(read_BTD, context), attention.latents(read_BTD, context)
    if cache is not None:
        cache, latents_BS1R, _ = cache.extend(cast(int, sites.layer), latents_BS1R)
    k_BSNH, v_BSNH = attention.expanded(latents_BS1R)
    q_BTNH, changed_k, changed_v = sites("queries", q_BTNH), sites("keys", k_BSNH), sites("values", v_BSNH)
    attend = attention.attend
    if cache is not None and changed_k is k_BSNH and changed_v is v_BSNH and attention.is_short(q_BTNH.shape[1]):
        attend = functools.partial(_attend_short, attention, latents_BS1R)
    return q_BTNH, changed_k, changed_v, cache, attend


def _attend_short(attention: LatentAttention, latents_BS1R: jax.Array, q_BTNH, k_BSNH, v_BSNH, mask, bias,
                  key) -> jax.Array:
    """Computes attention to latents in place of their keys and values."""
    del k_BSNH, v_BSNH
    return attention.attend_to_latents(q_BTNH, latents_BS1R, mask, key, bias)
