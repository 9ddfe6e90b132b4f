"""Supervised fine-tuning: a trained decoder learns to answer from demonstrations."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

from experiments import answers, runs
from transformer_jax.config import ExperimentConfig
from transformer_jax.data import Conversation, PackedConversations, Tokenizer, pair_evaluation_batches
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.metrics import read_metrics
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.state import TrainState


def train(config: ExperimentConfig, workdir: str | pathlib.Path, base: Bundle, demonstrations: Sequence[Conversation],
          held_out: Sequence[Conversation]) -> TrainState:
    """Fine-tunes on demonstrations, or resumes, and reports where overfitting begins.

    Raises:
      ValueError: for a base that cannot answer; and as :func:`experiments.runs.run`.
    """
    answers.check_base(base)
    make_task = functools.partial(_task, demonstrations, held_out, pathlib.Path(workdir))
    state = runs.run(config, workdir, (), make_task, base)
    print(overfit_point(workdir))
    return state


def overfit_point(workdir: str | pathlib.Path) -> str:
    """One line on where the held-out loss of a run was lowest, and how it went on."""
    losses = [(line["validation_loss"], line["step"]) for line in read_metrics(pathlib.Path(workdir) / "metrics.jsonl")
              if "validation_loss" in line]
    (best, step), (last, end) = min(losses), losses[-1]
    if step == end:
        return f"the held-out loss was still falling at the last step: {best:.4f}; more steps may help"
    return (f"held-out loss {best:.4f} at step {step}, the best, kept in {workdir}/best (load with step='best'); from "
            f"there on it overfits: {last:.4f} at step {end}")


def _task(demonstrations: Sequence[Conversation], held_out: Sequence[Conversation], workdir: pathlib.Path,
          config: ExperimentConfig, tokenizer: Tokenizer, cache_dir: pathlib.Path) -> runs.Task:
    del cache_dir  # conversations are few, and tokenised anew
    train, validation = (PackedConversations.build(part, tokenizer, config.model.max_len)
                         for part in (demonstrations, held_out))
    return runs.Task(
        train=train, contents=[train.digest, validation.digest],
        summary=f"{train.summary()}; held out: {validation.summary()}", loss_fn=next_token_loss(config.loss),
        sample=answers.shower(config, tokenizer, [messages[:-1] for messages in held_out], workdir),
        evaluate=runs.mean_loss(next_token_loss(), lambda: pair_evaluation_batches(validation, config.eval.batch_size),
                                config.eval.max_batches))
