"""`import transformer_jax` stays light, and its public names all exist."""

import importlib
import inspect
import json
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import transformer_jax as tj
from transformer_jax.lazy import imports_for_type_checkers

HEAVY = ("flax", "optax", "orbax", "grain", "sentencepiece", "torch", "tensorflow", "tensorflow_datasets", "matplotlib",
         "ml_collections", "tensorboardX", "transformers")
NAMESPACES = ("transformer_jax", *(f"transformer_jax.{part}" for part in (
    "alignment", "config", "data", "decoding", "inspection", "interop", "models", "nn", "ops", "training")))


def modules_after(statement: str) -> set[str]:
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_import_loads_nothing_heavy():
    assert not modules_after("import transformer_jax") & set(HEAVY)


def test_ops_and_configs_need_no_flax():
    loaded = modules_after("from transformer_jax import config, ops, presets; ops.attend, config.ExperimentConfig")
    assert "jax" in loaded and not loaded & set(HEAVY)


def test_loading_a_model_does_show():
    assert "flax" in modules_after("import transformer_jax as tj; tj.Decoder")


def test_the_first_name_of_a_room_loads_only_what_it_needs():
    assert not modules_after("import transformer_jax as tj; tj.data.Windows, dir(tj.training)") & {"flax", "optax"}


@pytest.mark.parametrize("name", tj.__all__)
def test_every_public_name_resolves(name):
    value = getattr(tj, name)
    assert value.__doc__, f"{name} has no docstring"
    assert name in dir(tj)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_type_checkers_and_the_runtime_see_the_same_names(namespace):
    module = importlib.import_module(namespace)
    homes = imports_for_type_checkers(pathlib.Path(module.__file__).read_text())
    assert sorted(homes) == sorted(module.__all__) == sorted(dir(module))
    for name, home in homes.items():
        value = getattr(module, name)
        assert value is (importlib.import_module(f"{home}.{name}") if home == namespace
                         else getattr(importlib.import_module(home), name))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_no_public_name_is_that_of_a_module_in_the_same_folder(namespace):
    """Python sets an imported module as an attribute of its package and replaces a function of the
    same name."""
    module = importlib.import_module(namespace)
    values = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    assert not values & {found.name for found in pkgutil.iter_modules(module.__path__)}


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_an_unknown_name_suggests_the_nearest(namespace):
    module = importlib.import_module(namespace)
    name = module.__all__[-1]
    with pytest.raises(AttributeError, match=f"{namespace}' has no attribute '{name}_'; did you mean '{name}'?"):
        getattr(module, f"{name}_")
    with pytest.raises(AttributeError, match="no attribute 'qqqqqq'$"):
        module.qqqqqq  # noqa: B018


def test_the_presets_list_and_suggest_their_functions():
    assert dir(tj.presets) == ["get", "names"]
    with pytest.raises(AttributeError, match=r"did you mean 'names'\?"):
        tj.presets.name  # noqa: B018


def test_names_of_the_contract_are_public():
    assert {"AttentionMask", "BeamSearch", "Decoder", "Encoder", "EncoderDecoder", "ModelConfig", "Sampling",
            "beam_search", "count_parameters", "embed", "fill_mask", "forward", "generate", "load", "ops", "presets",
            "save", "score", "similarity", "stream", "trace"} <= set(tj.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"transformer_jax.*'Decodr'; did you mean 'Decoder'\?"):
        tj.Decodr  # noqa: B018
