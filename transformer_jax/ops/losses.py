"""Cross entropy of next-token or masked-token predictions, in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array, *, label_smoothing: float = 0.0,
                  z_loss: float = 0.0) -> jax.Array:
    """Cross entropy of every token, in nats.

    Args:
      logits: ``[..., V]``.
      targets: ids ``[...]``.
      label_smoothing: mass spread evenly over the vocabulary (Szegedy et al., 2016).
      z_loss: weight of log(Z)^2, which keeps logits from drifting (de Brebisson and Vincent, 2016).

    Returns:
      float32 ``[...]``; weigh and average it as the task wants.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - (1.0 - label_smoothing) * target
    if label_smoothing:
        loss -= label_smoothing * logits.mean(-1)
    return loss + z_loss * log_z**2 if z_loss else loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 7, 8))
def linear_cross_entropy(hidden: jax.Array, unembedding_VD: jax.Array, targets: jax.Array,
                         label_smoothing: float = 0.0, z_loss: float = 0.0, chunk: int | None = None,
                         bias_V: jax.Array | None = None, parts: int = 1, precision: str | None = None) -> jax.Array:
    """:func:`cross_entropy` of ``hidden @ unembedding_VD.T + bias_V``, without ever holding the
    logits.

    The vocabulary is walked in chunks, forward (a running log-sum-exp) and backward (the chunk's
    logits are computed again), so that no ``[..., V]`` array lives; chunks of the vocabulary rather
    than of the tokens let each chunk write its own rows of the unembedding's gradient.

    Args:
      hidden: final hidden states ``[..., D]``; one leading axis is what XLA:CPU multiplies fastest.
      unembedding_VD: the output matrix.
      targets: ids ``[...]``.
      label_smoothing: see :func:`cross_entropy`.
      z_loss: see :func:`cross_entropy`.
      chunk: vocabulary rows at a time, in each part; by default so many that a chunk has 2**25
        logits at most.
      bias_V: added to the logits.
      parts: into how many equal parts devices have divided the vocabulary. They are walked side by
        side: one after the other each chunk would be on one device.
      precision: of the products, see :func:`transformer_jax.ops.attend`.

    Returns:
      float32 ``[...]``.
    """
    return _forward(hidden, unembedding_VD, targets, label_smoothing, z_loss, chunk, bias_V, parts, precision)[0]


_MOST_LOGITS = 1 << 25  # float32: 128 MiB
_SMALLEST_CHUNK, _LARGEST_CHUNK = 256, 1024


class _Chunks:
    """The vocabulary in chunks of C rows, the last one short; with several parts, in chunks of each
    (an axis X)."""

    def __init__(self, hidden: jax.Array, unembedding_VD: jax.Array, targets: jax.Array, bias_V: jax.Array | None,
                 chunk: int | None, parts: int, precision: str | None):
        vocab_size, dim = unembedding_VD.shape
        if vocab_size % parts:
            raise ValueError(f"a vocabulary of {vocab_size} does not divide into {parts} parts")
        self.size = vocab_size // parts
        self.parts = () if parts == 1 else (parts,)
        self.hidden, self.precision = hidden, precision
        self.rows_XVD = unembedding_VD.reshape(*self.parts, self.size, dim)
        self.bias_XV = None if bias_V is None else bias_V.reshape(*self.parts, self.size)
        self.targets = targets[..., None] - self.size * jnp.arange(parts) if self.parts else targets
        fitting = max(_MOST_LOGITS // targets.size, 1)
        by_tokens = min(max(1 << fitting.bit_length() - 1, _SMALLEST_CHUNK), _LARGEST_CHUNK)
        self.chunk = min(by_tokens if chunk is None else chunk, self.size)

    def walk(self, body, carry):
        """carry = body(carry, start, rows_XCD, logits, columns of the targets) over the chunks."""
        def step(carry, start, size):
            rows_XCD = jax.lax.dynamic_slice_in_dim(self.rows_XVD, start, size, axis=-2).astype(self.hidden.dtype)
            logits = jax.lax.dot_general(self.hidden, rows_XCD, (((self.hidden.ndim - 1,), (rows_XCD.ndim - 1,)),
                                                                 ((), ())), precision=self.precision,
                                         preferred_element_type=jnp.float32)
            if self.bias_XV is not None:
                logits += jax.lax.dynamic_slice_in_dim(self.bias_XV, start, size, axis=-1).astype(jnp.float32)
            return body(carry, start, rows_XCD, logits, (self.targets - start)[..., None])

        whole, rest = divmod(self.size, self.chunk)
        carry = jax.lax.fori_loop(0, whole, lambda i, carry: step(carry, i * self.chunk, self.chunk), carry)
        return step(carry, whole * self.chunk, rest) if rest else carry


def _forward(hidden, unembedding_VD, targets, label_smoothing, z_loss, chunk, bias_V, parts, precision):
    chunks = _Chunks(hidden, unembedding_VD, targets, bias_V, chunk, parts, precision)

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
    largest, total, target, sum_ = chunks.walk(body, (lowest, zeros, zeros, zeros))
    log_z = largest + jnp.log(total)
    if chunks.parts:
        log_z, target, sum_ = jax.nn.logsumexp(log_z, axis=-1), target.sum(-1), sum_.sum(-1)
    loss = log_z - (1.0 - label_smoothing) * target - label_smoothing / unembedding_VD.shape[0] * sum_
    return loss + z_loss * log_z**2, (hidden, unembedding_VD, targets, bias_V, log_z)


def _backward(label_smoothing, z_loss, chunk, parts, precision, saved, cotangent):
    hidden, unembedding_VD, targets, bias_V, log_z = saved
    chunks = _Chunks(hidden, unembedding_VD, targets, bias_V, chunk, parts, precision)
    softmax_scale = cotangent * (1.0 + 2.0 * z_loss * log_z)
    tokens = tuple(range(targets.ndim))
    to_columns = tuple(range(targets.ndim, targets.ndim + 1 + len(chunks.parts)))

    def body(carry, start, rows_XCD, logits, columns):
        d_hidden, d_rows_XVD, d_bias_XV = carry
        scale, cotangents, log_zs = (jnp.expand_dims(x, to_columns) for x in (softmax_scale, cotangent, log_z))
        is_target = columns == jnp.arange(logits.shape[-1])
        wanted = (1.0 - label_smoothing) * is_target + label_smoothing / unembedding_VD.shape[0]
        d_logits = scale * jnp.exp(logits - log_zs) - cotangents * wanted
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
    zero_bias = None if bias_V is None else jnp.zeros(chunks.bias_XV.shape, jnp.float32)
    d_hidden, d_rows_XVD, d_bias_XV = chunks.walk(body, (*zeros, zero_bias))
    d_bias_V = None if bias_V is None else d_bias_XV.reshape(-1).astype(bias_V.dtype)
    return d_hidden.astype(hidden.dtype), d_rows_XVD.reshape(unembedding_VD.shape), None, d_bias_V


linear_cross_entropy.defvjp(_forward, _backward)
