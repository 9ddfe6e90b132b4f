"""The family of docs/extending/model_family.md: training, resume, generation, scores, save and
load, flags, errors."""

import dataclasses
import itertools
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.cli.flags import _check_field, overridable
from transformer_jax.cli.help import _settings
from transformer_jax.config import ModelSettings, register_model_family
from transformer_jax.config.families import config_class_of, family_names, role_of
from transformer_jax.settings import differences, from_dict, to_dict
from transformer_jax.training.leaves import tree_digest

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "extending" / "model_family.md"
SCOPE: dict = {}
for block in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S):
    exec(compile(block, PAGE.name, "exec"), SCOPE)
ONE = tj.sharding.make_mesh(devices=jax.devices()[:1])
BigramConfig, CONFIG, BUNDLE = SCOPE["BigramConfig"], SCOPE["config"], SCOPE["bundle"]
TEXT = "to be or not to be, that is the question"


def test_the_table_learns_the_counts_of_the_text():
    longer = tj.train(CONFIG.replace(steps=150), texts=[TEXT] * 40, mesh=ONE)
    score = tj.score(longer.model, TEXT[:15], tokenizer=longer.tokenizer)
    pairs, scored = (list(itertools.pairwise(text)) for text in (TEXT, TEXT[:15]))
    expected = [math.log(pairs.count(pair) / TEXT.count(pair[0])) for pair in scored]
    np.testing.assert_allclose(score.logprobs[0][1:], expected, atol=0.4)


def test_a_model_is_saved_and_loaded_without_a_template(tmp_path):
    tj.save(tmp_path, BUNDLE)
    loaded = tj.load(tmp_path)
    assert type(loaded.config) is BigramConfig and loaded.config == BUNDLE.config
    assert loaded.experiment == BUNDLE.experiment and tree_digest(loaded.model) == tree_digest(BUNDLE.model)
    assert math.isfinite(tj.evaluate(loaded, [TEXT])["bits_per_byte"])


def test_a_run_is_resumed_by_its_workdir(tmp_path):
    tj.train(CONFIG, texts=[TEXT] * 40, steps=2, workdir=tmp_path, mesh=ONE)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"]["model"] == {"family": "bigram", "vocab_size": None, "max_len": 16, "num_layers": 1,
                                         "init_std": 0.02}
    assert type(tj.load(tmp_path).config) is BigramConfig
    constant = dataclasses.replace(CONFIG.optim, schedule="constant")
    config = CONFIG.replace(optim=constant)
    tj.train(config, texts=[TEXT] * 40, steps=10, workdir=tmp_path / "constant", mesh=ONE)
    resumed = tj.train(config, texts=[TEXT] * 40, workdir=tmp_path / "constant", mesh=ONE)
    assert tree_digest(resumed.model) == tree_digest(tj.train(config, texts=[TEXT] * 40, mesh=ONE).model)


def test_a_run_continues_from_a_base_of_the_family():
    further = tj.train(tj.ExperimentConfig(steps=2, batch_size=8), texts=[TEXT] * 40, base=BUNDLE)
    assert further.config == BUNDLE.config
    other = tj.ExperimentConfig(model=tj.ModelConfig(num_layers=3), steps=2, batch_size=8)
    with pytest.raises(ValueError, match="come from --model, which is of family 'bigram', but model.family='decoder'"):
        tj.train(other, texts=[TEXT] * 40, base=BUNDLE)


@pytest.mark.long
def test_ragged_prompts_decode_as_one_by_one():
    greedy = tj.Sampling(temperature=0)
    prompts = ["t", "to be or", ""]
    together = tj.generate(BUNDLE.model, prompts, tokenizer=BUNDLE.tokenizer, max_new_tokens=6, sampling=greedy)
    alone = [tj.generate(BUNDLE.model, prompt, tokenizer=BUNDLE.tokenizer, max_new_tokens=6, sampling=greedy).tokens[0]
             for prompt in prompts]
    assert together.tokens == alone


def test_the_config_becomes_json_and_flags_and_help():
    assert from_dict(tj.ExperimentConfig, json.loads(json.dumps(to_dict(CONFIG)))) == CONFIG
    flags = overridable(CONFIG)
    assert flags.model.init_std == 0.02
    lines = "\n".join(_settings(tj.ExperimentConfig, flags, "--config."))
    assert "--config.model.init_std  (float, default 0.02)\n      Standard deviation of the initial logits." in lines
    assert "--config.model.num_heads" not in lines
    assert differences(CONFIG, CONFIG.replace(model=tj.ModelConfig(max_len=16)))[:1] == [
        "model.family: 'bigram' -> 'decoder'"]


