"""The cross entropy of next-token or masked-token predictions, computed in float32."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer_jax.derivatives import with_gradient
from transformer_jax.ops.checks import check_ids
from transformer_jax.ops.linear import soft_cap


def cross_entropy(logits: Float[Array, "*tokens V"], targets: Int[Array, "*tokens"], *,
                  label_smoothing: float = 0.0, z_loss: float = 0.0) -> Float[Array, "*tokens"]:
    """Computes the cross entropy of every token, in nats.

    Args:
      logits: ``[..., V]``.
      targets: Token ids ``[...]`` in ``[0, V)``.
      label_smoothing: The probability mass that is spread evenly over the vocabulary (Szegedy et
        al., 2016).
      z_loss: The weight of the term log(Z)^2, which keeps logits from drifting (de Brebisson and
        Vincent, 2016).

    Returns:
      float32 ``[...]``, which the caller weights and averages.
    """
    check_ids("target", targets, logits.shape[-1], "the vocabulary")
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - (1.0 - label_smoothing) * target
    if label_smoothing:
        loss -= label_smoothing * logits.mean(-1)
    return loss + z_loss * log_z**2 if z_loss else loss


def linear_cross_entropy(hidden: Float[Array, "*tokens D"], unembedding_VD: Float[Array, "V D"],
                         targets: Int[Array, "*tokens"], label_smoothing: float = 0.0, z_loss: float = 0.0,
                         chunk: int | None = None, bias_V: Float[Array, " V"] | None = None, parts: int = 1,
                         precision: str | None = None, cap: float | None = None) -> Float[Array, "*tokens"]:
    """Computes the cross entropy of ``hidden @ unembedding_VD.T + bias_V`` in chunks.

    It never materializes all logits ``[..., V]``. The forward pass computes a running log-sum-exp
    over chunks of the vocabulary. The backward pass recomputes the logits of each chunk. Because
    the chunks split the vocabulary and not the tokens, each chunk writes its own rows of the
    unembedding's gradient.

    Args:
      hidden: The final hidden states ``[..., D]``. XLA:CPU is fastest with one leading axis.
      unembedding_VD: The output matrix ``[V, D]``.
      targets: Token ids ``[...]`` in ``[0, V)``.
      label_smoothing: See ``cross_entropy``.
      z_loss: See ``cross_entropy``.
      chunk: The number of rows of the vocabulary in a chunk of each part. The default gives a chunk
        at most 2**25 logits, but at least 256 rows and at most 1024.
      bias_V: What is added to the logits ``[V]``.
      parts: The number of devices that shard the vocabulary. All parts are processed at the same
        time, because otherwise each chunk would be on one device.
      precision: The precision of the products, see ``transformer_jax.ops.attend``.
      cap: The soft cap of the logits, see ``transformer_jax.ops.linear.soft_cap``; ``None``: none.

    Returns:
      float32 ``[...]``, as from ``cross_entropy``.
    """
    check_ids("target", targets, unembedding_VD.shape[0], "the vocabulary")
    settings = _Settings(label_smoothing, z_loss, chunk, parts, precision, cap)
    return with_gradient(functools.partial(_plain, settings), functools.partial(_backward, settings), hidden,
                         unembedding_VD, targets, bias_V, forward=functools.partial(_forward, settings))


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The values that are constants when a program is compiled, see ``linear_cross_entropy``."""

    label_smoothing: float
    z_loss: float
    chunk: int | None
    parts: int
    precision: str | None
    cap: float | None


_MOST_LOGITS = 1 << 25  # float32: 128 MiB
_SMALLEST_CHUNK, _LARGEST_CHUNK = 256, 1024


