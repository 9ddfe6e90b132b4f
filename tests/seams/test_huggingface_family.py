"""A custom Hugging Face family, whose tables are in this file."""

import contextlib
import json
import pathlib
import re

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import MeshConfig
from transformer_jax.interop import FAMILIES, Family, Setting, Weight, linear, norm, register_family
from transformer_jax.sharding import make_mesh

numpy_files = pytest.importorskip("safetensors.numpy", reason="the extra `hf` is not installed")

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "extending" / "huggingface_family.md"
_BLOCK, _LAYER = "stack.blocks", "net.{layer}"
# GPT-2 with other names, queries, keys and values apart, linear maps as torch has them, and a table
# of positions with an extra axis.
OWN = Family(
    "renamed_gpt2", "RenamedGPT2LMHeadModel",
    weights=(
        Weight("embeddings.token", "embed.tokens", also=("unembed",)),
        Weight("embeddings.position", "embed.positions", is_row=True),
        *norm(f"{_BLOCK}.attention_norm", f"{_LAYER}.first"),
        *linear(f"{_BLOCK}.attention.query", f"{_LAYER}.q"),
        *linear(f"{_BLOCK}.attention.key", f"{_LAYER}.k"),
        *linear(f"{_BLOCK}.attention.value", f"{_LAYER}.v"),
        *linear(f"{_BLOCK}.attention.output", f"{_LAYER}.o"),
        *norm(f"{_BLOCK}.mlp_norm", f"{_LAYER}.second"),
        *linear(f"{_BLOCK}.mlp.up", f"{_LAYER}.wide"),
        *linear(f"{_BLOCK}.mlp.down", f"{_LAYER}.narrow"),
        *norm("final_norm", "last"),
        Weight("embeddings.output", "unembed"),
    ),
    settings=(
        Setting("vocab_size", "tokens"), Setting("num_layers", "layers"), Setting("model_dim", "width"),
        Setting("mlp_dim", "wide", None), Setting("tie_embeddings", "tied", True),
        Setting("activation", "act", "relu", values={"max": "relu", "tanh": "gelu_tanh"}),
    ),
    fixed={"family": "decoder", "positions": "learned"},
    requires={"causal": True},
    # Two of their settings express one field of ours, and one setting counts differently.
    read=lambda settings: {"num_heads": settings["width"] // settings["head_width"],
                           "max_len": settings["last_position"] + 1},
    write=lambda config: {"head_width": config.head_dim, "last_position": config.max_len - 1},
)
CONFIG = tj.ModelConfig(vocab_size=19, max_len=12, num_layers=3, num_heads=2, model_dim=8, activation="gelu_tanh")


@pytest.fixture
def known():
    """Registers the family for one test only."""
    before = dict(FAMILIES)
    register_family(OWN)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


def random_bundle(config):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: tj.Decoder(config, key=key), jax.random.key(0))
    model = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)
    return tj.Bundle(model, None, config)


def renamed(gpt2):
    """The tensors of a GPT-2 in the family's names and layouts, by hand."""
    names = {"transformer.wte.weight": "embed.tokens", "lm_head.weight": "unembed",
             "transformer.ln_f.weight": "last.weight", "transformer.ln_f.bias": "last.bias"}
    parts = {"ln_1": "first", "ln_2": "second", "attn.c_proj": "o", "mlp.c_fc": "wide", "mlp.c_proj": "narrow"}
    found = {}
    for name, value in gpt2.items():
        if name == "transformer.wpe.weight":
            found["embed.positions"] = value[None]
        elif name in names:
            found[names[name]] = value
        else:
            layer, part, kind = re.fullmatch(r"transformer\.h\.(\d+)\.(.*)\.(weight|bias)", name).groups()
            value = value.T if kind == "weight" and value.ndim == 2 else value
            if part == "attn.c_attn":
                found |= {f"net.{layer}.{one}.{kind}": third for one, third in
                          zip("qkv", np.split(value, 3, axis=0), strict=True)}
            else:
                found[f"net.{layer}.{parts[part]}.{kind}"] = value
    return found


