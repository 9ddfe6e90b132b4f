"""The objective of ELMo: predict the next token from the left, and the previous one from the
right."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from transformer_jax.ops.losses import cross_entropy
from transformer_jax.tasks.language_model import LanguageModel
from transformer_jax.tasks.task_data import TaskData
from transformer_jax.training.step import Batch, Sums


class BidirectionalLanguageModel(LanguageModel):
    """Language modelling in both directions (Peters et al., 2018, section 3.1), on the data of
    ``language_model``. The loss is the mean of both directions; ``tj.evaluate`` measures the
    forward direction, which is comparable with other language models."""

    name = "bidirectional_language_model"
    family = "elmo"

    def loss(self, model: Any, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the cross entropy of next and previous tokens, in nats."""
        return self._both(model, batch, key, self.config.loss.label_smoothing)

    def evaluation_loss(self, model: Any, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the same loss without label smoothing."""
        return self._both(model, batch, key, 0.0)

    def show(self, model: Any, step: int, data: TaskData) -> None:
        """Shows nothing, because a model that also reads from the end cannot continue a text."""

    def _both(self, model: Any, batch: Batch, key: jax.Array | None, smoothing: float) -> Sums:
        """Returns the sums over both directions."""
        tokens_BT, ids_BT = batch["tokens"], batch.get("segment_ids")
        ids_BT = jnp.ones_like(tokens_BT) if ids_BT is None else ids_BT
        out = model(tokens_BT, segment_ids_BT=ids_BT, key=key)
        weights_BT = batch.get("weights", jnp.ones(tokens_BT.shape, jnp.float32))
        ahead_BT = cross_entropy(out.logits, batch["targets"], label_smoothing=smoothing)
        # The state of a token that is read from the end predicts the token before it in its
        # document.
        back_BT = cross_entropy(model.unembed(out.trace.backward[:, 1:]), tokens_BT[:, :-1], label_smoothing=smoothing)
        inside_BT = ((ids_BT[:, 1:] == ids_BT[:, :-1]) & (ids_BT[:, 1:] != 0)).astype(jnp.float32)
        return ((ahead_BT * weights_BT).sum() + (back_BT * inside_BT).sum(), weights_BT.sum() + inside_BT.sum())
