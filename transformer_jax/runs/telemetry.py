"""Metrics during training: the attention of every head, and how much of each corpus was read."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import numpy as np

from transformer_jax.data import Mixture
from transformer_jax.data.windows import BatchSource
from transformer_jax.inspection import maps, plots
from transformer_jax.models.functional import Model
from transformer_jax.sharding import constrain
from transformer_jax.tasks.base import Task
from transformer_jax.training.loop import Loop
from transformer_jax.training.processes import is_first

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUM_ROWS = 8
_CELL = 24  # the width and the height of a head's square in a picture, in pixels


def attention_summaries(task: Task, model: Model,
                        batch: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    """Computes summaries of the attention of every head on a batch.

    Args:
      task: The task, which runs the model on the batch.
      model: A model of the task's family.
      batch: Arrays by name, as the task makes them.

    Returns:
      For each kind of attention (``"self"``, and for translators also ``"encoder"`` and
      ``"cross"``) the arrays of ``transformer_jax.inspection.maps.summaries`` by name, ``[L, N]``
      each.
    """
    trace, tokens_BT = task.forward(model, batch).trace, batch["tokens"]
    if hasattr(trace, "cross"):
        found = {"self": maps.summaries(trace.decoder, tokens_BT),
                 "encoder": maps.summaries(trace.encoder, batch["source"]), "cross": maps.summaries(trace.cross)}
    else:
        found = {"self": maps.summaries(trace, tokens_BT)}
    # The arrays are replicated, so that every process has them whole.
    return jax.tree.map(lambda values_LN: constrain(values_LN, None, None), found)


class WatchAttention:
    """A hook that logs the attention of every head on the first held-out rows, every
    ``metrics.attention_every`` steps.

    TensorBoard also shows a picture of each summary. It has a row for each layer and a column for
    each head; black means 0 and white means the largest possible value. After the last step, the
    hook also draws the entropy of attention over all steps.

    Args:
      task: The task, which runs the model on a batch.
      held_out: The held-out examples of the task.
      workdir: The directory of the run, whose ``metrics.jsonl`` the last picture is drawn from.
        ``None`` means no last picture.
    """

    def __init__(self, task: Task, held_out: BatchSource, workdir: pathlib.Path | None):
        self._batch = held_out[np.arange(min(_NUM_ROWS, len(held_out)))]
        self._summaries = jax.jit(lambda model, batch: attention_summaries(task, model, batch))
        self._workdir = workdir

    def __call__(self, loop: Loop) -> None:
        if not loop.is_due(loop.config.metrics.attention_every):
            return
        for kind, summaries in jax.device_get(self._summaries(loop.model, self._batch)).items():
            loop.log({plots.metric(name, kind): values_LN for name, values_LN in summaries.items()})
            num_keys = self._batch["tokens" if kind == "self" else "source"].shape[1]
            largest = {"entropy": math.log(num_keys), "distance": num_keys - 1}
            loop.log({plots.metric(name, kind): _cells(values_LN / largest.get(name, 1))
                      for name, values_LN in summaries.items()})
            if loop.step == loop.config.steps and self._workdir is not None and is_first():
                figure = plots.attention_over_training(self._workdir / "metrics.jsonl", kind=kind)
                loop.log({plots.metric("entropy_over_training", kind): _pixels(figure)})
        loop.restart_clock()


class LogCorpora:
    """A hook that logs how many tokens and epochs of each corpus the steps so far have drawn, every
    ``log_every`` steps, as ``tokens_NAME`` and ``epochs_NAME``.

    Args:
      mixture: The training data.
    """

    def __init__(self, mixture: Mixture):
        self._mixture = mixture

    def __call__(self, loop: Loop) -> None:
        if loop.is_due(loop.config.log_every):
            drawn = self._mixture.drawn(loop.step * loop.config.batch_size)
            loop.log({f"{what}_{name}": getattr(corpus, what) for name, corpus in drawn.items()
                      for what in ("tokens", "epochs")})


def _cells(values_LN: np.ndarray) -> np.ndarray:
    """Draws values from 0 to 1 as gray squares. The brightness is the square root of the value, so
    that small values look different from each other.

    The picture has no axes and no numbers, because drawing them takes as long as several training
    steps.
    """
    gray_LN1 = np.rint(255 * np.sqrt(np.clip(values_LN, 0, 1))).astype(np.uint8)[..., None]
    return gray_LN1.repeat(_CELL, 0).repeat(_CELL, 1).repeat(3, 2)


def _pixels(figure: Figure) -> np.ndarray:
    """Renders a figure to an array, ``[height, width, 3]``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
