"""Encoder-decoders in BART's form: BART, mBART, Marian and Pegasus, which share all names.

BART and Marian have their norms after each sub-layer, mBART and Pegasus before. BART and mBART learn positions (for
each side, from row 2 of a table on) and norm their embeddings; Marian and Pegasus have sinusoids, sines before cosines.
"""

from __future__ import annotations

import functools
from typing import Any

from transformer_jax.config import ModelConfig
from transformer_jax.interop.mapping import (
    Family,
    Settings,
    Weight,
    linear,
    norm,
    read_targets,
    require_config,
    require_settings,
    translated,
    write_targets,
)

_OFFSET = 2
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "gelu_new": "gelu_tanh"}


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

# In what the four differ; the start of a target is what a config.json that does not say means by it.
_FORMS = {
    "bart": {"norm_position": "post", "positions": "learned", "use_embedding_norm": True},
    "marian": {"norm_position": "post", "positions": "sinusoidal_halves", "use_embedding_norm": False},
    "mbart": {"norm_position": "pre", "positions": "learned", "use_embedding_norm": True},
    "pegasus": {"norm_position": "pre", "positions": "sinusoidal_halves", "use_embedding_norm": False},
}
_VOCABULARIES = {"bart": 50_265, "marian": 58_101, "mbart": 50_265, "pegasus": 50_265}
_STARTS = {"bart": 2, "marian": 58_100, "mbart": None, "pegasus": 0}


def _read_config(settings: Settings) -> ModelConfig:
    model_type = settings["model_type"]
    heads, mlp_dim = settings.get("encoder_attention_heads", 16), settings.get("encoder_ffn_dim", 4096)
    vocab_size = settings.get("vocab_size", _VOCABULARIES[model_type])
    # Here both sides have the same heads and widths, and one vocabulary.
    require_settings(settings, {"decoder_attention_heads": heads, "decoder_ffn_dim": mlp_dim,
                                "share_encoder_decoder_embeddings": True, "normalize_embedding": True,
                                "static_position_embeddings": False, "is_decoder": False})
    if (settings.get("decoder_vocab_size") or vocab_size) != vocab_size:
        raise ValueError(f"this {model_type} model has {vocab_size} tokens for sources and "
                         f"{settings['decoder_vocab_size']} for targets; here both share a vocabulary")
    form, dropout = _FORMS[model_type], settings.get("dropout", 0.1)
    attention_dropout = settings.get("attention_dropout", 0.0)
    return ModelConfig(
        family="encoder_decoder", vocab_size=vocab_size, max_len=settings.get("max_position_embeddings", 1024),
        position_offset=_OFFSET if form["positions"] == "learned" else 0,
        num_layers=settings.get("encoder_layers", 12), num_encoder_layers=settings.get("encoder_layers", 12),
        num_decoder_layers=settings.get("decoder_layers", 12), num_heads=heads,
        model_dim=settings.get("d_model", 1024), mlp_dim=mlp_dim,
        activation=translated(settings.get("activation_function", "gelu"), _ACTIVATIONS, "activation_function"),
        scale_embeddings=settings.get("scale_embedding", False),
        tie_embeddings=settings.get("tie_word_embeddings", True), use_output_bias=True,
        dropout=dropout, attention_dropout=None if attention_dropout == dropout else attention_dropout,
        init_std=settings.get("init_std", 0.02), **form,
        **read_targets({"decoder_start_token_id": _STARTS[model_type]} | dict(settings)))


def _write_config(model_type: str, config: ModelConfig) -> dict[str, Any]:
    form = _FORMS[model_type]
    require_config(model_type, config, {
        "family": "encoder_decoder", "norm": "layernorm", "norm_epsilon": 1e-5, "use_bias": True, "use_qkv_bias": None,
        "tie_embeddings": True, "use_qk_norm": False, "use_output_bias": True, "num_kv_heads": config.num_heads,
        "head_dim": config.model_dim // config.num_heads, "attention_scale": None, "scale_logits": False,
        "num_token_types": 0, "position_offset": _OFFSET if form["positions"] == "learned" else 0,
        "sliding_window": None} | form)
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    # Their padding is a row of the table; Marian's is what starts its targets.
    padding = {"pad_token_id": config.start_ids[0]} if model_type == "marian" and config.start_ids else {}
    return padding | {
        "vocab_size": config.vocab_size, "max_position_embeddings": config.max_len, "d_model": config.model_dim,
        "encoder_layers": config.num_encoder_layers, "decoder_layers": config.num_decoder_layers,
        "encoder_attention_heads": config.num_heads, "decoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.mlp_dim, "decoder_ffn_dim": config.mlp_dim,
        "activation_function": translated(config.activation, activations, f"{model_type}: activation"),
        "scale_embedding": config.scale_embeddings, "tie_word_embeddings": config.tie_embeddings,
        "dropout": config.dropout, "init_std": config.init_std or 0.02, "is_encoder_decoder": True,
        "attention_dropout": config.dropout if config.attention_dropout is None else config.attention_dropout,
    } | write_targets(config)


BART, MBART, MARIAN, PEGASUS = (
    Family(model_type, architecture, _WEIGHTS, _read_config, functools.partial(_write_config, model_type),
           # Sinusoids are no weights, yet some files have them.
           ignored=() if learned else (r"model\.(encoder|decoder)\.embed_positions\.weight",))
    for model_type, architecture, learned in (
        ("bart", "BartForConditionalGeneration", True), ("mbart", "MBartForConditionalGeneration", True),
        ("marian", "MarianMTModel", False), ("pegasus", "PegasusForConditionalGeneration", False)))
