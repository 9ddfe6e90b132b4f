"""The compiled part of decoding: one pass reads the prompts, and then a loop draws one token at a
time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from transformer_jax.decoding.logits import Settings, apply, sample
from transformer_jax.decoding.mask_table import MaskTable
from transformer_jax.decoding.packed import Generator, PackedModel, unpacked
from transformer_jax.decoding.products import JitByRows
from transformer_jax.decoding.rules import History, Processor
from transformer_jax.models.output import Output
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.sites import Intervene

Ids = Int[Array | np.ndarray, "B T"]
Sources = tuple[Ids, Ids]  # token ids and segment ids [B, S] of an encoder's sources


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All values that the next token depends on.

    Attributes:
      cache: keys and values of all tokens except the last one drawn.
      history_BS: token ids, in the slots of the cache: padding, prompt, new tokens.
      logprobs_BS: log-probability of each new token under the model, before any sampling rule. NaN
        marks logits that are not finite, and plus infinity marks that the sampling rules left no
        token to draw; the row ends there.
      done_B: True for rows that have ended.
      num_new: the number of tokens drawn so far, a scalar.
      keys_B: one PRNG key per row.
    """

    cache: KVCache
    history_BS: Int[Array, "B S"]
    logprobs_BS: Float[Array, "B S"]
    done_B: Bool[Array, " B"]
    num_new: Int[Array, ""]
    keys_B: Key[Array, " B"]


def start(model: Generator, batch_size: int, capacity: int, sources: Sources | tuple[()],
          intervene: Intervene | None = None, **options: Any) -> KVCache:
    """Creates a cache for ``capacity`` tokens a row; an encoder-decoder encodes its sources into
    the cache."""
    start_cache: Callable[..., KVCache] = model.start_cache
    if not sources:
        return start_cache(batch_size, capacity, **options)
    return start_cache(batch_size, capacity, *sources, intervene=intervene, **options)


def read(model: Generator, tokens_BT: Int[Array, "B T"], cache: KVCache, **options: Any) -> tuple[Output, KVCache]:
    """Runs the model on tokens that follow those in the cache, and returns the output and the new
    cache."""
    out = model.step(tokens_BT, cache, **options)
    assert out.cache is not None  # because a cache was passed
    return out, out.cache


@functools.partial(jax.jit, static_argnames="capacity")
def prefill(model: Generator | PackedModel, tokens_BP: Int[Array, "B P"], segment_ids_BP: Int[Array, "B P"],
            keys_B: Key[Array, " B"], num_new: Int[Array, ""], settings: Settings, sources: Sources | tuple[()] = (),
            processors: tuple[Processor, ...] = (), intervene: Intervene | None = None, *,
            capacity: int) -> DecodeState:
    """Reads the sources and the prompts (padded on the left with segment id 0), and draws one token
    per row."""
    model, (B, P) = unpacked(model), tokens_BP.shape
    out, cache = read(model, tokens_BP, start(model, B, capacity, sources, intervene),
                      segment_ids_BT=segment_ids_BP, intervene=intervene)
    state = DecodeState(
        cache=cache, history_BS=jnp.zeros((B, capacity), jnp.int32).at[:, :P].set(tokens_BP),
        logprobs_BS=jnp.zeros((B, capacity), jnp.float32), done_B=jnp.zeros(B, bool), num_new=num_new, keys_B=keys_B)
    return _draw(state, model.unembed(out.hidden[:, -1]), settings, processors)


