"""Transformers in JAX: pure functions, inspectable forward passes, one decode contract."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from transformer_jax import (
        alignment,
        baselines,
        config,
        data,
        decoding,
        evaluation,
        features,
        inspection,
        interop,
        models,
        nn,
        ops,
        presets,
        recipes,
        runs,
        serving,
        sharding,
        tasks,
        tools,
        training,
    )
    from transformer_jax.config import ExperimentConfig, LoraConfig, ModelConfig
    from transformer_jax.data.conversations import Message
    from transformer_jax.data.preferences import Comparison
    from transformer_jax.data.tokenizer import Tokenizer
    from transformer_jax.decoding.beam import BeamSearch, beam_search
    from transformer_jax.decoding.classify import classify, classify_tokens
    from transformer_jax.decoding.embed import embed, similarity
    from transformer_jax.decoding.fill_mask import fill_mask
    from transformer_jax.decoding.grammar import Grammar
    from transformer_jax.decoding.logits import Sampling
    from transformer_jax.decoding.prepare import prepare_for_decoding
    from transformer_jax.decoding.sample import Generation, generate, stream
    from transformer_jax.decoding.score import score
    from transformer_jax.decoding.speculative_session import Speculation
    from transformer_jax.inspection.inspection import Inspection
    from transformer_jax.inspection.reading import inspect_text
    from transformer_jax.interop.gguf import from_gguf
    from transformer_jax.interop.huggingface import from_huggingface, to_huggingface
    from transformer_jax.models.classifier import Classifier
    from transformer_jax.models.decoder import Decoder
    from transformer_jax.models.encoder import Encoder
    from transformer_jax.models.encoder_decoder import EncoderDecoder
    from transformer_jax.models.functional import count_parameters, forward, trace
    from transformer_jax.models.heads import RewardModel
    from transformer_jax.models.output import Output, Trace
    from transformer_jax.nn.cache import KVCache
    from transformer_jax.nn.lora import adapted_loss, make_adapters, merge_adapters
    from transformer_jax.ops.masks import AttentionMask
    from transformer_jax.runs.evaluation import evaluate
    from transformer_jax.runs.preflight import preflight
    from transformer_jax.runs.sweeping import sweep
    from transformer_jax.runs.training import init_training, train
    from transformer_jax.tasks.base import Task
    from transformer_jax.training.adapters import load_adapters, save_adapters
    from transformer_jax.training.bundle import Bundle, load, save
    from transformer_jax.training.step import make_train_step
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "AttentionMask", "BeamSearch", "Bundle", "Classifier", "Comparison", "Decoder", "Encoder", "EncoderDecoder",
    "ExperimentConfig", "Generation", "Grammar", "Inspection", "KVCache", "LoraConfig", "Message", "ModelConfig",
    "Output", "RewardModel", "Sampling", "Speculation", "Task", "Tokenizer", "Trace", "adapted_loss", "alignment",
    "baselines", "beam_search", "classify", "classify_tokens", "config", "count_parameters", "data", "decoding",
    "embed", "evaluate", "evaluation", "features", "fill_mask", "forward", "from_gguf", "from_huggingface", "generate",
    "init_training", "inspect_text", "inspection", "interop", "load", "load_adapters", "make_adapters",
    "make_train_step", "merge_adapters", "models", "nn", "ops", "preflight", "prepare_for_decoding", "presets",
    "recipes", "runs", "save", "save_adapters", "score", "serving", "sharding", "similarity", "stream", "sweep",
    "tasks", "to_huggingface", "tools", "trace", "train", "training",
]
