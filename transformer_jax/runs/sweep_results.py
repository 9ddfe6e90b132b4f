"""The result of a sweep: a table, a figure, and the trained models."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from transformer_jax.config import ExperimentConfig
from transformer_jax.inspection import figures
from transformer_jax.models.functional import Model
from transformer_jax.runs.completing import AnyTokenizer
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.members import member_of
from transformer_jax.training.state import TrainState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = Mapping[str, int | float]


def member_config(config: ExperimentConfig, values: Values) -> ExperimentConfig:
    """Returns the config with which ``tj.train`` trains one model of a sweep.

    Args:
      config: The config that the models share.
      values: The settings of the model, by names such as ``seed`` and ``optim.peak_lr``.

    Returns:
      The config.

    Raises:
      ValueError: If a value is not valid.
    """
    optim = {name.removeprefix("optim."): value for name, value in values.items() if name != "seed"}
    return config.replace(seed=values.get("seed", config.seed), optim=dataclasses.replace(config.optim, **optim))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Several models that were trained in one program.

    Attributes:
      config: The config that all models share.
      members: For each model, the values of the settings that differ.
      history: The logged metrics: the ``step``, and arrays ``[M]`` with a number for each model, such
        as ``loss`` and ``validation_loss``.
      state: The final training state of all models, with a leading axis of M models.
      tokenizer: The tokenizer; ``None`` if the data is not text.
      to_model: A function that makes a model from the trained parameters of one of them.
    """

    config: ExperimentConfig
    members: Sequence[Values]
    history: Sequence[Mapping[str, Any]]
    state: TrainState
    tokenizer: AnyTokenizer | None
    to_model: Callable[[Any], Model]

    def last(self, name: str) -> Float[np.ndarray, " M"] | None:
        """Returns the newest logged values of a metric.

        Args:
          name: The name of the metric, such as ``validation_loss``.

        Returns:
          A number for each model; ``None`` if the metric was not logged.
        """
        logged = [line[name] for line in self.history if name in line]
        return np.asarray(logged[-1], np.float64) if logged else None

    @property
    def diverged(self) -> Bool[np.ndarray, " M"]:
        """True for each model whose last update was skipped, because it was not finite."""
        return np.asarray(self.state.skipped_in_a_row) > 0

    @property
    def losses(self) -> Float[np.ndarray, " M"]:
        """The last validation loss of each model, or the training loss if no data is held out.

        Raises:
          ValueError: If no loss was logged, because the sweep was stopped before.
        """
        for name in ("validation_loss", "loss"):
            if (found := self.last(name)) is not None:
                return np.where(self.diverged, np.nan, found)
        raise ValueError(f"no loss was logged: the sweep was stopped before step log_every={self.config.log_every}")

    @property
    def best(self) -> int:
        """The number of the model with the lowest loss.

        Raises:
          ValueError: If every model diverged.
        """
        losses = self.losses
        if np.isnan(losses).all():
            raise ValueError("no model has a finite loss; sweep over lower values of optim.peak_lr")
        return int(np.nanargmin(losses))

    def bundle(self, index: int | None = None) -> Bundle:
        """Returns a trained model with its tokenizer and its config.

        Args:
          index: The number of the model; ``None`` for the best one.

        Returns:
          The bundle, as ``tj.train`` returns it.

        Raises:
          ValueError: If there is no such model, or there is no best one.
        """
        index = self.best if index is None else index
        if not 0 <= index < len(self.members):
            raise ValueError(f"there is no model {index}; the sweep has the models 0 to {len(self.members) - 1}")
        return Bundle(model=self.to_model(member_of(self.state.params, index)), tokenizer=self.tokenizer,
                      config=self.config.model, step=int(self.state.step[index]),
                      experiment=member_config(self.config, self.members[index]))

    def rows(self) -> list[dict[str, Any]]:
        """Returns the settings and the losses of each model.

        Returns:
          A dict for each model: ``model`` (its number), the settings, ``steps``, ``loss``,
          ``validation_loss`` if data is held out, and ``skipped``, the number of updates that were
          skipped because they were not finite. A loss that is not finite is ``None``.
        """
        found = {name: values for name in ("loss", "validation_loss") if (values := self.last(name)) is not None}
        return [{"model": index, **values, "steps": int(self.state.step[index]),
                 **{name: float(losses[index]) if np.isfinite(losses[index]) else None
                    for name, losses in found.items()},
                 "skipped": int(self.state.skipped[index])} for index, values in enumerate(self.members)]

    def table(self) -> str:
        """Formats the settings and the losses, the lowest loss first.

        Returns:
          The lines of the table.
        """
        rows = self.rows()
        order = np.argsort(np.where(np.isnan(self.losses), np.inf, self.losses), kind="stable")
        names = [name for name in rows[0] if name != "steps"]
        cells = [names] + [[_shown(rows[index][name]) for name in names] for index in order]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
                         for row in cells)

    def plot(self, *, title: str = "") -> Figure:
        """Draws the loss against the first setting that differs, with a line for each combination of
        the other settings.

        Seeds are averaged: a line is the mean over the seeds, and the band around it reaches from the
        lowest to the highest. If only the seeds differ, they are the horizontal axis. A model that
        diverged is left out.

        Args:
          title: The title of the figure.

        Returns:
          The figure.
        """
        from matplotlib.figure import Figure

        names = [name for name in self.members[0] if name != "seed"] or ["seed"]
        points: dict[str, dict[float, list[float]]] = {}
        for values, loss in zip(self.members, self.losses, strict=True):
            line = ", ".join(f"{name.removeprefix('optim.')} {values[name]:g}" for name in names[1:])
            points.setdefault(line, {}).setdefault(values[names[0]], []).append(float(loss))
        figure = Figure(figsize=(6, 3.8), layout="constrained")
        axes = figure.subplots()
        for line, found in points.items():
            kept = {x: losses for x, ys in sorted(found.items()) if (losses := [y for y in ys if np.isfinite(y)])}
            mean = [float(np.mean(losses)) for losses in kept.values()]
            drawn, = axes.plot(list(kept), mean, "o-", markersize=4, label=line)
            lowest, highest = ([choose(losses) for losses in kept.values()] for choose in (min, max))
            axes.fill_between(list(kept), lowest, highest, color=drawn.get_color(), alpha=0.2, linewidth=0)
        if names[0] != "seed" and min(itertools.chain(*points.values())) > 0:
            axes.set_xscale("log")
        axes.set(xlabel=names[0], ylabel=f"{'validation' if self.last('validation_loss') is not None else 'training'} "
                 "loss (nats)")
        axes.grid(alpha=0.3)
        if names[1:]:
            axes.legend(frameon=False, fontsize=figures.FONT)
        return figures.titled(figure, axes, title)


def _shown(value: Any) -> str:
    """Formats an entry of the table."""
    return "not finite" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
