"""``tj.evaluate``, which measures how good a trained model is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformer_jax import tasks
from transformer_jax.config import ExperimentConfig
from transformer_jax.settings import nearest
from transformer_jax.tasks.base import Task
from transformer_jax.training.bundle import Bundle


def evaluate(bundle: Bundle, data: Any = None, *, task: str | None = None, batch_size: int = 32,
             **options: Any) -> dict[str, float]:
    """Measures a trained model.

    Args:
      bundle: The model with its tokenizer.
      data: A path, or examples in the form that the task reads. ``None`` means the held-out part
        of the data that the model was trained on.
      task: The name of the task that measures the model, such as ``"language_model"``. By default
        this is the task that trained the model or, if that is unknown, the default task of the
        model's family.
      batch_size: The number of rows in a batch.
      **options: Further arguments of the task's ``measure``, such as ``beam_size`` for translation.

    Returns:
      Numbers by name, which the task's ``measure`` describes. For a language model these are
      ``loss``, ``perplexity``, ``bits_per_byte``, ``tokens`` and others.

    Raises:
      ValueError: If an argument has a wrong type, the task has no such option, the model has no
        tokenizer, or no data is given and the task cannot find the held-out part.
    """
    if not isinstance(bundle, Bundle):
        raise ValueError(f"bundle is of type {type(bundle).__name__}; expected a tj.Bundle, as tj.load and tj.train "
                         "return it")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a positive integer")
    measuring = evaluating_task(bundle, task)
    if bundle.tokenizer is None and measuring.reads_text:
        raise ValueError("the model has no tokenizer, so its data cannot be read; load a model that is stored with its "
                         "tokenizer")
    known = [known for known in _arguments(measuring) if is_option(measuring, known)]
    for name in options:
        if not is_option(measuring, name):
            raise ValueError(f"the task {measuring.name!r} has no option {name!r}{nearest(name, known)}; its options "
                             f"are {', '.join(known)}")
    return measuring.measure(bundle, data, batch_size=batch_size, **options)


def is_option(task: Task, name: str) -> bool:
    """Returns True if the ``measure`` of a task accepts an option.

    Args:
      task: The task.
      name: The name of the option, such as ``beam_size``.

    Returns:
      True if ``measure`` has an argument of this name that is passed by its name, or accepts all.
    """
    parameters = _arguments(task).values()
    return any(parameter.kind is parameter.VAR_KEYWORD or
               (parameter.kind is parameter.KEYWORD_ONLY and parameter.name == name) for parameter in parameters)


def _arguments(task: Task) -> Mapping[str, inspect.Parameter]:
    """Returns the arguments of the ``measure`` of a task."""
    return inspect.signature(task.measure).parameters


def evaluating_task(bundle: Bundle, name: str | None = None) -> Task:
    """Creates the task that measures a model.

    Args:
      bundle: The model.
      name: The name of the task. ``None`` selects the task as ``evaluate`` does.

    Returns:
      The task.

    Raises:
      ValueError: If the task is for models of another family.
    """
    experiment = bundle.experiment
    if experiment is None:
        experiment = ExperimentConfig(model=bundle.config)
    elif name is None and experiment.model.family != bundle.config.family:
        experiment = experiment.replace(task=None, model=bundle.config)
    task = tasks.get(tasks.name_of(experiment) if name is None else name)(experiment)
    task.check_family(bundle.config.family)
    return task
