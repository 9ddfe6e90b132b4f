"""The training loop: one step after another, with hooks that log, evaluate, sample, save and stop.

Several processes run it in step. Each feeds its own rows of every batch; the first prints and
writes.
"""

from __future__ import annotations

import dataclasses
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
from transformer_jax.training.processes import is_first
from transformer_jax.training.state import TrainState
from transformer_jax.training.step import Batch

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
Hook = Callable[["Loop"], None]


@dataclasses.dataclass
class Loop:
    """A training run between two steps: what hooks read, and through what they log, print and stop.

    Attributes:
      config: of the run.
      state: parameters, optimizer state and step after the last update.
      mesh: the devices.
      loggers: where :meth:`log` writes.
      to_model: makes the model from the trained parameters (they differ where adapters are
        trained).
      step: updates taken, counted on the host.
      start: the step that this start of the run began with.
      metrics: those of the last update, on the devices; ``None`` before the first. Reading a value
        waits for it.
      num_tokens: tokens of all batches since the clock was last restarted, over all processes.
      best_loss: the lowest validation loss so far.
      stop_signal: the signal that ends the run after this step; 0 where none was received.
      progress: the progress bar.
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
        """The model with the present weights."""
        return self.to_model(self.state.params)

    @property
    def finished(self) -> bool:
        """Whether no step follows: all are done, or the run was told to stop."""
        return self.step >= self.config.steps or bool(self.stop_signal)

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the last one, happens now (0:
        never)."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def log(self, values: Mapping[str, float | np.ndarray]) -> None:
        """Writes values of this step to every logger."""
        if values and is_first():
            for logger in self.loggers:
                logger.write(self.step, values)

    def say(self, text: str) -> None:
        """Prints above the progress bar, in the first process."""
        if is_first():
            tqdm.write(text)

    def tokens_per_second(self) -> float:
        """The speed since the clock was last restarted; 0 where no step was taken."""
        return self.num_tokens / (time.perf_counter() - self._clock)

    def restart_clock(self) -> None:
        """Leaves the time up to now out of the speed; hooks that take long call it at their end."""
        self._clock, self.num_tokens = time.perf_counter(), 0


def fit(loop: Loop, train_step: TrainStep, batches: Iterator[Mapping[str, np.ndarray]],
        hooks: Sequence[Hook] = ()) -> TrainState:
    """Takes steps until ``loop.finished``, and calls every hook after each step.

    Args:
      loop: with the state to begin from; it is updated in place.
      train_step: from :func:`transformer_jax.training.step.make_train_step`.
      batches: this process's rows of each batch.
      hooks: called in order after every step, ``hook(loop)``. A hook with a method ``start`` has it
        called with the loop before the first step.

    Returns:
      The final state, ``loop.state``.
    """
    num_shares = data_share(loop.mesh)[1]
    for hook in hooks:
        if hasattr(hook, "start"):
            hook.start(loop)
    loop.restart_clock()
    while not loop.finished:
        batch = next(batches)
        loop.state, loop.metrics = train_step(loop.state, to_devices(batch, loop.mesh))
        loop.step += 1
        loop.num_tokens += batch["tokens"].size * num_shares if "tokens" in batch else 0
        for hook in hooks:
            hook(loop)
    return loop.state


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh | None = None) -> dict[str, jax.Array]:
    """The batch as arrays whose rows are divided over the devices of a mesh (by default one
    device).

    Raises:
      ValueError: for what is not a dict of arrays.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch is a dict of arrays [batch_size, ...], not {type(batch).__name__}; pass examples, "
                         "such as texts, as a list")
    sharding = batch_sharding(make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh)
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(rows)) for name, rows in batch.items()}
