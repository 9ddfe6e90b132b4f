"""Transformers in JAX: pure functions, inspectable forward passes, one decode contract."""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "AttentionMask": "ops.masks",
    "BeamSearch": "decoding.beam",
    "Bundle": "training.bundle",
    "Comparison": "data.preferences",
    "Decoder": "models.decoder",
    "Encoder": "models.encoder",
    "EncoderDecoder": "models.encoder_decoder",
    "ExperimentConfig": "config",
    "Inspection": "inspection.inspection",
    "KVCache": "nn.cache",
    "LoraConfig": "config",
    "Message": "data.conversations",
    "ModelConfig": "config",
    "Output": "models.output",
    "RewardModel": "models.heads",
    "Sampling": "decoding.logits",
    "Tokenizer": "data.tokenizer",
    "Trace": "models.output",
    "adapted_loss": "nn.lora",
    "beam_search": "decoding.beam",
    "count_parameters": "models.functional",
    "embed": "decoding.embed",
    "fill_mask": "decoding.fill_mask",
    "forward": "models.functional",
    "from_huggingface": "interop.huggingface",
    "generate": "decoding.sample",
    "inspect_text": "inspection.reading",
    "load": "training.bundle",
    "load_adapters": "training.adapters",
    "make_adapters": "nn.lora",
    "merge_adapters": "nn.lora",
    "preflight": "training.preflight",
    "prepare_for_decoding": "decoding.prepare",
    "save": "training.bundle",
    "save_adapters": "training.adapters",
    "score": "decoding.score",
    "similarity": "decoding.embed",
    "stream": "decoding.sample",
    "to_huggingface": "interop.huggingface",
    "trace": "models.functional",
}
_MODULES = ("alignment", "config", "data", "decoding", "inspection", "interop", "models", "nn", "ops", "presets",
            "sharding", "training")

__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name: str):
    # Loaded on first use: `import transformer_jax` costs little more than `import jax`.
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
