"""Reading the metrics of a run, drawing its losses, and counting the operations of a token."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from transformer_jax.config import ModelConfig


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line cut short by a crash is left out."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def plot_losses(metrics_path: str | pathlib.Path, png_path: str | pathlib.Path, title: str) -> None:
    """Draws training and validation loss over steps."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    lines = read_metrics(metrics_path)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    axes.plot(*zip(*train, strict=True), color="#9ecae1", linewidth=1, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#08519c", marker="o", markersize=3, label="validation")
        axes.annotate(f"{held_out[-1][1]:.3f}", held_out[-1], textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png_path, dpi=120)


def flops_per_token(config: ModelConfig, num_parameters: int) -> float:
    """Floating point operations of training on one token (two, of a pair): 6 N + 12 L N_heads H T.

    Source: Chowdhery et al. (2022), PaLM, appendix B; N counts the matrices, so embeddings that are
    only looked up are left out.
    """
    lookups = config.max_len * config.model_dim if config.positions == "learned" else 0
    # An encoder predicts few of its tokens: neither of its tables counts.
    num_tables = (not config.tie_embeddings) + (config.family == "encoder")
    lookups += num_tables * config.vocab_size * config.model_dim
    return 6.0 * (num_parameters - lookups) + attention_flops_per_token(config)


def attention_flops_per_token(config: ModelConfig) -> float:
    """The part of :func:`flops_per_token` that grows with the context: products of queries, keys
    and values."""
    num_attentions = config.num_layers
    if config.family == "encoder_decoder":
        num_attentions = config.num_encoder_layers + 2 * config.num_decoder_layers
    return 12.0 * num_attentions * config.num_heads * config.head_dim * config.max_len
