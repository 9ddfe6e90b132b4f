"""Direct preference optimisation: a policy learns from ranked answers, without a reward model."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Sequence

import jax
import numpy as np

from transformer_jax.alignment.dpo import dpo_loss, with_reference
from transformer_jax.alignment.rankings import Rankings
from transformer_jax.data import Comparison, Tokenizer, read_comparisons
from transformer_jax.models.decoder import Decoder
from transformer_jax.tasks.answering import AnsweringTask
from transformer_jax.tasks.base import TaskData
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.step import Batch, Sums


class DirectPreference(AnsweringTask):
    """Ranked answers; the reference is the model to start from (Rafailov et al., 2023)."""

    name = "dpo"
    shows_base = True
    examples = "comparisons"
    read_file = staticmethod(read_comparisons)

    def prepare(self, examples: Sequence[Comparison], held_out: Sequence[Comparison], tokenizer: Tokenizer,
                cache_dir: pathlib.Path) -> TaskData:
        """Tokenizes the comparisons; the log-probabilities of the reference are kept in
        ``cache_dir``."""
        reference = self.base.model
        train, validation = (self._with_reference(Rankings.build(part, tokenizer, self.config.model.max_len),
                                                  reference, cache_dir) for part in (examples, held_out))
        return TaskData(train=train, contents=[train.digest, validation.digest],
                        summary=f"{len(train):,} comparisons, {len(validation):,} held out",
                        evaluation_batches=validation.batches,
                        shown=self.shown_prompts((comparison.prompt for comparison in held_out), tokenizer))

    def loss(self, model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """The negative log-likelihood of the rankings under the policy's implicit reward, in nats a
        pair."""
        return dpo_loss(self.config.dpo)(model, batch, key)

    def _with_reference(self, rankings: Rankings, reference: Decoder, cache_dir: pathlib.Path) -> Rankings:
        """The rankings with the log-probabilities of the reference, which a run that is resumed
        reads from a file."""
        path = cache_dir / f"reference-{rankings.digest[:16]}-{tree_digest(reference)[:16]}.npy"
        if path.exists():
            return dataclasses.replace(rankings, reference_logprobs_NK=np.load(path))
        rankings = with_reference(rankings, reference, self.config.eval.batch_size)
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache_dir, suffix=".partial", delete=False) as file:
            np.save(file, rankings.reference_logprobs_NK)
        pathlib.Path(file.name).replace(path)
        return rankings
