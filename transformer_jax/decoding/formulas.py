"""Formulas for choosing the next token: pure functions of logits, whose parameters may be
traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

Logits = Float[Array, "B V"]
Tokens = Int32[Array, " B"]
Slots = Int[Array | np.ndarray, "B S"]
ValidSlots = Bool[Array | np.ndarray, "B S"]
# One number for all rows, or one for each row [B, 1].
Number = Float[Array, "..."] | Int[Array, "..."] | float


def greedy(logits_BV: Logits) -> Tokens:
    """Returns the most probable token; on a tie, the one with the smallest id.

    Args:
      logits_BV: logits, ``[B, V]``.

    Returns:
      Token ids, int32 ``[B]``.
    """
    return first_largest(logits_BV, logits_BV.max(-1, keepdims=True))


def first_largest(logits_BV: Logits, largest_B1: Float[Array, "B 1"]) -> Tokens:
    """Returns the first index of the maximum ``largest_B1``, which the caller has computed.

    XLA on CPU vectorizes these reductions, but not argmax.
    """
    vocab_size = logits_BV.shape[-1]
    return jnp.where(logits_BV == largest_B1, jnp.arange(vocab_size, dtype=jnp.int32), vocab_size - 1).min(-1)


def top_k(logits_BV: Logits, k: Number) -> Float[Array, "... V"]:
    """Keeps the k largest logits, and those that are equal to the last of these.

    Args:
      logits_BV: logits, ``[B, V]``.
      k: how many logits to keep, at least 1.

    Returns:
      Logits, ``[B, V]``, with minus infinity for the other tokens.
    """
    k = jnp.minimum(k, logits_BV.shape[-1]).astype(jnp.float32)
    return _keep(logits_BV, logits_BV, jnp.ones_like(logits_BV), k)


def top_p(logits_BV: Logits, p: Number) -> Float[Array, "... V"]:
    """Keeps the most probable tokens, as many as needed for a total probability of p (nucleus
    sampling).

    Args:
      logits_BV: logits, ``[B, V]``.
      p: the total probability, from 0 to 1.

    Returns:
      Logits, ``[B, V]``, with minus infinity for the other tokens.
    """
    return _keep(logits_BV, logits_BV, jax.nn.softmax(logits_BV, axis=-1), p)


def min_p(logits_BV: Logits, p: Number) -> Array:
    """Keeps the tokens whose probability is at least p times the largest probability.

    Args:
      logits_BV: logits, ``[B, V]``.
      p: the fraction of the largest probability, from 0 to 1.

    Returns:
      Logits, ``[B, V]``, with minus infinity for the other tokens.
    """
    return jnp.where(logits_BV >= logits_BV.max(-1, keepdims=True) + jnp.log(p), logits_BV, -jnp.inf)


def typical_p(logits_BV: Logits, p: Number) -> Float[Array, "... V"]:
    """Keeps the tokens whose surprise is nearest to the entropy, as many as needed for a total
    probability of p.

    The surprise of a token is its negative log-probability.

    Args:
      logits_BV: logits, ``[B, V]``.
      p: the total probability, from 0 to 1.

    Returns:
      Logits, ``[B, V]``, with minus infinity for the other tokens.
    """
    log_p_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    p_BV = jnp.exp(log_p_BV)
    entropy_B1 = -jnp.where(p_BV > 0, p_BV * log_p_BV, 0.0).sum(-1, keepdims=True)
    return _keep(logits_BV, -jnp.abs(-log_p_BV - entropy_B1), p_BV, p)


def _keep(logits_BV: Logits, rank_BV: Logits, weight_BV: Logits, target: Number) -> Array:
    """Keeps the tokens of highest rank, as many as needed for their weights to reach the target.

    The threshold is found by bisection instead of a sort: bit by bit, on integers that have the
    same order as the floats. This takes 32 passes over the vocabulary, is exact, and is much faster
    than sorting. Tokens that tie with the last one kept are kept too.
    """
    target = jnp.maximum(target, jnp.finfo(jnp.float32).tiny)  # so that at least one token is kept
    rank_BV = jnp.where(rank_BV == 0.0, 0.0, rank_BV)  # -0.0 equals 0.0, but its bits differ
    bits = jax.lax.bitcast_convert_type(rank_BV.astype(jnp.float32), jnp.int32)
    ordered_BV = jax.lax.bitcast_convert_type(jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31))), jnp.uint32)

    def refine(i: jax.Array, threshold_B1: jax.Array) -> jax.Array:
        candidate_B1 = threshold_B1 | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        reached_B1 = jnp.where(ordered_BV >= candidate_B1, weight_BV, 0.0).sum(-1, keepdims=True) >= target
        return jnp.where(reached_B1, candidate_B1, threshold_B1)

    threshold_B1 = jax.lax.fori_loop(0, 32, refine, jnp.zeros((*rank_BV.shape[:-1], 1), jnp.uint32))
    return jnp.where(ordered_BV >= threshold_B1, logits_BV, -jnp.inf)


def penalize_repetition(logits_BV: Logits, history_BS: Slots, valid_BS: ValidSlots, penalty: Number) -> Array:
    """Divides positive logits, and multiplies negative logits, of the tokens in the history by the
    penalty."""
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    occurs_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, history_BS].max(valid_BS)
    return jnp.where(occurs_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def occurrences(logits_BV: Logits, history_BS: Slots, valid_BS: ValidSlots, num_new: Number) -> Array:
    """Counts how often each token occurs among the newest ``num_new`` tokens of each row, float32
    ``[B, V]``.

    Args:
      logits_BV: logits, whose shape is that of the result.
      history_BS: token ids.
      valid_BS: True for slots that hold a token of the row's text; these slots are contiguous.
      num_new: how many tokens at the end of each text are counted, one number or ``[B, 1]``.
    """
    newest_BS = valid_BS & (jnp.cumsum(valid_BS[:, ::-1], axis=1)[:, ::-1] <= num_new)
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return jnp.zeros(logits_BV.shape, jnp.float32).at[rows_B1, history_BS].add(newest_BS.astype(jnp.float32))


def forbid_repeated_ngrams(logits_BV: Logits, history_BS: Slots, valid_BS: ValidSlots, n: Number) -> Array:
    """Forbids every token that would complete an n-gram that the history already contains.

    The valid slots of a row are contiguous, so the text of the row ends at its last valid slot. If
    no token would remain for a row, its logits are not changed.
    """
    S = history_BS.shape[1]
    slots_S = jnp.arange(S)
    last_B1 = jnp.where(valid_BS, slots_S, -1).max(-1, keepdims=True)

    def also_equal(back: jax.Array, match_BS: jax.Array) -> jax.Array:
        # The token in slot j would complete a repeated n-gram only if, for each `back` below n, the
        # token `back` slots before slot j equals the one `back` slots before the next token.
        before_BS = jnp.roll(history_BS, back, axis=1)
        before_valid_BS = jnp.roll(valid_BS, back, axis=1) & (slots_S >= back)
        suffix_B1 = jnp.take_along_axis(history_BS, jnp.maximum(last_B1 + 1 - back, 0), axis=1)
        suffix_valid_B1 = jnp.take_along_axis(valid_BS, jnp.maximum(last_B1 + 1 - back, 0), axis=1)
        equal_BS = before_valid_BS & suffix_valid_B1 & (before_BS == suffix_B1) & (last_B1 + 1 >= back)
        return match_BS & (equal_BS | (back >= n))  # n may differ from row to row

    repeats_BS = jax.lax.fori_loop(1, jnp.minimum(jnp.max(n), S + 1), also_equal, valid_BS)
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    forbidden_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, history_BS].max(repeats_BS)
    allowed_BV = jnp.where(forbidden_BV, -jnp.inf, logits_BV)
    return jnp.where(jnp.isneginf(allowed_BV).all(-1, keepdims=True), logits_BV, allowed_BV)


def inverse_cdf(probabilities_BV: Logits, uniforms_B: Float[Array | np.ndarray, " B"]) -> Tokens:
    """Returns the first token whose cumulative probability exceeds the uniform draw from [0, 1),
    int32 ``[B]``.

    The search has two levels, first over blocks of the vocabulary and then inside one block,
    because a cumulative sum over the whole vocabulary is slow.
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
    # A parallel cumulative sum is monotone only up to rounding errors. Blocks and tokens of
    # probability 0 are therefore excluded explicitly, and the draw is kept below the block's end.
    ends_BW = jnp.where(inside_BW > 0, start_B1 + jnp.cumsum(inside_BW, axis=-1), -1.0)
    draws_B1 = jnp.minimum(draws_B1, ends_BW.max(-1, keepdims=True) * (1.0 - 2.0**-23))
    return (block_B1[:, 0] * width + jnp.argmax(ends_BW > draws_B1, axis=-1)).astype(jnp.int32)
