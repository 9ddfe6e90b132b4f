"""The compiled part of beam search.

Each source has one cache row that holds the tokens of all its hypotheses, so the search never moves
or copies cached values. A mask selects the slots that belong to each hypothesis.
"""

from __future__ import annotations

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from transformer_jax.decoding.batch import bucket
from transformer_jax.decoding.failures import not_finite
from transformer_jax.decoding.loop import Sources, read, start
from transformer_jax.decoding.packed import Generator
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.sites import Intervene

_FIRST_ROOM, _STEPS_AT_A_TIME = 16, 8
_BLOCK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """The settings of a search.

    Attributes:
      ends_V: True for tokens that end a hypothesis.
      banned_V: True for tokens that no hypothesis may contain; ``None`` if there are none.
      alpha: the exponent of the length penalty.
      limit: the largest number of new tokens.
      penalty: ``"gnmt"`` or ``"length"``.
      n_best: the number of hypotheses to return.
    """

    ends_V: Bool[Array | np.ndarray, " V"]
    banned_V: Bool[Array | np.ndarray, " V"] | None
    alpha: Float[Array, ""] | np.float32
    limit: Int[Array, ""] | np.int32
    penalty: str = dataclasses.field(metadata={"static": True})
    n_best: int = dataclasses.field(metadata={"static": True})

    def divisor(self, length: Int[Array, ""] | np.int32) -> Float[Array, ""]:
        """Returns the length penalty, by which the log-probability is divided."""
        number = jnp.float32(length)
        return (number if self.penalty == "length" else (5.0 + number) / 6.0) ** self.alpha


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Finished:
    """The best hypotheses that have ended, the best first; a score of minus infinity marks an empty
    place.

    Attributes:
      scores_BK: log-probabilities divided by the length penalty.
      logprobs_BK: log-probabilities.
      tokens_BKT: new tokens.
      lengths_BK: number of new tokens.
    """

    scores_BK: Float[Array, "B K"]
    logprobs_BK: Float[Array, "B K"]
    tokens_BKT: Int[Array, "B K T"]
    lengths_BK: Int[Array, "B K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """The state of the search between two steps.

    Attributes:
      cache: one row a source. Each step appends the last tokens of the K hypotheses next to each
        other.
      visible_BKS: True for the slots of the cache that hold the prompt or a hypothesis's own
        tokens.
      positions_B1: the number of tokens of each prompt.
      tokens_BKT: new tokens of each unfinished hypothesis.
      logprobs_BK: their log-probabilities; minus infinity marks an empty place.
      finished: the hypotheses that have ended.
      failed_B: True for sources for which the model returned logits that are not finite.
      step: the number of tokens drawn.
    """

    cache: KVCache
    visible_BKS: jax.Array
    positions_B1: jax.Array
    tokens_BKT: jax.Array
    logprobs_BK: jax.Array
    finished: Finished
    failed_B: jax.Array
    step: jax.Array

    @property
    def goes_on_B(self) -> jax.Array:
        """True for sources that have an unfinished hypothesis."""
        return (self.logprobs_BK > -jnp.inf).any(1)


def search(model: Generator, tokens_BP: np.ndarray, segment_ids_BP: np.ndarray, sources: Sources | tuple[()],
            rules: Rules, beam_size: int, intervene: Intervene | None = None) -> list[Finished]:
    """Returns the finished hypotheses of every source.

    The compiled loop runs a few steps at a time. Between these calls, a full cache grows, and once
    half of the sources are done, the remaining ones continue in a smaller batch.
    """
    found: dict[int, Finished] = {}
    row_sources: list[int | None] = list(range(len(tokens_BP)))  # None for a row that only pads the batch
    room = min(_FIRST_ROOM, bucket(int(rules.limit)))
    state = _start_search(model, tokens_BP, segment_ids_BP, sources, rules, intervene, beam_size=beam_size, room=room)
    step = 1
    while True:
        step = min(step + _STEPS_AT_A_TIME, room)
        state = _advance(model, state, rules, np.int32(step), intervene)
        goes_on_B, failed_B = np.asarray(state.goes_on_B), np.asarray(state.failed_B)
        if failed_B.any():
            source = row_sources[int(failed_B.argmax())]
            raise not_finite(model, f"the logits for source {source}, at new token {int(state.step)} or before, are")
        num_unfinished = int(goes_on_B.sum())
        half = len(row_sources) // 2
        if num_unfinished and num_unfinished > half and step < room:
            continue
        finished = jax.device_get(state.finished)
        for row, source in enumerate(row_sources):
            if source is not None and not goes_on_B[row]:
                found[source] = jax.tree.map(operator.itemgetter(row), finished)
        if not num_unfinished:
            return [found[source] for source in range(len(tokens_BP))]
        rows, is_unfinished = np.arange(len(row_sources)), goes_on_B
        if num_unfinished <= half:
            rows, is_unfinished = np.resize(np.flatnonzero(goes_on_B), half), np.arange(half) < num_unfinished
        row_sources = [row_sources[row] if left else None for row, left in zip(rows, is_unfinished, strict=True)]
        room = min(2 * room, bucket(int(rules.limit))) if step == room else room
        state = _resized(state, rows, is_unfinished, room=room)


@functools.partial(jax.jit, static_argnames=("beam_size", "room"))
def _start_search(model: Generator, tokens_BP: jax.Array, segment_ids_BP: jax.Array, sources: Sources | tuple[()],
                  rules: Rules, intervene: Intervene | None, *, beam_size: int, room: int) -> _State:
    """Reads the sources and prompts, and takes the first token of each hypothesis."""
    (B, P), K = tokens_BP.shape, beam_size
    out, cache = read(model, tokens_BP, start(model, B, P + K * room, sources, intervene, keeps_all=True),
                      segment_ids_BT=segment_ids_BP, intervene=intervene)
    first_BKV = jnp.broadcast_to(model.unembed(out.hidden[:, -1:]), (B, K, model.config.vocab_size))
    none_BK = jnp.full((B, K), -jnp.inf)
    tokens_BKT = jnp.zeros((B, K, room), jnp.int32)
    state = _State(
        cache=cache, visible_BKS=jnp.broadcast_to((cache.segment_ids_BS != 0)[:, None], (B, K, P + K * room)),
        positions_B1=segment_ids_BP.sum(1, keepdims=True), tokens_BKT=tokens_BKT,
        logprobs_BK=none_BK.at[:, 0].set(0.0), step=jnp.int32(0), failed_B=jnp.zeros(B, bool),
        finished=Finished(none_BK, none_BK, tokens_BKT, jnp.zeros((B, K), jnp.int32)))
    return _extend(state, first_BKV, rules)


@functools.partial(jax.jit, donate_argnames="state")
def _advance(model: Generator, state: _State, rules: Rules, until: jax.Array,
             intervene: Intervene | None) -> _State:
    """Continues the search until all sources are done or ``until`` tokens are drawn."""
    def step(state: _State) -> _State:
        last_BK = jax.lax.dynamic_index_in_dim(state.tokens_BKT, state.step - 1, axis=2, keepdims=False)
        positions_BK = jnp.broadcast_to(state.positions_B1 + state.step - 1, last_BK.shape)
        out, cache = read(model, last_BK, state.cache, positions_BT=positions_BK, visible_BTS=state.visible_BKS,
                          intervene=intervene)
        return _extend(dataclasses.replace(state, cache=cache), out.logits, rules)

    return jax.lax.while_loop(lambda state: state.goes_on_B.any() & (state.step < until), step, state)


def _extend(state: _State, logits_BKV: jax.Array, rules: Rules) -> _State:
    """Extends each hypothesis by one token, and keeps the best extensions."""
    B, K, _ = logits_BKV.shape
    # Finding the best tokens of each hypothesis first is faster than one search over K * V.
    allowed_BKV = logits_BKV if rules.banned_V is None else jnp.where(rules.banned_V, -jnp.inf, logits_BKV)
    next_BKK, token_BKK = _largest(allowed_BKV, K)
    log_sum_BK1 = jax.nn.logsumexp(logits_BKV, axis=-1, keepdims=True)
    is_finite_BK1 = jnp.isfinite(log_sum_BK1)
    failed_B = ((state.logprobs_BK > -jnp.inf) & ~is_finite_BK1[..., 0]).any(1)
    next_BKK = jnp.where(is_finite_BK1, next_BKK - log_sum_BK1, -jnp.inf)
    logprobs_BK, place_BK = jax.lax.top_k((state.logprobs_BK[..., None] + next_BKK).reshape(B, K * K), K)
    token_BK = jnp.take_along_axis(token_BKK.reshape(B, K * K), place_BK, axis=1)
    parent_BK1 = (place_BK // K)[..., None]
    step = state.step + 1
    tokens_BKT = jnp.take_along_axis(state.tokens_BKT, parent_BK1, axis=1)
    tokens_BKT = jax.lax.dynamic_update_slice_in_dim(tokens_BKT, token_BK[..., None], state.step, axis=2)
    has_ended_BK = rules.ends_V[token_BK] | (step == rules.limit)
    finished = _merge(state.finished, tokens_BKT, jnp.where(has_ended_BK, logprobs_BK, -jnp.inf), step,
                      rules.divisor(step))
    # No hypothesis can end with a better score than this bound: its log-probability can only fall,
    # and the divisor is at most the largest length penalty.
    logprobs_BK = jnp.where(has_ended_BK, -jnp.inf, logprobs_BK)
    bound_B1 = (logprobs_BK / rules.divisor(rules.limit)).max(1, keepdims=True)
    is_decided_B1 = bound_B1 <= finished.scores_BK[:, rules.n_best - 1:rules.n_best]
    new_slots_KS = jnp.arange(state.visible_BKS.shape[-1]) == (state.cache.length + jnp.arange(K))[:, None]
    visible_BKS = jnp.take_along_axis(state.visible_BKS, parent_BK1, axis=1) | new_slots_KS
    return dataclasses.replace(state, visible_BKS=visible_BKS, tokens_BKT=tokens_BKT, finished=finished, step=step,
                               failed_B=state.failed_B | failed_B,
                               logprobs_BK=jnp.where(is_decided_B1, -jnp.inf, logprobs_BK))


@functools.partial(jax.jit, static_argnames="room")
def _resized(state: _State, rows_B: jax.Array, goes_on_B: jax.Array, *, room: int) -> _State:
    """Returns the state of the selected rows, with room for ``room`` new tokens."""
    K, old = state.tokens_BKT.shape[1:]

    def pad_last_axis(x: jax.Array, by: int) -> jax.Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, by)])

    selected = jax.tree.map(lambda x: x[rows_B], dataclasses.replace(state, cache=None, step=None))
    finished = dataclasses.replace(
        selected.finished, tokens_BKT=pad_last_axis(selected.finished.tokens_BKT, room - old))
    return dataclasses.replace(
        selected, cache=state.cache.resized(rows_B, K * (room - old)), step=state.step, finished=finished,
        visible_BKS=pad_last_axis(selected.visible_BKS, K * (room - old)),
        tokens_BKT=pad_last_axis(selected.tokens_BKT, room - old),
        logprobs_BK=jnp.where(goes_on_B[:, None], selected.logprobs_BK, -jnp.inf))


def _largest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest entries of the last axis and their indices.

    Only the k blocks with the largest maxima are searched, because the k largest entries lie in
    these.
    """
    size = x.shape[-1]
    if size < _BLOCK * 2 * k:
        return jax.lax.top_k(x, k)
    blocks = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -size % _BLOCK)], constant_values=-jnp.inf)
    blocks = blocks.reshape(*x.shape[:-1], -1, _BLOCK)
    block = jax.lax.top_k(blocks.max(-1), k)[1]
    inside = jnp.take_along_axis(blocks, block[..., None], axis=-2).reshape(*x.shape[:-1], k * _BLOCK)
    values, place = jax.lax.top_k(inside, k)
    return values, jnp.take_along_axis(block, place // _BLOCK, axis=-1) * _BLOCK + place % _BLOCK


def _merge(finished: Finished, tokens_BKT: jax.Array, logprobs_BK: jax.Array, length: jax.Array,
           divisor: jax.Array) -> Finished:
    """Returns the best of the earlier and the new finished hypotheses; of equal ones, the earlier
    is kept."""
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), finished, Finished(
        logprobs_BK / divisor, logprobs_BK, tokens_BKT, jnp.full(logprobs_BK.shape, length)))
    scores_BK, place_BK = jax.lax.top_k(both.scores_BK, logprobs_BK.shape[1])
    return Finished(scores_BK, jnp.take_along_axis(both.logprobs_BK, place_BK, axis=1),
                     jnp.take_along_axis(both.tokens_BKT, place_BK[..., None], axis=1),
                     jnp.take_along_axis(both.lengths_BK, place_BK, axis=1))
