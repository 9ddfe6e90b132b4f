"""Scaled dot-product attention as pure functions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from transformer_jax.ops.dropout import drop
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.ops.positions import LinearBias

Mask = AttentionMask | jax.Array | None
Bias = LinearBias | jax.Array | None


_CAUSAL_BLOCK, _MOST_CAUSAL_BLOCKS = 128, 8
# Where a head has more scores than the first, some queries are attended to at a time, with so many scores of all heads.
_LONG, _SCORES_AT_A_TIME = 1 << 24, 1 << 25


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask = None, *, bias: Bias = None,
           scale: float | None = None, dropout: float = 0.0, key: jax.Array | None = None,
           implementation: str = "auto") -> jax.Array:
    """softmax(q k^T * scale + bias) v, over the keys that the mask allows.

    Source: Vaswani et al. (2017), equation 1; grouped queries (N a multiple of K): Ainslie et al. (2023).

    Args:
      q_BTNH: queries; N heads.
      k_BSKH: keys; K heads, each shared by N / K query heads.
      v_BSKH: values.
      mask: an :class:`AttentionMask` or a boolean array (``True`` = may attend), ``[T, S]`` to
        ``[B, N, T, S]``. A query that may attend to nothing returns zeros.
      bias: added to the scaled scores, broadcastable to ``[B, N, T, S]``, or a :class:`LinearBias`.
      scale: of the scores; 1 / sqrt(H) by default.
      dropout: probability of dropping an attention weight; needs ``key``.
      key: PRNG key of the dropout.
      implementation: ``"xla"``, or ``"auto"`` for the best that can run here.

    Returns:
      ``[B, T, N, H]`` in the type of ``v_BSKH``.

    Raises:
      ValueError: for shapes that do not fit, or an implementation that is not known.
    """
    if implementation not in ("auto", "xla"):
        raise ValueError(f"implementation={implementation!r} is not one of 'auto', 'xla'")
    if v_BSKH.shape != k_BSKH.shape:
        raise ValueError(f"values {v_BSKH.shape} differ from keys {k_BSKH.shape}")
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    some = _attend_by_rows if T * S > _LONG else _attend
    skips = isinstance(mask, AttentionMask) and mask.is_causal and mask.query_start is None and bias is None
    if skips and T == S >= 2 * _CAUSAL_BLOCK and jax.default_backend() == "cpu":
        # Keys that no query of a block may see are not multiplied at all.
        size = max(_CAUSAL_BLOCK, -(-T // _MOST_CAUSAL_BLOCKS))
        keys = [None] * -(-T // size) if key is None else jax.random.split(key, -(-T // size))
        blocks = [(start, min(start + size, T)) for start in range(0, T, size)]
        return jnp.concatenate([
            some(q_BTNH[:, start:stop], k_BSKH[:, :stop], v_BSKH[:, :stop], mask.block(start, stop), bias, scale,
                 dropout, block_key) for (start, stop), block_key in zip(blocks, keys, strict=True)], axis=1)
    return some(q_BTNH, k_BSKH, v_BSKH, mask, bias, scale, dropout, key)


def _attend(q_BTNH, k_BSKH, v_BSKH, mask, bias, scale, dropout, key) -> jax.Array:
    scores_BKGTS, allowed = _scores(q_BTNH, k_BSKH, mask, bias, scale)
    v_BKSH = v_BSKH.swapaxes(1, 2)
    if dropout > 0.0 and key is not None:
        weights_BKGTS = masked_softmax(scores_BKGTS, allowed)
        out_BKGTH = _mix_values(drop(weights_BKGTS, dropout, key), v_BKSH)
    else:
        out_BKGTH = _softmax_mix(scores_BKGTS, allowed, v_BKSH)
    return out_BKGTH.reshape(q_BTNH.shape[0], q_BTNH.shape[2], q_BTNH.shape[1], -1).swapaxes(1, 2)


def _attend_by_rows(q_BTNH, k_BSKH, v_BSKH, mask, bias, scale, dropout, key) -> jax.Array:
    """In memory that is linear in the number of queries, forward and backward."""
    B, T, N, _ = q_BTNH.shape
    S = k_BSKH.shape[1]
    size = max(1, min(T, _SCORES_AT_A_TIME // (B * N * S)))
    keys = None if key is None else jax.random.split(key, -(-T // size))
    if mask is not None and not isinstance(mask, AttentionMask):
        mask = AttentionMask.explicit(mask)

    @jax.checkpoint
    def some(start_and_key: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        start, key = start_and_key
        rows_R = jnp.minimum(start + jnp.arange(size), T - 1)
        allowed = None if mask is None else mask.materialize(T, S, rows_R)
        if isinstance(bias, LinearBias):
            bias_R = bias.materialize(T, S, rows_R)
        else:
            bias_R = bias if bias is None or bias.shape[-2] == 1 else bias[..., rows_R, :]
        return _attend(q_BTNH[:, rows_R], k_BSKH, v_BSKH, allowed, bias_R, scale, dropout, key)

    out_XBRNH = jax.lax.map(some, (jnp.arange(0, T, size), keys))
    return out_XBRNH.swapaxes(0, 1).reshape(B, -1, *out_XBRNH.shape[3:])[:, :T]


def attention_weights(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: Mask = None, *, bias: Bias = None,
                      scale: float | None = None) -> jax.Array:
    """The softmax of :func:`attend`, as a map to look at.

    Returns:
      ``weights_BNTS`` in float32; rows sum to one, or are zero where nothing may be attended to.
    """
    weights_BKGTS = masked_softmax(*_scores(q_BTNH, k_BSKH, mask, bias, scale))
    batch, num_queries, num_heads, _ = q_BTNH.shape
    return weights_BKGTS.reshape(batch, num_heads, num_queries, -1)


def _scores(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: Mask, bias: Bias,
            scale: float | None) -> tuple[jax.Array, jax.Array | None]:
    """Scaled and biased scores ``[B, K, G, T, S]`` in float32, and the mask that broadcasts to them."""
    _check_shapes(q_BTNH, k_BSKH)
    B, T, N, H = q_BTNH.shape
    _, S, K, _ = k_BSKH.shape
    q_BNTH = (q_BTNH * (1.0 / math.sqrt(H) if scale is None else scale)).swapaxes(1, 2)
    scores_BKQS = _head_product(q_BNTH.reshape(B, K, -1, H), k_BSKH.swapaxes(1, 2), 3, jnp.float32)
    scores_BKGTS = scores_BKQS.reshape(B, K, N // K, T, S)

    def grouped(x: jax.Array) -> jax.Array:  # [B or 1, N or 1, T, S] -> [B or 1, K or 1, G or 1, T, S]
        heads = (K, N // K) if x.shape[1] == N and N > 1 else (1, 1)
        return x.reshape(x.shape[0], *heads, *x.shape[2:])

    if bias is not None:
        bias = bias.materialize(T, S) if isinstance(bias, LinearBias) else bias
        scores_BKGTS += grouped(jnp.broadcast_to(bias, (1,) * (4 - bias.ndim) + bias.shape)).astype(jnp.float32)
    if mask is not None and not isinstance(mask, AttentionMask):
        mask = AttentionMask.explicit(mask)
    allowed = None if mask is None else mask.materialize(T, S)
    return scores_BKGTS, None if allowed is None else grouped(allowed)


def _head_product(left_BKXY: jax.Array, right_BKSH: jax.Array, axis: int, dtype=None,
                  left_axis: int = 3) -> jax.Array:
    """Contracts an axis on the left (the last) with the given one on the right, head by head."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        return jax.lax.dot_general(left_BKXY, right_BKSH, (((left_axis,), (axis,)), ((0, 1), (0, 1))),
                                   preferred_element_type=dtype)
    # One batch axis instead of two: XLA:CPU then updates a decoding cache in place, where it would copy it.
    # Not over a mesh, whose axes divide B and K separately.
    B, K = left_BKXY.shape[:2]
    left, right = (x.reshape(B * K, *x.shape[2:]) for x in (left_BKXY, right_BKSH))
    out = jax.lax.dot_general(left, right, (((left_axis - 1,), (axis - 1,)), ((0,), (0,))),
                              preferred_element_type=dtype)
    return out.reshape(B, K, *out.shape[1:])


