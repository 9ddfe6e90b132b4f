"""The decoder families StableLM and OLMo 1, 2 and 3: ``StableLmForCausalLM``, ``OlmoForCausalLM``,
``Olmo2ForCausalLM`` and ``Olmo3ForCausalLM``.

Their tensors have the names of Llama's. StableLM has LayerNorm, and rotates a part of each head;
OLMo 1 has LayerNorm without weights. OLMo 2 normalizes the outputs of its sub-layers, and all
queries and all keys together; in OLMo 3 most layers have a sliding window.
"""

from __future__ import annotations

from typing import Any

from transformer_jax.config import LayerKind, Limits, ModelConfig
from transformer_jax.interop.family import Family, read_banned, write_banned
from transformer_jax.interop.gemma import WEIGHTS_OF_BOTH_NORMS
from transformer_jax.interop.layer_kinds import FULL, SLIDING, layer_types, read_kinds, write_windows
from transformer_jax.interop.llama import GATED_ACTIVATIONS, WEIGHTS
from transformer_jax.interop.nested_rope import read_nested_rope, write_nested_rope
from transformer_jax.interop.rope import read_rope, write_rope
from transformer_jax.interop.setting import SIZES, Setting, Settings, typed

_SETTINGS = (
    *SIZES,
    Setting("max_len", "max_position_embeddings"),
    Setting("num_kv_heads", "num_key_value_heads", None),
    Setting("activation", "hidden_act", "swiglu", values=GATED_ACTIVATIONS),
    Setting("tie_embeddings", "tie_word_embeddings", False),
    Setting("attention_dropout", "attention_dropout", 0.0),
    Setting("init_std", "initializer_range", 0.02),
)
_IGNORED = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
_RENAMES = ((r"^(?=(embed_tokens|layers|norm|rotary_emb)\.)", "model."),)


def _read_stablelm(settings: Settings) -> dict[str, Any]:
    """Reads the rotary positions and the biases of queries, keys and values."""
    return {**read_rope(settings, fraction=0.25), "use_qkv_bias": typed(settings, "use_qkv_bias", bool, False),
            **read_banned(settings)}


def _write_stablelm(config: ModelConfig) -> dict[str, Any]:
    """Writes the rotary positions and the biases of queries, keys and values."""
    return {**write_rope(config, is_partial=True), "use_qkv_bias": bool(config.use_qkv_bias), **write_banned(config)}


STABLELM = Family(
    "stablelm", "StableLmForCausalLM", WEIGHTS,
    (*_SETTINGS, Setting("norm_epsilon", "layer_norm_eps", 1e-5), Setting("dropout", "hidden_dropout", 0.0),
     Setting("residual", "use_parallel_residual", "sequential", values={True: "parallel_shared", False: "sequential"})),
    fixed={"family": "decoder", "positions": "rope", "norm": "layernorm", "use_bias": False, "use_norm_bias": True},
    requires={"qk_layernorm": False}, read=_read_stablelm, write=_write_stablelm, ignored=_IGNORED, renames=_RENAMES)


def _read_olmo(settings: Settings) -> dict[str, Any]:
    """Reads the rotary positions, the clipping of queries, keys and values, and the biases of
    attention; feed-forward layers have none."""
    limits = Limits(projections=typed(settings, "clip_qkv", float | None, None))
    return {**read_rope(settings), "limits": limits, **_read_biases(settings)}


def _read_biases(settings: Settings) -> dict[str, Any]:
    """Reads the biases of attention, and the banned tokens."""
    bias = typed(settings, "attention_bias", bool, False)
    return {"use_bias": bias, "use_mlp_bias": False, **read_banned(settings)}


def _write_olmo(config: ModelConfig) -> dict[str, Any]:
    """Writes the rotary positions, the clipping and the biases of attention."""
    return {**write_rope(config), "clip_qkv": config.limits.projections, "attention_bias": config.use_bias,
            **write_banned(config)}


OLMO = Family(
    "olmo", "OlmoForCausalLM", WEIGHTS, _SETTINGS,
    fixed={"family": "decoder", "positions": "rope", "norm": "layernorm_without_weights", "norm_epsilon": 1e-5},
    requires={"partial_rotary_factor": 1.0}, read=_read_olmo, write=_write_olmo, ignored=_IGNORED, renames=_RENAMES)

_OLMO2_WEIGHTS = tuple(row for row in WEIGHTS_OF_BOTH_NORMS
                       if ".attention_norm." not in row.ours and ".mlp_norm." not in row.ours)
_OLMO2_SETTINGS = (*_SETTINGS, Setting("norm_epsilon", "rms_norm_eps", 1e-5))
_OLMO2_FIXED = {"family": "decoder", "positions": "rope", "norm": "rmsnorm", "norm_position": "output",
                "use_qk_norm": True, "qk_norm_width": "all"}
_OLMO3_BASES, _OLMO3_NAMES = {FULL: 500_000.0, SLIDING: 500_000.0}, {FULL: "rope_theta", SLIDING: "rope_theta"}


def _read_olmo2(settings: Settings) -> dict[str, Any]:
    """Reads the rotary positions and the biases of attention."""
    return read_rope(settings) | _read_biases(settings)


def _write_olmo2(config: ModelConfig) -> dict[str, Any]:
    """Writes the rotary positions and the biases of attention."""
    return {**write_rope(config), "attention_bias": config.use_bias, **write_banned(config)}


def _read_olmo3(settings: Settings) -> dict[str, Any]:
    """Reads the windows, the rotary positions of both kinds of layers, and the biases."""
    ropes = read_nested_rope(settings, _OLMO3_BASES, _OLMO3_NAMES)
    kinds = {FULL: LayerKind(),
             SLIDING: LayerKind(typed(settings, "sliding_window", int | None, 4096), **ropes[SLIDING])}
    names = layer_types(settings, (SLIDING, SLIDING, SLIDING, FULL))
    return {**ropes[FULL], **read_kinds(names, kinds), **_read_biases(settings)}


def _write_olmo3(config: ModelConfig) -> dict[str, Any]:
    """Writes what ``_read_olmo3`` reads."""
    return {**write_nested_rope(config, _OLMO3_BASES, _OLMO3_NAMES), "attention_bias": config.use_bias,
            **write_windows(config), **write_banned(config)}


OLMO2 = Family(
    "olmo2", "Olmo2ForCausalLM", _OLMO2_WEIGHTS, _OLMO2_SETTINGS, fixed=_OLMO2_FIXED, read=_read_olmo2,
    write=_write_olmo2, ignored=_IGNORED, renames=_RENAMES)
OLMO3 = Family(
    "olmo3", "Olmo3ForCausalLM", _OLMO2_WEIGHTS, _OLMO2_SETTINGS, fixed=_OLMO2_FIXED, read=_read_olmo3,
    write=_write_olmo3, ignored=_IGNORED, renames=_RENAMES)
