"""Run a whole training of several models in one program: the loop with its hooks, and exact resume."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_jax.config import ExperimentConfig
from transformer_jax.training import hooks as jobs
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.errors import Interrupted, explained
from transformer_jax.training.loggers import JsonlLogger, MetricLogger
from transformer_jax.training.loop import Loop, fit
from transformer_jax.training.members import (
    MemberBatches,
    abstract_members,
    init_members,
    make_members_step,
    member_of,
)
from transformer_jax.training.session import close_logger, restored_loop
from transformer_jax.training.state import TrainState
from transformer_jax.training.step import AfterUpdate, LossFn


def run_members(config: ExperimentConfig, workdir: pathlib.Path | None = None, *, seeds: Sequence[int],
                values: Mapping[str, np.ndarray], make_params: Callable[[jax.Array], Any], loss_fn: LossFn,
                batches: MemberBatches, mesh: Mesh, to_model: Callable[[Any], Any] = lambda params: params,
                evaluate: Callable[[Any], Mapping[str, float]] | None = None,
                files: Mapping[str, bytes] | None = None, loggers: Sequence[MetricLogger] = (),
                after_update: AfterUpdate | None = None) -> TrainState:
    """Trains all members until ``config.steps``, from the last checkpoint in the workdir, if any.

    Args:
      config: the config that the members share.
      workdir: the directory for ``checkpoints`` and ``metrics.jsonl``. With ``None``, nothing is
        written, and a signal ends the training early without an error.
      seeds: the seed of each of the M members.
      values: for each setting of the optimizer that differs, its value for each member.
      make_params: a function that makes the parameters of one member from a PRNG key.
      loss_fn: the loss of one member, as for ``make_train_step``.
      batches: the batches of all members.
      mesh: the devices, over which the members are sharded.
      to_model: a function that makes a model from the parameters of one member.
      evaluate: a function from a model to numbers by name, which contain ``validation_loss``.
      files: files, by name, that are stored with every checkpoint, such as the tokenizer.
      loggers: further metric loggers, which get arrays ``[M]``; they are closed at the end.
      after_update: as for ``make_train_step``.

    Returns:
      The final state of all members.

    Raises:
      Interrupted: if SIGINT or SIGTERM was received; the state is saved first.
      OutOfMemoryError: if a device has too little memory.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(explained(config, mesh.size))
        stop, saver, last = jobs.StopOnSignal(), None, None
        if workdir is not None:
            last = stack.enter_context(contextlib.closing(
                Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)))
            saver = jobs.SaveCheckpoints(last, batches, files or {}, num_members=len(seeds))
        loop = restored_loop(config, mesh, last, batches,
                             make=lambda: init_members(make_params, config, seeds, mesh),
                             shapes=lambda: abstract_members(make_params, config, seeds, mesh))
        loop.loggers = loggers
        if workdir is not None and last is not None:
            loop.loggers = [JsonlLogger(workdir, loop.start if last.steps() else -1), *loggers]
        for logger in loop.loggers:
            stack.callback(close_logger, loop, logger)
        stack.enter_context(stop.listening())
        loop.progress = stack.enter_context(jobs.progress_bar(loop))
        step = make_members_step(loss_fn, config, values, mesh, after_update)
        fit(loop, step, batches, [
            LogMembers(), *([EvaluateMembers(evaluate, to_model)] if evaluate is not None else []), stop,
            *([saver] if saver is not None else [])])
        if last is not None and saver is not None:
            last.wait()
            if loop.stop_signal and loop.step < config.steps:
                raise Interrupted(loop.stop_signal, loop.step, saver.saved)
    return loop.state


class LogMembers:
    """Updates the progress bar, and logs the metrics of all members every ``config.log_every``
    steps."""

    def __call__(self, loop: Loop) -> None:
        if loop.progress is not None:
            loop.progress.update()
        if loop.step == loop.start + 1:
            jax.block_until_ready(loop.metrics)  # the time of compilation must not count for the speed
            loop.restart_clock()
        if not loop.is_due(loop.config.log_every):
            return
        values: dict[str, Any] = {name: np.asarray(value) for name, value in (loop.metrics or {}).items()
                                  if name != "skipped_in_a_row"}
        if loop.num_tokens:
            values["tokens_per_second"] = loop.tokens_per_second()
        loop.log(values)
        if loop.progress is not None:
            losses = values["loss"]
            loop.progress.set_postfix_str(f"losses {np.nanmin(losses):.3f} to {np.nanmax(losses):.3f}" if
                                          not np.isnan(losses).all() else "no loss is finite")
        loop.restart_clock()


class EvaluateMembers:
    """Evaluates all members every ``config.eval.every`` steps and at the last step.

    Args:
      evaluate: a function from a model to numbers by name, which contain ``validation_loss``.
      to_model: a function that makes a model from the parameters of one member.
    """

    def __init__(self, evaluate: Callable[[Any], Mapping[str, float]], to_model: Callable[[Any], Any]):
        self._evaluate = evaluate
        self._model = jax.jit(lambda params, index: to_model(member_of(params, index)))

    def __call__(self, loop: Loop) -> None:
        if not loop.is_due(loop.config.eval.every):
            return
        num_members = loop.state.step.shape[0]
        found = [self._evaluate(self._model(loop.state.params, index)) for index in range(num_members)]
        if not found[0]:  # the run has no held-out data
            return
        values = {name: np.array([each[name] for each in found]) for name in found[0]}
        loop.log(values)
        loop.write_line(f"step {loop.step}: validation losses " +
                        " ".join(f"{loss:.4f}" for loss in values["validation_loss"]))
        loop.restart_clock()
