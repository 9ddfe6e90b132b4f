"""The encoder families BERT, RoBERTa, XLM-RoBERTa and CamemBERT with their masked language modelling
heads: ``BertForMaskedLM``, ``RobertaForMaskedLM``, ``XLMRobertaForMaskedLM`` and
``CamembertForMaskedLM``.

RoBERTa uses other names for the head. Its positions start at the row after the id of the padding
token, so the first rows of the table are never used; we keep them (``position_offset``). The loader
ignores the pooler and BERT's head for next sentence prediction.
"""

from __future__ import annotations

import functools
from typing import Any

from transformer_jax.config import ModelConfig
from transformer_jax.interop.classifiers import Head, with_classifiers
from transformer_jax.interop.family import Family
from transformer_jax.interop.mapping import Weight, linear, norm
from transformer_jax.interop.setting import ACTIVATIONS, Setting, Settings, checked, translated, typed

_BLOCK = "stack.blocks"
# The tensor names of a model that was saved without its head have no prefix.
_WITHOUT_HEAD = r"^(?=(embeddings|encoder|pooler)\.)"


def _weights(prefix: str, head: str, transform: str, head_norm: str) -> tuple[Weight, ...]:
    """Makes the table of weights from the names that differ between the two families."""
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
        # If the unembedding is not tied, transformers 5 does not tie its bias either: it uses
        # decoder.bias, and the other bias may have any values. Version 4 stored only the other one.
        Weight("head.bias", f"{head}.decoder.bias", fallback=f"{head}.bias", requires="embeddings.output"),
        Weight("head.bias", f"{head}.bias", also=(f"{head}.decoder.bias",)),
        Weight("embeddings.output", unembedding),
    )


def _settings(vocab_size: int) -> tuple[Setting, ...]:
    """Makes the settings of a family; ``vocab_size`` is its default if config.json leaves it
    out."""
    return (
        Setting("vocab_size", "vocab_size", vocab_size),
        Setting("num_layers", "num_hidden_layers", 12),
        Setting("num_heads", "num_attention_heads", 12),
        Setting("model_dim", "hidden_size", 768),
        Setting("mlp_dim", "intermediate_size", 3072),
        Setting("num_token_types", "type_vocab_size", 2),
        Setting("activation", "hidden_act", "gelu", values=ACTIVATIONS),
        Setting("norm_epsilon", "layer_norm_eps", 1e-12),
        Setting("tie_embeddings", "tie_word_embeddings", True),
        Setting("dropout", "hidden_dropout_prob", 0.1),
        Setting("attention_dropout", "attention_probs_dropout_prob", 0.1),
        Setting("init_std", "initializer_range", 0.02),
    )


_CLASSIFIER = linear("head.output", "classifier")
_FIXED = {"family": "encoder", "positions": "learned", "norm_position": "post", "use_embedding_norm": True}
_REQUIRES = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


def _read(settings: Settings) -> dict[str, Any]:
    """Reads the number of positions and, for BERT, the activation of the head."""
    longest = typed(settings, "max_position_embeddings", int, 512)
    if settings["model_type"] == "bert":
        activation = translated(settings.get("hidden_act", "gelu"), ACTIVATIONS, "hidden_act")
        return {"max_len": longest, "head_activation": activation}
    # The head of RoBERTa always uses GELU. Its positions start after the row of the padding token.
    offset = 1 + checked(settings.get("pad_token_id", 1), int, "pad_token_id")
    if not 0 < offset < longest:
        raise ValueError(f"pad_token_id={offset - 1} leaves no position: expected 0 or more, and below "
                         f"max_position_embeddings={longest} less 1")
    return {"max_len": longest - offset, "position_offset": offset}


def _write(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """Writes the number of positions and, for RoBERTa, the id of the padding token."""
    is_bert = model_type == "bert"
    if (config.position_offset == 0) != is_bert:
        raise ValueError(f"position_offset={config.position_offset} (expected {'0' if is_bert else '1 or more'})")
    if not config.num_token_types:
        raise ValueError("num_token_types=0 (expected 1 or more)")
    settings: dict[str, Any] = {"max_position_embeddings": config.max_len + config.position_offset}
    return settings | ({} if is_bert else {"pad_token_id": config.position_offset - 1})


BERT_SETTINGS = _settings(30_522)
BERT = with_classifiers(Family(
    "bert", "BertForMaskedLM",
    _weights("bert", "cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    BERT_SETTINGS, _FIXED, _REQUIRES, _read, functools.partial(_write, "bert"),
    ignored=(r"bert\.pooler\..*", r"cls\.seq_relationship\..*", r"bert\.embeddings\.(position|token_type)_ids"),
    # Files from 2018 call the scale and bias of a norm gamma and beta.
    renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"),
             (_WITHOUT_HEAD, "bert."))),
    texts=Head((*linear("head.hidden", "bert.pooler.dense"), *_CLASSIFIER), "tanh"), tokens=Head(_CLASSIFIER))

# XLM-RoBERTa and CamemBERT are RoBERTa with other tokenizers.
ROBERTA, XLM_ROBERTA, CAMEMBERT = (with_classifiers(Family(
    model_type, f"{name}ForMaskedLM",
    _weights("roberta", "lm_head", "lm_head.dense", "lm_head.layer_norm"),
    _settings(50_265), _FIXED, _REQUIRES, _read, functools.partial(_write, model_type),
    ignored=(r"roberta\.pooler\..*", r"roberta\.embeddings\.(position|token_type)_ids"),
    renames=((_WITHOUT_HEAD, "roberta."),)),
    texts=Head((*linear("head.hidden", "classifier.dense"), *linear("head.output", "classifier.out_proj")), "tanh"),
    tokens=Head(_CLASSIFIER)) for model_type, name in (
        ("roberta", "Roberta"), ("xlm-roberta", "XLMRoberta"), ("camembert", "Camembert")))
