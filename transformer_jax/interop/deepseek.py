"""The families with latent attention: DeepSeek-V2 and DeepSeek-V3 (``DeepseekV2ForCausalLM``,
``DeepseekV3ForCausalLM``).

Their first layers have dense feed-forward layers, the others a mixture of experts with shared
experts. DeepSeek-V2 chooses experts by a softmax; DeepSeek-V3 by sigmoids and a bias, which is not
part of their weights.
"""

from __future__ import annotations

import functools
import math
from typing import Any, cast

from transformer_jax.config import ExpertConfig, LatentConfig, ModelConfig, RopeLayout
from transformer_jax.interop.family import Family, read_banned, write_banned
from transformer_jax.interop.layer_kinds import num_layers
from transformer_jax.interop.llama import SETTINGS, WEIGHTS
from transformer_jax.interop.mapping import Weight, linear, norm
from transformer_jax.interop.mixture import PROJECTIONS
from transformer_jax.interop.rope import read_rope, write_rope
from transformer_jax.interop.setting import Settings, require_settings, shown, typed

_ATTENTION, _MLP = "stack.blocks.attention", "stack.blocks.mlp"
_LAYER, _SHARED = "model.layers.{layer}", "model.layers.{layer}.mlp.shared_experts"
_LATENT_EPSILON = 1e-6  # transformers builds the norms of latents with this constant
_BALANCE_LOSS = 0.001


def _latent_widths(config: ModelConfig) -> tuple[int, ...]:
    """Returns the widths of the latent and of the rotated key, which share a tensor."""
    return cast(LatentConfig, config.latent).dim, cast(int, config.rope_layout.dim)


def _head_widths(config: ModelConfig) -> tuple[int, ...]:
    """Returns the widths of the keys and the values of a head, which lie together in a tensor."""
    latent = cast(LatentConfig, config.latent)
    return latent.plain_width(config), latent.value_width(config)


_WEIGHTS = (
    *(weight for weight in WEIGHTS if not weight.ours.startswith(_ATTENTION + ".")),
    *linear(f"{_ATTENTION}.query_latent", f"{_LAYER}.self_attn.q_a_proj"),
    *norm(f"{_ATTENTION}.query_latent_norm", f"{_LAYER}.self_attn.q_a_layernorm"),
    Weight(f"{_ATTENTION}.query.kernel", f"{_LAYER}.self_attn.q_b_proj.weight", transposed=True,
           requires=f"{_ATTENTION}.query_latent.kernel"),
    Weight(f"{_ATTENTION}.query.kernel", f"{_LAYER}.self_attn.q_proj.weight", transposed=True),
    *(Weight(f"{_ATTENTION}.{ours}.{kind}", f"{_LAYER}.self_attn.kv_a_proj_with_mqa.{theirs}",
             transposed=kind == "kernel", part=(part, 2), widths=_latent_widths)
      for part, ours in enumerate(("latent", "rotated_key"))
      for kind, theirs in (("kernel", "weight"), ("bias", "bias"))),
    *norm(f"{_ATTENTION}.latent_norm", f"{_LAYER}.self_attn.kv_a_layernorm"),
    *(Weight(f"{_ATTENTION}.{ours}.kernel", f"{_LAYER}.self_attn.kv_b_proj.weight", transposed=True, part=(part, 2),
             groups=None, widths=_head_widths) for part, ours in enumerate(("key", "value"))),
    *linear(f"{_ATTENTION}.output", f"{_LAYER}.self_attn.o_proj"),
    *PROJECTIONS,
    Weight(f"{_MLP}.choice_bias", f"{_LAYER}.mlp.gate.e_score_correction_bias"),
    *(weight for name in ("gate", "up", "down")
      for weight in linear(f"{_MLP}.shared.{name}", f"{_SHARED}.{name}_proj")),
)


