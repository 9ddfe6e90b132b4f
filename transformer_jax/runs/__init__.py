"""Functions that train, evaluate and plan runs from Python, and that manage the directory of a
run."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.runs.branching import branch
    from transformer_jax.runs.evaluation import evaluate
    from transformer_jax.runs.measured_checkpoints import OverTraining, over_training
    from transformer_jax.runs.preflight import Preflight, Roofline, batch_shapes
    from transformer_jax.runs.sweep_results import Sweep
    from transformer_jax.runs.sweeping import sweep
    from transformer_jax.runs.telemetry import WatchAttention, attention_summaries
    from transformer_jax.runs.training import init_training, train
    from transformer_jax.runs.tuned_lens import train_tuned_lens
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "OverTraining", "Preflight", "Roofline", "Sweep", "WatchAttention", "attention_summaries", "batch_shapes", "branch",
    "evaluate", "init_training", "over_training", "sweep", "train", "train_tuned_lens",
]
