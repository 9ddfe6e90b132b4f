"""Attention in memory linear in the length: forward and backward compute the softmax in blocks.

Source: Milakov and Gimelshein (2018) for the running softmax; Rabe and Staats (2021); Dao et al.
  (2022) for the gradient.

In the names of axes, X counts blocks of queries, R is the number of queries of a block, C is the
number of keys of a block, and Q = G * R are the queries of all G heads that share a key head.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp

from transformer_jax.derivatives import with_gradient
from transformer_jax.ops.attention_blocks import (
    Settings,
    add_to_block,
    from_row_blocks,
    key_block,
    padded_to_blocks,
    row_blocks,
    sinks_of_block,
)
from transformer_jax.ops.dropout import drop
from transformer_jax.ops.linear import soft_cap
from transformer_jax.ops.masks import AttentionMask, take
from transformer_jax.ops.xla_attention import grouped, head_product, masked_softmax

# The number of iterations of the loops over blocks depends on the mask. JAX cannot differentiate
# such a loop in reverse mode, so there is no gradient of the gradient.
_ONE_GRADIENT = (
    "a gradient of a derivative cannot be taken through the 'chunked' implementation of attention; take the derivative "
    "of the gradient instead, jax.jvp of jax.grad, or set attention_implementation='xla' (implementation='xla' of "
    "tj.ops.attend)")
Number = jax.Array | int
_KEYS, _MOST_QUERIES, _SCORES_AT_A_TIME = 512, 512, 1 << 24


def chunked_attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask | None, bias: Any,
                   scale: float | None, dropout: float, key: jax.Array | None, precision: Any, cap: float | None,
                   sinks_N: jax.Array | None) -> jax.Array:
    """Computes ``transformer_jax.ops.attend`` for arguments that are already checked.

    A block of keys is skipped if a causal mask or a window excludes it for a whole block of
    queries.
    """
    (B, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
    columns = min(S, _KEYS)
    rows = min(T, _MOST_QUERIES, max(16, _SCORES_AT_A_TIME // (B * N * columns)))
    bias = bias if bias is None or not isinstance(bias, jax.Array) else bias.reshape(
        (1,) * (4 - bias.ndim) + bias.shape)
    leaves, tree = jax.tree.flatten(bias)
    weights = [leaf if _is_float(leaf) else None for leaf in leaves]
    rest = [None if _is_float(leaf) else leaf for leaf in leaves]
    settings = Settings(1.0 / math.sqrt(H) if scale is None else scale, dropout if key is not None else 0.0, precision,
                         T, S, rows, columns, tree, cap)
    return with_gradient(functools.partial(_plain, settings), functools.partial(_backward, settings), q_BTNH, k_BSKH,
                         v_BSKH, sinks_N, weights, (mask, rest, key), forward=functools.partial(_forward, settings))


def _is_float(leaf: Any) -> bool:
    """Whether an array has a gradient."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _plain(settings, q_BTNH, k_BSKH, v_BSKH, sinks_N, bias_weights, others):
    """Computes attention in operations that JAX can differentiate in both modes.

    It takes one block of queries at a time, with all keys.
    """
    k_BKSH, v_BKSH = padded_to_blocks(settings, k_BSKH), padded_to_blocks(settings, v_BSKH)
    sinks_KQ1 = sinks_of_block(settings, sinks_N, k_BSKH.shape[2])
    of_all_keys = dataclasses.replace(settings, columns=k_BKSH.shape[2])

    @jax.checkpoint
    def row_block(x: tuple[jax.Array, jax.Array]) -> jax.Array:
        i, q_BKQH = x
        scores_BKQS, _ = _scores(of_all_keys, i, 0, q_BKQH, k_BKSH, bias_weights, others)
        weights_BKQS = masked_softmax(scores_BKQS, None, sinks_KQ1)
        blocks = jnp.split(weights_BKQS, settings.num_column_blocks, axis=-1)
        weights_BKQS = jnp.concatenate([_dropped(settings, i, j, block, others) for j, block in enumerate(blocks)], -1)
        return head_product(weights_BKQS.astype(v_BKSH.dtype), v_BKSH, 2, settings.precision)

    q_XBKQH = row_blocks(settings, q_BTNH * settings.scale, k_BSKH.shape[2])
    return from_row_blocks(settings, jax.lax.map(row_block, (jnp.arange(settings.num_row_blocks), q_XBKQH)))


