"""What attention does while a model of any family learns: numbers of every head for its metrics,
and pictures."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import numpy as np

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
_CELL = 24  # pixels of a head in a picture, each way


def attention_summaries(task: Task, model: Model,
                        batch: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    """By kind of attention, the :func:`~transformer_jax.inspection.maps.summaries` of a batch,
    ``[L, N]`` each.

    Args:
      task: calls the model on the batch.
      model: of the task's family.
      batch: as the task makes them.
    """
    trace, tokens_BT = task.forward(model, batch).trace, batch["tokens"]
    if hasattr(trace, "cross"):
        found = {"self": maps.summaries(trace.decoder, tokens_BT),
                 "encoder": maps.summaries(trace.encoder, batch["source"]), "cross": maps.summaries(trace.cross)}
    else:
        found = {"self": maps.summaries(trace, tokens_BT)}
    return jax.tree.map(lambda values_LN: constrain(values_LN, None, None), found)  # whole in every process


class WatchAttention:
    """A hook that logs what every head does on the first held-out rows, every
    ``metrics.attention_every`` steps.

    TensorBoard also has a picture of each summary, a row for each layer and a column for each head,
    black for 0 and white for the most that there can be; and after the last step entropy over
    training.

    Args:
      task: calls the model on a batch.
      held_out: examples for the task.
      workdir: where ``metrics.jsonl`` is, from which the last picture is drawn; ``None``: no last
        picture.
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
            most = {"entropy": math.log(num_keys), "distance": num_keys - 1}
            loop.log({plots.metric(name, kind): _cells(values_LN / most.get(name, 1))
                      for name, values_LN in summaries.items()})
            if loop.step == loop.config.steps and self._workdir is not None and is_first():
                figure = plots.attention_over_training(self._workdir / "metrics.jsonl", kind=kind)
                loop.log({plots.metric("entropy_over_training", kind): _pixels(figure)})
        loop.restart_clock()


def _cells(values_LN: np.ndarray) -> np.ndarray:
    """Values from 0 to 1 as gray squares, by their square roots, which tell small ones apart.

    A figure with axes and numbers would take as long as several training steps.
    """
    gray_LN1 = np.rint(255 * np.sqrt(np.clip(values_LN, 0, 1))).astype(np.uint8)[..., None]
    return gray_LN1.repeat(_CELL, 0).repeat(_CELL, 1).repeat(3, 2)


def _pixels(figure: Figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
