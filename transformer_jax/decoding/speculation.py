"""The compiled loop of speculative decoding: guess several tokens, and let the model check them in
one pass.

Every token is drawn by the model's own rule with the random number that plain decoding would use
for it. A guess only saves a pass of the model if it equals the token that is drawn. The texts are
therefore those of plain decoding, up to the rounding of the products (Leviathan et al., 2023, check
guesses by their probabilities instead, which keeps the distribution but not the texts).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from transformer_jax.decoding.logits import Settings
from transformer_jax.decoding.loop import draw, read
from transformer_jax.decoding.products import JitByRows
from transformer_jax.decoding.rules import History, Processor
from transformer_jax.models.decoder import Decoder
from transformer_jax.nn.cache import KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpeculationState:
    """All values that the next tokens depend on. Rows may have different numbers of new tokens.

    Attributes:
      caches: the cache of the model and, if there is one, that of the draft model. They hold all
        tokens of a text except its last one. Slots of wrong guesses have segment id 0.
      text_BS: token ids: padding, prompt, new tokens; without gaps.
      logprobs_BS: log-probability of each new token, as in ``DecodeState``.
      begin_B: the index of the first token of each text.
      end_B: the index after the last token of each text.
      num_new_B: the number of tokens drawn so far in each row.
      done_B: True for rows that have ended.
      num_guessed: the number of tokens that were guessed in all rows.
      num_accepted: the number of guesses that were equal to the token that was drawn.
    """

    caches: tuple[KVCache, ...]
    text_BS: Int[Array, "B S"]
    logprobs_BS: Float[Array, "B S"]
    begin_B: Int[Array, " B"]
    end_B: Int[Array, " B"]
    num_new_B: Int[Array, " B"]
    done_B: Bool[Array, " B"]
    num_guessed: Int[Array, ""]
    num_accepted: Int[Array, ""]

    def last_B1(self) -> jax.Array:
        """Returns the last token of each text."""
        return jnp.take_along_axis(self.text_BS, self.end_B[:, None] - 1, axis=1)


class Guesser(NamedTuple):
    """How tokens are guessed: by a draft model, or without one by looking up the last ``ngram``
    tokens earlier in the text."""

    models: tuple[Decoder, ...]
    num_guesses: int
    ngram: int


@functools.partial(jax.jit, static_argnames="capacity")
def read_texts(models: tuple[Decoder, ...], tokens_BP: Int[Array, "B P"], segment_ids_BP: Int[Array, "B P"], *,
               capacity: int) -> tuple[KVCache, ...]:
    """Reads texts, padded on the left, into a new cache of each model."""
    # A cache that keeps only a window could not forget wrong guesses.
    return tuple(read(model, tokens_BP, model.start_cache(tokens_BP.shape[0], capacity, keeps_all=True),
                      segment_ids_BT=segment_ids_BP)[1] for model in models)


def _rows_of_checks(model: Any, drafts: Any, state: SpeculationState, *_: Any, num_guesses: int, **__: Any) -> int:
    """Returns the number of tokens that the model checks in one pass."""
    return len(state.text_BS) * (num_guesses + 1)


@functools.partial(JitByRows, num_rows=_rows_of_checks, static_argnames=("num_guesses", "ngram"),
                   donate_argnames="state")
def speculate(model: Decoder, drafts: tuple[Decoder, ...], state: SpeculationState, keys_B: Key[Array, " B"],
              settings: Settings, limit: Int[Array, ""], most: Int[Array, ""], processors: tuple[Processor, ...] = (),
              *, num_guesses: int, ngram: int) -> SpeculationState:
    """Draws tokens until each row has ended or has ``limit`` new tokens, or the cache is full.

    A row ends at ``most`` new tokens. The cache has gaps where rows accepted fewer guesses than the
    others, so it may be full early; the caller then reads the texts again.
    """
    guesser = Guesser(drafts, num_guesses, ngram)

    def unfinished(state: SpeculationState) -> jax.Array:
        cache = state.caches[0]
        return (~state.done_B & (state.num_new_B < limit)).any() & (cache.length + num_guesses < cache.capacity)

    def next_round(state: SpeculationState) -> SpeculationState:
        return _round(model, guesser, state, keys_B, settings, most, processors)

    return jax.lax.while_loop(unfinished, next_round, state)


def _round(model: Decoder, guesser: Guesser, state: SpeculationState, keys_B: jax.Array, settings: Settings,
           most: jax.Array, processors: tuple[Processor, ...]) -> SpeculationState:
    """Guesses tokens, lets the model draw at each of their places, and keeps those before the first
    wrong guess, and the token in its place."""
    K = guesser.num_guesses
    rules: Any = functools.partial(_draw_one, settings=settings, processors=processors)
    guesses_BK, caches = _guess(guesser, state, keys_B, rules)
    fed_BT = jnp.concatenate([state.last_B1(), guesses_BK], axis=1)
    logits_BTV, cache = _read_guesses(model, fed_BT, state.caches[0])
    text_BS = _write(state.text_BS, guesses_BK, state.end_B)

    def draw_row(logits_TV: jax.Array, *row: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vmap(rules, (0, None, None, None, None, None, 0))(logits_TV, *row, jnp.arange(K + 1))

    drawn_BT, logprobs_BT = jax.vmap(draw_row)(
        logits_BTV, text_BS, state.begin_B, state.end_B, state.num_new_B, keys_B)
    num_right_B = jnp.cumprod(drawn_BT[:, :K] == guesses_BK, axis=1).sum(1)
    ends_BT = settings.ends_V[drawn_BT] | ~(logprobs_BT < jnp.inf)
    before_end_B = jnp.where(ends_BT.any(1), ends_BT.argmax(1) + 1, K + 1)
    count_B = jnp.minimum(jnp.minimum(num_right_B + 1, before_end_B), most - state.num_new_B)
    count_B = jnp.where(state.done_B, 0, count_B)
    ended_B = (ends_BT & (jnp.arange(K + 1) < count_B[:, None])).any(1)
    num_new_B = state.num_new_B + count_B
    return dataclasses.replace(
        state, caches=tuple(_kept(cache, count_B, K + 1) for cache in (cache, *caches)),
        text_BS=_write(text_BS, drawn_BT, state.end_B), logprobs_BS=_write(state.logprobs_BS, logprobs_BT, state.end_B),
        end_B=state.end_B + count_B, num_new_B=num_new_B, done_B=state.done_B | ended_B | (num_new_B >= most),
        num_guessed=state.num_guessed + K * (~state.done_B).sum(),
        num_accepted=state.num_accepted + jnp.where(state.done_B, 0, jnp.minimum(num_right_B, count_B)).sum())


def _draw_one(logits_V: jax.Array, text_S: jax.Array, begin: jax.Array, end: jax.Array, num_new: jax.Array,
              key: jax.Array, place: jax.Array | int, *, settings: Settings,
              processors: tuple[Processor, ...]) -> tuple[jax.Array, ...]:
    """Draws the token of one row ``place`` tokens after its end, where the text has the guesses."""
    indices_S = jnp.arange(text_S.size)
    valid_S = (begin <= indices_S) & (indices_S < end + place)
    history = History(text_S[None], valid_S[None], num_new + place, settings.ends_V)
    return tuple(drawn_1[0] for drawn_1 in draw(logits_V[None], history, key[None], settings, processors))


def _guess(guesser: Guesser, state: SpeculationState, keys_B: jax.Array,
           rules: Any) -> tuple[jax.Array, tuple[KVCache, ...]]:
    """Returns the guesses ``[B, K]``, and the caches of the draft models with them in it."""
    K = guesser.num_guesses
    if not guesser.models:
        look_up = functools.partial(_look_up, num_guesses=K, ngram=guesser.ngram)
        return jax.vmap(look_up)(state.text_BS, state.begin_B, state.end_B), ()
    draft, = guesser.models

    def step(carry: tuple, place: jax.Array) -> tuple[tuple, jax.Array]:
        text_BS, last_B1, cache = carry
        logits_BTV, cache = _read_guesses(draft, last_B1, cache)
        token_B, _ = jax.vmap(rules, (0, 0, 0, 0, 0, 0, None))(
            logits_BTV[:, 0], text_BS, state.begin_B, state.end_B, state.num_new_B, keys_B, place)
        return (_write(text_BS, token_B[:, None], state.end_B + place), token_B[:, None], cache), token_B

    # The last step only reads the last guess into the cache of the draft model.
    start = (state.text_BS, state.last_B1(), state.caches[1])
    (_, _, cache), guesses_KB = jax.lax.scan(step, start, jnp.arange(K + 1))
    cache = dataclasses.replace(cache, length=state.caches[1].length + K + 1)
    return guesses_KB[:K].T, (cache,)


def _look_up(text_S: jax.Array, begin: jax.Array, end: jax.Array, *, num_guesses: int, ngram: int) -> jax.Array:
    """Returns the tokens ``[K]`` that followed the most similar earlier place of the text: the last
    place with the most equal tokens before it, up to ``ngram``."""
    indices_S = jnp.arange(text_S.size)
    are_equal_S, length_S = jnp.ones(text_S.size, bool), jnp.zeros(text_S.size, jnp.int32)
    for back in range(ngram):
        # Whether the token `back` places before each token equals that before the last one.
        is_inside_S = (indices_S - back >= begin) & (indices_S < end - 1)
        are_equal_S &= is_inside_S & (jnp.roll(text_S, back) == text_S[jnp.maximum(end - 1 - back, 0)])
        length_S += are_equal_S
    found = text_S.size - 1 - jnp.argmax(jnp.flip(length_S))
    # After the end of the text, the guesses repeat its last period.
    period = jnp.where(length_S[found] > 0, end - 1 - found, 1)
    return text_S[end - period + jnp.arange(num_guesses) % period]


def _read_guesses(model: Decoder, tokens_BT: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Runs the model on tokens after those in a cache that may have gaps."""
    # The positions are passed, so that a bias of positions does not count the slots of gaps.
    positions_BT = (cache.segment_ids_BS != 0).sum(1, keepdims=True) + jnp.arange(tokens_BT.shape[1])
    out, cache = read(model, tokens_BT, cache, positions_BT=positions_BT)
    return out.logits, cache


def _kept(cache: KVCache, count_B: jax.Array, num_fed: int) -> KVCache:
    """Keeps the first ``count_B`` of the tokens that were fed last in each row."""
    start, slots_S = cache.length - num_fed, jnp.arange(cache.capacity)
    is_wrong_BS = (slots_S >= start) & (slots_S >= start + count_B[:, None])
    return dataclasses.replace(cache, segment_ids_BS=jnp.where(is_wrong_BS, 0, cache.segment_ids_BS),
                               length=start + count_B.max())


def _write(into_BS: jax.Array, new_BT: jax.Array, start_B: jax.Array) -> jax.Array:
    """Writes new values into each row from its own index on."""
    return jax.vmap(lambda into_S, new_T, start: jax.lax.dynamic_update_slice(into_S, new_T, (start,)))(
        into_BS, new_BT, start_B)
