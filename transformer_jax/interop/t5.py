"""The encoder-decoder families T5 and mT5: ``T5ForConditionalGeneration`` and
``MT5ForConditionalGeneration``.

T5 covers T5 of the paper (ReLU, tied embeddings), and T5 1.1 and Flan-T5 (gated GELU, a separate
unembedding). mT5 is T5 1.1 with other defaults. Attention scores are not scaled. The first layers of
the encoder and of the decoder hold the relative position bias for all their layers.
"""

from __future__ import annotations

import functools
from typing import Any

from transformer_jax.config import ModelConfig
from transformer_jax.interop.family import Family, read_targets, write_targets
from transformer_jax.interop.mapping import Weight, linear, norm
from transformer_jax.interop.setting import ACTIVATIONS, Setting, Settings, typed

# In transformers too, gated-gelu uses gelu_new for its gate.
_ACTIVATIONS = ACTIVATIONS | {"gated-gelu": "geglu", "gated-gelu_new": "geglu", "gated-gelu_pytorch_tanh": "geglu",
                              "gated-silu": "swiglu", "gated-swish": "swiglu"}


def _attention(ours: str, theirs: str) -> tuple[Weight, ...]:
    """Makes the rows for the four linear layers of attention."""
    return (*linear(f"{ours}.query", f"{theirs}.q"), *linear(f"{ours}.key", f"{theirs}.k"),
            *linear(f"{ours}.value", f"{theirs}.v"), *linear(f"{ours}.output", f"{theirs}.o"))


def _side(side: str, mlp: int) -> tuple[Weight, ...]:
    """Makes the rows for one side; ``mlp`` is the index of the feed-forward sub-layer in a
    layer."""
    block, layer = f"{side}.blocks", f"{side}.block.{{layer}}.layer"
    return (
        Weight(f"{side}.relative.table", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        *_attention(f"{block}.attention", f"{layer}.0.SelfAttention"),
        *norm(f"{block}.attention_norm", f"{layer}.0.layer_norm"),
        *_attention(f"{block}.cross_attention", f"{layer}.1.EncDecAttention"),
        *norm(f"{block}.cross_norm", f"{layer}.1.layer_norm"),
        *linear(f"{block}.mlp.gate", f"{layer}.{mlp}.DenseReluDense.wi_0"),
        Weight(f"{block}.mlp.up.kernel", f"{layer}.{mlp}.DenseReluDense.wi_1.weight", transposed=True,
               requires=f"{block}.mlp.gate.kernel"),
        *linear(f"{block}.mlp.up", f"{layer}.{mlp}.DenseReluDense.wi"),
        *linear(f"{block}.mlp.down", f"{layer}.{mlp}.DenseReluDense.wo"),
        *norm(f"{block}.mlp_norm", f"{layer}.{mlp}.layer_norm"),
        *norm(f"{side}_norm", f"{side}.final_layer_norm"),
    )


_WEIGHTS = (
    Weight("embeddings.token", "shared.weight",
           also=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")),
    *_side("encoder", 1),
    *_side("decoder", 2),
    Weight("embeddings.output", "lm_head.weight"),
)


def _settings(vocab_size: int, mlp_dim: int, layers: int, heads: int, activation: str) -> tuple[Setting, ...]:
    """Makes the settings of a family; the arguments are its defaults if config.json leaves them
    out."""
    return (
        Setting("vocab_size", "vocab_size", vocab_size),
        Setting("max_len", "n_positions", 512),
        Setting("model_dim", "d_model", 512),
        Setting("head_dim", "d_kv", 64),
        Setting("mlp_dim", "d_ff", mlp_dim),
        Setting("num_encoder_layers", "num_layers", layers),
        Setting("num_heads", "num_heads", heads),
        Setting("relative_buckets", "relative_attention_num_buckets", 32),
        Setting("relative_max_distance", "relative_attention_max_distance", 128),
        Setting("norm_epsilon", "layer_norm_epsilon", 1e-6),
        Setting("activation", "feed_forward_proj", activation, values=_ACTIVATIONS),
        Setting("dropout", "dropout_rate", 0.1),
    )


_FIXED = {"family": "encoder_decoder", "positions": "relative", "attention_scale": 1.0, "norm": "rmsnorm",
          "use_bias": False, "init_std": None}


def _read(layers: int, settings: Settings) -> dict[str, Any]:
    """Reads the layers of the decoder, the tied embeddings, and the start of a target; ``layers`` is
    the default of the layers of the encoder."""
    # T5 1.1 does not scale its logits. transformers recognises it by its untied unembedding. Since
    # version 5 it always writes that the unembedding is tied, and writes the scale separately.
    tied = typed(settings, "tie_word_embeddings", bool, True)
    own = typed(settings, "num_decoder_layers", int | None, None)
    start = {"decoder_start_token_id": settings.get("pad_token_id", 0)}
    return {"num_decoder_layers": typed(settings, "num_layers", int, layers) if own is None else own,
            "tie_embeddings": tied, "scale_logits": typed(settings, "scale_decoder_outputs", bool, tied),
            **read_targets(start | dict(settings))}


def _write(config: ModelConfig) -> dict[str, Any]:
    """Writes the layers of the decoder, the tied embeddings, and the start of a target."""
    settings: dict[str, Any] = {"num_decoder_layers": config.num_decoder_layers, "is_encoder_decoder": True,
                                "tie_word_embeddings": config.tie_embeddings}
    if config.scale_logits != config.tie_embeddings:
        settings["scale_decoder_outputs"] = config.scale_logits
    return settings | write_targets(config)


def _read_mt5(settings: Settings) -> dict[str, Any]:
    """Reads what ``_read`` does. The logits of mT5 are never scaled, also if they are tied."""
    return _read(8, settings) | {"scale_logits": False}


def _write_mt5(config: ModelConfig) -> dict[str, Any]:
    """Writes what ``_read_mt5`` reads."""
    return {name: value for name, value in _write(config).items() if name != "scale_decoder_outputs"}


_MORE: dict[str, Any] = {
    # Early files contain a cross-attention bias that was never used.
    "ignored": (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    # transformers stores models for classification under a prefix.
    "renames": ((r"^transformer\.(?=(shared|encoder|decoder)\.)", ""),)}
T5 = Family("t5", "T5ForConditionalGeneration", _WEIGHTS, _settings(32_128, 2048, 6, 8, "relu"), _FIXED,
            read=functools.partial(_read, 6), write=_write,
            tied_as_stored=lambda settings: "scale_decoder_outputs" in settings, **_MORE)
# transformers 5 writes that the unembedding is tied, whether it is or not.
MT5 = Family("mt5", "MT5ForConditionalGeneration", _WEIGHTS, _settings(250_112, 1024, 8, 6, "geglu"), _FIXED,
             read=_read_mt5, write=_write_mt5, tied_as_stored=lambda settings: True, **_MORE)
