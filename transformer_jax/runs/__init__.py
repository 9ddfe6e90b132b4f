"""Runs from Python: train, evaluate, preflight, and the directory of a run."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.runs.evaluation import evaluate
    from transformer_jax.runs.preflight import Preflight, Roofline, batch_shapes
    from transformer_jax.runs.telemetry import WatchAttention, attention_summaries
    from transformer_jax.runs.training import init_training, train
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "Preflight", "Roofline", "WatchAttention", "attention_summaries", "batch_shapes", "evaluate", "init_training",
    "train",
]
