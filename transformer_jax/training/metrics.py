"""Read the metrics of a run, plot its losses, and count the floating point operations per token."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from transformer_jax.config import ModelConfig, ModelSettings
from transformer_jax.json_files import read_json_lines


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Reads the metrics of a run.

    Args:
      path: a file ``metrics.jsonl``.

    Returns:
      One dict per line, in the order of the file: the metrics by name, and the number of the step
      as ``step``. The list is empty if the file does not exist. A last line that a crash cut short
      is left out; other damaged lines are left out with a warning.
    """
    path = pathlib.Path(path)
    return read_json_lines(path, dict[str, float | list[Any]], numbers=["step"]) if path.exists() else []


def plot_losses(metrics: str | pathlib.Path | Mapping[str, str | pathlib.Path], image: str | pathlib.Path,
                title: str = "", *, log_steps: bool = False, log_loss: bool = False) -> None:
    """Plots training and validation losses over steps.

    Args:
      metrics: the path of the ``metrics.jsonl`` of a run, or a dict of such paths by the names that
        the legend shows.
      image: the path of the picture to write, which must end in .png or .svg.
      title: the title above the plot.
      log_steps: use a logarithmic axis of steps, which shows the beginning of a run in detail.
      log_loss: use a logarithmic axis of losses. If both axes are logarithmic, a power law is a
        straight line.

    Raises:
      ValueError: if a file contains no losses, a loss cannot be shown on a logarithmic axis, or the
        name of the picture has another ending.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot, which has global state and may need a display

    if pathlib.Path(image).suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"cannot save a figure as {image}; the name of the file must end in .png or .svg")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if isinstance(metrics, Mapping):
        runs = dict(metrics)
        colours = [(colour, colour) for colour in (colormaps["tab10"](np.arange(10)) if len(runs) <= 10 else
                                                   colormaps["viridis"](np.linspace(0, 0.95, len(runs))))]
    else:
        runs, colours = {"": metrics}, [("#9ecae1", "#08519c")]
    for (name, path), (light, dark) in zip(runs.items(), colours, strict=False):
        train, held_out = (_curve(path, key) for key in ("loss", "validation_loss"))
        if not train and not held_out:
            raise ValueError(f"{path} contains no loss that is a finite number, so that there is nothing to plot")
        if log_loss and min(loss for _, loss in train + held_out) <= 0:
            raise ValueError(f"{path} contains losses of 0 or less, which a logarithmic axis cannot show; leave "
                             "log_loss out")
        if train:
            axes.plot(*zip(*train, strict=True), color=light, linewidth=1, alpha=0.45 if name else 1,
                      label=f"{name} training".strip())
        if held_out:
            last = f" ({held_out[-1][1]:.3f})"
            axes.plot(*zip(*held_out, strict=True), color=dark, marker="o", markersize=3,
                      label=f"{name} validation{last}".strip())
    axes.set(xlabel="step", ylabel="loss (nats)", title=title)
    if log_steps:
        axes.set_xscale("log")
    if log_loss:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("{x:.3g}")
        axes.yaxis.set_major_formatter("{x:.3g}")
    axes.grid(alpha=0.3, which="both" if log_steps or log_loss else "major")
    # A legend with many names stands beside the plot, because it would hide the curves.
    many = len(runs) > 4 or max(map(len, runs)) > 30
    axes.legend(**({"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "fontsize": "small"} if many else {}))
    figure.savefig(image, dpi=120, bbox_inches="tight" if many else None)


def _curve(path: str | pathlib.Path, key: str) -> list[tuple[float, float]]:
    """Returns (step, number) for every line in which the metric ``key`` is a finite number."""
    return [(line["step"], line[key]) for line in read_metrics(path)
            if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])]


def flops_per_token(config: ModelSettings, num_parameters: int, length: int | None = None) -> float:
    """Computes the number of floating point operations for training on one token.

    The number is 6 N + 12 L N_heads H T, where N is the number of parameters in matrices. Of a
    mixture of experts, only those that a token chooses count. Embeddings that are only looked up do
    not count, because a lookup is not a product. For encoder-decoder models, one token means a pair
    of a source token and a target token. The config of a family that is not a Transformer has a
    formula of its own.

    Source: Chowdhery et al. (2022), PaLM, appendix B.

    Args:
      config: the config of the model.
      num_parameters: the number of parameters of the model.
      length: T, the number of tokens in a row; ``None`` for ``config.max_len``.

    Returns:
      The number of floating point operations per token.
    """
    if not isinstance(config, ModelConfig):
        return config.flops_per_token(num_parameters, length or config.max_len)
    from transformer_jax.nn.positions import position_encoding  # imported here, because reading metrics needs no jax

    num_sides = 2 if config.family == "encoder_decoder" else 1
    lookups = num_sides * position_encoding(config).num_looked_up(config)
    # An encoder predicts only few of its tokens, so that neither of its embedding tables counts.
    num_tables = (not config.tie_embeddings) + (config.family == "encoder")
    lookups += num_tables * cast(int, config.vocab_size) * config.embedding_dim
    idle = 0 if config.moe is None else config.moe.num_idle(config)
    return 6.0 * (num_parameters - lookups - idle) + attention_flops_per_token(config, length)


def attention_flops_per_token(config: ModelConfig, length: int | None = None) -> float:
    """Returns the part of ``flops_per_token`` that grows with the length of a row.

    These are the products of queries with keys and of attention weights with values.
    """
    num_attentions = config.num_layers
    if config.family == "encoder_decoder":
        num_attentions = cast(int, config.num_encoder_layers) + 2 * cast(int, config.num_decoder_layers)
    keys = cast(int, config.head_dim)
    values = keys if config.latent is None else config.latent.value_width(config)
    return 6.0 * num_attentions * config.num_heads * (keys + values) * (length or config.max_len)
