"""Checks of settings of a model that depend on each other, and the settings of one kind of layer."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, cast

from transformer_jax.config.choices import ENCODERS, GATED
from transformer_jax.config.layers import LayerKind
from transformer_jax.config.rope_scaling import RopeLayout, RopeScaling
from transformer_jax.settings import require

if TYPE_CHECKING:
    from transformer_jax.config.model import ModelConfig


def check_model(config: ModelConfig, *, is_built_in: bool) -> None:
    """Checks the settings of a model that depend on each other.

    Args:
      config: The config, with its derived fields filled in.
      is_built_in: Whether the position encoding is one of the library. A registered encoding may
        use any setting.

    Raises:
      ValueError: If two settings cannot be combined.
    """
    num_kv_heads, head_dim = cast(int, config.num_kv_heads), cast(int, config.head_dim)
    require(config.num_heads % num_kv_heads == 0,
            f"num_heads={config.num_heads} is not a multiple of num_kv_heads={config.num_kv_heads}")
    if is_built_in:
        config.rope_layout.check(config.positions, head_dim)
        require(config.positions == "rope" or config.rope_scaling.kind == "none",
                f"rope_scaling.kind={config.rope_scaling.kind!r} is for positions='rope', not {config.positions!r}")
        config.rope_scaling.check_width(config.rope_layout.dim or head_dim)
        require(not config.positions.startswith("sinusoidal") or config.model_dim % 2 == 0,
                f"positions={config.positions!r} needs an even model_dim, not {config.model_dim}")
        require(config.positions != "sinusoidal_fairseq" or config.model_dim >= 4,
                f"positions='sinusoidal_fairseq' needs a model_dim of at least 4, not {config.model_dim}")
        require(config.positions in ("learned", "sinusoidal_fairseq") or config.position_offset == 0,
                f"position_offset={config.position_offset} is for positions='learned' and 'sinusoidal_fairseq', not "
                f"{config.positions!r}")
    _check_blocks(config)
    _check_pattern(config)
    require(config.relative_buckets % 4 == 0 and config.relative_max_distance > config.relative_buckets // 2,
            f"relative_buckets={config.relative_buckets} must be a multiple of 4, and relative_max_distance="
            f"{config.relative_max_distance} more than half of it")
    require(config.family != "electra" or hasattr(config, "generator_width"),
            "family='electra' needs an ElectraConfig, which describes the generator too")
    require(config.family == "decoder" or not config.use_value_head,
            f"use_value_head is for family='decoder', not {config.family!r}")
    require(config.family in ("decoder", "encoder_decoder") or not config.use_output_bias,
            f"use_output_bias is for decoders and encoder-decoders, not family={config.family!r}")
    is_encoder = config.family in ENCODERS
    require(is_encoder or config.embedding_dim == config.model_dim,
            f"embedding_dim={config.embedding_dim} must be model_dim={config.model_dim}: only encoders can have "
            f"embeddings of another width, not family={config.family!r}")
    require(not config.shared_layers or (is_encoder and not config.layer_pattern),
            f"shared_layers is for encoders without a layer_pattern, not family={config.family!r}")
    require(config.family == "encoder_decoder" or not config.start_ids,
            f"start_ids={config.start_ids} is for an encoder-decoder, not for family={config.family!r}")
    for field in ("num_encoder_layers", "num_decoder_layers"):
        require(config.family == "encoder_decoder" or getattr(config, field) is None,
                f"{field} belongs to family='encoder_decoder'; family={config.family!r} has num_layers")


def _check_blocks(config: ModelConfig) -> None:
    """Raises ValueError if a block cannot have the norms and limits of the config."""
    require(config.residual == "sequential" or (config.norm_position == "pre" and config.family != "encoder_decoder"),
            f"residual={config.residual!r} needs norm_position='pre' and a family without cross-attention, not "
            f"norm_position={config.norm_position!r} and family={config.family!r}")
    require(config.norm_position in ("pre", "post") or config.family != "encoder_decoder",
            f"norm_position={config.norm_position!r} is for families without cross-attention; "
            "family='encoder_decoder' has 'pre' and 'post'")
    require(config.use_first_norm or (config.norm_position, config.residual) == ("pre", "sequential"),
            f"use_first_norm=False needs norm_position='pre' and residual='sequential', not norm_position="
            f"{config.norm_position!r} and residual={config.residual!r}")
    require(config.use_first_norm or config.family != "encoder_decoder",
            "use_first_norm=False is for families with one stack of layers, not for family='encoder_decoder'")
    require(config.norm == "layernorm" or not config.use_norm_bias,
            f"use_norm_bias=True is for norm='layernorm'; norm={config.norm!r} has no biases")
    require(not config.use_sinks or (config.family in ("decoder", "reward") and config.latent is None),
            f"use_sinks is for family='decoder' and 'reward' without latent, not for family={config.family!r} and "
            f"latent={config.latent}")
    require(config.limits.neurons is None or config.activation in GATED,
            f"limits.neurons is for an activation with a gate ({', '.join(GATED)}), not {config.activation!r}")
    require(config.use_qk_norm or config.qk_norm_width == "head",
            f"qk_norm_width={config.qk_norm_width!r} needs use_qk_norm=True")
    require(config.family != "encoder" or config.limits.logits is None,
            "limits.logits is for models that predict the next token, not for family='encoder'")
    require(config.family != "encoder_decoder" or config.qk_norm_width == "head",
            "qk_norm_width='all' is for families without cross-attention, not family='encoder_decoder'")


def _check_pattern(config: ModelConfig) -> None:
    """Raises ValueError if the layers cannot differ as the pattern of the config says."""
    for kind in config.layer_pattern:
        require(isinstance(kind, LayerKind),
                f"layer_pattern has an entry {kind!r}; expected entries of transformer_jax.config.LayerKind")
        require(config.positions == "rope" or (kind.use_rope and kind.rope_base is None and kind.rope_scaling is None),
                f"{kind} sets rotary positions, but the model has positions={config.positions!r}, not 'rope'")
        if kind.rope_scaling is not None:
            kind.rope_scaling.check_width(config.rope_layout.dim or cast(int, config.head_dim))
        require(kind.use_experts or config.moe is not None,
                f"{kind} has no experts, but neither has the model: moe is None")
        require(kind.use_rope or (kind.rope_base is None and kind.rope_scaling is None),
                f"{kind} does not rotate, so it has no rope_base and no rope_scaling")
    require(not config.layer_pattern or config.sliding_window is None,
            f"sliding_window={config.sliding_window} is for models whose layers are alike; with a layer_pattern, give "
            "each LayerKind its own sliding_window")


@functools.lru_cache(maxsize=256)
def config_of_kind(config: ModelConfig, kind: LayerKind) -> ModelConfig:
    """Returns the config of a model in which all layers are of one kind.

    Args:
      config: The config of the model.
      kind: The kind of layer.

    Returns:
      The config without a pattern.
    """
    rope = {} if kind.use_rope else {"positions": "none", "rope_scaling": RopeScaling(), "rope_layout": RopeLayout()}
    if kind.rope_base is not None:
        rope["rope_base"] = kind.rope_base
    if kind.rope_scaling is not None:
        rope["rope_scaling"] = kind.rope_scaling
    moe = config.moe if kind.use_experts else None
    return dataclasses.replace(config, layer_pattern=(), sliding_window=kind.sliding_window, moe=moe, **rope)
