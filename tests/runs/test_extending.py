"""A run is extended, resumed with only its workdir, and started from a trained model on plain
text."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
from imported import imported

import transformer_jax as tj
from transformer_jax.config import CheckpointConfig, EvalConfig, LoraConfig, OptimConfig, SampleConfig
from transformer_jax.training.leaves import tree_digest

ONE = tj.sharding.make_mesh(devices=jax.devices()[:1])
SENTENCES = ["the cat sat on the mat", "a dog ran after the cat", "cats and dogs, running there"]
CONFIG = tj.ExperimentConfig(
    steps=6, batch_size=4, log_every=1, optim=OptimConfig(peak_lr=0.01, warmup_steps=2, schedule="constant"),
    model=tj.ModelConfig(max_len=8, num_layers=1, num_heads=1, model_dim=8, dropout=0.1),
    eval=EvalConfig(every=6, batch_size=8), checkpoint=CheckpointConfig(every=100), sample=SampleConfig(every=0))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(SENTENCES * 20))
    return path


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A run of six steps that has ended."""
    workdir = tmp_path_factory.mktemp("runs") / "six"
    tj.train(CONFIG, text, workdir=workdir, mesh=ONE)
    return workdir


@pytest.fixture(scope="module")
def nine(text):
    """The model of a run that had nine steps from the beginning."""
    return tj.train(CONFIG, text, steps=9, mesh=ONE).model


def copied(workdir, tmp_path):
    return shutil.copytree(workdir, tmp_path / "run")


@pytest.mark.long
def test_an_extended_run_equals_a_longer_one_bit_for_bit(finished, nine, text, tmp_path, capsys):
    workdir = copied(finished, tmp_path)
    longer = tj.train(CONFIG, text, steps=9, workdir=workdir, mesh=ONE)
    assert longer.step == 9 and tree_digest(longer.model) == tree_digest(nine)
    out = capsys.readouterr().out
    assert "settings changed after step 6: steps: 6 -> 9\n" in out
    assert "the steps up to 6 had the learning rates of a run of 9 steps: the result is the same" in out
    lines = tj.training.read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 10))
    assert json.loads((workdir / "run.json").read_text())["changes"] == [
        {"after_step": 6, "changed": ["steps: 6 -> 9"]}]
    with pytest.raises(ValueError, match=r"steps=6, but the run in .*run has already taken 9 steps; set more steps"):
        tj.train(CONFIG, text, workdir=workdir, mesh=ONE)


@pytest.mark.long
def test_a_run_is_resumed_and_extended_from_its_workdir_only(finished, nine, text, tmp_path):
    with pytest.raises(tj.training.Interrupted):
        tj.train(CONFIG, text, workdir=tmp_path / "stopped", mesh=ONE,
                 hooks=[lambda loop: loop.step == 5 and os.kill(os.getpid(), signal.SIGTERM)])
    resumed = tj.train(workdir=tmp_path / "stopped", mesh=ONE)
    assert resumed.step == 6 and tree_digest(resumed.model) == tree_digest(tj.load(finished).model)
    assert tree_digest(tj.train(workdir=tmp_path / "stopped", steps=9, mesh=ONE).model) == tree_digest(nine)


@pytest.mark.long
def test_extending_stretches_the_schedule_and_prints_a_note(text, tmp_path, capsys):
    linear = CONFIG.replace(optim=dataclasses.replace(CONFIG.optim, schedule="linear", end_lr=0.0))
    tj.train(linear, text, workdir=tmp_path, mesh=ONE)
    tj.train(workdir=tmp_path, steps=8, mesh=ONE)
    # After a warmup of 2 steps the rate falls to 0 at step 6, or at step 8: at step 6 it is a third
    # of the highest.
    assert ("optim.schedule=linear is stretched over 8 steps: the learning rate at step 6 goes from 0 to 0.00333, and "
            "the result is not that of a run that had 8 steps from the beginning") in capsys.readouterr().out
    rates = {line["step"]: line["learning_rate"] for line in tj.training.read_metrics(tmp_path / "metrics.jsonl")
             if "learning_rate" in line}
    assert rates[7] == pytest.approx(0.01 / 3) and rates[8] == pytest.approx(0.01 / 6)


