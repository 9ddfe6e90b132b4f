"""The presets of encoders have as many parameters as the models of transformers."""

import json
import pathlib

import pytest

import transformer_jax as tj

COUNTS = json.loads((pathlib.Path(__file__).parent / "fixtures" / "parameter_counts.json").read_text())


def config_of(name):
    preset, _, part = name.partition(" ")
    config = tj.presets.get(preset)
    return getattr(config, part) if part else config


@pytest.mark.parametrize("name", COUNTS)
def test_as_many_as_transformers_counts(name):
    config = config_of(name)
    # This preset has no rows for positions that are never used; ModernBERT has no norm before
    # attention in its first layer, and the stack here has one that is not used.
    missing = {"roberta-base": 2 * 768}.get(name, 0) - (0 if config.use_first_norm else config.model_dim)
    assert tj.count_parameters(config) == COUNTS[name] - missing


def test_published_numbers():
    """As the safetensors files on the hub count."""
    assert COUNTS["bert-base"] == 109_514_298 and COUNTS["roberta-base"] == 124_697_433
    assert COUNTS["modernbert-base"] == 149_655_232 and COUNTS["bert-large"] == 335_174_458


def test_every_preset_of_an_encoder_is_counted():
    families = {name: tj.presets.get(name).family for name in tj.presets.names()}
    assert {name for name, family in families.items() if family in ("encoder", "electra")} - {"roberta-book"} == {
        name.partition(" ")[0] for name in COUNTS}
