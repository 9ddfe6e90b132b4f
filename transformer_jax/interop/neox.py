"""The decoder families GPT-NeoX (Pythia), GPT-J and Phi: ``GPTNeoXForCausalLM``,
``GPTJForCausalLM`` and ``PhiForCausalLM``.

Attention and the feed-forward layer of a block read the same residual stream: in GPT-NeoX each
through its own norm, in GPT-J and Phi both through one norm.
"""

from __future__ import annotations

from typing import Any

from transformer_jax.config import ModelConfig, RopeLayout
from transformer_jax.interop.family import Family, read_banned, write_banned
from transformer_jax.interop.mapping import Weight, linear, norm
from transformer_jax.interop.rope import derived_width, read_rope, write_rope
from transformer_jax.interop.setting import ACTIVATIONS, SIZES, Setting, Settings, typed

_BLOCK = "stack.blocks"
_FIXED = {"family": "decoder", "positions": "rope", "norm": "layernorm"}


def _fused(ours: str, theirs: str, index: int) -> tuple[Weight, Weight]:
    """Makes the rows for one of the three parts of a linear layer whose output has, for each head,
    its query, its key and its value."""
    return (Weight(f"{ours}.kernel", f"{theirs}.weight", transposed=True, part=(index, 3), groups=None),
            Weight(f"{ours}.bias", f"{theirs}.bias", part=(index, 3), groups=None))


_NEOX = "gpt_neox.layers.{layer}"
_NEOX_WEIGHTS = (
    Weight("embeddings.token", "gpt_neox.embed_in.weight", also=("embed_out.weight",)),
    *norm(f"{_BLOCK}.attention_norm", f"{_NEOX}.input_layernorm"),
    *_fused(f"{_BLOCK}.attention.query", f"{_NEOX}.attention.query_key_value", 0),
    *_fused(f"{_BLOCK}.attention.key", f"{_NEOX}.attention.query_key_value", 1),
    *_fused(f"{_BLOCK}.attention.value", f"{_NEOX}.attention.query_key_value", 2),
    *linear(f"{_BLOCK}.attention.output", f"{_NEOX}.attention.dense"),
    *norm(f"{_BLOCK}.mlp_norm", f"{_NEOX}.post_attention_layernorm"),
    *linear(f"{_BLOCK}.mlp.up", f"{_NEOX}.mlp.dense_h_to_4h"),
    *linear(f"{_BLOCK}.mlp.down", f"{_NEOX}.mlp.dense_4h_to_h"),
    *norm("final_norm", "gpt_neox.final_layer_norm"),
    Weight("embeddings.output", "embed_out.weight"),
)
_NEOX_SETTINGS = (
    *SIZES,
    Setting("max_len", "max_position_embeddings", 2048),
    Setting("norm_epsilon", "layer_norm_eps", 1e-5),
    Setting("activation", "hidden_act", "gelu", values=ACTIVATIONS),
    Setting("residual", "use_parallel_residual", "parallel", values={True: "parallel", False: "sequential"}),
    Setting("tie_embeddings", "tie_word_embeddings", False),
    Setting("dropout", "hidden_dropout", 0.0),
    Setting("attention_dropout", "attention_dropout", 0.0),
    Setting("init_std", "initializer_range", 0.02),
)
_NEOX_ROPE: dict[str, Any] = {"base_name": "rotary_emb_base", "fraction_name": "rotary_pct"}


def _read_neox(settings: Settings) -> dict[str, Any]:
    """Reads the rotary positions and the biases; norms and feed-forward layers always have them."""
    attention = typed(settings, "attention_bias", bool, True)
    biases = {"use_bias": attention} | ({} if attention else {"use_mlp_bias": True, "use_norm_bias": True})
    return read_rope(settings, fraction=0.25, **_NEOX_ROPE) | biases | read_banned(settings)


def _write_neox(config: ModelConfig) -> dict[str, Any]:
    """Writes the rotary positions and the biases."""
    rope = write_rope(config, is_partial=True, **_NEOX_ROPE)
    return rope | {"attention_bias": config.use_bias} | write_banned(config)


GPT_NEOX = Family(
    "gpt_neox", "GPTNeoXForCausalLM", _NEOX_WEIGHTS, _NEOX_SETTINGS, fixed=_FIXED, read=_read_neox, write=_write_neox,
    # Older versions of transformers stored the causal mask and the rotary frequencies as buffers.
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
             r"gpt_neox\.rotary_emb\.inv_freq"),
    renames=((r"^(?=(embed_in|layers|final_layer_norm|rotary_emb)\.)", "gpt_neox."),))

