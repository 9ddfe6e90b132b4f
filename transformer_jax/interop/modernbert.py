"""The encoder family ModernBERT: ``ModernBertForMaskedLM``.

Its layers alternate between attention to all tokens and to a window on both sides, which rotate
with different bases. The first layer has no norm before its attention. The classifiers have the
same hidden layer with a norm as the head that predicts masked tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformer_jax.config import LayerKind, ModelConfig
from transformer_jax.interop.classifiers import Head, with_classifiers
from transformer_jax.interop.family import Family
from transformer_jax.interop.layer_kinds import FULL, SLIDING, layer_types, layers_of, read_kinds
from transformer_jax.interop.mapping import Weight, linear, norm
from transformer_jax.interop.nested_rope import read_nested_rope, write_nested_rope
from transformer_jax.interop.setting import ACTIVATIONS, Setting, Settings, require_settings, translated, typed

_BLOCK, _LAYER = "stack.blocks", "model.layers.{layer}"
_BASES = {FULL: 160_000.0, SLIDING: 10_000.0}
_NAMES = {FULL: "global_rope_theta", SLIDING: "local_rope_theta"}
_GATED = {"gelu": "geglu_erf", "gelu_python": "geglu_erf", "gelu_new": "geglu", "gelu_pytorch_tanh": "geglu",
          "gelu_fast": "geglu", "silu": "swiglu", "swish": "swiglu"}


def _joined(ours: str, theirs: str, part: int, count: int) -> tuple[Weight, ...]:
    """Makes the rows of a linear map that is one of several equal parts of a larger one."""
    return tuple(dataclasses.replace(row, part=(part, count)) for row in linear(ours, theirs))


def _attention_norm() -> tuple[Weight, ...]:
    """Makes the rows of the norm before attention, which the first layer does not have."""
    scale, bias = norm(f"{_BLOCK}.attention_norm", f"{_LAYER}.attn_norm")
    return (dataclasses.replace(scale, first_layer=1, default=1.0),
            dataclasses.replace(bias, first_layer=1, default=0.0))


_WEIGHTS = (
    Weight("embeddings.token", "model.embeddings.tok_embeddings.weight", also=("decoder.weight",)),
    *norm("embeddings.norm", "model.embeddings.norm"),
    *_attention_norm(),
    *(row for part, name in enumerate(("query", "key", "value"))
      for row in _joined(f"{_BLOCK}.attention.{name}", f"{_LAYER}.attn.Wqkv", part, 3)),
    *linear(f"{_BLOCK}.attention.output", f"{_LAYER}.attn.Wo"),
    *norm(f"{_BLOCK}.mlp_norm", f"{_LAYER}.mlp_norm"),
    *_joined(f"{_BLOCK}.mlp.gate", f"{_LAYER}.mlp.Wi", 0, 2),
    *_joined(f"{_BLOCK}.mlp.up", f"{_LAYER}.mlp.Wi", 1, 2),
    *linear(f"{_BLOCK}.mlp.down", f"{_LAYER}.mlp.Wo"),
    *norm("final_norm", "model.final_norm"),
    *linear("head.transform", "head.dense"), *norm("head.norm", "head.norm"),
    Weight("head.bias", "decoder.bias"), Weight("embeddings.output", "decoder.weight"),
)
_SETTINGS = (
    Setting("vocab_size", "vocab_size", 50_368),
    Setting("max_len", "max_position_embeddings", 8192),
    Setting("num_layers", "num_hidden_layers", 22),
    Setting("num_heads", "num_attention_heads", 12),
    Setting("model_dim", "hidden_size", 768),
    Setting("mlp_dim", "intermediate_size", 1152),
    Setting("activation", "hidden_activation", "geglu_erf", values=_GATED),
    Setting("use_bias", "attention_bias", False, also=("classifier_bias",)),
    Setting("norm_epsilon", "norm_eps", 1e-5),
    Setting("tie_embeddings", "tie_word_embeddings", True),
    Setting("dropout", "mlp_dropout", 0.0, also=("embedding_dropout",)),
    Setting("attention_dropout", "attention_dropout", 0.0),
    Setting("init_std", "initializer_range", 0.02),
)


def _read(settings: Settings) -> dict[str, Any]:
    """Reads the kinds of layers, their rotary positions, the biases and the activation of the
    head."""
    settings = {"num_hidden_layers": 22, "classifier_bias": False} | dict(settings)
    bias = typed(settings, "attention_bias", bool, False)
    require_settings(settings, {"decoder_bias": True, "classifier_bias": bias, "rope_scaling": None})
    every = typed(settings, "global_attn_every_n_layers", int, 3)
    if not 1 <= every <= 100:
        raise ValueError(f"global_attn_every_n_layers={every}: expected a number from 1 to 100")
    width = typed(settings, "local_attention", int, 128)
    ropes = read_nested_rope(settings, _BASES, _NAMES)
    kinds = {FULL: LayerKind(), SLIDING: LayerKind(1 + width // 2, **ropes[SLIDING])}
    activation = translated(settings.get("classifier_activation", "gelu"), ACTIVATIONS, "classifier_activation")
    return {**ropes[FULL], **read_kinds(layer_types(settings, (FULL,) + (SLIDING,) * (every - 1)), kinds),
            "use_mlp_bias": typed(settings, "mlp_bias", bool, False),
            "use_norm_bias": typed(settings, "norm_bias", bool, False), "head_activation": activation}


def _write(config: ModelConfig) -> dict[str, Any]:
    """Writes what ``_read`` reads."""
    windows = [layer.sliding_window for layer in layers_of(config)]
    rope = write_nested_rope(config, _BASES, _NAMES)
    del rope["rope_scaling"]  # transformers would use it for both kinds of layers
    biases = {"mlp_bias": config.use_mlp_bias, "norm_bias": config.use_norm_bias}
    settings = rope | {name: config.use_bias if value is None else value for name, value in biases.items()} | {
        "layer_types": [FULL if window is None else SLIDING for window in windows], "decoder_bias": True,
        "classifier_activation": next(name for name, ours in ACTIVATIONS.items() if ours == config.head_activation)}
    if (window := next((window for window in windows if window is not None), None)) is not None:
        settings["local_attention"] = 2 * (window - 1)
    # Versions before transformers 5 know only patterns that begin with the layer without a window.
    every = next((layer for layer, window in enumerate(windows) if layer and window is None), len(windows))
    if all((window is None) == (layer % every == 0) for layer, window in enumerate(windows)):
        settings["global_attn_every_n_layers"] = every
    return settings


_CLASSIFIER = Head((*linear("head.hidden", "head.dense"), *norm("head.norm", "head.norm"),
                    *linear("head.output", "classifier")), None, ("classifier_dropout", 0.0), use_norm=True,
                   activation_setting="classifier_activation")
MODERNBERT = with_classifiers(
    Family("modernbert", "ModernBertForMaskedLM", _WEIGHTS, _SETTINGS,
           fixed={"family": "encoder", "positions": "rope", "use_embedding_norm": True, "use_first_norm": False},
           read=_read, write=_write,
           # The tensor names of a model that was saved without its head have no prefix.
           renames=((r"^(?=(embeddings|layers|final_norm)\.)", "model."),)),
    texts=dataclasses.replace(_CLASSIFIER, pooling_setting="classifier_pooling"), tokens=_CLASSIFIER)
