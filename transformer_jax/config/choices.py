"""The values of the fields of ``ModelConfig`` that name one of several choices."""

from __future__ import annotations

from transformer_jax.config.classifier import CLASSIFIERS

CHOICES = {
    "family": ("decoder", "encoder", "encoder_decoder", "reward", "electra", *CLASSIFIERS),
    "positions": ("sinusoidal", "sinusoidal_halves", "sinusoidal_fairseq", "learned", "rope", "alibi", "relative",
                  "none"),
    "norm": ("layernorm", "layernorm_without_weights", "rmsnorm", "rmsnorm_one_plus"),
    "norm_position": ("pre", "post", "both", "output"),
    "qk_norm_width": ("head", "all"),
    "residual": ("sequential", "parallel", "parallel_shared"),
    "activation": ("relu", "relu_squared", "silu", "gelu", "gelu_tanh", "swiglu", "geglu", "geglu_erf",
                   "swiglu_plus_one"),
    "head_activation": ("relu", "silu", "gelu", "gelu_tanh"),
    "dtype": ("float32", "bfloat16", "float16"),
    "param_dtype": ("float32", "bfloat16", "float16"),
    "attention_implementation": ("auto", "xla", "chunked", "cudnn", "splash"),
    "matmul_precision": ("default", "high", "highest"),
    "remat": ("none", "dots", "full", "offload"),
}
# The activations that have a gate.
GATED = ("swiglu", "geglu", "geglu_erf", "swiglu_plus_one")

# The families whose models are encoders, without a decoder.
ENCODERS = ("encoder", "encoder_classifier", "encoder_token_classifier", "electra")

# Names that a program has registered, such as the names of its own attention kernels.
_REGISTERED_CHOICES: dict[str, list[str]] = {}


def allow_choice(field: str, name: str) -> None:
    """Adds a valid value to a field of ``ModelConfig``, such as the name of a registered
    function."""
    names = _REGISTERED_CHOICES.setdefault(field, [])
    if name not in names:
        names.append(name)


def choices_of(field: str) -> tuple[str, ...]:
    """Returns the valid values of a field, those that a program has registered included.

    Args:
      field: The name of a field of ``ModelConfig``.

    Returns:
      The values.
    """
    return (*CHOICES[field], *_REGISTERED_CHOICES.get(field, ()))
