"""The registry of all tasks by name."""

from __future__ import annotations

import importlib
from typing import Any

from transformer_jax.config import ExperimentConfig
from transformer_jax.settings import nearest
from transformer_jax.tasks.base import Task
from transformer_jax.training.bundle import Bundle

# The classes of tasks by name. A task of the library is given as "module:class", and it is imported
# only when it is used, so that a program does not load the other tasks.
_TASKS: dict[str, type[Task] | str] = {
    "language_model": "language_model:LanguageModel",
    "masked_language_model": "masked_language_model:MaskedLanguageModel",
    "replaced_tokens": "replaced_tokens:ReplacedTokenDetection",
    "bidirectional_language_model": "bidirectional_language_model:BidirectionalLanguageModel",
    "translation": "translation:Translation",
    "classify": "classification:TextClassification",
    "classify_tokens": "token_classification:TokenClassification",
    "embed": "embedding:SentenceEmbedding",
    "sft": "sft:SupervisedFineTuning",
    "reward": "reward:RewardModeling",
    "dpo": "preferences:DirectPreference",
    "policy": "policy:PolicyLearning",
    "word_vectors": "word_vectors:WordVectorLearning",
    "sparse_autoencoder": "sparse_autoencoder:SparseAutoencoding",
}
_DEFAULT_TASK_OF_FAMILY = {"decoder": "language_model", "encoder": "masked_language_model",
                           "encoder_decoder": "translation", "reward": "reward",
                           "classifier": "classify", "token_classifier": "classify_tokens",
                           "electra": "replaced_tokens", "elmo": "bidirectional_language_model",
                           "word_vectors": "word_vectors", "sparse_autoencoder": "sparse_autoencoder"}


def register(task: type[Task], *, replace: bool = False) -> type[Task]:
    """Registers a task under its ``name``. It can be used as a decorator of the class.

    Args:
      task: The class of the task.
      replace: True to replace a registered task of the same name.

    Returns:
      The same class.

    Raises:
      ValueError: If this is not a class of a task, the class has no name, or the name is already
        used and ``replace`` is False.
    """
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise ValueError(f"task={task!r} is not a class that is derived from tj.Task")
    if not task.name:
        raise ValueError(f"{task.__name__} has no name: set name = \"...\" in the class")
    if task.name in _TASKS and _TASKS[task.name] is not task and not replace:
        raise ValueError(f"a task with the name {task.name!r} is already registered; choose another name, or pass "
                         "replace=True")
    _TASKS[task.name] = task
    return task


def names() -> list[str]:
    """Returns the names of all tasks.

    Returns:
      The names in alphabetical order.
    """
    return sorted(_TASKS)


def get(name: str) -> type[Task]:
    """Returns the class of a task.

    Args:
      name: The name of the task.

    Returns:
      The class, which is imported now if it belongs to the library.

    Raises:
      ValueError: If no task with this name is registered.
    """
    if name not in _TASKS:
        raise ValueError(f"there is no task {name!r}{nearest(name, _TASKS)}; tasks: {', '.join(names())}. Register one "
                         "of your own with tj.tasks.register before its name is used")
    found = _TASKS[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = getattr(importlib.import_module(f"transformer_jax.tasks.{module}"), attribute)
        _TASKS[name] = found
    return found


def name_of(config: ExperimentConfig, base: Bundle | None = None) -> str:
    """Returns the name of a config's task.

    Args:
      config: The config of a run.
      base: The trained model that the run starts from, if there is one.

    Returns:
      ``config.task`` if it is set. Otherwise the default task for the family of the base, or, if
      there is no base, for the family of ``config.model``.

    Raises:
      ValueError: If ``config.task`` is not set and the family has no default task.
    """
    model = config.model if base is None else base.config
    if config.task is None and model.role not in _DEFAULT_TASK_OF_FAMILY:
        raise ValueError(f"no task is known for models of family {model.family!r}; set config.task to one of "
                         f"{', '.join(names())}")
    return config.task or _DEFAULT_TASK_OF_FAMILY[model.role]


def make(config: ExperimentConfig, **options: Any) -> Task:
    """Creates the task of a config.

    Args:
      config: The config of a run.
      **options: Further arguments of the task's class, such as ``base``.

    Returns:
      The task.

    Raises:
      ValueError: If no task with the name in the config is registered.
    """
    return get(name_of(config))(config, **options)
