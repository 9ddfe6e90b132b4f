"""The GPT family: decoder-only language models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ModelConfig
from transformer_jax.models.output import Output, Trace
from transformer_jax.nn.attention import AttentionContext
from transformer_jax.nn.blocks import Intervene
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.embeddings import Embeddings
from transformer_jax.nn.layers import Norm, dropout
from transformer_jax.nn.stack import Stack
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.ops.positions import LinearBias, alibi_slopes, rotary_angles
from transformer_jax.sharding import constrain


class Decoder(nnx.Module):
    """A decoder-only Transformer: a pytree of weights, called as a pure function.

    Source: Radford et al. (2018, 2019), Brown et al. (2020); variants by :class:`ModelConfig`.
    """

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        """Random weights.

        Args:
          config: the shape; ``vocab_size`` must be set.
          key: PRNG key, such as ``jax.random.key(0)``.
        """
        if config.vocab_size is None:
            raise ValueError("config.vocab_size is not set: config.replace(vocab_size=tokenizer.vocab_size)")
        embedding_key, stack_key = jax.random.split(key)
        self.config = config
        self.embeddings = Embeddings(config, key=embedding_key)
        self.stack = Stack(config, key=stack_key)
        self.final_norm = Norm(config.model_dim, config) if config.norm_position == "pre" else None

    def __call__(self, tokens_BT: jax.Array, *, segment_ids_BT: jax.Array | None = None,
                 positions_BT: jax.Array | None = None, cache: KVCache | None = None, key: jax.Array | None = None,
                 intervene: Intervene | None = None) -> Output:
        """Next-token logits of every position.

        Args:
          tokens_BT: token ids.
          segment_ids_BT: which document of a packed row a token belongs to, 0 for padding; attention stays
            within a segment and positions restart with it. ``None``: one segment.
          positions_BT: positions to use instead of those counted within each segment.
          cache: keys and values of the tokens before these; each of its rows is one sequence.
          key: switches dropout on.
          intervene: ``intervene(site, layer, value) -> value``, called at the sites ``"residual"``,
            ``"attention_bias"``, ``"head_output"``, ``"attention_output"`` and ``"mlp_output"`` of each layer.

        Returns:
          Output; under jit what is not read of it is not computed.

        Raises:
          ValueError: for tokens that are no integers ``[B, T]`` or longer than ``config.max_len``.
        """
        self._check(tokens_BT, cache)
        embedding_key, stack_key = (None, None) if key is None else jax.random.split(key)
        if cache is not None:
            return self._with_cache(tokens_BT, segment_ids_BT, positions_BT, cache, embedding_key, stack_key, intervene)
        mask = self._mask(None)
        if segment_ids_BT is not None:
            mask &= AttentionMask.segments(segment_ids_BT)
        if positions_BT is None:
            positions_BT = positions_in_segments(tokens_BT if segment_ids_BT is None else segment_ids_BT,
                                                 one_segment=segment_ids_BT is None)
        return self._run(tokens_BT, positions_BT, mask, None, embedding_key, stack_key, intervene)

    def _with_cache(self, tokens_BT, segment_ids_BT, positions_BT, cache, embedding_key, stack_key, intervene):
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            seen_B1 = (cache.segment_ids_BS != 0).sum(1, keepdims=True)
            positions_BT = jnp.maximum(seen_B1 + jnp.cumsum(segment_ids_BT != 0, axis=1) - 1, 0)
        start = cache.length
        cache = cache.append_segments(segment_ids_BT)
        mask = self._mask(start) & AttentionMask.segments(segment_ids_BT, cache.segment_ids_BS)
        return self._run(tokens_BT, positions_BT, mask, cache, embedding_key, stack_key, intervene)

    def _mask(self, query_start: jax.Array | None) -> AttentionMask:
        return AttentionMask(is_causal=True, window=self.config.sliding_window, query_start=query_start)

    def _run(self, tokens_BT, positions_BT, mask, cache, embedding_key, stack_key, intervene) -> Output:
        config = self.config
        context = AttentionContext(
            mask=mask,
            bias=LinearBias(alibi_slopes(config.num_heads), mask.query_start) if config.positions == "alibi" else None,
            rotary_angles=(rotary_angles(positions_BT, config.head_dim, config.rope_base)
                           if config.positions == "rope" else None))
        x_BTD = dropout(self.embeddings(tokens_BT, positions_BT), config.dropout, embedding_key)
        # Without it the compiler may replicate every activation over the axis that shards the weights.
        x_BTD = constrain(x_BTD, "batch", None, None)
        x_BTD, layers, cache = self.stack(x_BTD, context, cache=cache, key=stack_key, intervene=intervene)
        hidden_BTD = x_BTD if self.final_norm is None else self.final_norm(x_BTD)
        return Output(logits=self.embeddings.unembed(hidden_BTD), hidden=hidden_BTD,
                      trace=Trace(layers=layers, final=x_BTD, mask=context.mask, bias=context.bias),
                      cache=None if cache is None else cache.advance(tokens_BT.shape[1]))

    def _check(self, tokens_BT: jax.Array, cache: KVCache | None) -> None:
        if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
            raise ValueError(f"tokens are integers [B, T], not {tokens_BT.dtype} {tuple(tokens_BT.shape)}")
        room = self.config.max_len if cache is None else cache.capacity
        if tokens_BT.shape[1] > room:
            raise ValueError(f"{tokens_BT.shape[1]} tokens are longer than the {room} that "
                             f"{'config.max_len' if cache is None else 'the cache'} has room for")


def positions_in_segments(ids_BT: jax.Array, one_segment: bool = False) -> jax.Array:
    """Positions that restart where the segment id changes, int32 ``[B, T]``."""
    places_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1], dtype=jnp.int32), ids_BT.shape)
    if one_segment:
        return places_BT
    starts_BT = jnp.concatenate([jnp.ones_like(ids_BT[:, :1], bool), ids_BT[:, 1:] != ids_BT[:, :-1]], axis=1)
    return places_BT - jax.lax.cummax(jnp.where(starts_BT, places_BT, 0), axis=1)


def count_parameters(config: ModelConfig) -> int:
    """Number of weights of a decoder of this shape; nothing is allocated."""
    shapes = jax.eval_shape(lambda key: Decoder(config, key=key), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