_GPTJ = "transformer.h.{layer}"
_GPTJ_WEIGHTS = (
    Weight("embeddings.token", "transformer.wte.weight", also=("lm_head.weight",)),
    *norm(f"{_BLOCK}.attention_norm", f"{_GPTJ}.ln_1"),
    *linear(f"{_BLOCK}.attention.query", f"{_GPTJ}.attn.q_proj"),
    *linear(f"{_BLOCK}.attention.key", f"{_GPTJ}.attn.k_proj"),
    *linear(f"{_BLOCK}.attention.value", f"{_GPTJ}.attn.v_proj"),
    *linear(f"{_BLOCK}.attention.output", f"{_GPTJ}.attn.out_proj"),
    *linear(f"{_BLOCK}.mlp.up", f"{_GPTJ}.mlp.fc_in"),
    *linear(f"{_BLOCK}.mlp.down", f"{_GPTJ}.mlp.fc_out"),
    *norm("final_norm", "transformer.ln_f"),
    Weight("embeddings.output", "lm_head.weight"),
    Weight("embeddings.output_bias", "lm_head.bias"),
)
_GPTJ_SETTINGS = (
    Setting("vocab_size", "vocab_size"),
    Setting("model_dim", "n_embd"),
    Setting("num_layers", "n_layer"),
    Setting("num_heads", "n_head"),
    Setting("max_len", "n_positions", 2048),
    Setting("mlp_dim", "n_inner", None),
    Setting("norm_epsilon", "layer_norm_epsilon", 1e-5),
    Setting("activation", "activation_function", "gelu_tanh", values=ACTIVATIONS),
    Setting("tie_embeddings", "tie_word_embeddings", False),
    Setting("dropout", "resid_pdrop", 0.0, also=("embd_pdrop",)),
    Setting("attention_dropout", "attn_pdrop", 0.0),
    Setting("init_std", "initializer_range", 0.02),
)


def _read_gptj(settings: Settings) -> dict[str, Any]:
    """Reads which channels of a head are rotated."""
    rotated, width = typed(settings, "rotary_dim", int, 64), settings["n_embd"] // max(1, settings["n_head"])
    if rotated > width:
        raise ValueError(f"rotary_dim={rotated}: expected at most the {width} channels of a head")
    return {"rope_layout": RopeLayout(rotated if rotated < width else None, "interleaved"), **read_banned(settings)}


def _write_gptj(config: ModelConfig) -> dict[str, Any]:
    """Writes which channels of a head are rotated."""
    width = derived_width(config)
    return {"rotary_dim": config.rope_layout.dim or width, **write_banned(config)}


GPTJ = Family(
    "gptj", "GPTJForCausalLM", _GPTJ_WEIGHTS, _GPTJ_SETTINGS,
    fixed=_FIXED | {"residual": "parallel_shared", "use_bias": False, "use_mlp_bias": True, "use_norm_bias": True,
                    "use_output_bias": True},
    requires={"scale_attn_weights": True}, read=_read_gptj, write=_write_gptj,
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)",),
    renames=((r"^(?=(wte|h|ln_f)\.)", "transformer."),))

_PHI = "model.layers.{layer}"
_PHI_WEIGHTS = (
    Weight("embeddings.token", "model.embed_tokens.weight", also=("lm_head.weight",)),
    *norm(f"{_BLOCK}.attention_norm", f"{_PHI}.input_layernorm"),
    *linear(f"{_BLOCK}.attention.query", f"{_PHI}.self_attn.q_proj"),
    *linear(f"{_BLOCK}.attention.key", f"{_PHI}.self_attn.k_proj"),
    *linear(f"{_BLOCK}.attention.value", f"{_PHI}.self_attn.v_proj"),
    *linear(f"{_BLOCK}.attention.output", f"{_PHI}.self_attn.dense"),
    *linear(f"{_BLOCK}.mlp.up", f"{_PHI}.mlp.fc1"),
    *linear(f"{_BLOCK}.mlp.down", f"{_PHI}.mlp.fc2"),
    *norm("final_norm", "model.final_layernorm"),
    Weight("embeddings.output", "lm_head.weight"),
    Weight("embeddings.output_bias", "lm_head.bias"),
)
_PHI_SETTINGS = (
    *SIZES,
    Setting("max_len", "max_position_embeddings", 2048),
    Setting("num_kv_heads", "num_key_value_heads", None),
    Setting("norm_epsilon", "layer_norm_eps", 1e-5),
    Setting("activation", "hidden_act", "gelu_tanh", values=ACTIVATIONS),
    Setting("tie_embeddings", "tie_word_embeddings", False),
    Setting("dropout", "resid_pdrop", 0.0, also=("embd_pdrop",)),
    Setting("attention_dropout", "attention_dropout", 0.0),
    Setting("init_std", "initializer_range", 0.02),
)

PHI = Family(
    "phi", "PhiForCausalLM", _PHI_WEIGHTS, _PHI_SETTINGS,
    fixed=_FIXED | {"residual": "parallel_shared", "use_bias": True, "use_output_bias": True},
    requires={"qk_layernorm": False},
    read=lambda settings: read_rope(settings, fraction=0.5) | read_banned(settings),
    write=lambda config: write_rope(config, is_partial=True) | write_banned(config),
    ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    renames=((r"^(?=(embed_tokens|layers|final_layernorm|rotary_emb)\.)", "model."),))
