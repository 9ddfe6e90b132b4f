"""Decoders in Llama's form: ``LlamaForCausalLM``, ``MistralForCausalLM``, ``Qwen2ForCausalLM``,
``Qwen3ForCausalLM``.

They differ in what their configs say: Mistral has a sliding window, Qwen2 biases of queries, keys
and values, Qwen3 norms of queries and keys. One table serves them all; rows that a config does not
make do not apply.
"""

from __future__ import annotations

import functools
from typing import Any

from transformer_jax.config import ModelConfig, RopeScaling
from transformer_jax.interop.family import Family, Setting, Settings, require_settings
from transformer_jax.interop.mapping import Weight, linear, norm

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


# What a config.json must say comes first.
_SETTINGS = (
    Setting("vocab_size", "vocab_size"),
    Setting("model_dim", "hidden_size"),
    Setting("mlp_dim", "intermediate_size"),
    Setting("num_layers", "num_hidden_layers"),
    Setting("num_heads", "num_attention_heads"),
    Setting("max_len", "max_position_embeddings"),
    Setting("num_kv_heads", "num_key_value_heads", None),
    Setting("head_dim", "head_dim", None),
    Setting("norm_epsilon", "rms_norm_eps", 1e-6),
    Setting("tie_embeddings", "tie_word_embeddings", False),
    Setting("attention_dropout", "attention_dropout", 0.0),
    Setting("init_std", "initializer_range", 0.02),
)
_ROPE_LLAMA3 = {"low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor",
                "original_max_position_embeddings": "original_max_len"}


def _read(settings: Settings) -> dict[str, Any]:
    has_bias = settings.get("attention_bias", False) if settings["model_type"] == "llama" else False
    require_settings(settings, {"attention_bias": has_bias, "mlp_bias": has_bias})
    base, scaling = _read_rope(settings)
    return {"use_bias": has_bias, "rope_base": base, "rope_scaling": scaling,
            "sliding_window": _read_window(settings)}


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


def _write(model_type: str, config: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": config.rope_scaling.kind.replace("none", "default")}
    if config.rope_scaling.kind != "none":
        rope["factor"] = config.rope_scaling.factor
    if config.rope_scaling.kind == "llama3":
        rope |= {theirs: getattr(config.rope_scaling, ours) for theirs, ours in _ROPE_LLAMA3.items()}
    settings = {"hidden_act": "silu", "rope_theta": config.rope_base,
                "rope_parameters": rope | {"rope_theta": config.rope_base}}
    if rope["rope_type"] != "default":
        settings["rope_scaling"] = rope  # for transformers before 5
    if model_type == "llama":
        return settings | {"attention_bias": config.use_bias, "mlp_bias": config.use_bias}
    if model_type == "mistral":
        return settings | {"sliding_window": config.sliding_window}
    return settings | {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0,
                       "sliding_window": config.sliding_window}


_FIXED = {"family": "decoder", "positions": "rope", "norm": "rmsnorm", "activation": "swiglu"}

LLAMA, MISTRAL, QWEN2, QWEN3 = (
    Family(model_type, architecture, _WEIGHTS, _SETTINGS, fixed=_FIXED | fixed,
           requires={"hidden_act": "silu", "partial_rotary_factor": 1.0}, read=_read,
           write=functools.partial(_write, model_type),
           # The frequencies of the rotation, which older versions wrote as a buffer.
           ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",))
    for model_type, architecture, fixed in (
        ("llama", "LlamaForCausalLM", {}), ("mistral", "MistralForCausalLM", {}),
        ("qwen2", "Qwen2ForCausalLM", {"use_qkv_bias": True}), ("qwen3", "Qwen3ForCausalLM", {"use_qk_norm": True})))
