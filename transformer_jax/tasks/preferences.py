"""Direct preference optimisation: a policy learns from ranked answers, without a reward model."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from transformer_jax.alignment.dpo import dpo_loss, with_reference
from transformer_jax.alignment.rankings import Rankings
from transformer_jax.data import Comparison, read_comparisons
from transformer_jax.data.conversations import AnyTokenizer
from transformer_jax.data.examples import as_comparison
from transformer_jax.data.token_file import is_intact, write_with_digest
from transformer_jax.models.decoder import Decoder
from transformer_jax.tasks.answering import AnsweringTask, answering
from transformer_jax.tasks.task_data import TaskData
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.step import Batch, Sums


class DirectPreference(AnsweringTask):
    """Direct preference optimisation on ranked answers (Rafailov et al., 2023). The reference model
    is the model that training starts from."""

    name = "dpo"
    shows_base = True
    examples = "comparisons"
    read_file = staticmethod(read_comparisons)
    read_example = staticmethod(as_comparison)

    def prepare(self, examples: Sequence[Comparison], held_out: Sequence[Comparison], tokenizer: AnyTokenizer,
                cache_dir: pathlib.Path) -> TaskData:
        """Tokenizes the comparisons, and stores the log-probabilities under the reference model in
        ``cache_dir``."""
        reference, _ = answering(self.base)
        train, validation = (self._with_reference(Rankings.build(part, tokenizer, self.config.model.max_len),
                                                  reference, cache_dir) for part in (examples, held_out))
        return TaskData(train=train, contents=[train.digest, validation.digest],
                        summary=f"{len(train):,} comparisons, {len(validation):,} held out",
                        evaluation_batches=validation.batches,
                        shown=self.shown_prompts((comparison.prompt for comparison in held_out), tokenizer))

    def loss(self, model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the negative log-likelihood of the rankings under the policy's implicit reward,
        in nats per pair."""
        return dpo_loss(self.config.dpo)(model, batch, key)

    def _with_reference(self, rankings: Rankings, reference: Decoder, cache_dir: pathlib.Path) -> Rankings:
        """Adds the log-probabilities under the reference model to the rankings. A resumed run reads
        them from the file that the first start wrote."""
        key = {"rankings": rankings.digest, "reference": tree_digest(reference)}
        path = cache_dir / f"reference-{key['rankings'][:16]}-{key['reference'][:16]}.bin"
        if is_intact(path, key):
            stored_NK = np.fromfile(path, np.float32).reshape(len(rankings), -1)
            return dataclasses.replace(rankings, reference_logprobs_NK=stored_NK)
        rankings = with_reference(rankings, reference, self.config.eval.batch_size)
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_with_digest(path, key, [np.asarray(rankings.reference_logprobs_NK, np.float32)])
        return rankings