def test_preflight_counts_the_family_by_its_own_formula():
    planned = tj.preflight(CONFIG.replace(model=BUNDLE.config), 8, device="cpu", search=False)
    assert planned.flops == 0 and planned.num_parameters == BUNDLE.config.vocab_size ** 2


def test_errors_of_names_and_roles(tmp_path):
    with pytest.raises(ValueError, match="family='bigrams' is not one of decoder, .*did you mean 'bigram'"):
        from_dict(tj.ExperimentConfig, {"model": {"family": "bigrams"}})
    with pytest.raises(ValueError, match="BigramConfig has no field 'init_sdt'; did you mean 'init_std'"):
        from_dict(tj.ExperimentConfig, {"model": {"family": "bigram", "init_sdt": 1}})
    with pytest.raises(ValueError, match="BigramConfig has no field 'num_heads'"):
        CONFIG.model.replace(num_heads=2)
    with pytest.raises(ValueError, match="'bigram' is already registered"):
        register_model_family("bigram", BigramConfig, SCOPE["Bigram"])
    with pytest.raises(ValueError, match="'masked_language_model' is for models of family 'encoder'"):
        tj.train(CONFIG.replace(task="masked_language_model"), texts=[TEXT] * 4)
    with pytest.raises(ValueError, match="fill_mask is for models of family encoder, not bigram"):
        tj.fill_mask(BUNDLE.model, "to <mask>", tokenizer=BUNDLE.tokenizer)
    with pytest.raises(ValueError, match="family 'bigram' cannot be written in the Hugging Face format"):
        tj.to_huggingface(BUNDLE, tmp_path / "files")
    with pytest.raises(ValueError, match="watches the attention of a Transformer, but the model is of family 'bigram'"):
        tj.train(CONFIG.replace(metrics=tj.config.MetricsConfig(attention_every=1)), texts=[TEXT] * 40)


def test_a_family_without_a_role_needs_a_task():
    register_model_family("roleless", BigramConfig, SCOPE["Bigram"], replace=True)
    assert "roleless" in family_names() and role_of("roleless") == "roleless"
    with pytest.raises(ValueError, match="no task is known for models of family 'roleless'; set config.task to one of"):
        tj.train(CONFIG.replace(model=BigramConfig(family="roleless")), texts=[TEXT] * 4)
    assert ModelSettings.class_for({}) is tj.ModelConfig and config_class_of("reward") is tj.ModelConfig


PROGRAM = """
import sys
import transformer_jax as tj
exec(open({code!r}).read())
from transformer_jax.cli.flags import define_config, run
config = define_config()
def main():
    print(config().model)
main.__module__ = "__main__"
run(main)
"""


def test_flags_of_a_program_name_the_fields_of_the_family(tmp_path):
    assert _check_field("model.init_std", CONFIG) is float
    with pytest.raises(ValueError, match="BigramConfig has no field 'init_sdt'; did you mean 'init_std'"):
        _check_field("model.init_sdt", CONFIG)
    code, config = tmp_path / "family.py", tmp_path / "config.py"
    code.write_text(re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)[0])
    config.write_text("import transformer_jax as tj\nfrom transformer_jax.config.families import config_class_of\n\n\n"
                      "def get_config():\n    return tj.ExperimentConfig(model=config_class_of('bigram')())\n")
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(code=str(code)), f"--config={config}",
                           "--config.model.init_std=0.5", "--config.model.family=decoder"],
                          capture_output=True, text=True)
    assert "needs a ModelConfig, but the chosen --config has a BigramConfig" in done.stderr


def test_eight_devices_train_as_one_does():
    mesh = tj.sharding.make_mesh(tj.config.MeshConfig(fsdp=2, tensor=2))
    config = CONFIG.replace(steps=3, batch_size=8)
    one, eight = (tj.train(config, texts=[TEXT] * 40, mesh=made) for made in
                  (tj.sharding.make_mesh(devices=jax.devices()[:1]), mesh))
    np.testing.assert_allclose(one.model.table[...], eight.model.table[...], atol=1e-5)