def _read(model_type: str, settings: Settings) -> dict[str, Any]:
    """Reads latent attention, the experts and the rotary positions."""
    heads, plain = settings["num_attention_heads"], typed(settings, "qk_nope_head_dim", int, 128)
    require_settings(settings, {"num_key_value_heads": heads} if settings.get("num_key_value_heads") else {})
    rotated = typed(settings, "qk_rope_head_dim", int, 64)
    value = typed(settings, "v_head_dim", int, 128)
    latent = LatentConfig(typed(settings, "kv_lora_rank", int, 512), typed(settings, "q_lora_rank", int | None, 1536),
                          None if value == plain else value, _LATENT_EPSILON)
    interleaved = model_type == "deepseek_v2" or typed(settings, "rope_interleave", bool, True)
    rope = read_rope(settings)
    scale = _read_scale(settings, rope["rope_scaling"].factor, plain + rotated)
    rope |= {"rope_layout": RopeLayout(rotated, "interleaved" if interleaved else "halves")}
    dense = typed(settings, "first_k_dense_replace", int, 0 if model_type == "deepseek_v2" else 3)
    moe = _read_experts(model_type, settings, dense) if dense < num_layers(settings) else None
    attention = typed(settings, "attention_bias", bool, False)
    return {"head_dim": plain + rotated, "num_kv_heads": heads, "latent": latent, "moe": moe, "use_bias": attention,
            "use_mlp_bias": False if attention else None,
            "attention_scale": scale, **rope, **read_banned(settings)}


def _read_experts(model_type: str, settings: Settings, dense: int) -> ExpertConfig:
    """Reads the experts and how the router chooses them."""
    is_v2 = model_type == "deepseek_v2"
    require_settings(settings, {"moe_layer_freq": 1, "mlp_bias": False})
    groups, chosen = 1, 1
    method = settings.get("topk_method") or ("greedy" if is_v2 else "noaux_tc")
    if method not in (("greedy", "group_limited_greedy") if is_v2 else ("noaux_tc",)):
        raise ValueError(f"topk_method={shown(method)} is not one of those that transformers has for {model_type}")
    if is_v2:
        # transformers reads norm_topk_prob of DeepSeek-V2, but its router does not use it.
        require_settings(settings, {"norm_topk_prob": False, "scoring_func": "softmax"})
    else:
        require_settings(settings, {"scoring_func": "sigmoid"})
    if method != "greedy":
        groups = typed(settings, "n_group", int, 8)
        chosen = typed(settings, "topk_group", int, 4)
    return ExpertConfig(
        num_experts=typed(settings, "n_routed_experts", int, 64 if is_v2 else 256),
        experts_per_token=typed(settings, "num_experts_per_tok", int, 8),
        mlp_dim=typed(settings, "moe_intermediate_size", int, 1407 if is_v2 else 2048),
        shared_experts=typed(settings, "n_shared_experts", int, 2 if is_v2 else 1),
        scores="softmax" if is_v2 else "sigmoid",
        normalize_weights=not is_v2 and typed(settings, "norm_topk_prob", bool, True),
        weight_scale=typed(settings, "routed_scaling_factor", float, 1.0 if is_v2 else 2.5),
        use_choice_bias=not is_v2, groups=groups, groups_per_token=chosen,
        experts_per_group_score=1 if is_v2 else 2, dense_layers=dense,
        balance_loss=typed(settings, "aux_loss_alpha", float, _BALANCE_LOSS), z_loss=0.0)


