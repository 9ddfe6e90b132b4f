"""A run that the code before tasks wrote (commit 0d36f73, stopped at step 3 of 6) still loads and
goes on."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

import transformer_jax as tj

OLD = pathlib.Path(__file__).parent / "fixtures" / "run_of_version_0_1"
TEXTS = ["the old cat sat on the mat and saw the dogs " * 12]
# What the old code logged in the same run, not stopped.
LOSSES = {1: 3.0243940, 2: 2.9894001, 3: 2.9260266, 4: 3.0125717, 5: 2.8586719, 6: 2.8306022}
VALIDATION_LOSS = 2.8480889


def test_it_loads():
    bundle = tj.load(OLD)
    assert bundle.step == 3 and bundle.experiment.task is None
    logits = tj.forward(bundle.model, np.array([bundle.tokenizer.encode("the cat")]))
    assert np.isfinite(logits).all()
    assert tj.evaluate(bundle, TEXTS)["loss"] < np.log(bundle.config.vocab_size) + 0.1


def test_it_resumes_where_it_stopped(tmp_path):
    shutil.copytree(OLD, tmp_path / "run")
    record = tj.load(OLD).experiment
    config = record.replace(model=record.model.replace(vocab_size=None))
    one = tj.sharding.make_mesh(devices=jax.devices()[:1])
    bundle = tj.train(config, texts=TEXTS, workdir=tmp_path / "run", mesh=one)
    assert bundle.step == 6
    lines = tj.training.read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert losses == pytest.approx(LOSSES, abs=2e-5)
    assert lines[-1]["validation_loss"] == pytest.approx(VALIDATION_LOSS, abs=2e-5)


def test_a_task_may_be_named_when_an_old_run_goes_on(tmp_path):
    shutil.copytree(OLD, tmp_path / "run")
    record = tj.load(OLD).experiment
    config = record.replace(task="language_model", model=record.model.replace(vocab_size=None))
    one = tj.sharding.make_mesh(devices=jax.devices()[:1])
    assert tj.train(config, texts=TEXTS, workdir=tmp_path / "run", mesh=one).step == 6
