"""Supervised fine-tuning: a trained decoder learns to answer from demonstrations."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from transformer_jax.data import (
    Conversation,
    PackedConversations,
    Tokenizer,
    pair_evaluation_batches,
    read_demonstrations,
)
from transformer_jax.models.decoder import Decoder
from transformer_jax.tasks.answering import AnsweringTask
from transformer_jax.tasks.base import TaskData
from transformer_jax.tasks.language_model import LanguageModel
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.evaluation import mean_loss
from transformer_jax.training.metrics import read_metrics
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.step import Batch, Sums


class SupervisedFineTuning(AnsweringTask):
    """Conversations, several to a row; the loss is that of the assistant's tokens (Ouyang et al.,
    2022)."""

    name = "sft"
    examples = "demonstrations"
    read_file = staticmethod(read_demonstrations)

    def prepare(self, examples: Sequence[Conversation], held_out: Sequence[Conversation], tokenizer: Tokenizer,
                cache_dir: pathlib.Path) -> TaskData:
        """Packs the conversations; nothing is kept in ``cache_dir``, since they are few."""
        train, validation = (PackedConversations.build(part, tokenizer, self.config.model.max_len)
                             for part in (examples, held_out))
        return TaskData(
            train=train, contents=[train.digest, validation.digest],
            summary=f"{train.summary()}; held out: {validation.summary()}",
            evaluation_batches=lambda size: pair_evaluation_batches(validation, size),
            shown=self.shown_prompts((messages[:-1] for messages in held_out), tokenizer))

    def loss(self, model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """The cross entropy of the assistant's tokens, in nats."""
        return next_token_loss(self.config.loss)(model, batch, key)

    def evaluation_loss(self, model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Without label smoothing and z-loss."""
        return next_token_loss()(model, batch, key)

    def measure(self, bundle: Bundle, data: str | Sequence[Conversation] | None = None, *, batch_size: int = 32,
                **options: Any) -> dict[str, float]:
        """The loss in nats and the perplexity of the assistant's tokens; of a text, what a language
        model has.

        Args:
          bundle: a trained decoder with its tokenizer.
          data: conversations, a JSON or JSONL file of them, or a text file.
          batch_size: rows at a time.
        """
        if isinstance(data, (str, pathlib.Path)):
            if ".json" not in str(data).lower():
                return LanguageModel(self.config).measure(bundle, data, batch_size=batch_size)
            data = read_demonstrations(data)
        elif data is None:
            _, data = self.read()
        rows = PackedConversations.build(data, bundle.tokenizer, bundle.config.max_len)
        loss = mean_loss(next_token_loss(), lambda: pair_evaluation_batches(rows, batch_size))(bundle.model)
        return {"loss": loss["validation_loss"], "perplexity": math.exp(loss["validation_loss"]),
                "conversations": len(data)}

    def finish(self) -> str:
        """One line on where the held-out loss was lowest, and how it went on."""
        losses = [(line["validation_loss"], line["step"]) for line in read_metrics(self.workdir / "metrics.jsonl")
                  if "validation_loss" in line]
        (best, step), (last, end) = min(losses), losses[-1]
        if step == end:
            return f"the held-out loss was still falling at the last step: {best:.4f}; more steps may help"
        return (f"held-out loss {best:.4f} at step {step}, the best, kept in {self.workdir}/best (load with "
                f"step='best'); from there on it overfits: {last:.4f} at step {end}")

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Full rows of packed conversations."""
        shape = (batch_size, self.config.model.max_len)
        return {**dict.fromkeys(("tokens", "targets", "segment_ids"), jax.ShapeDtypeStruct(shape, np.int32)),
                "weights": jax.ShapeDtypeStruct(shape, np.float32)}

    def next_command(self, workdir: str) -> str:
        """Ask the best checkpoint something."""
        return f'transformer-jax generate --workdir={workdir} --step=best --chat --prompt="..."'
