"""From logits to a token: pure functions whose settings are traced values, so that changing one
compiles nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the defaults sample from the model's own distribution.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_k: keep the k most probable tokens (Fan et al., 2018); 0 keeps all.
      top_p: keep the smallest set with at least this probability (Holtzman et al., 2020).
      min_p: keep tokens at least this fraction as probable as the most probable one (Nguyen et al.,
        2024).
      typical_p: keep the tokens whose surprise is nearest to the entropy (Meister et al., 2023).
      repetition_penalty: divides positive and multiplies negative logits of seen tokens (Keskar et
        al., 2019).
      no_repeat_ngram: never complete an n-gram of this length twice, unless every token would; 0
        allows it.
      min_new_tokens: no end of text before this many.
      banned: token ids never drawn.
      bias: added to the logits of some token ids.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    min_new_tokens: int = 0
    banned: Sequence[int] = ()
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        def require(holds: bool, field: str, expected: str) -> None:
            if not holds:
                raise ValueError(f"{field}={getattr(self, field)} must be {expected}")

        require(self.temperature >= 0 and np.isfinite(self.temperature), "temperature", "0 (greedy) or positive")
        for field in ("top_k", "no_repeat_ngram", "min_new_tokens"):
            value = getattr(self, field)
            require(value >= 0 and value == int(value), field, "a whole number, 0 (off) or positive")
        require(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        require(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        require(0 < self.typical_p <= 1, "typical_p", "in (0, 1]")
        require(0 < self.repetition_penalty < np.inf, "repetition_penalty", "positive (1 changes nothing)")
        require(all(value < np.inf for value in self.bias.values()), "bias", "finite, or minus infinity to ban a token")


# The settings that compiled code reads as scalars; a field of Settings that is missing here is an
# error at once.
_SCALARS = {"temperature": jnp.float32, "top_k": jnp.int32, "top_p": jnp.float32, "min_p": jnp.float32,
            "typical_p": jnp.float32, "repetition_penalty": jnp.float32, "no_repeat_ngram": jnp.int32,
            "min_new_tokens": jnp.int32}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """A :class:`Sampling` as arrays, the form in which compiled code reads it.

    Attributes:
      bias_V: added to every row's logits; minus infinity for banned tokens.
      ends_V: True for tokens that end a text.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array
    repetition_penalty: jax.Array
    no_repeat_ngram: jax.Array
    min_new_tokens: jax.Array
    bias_V: jax.Array
    ends_V: jax.Array

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int, end_ids: Sequence[int] = ()) -> Self:
        """Raises ValueError for a token id outside the vocabulary, or when nothing is left to
        draw."""
        for name, ids in (("banned", sampling.banned), ("bias", sampling.bias), ("end_ids", end_ids)):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise ValueError(f"{name}: token id {token} is outside the vocabulary of {vocab_size}")
        bias_V = np.zeros(vocab_size, np.float32)
        for token, value in sampling.bias.items():
            bias_V[token] = value
        bias_V[list(sampling.banned)] = -np.inf
        ends_V = np.zeros(vocab_size, bool)
        ends_V[list(end_ids)] = True
        if np.isneginf(bias_V[~ends_V] if sampling.min_new_tokens else bias_V).all():
            raise ValueError(f"banned and bias leave none of {vocab_size} tokens to draw"
                             f"{' before min_new_tokens' if sampling.min_new_tokens else ''}; allow at least one")
        scalars = {name: jnp.asarray(getattr(sampling, name), dtype) for name, dtype in _SCALARS.items()}
        return cls(**scalars, bias_V=jnp.asarray(bias_V), ends_V=jnp.asarray(ends_V))


def sample(logits_BV: jax.Array, history_BS: jax.Array, valid_BS: jax.Array, num_new: jax.Array, keys_B: jax.Array,
           settings: Settings) -> jax.Array:
    """The next token of every row, each drawn with its own key.

    Args:
      logits_BV: float32.
      history_BS: the tokens so far, prompt included.
      valid_BS: which slots of the history hold a token.
      num_new: how many tokens were drawn before this one, a scalar; it is folded into the keys.
      keys_B: one PRNG key a row.
      settings: traced.

    Returns:
      token ids ``[B]``.
    """
    logits_BV = restrict(logits_BV, history_BS, valid_BS, num_new, settings)

    def draw(logits_BV: jax.Array) -> jax.Array:
        # The largest logit becomes 0, which no temperature, however small, can make overflow.
        logits_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / settings.temperature
        probabilities_BV = jax.nn.softmax(truncate(logits_BV, settings), axis=-1)
        uniforms_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, num_new)))(keys_B)
        return inverse_cdf(probabilities_BV, uniforms_B)

    return jax.lax.cond(settings.temperature == 0.0, greedy, draw, logits_BV)


