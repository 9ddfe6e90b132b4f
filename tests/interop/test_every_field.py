"""Every field of a config, changed in every family: it is exported and reads back equal, or
refused."""

import dataclasses
import json
import types
import typing

import pytest
from test_family_files import CONFIGS as ENCODERS_AND_PAIRS
from test_huggingface import OURS as DECODERS

from transformer_jax.config import ModelConfig, RopeScaling
from transformer_jax.config import model as model_config
from transformer_jax.interop import FAMILIES, REQUIRED
from transformer_jax.interop.family import NOT_OF_THE_TRAINED_MODEL

# A config that each family can express, with dropout where it has some.
EXAMPLES = {}
for _name, _config in {**DECODERS, **ENCODERS_AND_PAIRS}.items():
    EXAMPLES.setdefault(_name.split(",")[0], _config)
# A change of these may be refused by the name of another field: the width of a head, or T5's scale
# of tied logits.
BOUND = ("num_heads", "model_dim", "tie_embeddings")
FIELDS = {field.name: field for field in dataclasses.fields(ModelConfig)}


def candidates(field, value):
    """Other values of a field, by its type; some of them may not be valid in a config."""
    hint = typing.get_type_hints(ModelConfig)[field]
    for option in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        if option is bool:
            yield from (True, False)
        elif option is int:
            yield from (1, 2, 4, 12, 64, 256, *([value + 1, 2 * value] if isinstance(value, int) else []))
        elif option is float:
            yield from (0.25, 0.5, 1.0, 3.0, 0.0)
        elif option is str:
            yield from model_config._CHOICES[field]
        elif option is type(None):
            yield None
        elif option is RopeScaling:
            yield from (RopeScaling(), RopeScaling("linear", 3.0), RopeScaling("none", 3.0),
                        RopeScaling("linear", 3.0, original_max_len=12), RopeScaling("llama3", 3.0, 0.5, 2.0, 12))
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
    """The fields that a file must tell, with the dropout of attention as a number."""
    values = {name: getattr(config, name) for name in FIELDS if name not in NOT_OF_THE_TRAINED_MODEL}
    if config.attention_dropout is None:
        values["attention_dropout"] = config.dropout
    if config.family == "encoder_decoder":
        del values["num_layers"]  # each side has its own
    return values


def test_every_family_has_an_example():
    assert set(EXAMPLES) == set(FAMILIES)


def test_every_field_has_another_value_somewhere():
    assert [name for name in FIELDS if not any(list(changed_configs(family, name)) for family in FAMILIES)] == []


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
def test_what_a_table_leaves_out_is_refused_and_not_lost(model_type):
    """As a field that is new and that no table has heard of."""
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