class _Chunks:
    """The vocabulary in chunks of C rows; the last chunk may be shorter.

    With several parts there is an additional axis X, and a chunk has C rows of each part.
    """

    def __init__(self, hidden: jax.Array, unembedding_VD: jax.Array, targets: jax.Array, bias_V: jax.Array | None,
                 settings: _Settings):
        (vocab_size, dim), parts, chunk = unembedding_VD.shape, settings.parts, settings.chunk
        if vocab_size % parts:
            raise ValueError(f"a vocabulary of {vocab_size} does not divide into {parts} equal parts; choose parts "
                             "that divide it")
        self.size = vocab_size // parts
        self.parts = () if parts == 1 else (parts,)
        self.hidden, self.precision, self.cap = hidden, settings.precision, settings.cap
        self.rows_XVD = unembedding_VD.reshape(*self.parts, self.size, dim)
        self.bias_XV = None if bias_V is None else bias_V.reshape(*self.parts, self.size)
        self.targets = targets[..., None] - self.size * jnp.arange(parts) if self.parts else targets
        fitting = max(_MOST_LOGITS // targets.size, 1)
        by_tokens = min(max(1 << fitting.bit_length() - 1, _SMALLEST_CHUNK), _LARGEST_CHUNK)
        self.chunk = min(by_tokens if chunk is None else chunk, self.size)

    def loop_over_chunks(self, body, carry, is_recomputed=False):
        """Applies ``carry = body(carry, start, rows_XCD, logits, columns)`` to all chunks.

        ``columns`` are the indices of the targets in the chunk.
        """
        def step(carry, start, size):
            rows_XCD = jax.lax.dynamic_slice_in_dim(self.rows_XVD, start, size, axis=-2).astype(self.hidden.dtype)
            logits = jax.lax.dot_general(self.hidden, rows_XCD, (((self.hidden.ndim - 1,), (rows_XCD.ndim - 1,)),
                                                                 ((), ())), precision=self.precision,
                                         preferred_element_type=jnp.float32)
            if self.bias_XV is not None:
                logits += jax.lax.dynamic_slice_in_dim(self.bias_XV, start, size, axis=-1).astype(jnp.float32)
            logits = logits if self.cap is None else soft_cap(logits, self.cap)
            return body(carry, start, rows_XCD, logits, (self.targets - start)[..., None])

        if is_recomputed:
            step = jax.checkpoint(step, static_argnums=2)
        whole, rest = divmod(self.size, self.chunk)
        carry = jax.lax.fori_loop(0, whole, lambda i, carry: step(carry, i * self.chunk, self.chunk), carry)
        return step(carry, whole * self.chunk, rest) if rest else carry


def _plain(settings, hidden, unembedding_VD, targets, bias_V):
    """Computes the loss in operations that JAX can differentiate in both modes.

    The logits of a chunk are recomputed instead of saved.
    """
    return _forward(settings, hidden, unembedding_VD, targets, bias_V, is_recomputed=True)[0]


def _forward(settings, hidden, unembedding_VD, targets, bias_V, is_recomputed=False):
    """Computes the loss, and the log-sum-exp that the gradient needs."""
    label_smoothing, z_loss = settings.label_smoothing, settings.z_loss
    chunks = _Chunks(hidden, unembedding_VD, targets, bias_V, settings)

    def body(carry, start, rows_XCD, logits, columns):
        largest, total, target, sum_ = carry
        new_largest = jnp.maximum(largest, logits.max(-1))
        total = total * jnp.exp(largest - new_largest) + jnp.exp(logits - new_largest[..., None]).sum(-1)
        size = logits.shape[-1]
        found = jnp.take_along_axis(logits, jnp.clip(columns, 0, size - 1), axis=-1)
        target = jnp.where((columns >= 0) & (columns < size), found, target[..., None])[..., 0]
        return new_largest, total, target, sum_ + logits.sum(-1) if label_smoothing else sum_

    zeros = jnp.zeros(chunks.targets.shape, jnp.float32)
    lowest = jnp.full(zeros.shape, jnp.finfo(jnp.float32).min)
    largest, total, target, sum_ = chunks.loop_over_chunks(body, (lowest, zeros, zeros, zeros), is_recomputed)
    log_z = largest + jnp.log(total)
    if chunks.parts:
        log_z, target, sum_ = jax.nn.logsumexp(log_z, axis=-1), target.sum(-1), sum_.sum(-1)
    loss = log_z - (1.0 - label_smoothing) * target - label_smoothing / unembedding_VD.shape[0] * sum_
    return loss + z_loss * log_z**2, log_z


def _backward(settings, args, log_z, cotangent):
    """Computes the gradients, with the logits of each chunk recomputed."""
    hidden, unembedding_VD, targets, bias_V = args
    label_smoothing, z_loss, precision = settings.label_smoothing, settings.z_loss, settings.precision
    chunks = _Chunks(hidden, unembedding_VD, targets, bias_V, settings)
    softmax_scale = cotangent * (1.0 + 2.0 * z_loss * log_z)
    tokens = tuple(range(targets.ndim))
    to_columns = tuple(range(targets.ndim, targets.ndim + 1 + len(chunks.parts)))

    def body(carry, start, rows_XCD, logits, columns):
        d_hidden, d_rows_XVD, d_bias_XV = carry
        scale, cotangents, log_zs = (jnp.expand_dims(x, to_columns) for x in (softmax_scale, cotangent, log_z))
        is_target = columns == jnp.arange(logits.shape[-1])
        wanted = (1.0 - label_smoothing) * is_target + label_smoothing / unembedding_VD.shape[0]
        d_logits = scale * jnp.exp(logits - log_zs) - cotangents * wanted
        if settings.cap is not None:
            d_logits *= 1.0 - jnp.square(logits / settings.cap)  # the derivative of the cap
        if bias_V is not None:
            d_bias_XV = jax.lax.dynamic_update_slice_in_dim(d_bias_XV, d_logits.sum(tokens), start, axis=-1)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden += jax.lax.dot_general(d_logits, rows_XCD, ((to_columns, tuple(range(len(to_columns)))), ((), ())),
                                        precision=precision, preferred_element_type=jnp.float32)
        d_rows_XCD = jax.lax.dot_general(d_logits, hidden, ((tokens, tokens), ((), ())), precision=precision,
                                         preferred_element_type=jnp.float32)
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(
            d_rows_XVD, d_rows_XCD.astype(unembedding_VD.dtype), start, axis=-2), d_bias_XV

    zeros = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(chunks.rows_XVD)
    zero_bias = None if chunks.bias_XV is None else jnp.zeros(chunks.bias_XV.shape, jnp.float32)
    d_hidden, d_rows_XVD, d_bias_XV = chunks.loop_over_chunks(body, (*zeros, zero_bias))
    d_bias_V = None if bias_V is None else d_bias_XV.reshape(-1).astype(bias_V.dtype)
    return d_hidden.astype(hidden.dtype), d_rows_XVD.reshape(unembedding_VD.shape), None, d_bias_V
