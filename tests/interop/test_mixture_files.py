"""Files of Mixtral, Qwen3-MoE and OLMoE without torch: the place of every matrix, and what is
refused; and the loss that balances experts against transformers."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from fixture_weights import MODELS, model_directory

import transformer_jax as tj
from transformer_jax.interop import FAMILIES
from transformer_jax.ops.routing import balance_loss

numpy_files = pytest.importorskip("safetensors.numpy", reason="the extra `hf` is not installed")


def read(case, **changes):
    settings = json.loads((MODELS / case / "config.json").read_text()) | changes
    return FAMILIES[settings["model_type"]].read_config(settings)


@pytest.mark.parametrize(("case", "place", "names"), [
    ("mixtral-published", "block_sparse_moe", ("w1", "w3", "w2")),
    ("qwen3_moe-published", "mlp", ("gate_proj", "up_proj", "down_proj"))])
def test_every_matrix_of_every_expert_is_a_tensor(case, place, names, tmp_path):
    directory = model_directory(case, tmp_path)
    mlp = tj.from_huggingface(directory).model.stack.blocks.mlp
    tensors = numpy_files.load_file(directory / "model.safetensors")
    for layer, expert in np.ndindex(2, 4):
        for ours, theirs in zip((mlp.gate, mlp.up, mlp.down), names, strict=True):
            np.testing.assert_array_equal(
                ours[layer, expert].T, tensors[f"model.layers.{layer}.{place}.experts.{expert}.{theirs}.weight"])
        np.testing.assert_array_equal(mlp.router.kernel[layer].T, tensors[f"model.layers.{layer}.{place}.gate.weight"])


@pytest.mark.parametrize(("case", "changes", "words"), [
    ("qwen3_moe-published", {"mlp_only_layers": [0, 1]}, "no layer has experts"),
    ("qwen3_moe-published", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 and .* expected a positive number"),
    ("qwen3_moe-published", {"use_sliding_window": True}, r"use_sliding_window=True \(expected False\)"),
    ("olmoe-published", {"clip_qkv": 8.0}, r"clip_qkv=8.0 \(expected None\)"),
    ("mixtral-published", {"num_local_experts": 1}, "experts_per_token=2 is more than the 1 experts"),
    ("mixtral-published", {"num_experts_per_tok": "two"}, "num_experts_per_tok='two': expected a whole number"),
])
def test_what_the_layers_do_not_have_is_refused(case, changes, words):
    with pytest.raises(ValueError, match=words):
        read(case, **changes)


@pytest.mark.parametrize(("settings", "dense"), [
    (dict(mlp_only_layers=[0]), [0]), (dict(mlp_only_layers=[0, 3]), [0, 3]), (dict(decoder_sparse_step=2), [0, 2, 4]),
    (dict(decoder_sparse_step=3, mlp_only_layers=[2]), [0, 1, 2, 3, 4])])
def test_dense_layers_among_the_experts(settings, dense):
    config = read("qwen3_moe-published", num_hidden_layers=6, **settings)
    assert [layer for layer in range(6) if layer not in config.moe.layers(config)] == dense
    written = FAMILIES["qwen3_moe"].write_config(config)
    assert FAMILIES["qwen3_moe"].read_config(written | {"model_type": "qwen3_moe"}) == config


def test_an_enormous_number_of_experts_is_refused_before_memory_is_used(tmp_path):
    directory = model_directory("mixtral-published", tmp_path)
    settings = json.loads((directory / "config.json").read_text()) | {"num_local_experts": 10**9}
    (directory / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"num_experts of the experts is 1000000000, yet the files .* tensors in all"):
        tj.from_huggingface(directory)


def test_tensors_of_experts_that_are_missing_are_named(tmp_path):
    directory = model_directory("mixtral-published", tmp_path)
    whole = numpy_files.load_file(directory / "model.safetensors")
    expert = "model.layers.1.block_sparse_moe.experts.2"
    for lost, message in (([f"{expert}.w2.weight"], f"missing: {expert}.w2.weight"),
                          ([name for name in whole if "experts." in name], "missing: .*experts.0.w1.weight"),
                          (["model.layers.0.block_sparse_moe.gate.weight"], "missing: .*gate.weight")):
        numpy_files.save_file({name: value for name, value in whole.items() if name not in lost},
                              directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message) as raised:
            tj.from_huggingface(directory)
        assert str(directory) in str(raised.value) and len(str(raised.value)) < 1500
    numpy_files.save_file(whole | {f"{expert}.w2.weight": whole[f"{expert}.w2.weight"][:, 1:].copy()},
                          directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"of another shape: {expert}.w2.weight is"):
        tj.from_huggingface(directory)


@pytest.mark.parametrize("changes", [dict(shared_experts=1), dict(scores="sigmoid"), dict(weight_scale=2.0)])
def test_experts_that_no_family_has_are_not_written(changes):
    config = read("mixtral-published")
    config = config.replace(moe=dataclasses.replace(config.moe, **changes))
    with pytest.raises(ValueError, match=r"mixtral: moe=ExpertConfig\("):
        FAMILIES["mixtral"].write_config(config)


def test_the_loss_that_balances_experts_is_that_of_transformers():
    """Of one layer: with several, transformers takes the mean of loads and probabilities over the
    layers first."""
    torch = pytest.importorskip("torch", reason="the extra `bench` is not installed")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral",
                                  reason="the extra `bench` is not installed")
    logits = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
    valid = np.arange(7) >= np.array([[0], [4]])
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ours = balance_loss(jnp.asarray(probabilities), jnp.asarray(np.argsort(-logits)[..., :2]), jnp.asarray(valid))
    theirs = mixtral.load_balancing_loss_func((torch.tensor(logits.reshape(-1, 5)),), 5, 2,
                                              torch.tensor(valid.astype(np.int64)))
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
