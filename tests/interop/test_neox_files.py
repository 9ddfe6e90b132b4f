"""Files of GPT-NeoX, GPT-J, Phi, OPT, StableLM and OLMo without torch: the layout of fused weights,
what is read without a prefix, and what is refused."""

import json

import numpy as np
import pytest
from fixture_weights import MODELS, model_directory

import transformer_jax as tj
from transformer_jax.config import RopeLayout
from transformer_jax.interop import FAMILIES

numpy_files = pytest.importorskip("safetensors.numpy", reason="the extra `hf` is not installed")


def settings_of(case, **changes):
    return json.loads((MODELS / case / "config.json").read_text()) | changes


def read(case, **changes):
    settings = settings_of(case, **changes)
    return FAMILIES[settings["model_type"]].read_config(settings)


def test_queries_keys_and_values_of_each_head_lie_together(tmp_path):
    directory = model_directory("gpt_neox-published", tmp_path)
    attention = tj.from_huggingface(directory).model.stack.blocks.attention
    tensors = numpy_files.load_file(directory / "model.safetensors")
    for layer in range(2):
        name = f"gpt_neox.layers.{layer}.attention.query_key_value"
        weight_N3HD = tensors[f"{name}.weight"].reshape(2, 3, 8, 16)
        bias_N3H = tensors[f"{name}.bias"].reshape(2, 3, 8)
        for part, linear in enumerate((attention.query, attention.key, attention.value)):
            np.testing.assert_array_equal(linear.kernel[layer].T, weight_N3HD[:, part].reshape(16, 16))
            np.testing.assert_array_equal(linear.bias[layer], bias_N3H[:, part].reshape(16))


@pytest.mark.parametrize(("case", "prefix"), [
    ("gpt_neox-published", "gpt_neox."), ("gptj-published", "transformer."), ("phi-published", "model."),
    ("opt-published", "model."), ("stablelm-published", "model."), ("olmo-published", "model.")])
def test_names_without_the_prefix_of_a_head(case, prefix):
    family = FAMILIES[settings_of(case)["model_type"]]
    names = json.loads((MODELS / case / "tensors.json").read_text())["tensors"]
    inside = [name for name in names if name.startswith(prefix)]
    assert len(inside) >= 15
    assert [family.renamed(name.removeprefix(prefix)) for name in inside] == inside
    assert [family.renamed(name) for name in names] == list(names)


@pytest.mark.parametrize(("case", "layout"), [
    ("gpt_neox-published", RopeLayout(2)), ("gptj-published", RopeLayout(4, "interleaved")),
    ("phi-published", RopeLayout(4)), ("stablelm-published", RopeLayout(2)), ("olmo-published", RopeLayout())])
def test_which_channels_are_rotated(case, layout):
    assert read(case).rope_layout == read(case.replace("published", "transformers5")).rope_layout == layout


@pytest.mark.parametrize(("case", "changes", "words"), [
    ("opt-published", {"word_embed_proj_dim": 6}, "word_embed_proj_dim=6 .* expected 12 and true.* as in opt-350m"),
    ("opt-published", {"do_layer_norm_before": False}, "do_layer_norm_before=False; expected 12 and true"),
    ("opt-published", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True"),
    ("phi-published", {"qk_layernorm": True}, r"qk_layernorm=True \(expected False\)"),
    ("stablelm-published", {"qk_layernorm": True}, r"qk_layernorm=True \(expected False\)"),
    ("gptj-published", {"rotary_dim": None}, "rotary_dim=null: expected a whole number"),
    ("gptj-published", {"rotary_dim": 10}, "rotary_dim=10: expected at most the 8 channels of a head"),
    ("gpt_neox-published", {"rotary_pct": 0.4}, "rotary_pct=0.4 of 8 channels of each head are 3; expected an even"),
    ("gpt_neox-published", {"rotary_pct": 2}, "rotary_pct=2.0 of 8 channels of each head are 16; expected an even"),
    ("gpt_neox-published", {"use_parallel_residual": "yes"}, "use_parallel_residual='yes' is not supported"),
])
def test_what_the_blocks_do_not_have_is_refused(case, changes, words):
    with pytest.raises(ValueError, match=words):
        read(case, **changes)


def test_a_head_of_another_width_is_not_written():
    config = read("gpt_neox-published").replace(head_dim=12)
    with pytest.raises(ValueError, match=r"gpt_neox: head_dim=12 \(expected 8\)"):
        FAMILIES["gpt_neox"].write_config(config)
