"""Beam search: the most probable continuations, compiled, without ever copying a cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.decoding.batch import (
    Texts,
    bucket,
    encode_prompts,
    encode_sources,
    ending_ids,
    first_token,
    pad_right,
)
from transformer_jax.decoding.loop import Generator, Sources, read, start
from transformer_jax.decoding.sample import prepared
from transformer_jax.models.encoder_decoder import EncoderDecoder
from transformer_jax.nn.cache import KVCache

_PENALTIES = ("gnmt", "length")
_ROOM_BEYOND_SOURCE = 50


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One result of a search.

    Attributes:
      text: without the end-of-text token; ``None`` without a tokenizer.
      tokens: the new tokens, the one that ends the text included.
      score: ``logprob`` over the length penalty; what hypotheses are ranked by.
      logprob: log P of the tokens under the model.
      finish_reason: ``"eos"``, or ``"length"`` when it was cut off.
    """

    text: str | None
    tokens: list[int]
    score: float
    logprob: float
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """What :func:`beam_search` returns.

    Attributes:
      n_best: for each source, its hypotheses, the best first.
    """

    n_best: list[list[Hypothesis]]

    @property
    def texts(self) -> list[str | None]:
        """The best text of each source."""
        return [hypotheses[0].text for hypotheses in self.n_best]

    @property
    def tokens(self) -> list[list[int]]:
        """The best tokens of each source."""
        return [hypotheses[0].tokens for hypotheses in self.n_best]

    @property
    def scores(self) -> list[float]:
        """The best score of each source."""
        return [hypotheses[0].score for hypotheses in self.n_best]


