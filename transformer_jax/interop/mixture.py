"""The families with a mixture of experts: Mixtral, Qwen3-MoE and OLMoE (``MixtralForCausalLM``,
``Qwen3MoeForCausalLM``, ``OlmoeForCausalLM``).

They are decoders in Llama's form. Mixtral always normalizes the weights of the chosen experts. The
files have one tensor for each matrix of each expert.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from transformer_jax.config import ExpertConfig, LayerKind, ModelConfig
from transformer_jax.config.layers import shortest_period
from transformer_jax.interop.family import Family, read_banned, write_banned
from transformer_jax.interop.layer_kinds import num_layers
from transformer_jax.interop.llama import SETTINGS, WEIGHTS
from transformer_jax.interop.mapping import Weight
from transformer_jax.interop.rope import derived_width, read_rope, write_rope
from transformer_jax.interop.setting import Settings, require_settings, shown, typed

_MLP, _LAYER = "stack.blocks.mlp", "model.layers.{layer}"


def _experts(layer: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """Makes the rows for the router and the matrices of the experts, by their names in the file."""
    return (Weight(f"{_MLP}.router.kernel", f"{layer}.gate.weight", transposed=True),
            *(Weight(f"{_MLP}.{ours}", f"{layer}.experts.{{expert}}.{theirs}.weight", transposed=True)
              for ours, theirs in (("gate", gate), ("up", up), ("down", down))))


PROJECTIONS = _experts(f"{_LAYER}.mlp", "gate_proj", "up_proj", "down_proj")
_NUMBERED = _experts(f"{_LAYER}.block_sparse_moe", "w1", "w3", "w2")


def _read(model_type: str, settings: Settings) -> dict[str, Any]:
    """Reads the experts, the biases, the rotary positions and the sliding window."""
    is_mixtral = model_type == "mixtral"
    attention = False if is_mixtral else typed(settings, "attention_bias", bool, False)
    dense: dict[str, Any] = {}
    balance = typed(settings, "router_aux_loss_coef", float, 0.01 if model_type == "olmoe" else 0.001)
    count, per_token = {"mixtral": (8, 2), "qwen3_moe": (128, 8), "olmoe": (64, 8)}[model_type]
    # Recent versions of transformers write num_local_experts for Qwen3-MoE too.
    name = "num_local_experts" if is_mixtral or "num_local_experts" in settings else "num_experts"
    moe = ExpertConfig(
        num_experts=typed(settings, name, int, count),
        experts_per_token=typed(settings, "num_experts_per_tok", int, per_token),
        mlp_dim=typed(settings, "moe_intermediate_size", int, 768) if model_type == "qwen3_moe" else None,
        normalize_weights=is_mixtral or typed(settings, "norm_topk_prob", bool, False),
        balance_loss=balance, z_loss=0.0)
    window = None
    if is_mixtral:
        window = typed(settings, "sliding_window", int | None, None)
    elif model_type == "qwen3_moe":
        require_settings(settings, {"use_sliding_window": False})
        dense = _read_dense_layers(settings, moe)
    return {"moe": moe, "use_bias": attention, "use_mlp_bias": False if attention else None, **read_rope(settings),
            "sliding_window": window, **read_banned(settings), **dense}


def _read_dense_layers(settings: Settings, moe: ExpertConfig) -> dict[str, Any]:
    """Reads which layers have experts, and returns the fields that say so."""
    step, only = typed(settings, "decoder_sparse_step", int, 1), settings.get("mlp_only_layers") or []
    if step < 1 or not isinstance(only, list):
        raise ValueError(f"decoder_sparse_step={step} and mlp_only_layers={shown(only)}: expected a positive number "
                         "and a list of layers")
    has_experts = [layer not in only and (layer + 1) % step == 0 for layer in range(num_layers(settings))]
    first = has_experts.index(True) if True in has_experts else len(has_experts)
    if all(has_experts[first:]):  # also if no layer has experts, which the config refuses
        return {"moe": dataclasses.replace(moe, dense_layers=first)}
    return {"layer_pattern": shortest_period(tuple(LayerKind(use_experts=use) for use in has_experts))}


def _write_dense_layers(config: ModelConfig, moe: ExpertConfig) -> dict[str, Any]:
    """Writes which layers have experts, the inverse of ``_read_dense_layers``."""
    layers = moe.layers(config)
    for step in range(2, config.num_layers + 1):
        if layers == tuple(range(step - 1, config.num_layers, step)):
            return {"decoder_sparse_step": step, "mlp_only_layers": []}
    return {"decoder_sparse_step": 1, "mlp_only_layers": [
        layer for layer in range(config.num_layers) if layer not in layers]}


def _write(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """Writes the experts, the biases, the rotary positions and the sliding window."""
    if config.moe is None:
        raise ValueError("moe=None (expected a mixture of experts)")
    moe, settings = config.moe, write_rope(config) | write_banned(config)
    settings |= {"num_experts_per_tok": moe.experts_per_token, "router_aux_loss_coef": moe.balance_loss}
    if model_type == "mixtral":
        return settings | {"num_local_experts": moe.num_experts, "sliding_window": config.sliding_window}
    settings |= {"num_experts": moe.num_experts, "norm_topk_prob": moe.normalize_weights,
                 "attention_bias": config.use_bias}
    if model_type == "olmoe":
        derived_width(config)
        return settings
    return settings | {"num_local_experts": moe.num_experts, "moe_intermediate_size": moe.width(config),
                       "use_sliding_window": False, **_write_dense_layers(config, moe)}


def _family(model_type: str, architecture: str, weights: tuple[Weight, ...], **fixed: Any) -> Family:
    """Makes one of the families."""
    left_out = ("head_dim",) if model_type == "olmoe" else ()
    requires = {"partial_rotary_factor": 1.0} | ({"clip_qkv": None} if model_type == "olmoe" else {})
    return Family(
        model_type, architecture, (*WEIGHTS, *weights), tuple(row for row in SETTINGS if row.ours not in left_out),
        fixed={"family": "decoder", "positions": "rope", "norm": "rmsnorm"} | fixed, requires=requires,
        read=functools.partial(_read, model_type), write=functools.partial(_write, model_type),
        ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
        renames=((r"^(?=(embed_tokens|layers|norm|rotary_emb)\.)", "model."),))


MIXTRAL = _family("mixtral", "MixtralForCausalLM", _NUMBERED)
QWEN3_MOE = _family("qwen3_moe", "Qwen3MoeForCausalLM", PROJECTIONS, use_qk_norm=True)
OLMOE = _family("olmoe", "OlmoeForCausalLM", PROJECTIONS, use_qk_norm=True, qk_norm_width="all")
