"""The compiled part of decoding: read the prompts once, then one token a turn of a while loop."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from transformer_jax.decoding.logits import Settings, sample
from transformer_jax.decoding.rules import History, Processor
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.encoder_decoder import EncoderDecoder
from transformer_jax.models.output import Output
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.sites import Intervene

Generator = Decoder | EncoderDecoder
Sources = tuple[jax.Array, jax.Array]  # token ids and segment ids [B, S] for an encoder; () where there is none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything the next token depends on.

    Attributes:
      cache: of all tokens but the last drawn.
      history_BS: token ids slot by slot, as in the cache: padding, prompt, new tokens.
      logprobs_BS: log P of each new token under the model, before any sampling setting.
      done_B: rows that have ended.
      num_new: tokens drawn so far, a scalar.
      keys_B: one PRNG key a row.
    """

    cache: KVCache
    history_BS: jax.Array
    logprobs_BS: jax.Array
    done_B: jax.Array
    num_new: jax.Array
    keys_B: jax.Array


def start(model: Generator, batch_size: int, capacity: int, sources: Sources | tuple[()],
          intervene: Intervene | None = None) -> KVCache:
    """A cache for ``capacity`` tokens a row; an encoder reads its sources into it."""
    if not sources:
        return model.start_cache(batch_size, capacity)
    return model.start_cache(batch_size, capacity, *sources, intervene=intervene)


def read(model: Generator, tokens_BT: jax.Array, cache: KVCache, **options: jax.Array | Intervene | None) -> Output:
    """The model's output for tokens after those in the cache."""
    return model.step(tokens_BT, cache, **options)


@functools.partial(jax.jit, static_argnames="capacity")
def prefill(model: Generator, tokens_BP: jax.Array, segment_ids_BP: jax.Array, keys_B: jax.Array, num_new: jax.Array,
            settings: Settings, sources: Sources | tuple[()] = (), processors: tuple[Processor, ...] = (),
            intervene: Intervene | None = None, *, capacity: int) -> DecodeState:
    """Reads sources and prompts (padded on the left with segment id 0) and draws one token of every
    row."""
    B, P = tokens_BP.shape
    out = read(model, tokens_BP, start(model, B, capacity, sources, intervene),
               segment_ids_BT=segment_ids_BP, intervene=intervene)
    state = DecodeState(
        cache=out.cache, history_BS=jnp.zeros((B, capacity), jnp.int32).at[:, :P].set(tokens_BP),
        logprobs_BS=jnp.zeros((B, capacity), jnp.float32), done_B=jnp.zeros(B, bool), num_new=num_new, keys_B=keys_B)
    return _draw(state, model.embeddings.unembed(out.hidden[:, -1]), settings, processors)


@functools.partial(jax.jit, donate_argnames="state")
def decode(model: Generator, state: DecodeState, settings: Settings, limit: jax.Array,
           processors: tuple[Processor, ...] = (), intervene: Intervene | None = None) -> DecodeState:
    """Draws tokens until every row has ended or ``limit`` of them are drawn."""
    def unfinished(state: DecodeState) -> jax.Array:
        return (state.num_new < limit) & ~state.done_B.all()

    def turn(state: DecodeState) -> DecodeState:
        last_B1 = jax.lax.dynamic_slice_in_dim(state.history_BS, state.cache.length, 1, axis=1)
        out = read(model, last_B1, state.cache, intervene=intervene)
        return _draw(dataclasses.replace(state, cache=out.cache), out.logits[:, -1], settings, processors)

    return jax.lax.while_loop(unfinished, turn, state)


def _draw(state: DecodeState, logits_BV: jax.Array, settings: Settings,
          processors: tuple[Processor, ...]) -> DecodeState:
    """Draws one token of every row into the slot after the cache; rows that have ended draw token
    0."""
    slot = state.cache.length
    valid_BS = state.cache.segment_ids_BS != 0
    ruled_BV = logits_BV
    for rule in processors:
        ruled_BV = rule(ruled_BV, History(state.history_BS, valid_BS, state.num_new))
    token_B = sample(ruled_BV, state.history_BS, valid_BS, state.num_new, state.keys_B, settings)
    token_B = jnp.where(state.done_B, 0, token_B)
    logprob_B = (jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
                 - jax.nn.logsumexp(logits_BV, axis=-1))

    def write(into_BS: jax.Array, new_B: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(into_BS, new_B[:, None], slot, axis=1)

    return dataclasses.replace(
        state, history_BS=write(state.history_BS, token_B), logprobs_BS=write(state.logprobs_BS, logprob_B),
        done_B=state.done_B | settings.ends_V[token_B], num_new=state.num_new + 1)