def beam_search(model: Generator, sources: Texts, *, tokenizer: Tokenizer | None = None, beam_size: int = 4,
                length_penalty: float = 0.6, penalty: str = "gnmt", n_best: int = 1, max_new_tokens: int | None = None,
                start_id: int | None = None, end_ids: Sequence[int] | None = None) -> BeamSearch:
    """Searches the most probable target of every source, or continuation of every prompt of a decoder.

    At each step the ``beam_size`` best extensions of all hypotheses are kept; of these, the ones that end are set
    aside, and the others go on. A search stops as soon as no hypothesis that goes on could still enter the n best:
    log-probabilities only fall, so none can score above what it has, divided by the largest penalty. Hypotheses that
    reach ``max_new_tokens`` are cut off and compete by their scores. A beam of 1 is greedy decoding.

    Source: Wu et al. (2016), GNMT, section 7, for the penalty.

    Args:
      model: an encoder-decoder or a decoder.
      sources: strings (with a tokenizer), which an encoder reads with ``</s>`` after them, or lists of token ids.
      tokenizer: the model's.
      beam_size: hypotheses kept at each step.
      length_penalty: the exponent alpha, 0 or more; 0 ranks by log P, which favours short texts.
      penalty: ``"gnmt"`` divides log P by ((5 + length) / 6)^alpha, ``"length"`` by length^alpha.
      n_best: hypotheses to return, at most ``beam_size``.
      max_new_tokens: by default the longest source's tokens and 50 (Vaswani et al., 2017), as far as the model's
        context goes.
      start_id: the token before the first of a target; by default the tokenizer's ``<s>``. For encoder-decoders.
      end_ids: token ids that end a text; by default the tokenizer's ``</s>`` and ``<|endoftext|>``.

    Raises:
      ValueError: for a setting out of range, a source or prompt that is too long, a token id outside the vocabulary,
        or a model whose attention depends on the distance in the cache (ALiBi, sliding windows).
    """
    config = model.config
    if beam_size < 1 or beam_size > config.vocab_size:
        raise ValueError(f"beam_size={beam_size} must be from 1 to the {config.vocab_size} tokens of the vocabulary")
    if not 1 <= n_best <= beam_size:
        raise ValueError(f"n_best={n_best} must be from 1 to beam_size={beam_size}")
    if not 0 <= length_penalty < np.inf:
        raise ValueError(f"length_penalty={length_penalty} must be 0 (off) or positive")
    if penalty not in _PENALTIES:
        raise ValueError(f"penalty={penalty!r} is not one of {', '.join(_PENALTIES)}")
    if config.positions == "alibi" or config.sliding_window is not None:
        raise ValueError("beam search keeps all hypotheses in one cache, where distances are not those of the text: it "
                         "cannot serve positions='alibi' or sliding_window; use generate")
    encoded_sources: Sources | tuple[()] = ()
    if isinstance(model, EncoderDecoder):
        rows = encode_sources(sources, tokenizer, config.vocab_size)
        encoded_sources = pad_right(rows, config.max_len)
        prompts = [[first_token(start_id, tokenizer, config.vocab_size)]] * len(rows)
    else:
        prompts = rows = encode_prompts(sources, tokenizer, config.vocab_size)
    longest = max(map(len, prompts))
    room = config.max_len - longest
    if max_new_tokens is None:
        max_new_tokens = min(max(map(len, rows)) + _ROOM_BEYOND_SOURCE, room)
    if not 1 <= max_new_tokens <= room:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be from 1 to the {room} that the model's context of "
                         f"{config.max_len} leaves after {longest}")
    width = 1 if longest == 1 else bucket(longest)
    tokens_BP = np.zeros((len(rows), width), np.int32)
    segment_ids_BP = np.zeros_like(tokens_BP)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, width - len(prompt):] = prompt
        segment_ids_BP[row, width - len(prompt):] = 1
    ends_V = np.zeros(config.vocab_size, bool)
    ends_V[list(ending_ids(end_ids, tokenizer))] = True
    found = jax.device_get(_search(prepared(model), tokens_BP, segment_ids_BP, encoded_sources, ends_V,
                                   np.float32(length_penalty), np.int32(max_new_tokens), penalty=penalty,
                                   beam_size=beam_size, n_best=n_best, room=bucket(max_new_tokens)))
    return BeamSearch([[_hypothesis(found, row, rank, ends_V, tokenizer) for rank in range(n_best)]
                       for row in range(len(rows))])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Finished:
    """The best hypotheses that have ended, in order; those that are missing have a score of minus infinity."""

    scores_BK: jax.Array
    logprobs_BK: jax.Array
    tokens_BKT: jax.Array
    lengths_BK: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """The search between two steps.

    Attributes:
      cache: one row a source. A step appends the K hypotheses' last tokens as neighbours; nothing is ever moved.
      visible_BKS: the slots of the cache that hold a hypothesis' own tokens, and its prompt.
      tokens_BKT: new tokens of each hypothesis that goes on.
      logprobs_BK: their log P; minus infinity for none.
      finished: those that ended.
      step: tokens drawn.
    """

    cache: KVCache
    visible_BKS: jax.Array
    tokens_BKT: jax.Array
    logprobs_BK: jax.Array
    finished: _Finished
    step: jax.Array


