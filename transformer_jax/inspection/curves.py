"""Matplotlib figures of curves: the faithfulness of circuits, the response to a dose, and
measurements over training.

As in ``plots``, every function returns a ``matplotlib.figure.Figure``, and ``plots.save`` writes it
to a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from transformer_jax.inspection import figures

if TYPE_CHECKING:
    from jax import Array
    from matplotlib.figure import Figure

    from transformer_jax.inspection.circuits.circuit import FaithfulnessCurve


def faithfulness(curve: FaithfulnessCurve, *, title: str = "") -> Figure:
    """Draws how much of the effect circuits of several sizes keep, beside random edges.

    Args:
      curve: the result of ``circuits.faithfulness_curve``.
      title: the title of the figure.

    Returns:
      The figure. A shaded area reaches from the lowest to the highest draw.
    """
    figure, axes = _new()
    percent = 100 * curve.sizes / curve.num_edges
    axes.axhline(1.0, color="0.8", linewidth=1, zorder=0)
    axes.plot(percent, curve.circuit, "o-", color="black", markersize=4, label="edges with the largest scores")
    for values, name, style in ((curve.degree_matched, "random senders, as many per receiver", "--"),
                                (curve.random, "random edges", ":")):
        line, = axes.plot(percent, np.median(values, -1), style, label=name)
        axes.fill_between(percent, values.min(-1), values.max(-1), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    return _finished(figure, axes, f"percent of the {curve.num_edges} edges that are kept",
                     "part of the effect that is kept", title)


def lines(x: Sequence[float] | Float[np.ndarray | Array, " points"], series: Mapping[str, Any], x_name: str,
          y_name: str, *, title: str = "") -> Figure:
    """Draws several series of numbers over the same points, such as the response of a model to
    doses of a steering vector, or measurements at the steps of a run.

    Args:
      x: the points, such as steps or doses.
      series: for each name, a number for each point.
      x_name: the name of the points.
      y_name: the name of the numbers with their unit.
      title: the title of the figure.

    Returns:
      The figure.

    Raises:
      ValueError: if a series does not have a number for each point.
    """
    figure, axes = _new()
    for name, values in series.items():
        values = np.asarray(values)
        if values.shape != (len(x),):
            raise ValueError(f"the series {name!r} has shape {values.shape}; expected {(len(x),)}, a number for each "
                             "point")
        axes.plot(x, values, "o-", markersize=3, label=name)
    return _finished(figure, axes, x_name, y_name, title)


def _new() -> tuple[Figure, Any]:
    """Returns a figure with one set of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    return figure, figure.subplots()


def _finished(figure: Figure, axes: Any, x_name: str, y_name: str, title: str) -> Figure:
    """Names the axes, and adds the legend, a grid and the title."""
    axes.set_xlabel(x_name, parse_math=False)
    axes.set_ylabel(y_name, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=figures.FONT)
    return figures.titled(figure, axes, title)
