"""The base class of all tasks."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax

from transformer_jax.config import ExperimentConfig, ModelSettings
from transformer_jax.config.families import role_of
from transformer_jax.data import Tokenizer
from transformer_jax.models.functional import Model
from transformer_jax.tasks.inputs import split
from transformer_jax.tasks.task_data import TaskData
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.loop import TrainStep
from transformer_jax.training.step import AfterUpdate, Batch, Sums


class Task:
    """A task defines what a model learns: the data, the loss, the evaluation and sample outputs.

    To define a new task, write one subclass. After ``tj.tasks.register``, ``tj.train``, all
    programs and ``tj.preflight`` find the task by its name. A subclass must define ``prepare`` and
    ``loss``; all other methods have a default.

    Attributes:
      name: The name of the task, as in ``config.task``.
      family: The family, or the role of the family, of the models that the task trains.
      needs_base: True if training starts from a trained model.
      shows_base: True if ``show`` is also called for that model, before the first step.
      reads_text: False if the examples are not texts, so that the run has no tokenizer.
      mixes_corpora: True if the examples may be a dict with the texts of several corpora.
      config: The config of the run. The config of its model is complete only after the tokenizer
        is known.
      base: The bundle that training starts from, or ``None``.
      workdir: The directory of the run, or ``None``.
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = "decoder"
    needs_base: ClassVar[bool] = False
    shows_base: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True
    mixes_corpora: ClassVar[bool] = False

    def __init__(self, config: ExperimentConfig, *, base: Bundle | None = None, workdir: pathlib.Path | None = None):
        self.config, self.base, self.workdir = config, base, workdir

    def start_from(self, base: Bundle) -> Bundle:
        """Makes the model that is trained from a trained one, for example by adding a new head.

        Args:
          base: The trained model, with its tokenizer and config.

        Returns:
          The bundle whose model is trained.

        Raises:
          ValueError: If this task cannot start from the model.
        """
        self.check_family(base.config.family)
        return base

    def check_family(self, family: str) -> None:
        """Checks that this task can train or measure models of a family.

        Args:
          family: The family of a model, such as ``"decoder"``. A registered family may have the
            role of another one, see ``transformer_jax.config.register_model_family``.

        Raises:
          ValueError: If the task is for another family.
        """
        if role_of(family) != self.family:
            raise ValueError(f"the task {self.name!r} is for models of family {self.family!r}, but the model is of "
                             f"family {family!r}; change config.task or model.family")

    def read(self, data: Any = None, held_out: Any = None) -> tuple[Any, Any]:
        """Reads the training examples and the held-out examples, without tokenizing them.

        Args:
          data: The examples. ``None`` means the data that ``config.data`` names.
          held_out: The examples to evaluate on. ``None`` means the last
            ``config.data.validation_fraction`` of ``data``.

        Returns:
          The training examples and the held-out examples.

        Raises:
          ValueError: If the settings name no data, or there are too few examples to split.
        """
        if data is None:
            raise ValueError(f"the task {self.name!r} cannot read files; pass its examples, as in "
                             "tj.train(config, data)")
        if held_out is not None:
            return list(data), list(held_out)
        return split(list(data), self.config.data.validation_fraction, "examples")

    def complete_model(self, model: ModelSettings, examples: Any) -> ModelSettings:
        """Completes the config of a new model, for example by the labels that the examples have.

        Args:
          model: The config, with the size of the vocabulary.
          examples: What ``read`` returned; ``None`` if no data is read, as for ``tj.preflight``.

        Returns:
          The complete config; by default the same one.
        """
        del examples
        return model

    def texts(self, examples: Any) -> Iterable[str]:
        """Returns the texts that a tokenizer is trained on.

        Args:
          examples: The training examples, as ``read`` returns them.

        Returns:
          The texts of the examples. By default the examples are texts themselves.
        """
        return examples

    def prepare(self, examples: Any, held_out: Any, tokenizer: Tokenizer, cache_dir: pathlib.Path) -> TaskData:
        """Tokenizes the examples that ``read`` returned.

        Args:
          examples: The training examples.
          held_out: The held-out examples.
          tokenizer: The tokenizer of the model.
          cache_dir: A directory where the task may store files for the next start of the run.

        Returns:
          The tokenized data.
        """
        raise NotImplementedError(f"{type(self).__name__} must define prepare(examples, held_out, tokenizer, "
                                  "cache_dir), which returns a tj.tasks.TaskData")

    def loss(self, model: Any, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the training loss of a batch.

        Args:
          model: A model of the task's family.
          batch: Arrays by name, as ``prepare`` makes them.
          key: A random key for dropout. ``None`` switches dropout off.

        Returns:
          The sum of the losses and the sum of their weights. A third item is allowed: a dict of
          further sums, whose means are logged.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(model, batch, key), which returns the sum "
                                  "of losses and the sum of weights")

    def train_step(self) -> TrainStep | None:
        """Returns a training step of the task's own, for example one that changes only a few rows
        of a table.

        Returns:
          A function ``step(state, batch) -> (state, metrics)``, as ``tj.make_train_step`` makes it,
          that donates the state. ``None`` means the usual step: the gradient of ``loss`` and the
          optimizer of the config.
        """
        return None

    def after_update(self) -> AfterUpdate | None:
        """Returns a function that changes the new weights of every step, for example by a constraint.

        Returns:
          A function ``(params, means, weight) -> (params, means)``, see ``tj.make_train_step``.
          ``None`` means that the optimizer alone changes the weights.
        """
        return None

    def evaluation_loss(self, model: Any, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the loss that is reported for a held-out batch; by default the training loss.

        Args:
          model: A model of the task's family.
          batch: Arrays by name, as in ``loss``.
          key: A random key for dropout. ``None`` switches dropout off.

        Returns:
          The same sums as ``loss``.
        """
        return self.loss(model, batch, key)

    def evaluate(self, model: Any, data: TaskData) -> dict[str, float] | None:
        """Evaluates the model during training.

        Args:
          model: The model with its current weights.
          data: The data that ``prepare`` returned.

        Returns:
          Numbers by name, which are logged. ``validation_loss`` decides which checkpoint is the
          best. ``None`` means that the mean of ``evaluation_loss`` over
          ``data.evaluation_batches`` is logged instead.
        """
        del model, data
        return None

    def measure(self, bundle: Bundle, data: Any = None, *, batch_size: int = 32, **options: Any) -> dict[str, float]:
        """Measures how good a trained model is.

        Args:
          bundle: The model with its tokenizer.
          data: A path or examples to measure on. ``None`` means the held-out part of the data that
            the model was trained on.
          batch_size: The number of rows in a batch.
          **options: Further settings of the task.

        Returns:
          Numbers by name.

        Raises:
          ValueError: If the task does not define this method, or the data cannot be read.
        """
        raise ValueError(f"the task {self.name!r} does not define how a trained model is measured; define "
                         "measure(bundle, data) in its class")

    def report(self, bundle: Bundle, measured: Mapping[str, Any], **options: Any) -> str:
        """Formats the result of ``measure`` for the terminal.

        Args:
          bundle: The model that was measured.
          measured: The numbers that ``measure`` returned.
          **options: The options that ``measure`` was called with.

        Returns:
          One or more lines of text.
        """
        del options
        return "\n".join([f"step {bundle.step}", *(f"{name}: {value:,}" if isinstance(value, int) else
                                                   f"{name}: {value:,.4f}" for name, value in measured.items())])

    def forward(self, model: Any, batch: Batch, key: jax.Array | None = None) -> Any:
        """Runs the model on a batch.

        Args:
          model: A model of the task's family.
          batch: Arrays by name, as in ``loss``.
          key: A random key for dropout. ``None`` switches dropout off.

        Returns:
          The output of the model.
        """
        return model(batch["tokens"], segment_ids_BT=batch.get("segment_ids"), key=key)

    def show(self, model: Model, step: int, data: TaskData) -> str | None:
        """Produces a sample of what the model can do, for the terminal.

        Args:
          model: The model with its current weights.
          step: The number of training steps so far.
          data: The data that ``prepare`` returned.

        Returns:
          The text to print, or ``None`` to print nothing.
        """
        return None

    def finish(self) -> str | None:
        """Completes the files in the workdir; called once, after training.

        Returns:
          A text to print, or ``None`` to print nothing.
        """
        return None

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a training batch, from which preflight computes memory and FLOPs.

        Args:
          batch_size: The number of rows in the batch.

        Returns:
          The shape and data type of each array of the batch, by name.

        Raises:
          ValueError: If the shapes depend on the data, so that they are unknown in advance.
        """
        raise ValueError(f"the task {self.name!r} does not define the shapes of its batches; define "
                         "batch_shapes(batch_size) in its class")

    def next_command(self, workdir: str) -> str:
        """Returns a command to try after training, which the training program prints at the end.

        Args:
          workdir: The directory of the run.

        Returns:
          A command line.
        """
        return f'transformer-jax generate --workdir={workdir} --prompt="..."'
