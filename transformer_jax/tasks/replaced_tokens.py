"""ELECTRA: a generator restores masked tokens, and a discriminator finds its mistakes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from transformer_jax.tasks.inputs import tokenizer_of
from transformer_jax.tasks.masked_language_model import MaskedLanguageModel
from transformer_jax.tasks.task_data import TaskData
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.evaluation import mean_loss
from transformer_jax.training.replaced_tokens import discriminator_scores, replaced_token_loss
from transformer_jax.training.step import Batch, Sums


class ReplacedTokenDetection(MaskedLanguageModel):
    """Replaced token detection (Clark et al., 2020), on the data of ``masked_language_model``."""

    name = "replaced_tokens"
    family = "electra"

    def loss(self, model: Any, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the weighted losses of both models, in nats."""
        return replaced_token_loss(model, batch, key)

    def evaluation_loss(self, model: Any, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the same loss with fixed noise for the drawn tokens."""
        return replaced_token_loss(model, batch, key)

    def show(self, model: Any, step: int, data: TaskData) -> str:
        """Returns the tokens that the generator proposes for each mask of ``sample.prompt``. Below
        each text are the words that the discriminator takes for replaced, with their
        probabilities."""
        proposals = super().show(model.generator, step, data).splitlines()
        tokenizer, discriminator = data.shown, model.discriminator
        lines = []
        for proposal in proposals:
            text = proposal.rpartition("  (")[0]
            ids = tokenizer.encode_masked(text)
            odds_T = discriminator(jnp.asarray([ids])).logits[0, :, 0]
            suspects = [f"{tokenizer.decode([token]).strip()} ({chance:.2f})"
                        for token, chance in zip(ids, jax.nn.sigmoid(odds_T).tolist(), strict=True) if chance > 0.5]
            lines += [proposal, f"    replaced: {', '.join(suspects) or 'nothing'}"]
        return "\n".join(lines)

    def measure(self, bundle: Bundle, data: str | Iterable[str] | None = None, *,
                batch_size: int = 32) -> dict[str, float]:
        """Measures both models at the tokens of held-out lines.

        Args:
          bundle: A trained model.
          data: A path or documents to measure on. ``None`` means the held-out part of the training
            data.
          batch_size: The number of rows in a batch.

        Returns:
          ``lines``; the ``generator_loss`` (nats per masked token) and ``generator_accuracy`` of
          drawn tokens; the ``discriminator_loss`` (nats per token), and ``accuracy``,
          ``trivial_accuracy`` (of never taking a token for replaced), ``precision``, ``recall`` and
          ``f1`` of replaced tokens.
        """
        tokenizer = tokenizer_of(bundle)
        held_out = self._measured_lines(data)
        batches: Any = self._data(held_out, held_out, tokenizer).evaluation_batches
        means = mean_loss(replaced_token_loss, lambda: batches(batch_size))(bundle.model)
        means = {name.removeprefix("validation_"): value for name, value in means.items()}
        return {"lines": len(held_out), **{name: means[name] for name in (
            "generator_loss", "generator_accuracy", "discriminator_loss")}, **discriminator_scores(means)}

    def report(self, bundle: Bundle, measured: Mapping[str, Any], **options: Any) -> str:
        """Formats the scores, one line for each of the two models."""
        return "\n".join([
            f"step {bundle.step}, {measured['lines']:,} lines",
            f"generator: loss {measured['generator_loss']:.4f} nats per masked token, "
            f"{measured['generator_accuracy']:.2%} of its tokens are right",
            f"discriminator: loss {measured['discriminator_loss']:.4f} nats per token, accuracy "
            f"{measured['accuracy']:.2%} (never replaced: {measured['trivial_accuracy']:.2%}), precision "
            f"{measured['precision']:.2%}, recall {measured['recall']:.2%}, F1 {measured['f1']:.2%}"])

    def next_command(self, workdir: str) -> str:
        """Returns the command that measures the trained model."""
        return f"transformer-jax evaluate --workdir={workdir}"