def _read_scale(settings: Settings, factor: float, width: int) -> float | None:
    """Reads the scale of the scores, which these families change with the scaling of rotary
    positions; ``None`` for the usual scale."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) == "default" or not rope.get("mscale_all_dim"):
        return None
    growth = _growth(typed(rope, "mscale_all_dim", float, 0.0), factor)
    return None if growth == 1.0 else growth**2 / math.sqrt(width)


def _growth(scale: float, factor: float) -> float:
    """Computes the growth of rotated queries or keys with the factor of YaRN."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _write(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """Writes latent attention, the experts and the rotary positions."""
    latent, layout = config.latent, config.rope_layout
    if latent is None or layout.dim is None:
        raise ValueError(f"latent={latent!r} (expected latent attention)")
    is_v2 = model_type == "deepseek_v2"
    if is_v2 and config.model_dim % config.num_heads:
        raise ValueError(f"num_heads={config.num_heads} (expected a divisor of model_dim={config.model_dim})")
    settings = write_rope(config) | write_banned(config) | {
        "kv_lora_rank": latent.dim, "q_lora_rank": latent.query_dim, "qk_nope_head_dim": latent.plain_width(config),
        "qk_rope_head_dim": layout.dim, "v_head_dim": latent.value_width(config),
        "num_key_value_heads": config.num_heads, "attention_bias": config.use_bias}
    if not is_v2:
        settings["rope_interleave"] = layout.pairs == "interleaved"
    if config.attention_scale is not None:
        _write_scale(config, settings)
    if config.moe is None:
        return settings | {"first_k_dense_replace": config.num_layers}
    moe = config.moe
    if is_v2 and moe.normalize_weights:
        raise ValueError(f"moe={moe!r} (expected normalize_weights=False, as transformers has it for {model_type})")
    settings |= {
        "n_routed_experts": moe.num_experts, "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.width(config), "n_shared_experts": moe.shared_experts,
        "routed_scaling_factor": moe.weight_scale, "first_k_dense_replace": moe.dense_layers,
        "norm_topk_prob": moe.normalize_weights, "n_group": moe.groups, "topk_group": moe.groups_per_token}
    if is_v2:
        settings["topk_method"] = "greedy" if moe.groups == 1 else "group_limited_greedy"
        settings |= {"n_group": None, "topk_group": None} if moe.groups == 1 else {}
    return settings | ({} if moe.balance_loss == _BALANCE_LOSS else {"aux_loss_alpha": moe.balance_loss})


def _write_scale(config: ModelConfig, settings: dict[str, Any]) -> None:
    """Writes the scale of the scores into the settings of rotary positions, as the two numbers from
    which transformers computes it and the factor of rotated queries and keys."""
    factor, width = config.rope_scaling.factor, cast(int, config.head_dim)
    growth = math.sqrt(cast(float, config.attention_scale) * math.sqrt(width))
    if config.rope_scaling.kind == "none" or factor <= 1 or growth == 1.0:
        return  # reading back then finds another scale, which the exporter reports
    exact = (growth - 1.0) / (0.1 * math.log(factor))
    # A short decimal number is usually what the scale was computed from.
    found = next((scale for scale in (round(exact, 6), round(exact, 12), exact, math.nextafter(exact, 0.0),
                                      math.nextafter(exact, math.inf))
                  if _growth(scale, factor)**2 / math.sqrt(width) == config.attention_scale), exact)
    scales: dict[str, float] = {"mscale_all_dim": found}
    given = config.rope_scaling.attention_factor
    if given is not None:
        other = (given * _growth(found, factor) - 1.0) / (0.1 * math.log(factor))
        other = next((scale for scale in (found, round(other, 6), round(other, 12), other)
                      if scale and _growth(scale, factor) / _growth(found, factor) == given), None)
        scales |= {} if other is None else {"mscale": other}
    for name in ("rope_parameters", "rope_scaling"):
        left_out = ("attention_factor",) if "mscale" in scales else ()
        settings[name] = {key: value for key, value in settings[name].items() if key not in left_out} | scales


def _family(model_type: str, architecture: str, skipped_layers: str | None = None) -> Family:
    """Makes one of the families."""
    return Family(
        model_type, architecture, _WEIGHTS,
        tuple(row for row in SETTINGS if row.ours not in ("head_dim", "num_kv_heads")),
        fixed={"family": "decoder", "positions": "rope", "norm": "rmsnorm"}, requires={"partial_rotary_factor": 1.0},
        read=functools.partial(_read, model_type), write=functools.partial(_write, model_type),
        ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
        renames=((r"^(?=(embed_tokens|layers|norm|rotary_emb)\.)", "model."),), skipped_layers=skipped_layers)


DEEPSEEK_V2 = _family("deepseek_v2", "DeepseekV2ForCausalLM")
# The published files hold one more layer, which predicts the token after the next one.
DEEPSEEK_V3 = _family("deepseek_v3", "DeepseekV3ForCausalLM", "num_nextn_predict_layers")
