"""Training on several corpora, from Python and from flags."""

import dataclasses
import json
import math
import random

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import CheckpointConfig, CorpusConfig, DataConfig, EvalConfig, OptimConfig, SampleConfig
from transformer_jax.data import Tokenizer, evaluation_batches, make_batches
from transformer_jax.settings import from_dict, to_dict
from transformer_jax.training import Interrupted
from transformer_jax.training.objectives import next_token_loss

CONFIG = tj.ExperimentConfig(
    steps=8, batch_size=8, log_every=4, optim=OptimConfig(peak_lr=0.01, warmup_steps=2),
    model=tj.ModelConfig(max_len=16, num_layers=1, num_heads=2, model_dim=16), eval=EvalConfig(every=4, batch_size=8),
    checkpoint=CheckpointConfig(every=100), sample=SampleConfig(every=0),
    data=DataConfig(mixture=(CorpusConfig("cats", weight=3), CorpusConfig("digits", weight=1))))


@pytest.fixture(scope="module")
def corpora():
    draw = random.Random(0)
    return {"digits": ["".join(draw.choices("0123456789", k=30)) for _ in range(40)],
            "cats": [" ".join(draw.choices(["the", "cat", "sat"], k=12)) for _ in range(60)]}


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def stop_after(step):
    def hook(loop):
        if loop.step == step:
            loop.stop_signal = 15
    return hook


@pytest.mark.long
def test_a_mixture_is_reported_evaluated_by_corpus_and_resumed_to_the_bit(corpora, tmp_path, capsys):
    whole = tj.train(CONFIG, corpora, workdir=tmp_path / "whole")
    cats, digits = capsys.readouterr().out.splitlines()[1:3]
    assert cats.split()[:2] == ["cats", "75.00%"] and digits.split()[:2] == ["digits", "25.00%"]
    assert digits.split()[3] == "256"  # 8 steps of 8 rows of 16 tokens, of which a quarter are digits
    assert float(digits.split()[4]) == pytest.approx(256 / int(digits.split()[2].replace(",", "")), abs=0.005)
    lines = metrics(tmp_path / "whole")
    drawn = [line for line in lines if "tokens_cats" in line]
    assert [(line["step"], line["tokens_cats"], line["tokens_digits"]) for line in drawn] == [
        (4, 384, 128), (8, 768, 256)]
    assert drawn[-1]["epochs_digits"] == pytest.approx(2 * drawn[0]["epochs_digits"])
    losses = [line for line in lines if "validation_loss" in line]
    assert len(losses) == 2 and losses[-1]["validation_loss_cats"] < losses[-1]["validation_loss_digits"]
    for line in losses:
        assert line["validation_loss"] == pytest.approx(
            0.75 * line["validation_loss_cats"] + 0.25 * line["validation_loss_digits"])
    # The loss of one corpus is that of its own held-out windows.
    task = tj.tasks.make(whole.experiment)
    data = task.prepare(corpora, None, whole.tokenizer, tmp_path / "cache").corpora["digits"]
    assert len(data.held_out) < len(data.train)
    sums = [next_token_loss()(whole.model, batch)[:2] for batch in evaluation_batches(data.held_out, 8)]
    total, weight = np.sum(sums, 0)
    assert losses[-1]["validation_loss_digits"] == pytest.approx(total / weight, rel=1e-5)

    with pytest.raises(Interrupted):
        tj.train(CONFIG, corpora, workdir=tmp_path / "stopped", hooks=[stop_after(3)])
    resumed = tj.train(CONFIG, corpora, workdir=tmp_path / "stopped")
    assert same(resumed.model, whole.model)
    with pytest.raises(ValueError, match="holds a run with another config"):
        weights = (CorpusConfig("cats", weight=2), CorpusConfig("digits"))
        tj.train(CONFIG.replace(data=DataConfig(mixture=weights)), corpora, workdir=tmp_path / "stopped")


def test_corpora_without_a_mixture_have_the_same_number_of_epochs(corpora, tmp_path):
    task = tj.tasks.make(CONFIG.replace(data=DataConfig()))
    tokenizer = Tokenizer.train(list(task.texts(corpora)), kind="char")
    drawn = task.prepare(*task.read(corpora), tokenizer, tmp_path).train.drawn(5000)
    assert drawn["cats"].epochs == pytest.approx(drawn["digits"].epochs, rel=0.01)