@pytest.mark.parametrize("config", [CONFIG, CONFIG.replace(tie_embeddings=False, activation="relu", mlp_dim=20)])
def test_there_and_back_is_exact(known, config, tmp_path):
    bundle = random_bundle(config)
    tj.to_huggingface(bundle, tmp_path / "own", model_type="renamed_gpt2")
    tj.to_huggingface(bundle, tmp_path / "gpt2")
    settings = json.loads((tmp_path / "own" / "config.json").read_text())
    assert (settings["model_type"], settings["architectures"]) == ("renamed_gpt2", ["RenamedGPT2LMHeadModel"])
    assert json.loads((tmp_path / "gpt2" / "config.json").read_text())["model_type"] == "gpt2"
    tensors = numpy_files.load_file(tmp_path / "own" / "model.safetensors")
    expected = renamed(numpy_files.load_file(tmp_path / "gpt2" / "model.safetensors"))
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    again = tj.from_huggingface(tmp_path / "own")
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, again.model, bundle.model)
    tj.to_huggingface(again, tmp_path / "twice", model_type="renamed_gpt2")
    for name, value in numpy_files.load_file(tmp_path / "twice" / "model.safetensors").items():
        np.testing.assert_array_equal(tensors[name], value)


def test_onto_eight_devices_and_into_a_bundle(known, tmp_path):
    bundle = random_bundle(CONFIG)
    tj.to_huggingface(bundle, tmp_path / "own", model_type="renamed_gpt2")
    sharded = tj.from_huggingface(tmp_path / "own", mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)))
    assert len(sharded.model.stack.blocks.mlp.up.kernel[...].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, sharded.model, bundle.model)
    tj.save(tmp_path / "saved", tj.from_huggingface(tmp_path / "own"))
    jax.tree.map(np.testing.assert_array_equal, tj.load(tmp_path / "saved").model, bundle.model)


@pytest.mark.parametrize(("changes", "words"), [
    (dict(sliding_window=4), r"renamed_gpt2: sliding_window=4 \(expected None\)"),
    (dict(norm_epsilon=1e-6, dropout=0.1), r"norm_epsilon=1e-06 \(expected 1e-05\), dropout=0.1 \(expected 0.0\)"),
    (dict(activation="gelu"), r"renamed_gpt2: activation='gelu' \(expected 'relu' or 'gelu_tanh'\)"),
])
def test_fields_that_the_tables_cannot_express_are_refused(known, changes, words, tmp_path):
    bundle = random_bundle(CONFIG.replace(**changes))
    with pytest.raises(ValueError, match=words):
        tj.to_huggingface(bundle, tmp_path / "own", model_type="renamed_gpt2")
    assert not (tmp_path / "own").exists()


def test_invalid_files_of_a_custom_family_raise(known, tmp_path):
    tj.to_huggingface(random_bundle(CONFIG), tmp_path, model_type="renamed_gpt2")
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"causal": False}))
    with pytest.raises(ValueError, match=r"causal=False \(expected True\)"):
        tj.from_huggingface(tmp_path)
    path.write_text(json.dumps({name: value for name, value in settings.items() if name != "width"}))
    with pytest.raises(ValueError, match="config.json of this renamed_gpt2 model lacks width"):
        tj.from_huggingface(tmp_path)


def test_a_name_is_taken_once(known):
    with pytest.raises(ValueError, match=r"'renamed_gpt2' is already registered; .*replace=True"):
        register_family(OWN)
    assert register_family(OWN, replace=True) is OWN


def test_a_family_that_is_not_registered(tmp_path):
    with pytest.raises(ValueError, match=r"model_type='renamed_gpt2' is not supported; .*register_family"):
        tj.to_huggingface(random_bundle(CONFIG), tmp_path, model_type="renamed_gpt2")


def test_the_page(known, tmp_path):
    names = {}
    with contextlib.chdir(tmp_path):
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(compile(block, str(PAGE), "exec"), names)
    jax.tree.map(np.testing.assert_array_equal, names["again"].model, names["bundle"].model)
    assert f"# {names['message']}" in PAGE.read_text()
    assert "layers.1.qkv.weight" in numpy_files.load_file(tmp_path / "my_model" / "model.safetensors")
