"""Published model sizes by name."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from transformer_jax.config import (
    ElectraConfig,
    ExpertConfig,
    LatentConfig,
    LayerKind,
    Limits,
    ModelConfig,
    RopeLayout,
    RopeScaling,
)
from transformer_jax.lazy import lazy_names
from transformer_jax.settings import nearest

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = ["get", "names"]

_GPT2 = ModelConfig(vocab_size=50_257, max_len=1024, activation="gelu_tanh")
_NANOGPT = ModelConfig(vocab_size=65, activation="gelu", use_bias=False)


def _gpt2(num_layers: int, num_heads: int, model_dim: int) -> ModelConfig:
    """Returns a config of GPT-2."""
    return _GPT2.replace(num_layers=num_layers, num_heads=num_heads, model_dim=model_dim)


def _gpt3(num_layers: int, num_heads: int, head_dim: int) -> ModelConfig:
    """Returns a config of GPT-3."""
    return _GPT2.replace(max_len=2048, num_layers=num_layers, num_heads=num_heads, head_dim=head_dim,
                         model_dim=num_heads * head_dim)


def _pythia(num_layers: int, num_heads: int, model_dim: int, vocab_size: int = 50_304) -> ModelConfig:
    """Returns a config of Pythia, which rotates a quarter of the channels of each head."""
    return ModelConfig(
        vocab_size=vocab_size, max_len=2048, num_layers=num_layers, num_heads=num_heads, model_dim=model_dim,
        positions="rope", rope_layout=RopeLayout(model_dim // num_heads // 4), residual="parallel", activation="gelu",
        tie_embeddings=False)


# Jiang et al. (2024), and Yang et al. (2025); the sizes are those of the published config.json
# files.
_MIXTRAL = ModelConfig(
    vocab_size=32_000, max_len=32_768, num_layers=32, num_heads=32, num_kv_heads=8, model_dim=4096, mlp_dim=14_336,
    positions="rope", rope_base=1e6, norm="rmsnorm", activation="swiglu", use_bias=False, tie_embeddings=False,
    moe=ExpertConfig(8, 2, balance_loss=0.02, z_loss=0.0))
_QWEN3_MOE = _MIXTRAL.replace(
    vocab_size=151_936, max_len=40_960, num_layers=48, num_kv_heads=4, head_dim=128, model_dim=2048, mlp_dim=6144,
    norm_epsilon=1e-6, use_qk_norm=True, moe=ExpertConfig(128, 8, mlp_dim=768, balance_loss=0.001, z_loss=0.0))

# DeepSeek-AI (2024), DeepSeek-V2 and DeepSeek-V3, by their published config.json files.
_DEEPSEEK_V2_LITE = _MIXTRAL.replace(
    vocab_size=102_400, max_len=163_840, num_layers=27, num_heads=16, num_kv_heads=16, head_dim=192, model_dim=2048,
    mlp_dim=10_944, norm_epsilon=1e-6, rope_base=10_000.0, rope_layout=RopeLayout(64, "interleaved"),
    rope_scaling=RopeScaling("yarn", 40.0, original_max_len=4096, attention_factor=1.0),
    attention_scale=(0.0707 * math.log(40) + 1)**2 / math.sqrt(192), latent=LatentConfig(512),
    moe=ExpertConfig(64, 6, mlp_dim=1408, shared_experts=2, normalize_weights=False, dense_layers=1,
                     balance_loss=0.001, z_loss=0.0))
_GPT_OSS = ModelConfig(
    vocab_size=201_088, max_len=131_072, num_layers=24, num_heads=64, num_kv_heads=8, head_dim=64, model_dim=2880,
    mlp_dim=2880, positions="rope", rope_base=150_000.0,
    rope_scaling=RopeScaling("yarn", 32.0, original_max_len=4096, truncate=False), norm="rmsnorm", use_sinks=True,
    activation="swiglu_plus_one", limits=Limits(neurons=7.0), tie_embeddings=False,
    layer_pattern=(LayerKind(128), LayerKind()), moe=ExpertConfig(32, 4, balance_loss=0.9, z_loss=0.0))


def _windows(window: int, every: int, rope_base: float | None = None) -> tuple[LayerKind, ...]:
    """Returns a pattern in which every so many layers one has no sliding window."""
    return (LayerKind(window, rope_base=rope_base),) * (every - 1) + (LayerKind(),)


_LLAMA = ModelConfig(positions="rope", norm="rmsnorm", activation="swiglu", use_bias=False, norm_epsilon=1e-6,
                     tie_embeddings=False)
_GEMMA = _LLAMA.replace(
    vocab_size=256_000, max_len=8192, norm="rmsnorm_one_plus", activation="geglu", scale_embeddings=True,
    tie_embeddings=True, head_dim=256)
_GEMMA2 = _GEMMA.replace(norm_position="both", limits=Limits(scores=50.0, logits=30.0), layer_pattern=_windows(4096, 2))
_GEMMA3 = _GEMMA.replace(
    vocab_size=262_144, max_len=32_768, norm_position="both", use_qk_norm=True, rope_base=1_000_000.0,
    layer_pattern=_windows(512, 6, 10_000.0))
_OLMO2 = _LLAMA.replace(
    vocab_size=100_352, max_len=4096, norm_position="output", use_qk_norm=True, qk_norm_width="all",
    rope_base=500_000.0)
_YARN = RopeScaling("yarn", 8.0, original_max_len=8192, attention_factor=1.2079441541679836)


def _sized(base: ModelConfig, num_layers: int, model_dim: int, num_heads: int, num_kv_heads: int, mlp_dim: int,
           **changes: Any) -> ModelConfig:
    """Returns a config of the given size."""
    return base.replace(num_layers=num_layers, model_dim=model_dim, num_heads=num_heads, num_kv_heads=num_kv_heads,
                        mlp_dim=mlp_dim, **changes)


# Vaswani et al. (2017), table 3, with a vocabulary of 37,000 pieces that English and German share.
# The paper rounds to 65M and 213M parameters; these shapes have 63.1M and 214.2M.
_TRANSFORMER = ModelConfig(
    family="encoder_decoder", vocab_size=37_000, max_len=512, num_layers=6, num_heads=8, model_dim=512,
    positions="sinusoidal", norm_position="post", activation="relu", scale_embeddings=True, dropout=0.1, init_std=None)
# Devlin et al. (2019), and Liu et al. (2019). RoBERTa has an embedding of token types although it
# has only one type.
_BERT = ModelConfig(
    family="encoder", vocab_size=30_522, max_len=512, num_token_types=2, norm_position="post", norm_epsilon=1e-12,
    activation="gelu", use_embedding_norm=True, dropout=0.1)
_ROBERTA = _BERT.replace(vocab_size=50_265, num_token_types=1, norm_epsilon=1e-5)
# Published files of RoBERTa and of its relatives have two rows of positions that are never used.
# "roberta-base" and "roberta-book" are without them.
_ROBERTA_FILES = _ROBERTA.replace(position_offset=2)
_XLM_ROBERTA = _ROBERTA_FILES.replace(vocab_size=250_002)
_ALBERT = _BERT.replace(vocab_size=30_000, embedding_dim=128, shared_layers=True, activation="gelu_tanh",
                        head_activation="gelu_tanh", dropout=0.0)
_MODERNBERT = ModelConfig(
    family="encoder", vocab_size=50_368, max_len=8192, positions="rope", rope_base=160_000.0, activation="geglu_erf",
    use_bias=False, use_embedding_norm=True, use_first_norm=False,
    layer_pattern=(LayerKind(), *(LayerKind(65, rope_base=10_000.0),) * 2))


def _encoder(base: ModelConfig, num_layers: int, num_heads: int, model_dim: int, **changes: Any) -> ModelConfig:
    """Returns a config of an encoder of the given size."""
    return base.replace(num_layers=num_layers, num_heads=num_heads, model_dim=model_dim, **changes)


def _electra(num_layers: int, num_heads: int, model_dim: int, generator_width: float, **changes: Any) -> ElectraConfig:
    """Returns a config of ELECTRA, whose discriminator is a BERT."""
    fields = {field.name: getattr(_BERT, field.name) for field in dataclasses.fields(_BERT)}
    fields |= dict.fromkeys((*_BERT.derived(), "family"))
    return ElectraConfig(**fields | changes | {
        "family": "electra", "num_layers": num_layers, "num_heads": num_heads, "model_dim": model_dim,
        "generator_width": generator_width})


_PRESETS = {
    "transformer-base": _TRANSFORMER,
    "transformer-big": _TRANSFORMER.replace(num_heads=16, model_dim=1024, dropout=0.3),
    "bert-base": _BERT,
    "bert-large": _encoder(_BERT, 24, 16, 1024),
    "bert-base-cased": _BERT.replace(vocab_size=28_996),
    "bert-large-cased": _encoder(_BERT, 24, 16, 1024, vocab_size=28_996),
    "bert-base-multilingual": _BERT.replace(vocab_size=119_547),
    # Turc et al. (2019).
    "bert-tiny": _encoder(_BERT, 2, 2, 128),
    "bert-mini": _encoder(_BERT, 4, 4, 256),
    "bert-small": _encoder(_BERT, 4, 8, 512),
    "bert-medium": _encoder(_BERT, 8, 8, 512),
    "roberta-base": _ROBERTA,
    "roberta-large": _encoder(_ROBERTA_FILES, 24, 16, 1024),
    # Sanh et al. (2019).
    "distilbert-base": _BERT.replace(num_layers=6, num_token_types=0),
    "distilbert-base-multilingual": _BERT.replace(vocab_size=119_547, num_layers=6, num_token_types=0),
    "distilroberta-base": _ROBERTA_FILES.replace(num_layers=6),
    # Conneau et al. (2020), Lan et al. (2020) as released in version 2, and Warner et al. (2024).
    "xlm-roberta-base": _XLM_ROBERTA,
    "xlm-roberta-large": _encoder(_XLM_ROBERTA, 24, 16, 1024),
    "albert-base": _ALBERT,
    "albert-large": _encoder(_ALBERT, 24, 16, 1024),
    "albert-xlarge": _encoder(_ALBERT, 24, 16, 2048),
    "albert-xxlarge": _encoder(_ALBERT, 12, 64, 4096),
    "modernbert-base": _encoder(_MODERNBERT, 22, 12, 768, mlp_dim=1152),
    "modernbert-large": _encoder(_MODERNBERT, 28, 16, 1024, mlp_dim=2624),
    # Clark et al. (2020), table 6: generator and discriminator.
    "electra-small": _electra(12, 4, 256, 1 / 4, embedding_dim=128),
    "electra-base": _electra(12, 12, 768, 1 / 3),
    "electra-large": _electra(24, 16, 1024, 1 / 4),
    # RoBERTa trained on one book: 83,502,880 parameters.
    "roberta-book": _ROBERTA.replace(vocab_size=52_000, num_layers=6),
    # Radford et al. (2019), table 2, as released.
    "gpt2-small": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    # Brown et al. (2020), table 2.1. Two rows of the table are inconsistent (XL: 24 heads of 128
    # for a width of 2048; 13B: 40 heads of 128 for a width of 5140). Here heads * head_dim = width.
    "gpt3-small": _gpt3(12, 12, 64),
    "gpt3-medium": _gpt3(24, 16, 64),
    "gpt3-large": _gpt3(24, 16, 96),
    "gpt3-xl": _gpt3(24, 16, 128),
    "gpt3-2.7b": _gpt3(32, 32, 80),
    "gpt3-6.7b": _gpt3(32, 32, 128),
    "gpt3-13b": _gpt3(40, 40, 128),
    "gpt3-175b": _gpt3(96, 96, 128),
    # Biderman et al. (2023), table 1, and the published config.json files. The sizes differ in the
    # multiple to which the vocabulary is filled up.
    "pythia-14m": _pythia(6, 4, 128),
    "pythia-31m": _pythia(6, 8, 256),
    "pythia-70m": _pythia(6, 8, 512),
    "pythia-160m": _pythia(12, 12, 768),
    "pythia-410m": _pythia(24, 16, 1024),
    "pythia-1b": _pythia(16, 8, 2048),
    "pythia-1.4b": _pythia(24, 16, 2048),
    "pythia-2.8b": _pythia(32, 32, 2560),
    "pythia-6.9b": _pythia(32, 32, 4096, 50_432),
    "pythia-12b": _pythia(36, 40, 5120, 50_688),
    "mixtral-8x7b": _MIXTRAL,
    "mixtral-8x22b": _MIXTRAL.replace(
        max_len=65_536, num_layers=56, num_heads=48, model_dim=6144, mlp_dim=16_384,
        moe=ExpertConfig(8, 2, balance_loss=0.001, z_loss=0.0)),
    "qwen3-30b-a3b": _QWEN3_MOE,
    "qwen3-235b-a22b": _QWEN3_MOE.replace(
        num_layers=94, num_heads=64, model_dim=4096, mlp_dim=12_288,
        moe=ExpertConfig(128, 8, mlp_dim=1536, balance_loss=0.001, z_loss=0.0)),
    # Muennighoff et al. (2024), as released in September 2024.
    "olmoe-1b-7b": _MIXTRAL.replace(
        vocab_size=50_304, max_len=4096, num_layers=16, num_heads=16, num_kv_heads=16, model_dim=2048, mlp_dim=1024,
        rope_base=10_000.0, use_qk_norm=True, qk_norm_width="all", moe=ExpertConfig(64, 8, normalize_weights=False)),
    # OpenAI (2025), gpt-oss-120b and gpt-oss-20b, by their published config.json files.
    "gpt-oss-20b": _GPT_OSS,
    "gpt-oss-120b": _GPT_OSS.replace(num_layers=36, moe=ExpertConfig(128, 4, balance_loss=0.9, z_loss=0.0)),
    "deepseek-v2-lite": _DEEPSEEK_V2_LITE,
    "deepseek-v2": _DEEPSEEK_V2_LITE.replace(
        num_layers=60, num_heads=128, num_kv_heads=128, model_dim=5120, mlp_dim=12_288, latent=LatentConfig(512, 1536),
        moe=ExpertConfig(160, 6, mlp_dim=1536, shared_experts=2, normalize_weights=False, weight_scale=16.0, groups=8,
                         groups_per_token=3, experts_per_group_score=1, dense_layers=1, balance_loss=0.001,
                         z_loss=0.0)),
    "deepseek-v3": _DEEPSEEK_V2_LITE.replace(
        vocab_size=129_280, num_layers=61, num_heads=128, num_kv_heads=128, model_dim=7168, mlp_dim=18_432,
        latent=LatentConfig(512, 1536), attention_scale=(0.1 * math.log(40) + 1)**2 / math.sqrt(192),
        moe=ExpertConfig(256, 8, mlp_dim=2048, shared_experts=1, scores="sigmoid", weight_scale=2.5,
                         use_choice_bias=True, groups=8, groups_per_token=4, dense_layers=3, balance_loss=0.001,
                         z_loss=0.0)),
    # Gemma Team (2024, 2025), the OLMo team (2025), Abdin et al. (2024), Jiang et al. (2023) and
    # SmolLM3, by their published config.json files.
    "gemma-2b": _sized(_GEMMA, 18, 2048, 8, 1, 16_384),
    "gemma-7b": _sized(_GEMMA, 28, 3072, 16, 16, 24_576),
    "gemma-2-2b": _sized(_GEMMA2, 26, 2304, 8, 4, 9216),
    "gemma-2-9b": _sized(_GEMMA2, 42, 3584, 16, 8, 14_336),
    "gemma-2-27b": _sized(_GEMMA2, 46, 4608, 32, 16, 36_864, head_dim=128, attention_scale=144**-0.5),
    "gemma-3-270m": _sized(_GEMMA3, 18, 640, 4, 1, 2048),
    "gemma-3-1b": _sized(_GEMMA3, 26, 1152, 4, 1, 6912),
    "olmo-2-1b": _sized(_OLMO2, 16, 2048, 16, 16, 8192),
    "olmo-2-7b": _sized(_OLMO2, 32, 4096, 32, 32, 11_008),
    "olmo-2-13b": _sized(_OLMO2, 40, 5120, 40, 40, 13_824),
    "olmo-3-7b": _sized(_OLMO2, 32, 4096, 32, 32, 11_008, vocab_size=100_278, max_len=65_536, rope_scaling=_YARN,
                        layer_pattern=(LayerKind(4096, rope_scaling=RopeScaling()),) * 3 + (LayerKind(),)),
    "phi-3-mini-4k": _sized(_LLAMA, 32, 3072, 32, 32, 8192, vocab_size=32_064, max_len=4096, norm_epsilon=1e-5,
                            sliding_window=2047),
    "mistral-7b": _sized(_LLAMA, 32, 4096, 32, 8, 14_336, vocab_size=32_000, max_len=32_768, norm_epsilon=1e-5,
                         sliding_window=4096),
    "smollm3-3b": _sized(_LLAMA, 36, 2048, 16, 4, 11_008, vocab_size=128_256, max_len=65_536, tie_embeddings=True,
                         rope_base=5_000_000.0, layer_pattern=(LayerKind(),) * 3 + (LayerKind(use_rope=False),)),
    # nanoGPT's character models of Shakespeare: the CPU recipe and the GPU one.
    "nanogpt-char-cpu": _NANOGPT.replace(max_len=64, num_layers=4, num_heads=4, model_dim=128),
    "nanogpt-char-gpu": _NANOGPT.replace(max_len=256, num_layers=6, num_heads=6, model_dim=384, dropout=0.2),
    # The shape of Llama (Touvron et al., 2023), at the size of llama2.c's stories15M.
    "llama-tiny": ModelConfig(
        vocab_size=32_000, max_len=256, num_layers=6, num_heads=6, model_dim=288, mlp_dim=768, positions="rope",
        norm="rmsnorm", activation="swiglu", use_bias=False),
}


def names() -> list[str]:
    """Returns the names that ``get`` accepts.

    Returns:
      The names of all presets.
    """
    return list(_PRESETS)


def get(name: str) -> ModelConfig:
    """Returns the model config of a published size.

    Args:
      name: One of ``names()``.

    Returns:
      The config.

    Raises:
      ValueError: If the name is unknown. The message suggests the nearest known name.
    """
    if not isinstance(name, str) or name not in _PRESETS:
        hint = nearest(str(name), _PRESETS) or f"; known: {', '.join(_PRESETS)}"
        raise ValueError(f"there is no preset {name!r}{hint}")
    return _PRESETS[name]
