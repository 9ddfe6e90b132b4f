"""The compiled part of beam search: one cache row a source, in which hypotheses are neighbours and
nothing moves."""

from __future__ import annotations

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.decoding.batch import bucket
from transformer_jax.decoding.loop import Generator, Sources, read, start
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.sites import Intervene

_FIRST_ROOM, _STEPS_AT_A_TIME = 16, 8
_BLOCK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """What ends a hypothesis, what it never holds (``None``: no token), and what hypotheses are
    ranked by."""

    ends_V: jax.Array
    banned_V: jax.Array | None
    alpha: jax.Array
    limit: jax.Array
    penalty: str = dataclasses.field(metadata={"static": True})
    n_best: int = dataclasses.field(metadata={"static": True})

    def divisor(self, length: jax.Array) -> jax.Array:
        """The length penalty that divides log P."""
        length = length.astype(jnp.float32)
        return (length if self.penalty == "length" else (5.0 + length) / 6.0) ** self.alpha


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Finished:
    """The best hypotheses that have ended, in order; those that are missing have a score of minus
    infinity."""

    scores_BK: jax.Array
    logprobs_BK: jax.Array
    tokens_BKT: jax.Array
    lengths_BK: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """The search between two steps.

    Attributes:
      cache: one row a source. A step appends the K hypotheses' last tokens as neighbours; nothing
        is ever moved.
      visible_BKS: the slots of the cache that hold a hypothesis' own tokens, and its prompt.
      positions_B1: tokens of each prompt.
      tokens_BKT: new tokens of each hypothesis that goes on.
      logprobs_BK: their log P; minus infinity for none.
      finished: those that ended.
      step: tokens drawn.
    """

    cache: KVCache
    visible_BKS: jax.Array
    positions_B1: jax.Array
    tokens_BKT: jax.Array
    logprobs_BK: jax.Array
    finished: Finished
    step: jax.Array

    @property
    def goes_on_B(self) -> jax.Array:
        """Sources that have a hypothesis which goes on."""
        return (self.logprobs_BK > -jnp.inf).any(1)


def search(model: Generator, tokens_BP: np.ndarray, segment_ids_BP: np.ndarray, sources: Sources | tuple[()],
            rules: Rules, beam_size: int, intervene: Intervene | None = None) -> list[Finished]:
    """The hypotheses of every source that ended.

    The compiled loop runs a few steps at a time. Between, the cache grows where it is full, and
    once half of the sources are done the others go on without them.
    """
    found: list[Finished | None] = [None] * len(tokens_BP)
    row_sources = list(range(len(found)))  # None where a row only fills up the batch
    room = min(_FIRST_ROOM, bucket(int(rules.limit)))
    state, step = _begin(model, tokens_BP, segment_ids_BP, sources, rules, intervene, beam_size=beam_size,
                         room=room), 1
    while True:
        step = min(step + _STEPS_AT_A_TIME, room)
        state = _advance(model, state, rules, np.int32(step), intervene)
        goes_on_B = np.asarray(state.goes_on_B)
        num_left = int(goes_on_B.sum())
        fewer = len(row_sources) // 2
        if num_left and num_left > fewer and step < room:
            continue
        finished = jax.device_get(state.finished)
        for row, source in enumerate(row_sources):
            if source is not None and not goes_on_B[row]:
                found[source] = jax.tree.map(operator.itemgetter(row), finished)
        if not num_left:
            return found
        rows, is_left = np.arange(len(row_sources)), goes_on_B
        if num_left <= fewer:
            rows, is_left = np.resize(np.flatnonzero(goes_on_B), fewer), np.arange(fewer) < num_left
        row_sources = [row_sources[row] if left else None for row, left in zip(rows, is_left, strict=True)]
        room = min(2 * room, bucket(int(rules.limit))) if step == room else room
        state = _resized(state, rows, is_left, room=room)


@functools.partial(jax.jit, static_argnames=("beam_size", "room"))
def _begin(model: Generator, tokens_BP: jax.Array, segment_ids_BP: jax.Array, sources: Sources | tuple[()],
           rules: Rules, intervene: Intervene | None, *, beam_size: int, room: int) -> _State:
    """Reads sources and prompts, and takes the first token of each hypothesis."""
    (B, P), K = tokens_BP.shape, beam_size
    out = read(model, tokens_BP, start(model, B, P + K * room, sources, intervene),
               segment_ids_BT=segment_ids_BP, intervene=intervene)
    first_BKV = jnp.broadcast_to(model.embeddings.unembed(out.hidden[:, -1:]), (B, K, model.config.vocab_size))
    none_BK = jnp.full((B, K), -jnp.inf)
    tokens_BKT = jnp.zeros((B, K, room), jnp.int32)
    state = _State(
        cache=out.cache, visible_BKS=jnp.broadcast_to((out.cache.segment_ids_BS != 0)[:, None], (B, K, P + K * room)),
        positions_B1=segment_ids_BP.sum(1, keepdims=True), tokens_BKT=tokens_BKT,
        logprobs_BK=none_BK.at[:, 0].set(0.0), step=jnp.int32(0),
        finished=Finished(none_BK, none_BK, tokens_BKT, jnp.zeros((B, K), jnp.int32)))
    return _extend(state, first_BKV, rules)


