"""Random model configs, valid and invalid, all very small."""

import numpy as np

import transformer_jax as tj

VOCABULARY, LONGEST = 17, 16
_FLAGS = ("use_bias", "use_embedding_norm", "use_qk_norm", "scale_embeddings", "use_output_bias", "scale_logits",
          "tie_embeddings")
_CHOICES = {
    "positions": ("learned", "sinusoidal", "rope", "alibi", "relative", "none"), "norm": ("layernorm", "rmsnorm"),
    "norm_position": ("pre", "post"), "activation": ("relu", "silu", "gelu", "gelu_tanh", "swiglu", "geglu"),
    "num_layers": (1, 2, 3), "num_heads": (1, 2, 4, 3), "model_dim": (8, 16, 12), "num_kv_heads": (None, 1, 2),
    "head_dim": (None, 4, 6, 5), "mlp_dim": (None, 8, 20), "num_encoder_layers": (None, 1, 2),
    "num_decoder_layers": (None, 1, 2), "position_offset": (0, 0, 2), "relative_buckets": (32, 4, 8),
    "relative_max_distance": (128, 8), "attention_scale": (None, 1.0, 0.3), "use_qkv_bias": (None, True, False),
    "sliding_window": (None, None, 4), "attention_implementation": ("auto", "xla", "chunked"),
    "remat": ("none", "dots", "full"), "unroll": (1, 2), "num_token_types": (0, 0, 2),
    "use_value_head": (False, False, True),
    "rope_base": (10_000.0, 100.0), "init_std": (0.02, 0.5, None), "norm_epsilon": (1e-5, 1e-6),
    "dropout": (0.0, 0.1), "start_ids": ((), (1,), (1, 2)), "banned_ids": ((), (3,)),
}
# Values that must be refused in one line in every field.
_SENSELESS = {"num_layers": (0, -1, 1.5, 10**30), "model_dim": (0, "8", None), "num_heads": (0, 7),
              "dropout": (1.5, -0.1), "positions": ("Rope", 3, None), "max_len": (0, -4), "vocab_size": (0, -1),
              "norm_epsilon": (-1.0, float("nan")), "init_std": (float("inf"), -1.0),
              "sliding_window": (0, -2), "family": ("gpt",), "rope_base": (0.0, -5.0)}


def draw(rng: np.random.Generator, family: str | None = None) -> tj.ModelConfig:
    """Draws a config that differs from a plain one in a few fields. Some configs are invalid and
    raise ValueError."""
    family = family or str(rng.choice(["decoder", "encoder", "encoder_decoder"]))
    fields = dict(family=family, vocab_size=VOCABULARY, max_len=LONGEST, num_layers=2, num_heads=2, model_dim=16)
    for name in rng.permutation(list(_CHOICES))[: int(rng.integers(2, 14))]:
        fields[str(name)] = _CHOICES[str(name)][int(rng.integers(len(_CHOICES[str(name)])))]
    for name in rng.permutation(_FLAGS)[: int(rng.integers(0, 5))]:
        fields[str(name)] = bool(rng.integers(2))
    if rng.random() < 0.15:
        name = str(rng.choice(list(_SENSELESS)))
        fields[name] = _SENSELESS[name][int(rng.integers(len(_SENSELESS[name])))]
        config = tj.ModelConfig(**fields)
        raise AssertionError(f"{name}={fields[name]!r} was accepted: {config}")
    return tj.ModelConfig(**fields)
