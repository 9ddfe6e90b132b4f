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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def linear_cross_entropy(hidden: jax.Array, unembedding_VD: jax.Array, targets: jax.Array,
                         label_smoothing: float = 0.0, z_loss: float = 0.0, chunk: int = 2048) -> jax.Array:
    """:func:`cross_entropy` of ``hidden @ unembedding_VD.T``, without ever holding the logits.

    The vocabulary is walked in chunks, forward (a running log-sum-exp) and backward (the chunk's logits are
    computed again), so that no ``[..., V]`` array lives; chunks of the vocabulary rather than of the tokens let
    each chunk write its own rows of the unembedding's gradient.

    Args:
      hidden: final hidden states ``[..., D]``.
      unembedding_VD: the output matrix.
      targets: ids ``[...]``.
      label_smoothing: see :func:`cross_entropy`.
      z_loss: see :func:`cross_entropy`.
      chunk: vocabulary rows at a time.

    Returns:
      float32 ``[...]``.
    """
    return _linear_cross_entropy_forward(hidden, unembedding_VD, targets, label_smoothing, z_loss, chunk)[0]


def _chunk_logits(hidden_MD: jax.Array, rows_CD: jax.Array) -> jax.Array:
    return jax.lax.dot_general(hidden_MD, rows_CD.astype(hidden_MD.dtype), (((1,), (1,)), ((), ())),
                               preferred_element_type=jnp.float32)


def _over_vocabulary(unembedding_VD: jax.Array, chunk: int, body, carry):
    """carry = body(carry, start, rows) over chunks of rows, the last one short."""
    vocab_size = unembedding_VD.shape[0]
    chunk = min(chunk, vocab_size)
    whole, rest = divmod(vocab_size, chunk)

    def step(i, carry):
        return body(carry, i * chunk, jax.lax.dynamic_slice_in_dim(unembedding_VD, i * chunk, chunk))

    carry = jax.lax.fori_loop(0, whole, step, carry)
    return body(carry, whole * chunk, unembedding_VD[whole * chunk:]) if rest else carry


def _linear_cross_entropy_forward(hidden, unembedding_VD, targets, label_smoothing, z_loss, chunk):
    hidden_MD, targets_M = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    num_tokens, vocab_size = targets_M.shape[0], unembedding_VD.shape[0]

    def body(carry, start, rows_CD):
        largest_M, total_M, target_M, sum_M = carry
        logits_MC = _chunk_logits(hidden_MD, rows_CD)
        new_largest_M = jnp.maximum(largest_M, logits_MC.max(-1))
        total_M = total_M * jnp.exp(largest_M - new_largest_M) + jnp.exp(logits_MC - new_largest_M[:, None]).sum(-1)
        inside_M = (targets_M >= start) & (targets_M < start + rows_CD.shape[0])
        column_M = jnp.clip(targets_M - start, 0, rows_CD.shape[0] - 1)
        found_M = jnp.take_along_axis(logits_MC, column_M[:, None], axis=-1)[:, 0]
        return (new_largest_M, total_M, jnp.where(inside_M, found_M, target_M),
                sum_M + logits_MC.sum(-1) if label_smoothing else sum_M)

    zeros_M = jnp.zeros(num_tokens, jnp.float32)
    start_M = jnp.full(num_tokens, jnp.finfo(jnp.float32).min)
    largest_M, total_M, target_M, sum_M = _over_vocabulary(unembedding_VD, chunk, body,
                                                           (start_M, zeros_M, zeros_M, zeros_M))
    log_z_M = largest_M + jnp.log(total_M)
    loss_M = log_z_M - (1.0 - label_smoothing) * target_M - label_smoothing / vocab_size * sum_M
    loss_M += z_loss * log_z_M**2
    return loss_M.reshape(targets.shape), (hidden, unembedding_VD, targets, log_z_M)


def _linear_cross_entropy_backward(label_smoothing, z_loss, chunk, saved, cotangent):
    hidden, unembedding_VD, targets, log_z_M = saved
    hidden_MD, targets_M = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    cotangent_M = cotangent.reshape(-1)
    vocab_size = unembedding_VD.shape[0]
    softmax_scale_M = cotangent_M * (1.0 + 2.0 * z_loss * log_z_M)

    def body(carry, start, rows_CD):
        d_hidden_MD, d_unembedding_VD = carry
        probabilities_MC = jnp.exp(_chunk_logits(hidden_MD, rows_CD) - log_z_M[:, None])
        is_target_MC = targets_M[:, None] == start + jnp.arange(rows_CD.shape[0])
        wanted_MC = (1.0 - label_smoothing) * is_target_MC + label_smoothing / vocab_size
        d_logits_MC = softmax_scale_M[:, None] * probabilities_MC - cotangent_M[:, None] * wanted_MC
        d_logits_MC = d_logits_MC.astype(hidden.dtype)
        d_hidden_MD += jnp.dot(d_logits_MC, rows_CD.astype(hidden.dtype), preferred_element_type=jnp.float32)
        d_rows_CD = jax.lax.dot_general(d_logits_MC, hidden_MD, (((0,), (0,)), ((), ())),
                                        preferred_element_type=jnp.float32)
        return d_hidden_MD, jax.lax.dynamic_update_slice_in_dim(
            d_unembedding_VD, d_rows_CD.astype(unembedding_VD.dtype), start, axis=0)

    zeros = jnp.zeros(hidden_MD.shape, jnp.float32), jnp.zeros_like(unembedding_VD)
    d_hidden_MD, d_unembedding_VD = _over_vocabulary(unembedding_VD, chunk, body, zeros)
    return d_hidden_MD.reshape(hidden.shape).astype(hidden.dtype), d_unembedding_VD, None


linear_cross_entropy.defvjp(_linear_cross_entropy_forward, _linear_cross_entropy_backward)
