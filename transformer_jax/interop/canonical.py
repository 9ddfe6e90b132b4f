"""One form of a config for all configs that a file of Hugging Face does not distinguish."""

from __future__ import annotations

import dataclasses

from transformer_jax.config import ModelConfig
from transformer_jax.interop.layer_kinds import with_canonical_layers


def as_files_tell(config: ModelConfig) -> ModelConfig:
    """Replaces redundant values of a config by one canonical form, so that configs can be compared.

    A file does not distinguish these values: an ``attention_dropout`` equal to ``dropout``, a
    ``use_qkv_bias``, ``use_mlp_bias`` or ``use_norm_bias`` equal to ``use_bias``, the
    ``use_norm_bias`` of a norm that never has a bias, the ``num_layers`` of an encoder-decoder, a
    width of experts equal to ``mlp_dim``, a width of values equal to that of the channels that are
    not rotated, how the only group of experts is scored, and the ``z_loss`` of experts, which
    matters only in training. A pattern of layers gets its shortest form.

    Args:
      config: our config.

    Returns:
      The config in its canonical form.
    """
    unset = [name for name in ("use_qkv_bias", "use_mlp_bias", "use_norm_bias")
             if getattr(config, name) == config.use_bias or (name == "use_norm_bias" and config.norm != "layernorm")]
    unset += ["attention_dropout"] * (config.attention_dropout == config.dropout)
    width = None if config.moe is None or config.moe.mlp_dim == config.mlp_dim else config.moe.mlp_dim
    moe = config.moe and dataclasses.replace(
        config.moe, z_loss=0.0, mlp_dim=width,
        experts_per_group_score=2 if config.moe.groups == 1 else config.moe.experts_per_group_score)
    latent = config.latent
    if latent is not None and latent.value_dim == latent.plain_width(config):
        latent = dataclasses.replace(latent, value_dim=None)
    num_layers = config.num_encoder_layers or config.num_layers
    return with_canonical_layers(dataclasses.replace(config, moe=moe, latent=latent, num_layers=num_layers,
                                                     **dict.fromkeys(unset)))
