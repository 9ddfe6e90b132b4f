"""Random model configs of all families, valid and invalid, all very small."""

from typing import Any

import numpy as np

import transformer_jax as tj
from transformer_jax.config import (
    ClassifierConfig,
    ExpertConfig,
    LatentConfig,
    LayerKind,
    Limits,
    ModelSettings,
    MupConfig,
    RecurrentConfig,
    RopeLayout,
    RopeScaling,
    SparseAutoencoderConfig,
    WordVectorConfig,
)
from transformer_jax.config.classifier import CLASSIFIERS

VOCABULARY, LONGEST = 17, 16
TRANSFORMERS = ("decoder", "encoder", "encoder_decoder", "reward", *CLASSIFIERS)
OTHERS = ("recurrent", "recurrent_pairs", "elmo", "sparse_autoencoder", "word_vectors")
_CHOICES = {
    "positions": ("learned", "sinusoidal", "sinusoidal_halves", "rope", "rope", "rope", "rope", "alibi",
                  "relative", "none"),
    "norm": ("layernorm", "layernorm_without_weights", "rmsnorm", "rmsnorm_one_plus"),
    "norm_position": ("pre", "post", "both", "output"), "residual": ("sequential", "parallel", "parallel_shared"),
    "activation": ("relu", "silu", "gelu", "gelu_tanh", "swiglu", "geglu", "geglu_erf"),
    "head_activation": ("gelu", "relu", "silu", "gelu_tanh"),
    "num_layers": (1, 2, 3, 4), "num_heads": (1, 2, 4), "model_dim": (8, 16, 12), "num_kv_heads": (None, 1, 2),
    "head_dim": (None, 4, 6, 5), "mlp_dim": (None, 8, 20), "num_encoder_layers": (None, 1, 2),
    "num_decoder_layers": (None, 1, 2), "embedding_dim": (None, None, 4), "shared_layers": (False, True),
    "position_offset": (0, 0, 2), "relative_buckets": (32, 4, 8), "relative_max_distance": (128, 20),
    "attention_scale": (None, 1.0, 0.3), "use_qkv_bias": (None, True, False), "use_mlp_bias": (None, True, False),
    "use_norm_bias": (None, True, False), "sliding_window": (None, None, 4),
    "attention_implementation": ("auto", "xla", "chunked"), "matmul_precision": ("default", "high", "highest"),
    "remat": ("none", "dots", "full"), "unroll": (1, 2), "num_token_types": (0, 0, 2),
    "use_value_head": (False, False, True), "rope_base": (10_000.0, 100.0), "init_std": (0.02, 0.5, None),
    "norm_epsilon": (1e-5, 1e-6), "dropout": (0.0, 0.1), "attention_dropout": (None, 0.2),
    "start_ids": ((), (1,), (1, 2)), "banned_ids": ((), (3,)),
    "dtype": ("float32", "float32", "float32", "bfloat16", "float16"),
    "param_dtype": ("float32", "float32", "float32", "bfloat16", "float16"),
    **dict.fromkeys(("use_bias", "use_embedding_norm", "use_qk_norm", "scale_embeddings", "use_output_bias",
                     "scale_logits", "tie_embeddings", "use_first_norm", "use_sinks"), (False, True)),
}
# Fields that ``draw`` sets in another way.
_DRAWN_BY_HAND = ("family", "vocab_size", "max_len", "qk_norm_width", "limits", "rope_scaling", "rope_layout",
                  "layer_pattern", "moe", "classifier", "latent", "mup")
# Values that must be refused in one line in every field.
_SENSELESS = {"num_layers": (0, -1, 1.5, 10**30), "model_dim": (0, "8", None), "num_heads": (0, 7),
              "dropout": (1.5, -0.1), "positions": ("Rope", 3, None), "max_len": (0, -4), "vocab_size": (0, -1),
              "norm_epsilon": (-1.0, float("nan")), "init_std": (float("inf"), -1.0),
              "sliding_window": (0, -2), "family": ("gpt",), "rope_base": (0.0, -5.0), "limits": (None, 3.0, {}),
              "layer_pattern": (3, "window", (None,), ({"sliding_window": 4},)), "moe": (8, {"num_experts": 4}),
              "rope_scaling": (None, "yarn", {}), "rope_layout": ("halves", 4), "classifier": (None, ("a", "b"))}


def drawn_fields() -> set[str]:
    """The fields of a ``ModelConfig`` that a campaign gives different values."""
    return {*_CHOICES, *_DRAWN_BY_HAND}


def is_exact(config: ModelSettings) -> bool:
    """Whether the model computes in float32, so that two ways to compute a value agree closely."""
    return "float32" == config.dtype == getattr(config, "param_dtype", "float32")


