"""Files of gpt-oss without torch: the place of every matrix, and weights in the format MXFP4."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import ExpertConfig, LayerKind, Limits, ModelConfig, RopeScaling

numpy_files = pytest.importorskip("safetensors.numpy", reason="the extra `hf` is not installed")

E, D, F = 3, 32, 64
CONFIG = ModelConfig(
    vocab_size=17, max_len=32, num_layers=2, num_heads=4, num_kv_heads=2, model_dim=D, mlp_dim=F, positions="rope",
    rope_base=500.0, rope_scaling=RopeScaling("yarn", 4.0, original_max_len=8, truncate=False), norm="rmsnorm",
    activation="swiglu_plus_one", limits=Limits(neurons=7.0), tie_embeddings=False, use_sinks=True,
    layer_pattern=(LayerKind(5), LayerKind()), moe=ExpertConfig(E, 2, z_loss=0.0))
# The sixteen numbers of four bits, by their bits: sign, two bits of exponent, one of mantissa.
NUMBERS = [(-1.0) ** (bits >> 3) * ((bits & 1) / 2 if bits & 7 < 2 else
                                    (1 + (bits & 1) / 2) * 2.0 ** ((bits >> 1 & 3) - 1)) for bits in range(16)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: tj.Decoder(CONFIG, key=key), jax.random.key(0))
    model = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)
    directory = tmp_path_factory.mktemp("gpt_oss")
    tj.to_huggingface(tj.Bundle(model, None, CONFIG), directory)
    return model, directory


def test_gate_and_up_lie_side_by_side(written):
    model, directory = written
    tensors = numpy_files.load_file(directory / "model.safetensors")
    mlp = model.stack.blocks.mlp
    for layer in range(2):
        place = f"model.layers.{layer}.mlp.experts"
        for bias in ("", "_bias"):
            joined = tensors[f"{place}.gate_up_proj{bias}"]
            np.testing.assert_array_equal(joined[..., ::2], getattr(mlp, f"gate{bias}")[layer])
            np.testing.assert_array_equal(joined[..., 1::2], getattr(mlp, f"up{bias}")[layer])
            np.testing.assert_array_equal(tensors[f"{place}.down_proj{bias}"], getattr(mlp, f"down{bias}")[layer])
        np.testing.assert_array_equal(tensors[f"model.layers.{layer}.self_attn.sinks"],
                                      model.stack.blocks.attention.sinks[layer])
    bundle = tj.from_huggingface(directory)
    assert bundle.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, bundle.model, model)


def with_packed_experts(directory, target):
    """The files with bytes of MXFP4 in place of the matrices of experts; and the numbers that they
    stand for."""
    rng, expected = np.random.default_rng(1), {}
    tensors = numpy_files.load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16)).astype(np.uint8)
        scales = rng.integers(120, 130, (experts, rows, columns // 32)).astype(np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = np.zeros((experts, columns, rows), np.float32)
        for e, column, row in np.ndindex(*values.shape):
            byte = int(blocks[e, row, column // 32, column % 32 // 2])
            bits = byte >> 4 if column % 2 else byte & 15
            values[e, column, row] = NUMBERS[bits] * 2.0 ** (int(scales[e, row, column // 32]) - 127)
        expected[name] = values
    numpy_files.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
    (target / "config.json").write_text(json.dumps(settings))
    return tensors, expected


def test_weights_of_four_bits_are_converted(written, tmp_path):
    _, expected = with_packed_experts(written[1], tmp_path)
    bundle = tj.from_huggingface(tmp_path)
    mlp = bundle.model.stack.blocks.mlp
    for layer in range(2):
        place = f"model.layers.{layer}.mlp.experts"
        np.testing.assert_array_equal(mlp.gate[layer], expected[f"{place}.gate_up_proj"][..., ::2])
        np.testing.assert_array_equal(mlp.up[layer], expected[f"{place}.gate_up_proj"][..., 1::2])
        np.testing.assert_array_equal(mlp.down[layer], expected[f"{place}.down_proj"])
    with pytest.warns(UserWarning, match="quantization_config=.* left out|left out: quantization_config="):
        tj.to_huggingface(bundle, tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_blocks_without_scales_and_other_formats_are_refused(written, tmp_path):
    tensors, _ = with_packed_experts(written[1], tmp_path)
    name = "model.layers.1.mlp.experts.down_proj"
    del tensors[f"{name}_scales"]
    numpy_files.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"down_proj_blocks is \[3, 32, 2, 16\] and .*_scales is None; expected"):
        tj.from_huggingface(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"quantization_config=.*'fp8'.* \(expected None\)"):
        tj.from_huggingface(tmp_path)