def _forward(settings, q_BTNH, k_BSKH, v_BSKH, sinks_N, bias_weights, others):
    """Computes attention in blocks of queries and keys, and what the gradient needs."""
    K = k_BSKH.shape[2]
    q_XBKQH = row_blocks(settings, q_BTNH * settings.scale, K)
    k_BKSH, v_BKSH = padded_to_blocks(settings, k_BSKH), padded_to_blocks(settings, v_BSKH)

    def row_block(x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, q_BKQH = x

        def column_block(j: jax.Array, carry: tuple) -> tuple:
            largest_BKQ1, total_BKQ1, out_BKQH = carry
            scores_BKQC, _ = _scores(settings, i, j, q_BKQH, key_block(settings, k_BKSH, j), bias_weights, others)
            new_largest_BKQ1 = jnp.maximum(largest_BKQ1, scores_BKQC.max(-1, keepdims=True))
            weights_BKQC = jnp.exp(scores_BKQC - new_largest_BKQ1)
            correction_BKQ1 = jnp.exp(largest_BKQ1 - new_largest_BKQ1)
            total_BKQ1 = total_BKQ1 * correction_BKQ1 + weights_BKQC.sum(-1, keepdims=True)
            weights_BKQC = _dropped(settings, i, j, weights_BKQC, others)
            out_BKQH = out_BKQH * correction_BKQ1 + head_product(
                weights_BKQC.astype(v_BKSH.dtype), key_block(settings, v_BKSH, j), 2, settings.precision, jnp.float32)
            return new_largest_BKQ1, total_BKQ1, out_BKQH

        # The largest score is kept finite, so that the row of a query that may attend to no key
        # gives exponentials of 0 and not NaN. A sink is a first score without a value.
        sinks_KQ1 = sinks_of_block(settings, sinks_N, K)
        zero_BKQ1 = jnp.zeros((*q_BKQH.shape[:3], 1), jnp.float32)
        zero_BKQH = jnp.zeros((*q_BKQH.shape[:3], v_BKSH.shape[3]), jnp.float32)
        largest_BKQ1, total_BKQ1, out_BKQH = jax.lax.fori_loop(
            *_visible_blocks(settings, i, others[0]), column_block,
            (zero_BKQ1 + (jnp.finfo(jnp.float32).min if sinks_KQ1 is None else sinks_KQ1),
             zero_BKQ1 + (sinks_KQ1 is not None), zero_BKQH))
        total_BKQ1 = jnp.where(total_BKQ1 == 0.0, 1.0, total_BKQ1)
        return (out_BKQH / total_BKQ1).astype(v_BKSH.dtype), largest_BKQ1 + jnp.log(total_BKQ1)

    out_XBKQH, log_total_XBKQ1 = jax.lax.map(row_block, (jnp.arange(settings.num_row_blocks), q_XBKQH))
    out_BTNH = with_gradient(lambda out_BTNH: out_BTNH, _ONE_GRADIENT, from_row_blocks(settings, out_XBKQH))
    return out_BTNH, (out_BTNH, log_total_XBKQ1)


def _backward(settings, args, kept, d_out_BTNH):
    """Computes the gradients, with the weights of each block recomputed."""
    q_BTNH, k_BSKH, v_BSKH, sinks_N, bias_weights, others = args
    out_BTNH, log_total_XBKQ1 = kept
    K = k_BSKH.shape[2]
    k_BKSH, v_BKSH = padded_to_blocks(settings, k_BSKH), padded_to_blocks(settings, v_BSKH)
    row_sums_BTN1 = (d_out_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)).sum(-1, keepdims=True)

    def row_block(carry: tuple, x: tuple) -> tuple[tuple, jax.Array]:
        i, q_BKQH, d_out_BKQH, row_sums_BKQ1, log_total_BKQ1 = x

        def column_block(j: jax.Array, carry: tuple) -> tuple:
            d_q_BKQH, d_k_BKSH, d_v_BKSH, d_bias = carry
            k_BKCH = key_block(settings, k_BKSH, j)
            scores_BKQC, slope_BKQC = _scores(settings, i, j, q_BKQH, k_BKCH, bias_weights, others)
            weights_BKQC = jnp.exp(scores_BKQC - log_total_BKQ1)
            v_BKCH = key_block(settings, v_BKSH, j)
            d_weights_BKQC = head_product(d_out_BKQH, v_BKCH, 3, settings.precision, jnp.float32)
            d_scores_BKQC = weights_BKQC * (_dropped(settings, i, j, d_weights_BKQC, others) - row_sums_BKQ1)
            d_bias = _add_bias_gradient(settings, i, j, d_bias, d_scores_BKQC, bias_weights, others)
            dropped_BKQC = _dropped(settings, i, j, weights_BKQC, others).astype(d_out_BKQH.dtype)
            d_scores_BKQC = (d_scores_BKQC * slope_BKQC).astype(q_BKQH.dtype)
            product = functools.partial(head_product, axis=2, precision=settings.precision, dtype=jnp.float32)
            d_q_BKQH += product(d_scores_BKQC, k_BKCH)
            d_k_BKSH = add_to_block(settings, d_k_BKSH, product(d_scores_BKQC, q_BKQH, left_axis=2), j)
            d_v_BKSH = add_to_block(settings, d_v_BKSH, product(dropped_BKQC, d_out_BKQH, left_axis=2), j)
            return d_q_BKQH, d_k_BKSH, d_v_BKSH, d_bias

        d_q_BKQH, *rest = jax.lax.fori_loop(*_visible_blocks(settings, i, others[0]), column_block,
                                            (jnp.zeros(q_BKQH.shape, jnp.float32), *carry))
        return tuple(rest), d_q_BKQH

    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, jnp.float32))
    row_sums_XBKQ1 = row_blocks(settings, row_sums_BTN1, K)
    (d_k_BKSH, d_v_BKSH, d_bias), d_q_XBKQH = jax.lax.scan(
        row_block, zeros((k_BKSH, v_BKSH, bias_weights)),
        (jnp.arange(settings.num_row_blocks), row_blocks(settings, q_BTNH * settings.scale, K),
         row_blocks(settings, d_out_BTNH, K), row_sums_XBKQ1, log_total_XBKQ1))
    S, sinks_KQ1, d_sinks_N = settings.num_keys, sinks_of_block(settings, sinks_N, K), None
    if sinks_KQ1 is not None:
        d_sinks_KQ1 = -(jnp.exp(sinks_KQ1 - log_total_XBKQ1) * row_sums_XBKQ1).sum((0, 1))
        d_sinks_N = d_sinks_KQ1.reshape(-1, settings.rows).sum(-1).astype(sinks_N.dtype)
    return (from_row_blocks(settings, d_q_XBKQH * settings.scale).astype(q_BTNH.dtype),
            d_k_BKSH.swapaxes(1, 2)[:, :S].astype(k_BSKH.dtype), d_v_BKSH.swapaxes(1, 2)[:, :S].astype(v_BSKH.dtype),
            d_sinks_N, jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), d_bias, bias_weights), None)


