"""Attention written out, for the compiler to arrange: every score of a head is held."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from transformer_jax.ops.dropout import drop
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.sharding import is_divided

_CAUSAL_BLOCK, _MOST_CAUSAL_BLOCKS = 128, 8


def xla_attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask | None, bias: Any,
               scale: float | None, dropout: float, key: jax.Array | None, precision: Any,
               in_blocks: bool) -> jax.Array:
    """:func:`transformer_jax.ops.attend` of arguments that are checked.

    Args:
      in_blocks: cut causal self-attention into blocks of queries, so that the keys after a block
        are not multiplied at all; pays on a CPU.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    skips = in_blocks and mask is not None and mask.is_causal and mask.query_start is None and bias is None
    if not (skips and T == S >= 2 * _CAUSAL_BLOCK):
        return _attend(q_BTNH, k_BSKH, v_BSKH, mask, bias, scale, dropout, key, precision)
    size = max(_CAUSAL_BLOCK, -(-T // _MOST_CAUSAL_BLOCKS))
    keys = [None] * -(-T // size) if key is None else jax.random.split(key, -(-T // size))
    blocks = [(start, min(start + size, T)) for start in range(0, T, size)]
    return jnp.concatenate([
        _attend(q_BTNH[:, start:stop], k_BSKH[:, :stop], v_BSKH[:, :stop], mask.block(start, stop), bias, scale,
                dropout, block_key, precision) for (start, stop), block_key in zip(blocks, keys, strict=True)], axis=1)


def _attend(q_BTNH, k_BSKH, v_BSKH, mask, bias, scale, dropout, key, precision) -> jax.Array:
    scores_BKGTS, allowed = masked_scores(q_BTNH, k_BSKH, mask, bias, scale, precision)
    v_BKSH = v_BSKH.swapaxes(1, 2)
    if dropout > 0.0 and key is not None:
        weights_BKGTS = masked_softmax(scores_BKGTS, allowed)
        out_BKGTH = _mix_values(drop(weights_BKGTS, dropout, key), v_BKSH, precision)
    else:
        out_BKGTH = _softmax_mix(precision, scores_BKGTS, allowed, v_BKSH)
    return out_BKGTH.reshape(q_BTNH.shape[0], q_BTNH.shape[2], q_BTNH.shape[1], -1).swapaxes(1, 2)


def masked_scores(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask | None, bias: Any, scale: float | None,
                  precision: Any) -> tuple[jax.Array, jax.Array | None]:
    """Scaled and biased scores ``[B, K, G, T, S]`` in float32, and the mask that broadcasts to
    them."""
    B, T, N, H = q_BTNH.shape
    _, S, K, _ = k_BSKH.shape
    q_BNTH = (q_BTNH * (1.0 / math.sqrt(H) if scale is None else scale)).swapaxes(1, 2)
    scores_BKQS = _query_key(precision, q_BNTH.reshape(B, K, -1, H), k_BSKH.swapaxes(1, 2))
    scores_BKGTS = scores_BKQS.reshape(B, K, N // K, T, S)
    if bias is not None:
        bias = bias if isinstance(bias, jax.Array) else bias.materialize(T, S)
        scores_BKGTS += grouped(bias, N, K).astype(jnp.float32)
    allowed = None if mask is None else mask.materialize(T, S)
    return scores_BKGTS, None if allowed is None else grouped(allowed, N, K)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _query_key(precision: Any, q_BKQH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    """Inner products in float32, whose gradient is rounded to the type of the queries before it is
    multiplied."""
    return head_product(q_BKQH, k_BKSH, 3, precision, jnp.float32)


def _query_key_backward(precision, saved, d_scores_BKQS):
    q_BKQH, k_BKSH = saved
    d_scores_BKQS = d_scores_BKQS.astype(q_BKQH.dtype)
    return (head_product(d_scores_BKQS, k_BKSH, 2, precision),
            head_product(d_scores_BKQS, q_BKQH, 2, precision, left_axis=2).astype(k_BKSH.dtype))


_query_key.defvjp(lambda precision, q_BKQH, k_BKSH: (_query_key(precision, q_BKQH, k_BKSH), (q_BKQH, k_BKSH)),
                  _query_key_backward)


def grouped(x: jax.Array, num_heads: int, num_kv_heads: int) -> jax.Array:
    """What broadcasts to ``[B, N, T, S]`` as what broadcasts to ``[B, K, G, T, S]``."""
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    heads = (num_kv_heads, num_heads // num_kv_heads) if x.shape[1] == num_heads > 1 else (1, 1)
    return x.reshape(x.shape[0], *heads, *x.shape[2:])


def head_product(left_BKXY: jax.Array, right_BKSH: jax.Array, axis: int, precision: Any, dtype: Any = None,
                 left_axis: int = 3) -> jax.Array:
    """Contracts an axis on the left (the last) with the given one on the right, head by head."""
    if is_divided():
        return jax.lax.dot_general(left_BKXY, right_BKSH, (((left_axis,), (axis,)), ((0, 1), (0, 1))),
                                   precision=precision, preferred_element_type=dtype)
    # One batch axis instead of two: XLA:CPU then updates a decoding cache in place, where it would
    # copy it. Not over a mesh, whose axes divide B and K separately.
    B, K = left_BKXY.shape[:2]
    left, right = (x.reshape(B * K, *x.shape[2:]) for x in (left_BKXY, right_BKSH))
    out = jax.lax.dot_general(left, right, (((left_axis - 1,), (axis - 1,)), ((0,), (0,))),
                              precision=precision, preferred_element_type=dtype)
    return out.reshape(B, K, *out.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax_mix(precision: Any, scores_BKGTS: jax.Array, allowed: jax.Array | None, v_BKSH: jax.Array) -> jax.Array:
    """The values mixed by the softmax of the scores, ``[B, K, G, T, H]``.

    The gradient of the softmax needs each row's sum of weight times gradient. Derived by JAX that
    is a pass over ``[T, S]``; it equals output times gradient summed over H (Dao et al., 2022,
    section 3.1), which is used here.
    """
    return _mix_values(masked_softmax(scores_BKGTS, allowed), v_BKSH, precision)


def _softmax_mix_forward(precision, scores_BKGTS, allowed, v_BKSH):
    weights_BKGTS = masked_softmax(scores_BKGTS, allowed)
    out_BKGTH = _mix_values(weights_BKGTS, v_BKSH, precision)
    return out_BKGTH, (weights_BKGTS, v_BKSH, out_BKGTH)


def _softmax_mix_backward(precision, saved, d_out_BKGTH):
    weights_BKGTS, v_BKSH, out_BKGTH = saved
    B, K, G, T, S = weights_BKGTS.shape
    d_out_BKQH = d_out_BKGTH.reshape(B, K, G * T, -1)
    weights_BKQS = weights_BKGTS.reshape(B, K, G * T, S)
    d_v_BKSH = head_product(weights_BKQS.astype(d_out_BKQH.dtype), d_out_BKQH, 2, precision, left_axis=2)
    d_weights_BKGTS = head_product(d_out_BKQH, v_BKSH, 3, precision, jnp.float32).reshape(weights_BKGTS.shape)
    row_sums_BKGT1 = (d_out_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)).sum(-1, keepdims=True)
    return weights_BKGTS * (d_weights_BKGTS - row_sums_BKGT1), None, d_v_BKSH.astype(v_BKSH.dtype)


_softmax_mix.defvjp(_softmax_mix_forward, _softmax_mix_backward)


def _mix_values(weights_BKGTS: jax.Array, v_BKSH: jax.Array, precision: Any) -> jax.Array:
    B, K, G, T, S = weights_BKGTS.shape
    out_BKQH = head_product(weights_BKGTS.astype(v_BKSH.dtype).reshape(B, K, G * T, S), v_BKSH, 2, precision)
    return out_BKQH.reshape(B, K, G, T, -1)


def masked_softmax(scores: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """Softmax over the last axis; a row with nothing allowed is zero and has zero (finite)
    gradients."""
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    # A finite largest score even of a row of -inf, whose exponentials are then 0 and not NaN.
    largest = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(scores.dtype).min)
    exponentials = jnp.exp(scores - jax.lax.stop_gradient(largest))
    total = exponentials.sum(-1, keepdims=True)
    return exponentials / jnp.where(total == 0.0, 1.0, total)


