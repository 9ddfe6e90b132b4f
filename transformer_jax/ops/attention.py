"""Scaled dot-product attention as pure functions, and the choice of the kernel that computes it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer_jax.ops.chunked_attention import chunked_attend
from transformer_jax.ops.context_parallel import context_parallel
from transformer_jax.ops.cudnn_attention import cudnn_attend, why_not_cudnn
from transformer_jax.ops.kernels import BUILT_IN, KERNELS
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.ops.positions import PositionBias
from transformer_jax.ops.splash_attention import splash_attend, why_not_splash
from transformer_jax.ops.xla_attention import masked_scores, masked_softmax, xla_attend
from transformer_jax.sharding import is_sharded, num_shards

Mask = AttentionMask | jax.Array | None
Bias = PositionBias | jax.Array | None

# "auto" computes attention in chunks if one head, or all heads on one device together, have more
# scores than these limits.
_MANY_SCORES_OF_A_HEAD, _MANY_SCORES = 1 << 24, 1 << 30


def attend(q_BTNH: Float[Array, "B T N H"], k_BSKH: Float[Array, "B S K H"], v_BSKH: Float[Array, "B S K V"],
           mask: Mask = None, *, bias: Bias = None, scale: float | None = None, dropout: float = 0.0,
           key: jax.Array | None = None, implementation: str = "auto",
           precision: str | None = None, cap: float | None = None,
           sinks_N: Float[Array, " N"] | None = None) -> Float[Array, "B T N V"]:
    """Computes softmax(q k^T * scale + bias) v over the keys that the mask allows.

    The implementations differ only in rounding, memory and time:

    * ``"xla"`` materializes every score. It supports all arguments.
    * ``"chunked"`` computes the scores in blocks, in memory linear in the length. It supports all
      arguments.
    * ``"cudnn"`` is cuDNN's fused kernel for bfloat16 and float16 on GPUs.
    * ``"splash"`` is Pallas's fused kernel for TPUs. On a mesh, each device computes its own shard
      of the rows, heads and queries.
    * The name of a kernel that was registered with ``register_kernel``.
    * ``"auto"`` uses the first registered kernel that supports the call, otherwise the platform's
      fused kernel if it supports the call (see ``why_not``), otherwise ``"chunked"`` for many
      scores or ``"xla"`` for few. The platform is that of the current mesh, or JAX's default.

    Source: Vaswani et al. (2017), equation 1; grouped queries (N a multiple of K): Ainslie et al.
      (2023).

    Args:
      q_BTNH: Queries ``[B, T, N, H]`` with N heads.
      k_BSKH: Keys ``[B, S, K, H]`` with K heads, each shared by N / K query heads.
      v_BSKH: Values ``[B, S, K, V]``, whose width V may differ from that of queries and keys.
      mask: An ``AttentionMask``, or a boolean array (``True`` = may attend) of shape ``[T, S]``,
        ``[B, T, S]`` or ``[B, N, T, S]``. A query that may attend to no key returns zeros.
      bias: What is added to the scaled scores: an array that broadcasts to ``[B, N, T, S]``, or a
        ``PositionBias`` such as ``transformer_jax.ops.LinearBias``.
      scale: The factor of the scores. The default is 1 / sqrt(H).
      dropout: The probability of dropping an attention weight. Without ``key`` there is no dropout.
      key: The PRNG key of the dropout.
      implementation: One of the names above.
      precision: The precision of the matrix products, as in ``jax.lax.dot_general``. ``None`` is
        JAX's default, which on a TPU rounds float32 to bfloat16.
      cap: If it is given, scaled scores s become cap * tanh(s / cap) before the bias is added
        (Gemma 2).
      sinks_N: If it is given, the softmax of each head has one more score, this one, which takes
        weight away from the keys and adds no value (gpt-oss).

    Returns:
      The output ``[B, T, N, V]`` in the type of ``v_BSKH``.

    Raises:
      ValueError: The shapes do not fit each other, or the implementation is unknown or does not
        support the call.
    """
    known = (*BUILT_IN, *KERNELS)
    if implementation not in known:
        raise ValueError(f"implementation={implementation!r} is not one of {', '.join(map(repr, known))}")
    _check_shapes(q_BTNH, k_BSKH)
    if v_BSKH.shape[:-1] != k_BSKH.shape[:-1]:
        raise ValueError(f"values {v_BSKH.shape} differ from keys {k_BSKH.shape}")
    mask, bias = _structured(mask), _structured_bias(bias)
    settings: dict[str, Any] = dict(bias=bias, dropout=dropout if key is not None else 0.0, precision=precision,
                                    cap=cap, sinks_N=sinks_N)
    if implementation == "auto":
        implementation = _choose(q_BTNH, k_BSKH, mask, **settings)
    reason = why_not(implementation, q_BTNH, k_BSKH, mask, **settings)
    if reason is not None:
        raise ValueError(f"implementation={implementation!r} cannot compute this attention: {reason}; let "
                         "implementation='auto' choose, or take 'xla' or 'chunked'")
    if v_BSKH.shape != k_BSKH.shape and implementation not in ("xla", "chunked"):
        scale = 1.0 / math.sqrt(q_BTNH.shape[-1]) if scale is None else scale
        width = max(k_BSKH.shape[-1], v_BSKH.shape[-1])  # other kernels need one width
        return attend(_widened(q_BTNH, width), _widened(k_BSKH, width), _widened(v_BSKH, width), mask, scale=scale,
                      key=key, implementation=implementation, **settings)[..., :v_BSKH.shape[-1]]
    if implementation == "cudnn":
        return cudnn_attend(q_BTNH, k_BSKH, v_BSKH, mask, bias, scale)
    if implementation == "splash":
        return splash_attend(q_BTNH, k_BSKH, v_BSKH, mask, scale, cap)
    if num_shards(q_BTNH.shape[1], "sequence") > 1:
        return context_parallel(lambda q, k, v, mask, bias, key, sinks_N: attend(
            q, k, v, mask, bias=bias, scale=scale, dropout=dropout, key=key, implementation=implementation,
            precision=precision, cap=cap, sinks_N=sinks_N), q_BTNH, k_BSKH, v_BSKH, mask, bias, key, sinks_N)
    if implementation in KERNELS:
        more = {} if cap is None else {"cap": cap}
        return KERNELS[implementation].attend(q_BTNH, k_BSKH, v_BSKH, mask, bias=bias, scale=scale, dropout=dropout,
                                              key=key, precision=precision, **more)
    if implementation == "chunked":
        return chunked_attend(q_BTNH, k_BSKH, v_BSKH, mask, bias, scale, dropout, key, precision, cap, sinks_N)
    return xla_attend(q_BTNH, k_BSKH, v_BSKH, mask, bias, scale, dropout, key, precision, cap, sinks_N,
                      in_blocks=platform() == "cpu")


def why_not(implementation: str, q_BTNH: Float[Array, "B T N H"], k_BSKH: Float[Array, "B S K H"], mask: Mask = None,
            *, bias: Bias = None,
            dropout: float = 0.0, precision: str | None = None, cap: float | None = None,
            sinks_N: Float[Array, " N"] | None = None) -> str | None:
    """Says why an implementation of ``attend`` does not support a call on this platform.

    Args:
      implementation: See ``attend``.
      q_BTNH: See ``attend``.
      k_BSKH: See ``attend``.
      mask: See ``attend``.
      bias: See ``attend``.
      dropout: The probability of dropping an attention weight; 0 if the call has no key.
      precision: See ``attend``.
      cap: See ``attend``.
      sinks_N: See ``attend``.

    Returns:
      The reason, as a sentence without its end; ``None`` if the implementation supports the call.
    """
    if sinks_N is not None and implementation not in ("xla", "chunked"):
        return f"the kernel {implementation!r} has no attention sinks"
    if implementation in KERNELS:
        if cap is not None and not KERNELS[implementation].can_cap:
            return f"the kernel {implementation!r} cannot cap scores"
        return KERNELS[implementation].why_not(q_BTNH, k_BSKH, _structured(mask), bias=_structured_bias(bias),
                                               dropout=dropout, precision=precision)
    if implementation not in ("cudnn", "splash"):
        return None
    here, needed = platform(), "gpu" if implementation == "cudnn" else "tpu"
    if here != needed:
        return f"it runs on a {needed.upper()}, and this is a {here.upper()}"
    if dropout > 0.0:
        return "the kernel has no dropout of attention weights"
    mask, bias = _structured(mask), _structured_bias(bias)
    if implementation == "cudnn":
        return why_not_cudnn(q_BTNH, k_BSKH, mask, bias, cap)
    if precision not in (None, "default") and q_BTNH.dtype == jnp.float32:
        return f"the kernel rounds float32 to bfloat16, but precision={precision!r} was requested"
    return why_not_splash(q_BTNH, k_BSKH, mask, bias)


def attention_weights(q_BTNH: Float[Array, "B T N H"], k_BSKH: Float[Array, "B S K H"], mask: Mask = None, *,
                      bias: Bias = None, scale: float | None = None,
                      precision: str | None = None, cap: float | None = None,
                      sinks_N: Float[Array, " N"] | None = None) -> Float[Array, "B N T S"]:
    """Computes the attention weights, which are the softmax inside ``attend``.

    Args:
      q_BTNH: Queries ``[B, T, N, H]``.
      k_BSKH: Keys ``[B, S, K, H]``.
      mask: See ``attend``.
      bias: See ``attend``.
      scale: The factor of the scores. The default is 1 / sqrt(H).
      precision: See ``attend``.
      cap: See ``attend``.
      sinks_N: See ``attend``.

    Returns:
      The weights, float32 ``[B, N, T, S]``. Each row sums to one, or to less with sinks; the row of a query that may
      attend to no key is zero.

    Raises:
      ValueError: The shapes of the queries and keys do not fit each other.
    """
    _check_shapes(q_BTNH, k_BSKH)
    scores_BKGTS, allowed = masked_scores(q_BTNH, k_BSKH, _structured(mask), _structured_bias(bias), scale, precision,
                                          cap)
    sinks = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(*scores_BKGTS.shape[1:3], 1, 1)
    weights_BKGTS = masked_softmax(scores_BKGTS, allowed, sinks)
    batch, num_queries, num_heads, _ = q_BTNH.shape
    return weights_BKGTS.reshape(batch, num_heads, num_queries, -1)


def platform() -> str:
    """Returns the platform for which the program is compiled.

    Returns:
      ``"cpu"``, ``"gpu"`` or ``"tpu"``: the platform of the current mesh, which may describe
      devices that this machine does not have, or JAX's default platform.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def _choose(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask | None, **settings: Any) -> str:
    """Returns the implementation that ``"auto"`` stands for."""
    for kernel in (*KERNELS, "cudnn", "splash"):
        if why_not(kernel, q_BTNH, k_BSKH, mask, **settings) is None:
            return kernel
    B, T, N, _ = q_BTNH.shape
    scores = T * k_BSKH.shape[1]
    devices = jax.sharding.get_abstract_mesh().size if is_sharded() else 1
    many = scores > _MANY_SCORES_OF_A_HEAD or B * N * scores > devices * _MANY_SCORES
    return "chunked" if many and T > 1 else "xla"


