"""The hooks of a training run: logging, evaluation, samples, checkpoints, and stopping.

The loop calls every hook with the ``Loop`` object after every step.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from transformer_jax.models.functional import Model
from transformer_jax.settings import to_dict
from transformer_jax.training.bundle import own_modules
from transformer_jax.training.checkpoint import CheckpointError, Checkpoints
from transformer_jax.training.errors import NotFiniteError
from transformer_jax.training.loop import Loop
from transformer_jax.training.metrics import flops_per_token
from transformer_jax.training.processes import agreed, is_first
from transformer_jax.training.signals import recorded_signals

MAX_SKIPPED_IN_A_ROW = 10


class CheckFinite:
    """Ends the run if ten updates in a row, or the last update of the run, were skipped.

    An update is skipped if the loss, a gradient or a new weight is not finite.

    Args:
      checkpoints: the checkpoints of the run; the error message names the last one.
    """

    def __init__(self, checkpoints: Checkpoints | None = None):
        self._checkpoints = checkpoints
        self._previous: dict[str, jax.Array] | None = None

    def __call__(self, loop: Loop) -> None:
        # The metrics are read one step later, so that the devices never wait for Python.
        if self._previous is not None:
            self._check(self._previous, loop.step - 1, MAX_SKIPPED_IN_A_ROW)
        self._previous = loop.metrics
        if loop.step == loop.config.steps and loop.metrics is not None:
            self._check(loop.metrics, loop.step, 1)

    def _check(self, metrics: Mapping[str, jax.Array], step: int, limit: int) -> None:
        """Raises NotFiniteError if at least ``limit`` updates in a row were skipped."""
        skipped = int(metrics["skipped_in_a_row"])
        if skipped < limit:
            return
        which = (f"{skipped} updates in a row were" if skipped >= MAX_SKIPPED_IN_A_ROW else
                 "the last update of the run was" if skipped == 1 else f"the last {skipped} updates of the run were")
        # If loss and gradient are finite, the weights are good and only the update is bad.
        suspect = not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
        what = f"the {'loss or the gradient was not' if suspect else 'new weights would not have been'} finite"
        advice = self._how_to_continue(step - skipped, suspect and skipped > 1)
        raise NotFiniteError(
            f"step {step}: {which} skipped, because {what}; training stops. {advice}Lower optim.peak_lr, lengthen "
            "optim.warmup_steps, or look at the data: a token id outside the vocabulary "
            "has no embedding, which gives NaN")

    def _how_to_continue(self, last_good: int, suspect: bool) -> str:
        """Returns the part of the error message that says which checkpoint is left.

        If the weights of the step ``last_good`` are suspect, because every update from them failed,
        its checkpoint is renamed, so that the run does not continue from it.
        """
        if self._checkpoints is None:
            return ""
        with contextlib.suppress(CheckpointError):  # a checkpoint whose save failed is not in steps()
            self._checkpoints.wait()
        aside = ""
        kept = self._checkpoints.steps()
        if suspect and last_good in kept:
            kept.remove(last_good)
            name = f"{last_good}.not_finite"
            if is_first():
                shutil.rmtree(self._checkpoints.directory / name, ignore_errors=True)  # from an earlier start
                (self._checkpoints.directory / str(last_good)).rename(self._checkpoints.directory / name)
            aside = f" (step {last_good}, from which every update failed, was renamed to {name})"
        if not kept:
            return f"No step is saved in {self._checkpoints.directory}{aside}. "
        return (f"The last step saved in {self._checkpoints.directory} is {kept[-1]}{aside}: the same command "
                "continues from there; add --change (in Python change=True) to use other settings of optim. ")


class Log:
    """Updates the progress bar, and logs the metrics every ``config.log_every`` steps.

    It logs the metrics of the step, the learning rate and the training speed.

    Args:
      schedule: a function from the step to the learning rate; ``None`` to log no learning rate.
    """

    def __init__(self, schedule: optax.Schedule | None):
        self._schedule = schedule

    def start(self, loop: Loop) -> None:
        """Counts the trained parameters, from which the speed in FLOP/s is computed.

        Args:
          loop: the loop before the first step.
        """
        self._num_parameters = sum(leaf.size for leaf in jax.tree.leaves(loop.state.params))

    def __call__(self, loop: Loop) -> None:
        if loop.progress is not None:
            loop.progress.update()
        if loop.step == loop.start + 1:
            jax.block_until_ready(loop.metrics)  # the time of compilation must not count for the speed
            loop.restart_clock()
        if not loop.is_due(loop.config.log_every):
            return
        values = {name: float(value) for name, value in (loop.metrics or {}).items() if name != "skipped_in_a_row"}
        if self._schedule is not None:
            values["learning_rate"] = float(np.asarray(self._schedule(loop.step - 1)))
        if loop.num_tokens:
            rate = loop.tokens_per_second()
            values["tokens_per_second"] = rate
            if not loop.config.lora.rank:  # adapters are not the parameters that the model runs with
                values["model_flops_per_second"] = rate * flops_per_token(
                    loop.config.model, self._num_parameters, loop.config.row_length)
        loop.log(values)
        if loop.progress is not None:
            rate = values.get("tokens_per_second", 0.0)
            loop.progress.set_postfix_str(f"loss {values['loss']:.3f}, {rate:,.0f} tokens/s")
        loop.restart_clock()


class Evaluate:
    """Evaluates the model every ``config.eval.every`` steps and at the last step.

    Args:
      evaluate: a function from a model to a dict of numbers, which contains ``validation_loss``; an
        empty one if there is nothing to evaluate on.
      keep_best: a function that is called with the loop if ``validation_loss`` is a new minimum.
    """

    def __init__(self, evaluate: Callable[[Any], Mapping[str, float]],
                 keep_best: Callable[[Loop], None] | None = None):
        self._evaluate, self._keep_best = evaluate, keep_best

    def __call__(self, loop: Loop) -> None:
        if not loop.is_due(loop.config.eval.every):
            return
        values = self._evaluate(loop.model)
        if not values:  # the run has no held-out data
            return
        loop.log(values)
        loop.write_line(f"step {loop.step}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}"
                                                   for name, value in values.items()))
        if values["validation_loss"] < loop.best_loss and not loop.skipping:
            loop.best_loss = values["validation_loss"]
            if self._keep_best is not None:
                self._keep_best(loop)
        loop.restart_clock()


class Follow:
    """Passes the current weights to batches that depend on them, as in reinforcement learning.

    Args:
      follow: a function that is called with the model and ``None`` before the first step, and then
        with the model and the metrics after every update, before a checkpoint is saved. It returns
        a dict of values to log.
    """

    def __init__(self, follow: Callable[[Any, dict[str, jax.Array] | None], Mapping[str, float]]):
        self._follow = follow

    def start(self, loop: Loop) -> None:
        """Calls ``follow`` before the first step.

        Args:
          loop: the loop before the first step.
        """
        self._call(loop, None)

    def __call__(self, loop: Loop) -> None:
        self._call(loop, loop.metrics)

    def _call(self, loop: Loop, metrics: dict[str, jax.Array] | None) -> None:
        if loop.step < loop.config.steps:
            loop.log(self._follow(loop.model, metrics))


class SaveCheckpoints:
    """Saves the state every ``config.checkpoint.every`` steps, and when the run ends or is stopped.

    If the last update was skipped, nothing is saved, because the weights may be bad. A save that
    was due is then made after the next update that is not skipped.

    Args:
      checkpoints: the directory of checkpoints to save into.
      batches: the iterator over batches, whose position is stored if it has ``get_state``.
      files: files, by name, that are stored with every checkpoint, such as the tokenizer.
      num_members: the number of models whose states are stored together; ``None`` for the state of
        one model.

    Attributes:
      saved: the last step that was saved; ``None`` if there is none.
    """

    def __init__(self, checkpoints: Checkpoints, batches: Iterator[Mapping[str, np.ndarray]],
                 files: Mapping[str, bytes], num_members: int | None = None):
        self._checkpoints, self._batches, self._files = checkpoints, batches, files
        self._num_members = num_members
        self.saved: int | None = None
        self._due = False
        self._own: dict[str, str] | None = None

    def start(self, loop: Loop) -> None:
        """Looks up whether the first step is saved already.

        Args:
          loop: the loop before the first step.
        """
        # A later step in the directory is damaged, or else the run would start from it.
        self.saved = loop.start if loop.start in self._checkpoints.steps() else None

    def __call__(self, loop: Loop) -> None:
        self._due |= loop.step % loop.config.checkpoint.every == 0 or loop.finished
        if self._due and self.saved != loop.step and not loop.skipping:
            self.save(loop, self._checkpoints)
            self.saved, self._due = loop.step, False

    def save(self, loop: Loop, checkpoints: Checkpoints) -> None:
        """Saves the current state.

        Args:
          loop: the loop, whose state is saved.
          checkpoints: the directory of checkpoints to save into.
        """
        get_state = getattr(self._batches, "get_state", None)
        position = None if get_state is None else get_state()
        metadata = {"config": to_dict(loop.config), "data": position, "best_loss": loop.best_loss}
        if self._num_members is not None:  # tj.load asks for one of them
            metadata["num_members"] = self._num_members
        if self._own is None:
            is_model = (isinstance(loop.state.params, nnx.Module) and loop.config.model.vocab_size is not None
                        and self._num_members is None)
            self._own = own_modules(cast(Model, loop.state.params), loop.config.model) if is_model else {}
        if self._own:  # with these, tj.load can ask for a template that has the modules
            metadata["own_modules"] = self._own
        checkpoints.save(loop.step, loop.state, metadata=metadata, files=dict(self._files))


class StopOnSignal:
    """Ends the run after the step in which a process received SIGINT (Ctrl-C) or SIGTERM."""

    def __init__(self):
        self._received: list[int] = []

    def __call__(self, loop: Loop) -> None:
        # Asking the other processes takes time, so several processes do not do it after every step.
        if ((jax.process_count() == 1 or loop.step % loop.config.log_every == 0)
                and agreed(bool(self._received))):
            loop.stop_signal = self._received[0] if self._received else signal.SIGTERM

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Records signals instead of ending the process, see ``recorded_signals``."""
        with recorded_signals() as self._received:
            yield


def progress_bar(loop: Loop) -> tqdm:
    """Returns a progress bar over all steps, which only the first process shows."""
    return tqdm(total=loop.config.steps, initial=loop.start, unit="step", dynamic_ncols=True, desc="training",
                smoothing=0.05, disable=not is_first())