@functools.partial(JitByRows, donate_argnames="state")
def decode(model: Generator | PackedModel, state: DecodeState, settings: Settings, limit: Int[Array, ""],
           processors: tuple[Processor, ...] = (), intervene: Intervene | None = None,
           masks: tuple[MaskTable, Int[Array, " B"]] | None = None) -> DecodeState:
    """Draws tokens until every row has ended or ``limit`` tokens are drawn. With ``masks``, the
    table and the place of each row in it, it also stops where no mask was guessed."""
    model = unpacked(model)
    table, places_B = (None, None) if masks is None else masks

    def unfinished(carry: tuple[DecodeState, jax.Array | None]) -> jax.Array:
        state, places_B = carry
        goes_on = (state.num_new < limit) & ~state.done_B.all()
        return goes_on if places_B is None else goes_on & (MaskTable.is_known(places_B) | state.done_B).all()

    def step(carry: tuple[DecodeState, jax.Array | None]) -> tuple[DecodeState, jax.Array | None]:
        state, places_B = carry
        last_B1 = jax.lax.dynamic_slice_in_dim(state.history_BS, state.cache.length, 1, axis=1)
        out, cache = read(model, last_B1, state.cache, intervene=intervene)
        state = dataclasses.replace(state, cache=cache)
        if table is None or places_B is None:
            return _draw(state, out.logits[:, -1], settings, processors), None
        state = _draw(state, out.logits[:, -1], settings, (table.rule(places_B), *processors))
        token_B1 = jax.lax.dynamic_slice_in_dim(state.history_BS, cache.length, 1, axis=1)
        places_B = table.after(places_B, token_B1[:, 0])
        return dataclasses.replace(state, done_B=state.done_B | MaskTable.has_ended(places_B)), places_B

    return jax.lax.while_loop(unfinished, step, (state, places_B))[0]


@functools.partial(jax.jit, donate_argnames="state")
def discard(state: DecodeState, num_tokens: Int[Array, ""], done_B: Bool[Array, " B"]) -> DecodeState:
    """Removes the last ``num_tokens`` tokens of every row, which ``decode`` drew. The cache must
    keep all tokens.

    Args:
      state: the state after them.
      num_tokens: their number.
      done_B: True for rows that had ended before.

    Returns:
      The state before them.
    """
    return dataclasses.replace(state, cache=state.cache.without_last(num_tokens), done_B=done_B,
                               num_new=state.num_new - num_tokens)


def _draw(state: DecodeState, logits_BV: jax.Array, settings: Settings,
          processors: tuple[Processor, ...]) -> DecodeState:
    """Draws one token per row into the slot after the cache; rows that have ended get token 0."""
    slot = state.cache.length
    history = History(state.history_BS, state.cache.segment_ids_BS != 0, state.num_new, settings.ends_V)
    token_B, logprob_B = draw(logits_BV, history, state.keys_B, settings, processors)
    token_B = jnp.where(state.done_B, 0, token_B)
    done_B = state.done_B | settings.ends_V[token_B] | ~(logprob_B < jnp.inf)

    def write(into_BS: jax.Array, new_B: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(into_BS, new_B[:, None], slot, axis=1)

    return dataclasses.replace(
        state, history_BS=write(state.history_BS, token_B), logprobs_BS=write(state.logprobs_BS, logprob_B),
        done_B=done_B, num_new=state.num_new + 1)


def draw(logits_BV: jax.Array, history: History, keys_B: Key[Array, " B"], settings: Settings,
         processors: tuple[Processor, ...] = ()) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws one token per row.

    Returns:
      The tokens, and their log-probabilities under the model: NaN for logits that are not finite,
      and plus infinity where the sampling rules left no token to draw.
    """
    processed_BV = logits_BV
    if processors:  # excluded tokens are set to -inf first, so that the rules choose among the others
        processed_BV = apply(processors, jnp.where(settings.excluded_V, -jnp.inf, logits_BV), history)
    token_B, can_draw_B = sample(processed_BV, history, keys_B, settings)
    log_sum_B = jax.nn.logsumexp(logits_BV, axis=-1)
    logprob_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0] - log_sum_B
    return token_B, jnp.where(jnp.isfinite(log_sum_B), jnp.where(can_draw_B, logprob_B, jnp.inf), jnp.nan)