@jax.custom_vjp
def _softmax_mix(scores_BKGTS: jax.Array, allowed: jax.Array | None, v_BKSH: jax.Array) -> jax.Array:
    """The values mixed by the softmax of the scores, ``[B, K, G, T, H]``.

    The gradient of the softmax needs each row's sum of weight times gradient. Derived by JAX that is a pass over
    ``[T, S]``; it equals output times gradient summed over H (Dao et al., 2022, section 3.1), which is used here.
    """
    return _mix_values(masked_softmax(scores_BKGTS, allowed), v_BKSH)


def _softmax_mix_forward(scores_BKGTS, allowed, v_BKSH):
    weights_BKGTS = masked_softmax(scores_BKGTS, allowed)
    out_BKGTH = _mix_values(weights_BKGTS, v_BKSH)
    return out_BKGTH, (weights_BKGTS, v_BKSH, out_BKGTH)


def _softmax_mix_backward(saved, d_out_BKGTH):
    weights_BKGTS, v_BKSH, out_BKGTH = saved
    B, K, G, T, S = weights_BKGTS.shape
    d_out_BKQH = d_out_BKGTH.reshape(B, K, G * T, -1)
    weights_BKQS = weights_BKGTS.reshape(B, K, G * T, S)
    d_v_BKSH = _head_product(weights_BKQS.astype(d_out_BKQH.dtype), d_out_BKQH, 2, left_axis=2)
    d_weights_BKGTS = _head_product(d_out_BKQH, v_BKSH, 3, jnp.float32).reshape(weights_BKGTS.shape)
    row_sums_BKGT1 = (d_out_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)).sum(-1, keepdims=True)
    return weights_BKGTS * (d_weights_BKGTS - row_sums_BKGT1), None, d_v_BKSH.astype(v_BKSH.dtype)


