"""The training loop, with hooks that log, evaluate, sample, save and stop.

If a run has several processes, all of them run the loop together. Each process provides its own
rows of every batch. Only the first process prints and writes files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from transformer_jax.config import ExperimentConfig
from transformer_jax.sharding import batch_sharding, data_share, make_mesh
from transformer_jax.training.loggers import MetricLogger
from transformer_jax.training.processes import check_mesh, is_first
from transformer_jax.training.state import TrainState
from transformer_jax.training.step import Batch

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
Hook = Callable[["Loop"], None]


@dataclasses.dataclass
class Loop:
    """The state of a training run between two steps, which hooks read and change.

    Attributes:
      config: the config of the run.
      state: the parameters, the optimizer state and the step after the last update.
      mesh: the devices.
      loggers: the metric loggers that ``log`` writes to.
      to_model: a function that makes the model from the trained parameters. They are not the model
        itself if adapters are trained.
      step: number of updates so far, counted on the host.
      start: the step from which this start of the run began.
      metrics: the metrics of the last update, on the devices; ``None`` before the first update.
        Reading a value waits until the devices have computed it.
      num_tokens: number of tokens in all batches of all processes since the clock was last
        restarted.
      best_loss: the lowest validation loss so far, in nats.
      stop_signal: the number of the signal that ends the run after this step; 0 if none was
        received.
      progress: the progress bar, if there is one.
    """

    config: ExperimentConfig
    state: TrainState
    mesh: Mesh
    loggers: Sequence[MetricLogger] = ()
    to_model: Callable[[Any], Any] = lambda params: params
    step: int = 0
    start: int = 0
    metrics: dict[str, jax.Array] | None = None
    num_tokens: int = 0
    best_loss: float = float("inf")
    stop_signal: int = 0
    progress: tqdm | None = None
    _clock: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def model(self) -> Any:
        """The model with the current weights."""
        return self.to_model(self.state.params)

    @property
    def finished(self) -> bool:
        """True if no step follows, because all steps are done or a signal stops the run."""
        return self.step >= self.config.steps or bool(self.stop_signal)

    def is_due(self, every: int) -> bool:
        """Returns True if a periodic job must run after this step.

        Args:
          every: number of steps between two runs of the job; 0 for a job that never runs.

        Returns:
          True at every multiple of ``every``, and at the last step.
        """
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    @property
    def skipping(self) -> bool:
        """True if the last update was skipped (of several models, that of each), so that the weights
        may be bad."""
        return self.metrics is not None and bool(np.all(np.asarray(self.metrics.get("skipped_in_a_row", 0)) > 0))

    def log(self, values: Mapping[str, float | np.ndarray]) -> None:
        """Writes values of this step to every logger.

        If a logger fails, the run continues without it, unless the logger is required.

        Args:
          values: numbers, arrays or pictures by name, as ``MetricLogger.write`` describes them.
        """
        if not values or not is_first():
            return
        for logger in list(self.loggers):
            with self.without_on_error(logger):
                logger.write(self.step, values)

    @contextlib.contextmanager
    def without_on_error(self, logger: MetricLogger) -> Iterator[None]:
        """Guards calls of a logger: if one raises an exception, removes the logger and warns.

        Args:
          logger: the logger that the block calls.

        Yields:
          Nothing. If the logger is required, the exception of the block is raised again.
        """
        try:
            yield
        except Exception as error:  # a custom logger may raise anything
            if getattr(logger, "required", False):
                raise
            self.loggers = [other for other in self.loggers if other is not logger]
            warn_about_logger(type(logger).__name__, error)

    def write_line(self, text: str) -> None:
        """Prints a text above the progress bar, in the first process only.

        Args:
          text: the text.
        """
        if is_first():
            tqdm.write(text)

    def tokens_per_second(self) -> float:
        """Returns the training speed since the clock was last restarted.

        Returns:
          Tokens per second over all processes; 0 if no step was taken.
        """
        return self.num_tokens / (time.perf_counter() - self._clock)

    def restart_clock(self) -> None:
        """Restarts the clock, so that the time before does not count for the speed.

        Hooks that take long call it when they end.
        """
        self._clock, self.num_tokens = time.perf_counter(), 0


def warn_about_logger(name: str, error: Exception) -> None:
    """Warns, above the progress bar and on stderr, that training continues without a logger."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    tqdm.write(f"warning: the metric logger {name} failed and is not used any more; training continues without "
               f"it ({reason})", file=sys.stderr)


def fit(loop: Loop, train_step: TrainStep, batches: Iterator[Mapping[str, np.ndarray]],
        hooks: Sequence[Hook] = ()) -> TrainState:
    """Trains until ``loop.finished``, and calls every hook after each step.

    Args:
      loop: the loop, with the state to start from. It is updated in place.
      train_step: a training step, which ``make_train_step`` made.
      batches: an iterator over batches, of which each process gets its own rows.
      hooks: functions that are called as ``hook(loop)`` after every step, in this order. If a hook
        has a method ``start``, it is called with the loop before the first step.

    Returns:
      The final state, ``loop.state``.

    Raises:
      ValueError: if the batches end before the last step.
    """
    check_mesh(loop.mesh)
    num_shares = data_share(loop.mesh)[1]
    for hook in hooks:
        if hasattr(hook, "start"):
            hook.start(loop)
    loop.restart_clock()
    while not loop.finished:
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"the batches end after step {loop.step}, but the run has {loop.config.steps} steps; set "
                             f"steps={loop.step}, or repeat the batches")
        loop.state, loop.metrics = train_step(loop.state, to_devices(batch, loop.mesh))
        loop.step += 1
        loop.num_tokens += batch["tokens"].size * num_shares if "tokens" in batch else 0
        for hook in hooks:
            hook(loop)
    return loop.state


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh | None = None) -> dict[str, jax.Array]:
    """Puts a batch on the devices of a mesh, with its rows sharded over them.

    Args:
      batch: arrays by name, each ``[batch_size, ...]``; in a run of several processes, the rows of
        this process.
      mesh: the devices; ``None`` for the first device only.

    Returns:
      The sharded arrays by name.

    Raises:
      ValueError: if the batch is not a dict of arrays.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"got a batch of type {type(batch).__name__}; expected a dict of arrays [batch_size, ...], or "
                         "a list of examples, such as texts")
    sharding = batch_sharding(make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh)
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(rows)) for name, rows in batch.items()}