@functools.partial(jax.jit, donate_argnames="state")
def _advance(model: Generator, state: _State, rules: Rules, until: jax.Array,
             intervene: Intervene | None) -> _State:
    """Searches on until all sources are done, or ``until`` tokens are drawn."""
    def turn(state: _State) -> _State:
        last_BK = jax.lax.dynamic_index_in_dim(state.tokens_BKT, state.step - 1, axis=2, keepdims=False)
        positions_BK = jnp.broadcast_to(state.positions_B1 + state.step - 1, last_BK.shape)
        out = read(model, last_BK, state.cache, positions_BT=positions_BK, visible_BTS=state.visible_BKS,
                   intervene=intervene)
        return _extend(dataclasses.replace(state, cache=out.cache), out.logits, rules)

    return jax.lax.while_loop(lambda state: state.goes_on_B.any() & (state.step < until), turn, state)


def _extend(state: _State, logits_BKV: jax.Array, rules: Rules) -> _State:
    """One more token for each hypothesis."""
    B, K, _ = logits_BKV.shape
    # First the best of each hypothesis, then of all: a search over K * V at once is slower.
    allowed_BKV = logits_BKV if rules.banned_V is None else jnp.where(rules.banned_V, -jnp.inf, logits_BKV)
    next_BKK, token_BKK = _largest(allowed_BKV, K)
    next_BKK = next_BKK - jax.nn.logsumexp(logits_BKV, axis=-1, keepdims=True)
    logprobs_BK, place_BK = jax.lax.top_k((state.logprobs_BK[..., None] + next_BKK).reshape(B, K * K), K)
    token_BK = jnp.take_along_axis(token_BKK.reshape(B, K * K), place_BK, axis=1)
    parent_BK1 = (place_BK // K)[..., None]
    step = state.step + 1
    tokens_BKT = jnp.take_along_axis(state.tokens_BKT, parent_BK1, axis=1)
    tokens_BKT = jax.lax.dynamic_update_slice_in_dim(tokens_BKT, token_BK[..., None], state.step, axis=2)
    closed_BK = rules.ends_V[token_BK] | (step == rules.limit)
    finished = _merge(state.finished, tokens_BKT, jnp.where(closed_BK, logprobs_BK, -jnp.inf), step,
                      rules.divisor(step))
    # The bound: what goes on can only lose log P, and divide it by at most the largest penalty.
    logprobs_BK = jnp.where(closed_BK, -jnp.inf, logprobs_BK)
    best_B1 = (logprobs_BK / rules.divisor(rules.limit)).max(1, keepdims=True)
    hopeless_B1 = best_B1 <= finished.scores_BK[:, rules.n_best - 1:rules.n_best]
    own_KS = jnp.arange(state.visible_BKS.shape[-1]) == (state.cache.length + jnp.arange(K))[:, None]
    visible_BKS = jnp.take_along_axis(state.visible_BKS, parent_BK1, axis=1) | own_KS
    return dataclasses.replace(state, visible_BKS=visible_BKS, tokens_BKT=tokens_BKT, finished=finished, step=step,
                               logprobs_BK=jnp.where(hopeless_B1, -jnp.inf, logprobs_BK))


@functools.partial(jax.jit, static_argnames="room")
def _resized(state: _State, rows_B: jax.Array, goes_on_B: jax.Array, *, room: int) -> _State:
    """The state of some rows, with room for so many tokens."""
    K, old = state.tokens_BKT.shape[1:]

    def longer(x: jax.Array, by: int) -> jax.Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, by)])

    taken = jax.tree.map(lambda x: x[rows_B], dataclasses.replace(state, cache=None, step=None))
    finished = dataclasses.replace(taken.finished, tokens_BKT=longer(taken.finished.tokens_BKT, room - old))
    return dataclasses.replace(
        taken, cache=state.cache.resized(rows_B, K * (room - old)), step=state.step, finished=finished,
        visible_BKS=longer(taken.visible_BKS, K * (room - old)), tokens_BKT=longer(taken.tokens_BKT, room - old),
        logprobs_BK=jnp.where(goes_on_B[:, None], taken.logprobs_BK, -jnp.inf))


def _largest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest entries of the last axis and their places, found in the k blocks with the
    largest maxima."""
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
    """The best of what had ended and what ends now; on a tie, of what had."""
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), finished, Finished(
        logprobs_BK / divisor, logprobs_BK, tokens_BKT, jnp.full(logprobs_BK.shape, length)))
    scores_BK, place_BK = jax.lax.top_k(both.scores_BK, logprobs_BK.shape[1])
    return Finished(scores_BK, jnp.take_along_axis(both.logprobs_BK, place_BK, axis=1),
                     jnp.take_along_axis(both.tokens_BKT, place_BK[..., None], axis=1),
                     jnp.take_along_axis(both.lengths_BK, place_BK, axis=1))
