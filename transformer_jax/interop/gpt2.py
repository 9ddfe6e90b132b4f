"""GPT-2: ``GPT2LMHeadModel``."""

from __future__ import annotations

from typing import Any

from transformer_jax.config import ModelConfig
from transformer_jax.interop.mapping import (
    Family,
    Settings,
    Weight,
    norm,
    require_config,
    require_settings,
    translated,
)

_BLOCK = "stack.blocks"
_LAYER = "transformer.h.{layer}"
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


def _conv1d(ours: str, theirs: str, part: tuple[int, int] = (0, 1)) -> tuple[Weight, Weight]:
    """GPT-2's own linear map, whose weight is ``[in, out]`` as ours is."""
    return Weight(f"{ours}.kernel", f"{theirs}.weight", part=part), Weight(f"{ours}.bias", f"{theirs}.bias", part=part)


_WEIGHTS = (
    Weight("embeddings.token", "transformer.wte.weight", also=("lm_head.weight",)),
    Weight("embeddings.position", "transformer.wpe.weight"),
    *norm(f"{_BLOCK}.attention_norm", f"{_LAYER}.ln_1"),
    *_conv1d(f"{_BLOCK}.attention.query", f"{_LAYER}.attn.c_attn", part=(0, 3)),
    *_conv1d(f"{_BLOCK}.attention.key", f"{_LAYER}.attn.c_attn", part=(1, 3)),
    *_conv1d(f"{_BLOCK}.attention.value", f"{_LAYER}.attn.c_attn", part=(2, 3)),
    *_conv1d(f"{_BLOCK}.attention.output", f"{_LAYER}.attn.c_proj"),
    *norm(f"{_BLOCK}.mlp_norm", f"{_LAYER}.ln_2"),
    *_conv1d(f"{_BLOCK}.mlp.up", f"{_LAYER}.mlp.c_fc"),
    *_conv1d(f"{_BLOCK}.mlp.down", f"{_LAYER}.mlp.c_proj"),
    *norm("final_norm", "transformer.ln_f"),
    Weight("embeddings.output", "lm_head.weight"),
)


def _read_config(settings: Settings) -> ModelConfig:
    require_settings(settings, {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                                "add_cross_attention": False})
    dropout, attention_dropout = settings.get("resid_pdrop", 0.1), settings.get("attn_pdrop", 0.1)
    return ModelConfig(
        vocab_size=settings.get("vocab_size", 50_257), max_len=settings.get("n_positions", 1024),
        num_layers=settings.get("n_layer", 12), num_heads=settings.get("n_head", 12),
        model_dim=settings.get("n_embd", 768), mlp_dim=settings.get("n_inner"), positions="learned",
        norm_epsilon=settings.get("layer_norm_epsilon", 1e-5),
        activation=translated(settings.get("activation_function", "gelu_new"), _ACTIVATIONS, "activation_function"),
        tie_embeddings=settings.get("tie_word_embeddings", True), dropout=dropout,
        attention_dropout=None if attention_dropout == dropout else attention_dropout,
        init_std=settings.get("initializer_range", 0.02))


def _write_config(config: ModelConfig) -> dict[str, Any]:
    require_config("gpt2", config, {
        "family": "decoder", "positions": "learned", "norm": "layernorm", "norm_position": "pre", "use_bias": True,
        "num_kv_heads": config.num_heads, "head_dim": config.model_dim // config.num_heads, "use_qk_norm": False,
        "use_embedding_norm": False, "use_value_head": False, "num_token_types": 0, "scale_embeddings": False,
        "use_output_bias": False, "attention_scale": None, "scale_logits": False, "position_offset": 0,
        "use_qkv_bias": None, "sliding_window": None})
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    attention_dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
    return {
        "vocab_size": config.vocab_size, "n_positions": config.max_len, "n_layer": config.num_layers,
        "n_head": config.num_heads, "n_embd": config.model_dim, "n_inner": config.mlp_dim,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": translated(config.activation, activations, "gpt2: activation"),
        "tie_word_embeddings": config.tie_embeddings, "resid_pdrop": config.dropout, "embd_pdrop": config.dropout,
        "attn_pdrop": attention_dropout, "initializer_range": config.init_std or 0.02}


GPT2 = Family(
    "gpt2", "GPT2LMHeadModel", _WEIGHTS, _read_config, _write_config,
    # The causal mask, which older versions wrote as a buffer.
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    # The file on the hub is of the model without its head.
    renames=((r"^(?=wte\.|wpe\.|h\.|ln_f\.)", "transformer."),))
