"""Jitted entry points for research code, with the checks that only the host can make."""

from __future__ import annotations

import jax
import numpy as np

from transformer_jax.models.decoder import Decoder
from transformer_jax.models.output import Trace


@jax.jit
def _logits(model: Decoder, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    return model(tokens_BT, segment_ids_BT=segment_ids_BT).logits


@jax.jit
def _trace(model: Decoder, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None) -> Trace:
    return model(tokens_BT, segment_ids_BT=segment_ids_BT).trace


def forward(model: Decoder, tokens_BT: jax.Array, *, segment_ids_BT: jax.Array | None = None) -> jax.Array:
    """Logits, float32 ``[B, T, V]``, by one jitted call.

    Args:
      model: the model.
      tokens_BT: token ids ``[B, T]``.
      segment_ids_BT: documents of packed rows, 0 for padding.

    Raises:
      ValueError: for a token id outside the vocabulary (JAX would clamp it silently).
    """
    check_tokens(tokens_BT, model.config.vocab_size)
    return _logits(model, tokens_BT, segment_ids_BT)


def trace(model: Decoder, tokens_BT: jax.Array, *, segment_ids_BT: jax.Array | None = None) -> Trace:
    """The :class:`Trace` of a forward pass, by one jitted call; arguments as in :func:`forward`."""
    check_tokens(tokens_BT, model.config.vocab_size)
    return _trace(model, tokens_BT, segment_ids_BT)


def check_tokens(tokens: jax.Array | np.ndarray, vocab_size: int) -> None:
    """Raises ValueError for an id outside the vocabulary; traced tokens pass unseen."""
    if isinstance(tokens, jax.core.Tracer):
        return
    ids = np.asarray(tokens)
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        raise ValueError(f"token id {int(ids[outside][0])} is outside the vocabulary of {vocab_size} "
                         f"(ids 0 to {vocab_size - 1})")
