"""Frozen, validated, hashable settings of models and experiments."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.config.alignment import PreferenceConfig, ReinforcementConfig
    from transformer_jax.config.data import DataConfig, TokenizerConfig
    from transformer_jax.config.experiment import ExperimentConfig
    from transformer_jax.config.model import ModelConfig, RopeScaling
    from transformer_jax.config.training import (
        CheckpointConfig,
        EvalConfig,
        LoraConfig,
        LossConfig,
        MeshConfig,
        MetricsConfig,
        OptimConfig,
        SampleConfig,
    )
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "CheckpointConfig", "DataConfig", "EvalConfig", "ExperimentConfig", "LoraConfig", "LossConfig", "MeshConfig",
    "MetricsConfig", "ModelConfig", "OptimConfig", "PreferenceConfig", "ReinforcementConfig", "RopeScaling",
    "SampleConfig", "TokenizerConfig",
]
