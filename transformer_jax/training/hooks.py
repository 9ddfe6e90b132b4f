"""The jobs of a training run beside its steps; each is a hook, called with the :class:`Loop` after
every step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from transformer_jax.settings import to_dict
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.errors import NotFiniteError
from transformer_jax.training.loop import Loop
from transformer_jax.training.metrics import flops_per_token
from transformer_jax.training.processes import agreed, is_first, on_one_device

MAX_SKIPPED_IN_A_ROW = 10


class CheckFinite:
    """Ends the run after ten updates in a row that were skipped because a gradient was not
    finite."""

    def __init__(self):
        self._previous: dict[str, jax.Array] | None = None

    def __call__(self, loop: Loop) -> None:
        # Metrics are read one step late, so that the devices never wait for Python.
        if self._previous is not None:
            _check_finite(self._previous, loop.step - 1)
        self._previous = loop.metrics
        if loop.step == loop.config.steps:
            _check_finite(loop.metrics, loop.step)


class Log:
    """Moves the progress bar, and logs the step's metrics, learning rate and speed every
    ``config.log_every`` steps."""

    def __init__(self, schedule: optax.Schedule | None):
        self._schedule = schedule

    def start(self, loop: Loop) -> None:
        self._num_parameters = sum(leaf.size for leaf in jax.tree.leaves(loop.state.params))

    def __call__(self, loop: Loop) -> None:
        if loop.progress is not None:
            loop.progress.update()
        if loop.step == loop.start + 1:
            jax.block_until_ready(loop.metrics)  # compiled: from here on the clock tells the speed
            loop.restart_clock()
        if not loop.is_due(loop.config.log_every):
            return
        values = {name: float(value) for name, value in loop.metrics.items() if name != "skipped_in_a_row"}
        if self._schedule is not None:
            values["learning_rate"] = float(self._schedule(loop.step - 1))
        if loop.num_tokens:
            rate = loop.tokens_per_second()
            values["tokens_per_second"] = rate
            if not loop.config.lora.rank:  # else the parameters are not those that the model is run with
                values["model_flops_per_second"] = rate * flops_per_token(loop.config.model, self._num_parameters)
        loop.log(values)
        if loop.progress is not None:
            rate = values.get("tokens_per_second", 0.0)
            loop.progress.set_postfix_str(f"loss {values['loss']:.3f}, {rate:,.0f} tokens/s")
        loop.restart_clock()


class Evaluate:
    """Evaluates every ``config.eval.every`` steps and at the end, and calls ``keep_best`` when the
    loss is the lowest.

    Args:
      evaluate: from a model to a dict of numbers, ``validation_loss`` among them.
      keep_best: called with the loop after an evaluation with the lowest ``validation_loss`` so
        far.
    """

    def __init__(self, evaluate: Callable[[Any], Mapping[str, float]],
                 keep_best: Callable[[Loop], None] | None = None):
        self._evaluate, self._keep_best = evaluate, keep_best

    def __call__(self, loop: Loop) -> None:
        if not loop.is_due(loop.config.eval.every):
            return
        values = self._evaluate(loop.model)
        loop.log(values)
        loop.say(f"step {loop.step}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}"
                                                   for name, value in values.items()))
        if values["validation_loss"] < loop.best_loss:
            loop.best_loss = values["validation_loss"]
            if self._keep_best is not None:
                self._keep_best(loop)
        loop.restart_clock()


class Sample:
    """Shows what the model can do, as ``config.sample`` asks for.

    Args:
      show: called with the model and the step; it prints.
    """

    def __init__(self, show: Callable[[Any, int], None]):
        self._show = show

    def __call__(self, loop: Loop) -> None:
        sample, is_last = loop.config.sample, loop.step == loop.config.steps
        if sample.every and (sample.due(loop.step) or is_last):
            on_one_device(lambda params, step: self._show(loop.to_model(params), step), loop.state.params, loop.mesh,
                          loop.step)
            loop.restart_clock()


class Follow:
    """Lets batches that depend on the weights, as in reinforcement learning, follow them.

    Args:
      follow: called with the model and ``None`` before the first step, then with the metrics of
        every update, before anything is saved; returns what to log.
    """

    def __init__(self, follow: Callable[[Any, dict[str, jax.Array] | None], Mapping[str, float]]):
        self._follow = follow

    def start(self, loop: Loop) -> None:
        self._call(loop, None)

    def __call__(self, loop: Loop) -> None:
        self._call(loop, loop.metrics)

    def _call(self, loop: Loop, metrics: dict[str, jax.Array] | None) -> None:
        if loop.step < loop.config.steps:
            loop.log(self._follow(loop.model, metrics))


class SaveCheckpoints:
    """Saves the state every ``config.checkpoint.every`` steps and when the run ends or is stopped.

    Args:
      checkpoints: where to.
      batches: the iterator whose position is stored, where it has ``get_state``.
      files: stored with every checkpoint, such as the tokenizer.
    """

    def __init__(self, checkpoints: Checkpoints, batches: Iterator[Mapping[str, np.ndarray]],
                 files: Mapping[str, bytes]):
        self._checkpoints, self._batches, self._files = checkpoints, batches, files
        self._saved: int | None = None

    def start(self, loop: Loop) -> None:
        """A run that begins at a checkpoint need not save it again; one without any step left saves
        nothing."""
        self._saved = max(self._checkpoints.steps(), default=None)

    def __call__(self, loop: Loop) -> None:
        if (loop.step % loop.config.checkpoint.every == 0 or loop.finished) and self._saved != loop.step:
            self.save(loop, self._checkpoints)
            self._saved = loop.step

    def save(self, loop: Loop, checkpoints: Checkpoints) -> None:
        """Saves the present state into ``checkpoints``."""
        position = self._batches.get_state() if hasattr(self._batches, "get_state") else None
        metadata = {"config": to_dict(loop.config), "data": position, "best_loss": loop.best_loss}
        checkpoints.save(loop.step, loop.state, metadata=metadata, files=dict(self._files))


class StopOnSignal:
    """Ends the run after the step in which SIGINT (Ctrl-C) or SIGTERM came to any of its
    processes."""

    def __init__(self):
        self._received: list[int] = []

    def __call__(self, loop: Loop) -> None:
        # Asking the other processes takes a moment.
        if ((jax.process_count() == 1 or loop.step % loop.config.log_every == 0)
                and agreed(bool(self._received))):
            loop.stop_signal = self._received[0] if self._received else signal.SIGTERM

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Collects the signals instead of ending the process; a second one has its usual effect."""
        usual = {}

        def on_signal(signum: int, frame: Any) -> None:
            self._received.append(signum)
            signal.signal(signum, usual[signum])

        try:
            for signum in (signal.SIGINT, signal.SIGTERM):
                usual[signum] = signal.signal(signum, on_signal)
        except ValueError:  # not in the main thread, as in some notebooks: signals stay as they are
            pass
        try:
            yield
        finally:
            for signum, handler in usual.items():
                signal.signal(signum, handler)


def progress_bar(loop: Loop) -> tqdm:
    """A bar over all steps, which the first process shows."""
    return tqdm(total=loop.config.steps, initial=loop.start, unit="step", dynamic_ncols=True, desc="training",
                smoothing=0.05, disable=not is_first())


def _check_finite(metrics: Mapping[str, jax.Array], step: int) -> None:
    if int(metrics["skipped_in_a_row"]) >= MAX_SKIPPED_IN_A_ROW:
        raise NotFiniteError(
            f"step {step}: {MAX_SKIPPED_IN_A_ROW} updates in a row had gradients that are not finite; training stops, "
            "and the checkpoints are those of before. Lower optim.peak_lr, lengthen optim.warmup_steps, or look at "
            "the data")
