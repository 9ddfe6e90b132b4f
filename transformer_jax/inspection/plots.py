"""Figures of attention and of what is measured on it, for papers and notebooks: matplotlib, without
pyplot.

Every function takes NumPy arrays and strings and returns a :class:`matplotlib.figure.Figure`, which
holds no global state and needs no display; :func:`save` writes it. Lightness tells more from less;
red and blue tell only the sign.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from transformer_jax.inspection import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LARGEST_PANEL = 128  # cells along one map in a grid of heads


def attention_map(weights_TS: np.ndarray, queries: Sequence[str], keys: Sequence[str] | None = None, *,
                  title: str = "", query_label: str = "query", key_label: str = "key") -> Figure:
    """One attention map with its tokens: a row for each query, a column for each key.

    Args:
      weights_TS: ``[T, S]``, from 0 to 1.
      queries: the T tokens that attend.
      keys: the S tokens attended to; ``None``: the queries.
      title: of the figure.
      query_label: of the axis of queries.
      key_label: of the axis of keys.

    Raises:
      ValueError: for weights that do not fit the tokens.
    """
    keys = queries if keys is None else keys
    weights_TS = figures.checked("weights", weights_TS, {"queries": len(queries), "keys": len(keys)})
    rows, columns = figures.labels(queries), figures.labels(keys)
    figure, axes, unit = figures.cells(weights_TS.shape, rows, columns)
    figures.draw_weights(axes, weights_TS, unit)
    figures.label(axes.yaxis, rows, unit)
    figures.label(axes.xaxis, columns, unit)
    axes.set(xlabel=key_label, ylabel=query_label)
    return figures.titled(figure, axes, title)


def alignment(weights: np.ndarray, source: Sequence[str], target: Sequence[str], *, title: str = "") -> Figure:
    """Where each target token looks in the source: cross attention, the strongest of each row
    framed.

    Args:
      weights: ``[T, S]``, or ``[N, T, S]``, of which the mean over heads is drawn.
      source: the S tokens.
      target: the T tokens.
      title: of the figure.
    """
    from matplotlib.collections import LineCollection

    weights_TS = np.asarray(weights, np.float32)
    weights_TS = weights_TS.mean(0) if weights_TS.ndim == 3 else weights_TS
    figure = attention_map(weights_TS, target, source, title=title, query_label="target", key_label="source")
    strongest = [_box(key, query, 1, 1) for query, key in enumerate(weights_TS.argmax(1))]
    figure.axes[0].add_collection(LineCollection(strongest, colors="#d55e00", linewidths=2, clip_on=False))
    return figure


def head_grid(weights: np.ndarray, queries: Sequence[str], keys: Sequence[str] | None = None, *,
              title: str = "") -> Figure:
    """Many heads side by side on one scale.

    Args:
      weights: ``[L, N, T, S]``: a row for each layer; or ``[N, T, S]``: the heads of one layer.
      queries: the T tokens that attend; they are written where there is room.
      keys: the S tokens attended to; ``None``: the queries.
      title: of the figure.
    """
    from matplotlib.collections import LineCollection

    keys = queries if keys is None else keys
    weights = np.asarray(weights, np.float32)
    if weights.ndim not in (3, 4):
        raise ValueError(f"weights are [layers, heads, queries, keys] or [heads, queries, keys]; got "
                         f"{list(weights.shape)}")
    maps = weights.reshape(-1, *weights.shape[-2:])
    figures.checked("weights", maps, {"maps": None, "queries": len(queries), "keys": len(keys)})
    if weights.ndim == 4:
        num_columns = weights.shape[1]
        names = [f"L{layer} H{head}" for layer, head in np.ndindex(weights.shape[:2])]
    else:
        num_columns = math.ceil(math.sqrt(len(maps)))
        names = [f"head {head}" for head in range(len(maps))]
    num_rows = math.ceil(len(maps) / num_columns)
    maps = np.stack(list(map(_pooled, maps)))
    T, S = maps.shape[1:]

    # One picture of all maps: an axes for each would take seconds where there are a hundred.
    side = min(max(1.2, 0.3 * max(T, S)), figures.LONGEST / num_columns, figures.LONGEST / num_rows)  # inches
    font = min(8.0, 72 * side * 0.12)
    unit = (side - 1.7 * font / 72) / max(T, S)
    below, beside = T + math.ceil(1.6 * font / 72 / unit), S + math.ceil(0.04 * side / unit)
    mosaic = np.full((num_rows * below, num_columns * beside), np.nan, np.float32)
    has_tokens = 72 * unit >= figures.SMALLEST_FONT and (len(queries), len(keys)) == (T, S)
    rows, columns = (figures.labels(tokens) if has_tokens else [] for tokens in (queries, keys))
    figure, axes, _ = figures.cells(mosaic.shape, rows, columns, unit=unit)
    boxes = []
    for index, (name, map_TS) in enumerate(zip(names, maps, strict=True)):
        top, left = (index // num_columns + 1) * below - T, index % num_columns * beside
        mosaic[top:top + T, left:left + S] = map_TS
        boxes.append(_box(left, top, S, T))
        axes.text(left + S / 2 - 0.5, top - 0.5, name, ha="center", va="bottom", fontsize=font).set_in_layout(False)
    axes.add_collection(LineCollection(boxes, colors="0.7", linewidths=0.5, clip_on=False))
    figures.draw_weights(axes, mosaic, unit, numbers=False)
    axes.spines[:].set_visible(False)
    axes.set(xticks=[], yticks=[])
    if has_tokens:
        figures.label(axes.yaxis, rows * num_rows, unit, [(row + 1) * below - T + token
                                                          for row in range(num_rows) for token in range(T)])
        figures.label(axes.xaxis, columns * num_columns, unit, [column * beside + token
                                                                for column in range(num_columns) for token in range(S)])
    return figures.titled(figure, axes, title)


def layer_head_summary(values_LN: np.ndarray, name: str, *, title: str = "") -> Figure:
    """One number for each head of each layer, such as its entropy, or the loss without it.

    Args:
      values_LN: ``[L, N]``; NaN is left blank. Values of both signs are drawn around a white zero.
      name: what the numbers are, with their unit: ``"entropy (nats)"``.
      title: of the figure.
    """
    values_LN = figures.checked("values", values_LN, {"layers": None, "heads": None}, gaps=True)
    layers, heads = (list(map(str, range(size))) for size in values_LN.shape)
    figure, axes, unit = figures.cells(values_LN.shape, layers, heads)
    figures.draw_values(axes, values_LN, name, unit)
    figures.label(axes.yaxis, layers, unit)
    figures.label(axes.xaxis, heads, unit)
    axes.set(xlabel="head", ylabel="layer")
    return figures.titled(figure, axes, title)


def patching_grid(effects_LT: np.ndarray, tokens: Sequence[str], name: str = "effect of patching", *,
                  title: str = "") -> Figure:
    """What restoring one activation does, for each layer and position: a row for each token, a
    column for each layer.

    Args:
      effects_LT: ``[L, T]``, such as the change of a logit difference; of both signs, around a
        white zero.
      tokens: the T tokens.
      name: what the numbers are, with their unit.
      title: of the figure.

    Source: the figures of Meng et al. (2022), "Locating and Editing Factual Associations in GPT".
    """
    effects_LT = figures.checked("effects", effects_LT, {"layers": None, "tokens": len(tokens)}, gaps=True)
    rows, layers = figures.labels(tokens), list(map(str, range(len(effects_LT))))
    figure, axes, unit = figures.cells(effects_LT.T.shape, rows, layers)
    figures.draw_values(axes, effects_LT.T, name, unit)
    figures.label(axes.yaxis, rows, unit)
    figures.label(axes.xaxis, layers, unit)
    axes.set(xlabel="layer", ylabel="token")
    return figures.titled(figure, axes, title)


def over_training(steps: Sequence[int], values_ELN: np.ndarray, name: str, *, title: str = "") -> Figure:
    """How a number of each head changes while the model learns: a thin line for a head, a thick one
    for a layer's mean.

    Args:
      steps: the E training steps at which it was measured.
      values_ELN: ``[E, L, N]``.
      name: what the numbers are, with their unit: ``"entropy (nats)"``.
      title: of the figure.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    values_ELN = figures.checked("values", values_ELN, {"steps": len(steps), "layers": None, "heads": None})
    num_layers = values_ELN.shape[1]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    every = math.ceil(num_layers / 16)  # a legend of more lines would not fit
    for layer, color in enumerate(colormaps["viridis"](np.linspace(0, 0.85, num_layers))):
        axes.plot(steps, values_ELN[:, layer], color=color, linewidth=0.7, alpha=0.4)
        axes.plot(steps, values_ELN[:, layer].mean(1), color=color, linewidth=2,
                  label=None if layer % every else f"layer {layer}")
    axes.set_xlabel("step")
    axes.set_ylabel(name, parse_math=False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=figures.FONT, frameon=False)
    return figures.titled(figure, axes, title)


