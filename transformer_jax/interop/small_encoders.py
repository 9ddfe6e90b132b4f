"""The encoder families DistilBERT, ELECTRA and ALBERT: ``DistilBertForMaskedLM``,
``ElectraForMaskedLM`` (the generator), ``ElectraForPreTraining`` (the discriminator) and
``AlbertForMaskedLM``.

The embeddings of ELECTRA and ALBERT may be narrower than the hidden states. The layers of ALBERT
share their weights.
"""

from __future__ import annotations

from typing import Any

from transformer_jax.config import ModelConfig
from transformer_jax.interop.bert import BERT_SETTINGS
from transformer_jax.interop.classifiers import Head, with_classifiers
from transformer_jax.interop.family import Family
from transformer_jax.interop.mapping import Weight, linear, norm
from transformer_jax.interop.setting import ACTIVATIONS, Setting, Settings, checked, require_settings, translated, typed

_BLOCK = "stack.blocks"
_FIXED = {"family": "encoder", "positions": "learned", "norm_position": "post", "use_embedding_norm": True}
_REQUIRES = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
_CLASSIFIER = linear("head.output", "classifier")


def _embeddings(prefix: str, unembedding: str) -> tuple[Weight, ...]:
    """Makes the rows of the embeddings."""
    name = f"{prefix}.embeddings"
    return (Weight("embeddings.token", f"{name}.word_embeddings.weight", also=(unembedding,)),
            Weight("embeddings.position", f"{name}.position_embeddings.weight"),
            Weight("embeddings.token_type", f"{name}.token_type_embeddings.weight"),
            *norm("embeddings.norm", f"{name}.LayerNorm"), Weight("embeddings.output", unembedding))


def _layer(layer: str, query: str, key: str, value: str, output: str, attention_norm: str, up: str, down: str,
           mlp_norm: str) -> tuple[Weight, ...]:
    """Makes the rows of a layer from the names of its parts."""
    maps = {"attention.query": query, "attention.key": key, "attention.value": value, "attention.output": output,
            "mlp.up": up, "mlp.down": down}
    norms = {"attention_norm": attention_norm, "mlp_norm": mlp_norm}
    return (*(row for ours, theirs in maps.items() for row in linear(f"{_BLOCK}.{ours}", f"{layer}.{theirs}")),
            *(row for ours, theirs in norms.items() for row in norm(f"{_BLOCK}.{ours}", f"{layer}.{theirs}")))


def _head_activation(settings: Settings, name: str, default: str) -> dict[str, Any]:
    """Reads the activation of the model as that of its head."""
    return {"head_activation": translated(settings.get(name, default), ACTIVATIONS, name)}


DISTILBERT = with_classifiers(Family(
    "distilbert", "DistilBertForMaskedLM",
    (*_embeddings("distilbert", "vocab_projector.weight"),
     *_layer("distilbert.transformer.layer.{layer}", "attention.q_lin", "attention.k_lin", "attention.v_lin",
             "attention.out_lin", "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"),
     *linear("head.transform", "vocab_transform"), *norm("head.norm", "vocab_layer_norm"),
     Weight("head.bias", "vocab_projector.bias")),
    (Setting("vocab_size", "vocab_size", 30_522), Setting("max_len", "max_position_embeddings", 512),
     Setting("num_layers", "n_layers", 6), Setting("num_heads", "n_heads", 12), Setting("model_dim", "dim", 768),
     Setting("mlp_dim", "hidden_dim", 3072), Setting("activation", "activation", "gelu", values=ACTIVATIONS),
     Setting("tie_embeddings", "tie_word_embeddings", True), Setting("dropout", "dropout", 0.1),
     Setting("attention_dropout", "attention_dropout", 0.1), Setting("init_std", "initializer_range", 0.02)),
    {**_FIXED, "norm_epsilon": 1e-12}, read=lambda settings: _head_activation(settings, "activation", "gelu"),
    ignored=(r"distilbert\.embeddings\.position_ids",),
    # The tensor names of a model that was saved without its head have no prefix.
    renames=((r"^(?=(embeddings|transformer)\.)", "distilbert."),)),
    texts=Head((*linear("head.hidden", "pre_classifier"), *_CLASSIFIER), "relu", ("seq_classif_dropout", 0.2)),
    tokens=Head(_CLASSIFIER, dropout=None))


def _read_electra(settings: Settings) -> dict[str, Any]:
    """Reads the widths of ELECTRA. The head of its generator always uses GELU."""
    return {"embedding_dim": typed(settings, "embedding_size", int, 128), "head_activation": "gelu"}


def _write_electra(config: ModelConfig) -> dict[str, Any]:
    """Writes the width of the embeddings."""
    if not config.num_token_types:
        raise ValueError("num_token_types=0 (expected 1 or more)")
    return {"embedding_size": config.embedding_dim}


