"""Published model sizes by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformer_jax.config import ModelConfig
from transformer_jax.lazy import lazy_names
from transformer_jax.settings import nearest

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = ["get", "names"]

_GPT2 = ModelConfig(vocab_size=50_257, max_len=1024, activation="gelu_tanh")
_NANOGPT = ModelConfig(vocab_size=65, activation="gelu", use_bias=False)


def _gpt2(num_layers: int, num_heads: int, model_dim: int) -> ModelConfig:
    return _GPT2.replace(num_layers=num_layers, num_heads=num_heads, model_dim=model_dim)


def _gpt3(num_layers: int, num_heads: int, head_dim: int) -> ModelConfig:
    return _GPT2.replace(max_len=2048, num_layers=num_layers, num_heads=num_heads, head_dim=head_dim,
                         model_dim=num_heads * head_dim)


# Vaswani et al. (2017), table 3, with the 37,000 pieces that English and German share there. The
# paper rounds to 65M and 213M parameters; these shapes have 63.1M and 214.2M.
_TRANSFORMER = ModelConfig(
    family="encoder_decoder", vocab_size=37_000, max_len=512, num_layers=6, num_heads=8, model_dim=512,
    positions="sinusoidal", norm_position="post", activation="relu", scale_embeddings=True, dropout=0.1, init_std=None)
# Devlin et al. (2019), and Liu et al. (2019), whose one kind of tokens has an embedding all the
# same.
_BERT = ModelConfig(
    family="encoder", vocab_size=30_522, max_len=512, num_token_types=2, norm_position="post", norm_epsilon=1e-12,
    activation="gelu", use_embedding_norm=True, dropout=0.1)
_ROBERTA = _BERT.replace(vocab_size=50_265, num_token_types=1, norm_epsilon=1e-5)

_PRESETS = {
    "transformer-base": _TRANSFORMER,
    "transformer-big": _TRANSFORMER.replace(num_heads=16, model_dim=1024, dropout=0.3),
    "bert-base": _BERT,
    "bert-large": _BERT.replace(num_layers=24, num_heads=16, model_dim=1024),
    "roberta-base": _ROBERTA,
    # RoBERTa trained on one book: 83,502,880 parameters.
    "roberta-book": _ROBERTA.replace(vocab_size=52_000, num_layers=6),
    # Radford et al. (2019), table 2, as released.
    "gpt2-small": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    # Brown et al. (2020), table 2.1. Two rows do not multiply out as printed (XL: 24 heads of 128
    # for a width of 2048; 13B: 40 heads of 128 for a width of 5140); here heads * head_dim = width.
    "gpt3-small": _gpt3(12, 12, 64),
    "gpt3-medium": _gpt3(24, 16, 64),
    "gpt3-large": _gpt3(24, 16, 96),
    "gpt3-xl": _gpt3(24, 16, 128),
    "gpt3-2.7b": _gpt3(32, 32, 80),
    "gpt3-6.7b": _gpt3(32, 32, 128),
    "gpt3-13b": _gpt3(40, 40, 128),
    "gpt3-175b": _gpt3(96, 96, 128),
    # nanoGPT's character models of Shakespeare: the CPU recipe and the GPU one.
    "nanogpt-char-cpu": _NANOGPT.replace(max_len=64, num_layers=4, num_heads=4, model_dim=128),
    "nanogpt-char-gpu": _NANOGPT.replace(max_len=256, num_layers=6, num_heads=6, model_dim=384, dropout=0.2),
    # The shape of Llama (Touvron et al., 2023), at the size of llama2.c's stories15M.
    "llama-tiny": ModelConfig(
        vocab_size=32_000, max_len=256, num_layers=6, num_heads=6, model_dim=288, mlp_dim=768, positions="rope",
        norm="rmsnorm", activation="swiglu", use_bias=False),
}


def names() -> list[str]:
    """The names that :func:`get` takes."""
    return list(_PRESETS)


def get(name: str) -> ModelConfig:
    """The model config of a published size.

    Raises:
      ValueError: for an unknown name, with the nearest known one.
    """
    if name not in _PRESETS:
        hint = nearest(name, _PRESETS) or f"; known: {', '.join(_PRESETS)}"
        raise ValueError(f"there is no preset {name!r}{hint}")
    return _PRESETS[name]