@pytest.mark.long
def test_arguments_that_no_file_stores_must_be_passed_again(tmp_path):
    import optax

    tj.train(CONFIG, SENTENCES * 20, workdir=tmp_path, optimizer=optax.sgd(0.1), steps=1, mesh=ONE)
    with pytest.raises(ValueError, match=r"started from Python with its own data, optimizer"):
        tj.train(workdir=tmp_path)
    with pytest.raises(ValueError, match=r"started from Python with its own optimizer"):
        tj.train(workdir=tmp_path, data=SENTENCES * 20)
    again = tj.train(workdir=tmp_path, data=SENTENCES * 20, optimizer=optax.sgd(0.1), steps=2, mesh=ONE)
    assert again.step == 2


@pytest.mark.parametrize("content", ["{", '{"config": {"steps": "many"}, "contents": []}'])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/run.json.*restore it from a copy to resume"):
        tj.train(workdir=tmp_path)


def test_resuming_an_empty_workdir_raises(tmp_path):
    with pytest.raises(ValueError, match="config is missing: there is no run in .* to resume"):
        tj.train(workdir=tmp_path / "none")
    with pytest.raises(ValueError, match=r"config is missing: pass a tj.ExperimentConfig"):
        tj.train()
    assert not (tmp_path / "none").exists()


# Continued pretraining


def continued(**changes):
    recipe = tj.recipes.get("continued")
    return recipe.replace(steps=3, batch_size=4, log_every=1, eval=EvalConfig(every=3, batch_size=4),
                          optim=dataclasses.replace(recipe.optim, peak_lr=1e-3, warmup_steps=1, schedule="constant"),
                          **changes)


@pytest.mark.long
def test_an_imported_model_goes_on_learning_from_text_and_resumes_alone(text, tmp_path, tmp_path_factory):
    source = imported("gpt2", tmp_path_factory.getbasetemp())[0]
    config = continued(data=tj.config.DataConfig(max_len=16))
    with pytest.raises(tj.training.Interrupted):
        tj.train(config, text, base=source, workdir=tmp_path / "run", mesh=ONE,
                 hooks=[lambda loop: loop.step == 2 and os.kill(os.getpid(), signal.SIGTERM)])
    trained = tj.train(workdir=tmp_path / "run", mesh=ONE)
    base = tj.from_huggingface(source)
    assert trained.step == 3 and trained.config == base.config and trained.tokenizer.digest == base.tokenizer.digest
    assert tree_digest(trained.model) == tree_digest(tj.train(config, text, base=base, mesh=ONE).model)
    assert tj.evaluate(trained, text)["loss"] < tj.evaluate(base, text)["loss"]
    # What an export writes again (chat templates, generation settings) stays with the model.
    assert base.files and trained.files == base.files == tj.load(tmp_path / "run").files


@pytest.mark.long
def test_an_imported_encoder_learns_masked_tokens(text, tmp_path_factory):
    source = imported("bert", tmp_path_factory.getbasetemp())[0]
    trained = tj.train(continued(), text, base=source, mesh=ONE)
    assert trained.experiment.model.family == "encoder" and trained.step == 3


@pytest.mark.long
def test_a_missing_base_model_raises(finished, text, tmp_path):
    base = copied(finished, tmp_path)
    config = continued(lora=LoraConfig(rank=1))
    tj.train(config, text, base=base, base_step="best", workdir=tmp_path / "more", mesh=ONE, steps=1)
    kept = json.loads((tmp_path / "more" / "run.json").read_text())["base"]
    assert kept == {"source": str(base), "step": "best"}
    assert tj.train(workdir=tmp_path / "more", steps=2, mesh=ONE).step == 2
    shutil.rmtree(base)
    with pytest.raises(ValueError, match=rf"started from {base}, which cannot be loaded: .*; if the model is now"):
        tj.train(workdir=tmp_path / "more")


def test_the_config_of_the_bases_own_run_serves_for_the_next(finished, text):
    base = tj.load(finished)
    next_config = base.experiment.replace(steps=1, seed=3)
    assert tj.train(next_config, text, base=base, mesh=ONE).step == 1
    with pytest.raises(ValueError, match=r"may only change dropout.*not model.num_heads: 1 -> 2; model.num_kv_heads"):
        tj.train(next_config.replace(model=next_config.model.replace(num_heads=2)), text, base=base, mesh=ONE)


# Arguments from Python


