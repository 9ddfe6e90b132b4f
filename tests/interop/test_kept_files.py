"""An export contains the files that the imported directory had besides its weights: chat templates,
``generation_config.json``, and settings that our models do not have. The tests also check what
these files decide."""

import json
import pathlib
import shutil
import warnings

import numpy as np
import pytest
from fixture_weights import model_directory

import transformer_jax as tj

pytest.importorskip("safetensors", reason="the extra `hf` is not installed")
TEMPLATE = "{% for message in messages %}\r\n{{ message['content'] }}äé{% endfor %}\n"


@pytest.fixture
def directory(tmp_path):
    return model_directory("llama3-published", tmp_path / "model")


def change(path, **settings):
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | settings))


def exported(bundle, tmp_path):
    tj.to_huggingface(bundle, tmp_path / "out")
    return tmp_path / "out"


def test_chat_templates_are_kept(directory, tmp_path):
    (directory / "chat_template.jinja").write_bytes(TEMPLATE.encode())
    more = directory / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("{{ tools }}")
    bundle = tj.from_huggingface(directory)
    saved = tmp_path / "saved"
    tj.save(saved, bundle)
    for kept in (bundle, tj.load(saved)):
        out = exported(kept, tmp_path)
        assert (out / "chat_template.jinja").read_bytes() == TEMPLATE.encode()
        assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
        shutil.rmtree(out)
    # The files of an earlier model in the directory are removed.
    out = exported(bundle, tmp_path)
    tj.to_huggingface(tj.Bundle(bundle.model, None, bundle.config), out)
    assert not list(out.rglob("*.jinja"))


def test_a_template_with_a_hostile_name_is_not_written(directory, tmp_path):
    bundle = tj.from_huggingface(directory)
    hostile = {"additional_chat_templates/../../x.jinja": "x", "../x.jinja": "x", "/tmp/interop_x.jinja": "x",
               "additional_chat_templates/a\\b.jinja": "x"}
    exported(tj.Bundle(bundle.model, None, bundle.config, files=hostile), tmp_path)
    assert not list(tmp_path.rglob("*x.jinja")) and not list(tmp_path.rglob("*b.jinja"))