def greedy(logits_BV: jax.Array) -> jax.Array:
    """The first index of the maximum, int32 ``[B]``: reductions that vectorise, where argmax does
    not on XLA:CPU."""
    vocab_size = logits_BV.shape[-1]
    largest_B1 = logits_BV.max(-1, keepdims=True)
    return jnp.where(logits_BV == largest_B1, jnp.arange(vocab_size, dtype=jnp.int32), vocab_size - 1).min(-1)


def restrict(logits_BV: jax.Array, history_BS: jax.Array, valid_BS: jax.Array, num_new: jax.Array,
             settings: Settings) -> jax.Array:
    """Logits after everything that depends on the text so far: bias, minimum length, repetition,
    n-grams."""
    logits_BV = logits_BV + settings.bias_V
    too_short = num_new < settings.min_new_tokens
    logits_BV = jnp.where(too_short & settings.ends_V, -jnp.inf, logits_BV)
    logits_BV = _when(settings.repetition_penalty != 1.0, lambda x: penalize_repetition(
        x, history_BS, valid_BS, settings.repetition_penalty), logits_BV)
    return _when(settings.no_repeat_ngram > 0, lambda x: forbid_repeated_ngrams(
        x, history_BS, valid_BS, settings.no_repeat_ngram), logits_BV)


def truncate(logits_BV: jax.Array, settings: Settings) -> jax.Array:
    """Logits with the improbable tokens at minus infinity: top-k, then top-p, min-p and typical-p
    of what is left."""
    logits_BV = _when(settings.top_k > 0, lambda x: top_k(x, settings.top_k), logits_BV)
    logits_BV = _when(settings.top_p < 1.0, lambda x: top_p(x, settings.top_p), logits_BV)
    logits_BV = _when(settings.min_p > 0.0, lambda x: min_p(x, settings.min_p), logits_BV)
    return _when(settings.typical_p < 1.0, lambda x: typical_p(x, settings.typical_p), logits_BV)


def _when(flag: jax.Array, function: Callable[[jax.Array], jax.Array], logits_BV: jax.Array) -> jax.Array:
    return jax.lax.cond(flag, function, lambda x: x, logits_BV)


def top_k(logits_BV: jax.Array, k: jax.Array) -> jax.Array:
    """Keeps the k largest logits (and what ties with the last of them)."""
    k = jnp.minimum(k, logits_BV.shape[-1]).astype(jnp.float32)
    return _keep(logits_BV, logits_BV, jnp.ones_like(logits_BV), k)


def top_p(logits_BV: jax.Array, p: jax.Array) -> jax.Array:
    """Keeps the most probable tokens whose probabilities reach p together (nucleus)."""
    return _keep(logits_BV, logits_BV, jax.nn.softmax(logits_BV, axis=-1), p)


def min_p(logits_BV: jax.Array, p: jax.Array) -> jax.Array:
    """Keeps tokens with at least p times the largest probability."""
    return jnp.where(logits_BV >= logits_BV.max(-1, keepdims=True) + jnp.log(p), logits_BV, -jnp.inf)


def typical_p(logits_BV: jax.Array, p: jax.Array) -> jax.Array:
    """Keeps the tokens with surprise nearest to the entropy whose probabilities reach p
    together."""
    log_p_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    p_BV = jnp.exp(log_p_BV)
    entropy_B1 = -jnp.where(p_BV > 0, p_BV * log_p_BV, 0.0).sum(-1, keepdims=True)
    return _keep(logits_BV, -jnp.abs(-log_p_BV - entropy_B1), p_BV, p)


