"""The valid range of every numeric setting, in one table, and the check of all config classes."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import types
import typing
from typing import Any, NamedTuple

from transformer_jax.settings import require

# Computations use float32 and int32: the smallest normal float32, the largest float32 and the
# largest int32.
_TINY, _HUGE, _MOST = 1.1754943508222875e-38, 3.4028234663852886e38, 2**31 - 1
_BELOW_ONE = math.nextafter(1.0, 0.0)


class Range(NamedTuple):
    """The values from ``low`` to ``high``, both included. ``wanted`` completes the error message
    "must ..."."""

    wanted: str
    low: float
    high: float


_COUNT = Range("be a positive integer", 1, _MOST)
_COUNT_OR_0 = Range("not be negative", 0, _MOST)
_POSITIVE = Range("be positive", _TINY, _HUGE)
_NOT_NEGATIVE = Range("not be negative", 0, _HUGE)
_FACTOR = Range("be at least 1", 1, _HUGE)
_FRACTION = Range("be in [0, 1]", 0, 1)
_RATE = Range("be in [0, 1)", 0, _BELOW_ONE)
_PART = Range("be in (0, 1)", _TINY, _BELOW_ONE)
_PART_OR_ALL = Range("be in (0, 1]", _TINY, 1)

_OF_FEATURES = {
    "vocab_size": _COUNT, "max_len": _COUNT, "num_layers": _COUNT, "input_dim": _COUNT, "output_dim": _COUNT,
    "num_features": _COUNT, "k": _COUNT, "sparsity": _NOT_NEGATIVE, "bandwidth": _POSITIVE,
    "first_threshold": _NOT_NEGATIVE, "dead_after": Range("be from 1 to 2**24", 1, 2**24), "revival": _NOT_NEGATIVE}

# For each class: the prefix of its field names in error messages, and the range of each numeric
# field. A field that may be None must be in the range if it is not None.
RANGES: dict[str, tuple[str, dict[str, Range]]] = {
    "ExperimentConfig": ("", {
        "seed": Range("be from 0 to 2**32 - 1", 0, 2**32 - 1), "steps": _COUNT, "batch_size": _COUNT,
        "log_every": _COUNT}),
    "ModelSettings": ("", {"vocab_size": _COUNT, "max_len": _COUNT, "num_layers": _COUNT}),
    "ModelConfig": ("", {
        "vocab_size": _COUNT, "max_len": _COUNT, "num_layers": _COUNT, "num_heads": _COUNT, "model_dim": _COUNT,
        "num_kv_heads": _COUNT, "head_dim": _COUNT, "mlp_dim": _COUNT, "embedding_dim": _COUNT,
        "num_encoder_layers": _COUNT,
        "num_decoder_layers": _COUNT, "num_token_types": _COUNT_OR_0, "position_offset": _COUNT_OR_0,
        "relative_buckets": _COUNT, "relative_max_distance": _COUNT, "attention_scale": _POSITIVE,
        "norm_epsilon": _POSITIVE, "rope_base": _POSITIVE, "sliding_window": _COUNT, "dropout": _RATE,
        "attention_dropout": _RATE, "init_std": _POSITIVE, "unroll": _COUNT}),
    "ContrastiveConfig": ("contrastive.", {"temperature": _POSITIVE}),
    "ClassifierConfig": ("classifier.", {"dropout": _RATE}),
    "RecurrentConfig": ("", {
        "vocab_size": _COUNT, "max_len": _COUNT, "num_layers": _COUNT, "model_dim": _COUNT, "dropout": _RATE}),
    "WordVectorConfig": ("", {
        "vocab_size": _COUNT, "max_len": _COUNT, "num_layers": _COUNT, "model_dim": _COUNT,
        "window": Range("be from 1 to 32", 1, 32), "negatives": _COUNT, "subsample": _NOT_NEGATIVE,
        "min_count": _COUNT}),
    "SparseAutoencoderConfig": ("", _OF_FEATURES | {"scale": _POSITIVE, "target_scale": _POSITIVE}),
    "CrossLayerTranscoderConfig": ("", _OF_FEATURES),
    "RopeScaling": ("rope_scaling.", {
        "factor": _FACTOR, "low_frequency_factor": _POSITIVE, "high_frequency_factor": _POSITIVE,
        "original_max_len": _COUNT, "attention_factor": _POSITIVE, "beta_fast": _POSITIVE, "beta_slow": _POSITIVE}),
    "ExpertConfig": ("moe.", {
        "num_experts": _COUNT, "experts_per_token": _COUNT, "mlp_dim": _COUNT, "shared_experts": _COUNT_OR_0,
        "weight_scale": _POSITIVE, "groups": _COUNT, "groups_per_token": _COUNT, "experts_per_group_score": _COUNT,
        "dense_layers": _COUNT_OR_0, "balance_loss": _NOT_NEGATIVE, "z_loss": _NOT_NEGATIVE}),
    "LatentConfig": ("latent.", {
        "dim": _COUNT, "query_dim": _COUNT, "value_dim": _COUNT, "norm_epsilon": _POSITIVE}),
    "MupConfig": ("mup.", {"base_dim": _COUNT, "base_head_dim": _COUNT, "base_layers": _COUNT}),
    "RopeLayout": ("rope_layout.", {"dim": _COUNT}),
    "Limits": ("limits.", {"scores": _POSITIVE, "logits": _POSITIVE, "projections": _POSITIVE, "neurons": _POSITIVE}),
    "LayerKind": ("layer_pattern: ", {"sliding_window": _COUNT, "rope_base": _POSITIVE}),
    "DataConfig": ("data.", {"validation_fraction": _PART, "max_len": _COUNT, "mask_probability": _PART}),
    "CorpusConfig": ("data.mixture.", {"weight": _POSITIVE}),
    "TokenizerConfig": ("data.tokenizer.", {"vocab_size": _COUNT, "min_frequency": _COUNT}),
    "LossConfig": ("loss.", {
        "label_smoothing": _RATE, "z_loss": _NOT_NEGATIVE,
        "most_logits": Range("be from 0 to 2**63 - 1", 0, 2**63 - 1)}),
    "LoraConfig": ("lora.", {"rank": _COUNT_OR_0, "alpha": _POSITIVE, "dropout": _RATE}),
    "OptimConfig": ("optim.", {
        "peak_lr": _POSITIVE, "muon_lr": _POSITIVE, "warmup_steps": _COUNT_OR_0, "end_lr": _FRACTION,
        "decay_fraction": _PART_OR_ALL, "weight_decay": _NOT_NEGATIVE, "beta1": _RATE, "beta2": _RATE,
        "epsilon": _POSITIVE, "clip_norm": _POSITIVE, "accumulation": _COUNT}),
    "CheckpointConfig": ("checkpoint.", {"every": _COUNT, "keep": _COUNT}),
    "EvalConfig": ("eval.", {"every": _COUNT, "batch_size": _COUNT, "max_batches": _COUNT}),
    "SampleConfig": ("sample.", {
        "every": _COUNT_OR_0, "max_new_tokens": _COUNT, "temperature": _NOT_NEGATIVE, "top_k": _COUNT_OR_0}),
    "MetricsConfig": ("metrics.", {"attention_every": _COUNT_OR_0}),
    "MeshConfig": ("mesh.", {
        "data": _COUNT, "fsdp": _COUNT, "tensor": _COUNT, "sequence": _COUNT,
        "expert": _COUNT}),
    "PreferenceConfig": ("dpo.", {"beta": _POSITIVE}),
    "ReinforcementConfig": ("rl.", {
        "num_prompts": _COUNT, "num_samples": _COUNT, "max_new_tokens": _COUNT, "min_length": _COUNT_OR_0,
        "epochs": _COUNT, "clip": _POSITIVE, "value_clip": _POSITIVE, "value_coefficient": _NOT_NEGATIVE,
        "entropy_coefficient": _NOT_NEGATIVE, "discount": _FRACTION, "trace_decay": _FRACTION,
        "kl_coefficient": _NOT_NEGATIVE, "kl_target": _POSITIVE, "max_step_kl": _POSITIVE}),
}
RANGES["ElectraConfig"] = ("", RANGES["ModelConfig"][1] | {
    "generator_width": _PART_OR_ALL, "discriminator_weight": _POSITIVE})


def check_fields(config: Any) -> None:
    """Checks the type of every field of a config, and the range of its numbers.

    NumPy numbers are converted to Python numbers, and paths to strings, so that every config can be
    written as JSON.

    Args:
      config: An instance of one of the classes in ``RANGES``.

    Raises:
      ValueError: If a value is not valid. The message gives the field, its value and what is
        allowed.
    """
    # A subclass, which a program may define, has the ranges of the class that it extends.
    prefix, ranges = next(RANGES[kind.__name__] for kind in type(config).__mro__ if kind.__name__ in RANGES)
    for field, options in _types(type(config)).items():
        name, value = f"{prefix}{field}", getattr(config, field)
        if value is None and type(None) in options:
            continue
        if field in ranges:
            object.__setattr__(config, field, _number(name, value, ranges[field], whole=float not in options))
        elif str in options and isinstance(value, os.PathLike):
            object.__setattr__(config, field, os.fspath(value))
        else:
            # A list is accepted where a tuple is expected, because JSON has no tuples.
            kinds = tuple((tuple, list) if typing.get_origin(option) is tuple else option for option in options)
            expected = " or ".join("None" if option is type(None) else getattr(option, "__name__", str(option))
                                   for option in options)
            require(isinstance(value, kinds),
                    f"{name}={value!r} is of type {type(value).__name__}; expected {expected}")


@functools.cache
def _types(cls: type) -> dict[str, tuple[Any, ...]]:
    """Returns the types that each field may have."""
    hints = typing.get_type_hints(cls)
    return {name: typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            for name, hint in hints.items() if name in {field.name for field in dataclasses.fields(cls)}}


def _number(name: str, value: Any, allowed: Range, *, whole: bool) -> int | float:
    """Returns the value as a Python number. Raises ValueError if it is not a number, not finite or
    out of range."""
    is_number = not isinstance(value, bool) and issubclass(type(value), numbers.Integral if whole else numbers.Real)
    kind = "" if is_number or "integer" in allowed.wanted else f"be {'an integer' if whole else 'a number'} and "
    if is_number and (value != value or value in (math.inf, -math.inf)):  # isfinite fails on enormous integers
        kind = "be finite and "
    message = f"{name}={value!r} must {kind}{allowed.wanted}"
    require(is_number and value >= allowed.low, message)
    # The words of a range up to 1 already give its upper end; other messages must add it.
    require(value <= allowed.high, message if allowed.high <= 1 else f"{message}, and at most {allowed.high:.8g}")
    return int(value) if whole else float(value)
