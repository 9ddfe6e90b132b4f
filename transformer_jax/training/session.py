"""A training run from settings to the final state: optimizer, restored or fresh state, the usual
hooks, the loop."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from transformer_jax.config import ExperimentConfig
from transformer_jax.training import hooks as jobs
from transformer_jax.training.checkpoint import CheckpointError, Checkpoints
from transformer_jax.training.errors import Interrupted, explained
from transformer_jax.training.loggers import JsonlLogger, MetricLogger, TensorBoardLogger
from transformer_jax.training.loop import Hook, Loop, fit
from transformer_jax.training.optimizer import make_optimizer, make_schedule
from transformer_jax.training.processes import is_first
from transformer_jax.training.state import TrainState, abstract_state, init_state
from transformer_jax.training.step import LossFn, make_train_step


def run_training(config: ExperimentConfig, workdir: str | pathlib.Path | None = None, *,
                 make_params: Callable[[jax.Array], Any], loss_fn: LossFn,
                 batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh,
                 to_model: Callable[[Any], Any] = lambda params: params, files: Mapping[str, bytes] | None = None,
                 evaluate: Callable[[Any], Mapping[str, float]] | None = None,
                 show: Callable[[Any, int], None] | None = None,
                 follow: Callable[[Any, dict[str, jax.Array] | None], Mapping[str, float]] | None = None,
                 hooks: Sequence[Hook] = (), loggers: Sequence[MetricLogger] = (),
                 optimizer: optax.GradientTransformation | None = None) -> TrainState:
    """Trains to ``config.steps``, from the last checkpoint in the workdir if there is one.

    Args:
      config: decides everything; it is stored in the checkpoints.
      workdir: holds ``checkpoints`` (the last few), ``best`` (lowest validation loss),
        ``metrics.jsonl`` and ``tensorboard``. ``None``: nothing is written, and a signal ends the
        run early without an error.
      make_params: makes the parameters from a key.
      loss_fn: ``(params, batch, key) -> (sum of losses, sum of weights)``, see
        :func:`make_train_step`.
      batches: this process's rows of each batch; with ``get_state`` and ``set_state``, where the
        run can be resumed.
      mesh: from :func:`transformer_jax.sharding.make_mesh`.
      to_model: makes the model from the parameters, for everything below.
      files: stored with every checkpoint, such as the tokenizer.
      evaluate: from a model to a dict of numbers, ``validation_loss`` among them.
      show: called with model and step, as ``config.sample`` asks for; it prints.
      follow: for batches that depend on the weights, see
        :class:`transformer_jax.training.hooks.Follow`.
      hooks: further hooks, called after the built-in ones that log and evaluate, before saving.
      loggers: further metric loggers; they are closed at the end.
      optimizer: any optax transformation, in place of that of ``config.optim``.

    Returns:
      The final state; without a workdir, after a signal, that of the last step taken.

    Raises:
      Interrupted: after SIGINT or SIGTERM, once the state is saved; of several processes, one need
        have had it.
      NotFiniteError: after ten updates in a row that had to be skipped.
      OutOfMemoryError: naming what to change.
      LostProcessError: another process has ended.
      ValueError: the run is to be resumed, and its batches have no position to go on from.
    """
    schedule = make_schedule(config.optim, config.steps) if optimizer is None else None
    optimizer = make_optimizer(config.optim, config.steps) if optimizer is None else optimizer
    train_step = make_train_step(loss_fn, optimizer, config.optim.accumulation, config.optim.gradient_dtype)
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
        loop = _restored(config, mesh, last, batches, make_params, optimizer)
        loop.to_model = to_model
        if workdir is not None and is_first():
            # What a run that was killed wrote after the step that this one goes on from is dropped.
            kept = loop.start if last.steps() else -1
            loop.loggers = [JsonlLogger(workdir, kept), TensorBoardLogger(workdir, kept)]
        loop.loggers = [*loop.loggers, *loggers]
        for logger in loop.loggers:
            stack.enter_context(contextlib.closing(logger))
        stack.enter_context(stop.listening())
        loop.progress = stack.enter_context(jobs.progress_bar(loop))
        fit(loop, train_step, batches, [
            jobs.CheckFinite(), jobs.Log(schedule),
            *([jobs.Evaluate(evaluate, keep_best)] if evaluate is not None else []),
            *([jobs.Sample(show)] if show is not None else []), *hooks,
            *([jobs.Follow(follow)] if follow is not None else []), stop, *([saver] if saver is not None else [])])
        if last is not None:
            last.wait()
            best.wait()
            if loop.stop_signal and loop.step < config.steps:
                raise Interrupted(loop.stop_signal, loop.step)
    return loop.state


def _restored(config: ExperimentConfig, mesh: Mesh, checkpoints: Checkpoints | None, batches: Iterator[Any],
              make_params: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation) -> Loop:
    """The loop at the last checkpoint, or at the beginning where there is none."""
    if checkpoints is None or not checkpoints.steps():
        return Loop(config, init_state(make_params, optimizer, jax.random.key(config.seed), mesh), mesh)
    restored = checkpoints.restore(abstract_state(make_params, optimizer, mesh))
    if restored.metadata["data"] is None or not hasattr(batches, "set_state"):
        raise CheckpointError(f"{checkpoints.directory} holds step {restored.step} of this run, but its batches come "
                              "from an iterator without get_state and set_state, so that training cannot go on with "
                              "the right data; give a resumable iterator, such as one of grain, or another workdir")
    batches.set_state(restored.metadata["data"])
    if is_first():
        print(f"resuming from step {restored.step} of {config.steps}")
    return Loop(config, restored.state, mesh, step=restored.step, start=restored.step,
                best_loss=restored.metadata["best_loss"])
