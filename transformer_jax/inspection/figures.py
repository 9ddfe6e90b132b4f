"""What the figures have in common: cells of bounded size, labels that fit them, scales of color."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from transformer_jax.inspection.labels import shorten, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

LONGEST = 10.0  # inches, of the cells along one side of a figure
FONT, SMALLEST_FONT = 9.0, 5.0  # points
_LINE = 1.25  # height of a line of text, in its font's size
_MOST_NUMBERS = 150  # cells, above which they are not labelled with their values


def checked(name: str, values: np.ndarray, sizes: Mapping[str, int | None], *, gaps: bool = False) -> np.ndarray:
    """The values as float32; ValueError where an axis has another size (``None``: any), or a number
    is missing."""
    values = np.asarray(values, np.float32)
    fits = values.ndim == len(sizes) and values.size and all(
        size in (None, got) for size, got in zip(sizes.values(), values.shape, strict=True))
    if not fits:
        wanted = ", ".join(axis if size is None else f"{size} {axis}" for axis, size in sizes.items())
        raise ValueError(f"{name} are [{wanted}]; got {list(values.shape)}")
    if np.isinf(values).any() or (np.isnan(values).all() if gaps else np.isnan(values).any()):
        raise ValueError(f"{name} are numbers; got infinity or NaN")
    return values


def cells(shape: Sequence[int], row_labels: Sequence[str], column_labels: Sequence[str], *,
          unit: float | None = None) -> tuple[Figure, Axes, float]:
    """A figure with room for cells, their labels and a scale; its axes; the size of a cell in
    inches."""
    from matplotlib.figure import Figure

    rows, columns = shape
    unit = min(0.45, LONGEST / rows, LONGEST / columns) if unit is None else unit
    font = font_size(unit) / 72
    width, height = (0.62 * font * max(map(len, labels), default=0) for labels in (row_labels, column_labels))
    figure = Figure(figsize=(max(columns * unit + width + 1.5, 4.0), max(rows * unit + height + 1.0, 2.6)),
                    layout="constrained")
    return figure, figure.subplots(), unit


def font_size(unit: float) -> float:
    """The size in points of labels one to a cell, or one to several cells where these are too
    small."""
    return min(max(72 * unit / _LINE, SMALLEST_FONT), FONT)


def labels(tokens: Sequence[str]) -> list[str]:
    """Tokens as they are written beside cells."""
    return [shorten(_drawable(visible(token))) for token in tokens]


def label(axis: XAxis | YAxis, names: Sequence[str], unit: float, places: Sequence[int] | None = None) -> None:
    """Writes names at the cells of an axis: all of them, or every second, third... where cells are
    small."""
    places = range(len(names)) if places is None else places
    every = max(1, math.ceil(_LINE * SMALLEST_FONT / (72 * unit) - 1e-6))
    style = {"fontsize": font_size(unit * every), "parse_math": False}  # a dollar sign is a token like any other
    if axis.axis_name == "x" and max(map(len, names)) > 3:
        slanted = unit > 0.3
        style |= {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if slanted else {"rotation": 90}
    axis.set_ticks(list(places)[::every], list(names)[::every], **style)
    axis.set_tick_params(length=2)


def titled(figure: Figure, axes: Axes, title: str) -> Figure:
    """The figure with its title, in lines as long as it is wide."""
    size = 11
    num_characters = int(figure.get_figwidth() * 72 / (0.6 * size))
    axes.set_title("\n".join(textwrap.wrap(_drawable(title), num_characters)), fontsize=size, parse_math=False)
    return figure


def draw_weights(axes: Axes, weights: np.ndarray, unit: float, *, numbers: bool = True) -> None:
    """Cells colored by the square root of attention weights, so that small ones are told apart, and
    their scale."""
    from matplotlib.colors import PowerNorm

    image = axes.imshow(weights, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto")
    ticks = [0, 0.01, 0.1, 0.25, 0.5, 1]
    _scale(image, "attention weight", unit).set_ticks(ticks, labels=list(map(str, ticks)))
    if numbers:
        _write_numbers(image, np.where(weights < 0.005, np.nan, weights))  # what is masked stays blank


def draw_values(axes: Axes, values: np.ndarray, name: str, unit: float) -> None:
    """Cells colored by values: from the least to the largest, or around a white zero where both
    signs occur."""
    least, largest = np.nanmin(values), np.nanmax(values)
    bound = max(-least, largest)
    if least < 0 < largest:
        image = axes.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    else:
        image = axes.imshow(values, cmap="cividis", aspect="auto")
    axes.set_facecolor("0.9")  # of what is missing
    _scale(image, name, unit)
    _write_numbers(image, values)


def _scale(image: AxesImage, name: str, unit: float) -> Colorbar:
    rows, columns = image.get_size()
    width, height = max(columns * unit, 2.0), max(rows * unit, 1.5)  # of the cells, in inches
    length = min(1.0, 4.0 / height)
    beside = image.axes.inset_axes((1 + 0.1 / width, 1 - length, 0.18 / width, length))
    bar = image.figure.colorbar(image, cax=beside)
    bar.set_label(name, fontsize=FONT, parse_math=False)
    bar.ax.tick_params(labelsize=8)
    return bar


def _write_numbers(image: AxesImage, values: np.ndarray) -> None:
    if values.size > _MOST_NUMBERS:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            number = f"{round(float(value), 2) + 0.0:.2f}" if abs(value) < 10 else f"{value:.3g}"  # no -0.00
            image.axes.text(column, row, number, ha="center", va="center", fontsize=8,
                            color="white" if is_dark else "black")


def _drawable(text: str) -> str:
    """The text, with ``<U+65E5>`` for a character that no font of matplotlib's setting
    ``font.family`` has."""
    known = _known_characters(tuple(_families()))
    return "".join(character if ord(character) in known or character == "\n" else f"<U+{ord(character):04X}>"
                   for character in text)


def _families() -> list[str]:
    from matplotlib.font_manager import FontProperties

    return FontProperties().get_family()


@functools.cache
def _known_characters(families: tuple[str, ...]) -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    paths = [findfont(FontProperties(family=[family])) for family in families]
    return frozenset().union(*(get_font(path).get_charmap() for path in paths))
