"""Encoders in BERT's form, with their masked language modelling head: ``BertForMaskedLM``,
``RobertaForMaskedLM``.

RoBERTa names the head otherwise and counts positions from the row after that of its padding token:
rows of the table that are never looked up, and kept (``position_offset``). What was trained beside
the model, a pooler and BERT's head for the next sentence, is left out.
"""

from __future__ import annotations

import functools
from typing import Any

from transformer_jax.config import ModelConfig
from transformer_jax.interop.family import Family, Setting, Settings
from transformer_jax.interop.mapping import Weight, linear, norm

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
        # Where the unembedding is not tied, transformers 5 does not tie its bias either, and adds
        # this one.
        Weight("head.bias", f"{head}.decoder.bias", also=(f"{head}.bias",), beside="embeddings.output"),
        Weight("head.bias", f"{head}.bias", also=(f"{head}.decoder.bias",)),
        Weight("embeddings.output", unembedding),
    )


def _settings(vocab_size: int) -> tuple[Setting, ...]:
    """The settings of a family, which has so many tokens where its config.json does not say."""
    return (
        Setting("vocab_size", "vocab_size", vocab_size),
        Setting("num_layers", "num_hidden_layers", 12),
        Setting("num_heads", "num_attention_heads", 12),
        Setting("model_dim", "hidden_size", 768),
        Setting("mlp_dim", "intermediate_size", 3072),
        Setting("num_token_types", "type_vocab_size", 2),
        Setting("norm_epsilon", "layer_norm_eps", 1e-12),
        Setting("tie_embeddings", "tie_word_embeddings", True),
        Setting("dropout", "hidden_dropout_prob", 0.1),
        Setting("attention_dropout", "attention_probs_dropout_prob", 0.1),
        Setting("init_std", "initializer_range", 0.02),
    )


_FIXED = {"family": "encoder", "positions": "learned", "norm_position": "post", "activation": "gelu",
          "use_embedding_norm": True}
_REQUIRES = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False,
             "add_cross_attention": False}


def _read(settings: Settings) -> dict[str, Any]:
    offset = settings.get("pad_token_id", 1) + 1 if settings["model_type"] == "roberta" else 0
    return {"position_offset": offset, "max_len": settings.get("max_position_embeddings", 512) - offset}


def _write(model_type: str, config: ModelConfig) -> dict[str, Any]:
    if (config.position_offset > 0) != (model_type == "roberta"):
        raise ValueError(f"position_offset={config.position_offset} (expected 0 in bert, 1 or more in roberta)")
    if not config.num_token_types:
        raise ValueError("num_token_types=0 (expected 1 or more)")
    settings = {"max_position_embeddings": config.max_len + config.position_offset, "hidden_act": "gelu"}
    return settings | ({"pad_token_id": config.position_offset - 1} if model_type == "roberta" else {})


BERT = Family(
    "bert", "BertForMaskedLM",
    _weights("bert", "cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    _settings(30_522), _FIXED, _REQUIRES, _read, functools.partial(_write, "bert"),
    ignored=(r"bert\.pooler\..*", r"cls\.seq_relationship\..*", r"bert\.embeddings\.position_ids"),
    # The files of 2018 name a norm's weights by the letters of the paper.
    renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")))

ROBERTA = Family(
    "roberta", "RobertaForMaskedLM",
    _weights("roberta", "lm_head", "lm_head.dense", "lm_head.layer_norm"),
    _settings(50_265), _FIXED, _REQUIRES, _read, functools.partial(_write, "roberta"),
    ignored=(r"roberta\.pooler\..*", r"roberta\.embeddings\.position_ids"))
