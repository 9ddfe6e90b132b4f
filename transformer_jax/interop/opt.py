"""The decoder family OPT: ``OPTForCausalLM``, which Galactica uses too."""

from __future__ import annotations

from typing import Any

from transformer_jax.config import ModelConfig
from transformer_jax.interop.family import Family, read_banned, write_banned
from transformer_jax.interop.mapping import Weight, linear, norm
from transformer_jax.interop.setting import ACTIVATIONS, Setting, Settings, shown, typed

_BLOCK = "stack.blocks"
_LAYER = "model.decoder.layers.{layer}"

_WEIGHTS = (
    Weight("embeddings.token", "model.decoder.embed_tokens.weight", also=("lm_head.weight",)),
    Weight("embeddings.position", "model.decoder.embed_positions.weight"),
    *norm(f"{_BLOCK}.attention_norm", f"{_LAYER}.self_attn_layer_norm"),
    *linear(f"{_BLOCK}.attention.query", f"{_LAYER}.self_attn.q_proj"),
    *linear(f"{_BLOCK}.attention.key", f"{_LAYER}.self_attn.k_proj"),
    *linear(f"{_BLOCK}.attention.value", f"{_LAYER}.self_attn.v_proj"),
    *linear(f"{_BLOCK}.attention.output", f"{_LAYER}.self_attn.out_proj"),
    *norm(f"{_BLOCK}.mlp_norm", f"{_LAYER}.final_layer_norm"),
    *linear(f"{_BLOCK}.mlp.up", f"{_LAYER}.fc1"),
    *linear(f"{_BLOCK}.mlp.down", f"{_LAYER}.fc2"),
    *norm("final_norm", "model.decoder.final_layer_norm"),
    Weight("embeddings.output", "lm_head.weight"),
)
_SETTINGS = (
    Setting("vocab_size", "vocab_size"),
    Setting("model_dim", "hidden_size"),
    Setting("mlp_dim", "ffn_dim"),
    Setting("num_layers", "num_hidden_layers"),
    Setting("num_heads", "num_attention_heads"),
    Setting("max_len", "max_position_embeddings", 2048),
    Setting("activation", "activation_function", "relu", values=ACTIVATIONS),
    Setting("tie_embeddings", "tie_word_embeddings", True),
    Setting("dropout", "dropout", 0.1),
    Setting("attention_dropout", "attention_dropout", 0.0),
    Setting("init_std", "init_std", 0.02),
)


def _read(settings: Settings) -> dict[str, Any]:
    """Reads which layers have biases, and whether norms have weights."""
    width = settings.get("word_embed_proj_dim") or settings["hidden_size"]
    if width != settings["hidden_size"] or settings.get("do_layer_norm_before", True) is not True:
        raise ValueError(f"this OPT model has word_embed_proj_dim={shown(width)} and do_layer_norm_before="
                         f"{shown(settings.get('do_layer_norm_before', True))}; expected {settings['hidden_size']} and "
                         "true. Embeddings of another width than the layers, and OPT with norms after the layers, as "
                         "in opt-350m, are not supported; all other published sizes are")
    bias, affine = (typed(settings, name, bool, True) for name in ("enable_bias", "layer_norm_elementwise_affine"))
    return {"use_bias": bias, "norm": "layernorm" if affine else "layernorm_without_weights",
            "use_norm_bias": True if affine and not bias else None, **read_banned(settings)}


def _write(config: ModelConfig) -> dict[str, Any]:
    """Writes which layers have biases, and whether norms have weights."""
    return {"enable_bias": config.use_bias, "layer_norm_elementwise_affine": config.norm == "layernorm",
            "word_embed_proj_dim": config.model_dim, "do_layer_norm_before": True, **write_banned(config)}


OPT = Family(
    "opt", "OPTForCausalLM", _WEIGHTS, _SETTINGS,
    fixed={"family": "decoder", "positions": "learned", "position_offset": 2, "norm_epsilon": 1e-5},
    requires={"_remove_final_layer_norm": False}, read=_read, write=_write,
    renames=((r"^(?=decoder\.)", "model."),))
