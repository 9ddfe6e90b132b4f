"""The contrastive loss of sentence embeddings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from transformer_jax.config import ContrastiveConfig
from transformer_jax.models.classifier import pool
from transformer_jax.models.encoder import Encoder
from transformer_jax.training.step import Batch, LossFn, Sums


def contrastive_losses(a_BD: Float[Array, "B D"], b_BD: Float[Array, "B D"], is_pair_B: Bool[Array, " B"],
                       temperature: float) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Computes the InfoNCE loss of pairs of vectors, in both directions.

    Each vector must find the other one of its pair among those of the batch, by the cosine.

    Source: van den Oord et al. (2018); with both directions as in Radford et al. (2021).

    Args:
      a_BD: the vector of the first text of each pair.
      b_BD: that of the second text.
      is_pair_B: False for rows that only fill the batch. They are no negative examples.
      temperature: the divisor of the cosines.

    Returns:
      The mean of the losses of the two directions for each pair, in nats, and 1 for each pair whose
      first text finds its second text, else 0; both float32.
    """
    a_BD, b_BD = (x.astype(jnp.float32) for x in (a_BD, b_BD))
    a_BD, b_BD = (x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6) for x in (a_BD, b_BD))
    scores_BB = jnp.matmul(a_BD, b_BD.T, precision="highest") / temperature
    both = [jnp.where(is_pair_B[None], scores, -1e9) for scores in (scores_BB, scores_BB.T)]
    forth_B, back_B = (jnp.diagonal(jax.nn.log_softmax(scores, axis=-1)) for scores in both)
    return -(forth_B + back_B) / 2, (both[0].argmax(-1) == jnp.arange(len(a_BD))).astype(jnp.float32)


def contrastive_loss(config: ContrastiveConfig) -> LossFn:
    """Makes the loss of sentence embeddings.

    With gradient accumulation, only the pairs of the same part of a batch are negative examples.

    Args:
      config: the pooling, the temperature and the widths of the vectors.

    Returns:
      A loss function for ``Encoder`` models. Its batches have ``tokens`` and ``segment_ids``
      ``[B, 2, T]``. With several widths, the loss is the mean over them. The third item of its
      result has the sum ``accuracy``, for whole vectors.
    """
    def loss_fn(model: Encoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        tokens_MT, segment_ids_MT = (batch[name].reshape(-1, batch[name].shape[-1]) for name in
                                     ("tokens", "segment_ids"))
        trace: Any = model(tokens_MT, segment_ids_BT=segment_ids_MT, key=key).trace
        vectors_B2D = pool(trace.final, config.pooling, segment_ids_MT).reshape(len(batch["tokens"]), 2, -1)
        is_pair_B = batch["segment_ids"].any((1, 2))
        found = [contrastive_losses(vectors_B2D[:, 0, :dim], vectors_B2D[:, 1, :dim], is_pair_B, config.temperature)
                 for dim in (vectors_B2D.shape[-1], *config.dims)]
        losses_B = sum(losses for losses, _ in found) / len(found)
        return ((losses_B * is_pair_B).sum(), is_pair_B.sum().astype(jnp.float32),
                {"accuracy": (found[0][1] * is_pair_B).sum()})

    return loss_fn
