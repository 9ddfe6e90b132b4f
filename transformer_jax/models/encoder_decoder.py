"""The Transformer of "Attention Is All You Need": an encoder, and a decoder that attends to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ModelConfig
from transformer_jax.models.inputs import CausalInputs, check_config, check_token_array, positions_in_segments
from transformer_jax.models.output import Output, PairTrace, Trace
from transformer_jax.nn.attention import AttentionContext
from transformer_jax.nn.blocks import Block
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.embeddings import Embeddings, TargetEmbeddings
from transformer_jax.nn.layers import Norm
from transformer_jax.nn.sites import Intervene, encoder_sites
from transformer_jax.nn.stack import MakeBlock, Stack, unstack
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What the encoder makes of a source.

    Attributes:
      hidden: ``[B, S, D]``.
      segment_ids_BS: 0 for padding.
      trace: of the encoder.
    """

    hidden: jax.Array
    segment_ids_BS: jax.Array
    trace: Trace


class EncoderDecoder(nnx.Module):
    """A sequence-to-sequence Transformer: a pytree of weights, called as a pure function.

    One table embeds source and target tokens and, tied, predicts the next ones. Learned positions,
    and norms of embeddings, are those of a side (Lewis et al., 2020, BART).

    Source: Vaswani et al. (2017); variants by :class:`ModelConfig`.

    Attributes:
      reads_sources: see :class:`transformer_jax.Decoder`; so is ``predicts_next``.
    """

    reads_sources = True
    predicts_next = True
    prediction_head = None

    def __init__(self, config: ModelConfig, *, key: jax.Array, block: MakeBlock = Block):
        """Random weights.

        Args:
          config: the shape; ``family`` must be ``"encoder_decoder"`` and ``vocab_size`` set.
          key: PRNG key, such as ``jax.random.key(0)``.
          block: makes the block of a layer of either side, with ``has_memory=True`` in the decoder;
            see docs/extending/block.md.
        """
        check_config(config, "encoder_decoder")
        embedding_key, encoder_key, decoder_key = jax.random.split(key, 3)
        self.config = config
        self.embeddings = Embeddings(config, key=embedding_key)
        self.target_embeddings = TargetEmbeddings(config, key=jax.random.fold_in(embedding_key, 4))
        self.encoder = Stack(config, key=encoder_key, num_layers=config.num_encoder_layers, is_causal=False,
                             block=block)
        self.decoder = Stack(config, key=decoder_key, num_layers=config.num_decoder_layers, is_causal=True,
                             has_memory=True, block=block)
        pre = config.norm_position == "pre"
        self.encoder_norm = Norm(config.model_dim, config) if pre else None
        self.decoder_norm = Norm(config.model_dim, config) if pre else None

    def __call__(self, source_BS: jax.Array, target_BT: jax.Array, *, source_segment_ids_BS: jax.Array | None = None,
                 target_segment_ids_BT: jax.Array | None = None, key: jax.Array | None = None,
                 intervene: Intervene | None = None) -> Output:
        """Next-token logits of every target position, given the source: teacher forcing.

        Args:
          source_BS: token ids.
          target_BT: token ids, of which the first is the one that starts every target.
          source_segment_ids_BS: which pair of a packed row a token belongs to, 0 for padding (a
            boolean mask will do where there is one pair a row). ``None``: one pair, no padding.
          target_segment_ids_BT: likewise; a target attends to the source with its own id.
          key: switches dropout on.
          intervene: ``intervene(site, layer, value) -> value``, called at the sites of
            :meth:`transformer_jax.Decoder.__call__` and, in the decoder, at
            ``"cross_attention_bias"``, ``"cross_head_output"`` and ``"cross_attention_output"``;
            the encoder's begin with ``"encoder_"``.

        Returns:
          Output, whose trace is a :class:`PairTrace` with ``encoder``, ``decoder`` and ``cross``.

        Raises:
          ValueError: for tokens that are no integers ``[B, T]`` or longer than ``config.max_len``.
        """
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        memory = self.encode(source_BS, segment_ids_BS=source_segment_ids_BS, key=encoder_key, intervene=intervene)
        return self.decode(target_BT, memory, segment_ids_BT=target_segment_ids_BT, key=decoder_key,
                           intervene=intervene)

    def encode(self, source_BS: jax.Array, *, segment_ids_BS: jax.Array | None = None, key: jax.Array | None = None,
               intervene: Intervene | None = None) -> Memory:
        """Reads the sources; arguments as in :meth:`__call__`."""
        config = self.config
        check_token_array(source_BS, config.max_len, "config.max_len")
        segment_ids_BS = jnp.ones_like(source_BS) if segment_ids_BS is None else segment_ids_BS.astype(jnp.int32)
        mask = AttentionMask(window=config.sliding_window) & AttentionMask.segments(segment_ids_BS)
        positions_BS = positions_in_segments(source_BS, segment_ids_BS)
        context = AttentionContext.of(config, mask, positions_BS, relative=self.encoder.relative)
        embedding_key, stack_key = (None, None) if key is None else jax.random.split(key)
        x_BSD = constrain(self.embeddings(source_BS, positions_BS, key=embedding_key), "batch", "sequence", None)
        x_BSD, layers, _ = self.encoder(x_BSD, context, key=stack_key, intervene=encoder_sites(intervene))
        hidden_BSD = x_BSD if self.encoder_norm is None else self.encoder_norm(x_BSD)
        return Memory(hidden_BSD, segment_ids_BS, Trace(layers=layers, final=x_BSD, mask=mask, bias=context.bias))

    def start(self, memory: Memory, capacity: int) -> KVCache:
        """A cache for decoding: room for ``capacity`` target tokens, and every layer's keys of the
        memory."""
        cache = KVCache.empty(self.config, memory.hidden.shape[0], capacity)
        return cache.with_memory(self.decoder.project_memory(memory.hidden), memory.segment_ids_BS)

    def decode(self, target_BT: jax.Array, memory: Memory | None = None, *, segment_ids_BT: jax.Array | None = None,
               positions_BT: jax.Array | None = None, cache: KVCache | None = None, key: jax.Array | None = None,
               visible_BTS: jax.Array | None = None, intervene: Intervene | None = None) -> Output:
        """Next-token logits given a memory, or a cache from :meth:`start`.

        Args:
          target_BT: token ids, those after the cached ones when there is a cache.
          memory: from :meth:`encode`; not needed with a cache.
          segment_ids_BT: as ``target_segment_ids_BT`` in :meth:`__call__`.
          positions_BT: see :meth:`transformer_jax.Decoder.__call__`; so are ``cache``, ``key``,
            ``visible_BTS`` and ``intervene``.
        """
        config = self.config
        if (memory is None) == (cache is None):
            raise ValueError("decode needs either a memory (from encode) or a cache (from start)")
        inputs = CausalInputs.of(config, target_BT, segment_ids_BT, positions_BT, cache, visible_BTS)
        query_ids_BT = jnp.ones_like(target_BT) if inputs.segment_ids_BT is None else inputs.segment_ids_BT
        memory_ids_BS = cache.memory_ids_BS if memory is None else memory.segment_ids_BS
        context = AttentionContext.of(
            config, inputs.mask, inputs.positions_BT, key_positions_BS=inputs.key_positions_BS,
            relative=self.decoder.relative, memory_BSD=None if memory is None else memory.hidden,
            memory_mask=AttentionMask.segments(query_ids_BT.astype(jnp.int32), memory_ids_BS))
        embedding_key, stack_key = (None, None) if key is None else jax.random.split(key)
        x_BTD = self.embeddings(target_BT, inputs.positions_BT, target=self.target_embeddings, key=embedding_key)
        x_BTD = constrain(x_BTD, "batch", "sequence", None)
        x_BTD, layers, cache = self.decoder(x_BTD, context, cache=inputs.cache, key=stack_key, intervene=intervene)
        hidden_BTD = x_BTD if self.decoder_norm is None else self.decoder_norm(x_BTD)
        trace = PairTrace(
            encoder=None if memory is None else memory.trace,
            decoder=Trace(layers=dataclasses.replace(layers, cross=None), final=x_BTD, mask=context.mask,
                          bias=context.bias),
            cross=Trace(layers=layers.cross, final=None, mask=context.memory_mask, bias=None))
        return Output(logits=self.embeddings.unembed(hidden_BTD), hidden=hidden_BTD, trace=trace,
                      cache=None if cache is None else cache.advance(target_BT.shape[1]))

    @property
    def final_norm(self) -> Norm | None:
        """The norm between the decoder's residual stream and the unembedding, in pre-norm
        models."""
        return self.decoder_norm

    def stacks(self) -> dict[str, Stack]:
        """The stack of layers that holds each kind of attention: the decoder's also attends to the
        source."""
        return {"self": self.decoder, "encoder": self.encoder, "cross": self.decoder}

    def start_cache(self, batch_size: int, capacity: int, source_BS: jax.Array,
                    source_segment_ids_BS: jax.Array | None = None, *, intervene: Intervene | None = None) -> KVCache:
        """A cache with room for ``capacity`` target tokens a row, into which the encoder has read
        the sources.

        Raises:
          ValueError: for sources that are not ``batch_size`` rows.
        """
        if source_BS.shape[0] != batch_size:
            raise ValueError(f"there are {source_BS.shape[0]} sources for a batch of {batch_size}; pass one a row")
        return self.start(self.encode(source_BS, segment_ids_BS=source_segment_ids_BS, intervene=intervene), capacity)

    def step(self, tokens_BT: jax.Array, cache: KVCache, **options: Any) -> Output:
        """The output for the target tokens after those in the cache; options as in
        :meth:`decode`."""
        return self.decode(tokens_BT, cache=cache, **options)

    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits, float32 ``[..., V]``, of the decoder's hidden states after the final norm."""
        return self.embeddings.unembed(hidden_BTD)

    def for_decoding(self) -> EncoderDecoder:
        """The same model in the form in which a token loop reads the decoder's weights fastest, a
        copy of them."""
        model = jax.tree.map(lambda leaf: leaf, self)
        model.decoder = unstack(self.decoder)
        return model
