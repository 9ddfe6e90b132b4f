"""`import transformer_jax` stays light, and its public names all exist."""

import json
import subprocess
import sys

import pytest

import transformer_jax as tj

HEAVY = ("flax", "optax", "orbax", "grain", "sentencepiece", "torch", "tensorflow", "tensorflow_datasets", "matplotlib",
         "ml_collections", "tensorboardX", "transformers")


def modules_after(statement: str) -> set[str]:
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_import_loads_nothing_heavy():
    assert not modules_after("import transformer_jax") & set(HEAVY)


def test_ops_and_configs_need_no_flax():
    loaded = modules_after("from transformer_jax import config, ops, presets")
    assert "jax" in loaded and not loaded & set(HEAVY)


def test_loading_a_model_does_show():
    assert "flax" in modules_after("import transformer_jax as tj; tj.Decoder")


@pytest.mark.parametrize("name", tj.__all__)
def test_every_public_name_resolves(name):
    value = getattr(tj, name)
    assert value.__doc__, f"{name} has no docstring"
    assert name in dir(tj)


def test_names_of_the_contract_are_public():
    assert {"AttentionMask", "BeamSearch", "Decoder", "Encoder", "EncoderDecoder", "ModelConfig", "Sampling",
            "beam_search", "count_parameters", "embed", "fill_mask", "forward", "generate", "load", "ops", "presets",
            "save", "score", "similarity", "stream", "trace"} <= set(tj.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="transformer_jax.*'Decodr'"):
        tj.Decodr  # noqa: B018
