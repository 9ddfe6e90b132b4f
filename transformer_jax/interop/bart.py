"""Encoder-decoders in BART's form: BART, mBART, Marian and Pegasus, which share all names.

BART and Marian have their norms after each sub-layer, mBART and Pegasus before. BART and mBART
learn positions (for each side, from row 2 of a table on) and norm their embeddings; Marian and
Pegasus have sinusoids, sines before cosines.
"""

from __future__ import annotations

import functools
from typing import Any

from transformer_jax.config import ModelConfig
from transformer_jax.interop.family import (
    Family,
    Setting,
    Settings,
    read_targets,
    require_settings,
    write_targets,
)
from transformer_jax.interop.mapping import Weight, linear, norm

_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "swish": "silu", "silu": "silu", "gelu_new": "gelu_tanh"}


def _attention(ours: str, theirs: str) -> tuple[Weight, ...]:
    return (*linear(f"{ours}.query", f"{theirs}.q_proj"), *linear(f"{ours}.key", f"{theirs}.k_proj"),
            *linear(f"{ours}.value", f"{theirs}.v_proj"), *linear(f"{ours}.output", f"{theirs}.out_proj"))


def _side(side: str, embeddings: str) -> tuple[Weight, ...]:
    block, layer = f"{side}.blocks", f"model.{side}.layers.{{layer}}"
    return (
        Weight(f"{embeddings}.position", f"model.{side}.embed_positions.weight"),
        *norm(f"{embeddings}.norm", f"model.{side}.layernorm_embedding"),
        *_attention(f"{block}.attention", f"{layer}.self_attn"),
        *norm(f"{block}.attention_norm", f"{layer}.self_attn_layer_norm"),
        *_attention(f"{block}.cross_attention", f"{layer}.encoder_attn"),
        *norm(f"{block}.cross_norm", f"{layer}.encoder_attn_layer_norm"),
        *linear(f"{block}.mlp.up", f"{layer}.fc1"),
        *linear(f"{block}.mlp.down", f"{layer}.fc2"),
        *norm(f"{block}.mlp_norm", f"{layer}.final_layer_norm"),
        *norm(f"{side}_norm", f"model.{side}.layer_norm"),
    )


_WEIGHTS = (
    Weight("embeddings.token", "model.shared.weight",
           also=("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")),
    *_side("encoder", "embeddings"),
    *_side("decoder", "target_embeddings"),
    Weight("embeddings.output_bias", "final_logits_bias", is_row=True),
    Weight("embeddings.output", "lm_head.weight"),
)

def _settings(vocab_size: int) -> tuple[Setting, ...]:
    """The settings of a family, which has so many tokens where its config.json does not say."""
    return (
        Setting("vocab_size", "vocab_size", vocab_size),
        Setting("max_len", "max_position_embeddings", 1024),
        Setting("num_encoder_layers", "encoder_layers", 12),
        Setting("num_decoder_layers", "decoder_layers", 12),
        Setting("num_heads", "encoder_attention_heads", 16, also=("decoder_attention_heads",)),
        Setting("model_dim", "d_model", 1024),
        Setting("mlp_dim", "encoder_ffn_dim", 4096, also=("decoder_ffn_dim",)),
        Setting("activation", "activation_function", "gelu", values=_ACTIVATIONS),
        Setting("scale_embeddings", "scale_embedding", False),
        Setting("tie_embeddings", "tie_word_embeddings", True),
        Setting("dropout", "dropout", 0.1),
        Setting("attention_dropout", "attention_dropout", 0.0),
        Setting("init_std", "init_std", 0.02),
    )


def _read(vocab_size: int, start: int | None, settings: Settings) -> dict[str, Any]:
    """The start of a target, and checks of what both sides share.

    Args:
      vocab_size: where a config.json does not say.
      start: likewise, the token that starts a target.
      settings: theirs.
    """
    vocab_size = settings.get("vocab_size", vocab_size)
    require_settings(settings, {"decoder_attention_heads": settings.get("encoder_attention_heads", 16),
                                "decoder_ffn_dim": settings.get("encoder_ffn_dim", 4096)})
    if (settings.get("decoder_vocab_size") or vocab_size) != vocab_size:
        raise ValueError(f"this {settings['model_type']} model has {vocab_size} tokens for sources and "
                         f"{settings['decoder_vocab_size']} for targets; here both share a vocabulary")
    return read_targets({"decoder_start_token_id": start} | dict(settings))


def _write(model_type: str, config: ModelConfig) -> dict[str, Any]:
    if not config.tie_embeddings:
        raise ValueError("tie_embeddings=False (expected True)")
    # Their padding is a row of the table; Marian's is what starts its targets.
    padding = {"pad_token_id": config.start_ids[0]} if model_type == "marian" and config.start_ids else {}
    return padding | {"is_encoder_decoder": True} | write_targets(config)


_LEARNED = {"positions": "learned", "position_offset": 2, "use_embedding_norm": True}
_SINUSOIDS = {"positions": "sinusoidal_halves"}

# The last two are what a config.json that does not say means: tokens, and the start of a target.
BART, MBART, MARIAN, PEGASUS = (
    Family(model_type, architecture, _WEIGHTS, _settings(vocab_size),
           fixed={"family": "encoder_decoder", "norm_position": norm_position, "use_output_bias": True} | positions,
           requires={"share_encoder_decoder_embeddings": True, "normalize_embedding": True,
                     "static_position_embeddings": False, "is_decoder": False},
           read=functools.partial(_read, vocab_size, start), write=functools.partial(_write, model_type),
           # Sinusoids are no weights, yet some files have them.
           ignored=() if positions is _LEARNED else (r"model\.(encoder|decoder)\.embed_positions\.weight",))
    for model_type, architecture, norm_position, positions, vocab_size, start in (
        ("bart", "BartForConditionalGeneration", "post", _LEARNED, 50_265, 2),
        ("mbart", "MBartForConditionalGeneration", "pre", _LEARNED, 50_265, None),
        ("marian", "MarianMTModel", "post", _SINUSOIDS, 58_101, 58_100),
        ("pegasus", "PegasusForConditionalGeneration", "pre", _SINUSOIDS, 50_265, 0)))
