"""The tables and pictures of the road."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.road_pairs import seconds_to_equal_score


def text_table(models: Mapping[str, Any]) -> str:
    """Formats the numbers of the language models as a Markdown table."""
    lines = ["| model | parameters | bits per byte, equal tokens | training | bits per byte, equal time | training |",
             "| --- | --- | --- | --- | --- | --- |"]
    for name, found in models.items():
        tokens, timed = found["tokens"], found["time"]
        lines.append(f"| {name} | {tokens['parameters']:,} | {tokens['bits_per_byte']:.3f} | {_training(tokens)} | "
                     f"{timed['bits_per_byte']:.3f} | {_training(timed)} |")
    return "\n".join(lines) + "\n"


def pairs_table(models: Mapping[str, Any]) -> str:
    """Formats the numbers of the translators as a Markdown table."""
    equal, seconds = seconds_to_equal_score({name: found["time"]["scores"] for name, found in models.items()})
    lines = [f"| model | parameters | exact, equal tokens | exact, equal time | by length of the source, equal time "
             f"| seconds to the score {equal:.3g} |", "| --- | --- | --- | --- | --- | --- |"]
    for name, found in models.items():
        score = "bleu" if "bleu" in found["time"] else "exact"
        parts = ", ".join(f"to {part['longest']}: {part[score]:.3g}" for part in found["time"]["by_length"])
        lines.append(f"| {name} | {found['time']['parameters']:,} | {found['tokens']['exact']:.1%} | "
                     f"{found['time']['exact']:.1%} | {score} {parts} | {_rounded(seconds[name])} |")
    return "\n".join(lines) + "\n"


def _rounded(seconds: float | None) -> str:
    """Formats seconds."""
    return "never" if seconds is None else f"{seconds:.0f}"


def _training(measured: Mapping[str, Any]) -> str:
    """Formats how long a model was trained."""
    return "counts" if "steps" not in measured else f"{measured['steps']:,} steps, {measured['seconds']:.0f} s"


def draw_text(models: Mapping[str, Any], gradients: Mapping[str, list[float]], workdir: pathlib.Path) -> None:
    """Draws ``road.png``, ``positions.png`` and ``gradients.png``."""
    figure, (left, right) = new_figure(2, 10)
    for name, found in models.items():
        for budget, marker in (("tokens", "o"), ("time", "s")):
            measured = found[budget]
            for axes, x in ((left, measured["parameters"]), (right, max(measured["seconds"], 1))):
                axes.plot(x, measured["bits_per_byte"], marker, color=f"C{list(models).index(name)}",
                          label=name if budget == "time" else None, fillstyle="full" if budget == "time" else "none")
    left.set(xscale="log", xlabel="parameters or counts", ylabel="bits per byte, held out")
    right.set(xscale="log", xlabel="seconds of training (1: counts only)")
    right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, workdir / "road.png")
    figure, axes = new_figure(1, 7)
    for name, found in models.items():
        losses = np.asarray(found["time"]["loss_by_position"])
        axes.plot(np.arange(1, len(losses) + 1), _smoothed(losses), label=name)
    axes.set(xscale="log", xlabel="tokens of context", ylabel="loss (nats per token)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, workdir / "positions.png")
    figure, axes = new_figure(1, 7)
    for name, norms in gradients.items():
        axes.plot(np.asarray(norms), label=name)
    axes.set(yscale="log", xlabel="distance of the token from the last one",
             ylabel="norm of the gradient of the last loss")
    axes.legend()
    _save(figure, workdir / "gradients.png")


def draw_pairs(models: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Draws ``pairs.png``: scores by length, and held-out losses and scores by time."""
    figure, (left, middle, right) = new_figure(3, 14)
    for name, found in models.items():
        measured = found["time"]
        score = "bleu" if "bleu" in measured else "exact"
        left.plot([part["longest"] for part in measured["by_length"]],
                  [part[score] for part in measured["by_length"]], marker="o", label=name)
        middle.plot(*zip(*measured["curve"], strict=True), marker="o", label=name)
        right.plot(*zip(*measured["scores"], strict=True), marker="o", label=name)
    left.set(xlabel="characters of the source, at most", ylabel=score)
    middle.set(xlabel="seconds of training", ylabel="held-out loss", yscale="log")
    right.set(xlabel="seconds of training", ylabel=score)
    left.legend()
    _save(figure, workdir / "pairs.png")


def _smoothed(losses: np.ndarray) -> np.ndarray:
    """Returns running means whose width grows with the position, because the axis is
    logarithmic."""
    sums = np.append(0.0, np.cumsum(losses))
    widths = [max(1, position // 8) for position in range(len(losses))]
    return np.asarray([(sums[min(at + width, len(losses))] - sums[at - width + 1]) / (
        min(at + width, len(losses)) - at + width - 1) for at, width in enumerate(widths)])


def new_figure(columns: int, width: float) -> tuple[Any, Any]:
    """Makes a figure with axes next to each other; one axes object if there is one column."""
    from matplotlib.figure import Figure  # loaded late, because the package is optional

    figure = Figure(figsize=(width, 4), layout="constrained")
    return figure, figure.subplots(1, columns)


def _save(figure: Any, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight")
