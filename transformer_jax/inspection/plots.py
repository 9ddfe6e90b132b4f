"""Matplotlib figures of attention and of its scores, for papers and notebooks.

Every function takes NumPy arrays and strings and returns a ``matplotlib.figure.Figure``. It does
not use pyplot, so a figure has no global state and needs no display; ``save`` writes it to a file.
Lightness shows the magnitude; red and blue show only the sign.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from transformer_jax.inspection import figures
from transformer_jax.json_files import read_json_lines
from transformer_jax.settings import checked_path

if TYPE_CHECKING:
    from jax import Array
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LARGEST_PANEL = 128  # cells along one map in a grid of heads
_FRAMED_FROM = 0.5  # weights of at least this part of the largest weight in a row get a frame


def attention_map(weights_TS: Float[np.ndarray | Array, "T S"], queries: Sequence[str],
                  keys: Sequence[str] | None = None, *, title: str = "", query_label: str = "query",
                  key_label: str = "key") -> Figure:
    """Draws one attention map with a row for each query token and a column for each key token.

    Args:
      weights_TS: attention weights from 0 to 1, ``[T, S]``.
      queries: the T query tokens.
      keys: the S key tokens; ``None`` if they are the same as the queries.
      title: the title of the figure.
      query_label: the title of the axis of queries.
      key_label: the title of the axis of keys.

    Raises:
      ValueError: if the shape of the weights does not match the tokens.
    """
    keys = queries if keys is None else keys
    weights_TS = figures.checked("weights", weights_TS, {"queries": queries, "keys": keys})
    return _cells(weights_TS, (query_label, figures.labels(queries)), (key_label, figures.labels(keys)), title,
                  figures.draw_weights)


def alignment(weights: Float[np.ndarray | Array, "*N T S"], source: Sequence[str], target: Sequence[str], *,
              title: str = "") -> Figure:
    """Draws cross-attention from target to source. Weights of at least half of the largest weight
    in their row get a frame.

    Args:
      weights: attention weights ``[T, S]``, or ``[N, T, S]`` to draw the mean over heads.
      source: the S source tokens.
      target: the T target tokens.
      title: the title of the figure.
    """
    weights_TS = figures.numbers("weights", weights)
    weights_TS = weights_TS.mean(0) if weights_TS.ndim == 3 else weights_TS
    figure = attention_map(weights_TS, target, source, title=title, query_label="target", key_label="source")
    is_framed_TS = (weights_TS >= _FRAMED_FROM * weights_TS.max(1, keepdims=True)) & (weights_TS > 0)
    return _framed(figure, np.argwhere(is_framed_TS))


def chosen_experts(probabilities_TE: Float[np.ndarray | Array, "T E"], experts_Tk: Int[np.ndarray | Array, "T k"],
                   tokens: Sequence[str], *, title: str = "") -> Figure:
    """Draws which experts of a mixture each token goes to: the probabilities of all experts, with a
    frame around those that the router chose.

    Args:
      probabilities_TE: the router's probabilities of one layer and row of a batch, ``[T, E]``, such
        as ``trace["layers.1.router_probabilities"][0]``.
      experts_Tk: the chosen experts, ``[T, k]``, such as ``trace["layers.1.experts"][0]``.
      tokens: the T tokens.
      title: the title of the figure.
    """
    probabilities_TE = figures.checked("probabilities", probabilities_TE, {"tokens": tokens, "experts": ...})
    experts_Tk = figures.checked("experts", experts_Tk, {"tokens": tokens, "choices": ...})
    names = [str(expert) for expert in range(probabilities_TE.shape[1])]
    figure = _cells(probabilities_TE, ("token", figures.labels(tokens)), ("expert", names), title,
                    functools.partial(figures.draw_weights, name="router's probability"))
    return _framed(figure, [(token, expert) for token, row in enumerate(experts_Tk) for expert in row])


def head_grid(weights: Float[np.ndarray | Array, "*L N T S"], queries: Sequence[str],
              keys: Sequence[str] | None = None, *, title: str = "") -> Figure:
    """Draws the maps of many heads in one figure with one color scale.

    Args:
      weights: attention weights ``[L, N, T, S]``, drawn with a row of maps for each layer; or
        ``[N, T, S]`` for the heads of one layer.
      queries: the T query tokens. If there is no room for all, the axis shows every second, third,
        ... and says so.
      keys: the S key tokens; ``None`` if they are the same as the queries.
      title: the title of the figure.
    """
    from matplotlib.collections import LineCollection

    keys = queries if keys is None else keys
    weights = figures.numbers("weights", weights)
    if weights.ndim not in (3, 4):
        raise ValueError(f"weights must be [layers, heads, queries, keys] or [heads, queries, keys]; got "
                         f"{list(weights.shape)}")
    maps = weights.reshape(-1, *weights.shape[-2:])
    figures.checked("weights", maps, {"maps": ..., "queries": queries, "keys": keys})
    if weights.ndim == 4:
        num_columns = weights.shape[1]
        names = [f"L{layer} H{head}" for layer, head in np.ndindex(weights.shape[:2])]
    else:
        num_columns = math.ceil(math.sqrt(len(maps)))
        names = [f"head {head}" for head in range(len(maps))]
    num_rows = math.ceil(len(maps) / num_columns)
    T, S = maps.shape[1:]
    maps = np.stack(list(map(_pooled, maps)))
    are_pooled = maps.shape[1:] != (T, S)
    T, S = maps.shape[1:]

    # Draw all maps as one image, because a hundred matplotlib axes would take seconds.
    side = min(max(1.2, 0.3 * max(T, S)), figures.LONGEST / num_columns, figures.LONGEST / num_rows)  # inches
    font = min(8.0, 72 * side * 0.12)
    unit = (side - 1.7 * font / 72) / max(T, S)
    below, right = T + math.ceil(1.6 * font / 72 / unit), S + math.ceil(0.04 * side / unit)
    mosaic = np.full((num_rows * below, num_columns * right), np.nan, np.float32)
    rows, columns = figures.labels(queries), figures.labels(keys)
    figure, axes, _ = figures.cells(mosaic.shape, rows, columns, unit=unit)
    boxes = []
    for index, (name, map_TS) in enumerate(zip(names, maps, strict=True)):
        top, left = (index // num_columns + 1) * below - T, index % num_columns * right
        mosaic[top:top + T, left:left + S] = map_TS
        boxes.append(_box(left, top, S, T))
        axes.text(left + S / 2 - 0.5, top - 0.5, name, ha="center", va="bottom", fontsize=font).set_in_layout(False)
    axes.add_collection(LineCollection(boxes, colors="0.7", linewidths=0.5, clip_on=False))
    figures.draw_weights(axes, mosaic, unit, numbers=False)
    axes.spines[:].set_visible(False)
    note = ", several tokens in a cell: their largest weight" if are_pooled else ""
    figures.label(axes.yaxis, f"query{note}", rows, unit, num_cells=T,
                  starts=[(row + 1) * below - T for row in range(num_rows)])
    figures.label(axes.xaxis, f"key{note}", columns, unit, num_cells=S,
                  starts=[column * right for column in range(num_columns)])
    return figures.titled(figure, axes, title)


def layer_head_summary(values_LN: Float[np.ndarray | Array, "L N"], name: str, *, title: str = "") -> Figure:
    """Draws one number for each head of each layer, such as its entropy.

    Args:
      values_LN: the numbers, ``[L, N]``; NaN is left blank. If both signs occur, zero is white.
      name: the name of the numbers with their unit, such as ``"entropy (nats)"``.
      title: the title of the figure.
    """
    values_LN = figures.checked("values", values_LN, {"layers": ..., "heads": ...}, gaps=True)
    layers, heads = (list(map(str, range(size))) for size in values_LN.shape)
    return _cells(values_LN, ("layer", layers), ("head", heads), title,
                  lambda axes, values, unit: figures.draw_values(axes, values, name, unit))


def patching_effects(effects_LT: Float[np.ndarray | Array, "L T"], tokens: Sequence[str],
                     name: str = "effect of patching", *, title: str = "") -> Figure:
    """Draws the effect of restoring one activation, as ``patching_grid`` measures it, with a row
    for each token and a column for each layer.

    Args:
      effects_LT: the effects, such as changes of a logit difference, ``[L, T]``. If both signs
        occur, zero is white.
      tokens: the T tokens.
      name: the name of the numbers with their unit.
      title: the title of the figure.

    Source: the figures of Meng et al. (2022), "Locating and Editing Factual Associations in GPT".
    """
    effects_LT = figures.checked("effects", effects_LT, {"layers": ..., "tokens": tokens}, gaps=True)
    layers = list(map(str, range(len(effects_LT))))
    return _cells(effects_LT.T, ("token", figures.labels(tokens)), ("layer", layers), title,
                  lambda axes, values, unit: figures.draw_values(axes, values, name, unit))


def over_training(steps: Sequence[int], values_ELN: Float[np.ndarray | Array, "E L N"], name: str, *,
                  title: str = "") -> Figure:
    """Draws how a number of each head changes during training: a thin line for each head, and a
    thick line for the mean of each layer.

    Args:
      steps: the E training steps at which it was measured.
      values_ELN: the numbers, ``[E, L, N]``.
      name: the name of the numbers with their unit, such as ``"entropy (nats)"``.
      title: the title of the figure.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    values_ELN = figures.checked("values", values_ELN, {"steps": steps, "layers": ..., "heads": ...})
    num_layers = values_ELN.shape[1]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    every = math.ceil(num_layers / 16)  # a legend with more lines would not fit
    for layer, color in enumerate(colormaps["viridis"](np.linspace(0, 0.85, num_layers))):
        axes.plot(steps, values_ELN[:, layer], color=color, linewidth=0.7, alpha=0.4)
        axes.plot(steps, values_ELN[:, layer].mean(1), color=color, linewidth=2,
                  label=None if layer % every else f"layer {layer}")
    least, largest = figures.spanned(values_ELN)
    margin = 0.05 * (largest - least)
    axes.set_ylim(least - margin, largest + margin)
    axes.yaxis.set_major_formatter(figures.plain_numbers())
    axes.xaxis.set_major_formatter(figures.plain_numbers())
    axes.set_xlabel("step")
    axes.set_ylabel(name, parse_math=False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=figures.FONT, frameon=False)
    return figures.titled(figure, axes, title)