_softmax_mix.defvjp(_softmax_mix_forward, _softmax_mix_backward)


def _mix_values(weights_BKGTS: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    B, K, G, T, S = weights_BKGTS.shape
    out_BKQH = _head_product(weights_BKGTS.astype(v_BKSH.dtype).reshape(B, K, G * T, S), v_BKSH, 2)
    return out_BKQH.reshape(B, K, G, T, -1)


def masked_softmax(scores: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """Softmax over the last axis; a row with nothing allowed is zero and has zero (finite) gradients."""
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    # A finite largest score even of a row of -inf, whose exponentials are then 0 and not NaN.
    largest = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(scores.dtype).min)
    exponentials = jnp.exp(scores - jax.lax.stop_gradient(largest))
    total = exponentials.sum(-1, keepdims=True)
    return exponentials / jnp.where(total == 0.0, 1.0, total)


def _check_shapes(q_BTNH: jax.Array, k_BSKH: jax.Array) -> None:
    if q_BTNH.ndim != 4 or k_BSKH.ndim != 4:
        raise ValueError(f"queries are [B, T, N, H] and keys [B, S, K, H], not {q_BTNH.shape} and {k_BSKH.shape}")
    if q_BTNH.shape[0] != k_BSKH.shape[0] or q_BTNH.shape[3] != k_BSKH.shape[3]:
        raise ValueError(f"queries {q_BTNH.shape} and keys {k_BSKH.shape} differ in batch or head dim")
    if q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f"{q_BTNH.shape[2]} query heads are no multiple of {k_BSKH.shape[2]} key heads")