def draw(rng: np.random.Generator, family: str | None = None) -> ModelSettings:
    """Draws a config that differs from a plain one in a few fields. Some configs are invalid and
    raise ValueError."""
    if family is None:
        family = str(rng.choice(["decoder", *TRANSFORMERS] if rng.random() < 0.85 else OTHERS))
    if family in OTHERS:
        return _other(rng, family)
    fields: dict[str, Any] = dict(family=family, vocab_size=VOCABULARY, max_len=LONGEST, num_layers=2, num_heads=2,
                                  model_dim=16)
    often = [name for name in ("positions", "norm", "norm_position", "use_qk_norm", "activation") if rng.random() < 0.4]
    for name in [*rng.permutation(list(_CHOICES))[: int(rng.integers(2, 12))], *often]:
        if _can_have(rng, family, str(name)) or rng.random() < 0.05:
            fields[str(name)] = _one(rng, _CHOICES[str(name)])
    fields |= _nested(rng, fields)
    if family in CLASSIFIERS:
        fields["classifier"] = _classifier(rng, family)
    if rng.random() < 0.1:
        name = str(rng.choice(list(_SENSELESS)))
        fields[name] = _one(rng, _SENSELESS[name])
        if name == "num_heads":  # 7 heads are only senseless if they share the width of the model
            fields.pop("head_dim", None)
        config = tj.ModelConfig(**fields)
        raise AssertionError(f"{name}={fields[name]!r} was accepted: {config}")
    return tj.ModelConfig(**fields)


