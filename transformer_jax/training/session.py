"""Run a whole training: make the optimizer, create or restore the state, and run the loop with the
usual hooks."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from transformer_jax.config import ExperimentConfig
from transformer_jax.json_files import check_shape
from transformer_jax.training import hooks as jobs
from transformer_jax.training.checkpoint import CheckpointError, Checkpoints
from transformer_jax.training.errors import Interrupted, explained
from transformer_jax.training.loggers import JsonlLogger, MetricLogger, TensorBoardLogger
from transformer_jax.training.loop import Hook, Loop, TrainStep, fit, warn_about_logger
from transformer_jax.training.optimizer import make_optimizer, make_schedule
from transformer_jax.training.processes import check_mesh, is_first
from transformer_jax.training.samples import Sample
from transformer_jax.training.state import TrainState, abstract_state, init_state
from transformer_jax.training.step import AfterUpdate, LossFn, make_train_step


class _Metadata(TypedDict):
    """The part of the metadata of a checkpoint that is needed to resume a run."""

    data: Any  # what get_state of the batches returned
    best_loss: float


def run_training(config: ExperimentConfig, workdir: str | pathlib.Path | None = None, *,
                 make_params: Callable[[jax.Array], Any], loss_fn: LossFn,
                 batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh,
                 to_model: Callable[[Any], Any] = lambda params: params, files: Mapping[str, bytes] | None = None,
                 evaluate: Callable[[Any], Mapping[str, float]] | None = None,
                 show: Callable[[Any, int], None] | None = None,
                 follow: Callable[[Any, dict[str, jax.Array] | None], Mapping[str, float]] | None = None,
                 hooks: Sequence[Hook] = (), loggers: Sequence[MetricLogger] = (),
                 optimizer: optax.GradientTransformation | None = None,
                 train_step: TrainStep | None = None, after_update: AfterUpdate | None = None) -> TrainState:
    """Trains until ``config.steps``, starting from the last checkpoint in the workdir, if any.

    Args:
      config: the config of the run, which is stored in the checkpoints.
      workdir: the directory for ``checkpoints`` (the last few), ``best`` (the checkpoint with the
        lowest validation loss), ``metrics.jsonl`` and ``tensorboard``. With ``None``, nothing is
        written, and a signal ends the run early without an error.
      make_params: a function that makes the parameters from a PRNG key.
      loss_fn: a function ``(params, batch, key) -> (sum of losses, sum of weights)``, as for
        ``make_train_step``.
      batches: an iterator over batches, of which each process gets its own rows. A run can be
        resumed only if it has ``get_state`` and ``set_state``.
      mesh: the devices, as ``transformer_jax.sharding.make_mesh`` makes them.
      to_model: a function that makes the model from the parameters, for the functions below.
      files: files, by name, that are stored with every checkpoint, such as the tokenizer.
      evaluate: a function from a model to a dict of numbers, which contains ``validation_loss``.
      show: a function of the model and the step that prints samples, as often as ``config.sample``
        says.
      follow: a function that updates batches which depend on the weights, as for the hook
        ``Follow``.
      hooks: further hooks. They are called after the built-in hooks that log and evaluate, and
        before the state is saved.
      loggers: further metric loggers, which are closed at the end.
      optimizer: an optax transformation that replaces the optimizer of ``config.optim``.
      train_step: a training step that takes the place of the usual one, unless ``optimizer`` is
        given. The state then has no state of an optimizer.
      after_update: a function that changes the new weights of every step, as for
        ``make_train_step``.

    Returns:
      The final state. Without a workdir, a signal ends the run early, and this is the state after
      the last step taken.

    Raises:
      Interrupted: if a process received SIGINT or SIGTERM; the state is saved first.
      NotFiniteError: if ten updates in a row, or the last update of the run, had to be skipped.
      OutOfMemoryError: if a device has too little memory; the message lists what to change.
      LostProcessError: if another process of the run has ended.
      ValueError: if the run should be resumed, but its batches have no ``set_state``.
    """
    check_mesh(mesh)
    schedule = make_schedule(config.optim, config.steps) if optimizer is None else None
    if optimizer is None and train_step is not None:
        optimizer = optax.identity()
    else:
        optimizer = make_optimizer(config.optim, config.steps) if optimizer is None else optimizer
        train_step = make_train_step(loss_fn, optimizer, config.optim.accumulation, config.optim.gradient_dtype,
                                     after_update)
    with contextlib.ExitStack() as stack:
        stack.enter_context(explained(config, mesh.size))
        stack.enter_context(jax.set_mesh(mesh))
        stop, saver, keep_best, last, best = jobs.StopOnSignal(), None, None, None, None
        if workdir is not None:
            last = stack.enter_context(contextlib.closing(
                Checkpoints(pathlib.Path(workdir) / "checkpoints", keep=config.checkpoint.keep)))
            best = stack.enter_context(contextlib.closing(Checkpoints(pathlib.Path(workdir) / "best", keep=1)))
            saver = jobs.SaveCheckpoints(last, batches, files or {})
            keep_best = lambda loop: saver.save(loop, best)
        loop = restored_loop(config, mesh, last, batches,
                             make=lambda: init_state(make_params, optimizer, jax.random.key(config.seed), mesh),
                             shapes=lambda: abstract_state(make_params, optimizer, mesh))
        loop.to_model = to_model
        if workdir is not None and last is not None and is_first():
            loop.loggers = _built_in_loggers(workdir, loop.start if last.steps() else -1)
        loop.loggers = [*loop.loggers, *loggers]
        for logger in loop.loggers:
            stack.callback(close_logger, loop, logger)
        stack.enter_context(stop.listening())
        loop.progress = stack.enter_context(jobs.progress_bar(loop))
        fit(loop, train_step, batches, [
            jobs.CheckFinite(last), jobs.Log(schedule),
            *([jobs.Evaluate(evaluate, keep_best)] if evaluate is not None else []),
            *([Sample(show)] if show is not None else []), *hooks,
            *([jobs.Follow(follow)] if follow is not None else []), stop, *([saver] if saver is not None else [])])
        if last is not None and best is not None and saver is not None:
            last.wait()
            best.wait()
            if loop.stop_signal and loop.step < config.steps:
                raise Interrupted(loop.stop_signal, loop.step, saver.saved)
    return loop.state


def _built_in_loggers(workdir: str | pathlib.Path, last_step: int) -> list[MetricLogger]:
    """Makes the built-in loggers, which drop what a killed run wrote after ``last_step``."""
    loggers: list[MetricLogger] = [JsonlLogger(workdir, last_step)]
    try:
        loggers.append(TensorBoardLogger(workdir, last_step))
    except Exception as error:  # for example a full disk, or a file with the name of the directory
        warn_about_logger(TensorBoardLogger.__name__, error)
    return loggers


def close_logger(loop: Loop, logger: MetricLogger) -> None:
    """Closes a logger; a logger that failed before is closed without a second warning.

    Args:
      loop: the loop that wrote to the logger.
      logger: the logger.
    """
    if logger in loop.loggers:
        with loop.without_on_error(logger):
            logger.close()
    else:
        with contextlib.suppress(Exception):
            logger.close()


def restored_loop(config: ExperimentConfig, mesh: Mesh, checkpoints: Checkpoints | None, batches: Any, *,
                  make: Callable[[], TrainState], shapes: Callable[[], TrainState]) -> Loop:
    """Returns the loop at the last checkpoint, or at step 0 if there is no checkpoint.

    Args:
      config: the config of the run.
      mesh: the devices.
      checkpoints: the checkpoints of the run; ``None`` if it stores none.
      batches: the iterator over batches, which continues at its position in the checkpoint.
      make: a function that creates the state at step 0.
      shapes: a function that returns the shapes and shardings of the state.

    Returns:
      The loop.

    Raises:
      ValueError: if there is a checkpoint, but the batches have no ``set_state``.
    """
    if checkpoints is None or not checkpoints.steps():
        return Loop(config, make(), mesh)
    restored = checkpoints.restore(shapes())
    metadata = check_shape(restored.metadata, f"{checkpoints.directory}/{restored.step}/metadata.json", _Metadata)
    if metadata["data"] is None or not hasattr(batches, "set_state"):
        raise CheckpointError(f"{checkpoints.directory} contains step {restored.step} of this run, but its batches "
                              "come from an iterator without get_state and set_state, so that training cannot continue "
                              "with the right data; give a resumable iterator, such as one of grain, or another "
                              "workdir")
    batches.set_state(metadata["data"])
    if is_first():
        print(f"resuming from step {restored.step} of {config.steps}")
    return Loop(config, restored.state, mesh, step=restored.step, start=restored.step,
                best_loss=metadata["best_loss"])
