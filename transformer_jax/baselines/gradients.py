"""How far back the gradient of a loss reaches: the norm of the gradient by distance."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer_jax.ops.losses import cross_entropy


@jax.jit
def _norms(model: Any, tokens_BT: jax.Array, target_B: jax.Array) -> jax.Array:
    """Returns the norm of the gradient of the last loss with respect to each embedding, [B, T]."""
    def loss(embeddings_BTD: jax.Array) -> jax.Array:
        logits_BV = model(embeddings_BTD=embeddings_BTD).logits[:, -1]
        return cross_entropy(logits_BV, target_B).sum()

    embeddings_BTD = model.embeddings.token[...][tokens_BT]
    gradient_BTD = jax.grad(loss)(embeddings_BTD)
    # The squares of gradients below 1e-19 are 0 in float32, so they are scaled before they are squared.
    largest_BT1 = jnp.maximum(jnp.abs(gradient_BTD).max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return jnp.linalg.norm(gradient_BTD / largest_BT1, axis=-1) * largest_BT1[..., 0]


def gradient_by_distance(model: Any, tokens_BT: Int[Array | np.ndarray, "B T"],
                         target_B: Int[Array | np.ndarray, " B"]) -> Float[np.ndarray, " T"]:
    """Computes how strongly the loss of the last token depends on each earlier token.

    In an RNN the gradient passes through one matrix and one tanh for each token between, and it
    vanishes or explodes with the distance (Bengio et al., 1994). The gates of LSTM and GRU let it
    pass, and attention reaches each token in one step.

    Args:
      model: a decoder or a recurrent language model.
      tokens_BT: token ids.
      target_B: the token after each row.

    Returns:
      float32 ``[T]``: at index d, the norm of the gradient with respect to the embedding of the
      token d places before the last, as the mean over the rows.

    Raises:
      ValueError: if the tokens and targets have other shapes.
    """
    if np.ndim(tokens_BT) != 2 or np.shape(target_B) != np.shape(tokens_BT)[:1]:
        raise ValueError(f"expected tokens [B, T] and targets [B], got shapes {np.shape(tokens_BT)} and "
                         f"{np.shape(target_B)}")
    return np.asarray(_norms(model, jnp.asarray(tokens_BT), jnp.asarray(target_B)).mean(0))[::-1]
