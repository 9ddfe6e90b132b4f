"""Trains models of several widths and fits how the loss falls with their size.

python -m experiments.scaling --config.data.path=input.txt --workdir=runs/scaling
python -m experiments.scaling --config.data.path=input.txt --workdir=runs/rates --over=optim.peak_lr=1e-3,2e-3,4e-3,8e-3

The first command trains each width with several seeds, all of them in one program, and fits a power
law with a confidence band over the seeds. The second one sweeps over learning rates at each width,
and shows whether the best rate depends on the width. With --mup, the models have the maximal update
parametrization (docs/guides/sweeps.md). The same command resumes a run that was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
from absl import flags
from matplotlib.figure import Figure

import transformer_jax as tj
from experiments import power_law
from transformer_jax.cli.flags import define_config, directory, run
from transformer_jax.cli.sweep import read_values
from transformer_jax.runs.workdir import write_whole

_CONFIG = define_config("scaling")
_WIDTHS = flags.DEFINE_list("widths", ["16", "32", "64", "128", "256"], "The widths to train.")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 16, "The width of a head; wider models have more heads.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 5, "The number of seeds of each width.", lower_bound=1)
_OVER = flags.DEFINE_multi_string("over", None, "A setting and its values, as for experiments.sweep.")
_MUP = flags.DEFINE_integer("mup", None, "The base width of the maximal update parametrization. Without it, the models "
                            "have the standard one.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "The directory for all results.")


def main() -> None:
    """Trains the sweeps of all widths, and writes the figure and the fit."""
    workdir, widths = directory(_WORKDIR), [_width(text) for text in _WIDTHS.value]
    values = {} if _OVER.value is None else read_values(_OVER.value)
    values.setdefault("seed", list(range(_SEEDS.value)))
    found = {}
    for width in widths:
        config = _CONFIG()
        mup = None if _MUP.value is None else tj.config.MupConfig(base_dim=_MUP.value)
        model = config.model.replace(model_dim=width, num_heads=width // _HEAD_DIM.value, mup=mup)
        print(f"width {width}: {len(values['seed'])} seeds and {tj.count_parameters(model.replace(vocab_size=65)):,} "
              "parameters with a vocabulary of 65")
        found[width] = tj.sweep(config.replace(model=model), values, workdir=workdir / f"width_{width}")
        print(found[width].table())
    rows = [{"width": width, "parameters": tj.count_parameters(sweep.config.model), **row}
            for width, sweep in found.items() for row in sweep.rows()]
    write_whole(workdir / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    if set(values) == {"seed"}:
        fit_sizes(found, workdir)
    else:
        compare_rates(found, workdir)


def _width(text: str) -> int:
    """Reads a width. Raises ValueError if it is not a multiple of the width of a head."""
    width = int(text) if text.strip().isdigit() else 0
    if width < 1 or width % _HEAD_DIM.value:
        raise ValueError(f"--widths has {text!r}; expected multiples of --head_dim={_HEAD_DIM.value}")
    return width


def fit_sizes(found: dict[int, tj.runs.Sweep], workdir: pathlib.Path) -> None:
    """Fits the power law, prints it with its band, and draws it."""
    sizes = np.array([tj.count_parameters(sweep.config.model) for sweep in found.values()], np.float64)
    losses = np.stack([sweep.losses for sweep in found.values()])
    law, laws = power_law.fit(sizes, losses.mean(1)), power_law.bootstrap(sizes, losses)
    write_whole(workdir / "fit.json", json.dumps(dataclasses.asdict(law)).encode())
    print(f"loss = {law.floor:.3f} + ({law.scale:.3g} / parameters) ^ {law.exponent:.3f}")
    for name in ("floor", "exponent"):
        low, high = np.quantile([getattr(other, name) for other in laws], [0.05, 0.95])
        print(f"90 % of {len(laws)} fits to drawn seeds have the {name} {low:.3f} to {high:.3f}")
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    line = np.geomspace(sizes.min() / 1.5, sizes.max() * 4, 100)
    low, high = power_law.band(laws, line)
    axes.fill_between(line, low, high, alpha=0.25, linewidth=0, label="90 % of the fits to drawn seeds")
    axes.plot(line, law(line), label=f"{law.floor:.2f} + ({law.scale:.2g} / N)^{law.exponent:.2f}")
    axes.plot(np.repeat(sizes, losses.shape[1]), losses.ravel(), ".", color="black", label="a model")
    axes.set(xscale="log", xlabel="parameters", ylabel="validation loss (nats)")
    _save(figure, workdir / "scaling.png")


def compare_rates(found: dict[int, tj.runs.Sweep], workdir: pathlib.Path) -> None:
    """Prints the best value of the first setting at each width, and draws the losses."""
    name = next(name for name in next(iter(found.values())).members[0] if name != "seed")
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for width, sweep in found.items():
        points = sorted({values[name] for values in sweep.members})
        losses = [np.nanmean([loss for values, loss in zip(sweep.members, sweep.losses, strict=True)
                              if values[name] == point]) for point in points]
        axes.plot(points, losses, "o-", markersize=4, label=f"width {width}")
        print(f"width {width}: the best {name} is {points[int(np.nanargmin(losses))]:g}, with a loss of "
              f"{np.nanmin(losses):.4f}")
    axes.set(xscale="log", xlabel=name, ylabel="validation loss (nats)")
    _save(figure, workdir / "rates.png")


def _save(figure: Figure, path: pathlib.Path) -> None:
    """Adds the legend and writes the figure."""
    figure.axes[0].grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    print(f"{path}: open it in an image viewer")


if __name__ == "__main__":
    run(main)
