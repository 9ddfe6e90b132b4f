"""Decoders in Llama's form: ``LlamaForCausalLM``, ``MistralForCausalLM``, ``Qwen2ForCausalLM``, ``Qwen3ForCausalLM``.

They differ in what their configs say: Mistral has a sliding window, Qwen2 biases of queries, keys and values, Qwen3
norms of queries and keys. One table serves them all; rows that a config does not make do not apply.
"""

from __future__ import annotations

import functools
from typing import Any

from transformer_jax.config import ModelConfig, RopeScaling
from transformer_jax.interop.mapping import (
    Family,
    Settings,
    Weight,
    linear,
    norm,
    require_config,
    require_settings,
)

_BLOCK = "stack.blocks"
_LAYER = "model.layers.{layer}"

_WEIGHTS = (
    Weight("embeddings.token", "model.embed_tokens.weight", also=("lm_head.weight",)),
    *norm(f"{_BLOCK}.attention_norm", f"{_LAYER}.input_layernorm"),
    *linear(f"{_BLOCK}.attention.query", f"{_LAYER}.self_attn.q_proj"),
    *linear(f"{_BLOCK}.attention.key", f"{_LAYER}.self_attn.k_proj"),
    *linear(f"{_BLOCK}.attention.value", f"{_LAYER}.self_attn.v_proj"),
    *linear(f"{_BLOCK}.attention.output", f"{_LAYER}.self_attn.o_proj"),
    *norm(f"{_BLOCK}.attention.query_norm", f"{_LAYER}.self_attn.q_norm"),
    *norm(f"{_BLOCK}.attention.key_norm", f"{_LAYER}.self_attn.k_norm"),
    *norm(f"{_BLOCK}.mlp_norm", f"{_LAYER}.post_attention_layernorm"),
    *linear(f"{_BLOCK}.mlp.gate", f"{_LAYER}.mlp.gate_proj"),
    *linear(f"{_BLOCK}.mlp.up", f"{_LAYER}.mlp.up_proj"),
    *linear(f"{_BLOCK}.mlp.down", f"{_LAYER}.mlp.down_proj"),
    *norm("final_norm", "model.norm"),
    Weight("embeddings.output", "lm_head.weight"),
)


# What a config.json must say; of the rest, what a member of the family takes where it does not say.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "max_position_embeddings")
_ROPE_LLAMA3 = {"low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor",
                "original_max_position_embeddings": "original_max_len"}


def _read_config(settings: Settings) -> ModelConfig:
    model_type = settings["model_type"]
    missing = [name for name in _SIZES if name not in settings]
    if missing:
        raise ValueError(f"config.json of this {model_type} model lacks {', '.join(missing)}")
    has_bias = settings.get("attention_bias", False) if model_type == "llama" else False
    require_settings(settings, {"hidden_act": "silu", "partial_rotary_factor": 1.0, "attention_bias": has_bias,
                                "mlp_bias": has_bias})
    base, scaling = _read_rope(settings)
    return ModelConfig(
        vocab_size=settings["vocab_size"], max_len=settings["max_position_embeddings"],
        num_layers=settings["num_hidden_layers"], num_heads=settings["num_attention_heads"],
        num_kv_heads=settings.get("num_key_value_heads"), model_dim=settings["hidden_size"],
        head_dim=settings.get("head_dim"), mlp_dim=settings["intermediate_size"], positions="rope", rope_base=base,
        rope_scaling=scaling, norm="rmsnorm", norm_epsilon=settings.get("rms_norm_eps", 1e-6), activation="swiglu",
        use_bias=has_bias, use_qkv_bias=True if model_type == "qwen2" else None, use_qk_norm=model_type == "qwen3",
        sliding_window=_read_window(settings), tie_embeddings=settings.get("tie_word_embeddings", False),
        attention_dropout=settings.get("attention_dropout") or None,
        init_std=settings.get("initializer_range", 0.02))


def _read_window(settings: Settings) -> int | None:
    if settings["model_type"] == "mistral":
        return settings.get("sliding_window", 4096)
    if settings["model_type"] == "llama" or not settings.get("use_sliding_window", False):
        return None
    layers, first = settings["num_hidden_layers"], settings.get("max_window_layers", 28)
    kinds = settings.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    if len(set(kinds[:layers])) > 1:
        raise ValueError(f"some layers of this {settings['model_type']} model have a sliding window and some have none "
                         "(layer_types, max_window_layers); here all layers are alike")
    return settings.get("sliding_window", 4096) if kinds[0] == "sliding_attention" else None


def _read_rope(settings: Settings) -> tuple[float, RopeScaling]:
    # transformers 5 has one dict, and before it rope_scaling beside rope_theta.
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    base = float(rope.get("rope_theta", settings.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, RopeScaling()
    if kind == "linear":
        return base, RopeScaling("linear", factor=float(rope["factor"]))
    if kind == "llama3":
        named = {ours: rope[theirs] for theirs, ours in _ROPE_LLAMA3.items() if theirs in rope}
        return base, RopeScaling("llama3", factor=float(rope["factor"]), **named)
    raise ValueError(f"rotary positions with rope_type={kind!r} are not supported; expected default, linear or llama3")


def _write_config(model_type: str, config: ModelConfig) -> dict[str, Any]:
    expected = {
        "family": "decoder", "positions": "rope", "norm": "rmsnorm", "norm_position": "pre", "activation": "swiglu",
        "use_embedding_norm": False, "use_value_head": False, "num_token_types": 0, "scale_embeddings": False,
        "use_output_bias": False, "attention_scale": None, "scale_logits": False,
        "use_bias": config.use_bias if model_type == "llama" else False,
        "use_qkv_bias": True if model_type == "qwen2" else None, "use_qk_norm": model_type == "qwen3",
        "sliding_window": None if model_type == "llama" else config.sliding_window}
    require_config(model_type, config, expected)
    rope: dict[str, Any] = {"rope_type": config.rope_scaling.kind.replace("none", "default")}
    if config.rope_scaling.kind != "none":
        rope["factor"] = config.rope_scaling.factor
    if config.rope_scaling.kind == "llama3":
        rope |= {theirs: getattr(config.rope_scaling, ours) for theirs, ours in _ROPE_LLAMA3.items()}
    settings = {
        "vocab_size": config.vocab_size, "max_position_embeddings": config.max_len,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "hidden_size": config.model_dim, "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim, "hidden_act": "silu", "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings, "initializer_range": config.init_std or 0.02,
        "attention_dropout": config.attention_dropout or 0.0, "rope_theta": config.rope_base,
        "rope_parameters": rope | {"rope_theta": config.rope_base}}
    if rope["rope_type"] != "default":
        settings["rope_scaling"] = rope  # for transformers before 5
    if model_type == "llama":
        return settings | {"attention_bias": config.use_bias, "mlp_bias": config.use_bias}
    if model_type == "mistral":
        return settings | {"sliding_window": config.sliding_window}
    return settings | {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0,
                       "sliding_window": config.sliding_window}


LLAMA, MISTRAL, QWEN2, QWEN3 = (
    Family(model_type, architecture, _WEIGHTS, _read_config, functools.partial(_write_config, model_type),
           # The frequencies of the rotation, which older versions wrote as a buffer.
           ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",))
    for model_type, architecture in (("llama", "LlamaForCausalLM"), ("mistral", "MistralForCausalLM"),
                                     ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")))
