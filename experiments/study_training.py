"""What the studies of circuits share: batches that are drawn from the seed and their number, and the
training of a small decoder on them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

import transformer_jax as tj
from transformer_jax.training.bundle import Bundle

Draw = Callable[[np.random.Generator, int], np.ndarray | Mapping[str, np.ndarray]]


class DrawnBatches:
    """An endless iterator of drawn batches, which can be resumed.

    Batch number i depends only on the seed and on i.
    """

    def __init__(self, draw: Draw, batch_size: int, seed: int):
        """Makes the iterator.

        Args:
          draw: a function of a random generator and a number of rows that returns tokens
            ``[B, T + 1]``, of which each one but the first is predicted, or a whole batch.
          batch_size: the number of rows of a batch.
          seed: the seed.
        """
        self._draw, self._batch_size, self._seed, self._number = draw, batch_size, seed, 0

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        return self

    def __next__(self) -> Mapping[str, np.ndarray]:
        drawn = self._draw(np.random.default_rng((self._seed, self._number)), self._batch_size)
        self._number += 1
        if isinstance(drawn, Mapping):
            return drawn
        rows = drawn.astype(np.int32)
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}

    def get_state(self) -> int:
        """Returns the number of the next batch."""
        return self._number

    def set_state(self, state: int) -> None:
        """Continues with this batch."""
        self._number = state


def config_for(model: tj.ModelConfig, *, steps: int, seed: int, checkpoints: int = 1) -> tj.ExperimentConfig:
    """Returns the config of a study.

    Args:
      model: the model.
      steps: the number of steps.
      seed: the seed of the weights and of the batches.
      checkpoints: how many checkpoints the run keeps, at equal distances.

    Returns:
      The config.
    """
    return tj.ExperimentConfig(
        seed=seed, steps=steps, batch_size=64, log_every=50, model=model,
        checkpoint=tj.config.CheckpointConfig(every=max(steps // checkpoints, 1), keep=checkpoints + 1),
        optim=tj.config.OptimConfig(peak_lr=3e-3, warmup_steps=50, weight_decay=0.01))


def train(config: tj.ExperimentConfig, draw: Draw, workdir: pathlib.Path, **options: Any) -> Bundle:
    """Trains a model on drawn batches, or loads it if it is trained.

    Args:
      config: the config.
      draw: draws rows, as for ``DrawnBatches``.
      workdir: the directory of the run.
      **options: further arguments of ``tj.train``.

    Returns:
      The trained model.
    """
    return tj.train(config, DrawnBatches(draw, config.batch_size, config.seed), workdir=workdir, **options)


def verdict(holds: bool) -> str:
    """Returns the word that a study prints after a test that could have refuted its claim."""
    return "confirmed" if holds else "REFUTED"
