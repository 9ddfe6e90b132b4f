"""T5: ``T5ForConditionalGeneration``, of the paper (ReLU, tied) and 1.1 and Flan (gated GELU, an
unembedding apart).

Attention is not scaled; the first layer of each side holds the bias of positions for all of them.
"""

from __future__ import annotations

from typing import Any

from transformer_jax.config import ModelConfig
from transformer_jax.interop.family import Family, Setting, Settings, read_targets, write_targets
from transformer_jax.interop.mapping import Weight, linear, norm

_ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu", "gelu": "gelu", "gelu_new": "gelu_tanh",
                "silu": "silu"}


def _attention(ours: str, theirs: str) -> tuple[Weight, ...]:
    return (*linear(f"{ours}.query", f"{theirs}.q"), *linear(f"{ours}.key", f"{theirs}.k"),
            *linear(f"{ours}.value", f"{theirs}.v"), *linear(f"{ours}.output", f"{theirs}.o"))


def _side(side: str, mlp: int) -> tuple[Weight, ...]:
    """A side's layers, of which ``mlp`` is the sub-layer that is the feed-forward one."""
    block, layer = f"{side}.blocks", f"{side}.block.{{layer}}.layer"
    return (
        Weight(f"{side}.relative.table", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        *_attention(f"{block}.attention", f"{layer}.0.SelfAttention"),
        *norm(f"{block}.attention_norm", f"{layer}.0.layer_norm"),
        *_attention(f"{block}.cross_attention", f"{layer}.1.EncDecAttention"),
        *norm(f"{block}.cross_norm", f"{layer}.1.layer_norm"),
        *linear(f"{block}.mlp.gate", f"{layer}.{mlp}.DenseReluDense.wi_0"),
        Weight(f"{block}.mlp.up.kernel", f"{layer}.{mlp}.DenseReluDense.wi_1.weight", transposed=True,
               beside=f"{block}.mlp.gate.kernel"),
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


_SETTINGS = (
    Setting("vocab_size", "vocab_size", 32_128),
    Setting("max_len", "n_positions", 512),
    Setting("model_dim", "d_model", 512),
    Setting("head_dim", "d_kv", 64),
    Setting("mlp_dim", "d_ff", 2048),
    Setting("num_encoder_layers", "num_layers", 6),
    Setting("num_heads", "num_heads", 8),
    Setting("relative_buckets", "relative_attention_num_buckets", 32),
    Setting("relative_max_distance", "relative_attention_max_distance", 128),
    Setting("norm_epsilon", "layer_norm_epsilon", 1e-6),
    Setting("activation", "feed_forward_proj", "relu", values=_ACTIVATIONS),
    Setting("dropout", "dropout_rate", 0.1),
)
_FIXED = {"family": "encoder_decoder", "positions": "relative", "attention_scale": 1.0, "norm": "rmsnorm",
          "use_bias": False, "init_std": None}


def _read(settings: Settings) -> dict[str, Any]:
    # transformers tells T5 1.1, whose logits are not scaled, by its unembedding that is not tied;
    # since 5 it writes that it is tied all the same, and what it knows of the scale.
    scales = settings.get("scale_decoder_outputs", settings.get("tie_word_embeddings") is not False)
    layers = settings.get("num_decoder_layers") or settings.get("num_layers", 6)
    start = {"decoder_start_token_id": settings.get("pad_token_id", 0)}
    return {"num_decoder_layers": layers, "tie_embeddings": scales, "scale_logits": scales,
            **read_targets(start | dict(settings))}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {"num_decoder_layers": config.num_decoder_layers, "tie_word_embeddings": config.tie_embeddings,
            "is_encoder_decoder": True} | write_targets(config)


T5 = Family("t5", "T5ForConditionalGeneration", _WEIGHTS, _SETTINGS, _FIXED, read=_read, write=_write,
            # A bias of attention to the source, which early files have, and which was never used.
            ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",))