ELECTRA = with_classifiers(Family(
    "electra", "ElectraForMaskedLM",
    (*_embeddings("electra", "generator_lm_head.weight"),
     *linear("embeddings.projection", "electra.embeddings_project"),
     *_layer("electra.encoder.layer.{layer}", "attention.self.query", "attention.self.key", "attention.self.value",
             "attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense",
             "output.LayerNorm"),
     *linear("head.transform", "generator_predictions.dense"), *norm("head.norm", "generator_predictions.LayerNorm"),
     Weight("head.bias", "generator_lm_head.bias")),
    (Setting("max_len", "max_position_embeddings", 512),
     *(row for row in BERT_SETTINGS if row.ours not in ("model_dim", "num_heads", "mlp_dim")),
     Setting("model_dim", "hidden_size", 256), Setting("num_heads", "num_attention_heads", 4),
     Setting("mlp_dim", "intermediate_size", 1024)),
    _FIXED, _REQUIRES, _read_electra, _write_electra, ignored=(r"electra\.embeddings\.(position|token_type)_ids",),
    renames=((r"^(?=(embeddings|embeddings_project|encoder)\.)", "electra."),)),
    texts=Head((*linear("head.hidden", "classifier.dense"), *linear("head.output", "classifier.out_proj")), "gelu"),
    tokens=Head(_CLASSIFIER),
    replaced=Head((*linear("head.hidden", "discriminator_predictions.dense"),
                   *linear("head.output", "discriminator_predictions.dense_prediction")), None, None, ("replaced",)))


def _read_albert(settings: Settings) -> dict[str, Any]:
    """Reads the widths of ALBERT and the activation of its head."""
    require_settings(settings, {"num_hidden_groups": 1, "inner_group_num": 1})
    width = checked(settings.get("embedding_size", 128), int, "embedding_size")
    if width == typed(settings, "hidden_size", int, 4096):
        raise ValueError(f"embedding_size={width} equals hidden_size; an ALBERT with a linear map between the two is "
                         "supported only if they differ")
    return {"embedding_dim": width, **_head_activation(settings, "hidden_act", "gelu_new")}


def _write_albert(config: ModelConfig) -> dict[str, Any]:
    """Writes the width of the embeddings, and that there is one group of layers."""
    if config.embedding_dim == config.model_dim:
        raise ValueError(f"model_dim={config.model_dim} equals embedding_dim={config.embedding_dim} (expected another "
                         "width)")
    return _write_electra(config) | {"num_hidden_groups": 1, "inner_group_num": 1}


_DROPOUT = ("classifier_dropout_prob", 0.1)
ALBERT = with_classifiers(Family(
    "albert", "AlbertForMaskedLM",
    (*_embeddings("albert", "predictions.decoder.weight"),
     *linear("embeddings.projection", "albert.encoder.embedding_hidden_mapping_in"),
     # Our one layer stands for all layers, and is the one layer of the only group of ALBERT.
     *_layer("albert.encoder.albert_layer_groups.{layer}.albert_layers.0", "attention.query", "attention.key",
             "attention.value", "attention.dense", "attention.LayerNorm", "ffn", "ffn_output",
             "full_layer_layer_norm"),
     *linear("head.transform", "predictions.dense"), *norm("head.norm", "predictions.LayerNorm"),
     Weight("head.bias", "predictions.bias", also=("predictions.decoder.bias",))),
    (Setting("vocab_size", "vocab_size", 30_000), Setting("max_len", "max_position_embeddings", 512),
     Setting("num_layers", "num_hidden_layers", 12), Setting("num_heads", "num_attention_heads", 64),
     Setting("model_dim", "hidden_size", 4096), Setting("mlp_dim", "intermediate_size", 16_384),
     Setting("activation", "hidden_act", "gelu_tanh", values=ACTIVATIONS),
     Setting("dropout", "hidden_dropout_prob", 0.0), Setting("attention_dropout", "attention_probs_dropout_prob", 0.0),
     *(row for row in BERT_SETTINGS if row.ours in ("num_token_types", "norm_epsilon", "tie_embeddings", "init_std"))),
    {**_FIXED, "shared_layers": True}, _REQUIRES, _read_albert, _write_albert,
    ignored=(r"albert\.pooler\..*", r"sop_classifier\..*", r"albert\.embeddings\.(position|token_type)_ids"),
    renames=((r"^(?=(embeddings|encoder|pooler)\.)", "albert."),)),
    texts=Head((*linear("head.hidden", "albert.pooler"), *_CLASSIFIER), "tanh", _DROPOUT),
    tokens=Head(_CLASSIFIER, "none", _DROPOUT))
