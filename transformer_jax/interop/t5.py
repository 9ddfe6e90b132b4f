"""T5: ``T5ForConditionalGeneration``, of the paper (ReLU, tied) and 1.1 and Flan (gated GELU, an unembedding apart).

Attention is not scaled; the first layer of each side holds the bias of positions for all of them.
"""

from __future__ import annotations

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
    translated,
    write_targets,
)

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


def _read_config(settings: Settings) -> ModelConfig:
    # transformers tells T5 1.1, whose logits are not scaled, by its unembedding that is not tied; since 5 it writes
    # that it is tied all the same, and what it knows of the scale.
    scales = settings.get("scale_decoder_outputs", settings.get("tie_word_embeddings") is not False)
    layers, dropout = settings.get("num_layers", 6), settings.get("dropout_rate", 0.1)
    activation = settings.get("feed_forward_proj", "relu")
    return ModelConfig(
        family="encoder_decoder", vocab_size=settings.get("vocab_size", 32_128),
        max_len=settings.get("n_positions", 512), num_layers=layers, num_encoder_layers=layers,
        num_decoder_layers=settings.get("num_decoder_layers") or layers, num_heads=settings.get("num_heads", 8),
        model_dim=settings.get("d_model", 512), head_dim=settings.get("d_kv", 64),
        mlp_dim=settings.get("d_ff", 2048), positions="relative",
        relative_buckets=settings.get("relative_attention_num_buckets", 32),
        relative_max_distance=settings.get("relative_attention_max_distance", 128), attention_scale=1.0,
        norm="rmsnorm", norm_epsilon=settings.get("layer_norm_epsilon", 1e-6), use_bias=False,
        activation=translated(activation, _ACTIVATIONS, "feed_forward_proj"), tie_embeddings=scales,
        scale_logits=scales, dropout=dropout, init_std=None,
        **read_targets({"decoder_start_token_id": settings.get("pad_token_id", 0)} | dict(settings)))


def _write_config(config: ModelConfig) -> dict[str, Any]:
    require_config("t5", config, {
        "family": "encoder_decoder", "positions": "relative", "norm": "rmsnorm", "norm_position": "pre",
        "use_bias": False, "use_qkv_bias": None, "use_qk_norm": False, "use_embedding_norm": False,
        "use_output_bias": False, "scale_embeddings": False, "num_kv_heads": config.num_heads, "attention_scale": 1.0,
        "scale_logits": config.tie_embeddings, "num_token_types": 0, "sliding_window": None,
        "attention_dropout": None})
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    return {
        "vocab_size": config.vocab_size, "n_positions": config.max_len, "d_model": config.model_dim,
        "d_kv": config.head_dim, "d_ff": config.mlp_dim, "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers, "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance, "layer_norm_epsilon": config.norm_epsilon,
        "feed_forward_proj": translated(config.activation, activations, "t5: activation"),
        "dropout_rate": config.dropout, "tie_word_embeddings": config.tie_embeddings, "is_encoder_decoder": True,
    } | write_targets(config)


T5 = Family("t5", "T5ForConditionalGeneration", _WEIGHTS, _read_config, _write_config,
            # A bias of attention to the source, which early files have, and which was never used.
            ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",))
