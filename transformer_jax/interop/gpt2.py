"""The decoder family GPT-2: ``GPT2LMHeadModel``."""

from __future__ import annotations

from transformer_jax.interop.family import Family, read_banned, write_banned
from transformer_jax.interop.mapping import Weight, norm
from transformer_jax.interop.setting import ACTIVATIONS, Setting

_BLOCK = "stack.blocks"
_LAYER = "transformer.h.{layer}"


def _conv1d(ours: str, theirs: str, part: tuple[int, int] = (0, 1)) -> tuple[Weight, Weight]:
    """Makes the rows for GPT-2's Conv1D, a linear layer whose weight is ``[in, out]`` like ours."""
    return Weight(f"{ours}.kernel", f"{theirs}.weight", part=part), Weight(f"{ours}.bias", f"{theirs}.bias", part=part)


_WEIGHTS = (
    Weight("embeddings.token", "transformer.wte.weight", also=("lm_head.weight",)),
    Weight("embeddings.position", "transformer.wpe.weight"),
    *norm(f"{_BLOCK}.attention_norm", f"{_LAYER}.ln_1"),
    *_conv1d(f"{_BLOCK}.attention.query", f"{_LAYER}.attn.c_attn", part=(0, 3)),
    *_conv1d(f"{_BLOCK}.attention.key", f"{_LAYER}.attn.c_attn", part=(1, 3)),
    *_conv1d(f"{_BLOCK}.attention.value", f"{_LAYER}.attn.c_attn", part=(2, 3)),
    *_conv1d(f"{_BLOCK}.attention.output", f"{_LAYER}.attn.c_proj"),
    *norm(f"{_BLOCK}.mlp_norm", f"{_LAYER}.ln_2"),
    *_conv1d(f"{_BLOCK}.mlp.up", f"{_LAYER}.mlp.c_fc"),
    *_conv1d(f"{_BLOCK}.mlp.down", f"{_LAYER}.mlp.c_proj"),
    *norm("final_norm", "transformer.ln_f"),
    Weight("embeddings.output", "lm_head.weight"),
)

_SETTINGS = (
    Setting("vocab_size", "vocab_size", 50_257),
    Setting("max_len", "n_positions", 1024),
    Setting("num_layers", "n_layer", 12),
    Setting("num_heads", "n_head", 12),
    Setting("model_dim", "n_embd", 768),
    Setting("mlp_dim", "n_inner", None),
    Setting("norm_epsilon", "layer_norm_epsilon", 1e-5),
    Setting("activation", "activation_function", "gelu_tanh", values=ACTIVATIONS),
    Setting("tie_embeddings", "tie_word_embeddings", True),
    Setting("dropout", "resid_pdrop", 0.1, also=("embd_pdrop",)),
    Setting("attention_dropout", "attn_pdrop", 0.1),
    Setting("init_std", "initializer_range", 0.02),
)

GPT2 = Family(
    "gpt2", "GPT2LMHeadModel", _WEIGHTS, _SETTINGS, fixed={"family": "decoder", "positions": "learned"},
    requires={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    read=read_banned, write=write_banned,
    # Older versions of transformers stored the causal mask as a buffer.
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    # The file on the hub contains the model without its head, whose names have no prefix.
    renames=((r"^(?=wte\.|wpe\.|h\.|ln_f\.)", "transformer."),))