def metric(name: str, kind: str = "self") -> str:
    """Returns the name of a score in ``metrics.jsonl`` of a run, such as
    ``"self_attention/entropy"``."""
    return f"{kind}_attention/{name}"


def attention_over_training(path: str | pathlib.Path, name: str = "entropy", kind: str = "self", *,
                            title: str = "") -> Figure:
    """Draws how a score of each head changed in a run that was trained with
    ``--config.metrics.attention_every=...``.

    Args:
      path: the path of the run's ``metrics.jsonl``.
      name: the name of the score; ``summaries`` lists all names.
      kind: the kind of attention.
      title: the title of the figure; by default the kind of attention.

    Raises:
      ValueError: if the run did not measure this score.
    """
    lines = read_json_lines(path, dict[str, float | list[Any]], numbers=["step"])
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
    """Writes a figure as PNG or SVG, according to the suffix of the path.

    Raises:
      ValueError: if the suffix is neither ``.png`` nor ``.svg``.
    """
    check_name(path)
    figure.savefig(path, dpi=150)


def check_name(path: str | pathlib.Path) -> None:
    """Raises ValueError if a path does not end in ``.png`` or ``.svg``."""
    if checked_path("path", path).suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"{path}: a figure is saved as .png or .svg; name the file so")


def _cells(values: np.ndarray, rows: tuple[str, Sequence[str]], columns: tuple[str, Sequence[str]], title: str,
           draw: Callable[[Axes, np.ndarray, float], None]) -> Figure:
    """Draws a figure of cells; ``rows`` and ``columns`` give the title of an axis and its names."""
    figure, axes, unit = figures.cells(values.shape, rows[1], columns[1])
    draw(axes, values, unit)
    figures.label(axes.yaxis, *rows, unit)
    figures.label(axes.xaxis, *columns, unit)
    return figures.titled(figure, axes, title)


def _framed(figure: Figure, places: Iterable[tuple[float, float]]) -> Figure:
    """Draws frames around some cells, given by row and column."""
    from matplotlib.collections import LineCollection

    frames = [_box(column, row, 1, 1) for row, column in places]
    figure.axes[0].add_collection(LineCollection(frames, colors="#d55e00", linewidths=2, clip_on=False))
    return figure


def _pooled(map_TS: np.ndarray) -> np.ndarray:
    """Reduces a map to at most 128 x 128 cells. Each cell is the largest of its weights, because a
    mean would hide thin diagonals."""
    for axis, size in enumerate(map_TS.shape):
        if size > _LARGEST_PANEL:
            starts = np.arange(_LARGEST_PANEL) * size // _LARGEST_PANEL
            map_TS = np.maximum.reduceat(map_TS, starts, axis=axis)
    return map_TS


def _box(column: float, row: float, width: float, height: float) -> np.ndarray:
    """Returns the outline of cells, whose centers have whole-number coordinates."""
    return np.array([column, row]) - 0.5 + np.array([(0, 0), (width, 0), (width, height), (0, height), (0, 0)])
