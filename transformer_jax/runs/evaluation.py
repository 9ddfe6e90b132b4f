"""``tj.evaluate``: how good a trained model is, as numbers."""

from __future__ import annotations

from typing import Any

from transformer_jax import tasks
from transformer_jax.config import ExperimentConfig
from transformer_jax.tasks.base import Task
from transformer_jax.training.bundle import Bundle


def evaluate(bundle: Bundle, data: Any = None, *, task: str | None = None, batch_size: int = 32,
             **options: Any) -> dict[str, float]:
    """Measures a trained model.

    Args:
      bundle: the model with its tokenizer.
      data: a path, or examples as the task reads them; ``None``: what the model's own run held out.
      task: by whose measure, such as ``"language_model"``; by default the task that trained the
        model, else the first of the model's family.
      batch_size: rows at a time.
      **options: further settings of the task, such as ``beam_size`` for translation.

    Returns:
      Numbers by name, which the task's ``measure`` describes: for a language model ``loss``,
      ``perplexity``, ``bits_per_byte`` and ``tokens``, for example.

    Raises:
      ValueError: for a model without a tokenizer, or without data where none was held out.
    """
    if bundle.tokenizer is None:
        raise ValueError("this model comes without a tokenizer, so that its data cannot be read")
    return evaluating_task(bundle, task).measure(bundle, data, batch_size=batch_size, **options)


def evaluating_task(bundle: Bundle, name: str | None = None) -> Task:
    """The task by whose measure a model is evaluated; arguments as in :func:`evaluate`."""
    experiment = bundle.experiment
    if experiment is None:
        experiment = ExperimentConfig(model=bundle.config)
    elif name is None and experiment.model.family != bundle.config.family:
        experiment = experiment.replace(task=None, model=bundle.config)
    return tasks.get(tasks.name_of(experiment) if name is None else name)(experiment)
