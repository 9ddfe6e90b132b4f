"""What a model learns: the base class of all tasks, and their registry by name."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from transformer_jax.config import ExperimentConfig
from transformer_jax.data import Tokenizer
from transformer_jax.data.windows import BatchSource
from transformer_jax.models.functional import Model
from transformer_jax.settings import nearest
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.step import Batch, Sums

Transform = Callable[[Mapping[str, np.ndarray], np.random.Generator], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class TaskData:
    """Examples in the form in which a model learns from them.

    Attributes:
      train: the examples; or, where they depend on the weights, an iterator of batches.
      contents: strings that change with the content of the data, by which a resumed run recognises
        its own.
      summary: the data in a few words.
      held_out: held-out examples of the form of ``train``, on which attention can be watched;
        ``None``: there are none.
      evaluation_batches: from a batch size to the held-out batches, each of the same shape;
        ``None``: nothing is held out.
      transform: applied to every training batch with a generator of random numbers.
      shown: whatever :meth:`Task.show` needs.
      follow: where batches depend on the weights, see
        :class:`transformer_jax.training.hooks.Follow`.
    """

    train: BatchSource | Iterator[dict[str, np.ndarray]]
    contents: list[str]
    summary: str
    held_out: BatchSource | None = None
    evaluation_batches: Callable[[int], Iterable[Mapping[str, np.ndarray]]] | None = None
    transform: Transform | None = None
    shown: Any = None
    follow: Callable[[Any, dict[str, jax.Array] | None], Mapping[str, float]] | None = None


class Task:
    """What a model learns: its data, loss, evaluation, and what to show of it.

    A task of one's own is one subclass in one file; ``tj.tasks.register`` makes it known by name to
    ``tj.train``, to every program and to ``tj.preflight``. Only :meth:`prepare` and :meth:`loss`
    have no default.

    Attributes:
      name: in configs, ``config.task``.
      family: of the model.
      needs_base: whether it starts from a trained model.
      shows_base: whether that model is shown too, before the first step.
      config: of the run; its model is complete once the tokenizer is known.
      base: the bundle that training starts from, if any.
      workdir: of the run, if it has one.
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = "decoder"
    needs_base: ClassVar[bool] = False
    shows_base: ClassVar[bool] = False

    def __init__(self, config: ExperimentConfig, *, base: Bundle | None = None, workdir: pathlib.Path | None = None):
        self.config, self.base, self.workdir = config, base, workdir

    def start_from(self, base: Bundle) -> Bundle:
        """The bundle whose model is trained, made from a trained one, such as with a new head.

        Raises:
          ValueError: for a model that this task cannot start from.
        """
        return base

    def read(self, data: Any = None, held_out: Any = None) -> tuple[Any, Any]:
        """The examples to learn from and those held out, not yet tokenized.

        Args:
          data: examples; ``None``: what ``config.data`` names.
          held_out: examples to evaluate on; ``None``: the last ``config.data.validation_fraction``
            of ``data``.

        Raises:
          ValueError: for settings that name no data, or too few examples.
        """
        if data is None:
            raise ValueError(f"the task {self.name!r} reads no files; pass its examples, as in tj.train(config, data)")
        if held_out is not None:
            return list(data), list(held_out)
        return split(list(data), self.config.data.validation_fraction, "examples")

    def texts(self, examples: Any) -> Iterable[str]:
        """The texts that a tokenizer is trained on."""
        return examples

    def prepare(self, examples: Any, held_out: Any, tokenizer: Tokenizer, cache_dir: pathlib.Path) -> TaskData:
        """Tokenizes the examples of :meth:`read`.

        Args:
          examples: to learn from.
          held_out: to evaluate on.
          tokenizer: the model's.
          cache_dir: where files may be kept for the next start of the run.
        """
        raise NotImplementedError(f"{type(self).__name__} must define prepare(examples, held_out, tokenizer, "
                                  "cache_dir), which returns a tj.tasks.TaskData")

    def loss(self, model: Any, batch: Batch, key: jax.Array | None = None) -> Sums:
        """The sum of losses and the sum of their weights, and maybe a dict of further sums whose
        means are logged.

        Args:
          model: of the task's family.
          batch: arrays as :meth:`prepare` makes them.
          key: switches dropout on.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(model, batch, key), which returns the sum "
                                  "of losses and the sum of weights")

    def evaluation_loss(self, model: Any, batch: Batch, key: jax.Array | None = None) -> Sums:
        """The loss that is reported on held-out batches: by default that of training."""
        return self.loss(model, batch, key)

    def evaluate(self, model: Any, data: TaskData) -> dict[str, float] | None:
        """Numbers to log while training, of which ``validation_loss`` chooses the best checkpoint.

        ``None``: the mean of :meth:`evaluation_loss` over ``data.evaluation_batches``.
        """
        del model, data
        return None

    def measure(self, bundle: Bundle, data: Any = None, *, batch_size: int = 32, **options: Any) -> dict[str, float]:
        """How good a trained model is, as numbers by name.

        Args:
          bundle: the model with its tokenizer.
          data: what to measure on, a path or examples; ``None``: what the model's own run held out.
          batch_size: rows at a time.
          **options: further settings of the task.
        """
        raise ValueError(f"the task {self.name!r} does not say how a trained model is measured: define measure(bundle, "
                         "data) in its class")

    def report(self, bundle: Bundle, measured: Mapping[str, Any], **options: Any) -> str:
        """What :meth:`measure` returned, with the options that it was called with, as lines for the
        terminal."""
        del options
        return "\n".join([f"step {bundle.step}", *(f"{name}: {value:,}" if isinstance(value, int) else
                                                   f"{name}: {value:,.4f}" for name, value in measured.items())])

    def forward(self, model: Any, batch: Batch, key: jax.Array | None = None) -> Any:
        """The model's output for a batch."""
        return model(batch["tokens"], segment_ids_BT=batch.get("segment_ids"), key=key)

    def show(self, model: Model, step: int, data: TaskData) -> str | None:
        """What the model can do, as text for the terminal; ``None``: nothing to show."""
        return None

    def finish(self) -> str | None:
        """Called once after training in a workdir, to complete what is kept there; returns text for
        the terminal."""
        return None

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch of full rows, from which preflight computes memory and operations.

        Raises:
          ValueError: where they are not known before the data is.
        """
        raise ValueError(f"the task {self.name!r} does not say how large its batches are: define batch_shapes"
                         "(batch_size) in its class")

    def next_command(self, workdir: str) -> str:
        """The command to try next, shown when training is done."""
        return f'transformer-jax generate --workdir={workdir} --prompt="..."'


# Tasks by name; those of the library are loaded when they are asked for.
_TASKS: dict[str, type[Task] | str] = {
    "language_model": "language_model:LanguageModel",
    "masked_language_model": "masked_language_model:MaskedLanguageModel",
    "translation": "translation:Translation",
    "sft": "sft:SupervisedFineTuning",
    "reward": "reward:RewardModeling",
    "dpo": "preferences:DirectPreference",
    "policy": "policy:PolicyLearning",
}
_OF_FAMILY = {"decoder": "language_model", "encoder": "masked_language_model", "encoder_decoder": "translation",
              "reward": "reward"}


def register(task: type[Task], *, replace: bool = False) -> type[Task]:
    """Makes a task known by its ``name``; returns it, so that it serves as a decorator.

    Raises:
      ValueError: for a class without a name, or a name that is taken (unless ``replace``).
    """
    if not task.name:
        raise ValueError(f"{task.__name__} has no name: set name = \"...\" in the class")
    if task.name in _TASKS and _TASKS[task.name] is not task and not replace:
        raise ValueError(f"there is a task {task.name!r} already; choose another name, or pass replace=True")
    _TASKS[task.name] = task
    return task


def names() -> list[str]:
    """The names of all tasks."""
    return sorted(_TASKS)


def get(name: str) -> type[Task]:
    """The class of a task.

    Raises:
      ValueError: for a name that is not registered.
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


def name_of(config: ExperimentConfig) -> str:
    """The name of a config's task: the one it gives, else the first objective of its model's
    family."""
    return config.task or _OF_FAMILY[config.model.family]


def make(config: ExperimentConfig, **options: Any) -> Task:
    """The task of a config.

    Args:
      config: of the run.
      **options: further arguments of the task's class.

    Raises:
      ValueError: for a name that is not registered, or a model of another family.
    """
    return get(name_of(config))(config, **options)


def split(examples: Sequence[Any], validation_fraction: float, what: str) -> tuple[list[Any], list[Any]]:
    """The examples without their last part, and that part.

    Raises:
      ValueError: where one of them would be empty.
    """
    cut = int(len(examples) * (1 - validation_fraction))
    if not 0 < cut < len(examples):
        raise ValueError(f"data.validation_fraction={validation_fraction} of {len(examples)} {what} leaves a part "
                         "empty; set data.validation_path, or another fraction")
    return list(examples[:cut]), list(examples[cut:])
