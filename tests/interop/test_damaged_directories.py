"""Directories of models that are damaged, hostile or of two models at once: the files that
transformers reads are read, and anything else ends in one line that names the file."""

import json
import shutil
import struct
import warnings

import jax
import numpy as np
import pytest
from fixture_weights import model_directory

import transformer_jax as tj

numpy_files = pytest.importorskip("safetensors.numpy", reason="the extra `hf` is not installed")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def gpt2(tmp_path):
    return model_directory("gpt2-transformers5", tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    return model_directory("mistral-transformers5", tmp_path / "sharded")


def change(directory, name="config.json", **settings):
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def tensors_of(directory):
    return numpy_files.load_file(directory / "model.safetensors")


def put(directory, tensors, name="model.safetensors"):
    numpy_files.save_file(tensors, directory / name, metadata={"format": "pt"})


def refusal(directory, *words):
    with pytest.raises(ValueError) as caught:
        tj.from_huggingface(directory)
    message = str(caught.value)
    assert all(word in message for word in words), message
    return message


def embedding(directory):
    return np.asarray(tj.from_huggingface(directory).model.embeddings.token[...])


def test_a_single_file_is_read_before_an_index(sharded):
    """As transformers 5.24 does; ``save_pretrained`` leaves the index of an earlier save behind."""
    before = embedding(sharded)
    whole = {}
    for path in sharded.glob("model-*.safetensors"):
        whole |= numpy_files.load_file(path)
    put(sharded, {name: value + 1 for name, value in whole.items()})
    with pytest.warns(UserWarning, match="two sets of weights; model.safetensors is read"):
        after = embedding(sharded)
    np.testing.assert_array_equal(after, before + 1)
    # The old files may be damaged, or lack what the model needs.
    for path in sharded.glob("model-*.safetensors"):
        path.write_bytes(b"nothing")
    (sharded / INDEX).write_text("{")
    with pytest.warns(UserWarning, match="two sets of weights"):
        np.testing.assert_array_equal(embedding(sharded), after)


def test_files_beside_the_weights_are_not_read(gpt2):
    before = embedding(gpt2)
    put(gpt2, {"other": np.zeros(3, np.float32)}, "model-00001-of-00002.safetensors")
    put(gpt2, {"other": np.zeros(3, np.float32)}, "model.fp16.safetensors")
    (gpt2 / "pytorch_model.bin").write_bytes(b"pickle")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(embedding(gpt2), before)
    (gpt2 / "adapter_config.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"has adapters too \(adapter_config.json\), which are not applied"):
        embedding(gpt2)


def test_the_file_that_a_config_names(gpt2):
    before = embedding(gpt2)
    put(gpt2, {name: value + 1 for name, value in tensors_of(gpt2).items()}, "other.safetensors")
    change(gpt2, transformers_weights="other.safetensors")
    np.testing.assert_array_equal(embedding(gpt2), before + 1)
    (gpt2 / "other.safetensors").unlink()
    refusal(gpt2, "has no other.safetensors")


@pytest.mark.parametrize(("name", "words"), [
    ("pytorch_model.bin", ["its weights in pytorch_model.bin only, which is pickle"]),
    ("adapter_config.json", ["has adapters of a model", "merge them with peft"]),
    ("model.fp16.safetensors", ["has neither model.safetensors nor", "which are not read: model.fp16.safetensors"]),
    ("tf_model.h5", ["which are not read: tf_model.h5"]),
])
def test_no_weights_that_are_read(gpt2, name, words):
    (gpt2 / "model.safetensors").rename(gpt2 / name)
    assert str(gpt2) in refusal(gpt2, *words)


@pytest.mark.parametrize("name", ["../{}", "/etc/{}", "sub/../../{}", "C:\\{}", "..\\{}", "", "a\0b", "{}/"])
def test_a_name_outside_the_directory(sharded, name):
    outside = sharded.parent / "model-00001-of-00006.safetensors"
    index = json.loads((sharded / INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    shutil.copy(sharded / first, outside)
    name = name.format(outside.name)
    index["weight_map"] = {key: name if value == first else value for key, value in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))
    message = refusal(sharded, INDEX, "expected a name inside its directory")
    assert "\n" not in message
    change(sharded, transformers_weights=f"../{outside.name}")
    refusal(sharded, "config.json names the file", "expected a name inside its directory")


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}',
                                   '{"weight_map": {"a": 3}}', '{"weight_map": null}', "[" * 100_000])