def _structured(mask: Mask) -> AttentionMask | None:
    """Wraps a boolean array in an ``AttentionMask``."""
    return mask if mask is None or isinstance(mask, AttentionMask) else AttentionMask.explicit(mask)


def _structured_bias(bias: Bias) -> Bias:
    """Converts a bias that is no ``PositionBias`` to a JAX array."""
    return bias if bias is None or hasattr(bias, "materialize") else jnp.asarray(bias)


def _widened(x_BTNH: jax.Array, width: int) -> jax.Array:
    """Pads heads with zeros to a width."""
    return jnp.pad(x_BTNH, ((0, 0), (0, 0), (0, 0), (0, width - x_BTNH.shape[-1])))


def _check_shapes(q_BTNH: jax.Array, k_BSKH: jax.Array) -> None:
    """Raises ValueError if the shapes of queries and keys do not fit each other."""
    if q_BTNH.ndim != 4 or k_BSKH.ndim != 4:
        raise ValueError(f"queries are [B, T, N, H] and keys [B, S, K, H], not {q_BTNH.shape} and {k_BSKH.shape}")
    if q_BTNH.shape[0] != k_BSKH.shape[0] or q_BTNH.shape[3] != k_BSKH.shape[3]:
        raise ValueError(f"queries {q_BTNH.shape} and keys {k_BSKH.shape} differ in batch or head dim")
    if q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f"{q_BTNH.shape[2]} query heads are no multiple of {k_BSKH.shape[2]} key heads")