def _keep(logits_BV: jax.Array, rank_BV: jax.Array, weight_BV: jax.Array, target: jax.Array) -> jax.Array:
    """Keeps the tokens of highest rank whose weights reach the target together, by bisection
    instead of a sort.

    The threshold is found bit by bit on integers that are ordered as the floats are: 32 passes over
    the vocabulary, exact, and far cheaper than sorting it. Ties with the last token kept are kept.
    """
    target = jnp.maximum(target, jnp.finfo(jnp.float32).tiny)  # a target of 0 would be reached by no token at all
    rank_BV = jnp.where(rank_BV == 0.0, 0.0, rank_BV)  # -0 ties with 0, but its bits differ
    bits = jax.lax.bitcast_convert_type(rank_BV.astype(jnp.float32), jnp.int32)
    ordered_BV = jax.lax.bitcast_convert_type(jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31))), jnp.uint32)

    def refine(i: jax.Array, threshold_B1: jax.Array) -> jax.Array:
        candidate_B1 = threshold_B1 | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        reached_B1 = jnp.where(ordered_BV >= candidate_B1, weight_BV, 0.0).sum(-1, keepdims=True) >= target
        return jnp.where(reached_B1, candidate_B1, threshold_B1)

    threshold_B1 = jax.lax.fori_loop(0, 32, refine, jnp.zeros((*rank_BV.shape[:-1], 1), jnp.uint32))
    return jnp.where(ordered_BV >= threshold_B1, logits_BV, -jnp.inf)


def penalize_repetition(logits_BV: jax.Array, history_BS: jax.Array, valid_BS: jax.Array,
                        penalty: jax.Array) -> jax.Array:
    """Divides positive and multiplies negative logits of the tokens in the history by the
    penalty."""
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    seen_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, history_BS].max(valid_BS)
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def forbid_repeated_ngrams(logits_BV: jax.Array, history_BS: jax.Array, valid_BS: jax.Array,
                           n: jax.Array) -> jax.Array:
    """Forbids every token that would complete an n-gram which the history already holds.

    The valid slots of a row are contiguous, so the last valid slot ends its text. A row that would
    be left without any token keeps its logits.
    """
    S = history_BS.shape[1]
    slots_S = jnp.arange(S)
    last_B1 = jnp.where(valid_BS, slots_S, -1).max(-1, keepdims=True)

    def also_equal(back: jax.Array, match_BS: jax.Array) -> jax.Array:
        # Slot j completes a repeat when the `back`-th token before it equals the one before the
        # next token.
        before_BS = jnp.roll(history_BS, back, axis=1)
        before_valid_BS = jnp.roll(valid_BS, back, axis=1) & (slots_S >= back)
        suffix_B1 = jnp.take_along_axis(history_BS, jnp.maximum(last_B1 + 1 - back, 0), axis=1)
        suffix_valid_B1 = jnp.take_along_axis(valid_BS, jnp.maximum(last_B1 + 1 - back, 0), axis=1)
        return match_BS & before_valid_BS & suffix_valid_B1 & (before_BS == suffix_B1) & (last_B1 + 1 >= back)

    repeats_BS = jax.lax.fori_loop(1, jnp.minimum(n, S + 1), also_equal, valid_BS)
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    forbidden_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, history_BS].max(repeats_BS)
    allowed_BV = jnp.where(forbidden_BV, -jnp.inf, logits_BV)
    return jnp.where(jnp.isneginf(allowed_BV).all(-1, keepdims=True), logits_BV, allowed_BV)


def inverse_cdf(probabilities_BV: jax.Array, uniforms_B: jax.Array) -> jax.Array:
    """The first token whose cumulative probability exceeds the uniform draw from [0, 1), int32
    ``[B]``.

    In two levels, over blocks of the vocabulary and then inside one: a running sum over all of it
    is slow.
    """
    batch, vocab_size = probabilities_BV.shape
    width = min(256, vocab_size)
    blocks_BCW = jnp.pad(probabilities_BV, ((0, 0), (0, -vocab_size % width))).reshape(batch, -1, width)
    blocks_BC = blocks_BCW.sum(-1)
    block_ends_BC = jnp.where(blocks_BC > 0, jnp.cumsum(blocks_BC, axis=-1), 0.0)
    draws_B1 = uniforms_B[:, None] * block_ends_BC.max(-1, keepdims=True)
    block_B1 = jnp.argmax(block_ends_BC > draws_B1, axis=-1, keepdims=True)
    inside_BW = jnp.take_along_axis(blocks_BCW, block_B1[..., None], axis=1)[:, 0]
    start_B1 = jnp.take_along_axis(block_ends_BC, block_B1, axis=1) - inside_BW.sum(-1, keepdims=True)
    # Sums in parallel are monotone up to rounding only: blocks and tokens of probability 0 are
    # excluded by name, and the draw is kept below the end of its block.
    ends_BW = jnp.where(inside_BW > 0, start_B1 + jnp.cumsum(inside_BW, axis=-1), -1.0)
    draws_B1 = jnp.minimum(draws_B1, ends_BW.max(-1, keepdims=True) * (1.0 - 2.0**-23))
    return (block_B1[:, 0] * width + jnp.argmax(ends_BW > draws_B1, axis=-1)).astype(jnp.int32)
