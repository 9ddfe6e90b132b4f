"""Helpers for all figures: cells of limited size, labels that fit them, and color scales."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transformer_jax.inspection.characters import shown
from transformer_jax.inspection.labels import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.ticker import ScalarFormatter

LONGEST = 10.0  # inches: the largest extent of all cells along one side of a figure
FONT, SMALLEST_FONT = 9.0, 5.0  # points
_LINE = 1.25  # height of a line of text, relative to the font size
_WIDTH = 0.62  # approximate width of a character, relative to the font size
_MOST_NUMBERS = 150  # a figure with more cells does not show their values as numbers
_LEAST_SPAN = 0.1  # smallest span of a color scale, relative to the largest magnitude


def checked(name: str, values: Any, axes: Mapping[str, Any], *, gaps: bool = False) -> np.ndarray:
    """Returns the values as float32; raises an error if an axis does not have one value for each of
    its labels (``...`` allows any size), or if a value is not finite. ``gaps`` allows some NaN."""
    for axis, labels in axes.items():
        if labels is not ... and (isinstance(labels, str) or not hasattr(labels, "__len__")):
            raise TypeError(f"{axis} must be a list of labels, one for each; got {labels!r}")
    sizes = [None if labels is ... else len(labels) for labels in axes.values()]
    values = numbers(name, values)
    fits = values.ndim == len(sizes) and values.size and all(
        size in (None, got) for size, got in zip(sizes, values.shape, strict=True))
    if not fits:
        wanted = ", ".join(axis if size is None else f"{size} {axis}" for axis, size in zip(axes, sizes, strict=True))
        raise ValueError(f"{name} are [{wanted}]; got {list(values.shape)}")
    if np.isinf(values).any() or (np.isnan(values).all() if gaps else np.isnan(values).any()):
        raise ValueError(f"{name} must be finite numbers; got infinity or NaN")
    return values


def numbers(name: str, values: Any) -> np.ndarray:
    """Returns the values as float32; raises ValueError if they are not numbers."""
    try:
        return np.asarray(values, np.float32)
    except ValueError as error:
        raise ValueError(f"{name} must be numbers in rows of equal length; got "
                         f"{type(values).__name__}: {error}") from error


def cells(shape: Sequence[int], row_labels: Sequence[str], column_labels: Sequence[str], *,
          unit: float | None = None) -> tuple[Figure, Axes, float]:
    """Makes a figure with room for cells, their labels and a color scale. Returns the figure, its
    axes, and the size of a cell in inches."""
    from matplotlib.figure import Figure

    rows, columns = shape
    unit = min(0.45, LONGEST / rows, LONGEST / columns) if unit is None else unit
    font = font_size(unit) / 72
    width, height = (_WIDTH * font * max(map(len, labels), default=0) for labels in (row_labels, column_labels))
    figure = Figure(figsize=(max(columns * unit + width + 1.5, 4.0), max(rows * unit + height + 1.0, 2.6)),
                    layout="constrained")
    return figure, figure.subplots(), unit


def font_size(unit: float) -> float:
    """Returns the font size in points that fits labels at a distance of ``unit`` inches."""
    return min(max(72 * unit / _LINE, SMALLEST_FONT), FONT)


def labels(tokens: Sequence[str]) -> list[str]:
    """Returns the labels of tokens for the axes of a figure."""
    return [shorten(_drawable(token)) for token in shown(tokens)]


def label(axis: XAxis | YAxis, title: str, names: Sequence[str], unit: float, *, num_cells: int | None = None,
          starts: Sequence[int] = (0,)) -> None:
    """Writes the title of an axis and the names of its cells. If the cells are small, it writes
    only every second, third, ... name, and the title says so.

    Args:
      axis: an axis of a figure of cells.
      title: the title, such as ``"key"``.
      names: the names of the cells.
      unit: the size of a cell in inches.
      num_cells: the number of cells that the names share; ``None`` for one cell for each name.
      starts: the first cell of each map along the axis; the names are repeated for each map.
    """
    cells_of_name = 1 if num_cells is None else num_cells / len(names)
    every = max(1, math.ceil(_LINE * SMALLEST_FONT / (72 * unit * cells_of_name) - 1e-6))
    # Keep a distance between the last name of a map and the first name of the next map.
    named = [index for index in range(0, len(names), every)
             if index == 0 or len(starts) == 1 or index + every <= len(names)]
    font, apart = font_size(unit * cells_of_name * every), 72 * unit * cells_of_name * every  # points
    style: dict[str, Any] = {"fontsize": font, "parse_math": False}  # a dollar sign does not start a formula
    if axis.axis_name == "x" and _WIDTH * font * max(map(len, names)) > apart:
        slanted = unit > 0.3
        style |= {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if slanted else {"rotation": 90}
    axis.set_ticks([start + (index + 0.5) * cells_of_name - 0.5 for start in starts for index in named],
                   [names[index] for _ in starts for index in named], **style)
    axis.set_tick_params(length=2)
    note = f" (every {_ordinal(every)} of {len(names)} is named)" if every > 1 else ""
    axis.set_label_text(title + note, fontsize=FONT)


def _ordinal(number: int) -> str:
    """Returns an ordinal number such as ``"3rd"``."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def titled(figure: Figure, axes: Axes, title: str) -> Figure:
    """Adds a title, wrapped to the width of the figure, and returns the figure."""
    size = 11
    num_characters = int(figure.get_figwidth() * 72 / (0.6 * size))
    axes.set_title("\n".join(textwrap.wrap(_drawable(title), num_characters)), fontsize=size, parse_math=False)
    return figure