def _one(rng: np.random.Generator, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def _can_have(rng: np.random.Generator, family: str, field: str) -> bool:
    """Whether a family can have other values of a field than its default."""
    is_encoder = family.startswith("encoder") and family != "encoder_decoder"
    return {"num_encoder_layers": family == "encoder_decoder", "num_decoder_layers": family == "encoder_decoder",
            "start_ids": family == "encoder_decoder", "use_first_norm": family != "encoder_decoder",
            "residual": family != "encoder_decoder",
            "norm_position": family != "encoder_decoder" or rng.random() < 0.5,
            "use_sinks": family in ("decoder", "reward"), "use_value_head": family == "decoder",
            "use_output_bias": family in ("decoder", "encoder_decoder"),
            "embedding_dim": is_encoder, "shared_layers": is_encoder}.get(field, True)


def _nested(rng: np.random.Generator, fields: dict[str, Any]) -> dict[str, Any]:
    """Draws the settings that are groups of their own, mostly such that they fit the others."""
    is_strange = rng.random() < 0.05
    found: dict[str, Any] = {}
    if rng.random() < 0.25:
        caps = {name: _one(rng, (0.5, 5.0, 50.0)) for name in rng.permutation(["scores", "logits", "projections"])[:2]}
        if not is_strange and fields["family"] == "encoder":
            caps.pop("logits", None)
        found["limits"] = Limits(**caps)
    if fields.get("use_qk_norm"):
        found["qk_norm_width"] = _one(rng, ("head", "all"))
    is_rope = fields.get("positions") == "rope"
    if is_rope or is_strange:
        rotated = fields.get("head_dim") or fields["model_dim"] // fields["num_heads"]
        if rng.random() < 0.4:
            found["rope_layout"] = RopeLayout(dim=_one(rng, (None, 2, 4)), pairs=_one(rng, ("halves", "interleaved")))
            rotated = found["rope_layout"].dim or rotated
        if rng.random() < 0.6:
            found["rope_scaling"] = _scaling(rng, rotated)
    if rng.random() < 0.3:
        rotated = found["rope_layout"].dim or rotated if "rope_layout" in found else (
            fields.get("head_dim") or fields["model_dim"] // fields["num_heads"])
        found["layer_pattern"] = tuple(_kind(rng, is_rope or is_strange, rotated)
                                       for _ in range(int(rng.integers(1, 4))))
        if not is_strange:
            fields.pop("sliding_window", None)
            fields.pop("shared_layers", None)
    if is_strange or (fields["family"] in ("decoder", "reward") and rng.random() < 0.35):
        found["moe"] = _experts(rng)
        if not is_strange:
            found["use_mlp_bias"] = False
    layout = found.get("rope_layout")
    if is_strange or (fields["family"] in ("decoder", "reward") and layout and layout.dim and rng.random() < 0.5):
        found["latent"] = LatentConfig(dim=_one(rng, (4, 8)), query_dim=_one(rng, (None, 6)),
                                       value_dim=_one(rng, (None, 3)))
    if is_strange or (fields["family"] == "decoder" and rng.random() < 0.05):
        found["mup"] = MupConfig(base_dim=_one(rng, (8, 16)))
    return found


def _scaling(rng: np.random.Generator, rotated: int) -> RopeScaling:
    kind = str(rng.choice(["none", "linear", "dynamic", "yarn", "llama3", "longrope"]))
    fields: dict[str, Any] = dict(factor=_one(rng, (1.0, 2.0, 8.0)), original_max_len=_one(rng, (4, 8, 32)))
    if kind in ("yarn", "longrope"):
        fields["attention_factor"] = _one(rng, (None, 1.3))
    if kind == "yarn":
        fields |= {"truncate": bool(rng.integers(2)), "beta_fast": _one(rng, (32.0, 4.0))}
    if kind == "longrope":
        short, long = rng.uniform(1, 4, size=(2, max(rotated // 2, 1))).round(2).tolist()
        fields |= {"short_factors": tuple(short), "long_factors": tuple(long)}
    return RopeScaling(kind=kind, **fields)


def _kind(rng: np.random.Generator, is_rope: bool, rotated: int) -> LayerKind:
    """Draws what the layers of one kind do differently."""
    fields: dict[str, Any] = {"sliding_window": _one(rng, (None, 1, 3, 5, 100))}
    if is_rope:
        fields["use_rope"] = bool(rng.random() < 0.8)
        if fields["use_rope"]:
            fields["rope_base"] = _one(rng, (None, 50.0))
            fields["rope_scaling"] = _scaling(rng, rotated) if rng.random() < 0.2 else None
    return LayerKind(**fields)


def _experts(rng: np.random.Generator) -> ExpertConfig:
    groups = _one(rng, (1, 1, 2, 3))
    return ExpertConfig(num_experts=_one(rng, (4, 6, 6, 12)), experts_per_token=_one(rng, (1, 2, 3)),
                        mlp_dim=_one(rng, (None, 8, 5)), shared_experts=_one(rng, (0, 0, 1, 2)),
                        scores=_one(rng, ("softmax", "sigmoid")), normalize_weights=bool(rng.integers(2)),
                        weight_scale=_one(rng, (1.0, 2.5)), use_choice_bias=bool(rng.integers(2)), groups=groups,
                        groups_per_token=int(rng.integers(1, groups + 1)))


def _classifier(rng: np.random.Generator, family: str) -> ClassifierConfig:
    labels = _one(rng, (("no", "yes"), ("O", "B-X", "I-X"), ("one",), ("a", "a"), ()) if rng.random() < 0.2 else
                  (("no", "yes"), ("O", "B-X", "I-X")))
    of_tokens = "token" in family and rng.random() < 0.95
    return ClassifierConfig(labels=labels, pooling=None if of_tokens else _one(rng, (None, "first", "last", "mean")),
                            activation=_one(rng, (None, "none", "tanh", "gelu")), dropout=_one(rng, (None, 0.1)))


def _other(rng: np.random.Generator, family: str) -> ModelSettings:
    """Draws a config of a family that is not a Transformer."""
    if family == "word_vectors":
        return WordVectorConfig(vocab_size=VOCABULARY, max_len=LONGEST, method=_one(rng, ("skip_gram", "cbow")),
                                model_dim=_one(rng, (1, 8)), window=_one(rng, (1, 32, 33)), negatives=_one(rng, (1, 5)))
    if family == "sparse_autoencoder":
        input_dim, num_features = _one(rng, (1, 4, 6)), _one(rng, (1, 8, 12))
        return SparseAutoencoderConfig(
            site="layers.0.mlp_output", target=_one(rng, (None, None, "layers.1.residual")), input_dim=input_dim,
            output_dim=_one(rng, (None, None, 5)), num_features=num_features, k=_one(rng, (1, 3, 9)),
            activation=_one(rng, ("relu", "topk", "batch_topk", "jumprelu", "gated")),
            scale=_one(rng, (1.0, 0.25, 0.3)), target_scale=_one(rng, (None, None, 4.0)),
            subtract_bias=bool(rng.integers(2)))
    return RecurrentConfig(family=family, vocab_size=VOCABULARY, max_len=LONGEST, num_layers=_one(rng, (1, 2, 3)),
                           cell=_one(rng, ("rnn", "lstm", "gru")), model_dim=_one(rng, (1, 8, 5)),
                           use_attention=bool(family != "recurrent_pairs" or rng.integers(2)),
                           dropout=_one(rng, (0.0, 0.1)), tie_embeddings=bool(rng.integers(2)),
                           dtype=_one(rng, ("float32", "float32", "bfloat16")))