def test_a_template_that_is_not_a_string_is_refused(directory):
    (directory / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: "):
        tj.from_huggingface(directory)


def test_settings_that_ours_do_not_have_are_kept(directory, tmp_path):
    change(directory / "config.json", id2label={"0": "a"}, pretraining_tp=3, my_own=[1, {"x": None}],
           task_specific_params={"a": 1})
    out = exported(tj.from_huggingface(directory), tmp_path)
    before, after = (json.loads((path / "config.json").read_text()) for path in (directory, out))
    changed = {name for name, value in before.items() if after.get(name, ...) != value}
    # The type is that of the tensors, which are float32 whatever this file says.
    assert changed == {"torch_dtype"} and after["torch_dtype"] == "float32"
    assert after["eos_token_id"] == before["eos_token_id"]


def test_the_export_leaves_out_settings_that_became_false_and_names_them(directory, tmp_path):
    change(directory / "config.json", auto_map={"AutoModel": "code.py"}, sliding_window=3)
    bundle = tj.from_huggingface(directory)
    with pytest.warns(UserWarning, match=r"left out: auto_map=\{'AutoModel': 'code.py'\}$"):
        exported(bundle, tmp_path)
    # Settings that the family's table expresses have the values of the present model.
    longer = bundle.config.replace(rope_scaling=tj.config.RopeScaling())
    with pytest.warns(UserWarning, match="left out: auto_map"):
        out = exported(tj.Bundle(bundle.model, None, longer, files=bundle.files), tmp_path)
    assert tj.from_huggingface(out).config == longer
    assert json.loads((out / "config.json").read_text())["rope_scaling"] is None
    # A setting that would describe another model is left out.
    directory = model_directory("bart-published", tmp_path / "bart")
    bundle = tj.from_huggingface(directory)
    without = tj.Bundle(bundle.model, None, bundle.config.replace(start_ids=(2,)), files=bundle.files)
    with pytest.warns(UserWarning, match="left out: force_bos_token_to_be_generated=True$"):
        out = exported(without, tmp_path)
    assert tj.from_huggingface(out).config == without.config


def test_generation_config_is_kept_and_changed_where_the_model_is(tmp_path):
    directory = model_directory("marian-published", tmp_path / "model")
    path = directory / "generation_config.json"
    change(path, num_beams=6, temperature=0.7, bad_words_ids=[[33], [4, 5], [0]])
    with pytest.warns(UserWarning, match=r"sequences of several tokens, which are left out: \[\[4, 5\]\]"):
        bundle = tj.from_huggingface(directory)
    # The end of a text can be drawn although it is listed, as in transformers.
    assert bundle.config.banned_ids == (33,) and bundle.config.start_ids == (33,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = exported(bundle, tmp_path)
    assert (out / "generation_config.json").read_bytes() == path.read_bytes()
    changed = tj.Bundle(bundle.model, None, bundle.config.replace(start_ids=(3, 7), banned_ids=(9,)),
                        files=bundle.files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = exported(changed, tmp_path)
        again = tj.from_huggingface(out)
    found = json.loads((out / "generation_config.json").read_text())
    assert found["num_beams"] == 6 and found["bad_words_ids"] == [[4, 5], [9]]
    assert (found["decoder_start_token_id"], found["forced_bos_token_id"]) == (3, 7)
    assert again.config == changed.config


def test_a_translation_model_with_its_tokenizer_is_saved(tmp_path):
    """The tokenizer of Marian has a class of its own."""
    fixtures = pathlib.Path(__file__).parent / "fixtures" / "tokenizers"
    for name, source in json.loads((fixtures / "cases.json").read_text("utf-8"))["marian"]["files"].items():
        shutil.copy(fixtures / source, tmp_path / name)
    bundle = tj.from_huggingface(model_directory("marian-published", tmp_path))
    tj.save(tmp_path / "saved", bundle)
    assert tj.load(tmp_path / "saved").tokenizer.to_bytes() == bundle.tokenizer.to_bytes()


@pytest.mark.parametrize(("told", "starts", "banned"), [
    (None, (2, 0), (7,)),
    # Where there is a generation_config.json, transformers 5.24 does not ask config.json, ...
    ({"decoder_start_token_id": 2}, (2,), ()),
    ({"decoder_start_token_id": 2, "forced_bos_token_id": 5, "bad_words_ids": [[8]]}, (2, 5), (8,)),
    ({"decoder_start_token_id": None, "bos_token_id": 4}, (4,), ()),
    # ... and would have no start here.
    ({}, (2,), ()),
])
def test_which_of_two_files_decides(told, starts, banned, tmp_path):
    directory = model_directory("bart-published", tmp_path)
    change(directory / "config.json", bad_words_ids=[[7]])
    if told is not None:
        (directory / "generation_config.json").write_text(json.dumps(told))
    config = tj.from_huggingface(directory).config
    assert (config.start_ids, config.banned_ids) == (starts, banned)


@pytest.mark.long
def test_bad_words_of_a_decoder(tmp_path):
    directory = model_directory("gpt2-transformers5", tmp_path / "model")
    bundle = tj.from_huggingface(directory)
    greedy = dict(prompts=[[5, 6]], max_new_tokens=8, end_ids=[], sampling=tj.Sampling(temperature=0))
    token = tj.generate(bundle.model, **greedy).tokens[0][0]
    change(directory / "generation_config.json", bad_words_ids=[[token]])
    bundle = tj.from_huggingface(directory)
    assert bundle.config.banned_ids == (token,) and token not in tj.generate(bundle.model, **greedy).tokens[0]
    assert tj.from_huggingface(exported(bundle, tmp_path)).config == bundle.config


def test_export_goes_back_to_its_family(tmp_path):
    """A Mistral without a window has the config of a Llama."""
    directory = model_directory("mistral-published", tmp_path / "model")
    change(directory / "config.json", sliding_window=None)
    bundle = tj.from_huggingface(directory)
    settings = json.loads((exported(bundle, tmp_path) / "config.json").read_text())
    assert settings["model_type"] == "mistral" and settings["sliding_window"] is None


def test_other_weight_files_in_the_directory_are_kept(directory, tmp_path):
    bundle = tj.from_huggingface(directory)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("model_of_mine.safetensors", "model.fp16.safetensors", "model-00001-of-00002.safetensors"):
        (out / name).write_bytes(b"")
    exported(bundle, tmp_path)
    assert {path.name for path in out.glob("*.safetensors")} == {
        "model_of_mine.safetensors", "model.fp16.safetensors", "model.safetensors"}
    np.testing.assert_array_equal(tj.from_huggingface(out).model.embeddings.token[...],
                                  bundle.model.embeddings.token[...])


def test_a_template_in_the_settings_of_the_tokenizer_is_kept(directory, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the extra `hf` is not installed")
    words = {word: place for place, word in enumerate(["<unk>", "<s>", "</s>", "a", "b"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    (directory / "tokenizer.json").write_text(tokenizer.to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}", "bos_token": "<s>",
                "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    bundle = tj.from_huggingface(directory)
    assert bundle.tokenizer.end_ids == (2, 30, 31)
    out = exported(bundle, tmp_path)
    assert (out / "chat_template.jinja").read_bytes() == TEMPLATE.encode()
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    before, after = (json.loads((path / "config.json").read_text()) for path in (directory, out))
    assert (after["bos_token_id"], after["eos_token_id"]) == (before["bos_token_id"], before["eos_token_id"])
    assert (out / "generation_config.json").read_bytes() == (directory / "generation_config.json").read_bytes()