def test_a_damaged_index(sharded, index):
    (sharded / INDEX).write_text(index)
    assert "\n" not in refusal(sharded, INDEX)


def test_links_are_followed(sharded, tmp_path):
    """The cache of the Hugging Face hub consists of them."""
    before = embedding(sharded)
    for path in list(sharded.glob("*.safetensors")):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    np.testing.assert_array_equal(embedding(sharded), before)


@pytest.mark.parametrize("damage", ["empty", "cut header", "cut data", "huge header", "no json", "longer"])
def test_a_damaged_safetensors_file(gpt2, damage):
    path = gpt2 / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "cut header": data[:100], "cut data": data[:-1], "longer": data + b"\0",
                      "huge header": struct.pack("<Q", 2**60) + data[8:],
                      "no json": data[:8] + b"x" * (len(data) - 8)}[damage])
    assert "\n" not in refusal(gpt2, "model.safetensors is not a complete safetensors file")


def test_duplicate_missing_and_misshapen_tensors(gpt2, sharded):
    tensors = tensors_of(gpt2)
    put(gpt2, tensors | {"wte.weight": tensors["transformer.wte.weight"]})
    refusal(gpt2, "wte.weight in ", "are both the tensor transformer.wte.weight; expected one")
    put(gpt2, {name: value for name, value in tensors.items() if "h.1.ln_1.bias" not in name})
    assert "of another shape: " not in refusal(gpt2, "missing: transformer.h.1.ln_1.bias")
    for shape in ((), (0,), (1, 12), (12, 1, 1)):
        put(gpt2, tensors | {"transformer.ln_f.bias": np.zeros(shape, np.float32)})
        refusal(gpt2, f"of another shape: transformer.ln_f.bias is {list(shape)}, expected [12]")
    put(gpt2, tensors | {name: np.ones((), np.float32) for name in ("transformer.wte.weight", "lm_head.weight")})
    assert "missing: " not in refusal(gpt2, "of another shape: transformer.wte.weight is []")


def test_a_tensor_in_two_files(sharded):
    files = sorted(sharded.glob("model-*.safetensors"))
    first, last = (numpy_files.load_file(path) for path in (files[0], files[-1]))
    name = next(iter(first))
    put(sharded, last | {name: first[name]}, files[-1].name)
    assert "\n" not in refusal(sharded, f"{name} in ", files[0].name, files[-1].name, "expected one")


@pytest.mark.parametrize(("settings", "words"), [
    ({"n_layer": 10_000_000}, "n_layer=10000000, yet the files beside it have 28 tensors in all"),
    ({"vocab_size": 10**9}, "vocab_size=1000000000, yet the files beside it have"),
    ({"n_positions": 10**9}, "n_positions=1000000000, yet the files beside it have"),
    ({"n_embd": 4 * 10**8, "n_head": 2 * 10**8}, "yet the files beside it have"),
    ({"n_inner": 10**9}, "n_inner=1000000000, yet the files beside it have"),
    ({"vocab_size": 10**18}, "vocab_size=1000000000000000000 must be a positive integer, and at most"),
    ({"n_layer": 10**12}, "n_layer=1000000000000 must be a positive integer, and at most"),
])
def test_enormous_sizes_cost_nothing(gpt2, monkeypatch, settings, words):
    change(gpt2, **settings)
    monkeypatch.setattr(jax, "eval_shape", None)  # the library makes no array of these shapes
    assert "\n" not in refusal(gpt2, "config.json: ", words)


def test_an_enormous_window(tmp_path):
    directory = model_directory("qwen2-published", tmp_path)
    change(directory, use_sliding_window=True, max_window_layers=10**12)
    assert tj.from_huggingface(directory).config.sliding_window is None


