"""Attention with cuDNN's fused kernel, on GPUs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from transformer_jax.ops.masks import AttentionMask
from transformer_jax.sharding import num_shards

_LARGEST_MASK = 1 << 24


def why_not_cudnn(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask | None, bias: Any,
                  cap: float | None = None) -> str | None:
    """Says why the kernel does not support these arguments on a GPU; ``None`` if it does.

    Source: the conditions of cuDNN 9's fused attention, as ``jax._src.cudnn`` checks them. They
      depend on the GPU; these are the stricter ones of Ampere.
    """
    (_, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16) or k_BSKH.dtype != q_BTNH.dtype:
        return f"cuDNN takes bfloat16 or float16, not queries of {q_BTNH.dtype} and keys of {k_BSKH.dtype}"
    if cap is not None:
        return "cuDNN cannot cap scores"
    if H % 8 or H > 128:
        return f"cuDNN takes a head dim that is a multiple of 8 up to 128, not {H}"
    if num_shards(T, "sequence") > 1 or num_shards(N, "heads") != num_shards(K, "kv_heads"):
        return (f"on a mesh cuDNN cannot shard the {T} queries of a row, and must shard its {N} query heads and {K} "
                "key heads equally")
    if mask is not None and mask.query_start is not None:
        return "cuDNN's masks start at the first key, and these queries start later, after those in a cache"
    if mask is not None and mask.window is not None and mask.positions is not None:
        return "cuDNN's windows count indices of keys, and this window counts positions"
    if mask is not None and mask.window is not None and not mask.is_causal:
        return "cuDNN supports a window only together with a causal mask"
    if bias is not None or not _is_structure(mask):
        if T % 2 or S % 2:
            return (f"with segments, padding, an explicit mask or a bias cuDNN takes even lengths, not {T} queries "
                    f"and {S} keys")
        if T * S > _LARGEST_MASK:
            return ("segments, padding, explicit masks and biases are materialized for cuDNN, and an array of "
                    f"{T} x {S} is too large")
    return None


def _is_structure(mask: AttentionMask | None) -> bool:
    """Whether cuDNN can read the mask as flags and lengths instead of an array."""
    return mask is None or (not mask.segment_pairs and mask.valid_BS is None and mask.allowed_BNTS is None
                            and (mask.lengths_B is None or mask.window is None))


def cudnn_attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask | None, bias: Any,
                 scale: float | None) -> jax.Array:
    """Computes ``transformer_jax.ops.attend`` for arguments that the kernel supports."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    mask = AttentionMask() if mask is None else mask
    flags: dict[str, Any] = dict(is_causal=mask.is_causal, scale=scale, implementation="cudnn")
    if mask.window is not None:
        flags["local_window_size"] = (mask.window - 1, 0)
    if bias is not None:
        bias = bias if isinstance(bias, jax.Array) else bias.materialize(T, S)
        bias = jnp.broadcast_to(bias, (*(1,) * (4 - bias.ndim), *bias.shape[:-2], T, S)).astype(q_BTNH.dtype)
    if bias is None and _is_structure(mask):
        if mask.lengths_B is None:
            return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, **flags)
        lengths_B = jnp.maximum(mask.lengths_B, 1).astype(jnp.int32)  # the result of an empty row is replaced below
        out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, key_value_seq_lengths=lengths_B, **flags)
        return jnp.where((mask.lengths_B > 0)[:, None, None, None], out_BTNH, 0)
    allowed = dataclasses.replace(mask, is_causal=False, window=None).materialize(T, S)
    if bias is not None:
        # The kernel cannot compute with infinities, so they become part of the mask.
        finite = bias > -jnp.inf
        allowed = finite if allowed is None else allowed & finite
        bias = jnp.where(finite, bias, 0)
    assert allowed is not None  # otherwise the mask would be a structure, or there would be a bias
    allowed = jnp.broadcast_to(allowed, (*allowed.shape[:2], T, S))
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, bias, allowed, **flags)
    places = dataclasses.replace(AttentionMask(), is_causal=mask.is_causal, window=mask.window).materialize(T, S)
    may_attend_BNT = (allowed if places is None else allowed & places).any(-1)
    return jnp.where(may_attend_BNT.swapaxes(1, 2)[..., None], out_BTNH, 0)
