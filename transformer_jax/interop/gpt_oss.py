"""The family gpt-oss (``GptOssForCausalLM``): experts with biases, attention sinks, and a sliding
window in every other layer.

The files have the gate and the up projection of all experts in one tensor, side by side.
"""

from __future__ import annotations

from typing import Any

from transformer_jax.config import ExpertConfig, LayerKind, Limits, ModelConfig
from transformer_jax.interop.family import Family, read_banned, write_banned
from transformer_jax.interop.layer_kinds import FULL, SLIDING, layer_types, read_kinds, write_windows
from transformer_jax.interop.llama import SETTINGS, WEIGHTS
from transformer_jax.interop.mapping import Weight, linear
from transformer_jax.interop.mxfp4 import with_converted
from transformer_jax.interop.rope import read_rope, write_rope
from transformer_jax.interop.setting import Setting, Settings, typed

_MLP, _LAYER = "stack.blocks.mlp", "model.layers.{layer}"
_EXPERTS = f"{_LAYER}.mlp.experts"
# The rotary positions if config.json does not tell.
_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
         "original_max_position_embeddings": 4096}

_WEIGHTS = (
    *(weight for weight in WEIGHTS if not weight.ours.startswith(f"{_MLP}.")),
    Weight("stack.blocks.attention.sinks", f"{_LAYER}.self_attn.sinks"),
    *linear(f"{_MLP}.router", f"{_LAYER}.mlp.router"),
    *(Weight(f"{_MLP}.{ours}{bias}", f"{_EXPERTS}.gate_up_proj{bias}", part=(part, 2), is_interleaved=True)
      for bias in ("", "_bias") for part, ours in enumerate(("gate", "up"))),
    *(Weight(f"{_MLP}.down{bias}", f"{_EXPERTS}.down_proj{bias}") for bias in ("", "_bias")),
)
_REPLACED = ("activation", "norm_epsilon", "num_kv_heads", "head_dim")


def _read(settings: Settings) -> dict[str, Any]:
    """Reads the experts, the windows, the biases and the rotary positions."""
    has_rope = settings.get("rope_parameters") or settings.get("rope_scaling")
    rope = read_rope(settings if has_rope else {**settings, "rope_scaling": _YARN}, default_base=150_000.0)
    window = typed(settings, "sliding_window", int | None, 128)
    attention = typed(settings, "attention_bias", bool, True)
    moe = ExpertConfig(num_experts=typed(settings, "num_local_experts", int, 128),
                       experts_per_token=typed(settings, "num_experts_per_tok", int, 4),
                       balance_loss=typed(settings, "router_aux_loss_coef", float, 0.001), z_loss=0.0)
    return {**rope, "moe": moe, "use_bias": attention, "use_mlp_bias": None if attention else True,
            "limits": Limits(neurons=typed(settings, "swiglu_limit", float, 7.0)),
            **read_kinds(layer_types(settings, (SLIDING, FULL)), {FULL: LayerKind(), SLIDING: LayerKind(window)}),
            **read_banned(settings)}


def _write(config: ModelConfig) -> dict[str, Any]:
    """Writes the experts, the windows, the biases and the rotary positions."""
    if config.moe is None:
        raise ValueError("moe=None (expected a mixture of experts)")
    if config.limits.neurons is None:
        raise ValueError(f"limits={config.limits!r} (expected a number as limits.neurons)")
    moe = config.moe
    return {**write_rope(config), **write_windows(config), **write_banned(config),
            "num_local_experts": moe.num_experts, "num_experts_per_tok": moe.experts_per_token,
            "router_aux_loss_coef": moe.balance_loss, "swiglu_limit": config.limits.neurons,
            "attention_bias": config.use_bias}


GPT_OSS = Family(
    "gpt_oss", "GptOssForCausalLM", _WEIGHTS,
    (*(row for row in SETTINGS if row.ours not in _REPLACED),
     Setting("num_kv_heads", "num_key_value_heads", 8), Setting("head_dim", "head_dim", 64),
     Setting("norm_epsilon", "rms_norm_eps", 1e-5),
     Setting("activation", "hidden_act", "swiglu_plus_one", values={"silu": "swiglu_plus_one"})),
    fixed={"family": "decoder", "positions": "rope", "norm": "rmsnorm", "use_sinks": True},
    requires={"partial_rotary_factor": 1.0, "swiglu_alpha": 1.702}, read=_read, write=_write,
    ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    renames=((r"^(?=(embed_tokens|layers|norm|rotary_emb)\.)", "model."),),
    quantizations=("mxfp4",), convert=with_converted)