def draw_weights(axes: Axes, weights: np.ndarray, unit: float, *, name: str = "attention weight",
                 numbers: bool = True) -> None:
    """Draws cells of weights from 0 to 1 and their color scale. Colors follow the square root, so
    that small weights can be distinguished."""
    from matplotlib.colors import PowerNorm

    image = axes.imshow(weights, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto")
    ticks = [0, 0.01, 0.1, 0.25, 0.5, 1]
    _scale(image, name, unit).set_ticks(ticks, labels=list(map(str, ticks)))
    if numbers:
        _write_numbers(image, np.where(weights < 0.005, np.nan, weights))  # cells of masked keys stay without a number


def draw_values(axes: Axes, values: np.ndarray, name: str, unit: float) -> None:
    """Draws cells and their color scale, from the smallest to the largest value. If values of both
    signs occur, zero is white. Values that are nearly equal get nearly the same color."""
    least, largest = spanned(values)
    bound = max(-least, largest)
    if np.nanmin(values) < 0 < np.nanmax(values):
        image = axes.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    else:
        image = axes.imshow(values, cmap="cividis", vmin=least, vmax=largest, aspect="auto")
    axes.set_facecolor("0.9")  # the color of missing values
    _scale(image, name, unit).ax.yaxis.set_major_formatter(plain_numbers())
    _write_numbers(image, values)


def spanned(values: np.ndarray) -> tuple[float, float]:
    """Returns the ends of a scale for the values: the smallest and the largest, but at least a
    tenth of the largest magnitude apart, so that small differences look small."""
    least, largest = float(np.nanmin(values)), float(np.nanmax(values))
    magnitude = max(abs(least), abs(largest))
    if magnitude == 0:
        return 0.0, 1.0
    missing = max(_LEAST_SPAN * magnitude - (largest - least), 0.0)
    return least - missing / 2, largest + missing / 2


def plain_numbers() -> ScalarFormatter:
    """Returns a formatter that writes the numbers of an axis without a common offset."""
    from matplotlib.ticker import ScalarFormatter

    return ScalarFormatter(useOffset=False)


def _scale(image: AxesImage, name: str, unit: float) -> Colorbar:
    """Draws the color scale of an image on its right side."""
    rows, columns = image.get_size()
    width, height = max(columns * unit, 2.0), max(rows * unit, 1.5)  # of all cells, in inches
    length = min(1.0, 4.0 / height)
    bar_axes = image.axes.inset_axes((1 + 0.1 / width, 1 - length, 0.18 / width, length))
    bar = image.figure.colorbar(image, cax=bar_axes)
    bar.set_label(name, fontsize=FONT, parse_math=False)
    bar.ax.tick_params(labelsize=8)
    return bar


def _write_numbers(image: AxesImage, values: np.ndarray) -> None:
    """Writes the value into each cell if there are few cells."""
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
    """Replaces each character that none of matplotlib's ``font.family`` fonts has by a code such as
    ``<U+65E5>``."""
    known = _known_characters(tuple(_families()))
    return "".join(character if ord(character) in known or character == "\n" else f"<U+{ord(character):04X}>"
                   for character in text)


def _families() -> list[str]:
    """Returns matplotlib's current font families."""
    from matplotlib.font_manager import FontProperties

    return FontProperties().get_family()


@functools.cache
def _known_characters(families: tuple[str, ...]) -> frozenset[int]:
    """Returns the code points that at least one font of the families has."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    paths = [findfont(FontProperties(family=[family])) for family in families]
    return frozenset().union(*(get_font(path).get_charmap() for path in paths))
