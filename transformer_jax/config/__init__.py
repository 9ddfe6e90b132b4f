"""Frozen, validated, hashable settings of models and experiments."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.config.alignment import PreferenceConfig, ReinforcementConfig
    from transformer_jax.config.classifier import ClassifierConfig
    from transformer_jax.config.contrastive import ContrastiveConfig
    from transformer_jax.config.cross_layer_transcoder import CrossLayerTranscoderConfig
    from transformer_jax.config.data import CorpusConfig, DataConfig, TokenizerConfig
    from transformer_jax.config.electra import ElectraConfig
    from transformer_jax.config.experiment import ExperimentConfig
    from transformer_jax.config.experts import ExpertConfig
    from transformer_jax.config.families import ModelSettings, register_model_family
    from transformer_jax.config.latent import LatentConfig
    from transformer_jax.config.layers import LayerKind, Limits
    from transformer_jax.config.mesh import MeshConfig
    from transformer_jax.config.model import ModelConfig
    from transformer_jax.config.mup import MupConfig
    from transformer_jax.config.recurrent import RecurrentConfig
    from transformer_jax.config.rope_scaling import RopeLayout, RopeScaling
    from transformer_jax.config.sparse_autoencoder import SparseAutoencoderConfig
    from transformer_jax.config.training import (
        CheckpointConfig,
        EvalConfig,
        LoraConfig,
        LossConfig,
        MetricsConfig,
        OptimConfig,
        SampleConfig,
    )
    from transformer_jax.config.word_vectors import WordVectorConfig
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "CheckpointConfig", "ClassifierConfig", "ContrastiveConfig", "CorpusConfig", "CrossLayerTranscoderConfig",
    "DataConfig", "ElectraConfig", "EvalConfig", "ExperimentConfig", "ExpertConfig", "LatentConfig", "LayerKind",
    "Limits", "LoraConfig", "LossConfig", "MeshConfig", "MetricsConfig", "ModelConfig", "ModelSettings", "MupConfig",
    "OptimConfig", "PreferenceConfig", "RecurrentConfig", "ReinforcementConfig", "RopeLayout", "RopeScaling",
    "SampleConfig", "SparseAutoencoderConfig", "TokenizerConfig", "WordVectorConfig", "register_model_family",
]
