"""Files of SAELens, written by SAELens (``make_saelens.py``): the same features, outputs and
metrics, and the same files when they are written again."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import SparseAutoencoderConfig

safetensors = pytest.importorskip("safetensors.numpy")
FOLDER = pathlib.Path(__file__).with_name("fixtures") / "saelens"
NAMES = sorted(path.name for path in FOLDER.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_what_saelens_wrote_computes_the_same_and_is_written_again(name, tmp_path):
    bundle = tj.features.from_saelens(FOLDER / name)
    expected = safetensors.load_file(FOLDER / name / "expected.safetensors")
    model, tolerance = bundle.model, 0.03 if "bfloat16" in name else 1e-5
    np.testing.assert_allclose(model.encode(expected["x"]), expected["features"], atol=tolerance)
    np.testing.assert_allclose(model(expected["x"]), expected["outputs"], atol=tolerance)
    names = {model.config.site: expected["x"], model.config.targets: expected["targets"]}
    found = tj.features.measure(model, tj.features.Rows(names), batch_size=10)
    assert found.explained_variance == pytest.approx(float(expected["explained_variance"]), abs=tolerance)
    assert found.l0 == pytest.approx(float(expected["l0"]), abs=1e-5 if tolerance < 0.01 else 0.1)
    assert model.config.targets == "layers.1.mlp_output"

    tj.features.to_saelens(tmp_path, bundle)
    written = safetensors.load_file(tmp_path / "sae_weights.safetensors")
    theirs = safetensors.load_file(FOLDER / name / "sae_weights.safetensors")
    assert set(written) == set(theirs)
    for tensor, values in theirs.items():
        assert written[tensor].dtype == values.dtype
        assert written[tensor].tobytes() == values.tobytes()
    assert json.loads((tmp_path / "cfg.json").read_text()) == json.loads((FOLDER / name / "cfg.json").read_text())


@pytest.mark.parametrize("activation", ["relu", "topk", "batch_topk", "jumprelu", "gated"])
def test_our_models_come_back_with_their_scales_folded_in(activation, tmp_path):
    config = SparseAutoencoderConfig(site="layers.2.residual", input_dim=6, num_features=10, k=3, scale=0.25,
                                     activation=activation)
    model = tj.features.SparseAutoencoder(config, key=jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 9))
    model = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.abs(jax.random.normal(next(keys), leaf.shape)), model)
    tj.features.to_saelens(tmp_path, model)
    again = tj.features.from_saelens(tmp_path)
    assert again.config.site == "layers.2.residual" and again.config.scale == 1
    x = jax.random.normal(jax.random.key(2), (7, 6)) * 4
    np.testing.assert_array_equal(again.model(x), model(x))
    assert json.loads((tmp_path / "cfg.json").read_text())["metadata"]["hook_name"] == "blocks.2.hook_resid_pre"


def test_the_older_form_of_the_config(tmp_path):
    shutil.copytree(FOLDER / "topk", tmp_path / "old")
    (tmp_path / "old" / "cfg.json").write_text(json.dumps({
        "d_in": 6, "d_sae": 10, "hook_point": "blocks.3.hook_resid_post", "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3}, "apply_b_dec_to_input": True, "dtype": "torch.float32"}))
    bundle = tj.features.from_saelens(tmp_path / "old")
    expected = safetensors.load_file(FOLDER / "topk" / "expected.safetensors")
    np.testing.assert_allclose(bundle.model(expected["x"]), expected["outputs"], atol=1e-5)
    assert bundle.config.site == "layers.4.residual" and bundle.config.k == 3


@pytest.mark.parametrize(("change", "message"), [
    ({"architecture": "temporal"}, "architecture='temporal' is not one of"),
    ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm' is not supported"),
    ({"architecture": ["topk"]}, r"cfg\.json: architecture is a list; expected text"),
    ({"metadata": "x"}, r"cfg\.json: metadata is .*; expected a JSON object"),
    ({"metadata": {"hook_name": 3}}, r"cfg\.json: metadata.hook_name is 3; expected text"),
    ({"apply_b_dec_to_input": "no"}, r"cfg\.json: apply_b_dec_to_input is .*; expected true or false"),
    ({"d_sae": 11}, r"cfg\.json: d_sae=11, but the tensors in sae_weights\.safetensors have 10"),
    ({"architecture": "jumprelu"}, "has the tensors W_dec, W_enc, b_dec, b_enc; expected"),
])
def test_what_ours_cannot_express_is_refused(change, message, tmp_path):
    shutil.copytree(FOLDER / "standard", tmp_path / "theirs")
    settings = json.loads((FOLDER / "standard" / "cfg.json").read_text())
    (tmp_path / "theirs" / "cfg.json").write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
        tj.features.from_saelens(tmp_path / "theirs")


def test_a_type_of_null_is_float32(tmp_path):
    shutil.copytree(FOLDER / "standard", tmp_path / "theirs")
    settings = json.loads((FOLDER / "standard" / "cfg.json").read_text()) | {"dtype": None}
    (tmp_path / "theirs" / "cfg.json").write_text(json.dumps(settings))
    tj.features.to_saelens(tmp_path / "ours", tj.features.from_saelens(tmp_path / "theirs"))
    assert json.loads((tmp_path / "ours" / "cfg.json").read_text())["dtype"] == "float32"


def test_damaged_files_and_models_that_saelens_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"has no cfg\.json"):
        tj.features.from_saelens(tmp_path)
    shutil.copytree(FOLDER / "standard", tmp_path / "cut")
    weights = tmp_path / "cut" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        tj.features.from_saelens(tmp_path / "cut")
    config = SparseAutoencoderConfig(site="layers.0.mlp_input", target="layers.0.mlp_output", input_dim=6,
                                     num_features=10, k=3, subtract_bias=False)
    with pytest.raises(ValueError, match="SAELens has no transcoder with activation='topk'"):
        tj.features.to_saelens(tmp_path / "new", tj.features.SparseAutoencoder(config, key=jax.random.key(0)))
