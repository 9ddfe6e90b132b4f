"""Cross-layer transcoders in the files of circuit-tracer: files that circuit-tracer wrote
(``make_circuit_tracer.py``) and files of its layout compute the same numbers, and are the same when
they are written again."""

import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import CrossLayerTranscoderConfig

safetensors = pytest.importorskip("safetensors.numpy")
FOLDER = pathlib.Path(__file__).with_name("fixtures") / "circuit_tracer"
YAML = """# of a published repository
model_name: "google/gemma-2-2b"
model_kind: cross_layer_transcoder
feature_input_hook: "ln2.hook_normalized"
feature_output_hook: 'hook_mlp_out'  # after the norm
scan: [1, 2]
"""


def write(folder, dtype=np.float32, threshold=True, yaml=YAML):
    """Writes three layers of ten features, and returns the tensors."""
    random = np.random.default_rng(0)
    folder.mkdir()
    tensors = {}
    for layer in range(3):
        shapes = {"W_enc": (10, 6), "b_enc": (10,), "b_dec": (6,), "W_dec": (10, 3 - layer, 6)}
        shapes |= {"threshold": (10,)} if threshold else {}
        made = {f"{name}_{layer}": random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
        if threshold:
            made[f"threshold_{layer}"] = np.abs(made[f"threshold_{layer}"])
        safetensors.save_file({f"W_dec_{layer}": made[f"W_dec_{layer}"]}, folder / f"W_dec_{layer}.safetensors")
        tensors |= made
        del made[f"W_dec_{layer}"]
        safetensors.save_file(made, folder / f"W_enc_{layer}.safetensors")
    if yaml:
        (folder / "config.yaml").write_text(yaml)
    return {name: value.astype(np.float64) for name, value in tensors.items()}


@pytest.mark.parametrize("name", ["relu", "jump_relu"])
def test_what_circuit_tracer_wrote_computes_the_same_and_is_written_again(name, tmp_path):
    bundle = tj.features.from_circuit_tracer(FOLDER / name)
    expected = safetensors.load_file(FOLDER / name / "expected.safetensors")
    np.testing.assert_allclose(bundle.model.encode(expected["x"]), expected["features"], atol=1e-5)
    np.testing.assert_allclose(bundle.model(expected["x"]), expected["outputs"], atol=1e-5)
    tj.features.to_circuit_tracer(tmp_path, bundle)
    for path in FOLDER.joinpath(name).glob("W_*.safetensors"):
        theirs, ours = safetensors.load_file(path), safetensors.load_file(tmp_path / path.name)
        assert set(ours) == set(theirs)
        assert all(ours[tensor].tobytes() == values.tobytes() for tensor, values in theirs.items())
    assert (tmp_path / "config.yaml").read_text() == (FOLDER / name / "config.yaml").read_text()


@pytest.mark.parametrize("threshold", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_files_compute_the_formula_and_are_written_again(tmp_path, dtype, threshold):
    numpy_dtype = np.dtype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    tensors = write(tmp_path / "theirs", numpy_dtype, threshold)
    bundle = tj.features.from_circuit_tracer(tmp_path / "theirs")
    assert (bundle.config.site, bundle.config.target) == ("mlp_input", "mlp_output")
    x = np.random.default_rng(1).normal(size=(3, 7, 6))
    features = []
    for layer in range(3):
        pre = x[layer] @ tensors[f"W_enc_{layer}"].T + tensors[f"b_enc_{layer}"]
        features.append(pre * (pre > tensors[f"threshold_{layer}"]) if threshold else np.maximum(pre, 0))
    outputs = [sum(features[source] @ tensors[f"W_dec_{source}"][:, target - source] for source in range(target + 1))
               + tensors[f"b_dec_{target}"] for target in range(3)]
    np.testing.assert_allclose(bundle.model.encode(jnp.asarray(x, jnp.float32)), features, atol=1e-5)
    np.testing.assert_allclose(bundle.model(jnp.asarray(x, jnp.float32)), outputs, atol=2e-5)

    tj.save(tmp_path / "ours", bundle)  # what the checkpoint keeps is enough to write the same files
    for number, other in enumerate((bundle, tj.load(tmp_path / "ours"))):
        again = tmp_path / f"again{number}"
        tj.features.to_circuit_tracer(again, other, dtype=dtype)
        names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
        assert sorted(path.name for path in again.iterdir()) == names
        for name in names:
            assert (again / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


@pytest.mark.parametrize("activation", ["relu", "batch_topk", "jumprelu"])
def test_our_models_come_back_with_their_scales_folded_in(tmp_path, activation):
    config = CrossLayerTranscoderConfig(num_layers=2, input_dim=6, output_dim=4, num_features=9, k=3,
                                        activation=activation, scales=(0.5, 2.0), target_scales=(4.0, 0.25))
    model = tj.features.CrossLayerTranscoder(config, key=jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 9))
    model = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.abs(jax.random.normal(next(keys), leaf.shape)), model)
    tj.features.to_circuit_tracer(tmp_path, model, model_name="mine")
    assert 'model_name: "mine"' in (tmp_path / "config.yaml").read_text()
    again = tj.features.from_circuit_tracer(tmp_path)
    x = jax.random.normal(jax.random.key(2), (2, 7, 6)) * 4
    np.testing.assert_array_equal(again.model(x), model(x))
    assert again.config.scales == () and again.config.activation in ("relu", "jumprelu")


def test_an_unknown_hook_keeps_its_name_and_can_be_named(tmp_path):
    write(tmp_path / "theirs", yaml=YAML.replace("ln2.hook_normalized", "hook_of_mine"))
    assert tj.features.from_circuit_tracer(tmp_path / "theirs").config.site == "hook_of_mine"
    assert tj.features.from_circuit_tracer(tmp_path / "theirs", site="residual").config.site == "residual"


def test_damaged_files_and_models_that_circuit_tracer_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"has no W_enc_0\.safetensors"):
        tj.features.from_circuit_tracer(tmp_path)
    write(tmp_path / "theirs")
    cut = tmp_path / "theirs" / "W_dec_1.safetensors"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        tj.features.from_circuit_tracer(tmp_path / "theirs")
    safetensors.save_file({"W_dec_1": np.zeros((10, 3, 6), np.float32)}, cut)
    with pytest.raises(ValueError, match=r"has W_dec_1 as \(10, 3, 6\); expected \(10, 2, 6\)"):
        tj.features.from_circuit_tracer(tmp_path / "theirs")
    cut.unlink()
    with pytest.raises(ValueError, match=r"has no W_dec_1\.safetensors"):
        tj.features.from_circuit_tracer(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.yaml").write_text("model_kind: transcoder_set\n")
    with pytest.raises(ValueError, match="model_kind='transcoder_set' is not"):
        tj.features.from_circuit_tracer(tmp_path / "theirs")
    made = tj.features.CrossLayerTranscoder(CrossLayerTranscoderConfig(num_layers=1, input_dim=4, num_features=5, k=2),
                                            key=jax.random.key(0))
    with pytest.raises(ValueError, match="no cross-layer transcoder with activation='topk'"):
        tj.features.to_circuit_tracer(tmp_path / "new", made)
