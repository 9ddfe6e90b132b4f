"""Every field of a config, changed in every family: it is exported and reads back equal, or
refused."""

import dataclasses
import json
import types
import typing

import pytest
from test_family_files import CONFIGS as ENCODERS_AND_PAIRS
from test_huggingface import OURS as DECODERS

from transformer_jax.config import (
    ClassifierConfig,
    ExpertConfig,
    LatentConfig,
    LayerKind,
    Limits,
    ModelConfig,
    MupConfig,
    RopeLayout,
    RopeScaling,
)
from transformer_jax.config.choices import CHOICES
from transformer_jax.interop import FAMILIES, REQUIRED
from transformer_jax.interop.family import NOT_OF_THE_TRAINED_MODEL
from transformer_jax.interop.layer_kinds import with_canonical_layers

_PARALLEL = DECODERS["gpt_neox"].replace(residual="parallel_shared", use_output_bias=True, tie_embeddings=False)
_LLAMA = DECODERS["qwen2"].replace(use_qkv_bias=None, norm="layernorm")
_RMS = _LLAMA.replace(norm="rmsnorm")
_OLMO2 = _RMS.replace(norm_position="output", use_qk_norm=True, qk_norm_width="all")
_GEMMA = _RMS.replace(norm="rmsnorm_one_plus", activation="geglu", scale_embeddings=True)
_LATENT = _RMS.replace(
    num_kv_heads=_RMS.num_heads, head_dim=10, rope_layout=RopeLayout(4, "interleaved"), latent=LatentConfig(6, 8, 7))
_V2 = ExpertConfig(4, 2, mlp_dim=12, shared_experts=1, normalize_weights=False, weight_scale=2.0, groups=2,
                   groups_per_token=1, experts_per_group_score=1, dense_layers=1)
_V3 = dataclasses.replace(_V2, scores="sigmoid", normalize_weights=True, use_choice_bias=True,
                          experts_per_group_score=2)
_WINDOWS = (LayerKind(5), LayerKind())
_MORE = {
    "gptj": _PARALLEL.replace(rope_base=10_000.0, rope_layout=RopeLayout(4, "interleaved"), use_bias=False,
                              use_mlp_bias=True, use_norm_bias=True),
    "phi": _PARALLEL.replace(num_kv_heads=2),
    "opt": DECODERS["gpt2"].replace(position_offset=2, activation="relu"),
    "mixtral": DECODERS["mistral"].replace(moe=ExpertConfig(4, 2, balance_loss=0.02)),
    "olmoe": DECODERS["llama"].replace(use_qk_norm=True, qk_norm_width="all", moe=ExpertConfig(4, 2)),
    "qwen3_moe": DECODERS["llama"].replace(use_qk_norm=True, moe=ExpertConfig(4, 2, mlp_dim=12)),
    "deepseek_v2": _LATENT.replace(moe=_V2),
    "deepseek_v3": _LATENT.replace(moe=_V3),
    "gpt_oss": _RMS.replace(use_bias=True, activation="swiglu_plus_one", use_sinks=True, limits=Limits(neurons=7.0),
                            layer_pattern=_WINDOWS, moe=ExpertConfig(4, 2)),
    "stablelm": _LLAMA.replace(use_norm_bias=True, rope_layout=RopeLayout(2)),
    "olmo": _LLAMA.replace(norm="layernorm_without_weights"),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2.replace(layer_pattern=_WINDOWS),
    "gemma": _GEMMA,
    "gemma2": _GEMMA.replace(norm_position="both", layer_pattern=_WINDOWS),
    "gemma3_text": _GEMMA.replace(norm_position="both", use_qk_norm=True, layer_pattern=_WINDOWS),
    "phi3": _RMS,
    "smollm3": _RMS.replace(layer_pattern=(LayerKind(use_rope=False), LayerKind())),
}
# A config that each family can express, with dropout where it has some.
EXAMPLES = {}
for _name, _config in {**DECODERS, **_MORE, **ENCODERS_AND_PAIRS}.items():
    EXAMPLES.setdefault(_name.split(",")[0], _config)
# A change of these may be refused by the name of another field: the width of a head, T5's scale of
# tied logits, BERT's activation, which its head has too, or biases that Qwen3 has in attention
# alone.
BOUND = ("num_heads", "model_dim", "tie_embeddings", "activation", "use_bias")
HINTS = typing.get_type_hints(ModelConfig)
FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}