def test_masked_language_modelling_mixes_lines(corpora, tmp_path):
    config = CONFIG.replace(model=dataclasses.replace(CONFIG.model, family="encoder"))
    task = tj.tasks.make(config)
    lines, held_out = task.read(corpora)
    assert {name: (len(lines[name]), len(held_out[name])) for name in lines} == {"cats": (54, 6), "digits": (36, 4)}
    tokenizer = Tokenizer.train(list(task.texts(lines)), kind="char")
    data = task.prepare(lines, held_out, tokenizer, tmp_path)
    assert data.train.shares == {"cats": 0.75, "digits": 0.25}
    batch = next(make_batches(data.train, batch_size=8, seed=0, transform=data.transform))
    assert set(batch) == set(task.batch_shapes(8)) and batch["tokens"].shape == (8, 16)
    texts = [tokenizer.decode(row) for row in batch["tokens"]]
    assert sum("t" in text for text in texts) >= 5 and sum("t" not in text for text in texts) >= 1
    assert {name: len(next(iter(part.evaluation_batches(4)))["tokens"]) for name, part in data.corpora.items()} == {
        "cats": 4, "digits": 4}


def test_files_of_settings_hold_mixtures():
    data = DataConfig(mixture=[["a", "b", 1]])
    assert from_dict(DataConfig, json.loads(json.dumps(to_dict(data)))) == data
    assert hash(data) == hash(DataConfig(mixture=(CorpusConfig("a", "b"),)))


@pytest.mark.parametrize(("settings", "message"), [
    (dict(mixture=(("a", "x", 0.5), ("a", "y", 0.5))), "data.mixture has the name 'a' twice"),
    (dict(mixture=(("a", "x", 0.0),)), r"data.mixture.weight=0.0 must be positive"),
    (dict(mixture=(("a", "x", math.inf),)), "data.mixture.weight=inf must be finite and be positive"),
    (dict(mixture=(("a b", "x", 1.0),)), "the name 'a b' of a corpus must have letters, digits"),
    (dict(mixture=("a",)), r"data.mixture: 'a' is not a corpus; expected \(name, path, weight\)"),
    (dict(mixture=(("a", "x", 1.0),), path="y"), "data.path='y' cannot be used together with data.mixture"),
    (dict(mixture=(("a", "x", 1.0),), validation_path="y"), "data.validation_path='y' cannot be used together"),
])
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)
    if "weight" not in message:
        return
    with pytest.raises(ValueError, match=r"has the entry .*; expected \(name, path, weight\)"):
        from_dict(DataConfig, {"mixture": [["a", "b", 1.0, 2]]})


@pytest.mark.parametrize(("data", "message"), [
    ({"cats": ["a"]}, "the mixture names the corpus 'digits', but the data has no texts for it; the data has 'cats'"),
    ({"cats": ["a"], "digits": ["1"], "dogs": ["b"]}, "the data has the corpus 'dogs', but the mixture gives it no"),
    ({"cats": ["a"], "digits": []}, "corpus 'digits': there is no text: the list is empty"),
    ({"cats": ["a"], "digits": [3]}, "corpus 'digits': text 1 of 1 is of type int; expected a string"),
    ({"cats": ["a" * 400], "digits": ["1"]}, "corpus 'digits': the text is shorter than one window"),
    (["a"], "data.mixture names 2 corpora, but data is not a dict of their texts"),
    (None, "the corpus 'cats' of data.mixture has no path"),
    ({}, "data is an empty dict"),
])
def test_bad_data(data, message):
    with pytest.raises(ValueError, match=message):
        tj.train(CONFIG, data)


def test_tasks_that_do_not_mix_refuse_a_dict():
    config = CONFIG.replace(model=dataclasses.replace(CONFIG.model, family="encoder_decoder"), data=DataConfig())
    with pytest.raises(ValueError, match="data is a dict, but the task 'translation' does not mix corpora"):
        tj.train(config, {"a": [("a", "b")]})
    with pytest.raises(ValueError, match="held_out cannot be used with several corpora"):
        tj.train(CONFIG, {"cats": ["a"], "digits": ["1"]}, held_out=["a"])