class Hookless:
    pass


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(config=3), "config is of type int; expected a tj.ExperimentConfig, or the name of a recipe"),
    (dict(steps="3"), r"steps='3' must be a positive integer"),
    (dict(texts=[1, 2]), "text 1 of 2 is of type int; expected a string"),
    (dict(data={"text": "a"}), "corpus 'text': expected a list of texts, not a str"),
    (dict(texts=3), "texts is of type int; pass a list of strings"),
    (dict(texts=SENTENCES, task="sft"), "task is of type str; expected a class of tj.Task"),
    (dict(texts=SENTENCES, change="yes"), "change is of type str; expected True or False"),
    (dict(data=3), "data is of type int; expected a path, a list of examples, or an iterator of batches"),
    (dict(texts=SENTENCES, held_out="file.txt"), "held_out is of type str; expected a list of examples"),
    (dict(texts=SENTENCES, base=Hookless()), "base is of type Hookless; expected a tj.Bundle"),
    (dict(texts=SENTENCES, tokenizer="bpe"), "tokenizer is of type str; expected a tj.Tokenizer"),
    (dict(texts=SENTENCES, hooks=[Hookless()]), "a hook is of type Hookless; expected a function of the loop"),
    (dict(texts=SENTENCES, hooks=print), "hooks is of type builtin_function_or_method; expected a list of hooks"),
    (dict(texts=SENTENCES, loggers=[Hookless()]), r"a logger is of type Hookless; expected one with the methods write"),
    (dict(texts=SENTENCES, optimizer="adam"), "optimizer is of type str; expected an optax.GradientTransformation"),
    (dict(texts=SENTENCES, workdir=""), "workdir is an empty string, which would mean the current directory"),
    (dict(texts=SENTENCES, workdir=3), "workdir is of type int; expected a path"),
    (dict(texts=SENTENCES, base_step=3),
     "base_step=3 selects a checkpoint of a workdir, but base is not the path of a workdir"),
    (dict(texts=SENTENCES, mesh=jax.make_mesh((8,), ("data",))),
     "the mesh has the axes data, but lacks fsdp, expert, sequence, tensor; expected data, fsdp, expert"),
    (dict(texts=SENTENCES, mesh=8), "mesh is of type int; expected a jax.sharding.Mesh"),
    (dict(texts=SENTENCES, config=CONFIG.replace(model=CONFIG.model.replace(family="reward"), task="language_model")),
     "the task 'language_model' is for models of family 'decoder', but the model is of family 'reward'"),
    (dict(texts=SENTENCES, config=CONFIG.replace(model=CONFIG.model.replace(family="reward"))),
     "the task 'reward' starts from a trained model"),
    (dict(config=CONFIG.replace(model=CONFIG.model.replace(family="encoder_decoder")), data=SENTENCES),
     r"example 0 is 'the cat sat on the mat'; expected a pair of texts, \(source, target\)"),
])
def test_wrong_arguments_are_refused_in_one_line(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        tj.train(**{"config": CONFIG} | arguments)
    assert not list(pathlib.Path().iterdir())


def test_wrong_arguments_of_evaluate_init_training_and_preflight(finished):
    bundle = tj.load(finished)
    complete = CONFIG.replace(model=bundle.config)
    flat = jax.make_mesh((8,), ("x",))
    for call, message in (
            (lambda: tj.evaluate(bundle.model, SENTENCES), "bundle is of type Decoder; expected a tj.Bundle"),
            (lambda: tj.evaluate(bundle, SENTENCES, batch_size=0), "batch_size=0 must be a positive integer"),
            (lambda: tj.evaluate(bundle, [1]), "text 1 of 1 is of type int"),
            (lambda: tj.evaluate(bundle, SENTENCES, task="masked_language_model"), "is for models of family 'encoder'"),
            (lambda: tj.init_training("shakespeare_char"), "config is of type str; expected a tj.ExperimentConfig"),
            (lambda: tj.init_training(complete, "language_model"), "task is of type str; expected a tj.Task"),
            (lambda: tj.init_training(CONFIG), "model.vocab_size is not set"),
            (lambda: tj.init_training(complete, mesh=flat), "the mesh has the axes x, but lacks data, fsdp"),
            (lambda: tj.preflight(complete, mesh=flat), "the mesh has the axes x, but lacks data, fsdp")):
        with pytest.raises(ValueError, match=message):
            call()


def test_rows_may_be_shorter_than_the_model_can_read():
    config = CONFIG.replace(model=CONFIG.model.replace(vocab_size=9), data=tj.config.DataConfig(max_len=4))
    shapes = tj.runs.batch_shapes(config, 3)
    assert {shape.shape for shape in shapes.values()} == {(3, 4)}
    assert config.replace(data=tj.config.DataConfig(max_len=99)).row_length == 8
    assert np.prod((3, 4)) == tj.preflight(config, 3, ONE, search=False).tokens