def candidates(field, value):
    """Other values of a field, by its type; some of them may not be valid in a config."""
    hint = HINTS[field]
    for option in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        if option is bool:
            yield from (True, False)
        elif option is int:
            yield from (1, 2, 4, 12, 64, 256, *([value + 1, 2 * value] if isinstance(value, int) else []))
        elif option is float:
            yield from (0.25, 0.5, 1.0, 3.0, 0.0)
        elif option is str:
            yield from CHOICES[field]
        elif option is type(None):
            yield None
        elif option is RopeScaling:
            yield from (RopeScaling(), RopeScaling("linear", 3.0), RopeScaling("none", 3.0),
                        RopeScaling("linear", 3.0, original_max_len=12), RopeScaling("llama3", 3.0, 0.5, 2.0, 12),
                        RopeScaling("yarn", 3.0, original_max_len=12), RopeScaling("dynamic", 2.0, original_max_len=11),
                        RopeScaling("yarn", 3.0, original_max_len=12, attention_factor=1.5, truncate=False),
                        RopeScaling("longrope", 3.0, short_factors=(1.0,) * 3, long_factors=(2.0,) * 3))
        elif option is ExpertConfig:
            yield from (ExpertConfig(4, 2), ExpertConfig(3, 1), ExpertConfig(4, 2, mlp_dim=7), ExpertConfig(
                4, 2, normalize_weights=False, balance_loss=0.5), ExpertConfig(4, 2, shared_experts=1), ExpertConfig(
                4, 2, scores="sigmoid", use_choice_bias=True, weight_scale=2.0, groups=2), ExpertConfig(
                4, 2, dense_layers=1), _V2, dataclasses.replace(_V2, groups=1), _V3, dataclasses.replace(
                _V3, dense_layers=0, balance_loss=0.5), dataclasses.replace(_V3, experts_per_group_score=1))
        elif option is LatentConfig:
            yield from (LatentConfig(6), LatentConfig(5, 8, 6), LatentConfig(6, 8, 7, norm_epsilon=1e-5))
        elif option is MupConfig:
            yield from (MupConfig(4), MupConfig(8, base_layers=1))
        elif option is RopeLayout:
            yield from (RopeLayout(), RopeLayout(2), RopeLayout(2, "interleaved"), RopeLayout(None, "interleaved"))
        elif option is ClassifierConfig:
            yield from (ClassifierConfig(pooling="mean"), ClassifierConfig(dropout=0.25))
        elif option is Limits:
            yield from (Limits(), Limits(scores=3.0), Limits(logits=5.0), Limits(projections=2.0), Limits(neurons=3.0))
        elif option == tuple[LayerKind, ...]:
            yield from ((), (LayerKind(3),), (LayerKind(3), LayerKind()), (LayerKind(), LayerKind(3, rope_base=9.0)),
                        (LayerKind(use_rope=False), LayerKind(), LayerKind()), (LayerKind(3), LayerKind(4)),
                        (LayerKind(), LayerKind(use_experts=False)))
        elif typing.get_origin(option) is tuple:
            yield from ((), (1,), (1, 2), (1, 2, 3))
        else:
            raise TypeError(f"say what other values of {field}: {hint} a config may have")


def changed_configs(model_type, field):
    """The valid configs that differ from the example in one field, and in what is derived from
    it."""
    example = EXAMPLES[model_type]
    for value in candidates(field, getattr(example, field)):
        for change in (dataclasses.replace, ModelConfig.replace):
            try:
                config = change(example, **{field: value})
            except ValueError:
                continue
            if getattr(config, field) != getattr(example, field):
                yield config


def meaning(config):
    """The fields that a file must contain; a field that is None and follows another field gets the
    value of that field."""
    config = with_canonical_layers(config)
    values = {name: getattr(config, name) for name in FIELDS if name not in NOT_OF_THE_TRAINED_MODEL}
    if config.attention_dropout is None:
        values["attention_dropout"] = config.dropout
    for name in ("use_qkv_bias", "use_mlp_bias", "use_norm_bias"):
        if values[name] is None:
            values[name] = config.use_bias
    if config.moe is not None:  # the weight of the z-loss matters only in training
        values["moe"] = dataclasses.replace(
            config.moe, mlp_dim=config.moe.width(config), z_loss=0.0,
            experts_per_group_score=2 if config.moe.groups == 1 else config.moe.experts_per_group_score)
    if config.latent is not None:
        values["latent"] = dataclasses.replace(config.latent, value_dim=config.latent.value_width(config))
    if config.norm != "layernorm":  # it has no biases
        values["use_norm_bias"] = None
    if config.family == "encoder_decoder":
        del values["num_layers"]  # each side has its own
    return values


def test_every_family_has_an_example():
    assert set(EXAMPLES) == set(FAMILIES)


def test_every_field_has_another_value_somewhere():
    assert [name for name in FIELDS if not any(list(changed_configs(family, name)) for family in FAMILIES)] == []


@pytest.mark.long
@pytest.mark.parametrize("model_type", EXAMPLES)
def test_a_changed_field_is_exported_or_refused(model_type):
    family, example = FAMILIES[model_type], EXAMPLES[model_type]
    exported = refused = 0
    before = family.write_config(example)
    for field in FIELDS:
        for config in changed_configs(model_type, field):
            try:
                settings = family.write_config(config)
            except ValueError as error:
                refused += 1
                message = str(error)
                assert message.startswith(f"{model_type}: "), message
                named = [name for name in FIELDS if f"{name}={getattr(config, name)!r}" in message]
                assert field in named or (field in BOUND and named), (field, message)
                continue
            exported += 1
            again = family.read_config(json.loads(json.dumps({"model_type": model_type} | settings)))
            assert meaning(again) == meaning(config), field
            if meaning(config) != meaning(example):
                assert settings != before, field
    assert exported > 20 and refused > 20


@pytest.mark.parametrize("model_type", EXAMPLES)
def test_a_field_that_no_table_mentions_is_refused_and_not_lost(model_type):
    """Tests a field that is new and missing in every table."""
    family = FAMILIES[model_type]
    for row in family.settings:
        if row.ours in NOT_OF_THE_TRAINED_MODEL or row.default is REQUIRED:
            continue
        poorer = dataclasses.replace(family, settings=tuple(one for one in family.settings if one is not row))
        refused = 0
        for config in (EXAMPLES[model_type], *changed_configs(model_type, row.ours)):
            try:
                poorer.write_config(config)
            except ValueError as error:
                assert str(error).startswith(f"{model_type}: "), error
                refused += 1
        assert refused, row.ours
