"""The Transformer of "Attention Is All You Need": an encoder, and a decoder that attends to it."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from transformer_jax.config import ModelConfig
from transformer_jax.models.inputs import (
    CausalInputs,
    check_config,
    check_token_array,
    check_values,
    positions_in_segments,
    tokens_of,
)
from transformer_jax.models.output import Output, PairTrace, Trace
from transformer_jax.nn.attention import AttentionContext
from transformer_jax.nn.blocks import Block, LayerTrace
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.embeddings import Embeddings, TargetEmbeddings
from transformer_jax.nn.layers import Norm
from transformer_jax.nn.printing import Printed
from transformer_jax.nn.sites import Intervene, encoder_sites
from transformer_jax.nn.stack import MakeBlock, Stack, unstack
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """The encoder's output for a batch of sources, which the decoder attends to.

    Attributes:
      hidden: the encoder's hidden states, ``[B, S, D]``.
      segment_ids_BS: the pair of a packed row that each source token belongs to, 0 for padding.
      trace: the trace of the encoder.
    """

    hidden: jax.Array
    segment_ids_BS: jax.Array
    trace: Trace


class EncoderDecoder(Printed, nnx.Module):
    """A sequence-to-sequence Transformer: a pytree of weights, called as a pure function.

    One table embeds source and target tokens; with tied embeddings, it also predicts the next
    tokens. Learned positions and norms of the embeddings are separate for the encoder and the
    decoder (Lewis et al., 2020, BART).

    Source: Vaswani et al. (2017); ``ModelConfig`` selects variants.

    Attributes:
      reads_sources: True: the model takes a source text, see ``transformer_jax.Decoder``.
      predicts_next: True: the logits are those of the next target token, so the model can generate.
      prediction_head: ``None``, see ``transformer_jax.Decoder``.
    """

    reads_sources = True
    predicts_next = True
    prediction_head = None

    def __init__(self, config: ModelConfig, *, key: jax.Array, block: MakeBlock = Block):
        """Creates a model with random weights.

        Args:
          config: the shape of the model; needs ``family="encoder_decoder"`` and a ``vocab_size``.
          key: PRNG key, such as ``jax.random.key(0)``.
          block: makes the block of a layer of the encoder or, with ``has_memory=True``, of the
            decoder. See docs/extending/block.md.
        """
        check_config(config, "encoder_decoder", key)
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

    def __call__(self, source_BS: Int[Array, "B S"] | None = None, target_BT: Int[Array, "B T"] | None = None, *,
                 source_segment_ids_BS: Shaped[Array, "B S"] | None = None,
                 target_segment_ids_BT: Shaped[Array, "B T"] | None = None, key: jax.Array | None = None,
                 intervene: Intervene | None = None, source_embeddings_BSD: Float[Array, "B S D"] | None = None,
                 target_embeddings_BTD: Float[Array, "B T D"] | None = None) -> Output:
        """Returns the next-token logits of every target position, given the source (teacher
        forcing).

        Args:
          source_BS: token ids of the sources.
          target_BT: token ids of the targets, beginning with the token that starts every target.
          source_segment_ids_BS: the pair of a packed row that each source token belongs to, 0 for
            padding. A boolean mask is enough if each row holds one pair. ``None`` means one pair
            without padding.
          target_segment_ids_BT: the same for the target tokens. A target attends to the source that
            has the same segment id.
          key: PRNG key for dropout. ``None`` switches dropout off.
          intervene: ``intervene(site, layer, value) -> value``, called at the sites of
            ``transformer_jax.Decoder.__call__`` and, in the decoder, at ``"cross_attention_bias"``,
            ``"cross_head_output"`` and ``"cross_attention_output"``. The names of the encoder's
            sites begin with ``"encoder_"``.
          source_embeddings_BSD: embeddings to use in place of the token ids of the source, see
            ``transformer_jax.Decoder.__call__``.
          target_embeddings_BTD: embeddings to use in place of the token ids of the target.

        Returns:
          The output. Its trace is a ``PairTrace`` with ``encoder``, ``decoder`` and ``cross``.

        Raises:
          ValueError: for the same reasons as ``transformer_jax.Decoder.__call__``.
        """
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        memory = self.encode(source_BS, segment_ids_BS=source_segment_ids_BS, key=encoder_key, intervene=intervene,
                             embeddings_BSD=source_embeddings_BSD)
        return self.decode(target_BT, memory, segment_ids_BT=target_segment_ids_BT, key=decoder_key,
                           intervene=intervene, embeddings_BTD=target_embeddings_BTD)

    def encode(self, source_BS: Int[Array, "B S"] | None = None, *,
               segment_ids_BS: Shaped[Array, "B S"] | None = None, key: jax.Array | None = None,
               intervene: Intervene | None = None, embeddings_BSD: Float[Array, "B S D"] | None = None) -> Memory:
        """Runs the encoder on the sources.

        Args:
          source_BS: token ids of the sources.
          segment_ids_BS: as ``source_segment_ids_BS`` in a call of the model.
          key: PRNG key for dropout. ``None`` switches dropout off.
          intervene: ``intervene(site, layer, value) -> value``, called at the encoder's sites.
          embeddings_BSD: as ``source_embeddings_BSD`` in a call of the model.

        Returns:
          The memory that the decoder attends to.

        Raises:
          ValueError: for the same reasons as ``transformer_jax.Decoder.__call__``.
        """
        config = self.config
        source_BS = tokens_of(source_BS, embeddings_BSD, config, "source_embeddings_BSD")
        check_token_array(source_BS, config.max_source_len, "config.max_len")
        check_values(config, source_BS)
        segment_ids_BS = jnp.ones_like(source_BS) if segment_ids_BS is None else segment_ids_BS.astype(jnp.int32)
        mask = AttentionMask.segments(segment_ids_BS)
        positions_BS = positions_in_segments(source_BS, segment_ids_BS)
        context = AttentionContext.of(config, mask, positions_BS, weights=self.encoder.relative)
        embedding_key, stack_key = (None, None) if key is None else jax.random.split(key)
        x_BSD = self.embeddings(source_BS, positions_BS, key=embedding_key, embeddings_BTD=embeddings_BSD)
        x_BSD = constrain(x_BSD, "batch", "sequence", None)
        x_BSD, layers, _ = self.encoder(x_BSD, context, key=stack_key, intervene=encoder_sites(intervene))
        hidden_BSD = x_BSD if self.encoder_norm is None else self.encoder_norm(x_BSD)
        return Memory(hidden_BSD, segment_ids_BS, Trace.of(config, layers, x_BSD, context))

    def start(self, memory: Memory, capacity: int, *, keeps_all: bool = False) -> KVCache:
        """Creates a cache for decoding targets.

        Args:
          memory: the output of ``encode``.
          capacity: the number of target tokens that each row has room for.
          keeps_all: see ``transformer_jax.Decoder.start_cache``.

        Returns:
          A cache without target tokens that holds the memory's keys and values for every layer.
        """
        cache = KVCache.empty(self.config, memory.hidden.shape[0], capacity, keeps_all=keeps_all)
        return cache.with_memory(self.decoder.project_memory(memory.hidden), memory.segment_ids_BS)

    def decode(self, target_BT: Int[Array, "B T"] | None = None, memory: Memory | None = None, *,
               segment_ids_BT: Shaped[Array, "B T"] | None = None, positions_BT: Int[Array, "#B T"] | None = None,
               cache: KVCache | None = None, key: jax.Array | None = None,
               visible_BTS: Bool[Array, "B T S"] | None = None, intervene: Intervene | None = None,
               embeddings_BTD: Float[Array, "B T D"] | None = None) -> Output:
        """Returns the next-token logits of the targets, given a memory or a cache.

        Args:
          target_BT: token ids of the targets; with a cache, the tokens that follow the cached ones.
          memory: the output of ``encode``. Pass either a memory or a cache.
          segment_ids_BT: as ``target_segment_ids_BT`` in a call of the model.
          positions_BT: positions to use instead of those counted within each segment.
          cache: a cache from ``start`` or from an earlier output.
          key: PRNG key for dropout. ``None`` switches dropout off.
          visible_BTS: see ``transformer_jax.Decoder.__call__``.
          intervene: ``intervene(site, layer, value) -> value``, called at the decoder's sites.
          embeddings_BTD: as ``target_embeddings_BTD`` in a call of the model.

        Returns:
          The output; its trace has an encoder part only if a memory was passed.

        Raises:
          ValueError: if both a memory and a cache are passed, or neither; and for the same reasons
            as ``transformer_jax.Decoder.__call__``.
        """
        config = self.config
        target_BT = tokens_of(target_BT, embeddings_BTD, config, "target_embeddings_BTD")
        if (memory is None) == (cache is None):
            given = "neither was given" if memory is None else "both were given"
            raise ValueError(f"decode needs either a memory (from encode) or a cache (from start); {given}")
        inputs = CausalInputs.of(config, target_BT, segment_ids_BT, positions_BT, cache, visible_BTS)
        query_ids_BT = jnp.ones_like(target_BT) if inputs.segment_ids_BT is None else inputs.segment_ids_BT
        memory_ids_BS = cast(KVCache, cache).memory_ids_BS if memory is None else memory.segment_ids_BS
        memory_mask = AttentionMask.segments(query_ids_BT.astype(jnp.int32), memory_ids_BS)
        context = AttentionContext.of(
            config, inputs.mask, inputs.positions_BT, weights=self.decoder.relative,
            cache=inputs.cache, are_in_order=inputs.are_in_order,
            memory_BSD=None if memory is None else memory.hidden, memory_mask=memory_mask)
        embedding_key, stack_key = (None, None) if key is None else jax.random.split(key)
        x_BTD = self.embeddings(target_BT, inputs.positions_BT, target=self.target_embeddings, key=embedding_key,
                                embeddings_BTD=embeddings_BTD)
        x_BTD = constrain(x_BTD, "batch", "sequence", None)
        x_BTD, layers, cache = self.decoder(x_BTD, context, cache=inputs.cache, key=stack_key, intervene=intervene)
        hidden_BTD = x_BTD if self.decoder_norm is None else self.decoder_norm(x_BTD)
        trace = PairTrace(
            encoder=None if memory is None else memory.trace,
            decoder=Trace.of(config, dataclasses.replace(layers, cross=None), x_BTD, context),
            cross=Trace(layers=cast(LayerTrace, layers.cross), final=None, mask=memory_mask, bias=None))
        return Output(logits=self.embeddings.unembed(hidden_BTD), hidden=hidden_BTD, trace=trace,
                      cache=None if cache is None else cache.advance(target_BT.shape[1]))

    @property
    def final_norm(self) -> Norm | None:
        """The norm between the decoder's residual stream and the unembedding; ``None`` in post-norm
        models."""
        return self.decoder_norm

    def stacks(self) -> dict[str, Stack]:
        """Returns the stack of layers that holds each kind of attention.

        Returns:
          A dictionary from the kind of attention to its stack. The decoder's stack holds both
          ``"self"`` and ``"cross"``, because its layers also attend to the source.
        """
        return {"self": self.decoder, "encoder": self.encoder, "cross": self.decoder}

    def start_cache(self, batch_size: int, capacity: int, source_BS: Int[Array, "B S"],
                    source_segment_ids_BS: Shaped[Array, "B S"] | None = None, *, intervene: Intervene | None = None,
                    keeps_all: bool = False) -> KVCache:
        """Runs the encoder on the sources and creates a cache for decoding their targets.

        Args:
          batch_size: the number of rows B.
          capacity: the number of target tokens that each row has room for.
          source_BS: token ids of the sources, one row each.
          source_segment_ids_BS: 1 for tokens and 0 for padding. ``None`` means no padding.
          intervene: see ``encode``.
          keeps_all: see ``transformer_jax.Decoder.start_cache``.

        Returns:
          The cache, which holds the keys and values of the sources and no target tokens.

        Raises:
          ValueError: if the number of sources is not ``batch_size``.
        """
        if source_BS.shape[0] != batch_size:
            raise ValueError(f"{source_BS.shape[0]} sources were given for batch_size={batch_size}; pass one per row")
        memory = self.encode(source_BS, segment_ids_BS=source_segment_ids_BS, intervene=intervene)
        return self.start(memory, capacity, keeps_all=keeps_all)

    def step(self, tokens_BT: Int[Array, "B T"], cache: KVCache, **options: Any) -> Output:
        """Runs the decoder on the target tokens that follow those in the cache.

        Args:
          tokens_BT: token ids.
          cache: keys and values of the sources and of the target tokens before these.
          **options: further arguments of ``decode``.

        Returns:
          The output; its ``cache`` includes the new tokens.
        """
        return self.decode(tokens_BT, cache=cache, **options)

    def unembed(self, hidden_BTD: Float[Array, "*tokens D"]) -> Float[Array, "*tokens V"]:
        """Computes the logits of the decoder's hidden states.

        Args:
          hidden_BTD: hidden states after the final norm, ``[..., D]``.

        Returns:
          Logits, float32 ``[..., V]``.
        """
        return self.embeddings.unembed(hidden_BTD)

    def for_decoding(self) -> EncoderDecoder:
        """Returns the model in the form in which a decoding loop reads the decoder's weights
        fastest.

        Returns:
          The same model, with the weights of each decoder layer in separate arrays. It holds a copy
          of these weights.
        """
        model = jax.tree.map(lambda leaf: leaf, self)
        model.decoder, model.embeddings = unstack(self.decoder), self.embeddings.for_decoding()
        return model
