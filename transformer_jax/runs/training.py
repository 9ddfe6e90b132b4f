"""Training from Python: ``tj.train`` runs the task of a config, with or without a workdir that
stores the run."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from transformer_jax import tasks
from transformer_jax.config import ExperimentConfig
from transformer_jax.data import Mixture, Tokenizer
from transformer_jax.data.windows import BatchSource
from transformer_jax.runs.bases import describe_base, load_base, recorded_base
from transformer_jax.runs.completing import check_arguments, check_batch_size, check_corpora, config_of_call, with_data
from transformer_jax.runs.preparing import Run, Start, with_batches, with_examples
from transformer_jax.runs.telemetry import LogCorpora, WatchAttention
from transformer_jax.runs.workdir import Workdir, locked
from transformer_jax.runtime import keep_freed_memory
from transformer_jax.sharding import make_mesh
from transformer_jax.tasks.base import Task
from transformer_jax.training.bundle import Bundle, files_to_store
from transformer_jax.training.evaluation import mean_loss, mean_losses
from transformer_jax.training.learner import make_learner, with_ablated_heads
from transformer_jax.training.loggers import MetricLogger
from transformer_jax.training.loop import Hook
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.processes import check_mesh, first_before_others, is_first
from transformer_jax.training.session import run_training
from transformer_jax.training.state import TrainState, init_state


def train(config: str | ExperimentConfig | None = None, data: Any = None, *, texts: Sequence[str] | None = None,
          held_out: Sequence[Any] | None = None, steps: int | None = None,
          workdir: str | pathlib.Path | None = None, base: Bundle | str | pathlib.Path | None = None,
          base_step: int | str | None = None, change: bool = False, tokenizer: Tokenizer | None = None,
          task: Callable[..., Task] | None = None, hooks: Sequence[Hook] = (), loggers: Sequence[MetricLogger] = (),
          optimizer: optax.GradientTransformation | None = None, mesh: Mesh | None = None) -> Bundle:
    """Trains a model and returns it with its tokenizer.

    Args:
      config: An ``ExperimentConfig``, or the name of a recipe in ``tj.recipes``. ``None`` means the
        config of the run in ``workdir``, which is resumed.
      data: The training data: a path, in the same form as ``config.data.path``; a list of examples
        in the form that the task reads (texts, pairs, conversations ...); for language modelling
        and masked language modelling, a dict of such lists, one for each corpus, which are drawn
        with the weights of ``config.data.mixture`` (by default with those of their sizes); or an
        iterator of batches (dicts of arrays ``[batch_size, ...]``). An iterator can be resumed if
        it has ``get_state`` and ``set_state``, as iterators of grain have. ``None`` means the data
        that ``config.data`` names.
      texts: The same as ``data``, for a list of texts.
      held_out: Examples to evaluate on, if ``data`` is a list of examples. By default the last
        ``config.data.validation_fraction`` of ``data``.
      steps: The number of steps, instead of ``config.steps``. A larger number continues a run that
        has ended. If its learning rates so far do not depend on the number of steps (for example
        if ``optim.schedule`` is ``constant`` or ``noam``), the result is the same to the bit as
        that of one run of this length. Otherwise the schedule is stretched over the new number of
        steps.
      workdir: The directory for checkpoints, metrics and the tokenizer. The same call resumes a
        stopped run, and the result is the same to the bit. ``None`` means that nothing is written.
      base: A trained model to start from, with its tokenizer: a bundle, a workdir, or a directory
        or id of Hugging Face. ``workdir`` records the path or the id. Fine-tuning tasks need a
        base.
      base_step: If ``base`` is a workdir, the step of its checkpoint, or ``"best"``. By default the
        last step.
      change: True to continue the run in ``workdir`` with new settings of the loss, of dropout or
        of the optimizer (but not another kind of optimizer), such as a lower learning rate.
      tokenizer: A tokenizer, instead of the one that ``config.data.tokenizer`` describes.
      task: The class of a task, or a function that creates a task from a config, instead of
        ``config.task``.
      hooks: Functions that are called after every step with the
        ``transformer_jax.training.loop.Loop``.
      loggers: Further metric loggers.
      optimizer: An optax gradient transformation, instead of the one that ``config.optim``
        describes.
      mesh: A mesh of devices, instead of the one that ``config.mesh`` describes.

    Returns:
      The model after the last step, with its tokenizer. If there is no workdir and Ctrl-C stops the
      training, the model after the last finished step.

    Raises:
      ValueError: If the settings or the data are invalid, or the workdir belongs to another run.
      Interrupted: If a signal stops a run with a workdir, after its state is saved.
      NotFiniteError: If weights, gradients or losses become infinite or NaN.
    """
    keep_freed_memory()
    given = {"data": texts is not None or (data is not None and not isinstance(data, (str, os.PathLike))),
             "held_out": held_out is not None, "base": isinstance(base, Bundle), "task": task is not None,
             "optimizer": optimizer is not None}
    check_arguments(workdir=workdir, base=base, tokenizer=tokenizer, hooks=hooks, loggers=loggers, optimizer=optimizer,
                    held_out=held_out, task=task, change=change)
    config, record = config_of_call(config, steps, workdir)
    config, data, batches = with_data(config, data, texts)
    if held_out is not None and data is None:
        raise ValueError("held_out can only be used when data is a list of examples; for files set "
                         "config.data.validation_path")
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    check_mesh(mesh)
    if base_step is not None and not isinstance(base, (str, os.PathLike)):
        raise ValueError(f"base_step={base_step!r} selects a checkpoint of a workdir, but base is not the path of a "
                         "workdir; pass the path, or leave base_step out")
    source = None
    if base is None and record is not None and workdir is not None:
        base, source = recorded_base(pathlib.Path(workdir), record), record.get("base")
    elif isinstance(base, (str, os.PathLike)):
        where, base = base, load_base(base, step=base_step)
        source = describe_base(where, base_step, base)
    make_task = tasks.get(tasks.name_of(config, base)) if task is None else task
    new_task = make_task(config, base=base)
    if new_task.needs_base and base is None:
        raise ValueError(f"the task {new_task.name!r} starts from a trained model, but none is given; pass "
                         "base=tj.load(...), or --model=...")
    if base is not None and tokenizer is not None:
        raise ValueError("base already has a tokenizer, which its weights depend on; leave tokenizer out")
    if base is None:
        new_task.check_family(config.model.family)
    check_corpora(new_task, data)
    with contextlib.ExitStack() as stack:
        directory = None if workdir is None or record is None else Workdir(workdir, config, change=change)
        if directory is not None:
            directory.check_given(given)
        # The data is read before the workdir is created, so that missing data leaves no empty
        # directory.
        examples = None if batches is not None else new_task.read(data, held_out)
        prepared_base = None if base is None else new_task.start_from(base)
        check_batch_size(config, mesh)
        if workdir is None:
            place = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            place = pathlib.Path(workdir)
            stack.enter_context(locked(place))
            directory = Workdir(place, config, change=change)
        preparing = stack.enter_context(contextlib.ExitStack())
        preparing.enter_context(first_before_others("prepared"))
        start = Start(config, place, directory, prepared_base, source, given, tokenizer,
                      functools.partial(make_task, base=base, workdir=None if directory is None else place), mesh)
        run = with_examples(start, cast(tuple, examples)) if batches is None else with_batches(start, batches)
        preparing.close()
        return _fit(run, None if directory is None else place, mesh, hooks, loggers, optimizer)


def init_training(config: ExperimentConfig, task: Task | None = None, *, base: Bundle | None = None,
                  optimizer: optax.GradientTransformation | None = None, mesh: Mesh | None = None) -> TrainState:
    """Makes the training state before the first step, for your own training loop.

    Args:
      config: The config of the run, in which ``model.vocab_size`` must be set unless there is a
        base.
      task: The task; by default the task of the config.
      base: A trained model to start from.
      optimizer: An optax gradient transformation; by default the one that ``config.optim``
        describes.
      mesh: The mesh over which the state is sharded; by default a mesh of one device.

    Returns:
      The training state: the parameters, the optimizer's state and the step 0.

    Raises:
      ValueError: If an argument has a wrong type, or the size of the vocabulary is unknown.
    """
    if not isinstance(config, ExperimentConfig):
        raise ValueError(f"config is of type {type(config).__name__}; expected a tj.ExperimentConfig")
    if task is not None and not isinstance(task, Task):
        raise ValueError(f"task is of type {type(task).__name__}; expected a tj.Task, such as tj.tasks.make(config)")
    check_arguments(base=base, optimizer=optimizer)
    if base is None and config.model.vocab_size is None:
        raise ValueError("model.vocab_size is not set, and there is no tokenizer that defines it; use "
                         "config.replace(model=config.model.replace(vocab_size=...))")
    task = tasks.make(config, base=base) if task is None else task
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    check_mesh(mesh)
    base = base if base is None else task.start_from(base)
    learner = make_learner(config.model if base is None else base.config, config.lora,
                           None if base is None else base.model, mesh)
    optimizer = make_optimizer(config.optim, config.steps) if optimizer is None else optimizer
    return init_state(learner.make_params, optimizer, jax.random.key(config.seed), mesh)


def _fit(run: Run, workdir: pathlib.Path | None, mesh: Mesh, hooks: Sequence[Hook],
         loggers: Sequence[MetricLogger], optimizer: optax.GradientTransformation | None) -> Bundle:
    """Trains a prepared run, with its evaluations and samples, and returns the model."""
    config, task, data = run.config, run.task, run.data
    learner = with_ablated_heads(run.learner, config.loss.ablated_heads)
    has_samples = run.tokenizer is not None and data.shown is not None

    def show(model: Any, step: int) -> None:
        text = task.show(model, step, data)
        if text is not None and is_first():
            tqdm.write(f"--- step {step} ---\n{text}\n")

    if has_samples and task.shows_base and task.base is not None:
        show(task.base.model, 0)
    if config.metrics.attention_every:
        hooks = [WatchAttention(task, cast(BatchSource, data.held_out), workdir), *hooks]
    if isinstance(data.train, Mixture):
        hooks = [LogCorpora(data.train), *hooks]
    files = files_to_store(run.tokenizer, run.files)
    state = run_training(
        config, workdir, make_params=run.learner.make_params, loss_fn=learner.to_loss(task.loss),
        batches=run.batches, mesh=mesh, to_model=learner.to_model, files=files | dict(run.learner.files),
        evaluate=evaluation_of(run), show=show if has_samples else None, follow=data.follow, hooks=hooks,
        loggers=loggers, optimizer=optimizer, train_step=task.train_step(), after_update=task.after_update())
    if workdir is not None and is_first():
        text = task.finish()
        if text is not None:
            print(text)
    return Bundle(model=learner.to_model(state.params), tokenizer=run.tokenizer, config=config.model,
                  step=int(state.step), experiment=config, files=run.files)


def evaluation_of(run: Run) -> Callable[[Any], Mapping[str, float]] | None:
    """Returns the evaluation of the task or, if it defines none, the mean of its evaluation loss.

    Args:
      run: A prepared run.

    Returns:
      A function from a model to numbers by name; ``None`` if no examples are held out.
    """
    data, settings = run.data, run.config.eval
    if type(run.task).evaluate is not Task.evaluate:
        return lambda model: run.task.evaluate(model, data) or {}
    if data.corpora is not None:
        parts = {name: functools.partial(cast(Any, part.evaluation_batches), settings.batch_size)
                 for name, part in data.corpora.items()}
        return mean_losses(run.task.evaluation_loss, parts, cast(Mixture, data.train).shares, settings.max_batches)
    batches = data.evaluation_batches
    if batches is None:
        return None
    return mean_loss(run.task.evaluation_loss, lambda: batches(settings.batch_size),
                     settings.max_batches)
