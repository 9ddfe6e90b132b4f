"""The decoder families Llama, Mistral, Qwen2 and Qwen3: ``LlamaForCausalLM``,
``MistralForCausalLM``, ``Qwen2ForCausalLM`` and ``Qwen3ForCausalLM``.

Mistral adds a sliding window, Qwen2 biases for queries, keys and values, and Qwen3 norms for
queries and keys. All families share one table of weights; the code skips rows for parameters that a
model does not have.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from transformer_jax.config import LayerKind, ModelConfig
from transformer_jax.interop.family import Family, read_banned, write_banned
from transformer_jax.interop.layer_kinds import FULL, SLIDING, layer_types, num_layers, read_kinds, write_windows
from transformer_jax.interop.mapping import Weight, linear, norm
from transformer_jax.interop.rope import read_rope, write_rope
from transformer_jax.interop.setting import SIZES, Setting, Settings, require_settings, typed

_BLOCK = "stack.blocks"
_LAYER = "model.layers.{layer}"

WEIGHTS = (
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


GATED_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_new": "geglu", "gelu_pytorch_tanh": "geglu",
                     "gelu_fast": "geglu", "gelu_python_tanh": "geglu", "gelu_accurate": "geglu"}

# The required settings come first.
SETTINGS = (
    *SIZES,
    Setting("max_len", "max_position_embeddings"),
    Setting("num_kv_heads", "num_key_value_heads", None),
    Setting("head_dim", "head_dim", None),
    Setting("norm_epsilon", "rms_norm_eps", 1e-6),
    Setting("tie_embeddings", "tie_word_embeddings", False),
    Setting("activation", "hidden_act", "swiglu", values=GATED_ACTIVATIONS),
    Setting("attention_dropout", "attention_dropout", 0.0),
    Setting("init_std", "initializer_range", 0.02),
)


def _read(settings: Settings) -> dict[str, Any]:
    """Reads the biases, the rotary positions and the sliding window."""
    model_type = settings["model_type"]
    # attention_bias applies to queries, keys, values and output.
    attention = typed(settings, "attention_bias", bool, False) if model_type in ("llama", "qwen3") else False
    mlp = typed(settings, "mlp_bias", bool, False) if model_type == "llama" else False
    require_settings(settings, {"attention_bias": attention, "mlp_bias": mlp})
    return {"use_bias": attention, "use_mlp_bias": None if mlp == attention else mlp, **read_rope(settings),
            **_read_windows(settings), **read_banned(settings)}


def _read_windows(settings: Settings) -> dict[str, Any]:
    """Reads the sliding windows of the layers."""
    model_type = settings["model_type"]
    if model_type == "llama":
        return {}
    window = typed(settings, "sliding_window", int | None, 4096)
    if model_type == "mistral":
        return {"sliding_window": window}
    if not typed(settings, "use_sliding_window", bool, False):
        return {}
    # The first layers have no window, as config.json of Qwen2 and Qwen3 counts them.
    first = min(max(typed(settings, "max_window_layers", int, 28), 0), num_layers(settings))
    names = layer_types(settings, (FULL,) * first + (SLIDING,) * (num_layers(settings) - first))
    return read_kinds(names, {FULL: LayerKind(), SLIDING: LayerKind(window)})


def _write(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """Writes the biases, the rotary positions and the sliding window."""
    settings = write_rope(config) | write_banned(config)
    if model_type == "llama":
        mlp = config.use_bias if config.use_mlp_bias is None else config.use_mlp_bias
        return settings | {"attention_bias": config.use_bias, "mlp_bias": mlp}
    if model_type == "mistral":
        return settings | {"sliding_window": config.sliding_window}
    if model_type == "qwen3":
        settings["attention_bias"] = config.use_bias
    windows = write_windows(config)
    types = windows["layer_types"]
    is_usual = SLIDING in types and types == sorted(types)  # those without a window come first
    return settings | windows | {"use_sliding_window": SLIDING in types,
                                 "max_window_layers": types.count(FULL) if is_usual else 0}


def _settings(longest: int) -> tuple[Setting, ...]:
    """Returns the table for a family whose files may leave out ``max_position_embeddings``."""
    return tuple(dataclasses.replace(row, default=longest) if row.ours == "max_len" else row for row in SETTINGS)


_FIXED = {"family": "decoder", "positions": "rope", "norm": "rmsnorm"}

LLAMA, MISTRAL, QWEN2, QWEN3 = (
    Family(model_type, architecture, WEIGHTS, _settings(longest), fixed=_FIXED | fixed,
           requires={"partial_rotary_factor": 1.0}, read=_read, write=functools.partial(_write, model_type),
           # Older versions of transformers stored the rotary frequencies as a buffer.
           ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
           # transformers stores a model for answering questions under the prefix "transformer".
           renames=((r"^(transformer\.)?(?=(embed_tokens|layers|norm|rotary_emb)\.)", "model."),))
    for model_type, architecture, longest, fixed in (
        ("llama", "LlamaForCausalLM", 2048, {}), ("mistral", "MistralForCausalLM", 4096 * 32, {}),
        ("qwen2", "Qwen2ForCausalLM", 32_768, {"use_qkv_bias": True}),
        ("qwen3", "Qwen3ForCausalLM", 32_768, {"use_qk_norm": True})))
