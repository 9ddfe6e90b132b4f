"""Recurrent encoder-decoders, with and without attention."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from transformer_jax.baselines.additive_attention import AttentiveLayer, EncodedSource
from transformer_jax.baselines.cells import RecurrentLayer, State
from transformer_jax.baselines.recurrent import check_no_sites, make_layers
from transformer_jax.config.recurrent import RecurrentConfig
from transformer_jax.models.inputs import check_config, check_token_array, check_values, tokens_of
from transformer_jax.models.output import Output, PairTrace, Trace
from transformer_jax.nn.blocks import LayerTrace
from transformer_jax.nn.embeddings import Embeddings
from transformer_jax.nn.layers import Linear, dropout
from transformer_jax.nn.printing import Printed
from transformer_jax.nn.state_cache import StateCache
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.sharding import constrain


class AttentionLayers(NamedTuple):
    """What inspection reads of the layers that attend.

    Attributes:
      num_layers: the number of layers with attention.
      blocks: ``None``: there are no blocks of a Transformer.
    """

    num_layers: int = 1
    blocks: None = None


class _Memory(NamedTuple):
    """The encoded sources.

    ``source`` is what attention reads, ``None`` without attention. ``finals`` has for each decoder
    layer the states ``[B, S, D]`` from which it starts; the ones at the first token of a source are
    used. ``ids_BS`` are the segments of the source tokens.
    """

    source: EncodedSource | None
    finals: tuple[State, ...]
    ids_BS: jax.Array


class RecurrentPairs(Printed, nnx.Module):
    """A recurrent encoder-decoder: a pytree of weights, called as a pure function. It takes the
    place of an ``EncoderDecoder`` in the task ``translation`` and in ``tj.generate``.

    With attention, the encoder reads the source in both directions (Bahdanau et al., 2015).
    Without it, the encoder reads the source from its end, and its last state is the first state of
    the decoder (Sutskever et al., 2014). The maxout layer of Bahdanau et al. before the output is
    a tanh layer here.

    Attributes:
      reads_sources: True: the model takes a source and a target.
      predicts_next: True: the logits are those of the next token of the target.
      prediction_head: ``None``: the unembedding reads the hidden states.
    """

    reads_sources = True
    predicts_next = True
    prediction_head = None

    def __init__(self, config: RecurrentConfig, *, key: jax.Array):
        """Creates a model with random weights.

        Args:
          config: the shape of the model; ``vocab_size`` must be set.
          key: PRNG key.

        Raises:
          ValueError: if the config is for another family or has no ``vocab_size``.
        """
        check_config(config, "recurrent_pairs", key)
        keys, D, settings = jax.random.split(key, 6), config.model_dim, config.embedding_config
        self.config = config
        self.embeddings = Embeddings(settings, key=keys[0])
        self.backward = make_layers(config, key=keys[1], upper_dim=2 * D if config.use_attention else D)
        attends = config.use_attention
        self.forward = make_layers(config, key=keys[2], upper_dim=2 * D) if attends else None
        self.attentive = AttentiveLayer(config, key=keys[3]) if attends else None
        self.initial = Linear(D, config.num_layers * D, ("embed", None), settings, key=keys[4]) if attends else None
        self.output = Linear(4 * D, D, ("embed", None), settings, key=keys[5]) if attends else None
        layers = make_layers(config, key=jax.random.fold_in(key, 6))
        self.decoder = nnx.List(list(layers)[1:]) if config.use_attention else layers

    def __call__(self, source_BS: Int[Array, "B S"] | None = None, target_BT: Int[Array, "B T"] | None = None, *,
                 source_segment_ids_BS: Shaped[Array, "B S"] | None = None,
                 target_segment_ids_BT: Shaped[Array, "B T"] | None = None, key: jax.Array | None = None,
                 intervene: Any = None, source_embeddings_BSD: Float[Array, "B S D"] | None = None,
                 target_embeddings_BTD: Float[Array, "B T D"] | None = None) -> Output:
        """Returns the next-token logits of every target position, given the source.

        Args:
          source_BS: token ids of the sources.
          target_BT: token ids of the targets, beginning with the token that starts every target.
          source_segment_ids_BS: the pair of a packed row that each source token belongs to, 0 for
            padding. ``None`` means one pair without padding.
          target_segment_ids_BT: the same for the target tokens.
          key: PRNG key for dropout. ``None`` switches dropout off.
          intervene: must be ``None``: a recurrent network has no intervention sites.
          source_embeddings_BSD: embeddings to use in place of the token ids of the source.
          target_embeddings_BTD: embeddings to use in place of the token ids of the target.

        Returns:
          The output. With attention, its trace is a ``PairTrace`` that has only ``cross``.

        Raises:
          ValueError: if the tokens are not integers of the vocabulary, ``[B, S]`` and ``[B, T]``.
        """
        check_no_sites(intervene)
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        memory = self._encode(source_BS, source_segment_ids_BS, encoder_key, source_embeddings_BSD)
        target_BT = tokens_of(target_BT, target_embeddings_BTD, self.embeddings.config)
        return self._decode(target_BT, memory, target_segment_ids_BT, None, decoder_key, target_embeddings_BTD)

    def _encode(self, source_BS: jax.Array | None, ids_BS: jax.Array | None, key: jax.Array | None,
                embeddings_BSD: jax.Array | None = None) -> _Memory:
        """Reads the sources."""
        source_BS = tokens_of(source_BS, embeddings_BSD, self.embeddings.config)
        check_token_array(source_BS, source_BS.shape[1], "the encoder")
        check_values(self.embeddings.config, source_BS)
        ids_BS = jnp.ones_like(source_BS) if ids_BS is None else jnp.asarray(ids_BS).astype(jnp.int32)
        x = constrain(self.embeddings(source_BS, source_BS, embeddings_BTD=embeddings_BSD), "batch", None, None)
        keys = _split(key, len(self.backward))
        finals: list[State] = []
        for index, backward in enumerate(self.backward):
            x = dropout(x, self.config.dropout, keys[index])
            states, _ = backward(x, ids_BS, reverse=True)
            finals.append(states)
            if self.forward is not None:
                x = jnp.concatenate([self.forward[index](x, ids_BS)[0][0], states[0]], axis=-1)
            else:
                x = states[0]
        if self.attentive is None:
            return _Memory(None, tuple(finals), ids_BS)
        first_BSD = jnp.split(jnp.tanh(cast(Linear, self.initial)(finals[-1][0])), len(finals), axis=-1)
        num_states = self.attentive.cell.num_states
        return _Memory(EncodedSource(x, self.attentive.keys(x), ids_BS),
                       tuple((h, jnp.zeros_like(h))[:num_states] for h in first_BSD), ids_BS)

    def _decode(self, target_BT: jax.Array, memory: _Memory, ids_BT: jax.Array | None, cache: StateCache | None,
                key: jax.Array | None, embeddings_BTD: jax.Array | None = None) -> Output:
        """Reads the targets."""
        check_token_array(target_BT, target_BT.shape[1] if cache is None else cache.capacity, "the cache")
        check_values(self.embeddings.config, target_BT)
        ids_BT = jnp.ones_like(target_BT) if ids_BT is None else jnp.asarray(ids_BT).astype(jnp.int32)
        y_BTD = constrain(self.embeddings(target_BT, target_BT, embeddings_BTD=embeddings_BTD), "batch", None, None)
        keys = _split(key, self.config.num_layers + 1)
        before_B = None if cache is None else cache.last_segment_B
        states = [None] * self.config.num_layers if cache is None else list(cache.state[1])
        firsts = _at_first_tokens(memory, ids_BT)
        x_BTD, after, trace = dropout(y_BTD, self.config.dropout, keys[0]), [], None
        mean_BTE, upper = None, list(self.decoder)
        if self.attentive is not None and memory.source is not None:
            x_BTD, mean_BTE, scores_BTS, state = self.attentive(x_BTD, ids_BT, memory.source, states[0], before_B,
                                                                firsts[0])
            after.append(state)
            trace = _trace(x_BTD, memory.source, scores_BTS, ids_BT)
        for layer in upper:
            number = len(after)
            if number:
                x_BTD = dropout(x_BTD, self.config.dropout, keys[number])
            (x_BTD, *_), state = cast(RecurrentLayer, layer)(x_BTD, ids_BT, states[number], before_B,
                                                             first=firsts[number])
            after.append(state)
        if self.output is not None and mean_BTE is not None:
            x_BTD = jnp.tanh(self.output(jnp.concatenate([x_BTD, mean_BTE, y_BTD], axis=-1)))
        hidden_BTD = dropout(x_BTD, self.config.dropout, keys[-1])
        return Output(logits=self.unembed(hidden_BTD), hidden=hidden_BTD, trace=cast(PairTrace, trace),
                      cache=None if cache is None else cast(Any, cache.append((memory, tuple(after)), ids_BT)))

    def stacks(self) -> dict[str, Any]:
        """Returns the layers that attend, by the kind of attention.

        Returns:
          ``"cross"``, or nothing if the model has no attention.
        """
        return {"cross": AttentionLayers()} if self.attentive is not None else {}

    def start_cache(self, batch_size: int, capacity: int, source_BS: jax.Array,
                    source_segment_ids_BS: jax.Array | None = None, *, intervene: Any = None) -> StateCache:
        """Reads the sources and creates a cache for decoding their targets.

        Args:
          batch_size: the number of rows B.
          capacity: the number of target tokens that each row has room for.
          source_BS: token ids of the sources.
          source_segment_ids_BS: 1 for source tokens, 0 for padding.
          intervene: must be ``None``.

        Returns:
          The cache: the encoded sources and the state of the decoder.
        """
        check_no_sites(intervene)
        memory = self._encode(source_BS, source_segment_ids_BS, None)
        zeros = tuple(layer.zeros(batch_size, self.config.dtype) for layer in self.backward)
        return StateCache.empty((memory, zeros), batch_size, capacity)

    def step(self, tokens_BT: Int[Array, "B T"], cache: StateCache, *, segment_ids_BT: jax.Array | None = None,
             intervene: Any = None) -> Output:
        """Runs the decoder on the target tokens that follow those in the cache.

        Args:
          tokens_BT: token ids.
          cache: the encoded sources, and the state after the target tokens before these.
          segment_ids_BT: 1 for tokens, 0 for padding; ``None`` means no padding.
          intervene: must be ``None``.

        Returns:
          The output; its ``cache`` includes the new tokens.
        """
        check_no_sites(intervene)
        return self._decode(tokens_BT, cache.state[0], segment_ids_BT, cache, None)

    def unembed(self, hidden_BTD: Float[Array, "*tokens D"]) -> Float[Array, "*tokens V"]:
        """Computes the logits of the decoder's hidden states.

        Args:
          hidden_BTD: the hidden states ``[..., D]``.

        Returns:
          Logits, float32 ``[..., V]``.
        """
        return self.embeddings.unembed(hidden_BTD)

    def for_decoding(self) -> RecurrentPairs:
        """Returns the model itself, which has only one form.

        Returns:
          The same model.
        """
        return self


def _split(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """Returns ``count`` keys, or ``None`` for each."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def _at_first_tokens(memory: _Memory, ids_BT: jax.Array) -> tuple[State, ...]:
    """Returns the states ``[B, T, D]`` with which the segment of each target token starts: those at
    the first token of its source, which the encoder reads last."""
    place_BT1 = jnp.argmax(memory.ids_BS[:, None] == ids_BT[:, :, None], axis=-1)[..., None]
    return tuple(tuple(jnp.take_along_axis(part_BSD, place_BT1, axis=1) for part_BSD in state)
                 for state in memory.finals)


def _trace(x_BTD: jax.Array, source: EncodedSource, scores_BTS: jax.Array, ids_BT: jax.Array) -> PairTrace:
    """Returns a trace whose attention is that of the scores. They are the bias of queries and keys
    that are zero, because additive scores are no products."""
    zeros_BT, zeros_BS = (jnp.zeros((1, *ids.shape, 1, 1), jnp.float32) for ids in (ids_BT, source.ids))
    layers = LayerTrace(residual=x_BTD[None], queries=zeros_BT, keys=zeros_BS, values=source.values[None, :, :, None],
                        head_output=zeros_BT, attention_output=jnp.zeros_like(x_BTD)[None], mlp_output=None, bias=None)
    cross = Trace(layers=layers, final=None, mask=AttentionMask.segments(ids_BT, source.ids),
                  bias=scores_BTS[:, None])
    return PairTrace(encoder=None, decoder=cast(Trace, None), cross=cross)

