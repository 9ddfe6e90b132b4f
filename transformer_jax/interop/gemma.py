"""The decoder families Gemma 1, 2 and 3: ``GemmaForCausalLM``, ``Gemma2ForCausalLM`` and
``Gemma3ForCausalLM`` (text alone).

Their norms multiply by 1 plus the stored scale, and their embeddings are scaled. Gemma 2 and 3
normalize the input and the output of each sub-layer, and alternate layers with and without a
sliding window; in Gemma 3 these rotate with different bases.
"""

from __future__ import annotations

import functools
from typing import Any

from transformer_jax.config import LayerKind, Limits, ModelConfig
from transformer_jax.interop.family import Family, read_banned, write_banned
from transformer_jax.interop.layer_kinds import FULL, SLIDING, layer_types, layers_of, read_kinds, write_windows
from transformer_jax.interop.llama import WEIGHTS
from transformer_jax.interop.mapping import norm
from transformer_jax.interop.nested_rope import read_nested_rope, write_nested_rope
from transformer_jax.interop.rope import read_rope, write_rope
from transformer_jax.interop.setting import SIZES, Setting, Settings, checked, require_settings, typed

_BLOCK, _LAYER = "stack.blocks", "model.layers.{layer}"
# What Llama's table names mlp_norm is here the norm of attention's output.
WEIGHTS_OF_BOTH_NORMS = (
    *(row for row in WEIGHTS if ".mlp_norm." not in row.ours),
    *norm(f"{_BLOCK}.attention_output_norm", f"{_LAYER}.post_attention_layernorm"),
    *norm(f"{_BLOCK}.mlp_norm", f"{_LAYER}.pre_feedforward_layernorm"),
    *norm(f"{_BLOCK}.mlp_output_norm", f"{_LAYER}.post_feedforward_layernorm"),
)
# Published files of Gemma 1 say gelu; transformers always computes the approximation.
_ACTIVATIONS = {"gelu_pytorch_tanh": "geglu", "gelu": "geglu", "gelu_new": "geglu", "silu": "swiglu"}
_SETTINGS = (
    *SIZES,
    Setting("max_len", "max_position_embeddings", 8192),
    Setting("num_kv_heads", "num_key_value_heads", None),
    Setting("head_dim", "head_dim", 256),
    Setting("norm_epsilon", "rms_norm_eps", 1e-6),
    Setting("tie_embeddings", "tie_word_embeddings", True),
    Setting("attention_dropout", "attention_dropout", 0.0),
    Setting("init_std", "initializer_range", 0.02),
)
_FIXED = {"family": "decoder", "positions": "rope", "norm": "rmsnorm_one_plus", "scale_embeddings": True}
_PERIODS = {"gemma2": (SLIDING, FULL), "gemma3_text": (SLIDING,) * 5 + (FULL,)}
_BASES = {FULL: 1_000_000.0, SLIDING: 10_000.0}


def _read_biases(settings: Settings) -> dict[str, Any]:
    """Reads the biases of attention, and refuses attention to later tokens."""
    if settings.get("use_bidirectional_attention"):
        require_settings(settings, {"use_bidirectional_attention": False})
    bias = typed(settings, "attention_bias", bool, False)
    return {"use_bias": bias, "use_mlp_bias": False, "use_qkv_bias": None, **read_banned(settings)}


def _read_gemma(settings: Settings) -> dict[str, Any]:
    """Reads the biases and the rotary positions."""
    return read_rope(settings) | _read_biases(settings)


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    """Writes the biases and the rotary positions."""
    return write_rope(config) | {"attention_bias": config.use_bias} | write_banned(config)


def _read_both(settings: Settings) -> dict[str, Any]:
    """Reads the scale and the limits of scores, the windows and the rotary positions."""
    model_type, width = settings["model_type"], typed(settings, "head_dim", int, 256)
    scalar = checked(settings.get("query_pre_attn_scalar", 256), float, "query_pre_attn_scalar")
    if scalar <= 0:
        raise ValueError(f"query_pre_attn_scalar={scalar}: expected a positive number")
    caps = (50.0, 30.0) if model_type == "gemma2" else (None, None)
    if model_type == "gemma3_text":  # transformers does not cap the scores of this family, whatever the settings say
        require_settings(settings, {"attn_logit_softcapping": None})
    limits = Limits(*(typed(settings, f"{name}_logit_softcapping", float | None, cap)
                      for name, cap in zip(("attn", "final"), caps, strict=True)))
    period = _PERIODS[model_type]
    if model_type == "gemma3_text" and "sliding_window_pattern" in settings:
        size = typed(settings, "sliding_window_pattern", int, 6)
        if not 1 <= size <= 100:
            raise ValueError(f"sliding_window_pattern={size}: expected a number from 1 to 100")
        period = (SLIDING,) * (size - 1) + (FULL,)
    window = typed(settings, "sliding_window", int | None, 4096)
    kinds = {FULL: LayerKind(), SLIDING: LayerKind(sliding_window=window)}
    rope = read_rope(settings) if model_type == "gemma2" else {}
    if model_type == "gemma3_text":
        ropes = read_nested_rope(settings, _BASES, {FULL: "rope_theta", SLIDING: "rope_local_base_freq"})
        rope = ropes[FULL]
        kinds[SLIDING] = LayerKind(window, **ropes[SLIDING])
    return {**rope, "limits": limits, "attention_scale": None if scalar == width else scalar**-0.5,
            **read_kinds(layer_types(settings, period), kinds), **_read_biases(settings)}


def _write_both(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """Writes what ``_read_both`` reads."""
    scalar = config.head_dim if config.attention_scale is None else round(config.attention_scale**-2)
    if scalar < 1:
        raise ValueError(f"attention_scale={config.attention_scale!r} (expected 1 / sqrt of a whole number)")
    if model_type == "gemma3_text" and config.limits.scores is not None:
        raise ValueError(f"limits={config.limits!r} (expected scores=None)")
    settings = {"query_pre_attn_scalar": scalar, "attn_logit_softcapping": config.limits.scores,
                "final_logit_softcapping": config.limits.logits, "attention_bias": config.use_bias,
                **write_windows(config), **write_banned(config)}
    if model_type == "gemma2":
        return write_rope(layers_of(config)[0]) | settings
    return settings | write_nested_rope(config, _BASES, {FULL: "rope_theta", SLIDING: "rope_local_base_freq"})


_GEMMA_ONE = Setting("activation", "hidden_act", "geglu", values=_ACTIVATIONS)
_GEMMA_BOTH = Setting("activation", "hidden_activation", "geglu", values=_ACTIVATIONS)
_RENAMES = ((r"^(?=(embed_tokens|layers|norm|rotary_emb)\.)", "model."),)
_IGNORED = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)

GEMMA = Family("gemma", "GemmaForCausalLM", WEIGHTS, (*_SETTINGS, _GEMMA_ONE), fixed=_FIXED, read=_read_gemma,
               write=_write_gemma, ignored=_IGNORED, renames=_RENAMES)
GEMMA2, GEMMA3 = (
    Family(model_type, architecture, WEIGHTS_OF_BOTH_NORMS, (*_SETTINGS, _GEMMA_BOTH),
           fixed=_FIXED | {"norm_position": "both"} | fixed, read=_read_both,
           write=functools.partial(_write_both, model_type), ignored=_IGNORED, renames=_RENAMES)
    for model_type, architecture, fixed in (
        ("gemma2", "Gemma2ForCausalLM", {}), ("gemma3_text", "Gemma3ForCausalLM", {"use_qk_norm": True})))
