"""Scaled dot-product attention as pure functions, and which kernel computes it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from transformer_jax.ops.chunked_attention import chunked_attend
from transformer_jax.ops.context_parallel import context_parallel
from transformer_jax.ops.cudnn_attention import cudnn_attend, why_not_cudnn
from transformer_jax.ops.kernels import BUILT_IN, KERNELS
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.ops.positions import PositionBias
from transformer_jax.ops.splash_attention import splash_attend, why_not_splash
from transformer_jax.ops.xla_attention import masked_scores, masked_softmax, xla_attend
from transformer_jax.sharding import is_divided, num_parts

Mask = AttentionMask | jax.Array | None
Bias = PositionBias | jax.Array | None

# Where a head, or all heads of a device together, have more scores than these, "auto" takes them
# block by block.
_MANY_SCORES_OF_A_HEAD, _MANY_SCORES = 1 << 24, 1 << 30


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask = None, *, bias: Bias = None,
           scale: float | None = None, dropout: float = 0.0, key: jax.Array | None = None,
           implementation: str = "auto", precision: str | None = None) -> jax.Array:
    """softmax(q k^T * scale + bias) v, over the keys that the mask allows.

    The implementations differ in rounding, memory and time only:

    * ``"xla"``: every score is held; takes everything.
    * ``"chunked"``: block by block in memory linear in the length; takes everything.
    * ``"cudnn"``: cuDNN's fused kernel on GPUs, for bfloat16 and float16.
    * ``"splash"``: Pallas's fused kernel on TPUs; over a mesh each device takes its rows, heads and
      queries.
    * the name of a kernel that :func:`register_kernel` made known.
    * ``"auto"``: a registered kernel that can, else the fused kernel of the platform where it can
      (see :func:`why_not`), else ``"chunked"`` for many scores and ``"xla"`` for few. The platform
      is that of the mesh in use, else the default one.

    Source: Vaswani et al. (2017), equation 1; grouped queries (N a multiple of K): Ainslie et al.
      (2023).

    Args:
      q_BTNH: queries; N heads.
      k_BSKH: keys; K heads, each shared by N / K query heads.
      v_BSKH: values.
      mask: an :class:`AttentionMask` or a boolean array (``True`` = may attend), ``[T, S]`` to
        ``[B, N, T, S]``. A query that may attend to nothing returns zeros.
      bias: added to the scaled scores, broadcastable to ``[B, N, T, S]``, or a structure as
        :class:`transformer_jax.ops.LinearBias`.
      scale: of the scores; 1 / sqrt(H) by default.
      dropout: probability of dropping an attention weight; needs ``key``.
      key: PRNG key of the dropout.
      implementation: see above.
      precision: of the matrix products, as ``jax.lax.dot_general`` takes it; ``None``: JAX's
        default, which on a TPU rounds float32 to bfloat16.

    Returns:
      ``[B, T, N, H]`` in the type of ``v_BSKH``.

    Raises:
      ValueError: for shapes that do not fit, or an implementation that is not known or cannot take
        the call.
    """
    known = (*BUILT_IN, *KERNELS)
    if implementation not in known:
        raise ValueError(f"implementation={implementation!r} is not one of {', '.join(map(repr, known))}")
    _check_shapes(q_BTNH, k_BSKH)
    if v_BSKH.shape != k_BSKH.shape:
        raise ValueError(f"values {v_BSKH.shape} differ from keys {k_BSKH.shape}")
    mask, bias = _structured(mask), _structured_bias(bias)
    settings = dict(bias=bias, dropout=dropout if key is not None else 0.0, precision=precision)
    if implementation == "auto":
        implementation = _choose(q_BTNH, k_BSKH, mask, **settings)
    reason = why_not(implementation, q_BTNH, k_BSKH, mask, **settings)
    if reason is not None:
        raise ValueError(f"implementation={implementation!r} cannot take this attention: {reason}; let "
                         "implementation='auto' choose, or take 'xla' or 'chunked'")
    if implementation == "cudnn":
        return cudnn_attend(q_BTNH, k_BSKH, v_BSKH, mask, bias, scale)
    if implementation == "splash":
        return splash_attend(q_BTNH, k_BSKH, v_BSKH, mask, scale)
    if num_parts(q_BTNH.shape[1], "sequence") > 1:
        return context_parallel(lambda q, k, v, mask, bias, key: attend(
            q, k, v, mask, bias=bias, scale=scale, dropout=dropout, key=key, implementation=implementation,
            precision=precision), q_BTNH, k_BSKH, v_BSKH, mask, bias, key)
    if implementation in KERNELS:
        return KERNELS[implementation].attend(q_BTNH, k_BSKH, v_BSKH, mask, bias=bias, scale=scale, dropout=dropout,
                                              key=key, precision=precision)
    if implementation == "chunked":
        return chunked_attend(q_BTNH, k_BSKH, v_BSKH, mask, bias, scale, dropout, key, precision)
    return xla_attend(q_BTNH, k_BSKH, v_BSKH, mask, bias, scale, dropout, key, precision,
                      in_blocks=platform() == "cpu")


def why_not(implementation: str, q_BTNH: jax.Array, k_BSKH: jax.Array, mask: Mask = None, *, bias: Bias = None,
            dropout: float = 0.0, precision: str | None = None) -> str | None:
    """Why an implementation of :func:`attend` cannot take a call here, in words; ``None`` where it
    can.

    The arguments are those of :func:`attend`; ``dropout`` is 0 where no key switches it on.
    """
    if implementation in KERNELS:
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
        return why_not_cudnn(q_BTNH, k_BSKH, mask, bias)
    if precision not in (None, "default") and q_BTNH.dtype == jnp.float32:
        return f"the kernel rounds float32 to bfloat16, and precision={precision!r} is asked for"
    return why_not_splash(q_BTNH, k_BSKH, mask, bias)


def attention_weights(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: Mask = None, *, bias: Bias = None,
                      scale: float | None = None, precision: str | None = None) -> jax.Array:
    """The softmax of :func:`attend`, as a map to look at.

    Returns:
      ``weights_BNTS`` in float32; rows sum to one, or are zero where nothing may be attended to.
    """
    _check_shapes(q_BTNH, k_BSKH)
    weights_BKGTS = masked_softmax(*masked_scores(q_BTNH, k_BSKH, _structured(mask), _structured_bias(bias), scale,
                                                  precision))
    batch, num_queries, num_heads, _ = q_BTNH.shape
    return weights_BKGTS.reshape(batch, num_heads, num_queries, -1)


def platform() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: that of the mesh in use, which need not be here, else the
    default one."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def _choose(q_BTNH: jax.Array, k_BSKH: jax.Array, mask: AttentionMask | None, **settings: Any) -> str:
    for kernel in (*KERNELS, "cudnn", "splash"):
        if why_not(kernel, q_BTNH, k_BSKH, mask, **settings) is None:
            return kernel
    B, T, N, _ = q_BTNH.shape
    scores = T * k_BSKH.shape[1]
    devices = jax.sharding.get_abstract_mesh().size if is_divided() else 1
    many = scores > _MANY_SCORES_OF_A_HEAD or B * N * scores > devices * _MANY_SCORES
    return "chunked" if many and T > 1 else "xla"


def _structured(mask: Mask) -> AttentionMask | None:
    return mask if mask is None or isinstance(mask, AttentionMask) else AttentionMask.explicit(mask)


def _structured_bias(bias: Bias) -> Bias:
    return bias if bias is None or hasattr(bias, "materialize") else jnp.asarray(bias)


def _check_shapes(q_BTNH: jax.Array, k_BSKH: jax.Array) -> None:
    if q_BTNH.ndim != 4 or k_BSKH.ndim != 4:
        raise ValueError(f"queries are [B, T, N, H] and keys [B, S, K, H], not {q_BTNH.shape} and {k_BSKH.shape}")
    if q_BTNH.shape[0] != k_BSKH.shape[0] or q_BTNH.shape[3] != k_BSKH.shape[3]:
        raise ValueError(f"queries {q_BTNH.shape} and keys {k_BSKH.shape} differ in batch or head dim")
    if q_BTNH.shape[2] % k_BSKH.shape[2]:
        raise ValueError(f"{q_BTNH.shape[2]} query heads are no multiple of {k_BSKH.shape[2]} key heads")
