"""Encoders in BERT's form, with their masked language modelling head: ``BertForMaskedLM``, ``RobertaForMaskedLM``.

RoBERTa names the head otherwise and counts positions from the row after that of its padding token: rows of the table
that are never looked up, and kept (``position_offset``). What was trained beside the model, a pooler and BERT's head
for the next sentence, is left out.
"""

from __future__ import annotations

import functools
from typing import Any

from transformer_jax.config import ModelConfig
from transformer_jax.interop.mapping import Family, Settings, Weight, linear, norm, require_config, require_settings

_BLOCK = "stack.blocks"


def _weights(prefix: str, head: str, transform: str, head_norm: str) -> tuple[Weight, ...]:
    embeddings, layer = f"{prefix}.embeddings", f"{prefix}.encoder.layer.{{layer}}"
    unembedding = f"{head}.decoder.weight"
    return (
        Weight("embeddings.token", f"{embeddings}.word_embeddings.weight", also=(unembedding,)),
        Weight("embeddings.position", f"{embeddings}.position_embeddings.weight"),
        Weight("embeddings.token_type", f"{embeddings}.token_type_embeddings.weight"),
        *norm("embeddings.norm", f"{embeddings}.LayerNorm"),
        *linear(f"{_BLOCK}.attention.query", f"{layer}.attention.self.query"),
        *linear(f"{_BLOCK}.attention.key", f"{layer}.attention.self.key"),
        *linear(f"{_BLOCK}.attention.value", f"{layer}.attention.self.value"),
        *linear(f"{_BLOCK}.attention.output", f"{layer}.attention.output.dense"),
        *norm(f"{_BLOCK}.attention_norm", f"{layer}.attention.output.LayerNorm"),
        *linear(f"{_BLOCK}.mlp.up", f"{layer}.intermediate.dense"),
        *linear(f"{_BLOCK}.mlp.down", f"{layer}.output.dense"),
        *norm(f"{_BLOCK}.mlp_norm", f"{layer}.output.LayerNorm"),
        *linear("head.transform", transform),
        *norm("head.norm", head_norm),
        # Where the unembedding is not tied, transformers 5 does not tie its bias either, and adds this one.
        Weight("head.bias", f"{head}.decoder.bias", also=(f"{head}.bias",), beside="embeddings.output"),
        Weight("head.bias", f"{head}.bias", also=(f"{head}.decoder.bias",)),
        Weight("embeddings.output", unembedding),
    )


# What a config.json that does not say means by it.
_DEFAULTS = {
    "bert": {"vocab_size": 30_522, "pad_token_id": 0},
    "roberta": {"vocab_size": 50_265, "pad_token_id": 1},
}


def _read_config(settings: Settings) -> ModelConfig:
    model_type = settings["model_type"]
    require_settings(settings, {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False,
                                "add_cross_attention": False})
    settings = _DEFAULTS[model_type] | dict(settings)
    offset = settings["pad_token_id"] + 1 if model_type == "roberta" else 0
    dropout = settings.get("hidden_dropout_prob", 0.1)
    attention_dropout = settings.get("attention_probs_dropout_prob", 0.1)
    return ModelConfig(
        family="encoder", vocab_size=settings["vocab_size"],
        max_len=settings.get("max_position_embeddings", 512) - offset, position_offset=offset,
        num_layers=settings.get("num_hidden_layers", 12), num_heads=settings.get("num_attention_heads", 12),
        model_dim=settings.get("hidden_size", 768), mlp_dim=settings.get("intermediate_size", 3072),
        num_token_types=settings.get("type_vocab_size", 2), positions="learned", norm_position="post",
        norm_epsilon=settings.get("layer_norm_eps", 1e-12), activation="gelu", use_embedding_norm=True,
        tie_embeddings=settings.get("tie_word_embeddings", True), dropout=dropout,
        attention_dropout=None if attention_dropout == dropout else attention_dropout,
        init_std=settings.get("initializer_range", 0.02))


def _write_config(model_type: str, config: ModelConfig) -> dict[str, Any]:
    require_config(model_type, config, {
        "family": "encoder", "positions": "learned", "norm": "layernorm", "norm_position": "post",
        "activation": "gelu", "use_bias": True, "use_qkv_bias": None, "use_embedding_norm": True, "use_qk_norm": False,
        "num_kv_heads": config.num_heads, "head_dim": config.model_dim // config.num_heads, "attention_scale": None,
        "scale_embeddings": False, "scale_logits": False, "sliding_window": None})
    if (config.position_offset > 0) != (model_type == "roberta"):
        raise ValueError(f"{model_type}: position_offset={config.position_offset} (expected 0 in bert, 1 or more in "
                         "roberta)")
    if not config.num_token_types:
        raise ValueError(f"{model_type}: num_token_types=0 (expected 1 or more)")
    settings = {
        "vocab_size": config.vocab_size, "max_position_embeddings": config.max_len + config.position_offset,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "hidden_size": config.model_dim, "intermediate_size": config.mlp_dim, "hidden_act": "gelu",
        "type_vocab_size": config.num_token_types, "layer_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings, "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": (config.dropout if config.attention_dropout is None
                                         else config.attention_dropout),
        "initializer_range": config.init_std or 0.02}
    if model_type == "roberta":
        settings["pad_token_id"] = config.position_offset - 1
    return settings


BERT = Family(
    "bert", "BertForMaskedLM",
    _weights("bert", "cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    _read_config, functools.partial(_write_config, "bert"),
    ignored=(r"bert\.pooler\..*", r"cls\.seq_relationship\..*", r"bert\.embeddings\.position_ids"),
    # The files of 2018 name a norm's weights by the letters of the paper.
    renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")))

ROBERTA = Family(
    "roberta", "RobertaForMaskedLM",
    _weights("roberta", "lm_head", "lm_head.dense", "lm_head.layer_norm"),
    _read_config, functools.partial(_write_config, "roberta"),
    ignored=(r"roberta\.pooler\..*", r"roberta\.embeddings\.position_ids"))
