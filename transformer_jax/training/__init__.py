"""Training: optimizers, loss functions, the training step, the training loop, and checkpoints."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.training.adapters import load_adapters, save_adapters
    from transformer_jax.training.bundle import Bundle, load, save
    from transformer_jax.training.checkpoint import CheckpointError, Checkpoints
    from transformer_jax.training.errors import Interrupted, LostProcessError, NotFiniteError, OutOfMemoryError
    from transformer_jax.training.evaluation import mean_loss
    from transformer_jax.training.hooks import Evaluate, Log, SaveCheckpoints
    from transformer_jax.training.loggers import JsonlLogger, MetricLogger, TensorBoardLogger
    from transformer_jax.training.loop import Hook, Loop, fit, to_devices
    from transformer_jax.training.metrics import flops_per_token, plot_losses, read_metrics
    from transformer_jax.training.objectives import masked_token_loss, next_token_loss, translation_loss
    from transformer_jax.training.optimizer import make_optimizer, make_schedule
    from transformer_jax.training.samples import Sample
    from transformer_jax.training.session import run_training
    from transformer_jax.training.state import TrainState, init_state
    from transformer_jax.training.step import make_eval_step, make_train_step
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "Bundle", "CheckpointError", "Checkpoints", "Evaluate", "Hook", "Interrupted", "JsonlLogger", "Log", "Loop",
    "LostProcessError", "MetricLogger", "NotFiniteError", "OutOfMemoryError", "Sample", "SaveCheckpoints",
    "TensorBoardLogger", "TrainState", "fit", "flops_per_token", "init_state", "load", "load_adapters",
    "make_eval_step", "make_optimizer", "make_schedule", "make_train_step", "masked_token_loss", "mean_loss",
    "next_token_loss", "plot_losses", "read_metrics", "run_training", "save", "save_adapters", "to_devices",
    "translation_loss",
]