WRONG = {
    "gpt2-transformers5": [
        {"n_layer": "2"}, {"n_layer": None}, {"n_layer": 2.0}, {"n_layer": True}, {"n_layer": [2]}, {"n_layer": -1},
        {"vocab_size": None}, {"vocab_size": {}}, {"layer_norm_epsilon": "tiny"}, {"layer_norm_epsilon": None},
        {"layer_norm_epsilon": float("nan")}, {"layer_norm_epsilon": float("inf")},
        {"activation_function": ["gelu"]}, {"activation_function": None}, {"tie_word_embeddings": "yes"},
        {"tie_word_embeddings": None}, {"attn_pdrop": 2.0}, {"attn_pdrop": "0.1"}, {"n_head": 5}, {"n_head": 0},
        {"eos_token_id": "2"}, {"eos_token_id": [1.5]}, {"bos_token_id": {}}, {"pad_token_id": [0]}],
    "llama3-published": [
        {"rope_theta": None}, {"rope_theta": "500"}, {"rope_theta": [1]}, {"rope_theta": -1.0},
        {"rope_scaling": "linear"}, {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": ["linear"]}}, {"rope_scaling": {"rope_type": "llama3", "factor": None}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": "16"}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, {"head_dim": "6"}, {"head_dim": 5},
        {"num_key_value_heads": 3}, {"attention_bias": None}, {"mlp_bias": 1}, {"hidden_act": {}},
        {"max_position_embeddings": None}, {"num_attention_heads": None},
        {"quantization_config": {"quant_method": "gptq"}}],
    "qwen2-published": [
        {"use_sliding_window": "no"}, {"use_sliding_window": True, "layer_types": "full_attention"},
        {"use_sliding_window": True, "layer_types": ["linear_attention"]},
        {"use_sliding_window": True, "layer_types": [[], []]}, {"use_sliding_window": True, "max_window_layers": None}],
    "roberta-published": [
        {"pad_token_id": None}, {"pad_token_id": "1"}, {"pad_token_id": 10**9}, {"pad_token_id": -2},
        {"max_position_embeddings": None}, {"max_position_embeddings": 2}, {"hidden_act": None},
        {"type_vocab_size": None}],
    "t5-published": [
        {"num_decoder_layers": "2"}, {"decoder_start_token_id": "0"}, {"decoder_start_token_id": 34},
        {"forced_bos_token_id": -1}, {"bad_words_ids": 3}, {"bad_words_ids": [3]}, {"bad_words_ids": [[]]},
        {"bad_words_ids": [["a"]]}, {"bad_words_ids": [[99]]}, {"scale_decoder_outputs": None}],
    "bart-published": [
        {"normalize_before": True}, {"add_final_layer_norm": True}, {"static_position_embeddings": True},
        {"normalize_embedding": False}, {"decoder_vocab_size": "34"}, {"decoder_layers": None}],
    "marian-published": [
        {"static_position_embeddings": False}, {"normalize_embedding": True}, {"scale_embedding": "x"}],
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_refused_by_file_and_field(case, tmp_path):
    directory = model_directory(case, tmp_path)
    good = (directory / "config.json").read_text()
    generation = directory / "generation_config.json"
    for settings in WRONG[case]:
        (directory / "config.json").write_text(json.dumps(json.loads(good) | settings))
        file = "config.json"
        told = {"bad_words_ids", "decoder_start_token_id", "forced_bos_token_id"}
        if generation.is_file() and settings.keys() <= told:
            generation.unlink()  # otherwise this file would be used
        message = refusal(directory, str(directory / file))
        assert "\n" not in message and any(name in message for name in settings), (settings, message)
        assert message.startswith("/")


@pytest.mark.parametrize("text", [
    "{", "", "[]", "null", "3", '{"model_type": "gpt2", "n_layer": 1e400}', '{"n_layer": 1' + "0" * 400 + "}",
    '{"n_layer": ' + "9" * 5000 + "}",
    '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", b"\xff\xfe{}", '{"model_type": ["gpt2"]}', '{"model_type": null}',
    "{}"])
def test_a_config_that_is_none(gpt2, text):
    (gpt2 / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "\n" not in refusal(gpt2, str(gpt2))
    if not (isinstance(text, str) and text.startswith(('{"model_type": [', '{"model_type": null', "{}"))):
        refusal(gpt2, "config.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "2"}', '{"bad_words_ids": [3]}',
                                  '{"decoder_start_token_id": 1.5}', '{"forced_bos_token_id": true}'])
def test_a_damaged_generation_config(tmp_path, text):
    directory = model_directory("marian-published", tmp_path)
    (directory / "generation_config.json").write_text(text)
    assert "\n" not in refusal(directory, "generation_config.json")