def _visible_blocks(settings: Settings, i: jax.Array, mask: AttentionMask | None) -> tuple[Any, Any]:
    """Returns the range of blocks of keys that a causal mask or a window allows for query block i:
    the index of the first block, and the index after the last."""
    low, high = 0, settings.num_column_blocks
    window = None if mask is None or mask.positions is not None else mask.window
    if mask is None or not (mask.is_causal or window):
        return low, high
    first = i * settings.rows + (0 if mask.query_start is None else mask.query_start)
    last = first + settings.rows - 1
    if window is not None:
        low = jnp.clip((first - window + 1) // settings.columns, 0, high)
    end = last if mask.is_causal or window is None else last + window - 1
    return low, jnp.clip(end // settings.columns + 1, low, high)


def _indices(settings: Settings, i: Number, j: Number) -> tuple[jax.Array, jax.Array]:
    """Returns the indices of the queries of block i and of the keys of block j."""
    return i * settings.rows + jnp.arange(settings.rows), j * settings.columns + jnp.arange(settings.columns)


def _scores(settings: Settings, i: Number, j: Number, q_BKQH: jax.Array, k_BKCH: jax.Array, bias_weights: list,
            others: tuple) -> tuple[jax.Array, jax.Array | float]:
    """Computes the scores of a block ``[B, K, Q, C]``, -inf where the mask forbids attention, and the
    derivative of their cap."""
    B, K, Q, _ = q_BKQH.shape
    R, C = settings.rows, settings.columns
    rows_R, columns_C = _indices(settings, i, j)
    scores_BKGRC = head_product(q_BKQH, k_BKCH, 3, settings.precision, jnp.float32).reshape(B, K, Q // R, R, C)
    N, slope = K * (Q // R), 1.0
    if settings.cap is not None:
        scores_BKGRC = soft_cap(scores_BKGRC, settings.cap)
        slope = 1.0 - jnp.square(scores_BKGRC / settings.cap).reshape(B, K, Q, C)
    bias = _bias_block(settings, i, j, bias_weights, others)
    if bias is not None:
        scores_BKGRC += grouped(bias, N, K).astype(jnp.float32)
    mask = others[0]
    allowed = None if mask is None else mask.materialize(settings.num_queries, settings.num_keys, rows_R, columns_C)
    if allowed is not None:
        scores_BKGRC = jnp.where(grouped(allowed, N, K), scores_BKGRC, -jnp.inf)
    if settings.num_keys % C:
        scores_BKGRC = jnp.where(columns_C < settings.num_keys, scores_BKGRC, -jnp.inf)
    return scores_BKGRC.reshape(B, K, Q, C), slope


def _bias_block(settings: Settings, i: Number, j: Number, bias_weights: list, others: tuple) -> jax.Array | None:
    """Materializes the bias of a block."""
    leaves = [rest if weight is None else weight for weight, rest in zip(bias_weights, others[1], strict=True)]
    bias = jax.tree.unflatten(settings.bias_tree, leaves)
    rows_R, columns_C = _indices(settings, i, j)
    if bias is None or not isinstance(bias, jax.Array):
        return None if bias is None else bias.materialize(settings.num_queries, settings.num_keys, rows_R, columns_C)
    return take(take(bias, rows_R, 2), columns_C, 3)


def _add_bias_gradient(settings: Settings, i: Number, j: Number, d_bias: list, d_scores_BKQC: jax.Array,
                       bias_weights: list, others: tuple) -> list:
    """Adds the gradient of the bias of one block to the gradient of its weights."""
    if not jax.tree.leaves(bias_weights):
        return d_bias
    d_scores_BNRC = d_scores_BKQC.reshape(d_scores_BKQC.shape[0], -1, settings.rows, settings.columns)

    def like(x: jax.Array) -> jax.Array:
        return d_scores_BNRC.sum([axis for axis in range(4) if x.shape[axis] == 1], keepdims=True)

    if settings.bias_tree != jax.tree.structure(0):
        block, pull = jax.vjp(lambda weights: cast(jax.Array, _bias_block(settings, i, j, weights, others)),
                              bias_weights)
        return jax.tree.map(jnp.add, d_bias, pull(like(block).astype(block.dtype))[0])
    array = d_bias[0]  # updated in place; jax.vjp would make an array of this size for every block
    rows_R, columns_C = (jnp.zeros(1, int) if array.shape[axis] == 1 else indices
                         for axis, indices in enumerate(_indices(settings, i, j), 2))
    return [array.at[:, :, rows_R[:, None], columns_C[None, :]].add(like(array), mode="drop")]


def _dropped(settings: Settings, i: Number, j: Number, x_BKQC: jax.Array, others: tuple) -> jax.Array:
    """Applies dropout to a block. Its key depends only on the block, so that the forward and the
    backward pass drop the same entries."""
    if not settings.dropout:
        return x_BKQC
    return drop(x_BKQC, settings.dropout, jax.random.fold_in(others[2], i * settings.num_column_blocks + j))