def metric(name: str, kind: str = "self") -> str:
    """The name in a run's ``metrics.jsonl`` of a summary of one kind of attention:
    ``"self_attention/entropy"``."""
    return f"{kind}_attention/{name}"


def attention_over_training(path: str | pathlib.Path, name: str = "entropy", kind: str = "self", *,
                            title: str = "") -> Figure:
    """How a summary of each head changed in a run that was trained with
    ``--config.metrics.attention_every=...``.

    Args:
      path: of the run's ``metrics.jsonl``.
      name: of the summary, see :func:`~transformer_jax.inspection.maps.summaries`.
      kind: of attention.
      title: of the figure; by default it says which attention.

    Raises:
      ValueError: for a run that did not measure it.
    """
    lines = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines() if line.endswith("}")]
    measured = [(line["step"], line[metric(name, kind)]) for line in lines if metric(name, kind) in line]
    if not measured:
        known = sorted({known for line in lines for known in line if "_attention/" in known})
        raise ValueError(f"{path} has no {metric(name, kind)!r}; " + (
            f"it has {', '.join(known)}" if known else "train with --config.metrics.attention_every=100"))
    steps, values_ELN = zip(*measured, strict=True)
    units = {"entropy": " (nats)", "distance": " (tokens)"}
    return over_training(steps, np.asarray(values_ELN), name.replace("_", " ") + units.get(name, ""),
                         title=title or f"{kind} attention")


def save(figure: Figure, path: str | pathlib.Path) -> None:
    """Writes a figure as PNG or SVG, as the path ends.

    Raises:
      ValueError: for another ending.
    """
    if pathlib.Path(path).suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"{path}: a figure is saved as .png or .svg; name the file so")
    figure.savefig(path, dpi=150)


def _pooled(map_TS: np.ndarray) -> np.ndarray:
    """The map in at most 128 x 128 cells, each the largest of its weights: a mean would lose thin
    diagonals."""
    for axis, size in enumerate(map_TS.shape):
        if size > _LARGEST_PANEL:
            starts = np.arange(_LARGEST_PANEL) * size // _LARGEST_PANEL
            map_TS = np.maximum.reduceat(map_TS, starts, axis=axis)
    return map_TS


def _box(column: float, row: float, width: float, height: float) -> np.ndarray:
    """The outline of cells, whose centers have whole coordinates."""
    return np.array([column, row]) - 0.5 + np.array([(0, 0), (width, 0), (width, height), (0, height), (0, 0)])