@functools.partial(jax.jit, static_argnames=("penalty", "beam_size", "n_best", "room"))
def _search(model: Generator, tokens_BP: jax.Array, segment_ids_BP: jax.Array, sources: Sources | tuple[()],
            ends_V: jax.Array, alpha: jax.Array, limit: jax.Array, *, penalty: str, beam_size: int, n_best: int,
            room: int) -> _Finished:
    (B, P), K = tokens_BP.shape, beam_size
    cache = start(model, B, P + K * room, sources)
    prompt_lengths_B1 = segment_ids_BP.sum(1, keepdims=True)

    def divisor(length: jax.Array) -> jax.Array:
        length = length.astype(jnp.float32)
        return (length if penalty == "length" else (5.0 + length) / 6.0) ** alpha

    def extend(state: _State, logits_BKV: jax.Array) -> _State:
        """One more token for each hypothesis."""
        logits_BKV = logits_BKV - jax.nn.logsumexp(logits_BKV, axis=-1, keepdims=True)
        # First the best of each hypothesis, then of all: a search over K * V at once is slower.
        next_BKK, token_BKK = jax.lax.top_k(logits_BKV, K)
        logprobs_BK, place_BK = jax.lax.top_k((state.logprobs_BK[..., None] + next_BKK).reshape(B, K * K), K)
        token_BK = jnp.take_along_axis(token_BKK.reshape(B, K * K), place_BK, axis=1)
        parent_BK1 = (place_BK // K)[..., None]
        step = state.step + 1
        tokens_BKT = jnp.take_along_axis(state.tokens_BKT, parent_BK1, axis=1)
        tokens_BKT = jax.lax.dynamic_update_slice_in_dim(tokens_BKT, token_BK[..., None], state.step, axis=2)
        ends_BK = ends_V[token_BK]
        closed_BK = ends_BK | (step == limit)
        finished = _merge(state.finished, tokens_BKT, jnp.where(closed_BK, logprobs_BK, -jnp.inf), step, divisor(step))
        # The bound: what goes on can only lose log P, and divide it by at most the largest penalty.
        logprobs_BK = jnp.where(closed_BK, -jnp.inf, logprobs_BK)
        hopeless_B1 = (logprobs_BK / divisor(limit)).max(1, keepdims=True) <= finished.scores_BK[:, n_best - 1:n_best]
        own_KS = jnp.arange(P + K * room) == (state.cache.length + jnp.arange(K))[:, None]
        visible_BKS = jnp.take_along_axis(state.visible_BKS, parent_BK1, axis=1) | own_KS
        return _State(cache=state.cache, visible_BKS=visible_BKS, tokens_BKT=tokens_BKT, finished=finished, step=step,
                      logprobs_BK=jnp.where(hopeless_B1, -jnp.inf, logprobs_BK))

    def turn(state: _State) -> _State:
        last_BK = jax.lax.dynamic_index_in_dim(state.tokens_BKT, state.step - 1, axis=2, keepdims=False)
        positions_BK = jnp.broadcast_to(prompt_lengths_B1 + state.step - 1, (B, K))
        out = read(model, last_BK, state.cache, positions_BT=positions_BK, visible_BTS=state.visible_BKS)
        return extend(dataclasses.replace(state, cache=out.cache), out.logits)

    out = read(model, tokens_BP, cache, segment_ids_BT=segment_ids_BP)
    first_BKV = jnp.broadcast_to(model.embeddings.unembed(out.hidden[:, -1:]), (B, K, model.config.vocab_size))
    none_BK = jnp.full((B, K), -jnp.inf)
    tokens_BKT = jnp.zeros((B, K, room), jnp.int32)
    state = _State(
        cache=out.cache, visible_BKS=jnp.broadcast_to((out.cache.segment_ids_BS != 0)[:, None], (B, K, P + K * room)),
        tokens_BKT=tokens_BKT, logprobs_BK=none_BK.at[:, 0].set(0.0), step=jnp.int32(0),
        finished=_Finished(none_BK, none_BK, tokens_BKT, jnp.zeros((B, K), jnp.int32)))
    state = extend(state, first_BKV)
    return jax.lax.while_loop(lambda state: (state.logprobs_BK > -jnp.inf).any(), turn, state).finished


def _merge(finished: _Finished, tokens_BKT: jax.Array, logprobs_BK: jax.Array, length: jax.Array,
           divisor: jax.Array) -> _Finished:
    """The best of what had ended and what ends now; on a tie, of what had."""
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), finished, _Finished(
        logprobs_BK / divisor, logprobs_BK, tokens_BKT, jnp.full(logprobs_BK.shape, length)))
    scores_BK, place_BK = jax.lax.top_k(both.scores_BK, logprobs_BK.shape[1])
    return _Finished(scores_BK, jnp.take_along_axis(both.logprobs_BK, place_BK, axis=1),
                     jnp.take_along_axis(both.tokens_BKT, place_BK[..., None], axis=1),
                     jnp.take_along_axis(both.lengths_BK, place_BK, axis=1))


def _hypothesis(found: _Finished, row: int, rank: int, ends_V: np.ndarray, tokenizer: Tokenizer | None) -> Hypothesis:
    tokens = found.tokens_BKT[row, rank, :found.lengths_BK[row, rank]].tolist()
    ended = bool(tokens) and bool(ends_V[tokens[-1]])
    text = None if tokenizer is None else tokenizer.decode(tokens[:-1] if ended else tokens)
    return Hypothesis(text=text, tokens=tokens, score=float(found.scores_BK[row, rank]),
                      logprob=float(found.logprobs_BK[row, rank]), finish_reason="eos" if ended else "length")
