"""Attention in plain operations that XLA compiles, with all scores materialized."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from transformer_jax.derivatives import tangent, with_gradient
from transformer_jax.ops.dropout import drop
from transformer_jax.ops.linear import soft_cap
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.sharding import is_sharded

_CAUSAL_BLOCK, _MOST_CAUSAL_BLOCKS = 128, 8


def xla_attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask | None, bias: Any,
               scale: float | None, dropout: float, key: jax.Array | None, precision: Any, cap: float | None,
               sinks_N: jax.Array | None, in_blocks: bool) -> jax.Array:
    """Computes ``transformer_jax.ops.attend`` for arguments that are already checked.

    The other arguments are those of ``attend``.

    Args:
      in_blocks: Whether to split causal self-attention into blocks of queries. A block is not
        multiplied with the keys after it, which saves time on a CPU.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    skips = in_blocks and bias is None and T == S >= 2 * _CAUSAL_BLOCK
    if not skips or mask is None or not mask.is_causal or mask.query_start is not None:
        return _attend(q_BTNH, k_BSKH, v_BSKH, mask, bias, scale, dropout, key, precision, cap, sinks_N)
    size = max(_CAUSAL_BLOCK, -(-T // _MOST_CAUSAL_BLOCKS))
    keys = [None] * -(-T // size) if key is None else jax.random.split(key, -(-T // size))
    blocks = [(start, min(start + size, T)) for start in range(0, T, size)]
    return jnp.concatenate([
        _attend(q_BTNH[:, start:stop], k_BSKH[:, :stop], v_BSKH[:, :stop], mask.block(start, stop), bias, scale,
                dropout, block_key, precision, cap, sinks_N)
        for (start, stop), block_key in zip(blocks, keys, strict=True)], axis=1)


def _attend(q_BTNH, k_BSKH, v_BSKH, mask, bias, scale, dropout, key, precision, cap, sinks_N) -> jax.Array:
    """Computes attention of all queries at once."""
    scores_BKGTS, allowed = masked_scores(q_BTNH, k_BSKH, mask, bias, scale, precision, cap)
    v_BKSH = v_BSKH.swapaxes(1, 2)
    sinks_KG11 = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(*scores_BKGTS.shape[1:3], 1, 1)
    if dropout > 0.0 and key is not None:
        weights_BKGTS = masked_softmax(scores_BKGTS, allowed, sinks_KG11)
        out_BKGTH = _weighted_values(drop(weights_BKGTS, dropout, key), v_BKSH, precision)
    else:
        out_BKGTH = _attend_with_scores(precision, scores_BKGTS, allowed, v_BKSH, sinks_KG11)
    return out_BKGTH.reshape(q_BTNH.shape[0], q_BTNH.shape[2], q_BTNH.shape[1], -1).swapaxes(1, 2)


def masked_scores(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask | None, bias: Any, scale: float | None,
                  precision: Any, cap: float | None = None) -> tuple[jax.Array, jax.Array | None]:
    """Computes the scaled, capped and biased scores, and materializes the mask.

    Returns:
      The scores, float32 ``[B, K, G, T, S]``, and a boolean mask that broadcasts to them, or
      ``None`` if everything is allowed.
    """
    B, T, N, H = q_BTNH.shape
    _, S, K, _ = k_BSKH.shape
    q_BNTH = (q_BTNH * (1.0 / math.sqrt(H) if scale is None else scale)).swapaxes(1, 2)
    scores_BKQS = _query_key(precision, q_BNTH.reshape(B, K, -1, H), k_BSKH.swapaxes(1, 2))
    scores_BKGTS = scores_BKQS.reshape(B, K, N // K, T, S)
    if cap is not None:
        scores_BKGTS = soft_cap(scores_BKGTS, cap)
    if bias is not None:
        bias = bias if isinstance(bias, jax.Array) else bias.materialize(T, S)
        scores_BKGTS += grouped(bias, N, K).astype(jnp.float32)
    allowed = None if mask is None else mask.materialize(T, S)
    return scores_BKGTS, None if allowed is None else grouped(allowed, N, K)


def _query_key(precision: Any, q_BKQH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    """Computes inner products in float32.

    The gradient of the scores is rounded to the type of the queries before it is multiplied.
    """
    def product(q_BKQH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
        return head_product(q_BKQH, k_BKSH, 3, precision, jnp.float32)

    def gradients(args: tuple[jax.Array, jax.Array], kept: tuple,
                  d_scores_BKQS: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_BKQH, k_BKSH = args
        d_scores_BKQS = d_scores_BKQS.astype(q_BKQH.dtype)
        return (head_product(d_scores_BKQS, k_BKSH, 2, precision),
                head_product(d_scores_BKQS, q_BKQH, 2, precision, left_axis=2).astype(k_BKSH.dtype))

    return with_gradient(product, gradients, q_BKQH, k_BKSH)


def grouped(x: jax.Array, num_heads: int, num_kv_heads: int) -> jax.Array:
    """Reshapes an array that broadcasts to ``[B, N, T, S]`` so that it broadcasts to
    ``[B, K, G, T, S]``."""
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    heads = (num_kv_heads, num_heads // num_kv_heads) if x.shape[1] == num_heads > 1 else (1, 1)
    return x.reshape(x.shape[0], *heads, *x.shape[2:])


def head_product(left_BKXY: jax.Array, right_BKSH: jax.Array, axis: int, precision: Any, dtype: Any = None,
                 left_axis: int = 3) -> jax.Array:
    """Multiplies two arrays for each row and head.

    Args:
      left_BKXY: The left operand, whose axis ``left_axis`` is contracted.
      right_BKSH: The right operand, whose axis ``axis`` is contracted.
      axis: 2 or 3.
      precision: The precision of the product, as in ``jax.lax.dot_general``.
      dtype: The type of the result; ``None`` means the type of the operands.
      left_axis: 2 or 3.

    Returns:
      The product, with the remaining axis of the left operand before that of the right one.
    """
    if is_sharded():
        return jax.lax.dot_general(left_BKXY, right_BKSH, (((left_axis,), (axis,)), ((0, 1), (0, 1))),
                                   precision=precision, preferred_element_type=dtype)
    # With one batch axis XLA:CPU updates a decoding cache in place; with two it would copy the
    # cache. On a mesh the two axes must stay separate, because different mesh axes shard B and K.
    B, K = left_BKXY.shape[:2]
    left, right = (x.reshape(B * K, *x.shape[2:]) for x in (left_BKXY, right_BKSH))
    out = jax.lax.dot_general(left, right, (((left_axis - 1,), (axis - 1,)), ((0,), (0,))),
                              precision=precision, preferred_element_type=dtype)
    return out.reshape(B, K, *out.shape[1:])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend_with_scores(precision: Any, scores_BKGTS: jax.Array, allowed: jax.Array | None, v_BKSH: jax.Array,
                        sinks_KG11: jax.Array | None) -> jax.Array:
    """Computes the sum of the values weighted by the softmax of the scores, ``[B, K, G, T, H]``.

    The gradient of the softmax needs, for each row, the sum of weight times gradient. JAX would
    compute it in a pass over ``[T, S]``. It equals the sum over H of output times gradient (Dao et
    al., 2022, section 3.1), which is much less work. The derivative below is written so that its
    transpose, the gradient, has that form.
    """
    return _weighted_values(masked_softmax(scores_BKGTS, allowed, sinks_KG11), v_BKSH, precision)


@_attend_with_scores.defjvp
def _attend_with_scores_tangent(precision, primals, tangents):
    """Computes the value and the derivative of ``_attend_with_scores``."""
    scores_BKGTS, allowed, v_BKSH, sinks_KG11 = primals
    d_scores_BKGTS, _, d_v_BKSH, d_sinks_KG11 = tangents
    weights_BKGTS = masked_softmax(scores_BKGTS, allowed, sinks_KG11)
    out_BKGTH = _weighted_values(weights_BKGTS, v_BKSH, precision)

    def gradients(args, kept, d_out_BKGTH):
        weights_BKGTS, v_BKSH = args
        B, K, G, T, S = weights_BKGTS.shape
        d_out_BKQH = d_out_BKGTH.reshape(B, K, G * T, -1)
        weights_BKQS = weights_BKGTS.reshape(B, K, G * T, S)
        d_v_BKSH = head_product(weights_BKQS.astype(d_out_BKQH.dtype), d_out_BKQH, 2, precision, left_axis=2)
        d_weights_BKQS = head_product(d_out_BKQH, v_BKSH, 3, precision, jnp.float32)
        return d_weights_BKQS.reshape(weights_BKGTS.shape), d_v_BKSH.astype(v_BKSH.dtype)

    weighted_d_scores_BKGTS = weights_BKGTS * d_scores_BKGTS
    d_out_part_BKGTH = tangent(functools.partial(_weighted_values, precision=precision), gradients,
                               (weights_BKGTS, v_BKSH), (weighted_d_scores_BKGTS, d_v_BKSH), out_BKGTH)
    row_sums_BKGT1 = weighted_d_scores_BKGTS.sum(-1, keepdims=True)
    if sinks_KG11 is not None:  # the sink has the weight that the keys do not have
        row_sums_BKGT1 += (1.0 - weights_BKGTS.sum(-1, keepdims=True)) * d_sinks_KG11
    return out_BKGTH, d_out_part_BKGTH - (row_sums_BKGT1 * out_BKGTH.astype(jnp.float32)).astype(out_BKGTH.dtype)


def _weighted_values(weights_BKGTS: jax.Array, v_BKSH: jax.Array, precision: Any) -> jax.Array:
    """Computes the weighted sum of the values, ``[B, K, G, T, H]``."""
    B, K, G, T, S = weights_BKGTS.shape
    out_BKQH = head_product(weights_BKGTS.astype(v_BKSH.dtype).reshape(B, K, G * T, S), v_BKSH, 2, precision)
    return out_BKQH.reshape(B, K, G, T, -1)


def masked_softmax(scores: jax.Array, allowed: jax.Array | None, sinks: jax.Array | None = None) -> jax.Array:
    """Computes the softmax over the last axis.

    Args:
      scores: float32 ``[..., S]``.
      allowed: A boolean mask that broadcasts to the scores; ``None`` allows everything.
      sinks: One more score of each row, whose weight is left out; it broadcasts to ``[..., 1]``.
        ``None``: there is none.

    Returns:
      The weights ``[..., S]``. A row in which nothing is allowed is zero, and so is its gradient.
    """
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    # The largest score is kept finite, so that a row of -inf gives exponentials of 0 and not NaN.
    largest = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(scores.dtype).min)
    largest = jax.lax.stop_gradient(largest if sinks is None else jnp.maximum(largest, sinks))
    exponentials = jnp.exp(scores - largest)
    total = exponentials.sum(-1, keepdims=True)
    total = total if sinks is None else total + jnp.exp(sinks - largest)
    return exponentials / jnp.where(total == 0.0, 1.0, total)
