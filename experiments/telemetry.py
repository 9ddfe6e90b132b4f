"""What attention does while a model of any family learns: numbers of every head for its metrics, and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import numpy as np

from transformer_jax.data.windows import BatchSource
from transformer_jax.inspection import maps, plots
from transformer_jax.models.encoder_decoder import EncoderDecoder
from transformer_jax.models.functional import Model
from transformer_jax.sharding import constrain
from transformer_jax.training.metrics import MetricsWriter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUM_ROWS = 8
_CELL = 24  # pixels of a head in a picture, each way


@jax.jit
def attention_summaries(model: Model, batch: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    """By kind of attention, the :func:`~transformer_jax.inspection.maps.summaries` of a batch, ``[L, N]`` each."""
    tokens_BT, segment_ids_BT = batch["tokens"], batch.get("segment_ids")
    if isinstance(model, EncoderDecoder):
        source_BS = batch["source"]
        trace = model(source_BS, tokens_BT, source_segment_ids_BS=batch["source_segment_ids"],
                      target_segment_ids_BT=segment_ids_BT).trace
        found = {"self": maps.summaries(trace.decoder, tokens_BT),
                 "encoder": maps.summaries(trace.encoder, source_BS), "cross": maps.summaries(trace.cross)}
    else:
        found = {"self": maps.summaries(model(tokens_BT, segment_ids_BT=segment_ids_BT).trace, tokens_BT)}
    return jax.tree.map(lambda values_LN: constrain(values_LN, None, None), found)  # whole in every process


def watch_attention(held_out: BatchSource, num_steps: int) -> Callable[[Model, int, MetricsWriter], None]:
    """A function that writes what every head of some weights does on the first rows held out.

    TensorBoard also has a picture of each summary, a row for each layer and a column for each head, black for 0 and
    white for the most that there can be; and after the last step entropy over training.

    Args:
      held_out: examples for the model's family.
      num_steps: those of the whole run.
    """
    batch = held_out[np.arange(min(_NUM_ROWS, len(held_out)))]

    def watch(model: Model, step: int, metrics: MetricsWriter) -> None:
        for kind, summaries in jax.device_get(attention_summaries(model, batch)).items():
            metrics.write_heads(step, {plots.metric(name, kind): values_LN for name, values_LN in summaries.items()})
            num_keys = batch["tokens" if kind == "self" else "source"].shape[1]
            most = {"entropy": math.log(num_keys), "distance": num_keys - 1}
            for name, values_LN in summaries.items():
                metrics.write_image(step, plots.metric(name, kind), _cells(values_LN / most.get(name, 1)))
            if step == num_steps:
                figure = plots.attention_over_training(metrics.path, kind=kind)
                metrics.write_image(step, plots.metric("entropy_over_training", kind), _pixels(figure))

    return watch


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
