"""A sweep beside separate runs, its results, resume after Ctrl-C, and what it refuses."""

import json
import math
import os
import signal

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import EvalConfig, MeshConfig, ModelConfig, OptimConfig
from transformer_jax.training import member_session
from transformer_jax.training.errors import Interrupted
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.metrics import read_metrics

TEXT = ["To be, or not to be, that is the question.\n" * 60]
CONFIG = tj.ExperimentConfig(
    steps=8, batch_size=4, log_every=2, mesh=MeshConfig(data=1),
    model=ModelConfig(max_len=16, num_layers=1, num_heads=2, model_dim=16, dropout=0.1, use_bias=False),
    optim=OptimConfig(peak_lr=1e-2, warmup_steps=2), eval=EvalConfig(every=4, batch_size=4))
VALUES = {"optim.peak_lr": [1e-3, 1e30], "seed": [0, 3]}


class Last:
    """A logger that keeps the last value of each metric."""

    def __init__(self):
        self.values = {}

    def write(self, step, values):
        self.values.update(values)

    def close(self):
        pass


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep") / "whole"


@pytest.fixture(scope="module")
def whole(workdir):
    return tj.sweep(CONFIG, VALUES, TEXT, workdir=workdir)


@pytest.mark.long
def test_every_model_is_that_of_a_separate_run(whole, one_device):
    assert whole.members == [{"optim.peak_lr": rate, "seed": seed} for rate in (1e-3, 1e30) for seed in (0, 3)]
    for index in (0, 1):
        ours = whole.bundle(index)
        config = ours.experiment.replace(mesh=MeshConfig())
        assert config.optim.peak_lr == 1e-3 and config.seed == whole.members[index]["seed"]
        last = Last()
        single = tj.train(config.replace(model=CONFIG.model), TEXT, loggers=[last])
        for mine, theirs in zip(jax.tree.leaves(ours.model), jax.tree.leaves(single.model), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-6)
        for name in ("loss", "validation_loss"):
            assert whole.last(name)[index] == pytest.approx(last.values[name], abs=2e-6)
        assert ours.step == single.step == 8 and ours.tokenizer.digest == single.tokenizer.digest


def test_models_that_are_not_finite_do_not_stop_the_others(whole):
    assert whole.diverged.tolist() == [False, False, True, True]
    rows = whole.rows()
    assert [row["skipped"] > 0 for row in rows] == [False, False, True, True]
    assert np.isnan(whole.losses[2:]).all() and whole.best == int(np.argmin(whole.losses[:2]))
    table = whole.table().splitlines()
    assert table[0].split() == ["model", "optim.peak_lr", "seed", "loss", "validation_loss", "skipped"]
    assert table[1].split()[0] == str(whole.best) and len(table) == 5


def test_the_workdir_holds_table_figure_and_best_model(whole, workdir):
    rows = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert rows == whole.rows() and rows[0]["optim.peak_lr"] == 1e-3 and rows[0]["steps"] == 8
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    assert all(len(line["loss"]) == 4 for line in lines if "loss" in line)
    assert (workdir / "sweep.png").stat().st_size > 5000
    assert tree_digest(tj.load(workdir / "best_model").model) == tree_digest(whole.bundle().model)
    with pytest.raises(ValueError, match="all models of a sweep; load the best of them from its directory best_model"):
        tj.load(workdir)


def test_the_figure_shows_means_over_seeds(whole):
    axes = whole.plot(title="rates").axes[0]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "optim.peak_lr"
    assert axes.lines[0].get_xdata() == [1e-3]
    assert axes.lines[0].get_ydata() == pytest.approx([whole.losses[:2].mean()])


@pytest.mark.long
def test_models_are_spread_over_devices(whole):
    spread = tj.sweep(CONFIG.replace(mesh=MeshConfig()), VALUES, TEXT)
    assert math.gcd(4, len(jax.devices())) == len(spread.state.step.sharding.device_set) == 4
    np.testing.assert_allclose(spread.losses, whole.losses, atol=2e-6)


@pytest.mark.long
def test_ctrl_c_saves_and_the_same_call_continues_to_the_same_bits(whole, tmp_path, monkeypatch):
    log = member_session.LogMembers.__call__

    def stops(self, loop):
        if loop.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        log(self, loop)

    monkeypatch.setattr(member_session.LogMembers, "__call__", stops)
    with pytest.raises(Interrupted, match="saved step 5"):
        tj.sweep(CONFIG, VALUES, TEXT, workdir=tmp_path)
    assert not (tmp_path / "results.jsonl").exists()
    monkeypatch.setattr(member_session.LogMembers, "__call__", log)
    resumed = tj.sweep(None, None, TEXT, workdir=tmp_path)
    assert tree_digest(resumed.state) == tree_digest(whole.state)
    assert resumed.rows() == whole.rows()
    again = tj.sweep(None, None, TEXT, workdir=tmp_path)  # nothing is left to do
    assert again.rows() == whole.rows()


def test_a_workdir_belongs_to_one_sweep(whole, workdir):
    with pytest.raises(ValueError, match=r"holds a sweep over optim.peak_lr=0.001,1e\+30, seed=0,3, but this is a "
                                         "sweep over seed=0; use another workdir"):
        tj.sweep(CONFIG, {"seed": [0]}, TEXT, workdir=workdir)
    with pytest.raises(ValueError, match="but this is the run of one model"):
        tj.train(CONFIG.replace(mesh=MeshConfig()), TEXT, workdir=workdir)


@pytest.mark.parametrize("values, message", [
    (None, "values=None must be a dict from settings to their values"),
    ({}, "values={} must be a dict"),
    ({"model.model_dim": [16, 32]}, "model.model_dim cannot differ between the models of a sweep; with "
                                    "optim.name=adamw these settings can: seed, optim.peak_lr"),
    ({"optim.peak_l": [1]}, "optim.peak_l cannot differ .*; did you mean 'optim.peak_lr'"),
    ({"optim.muon_lr": [0.1]}, "optim.muon_lr cannot differ"),
    ({"seed": []}, r"the values of seed are \[\]; expected a list of at least one number"),
    ({"seed": 3}, "the values of seed are 3; expected a list"),
    ({"seed": [-1]}, "seed=-1 must be from 0 to"),
    ({"optim.peak_lr": [1e-3, -1.0]}, "optim.peak_lr=-1.0 must be positive"),
    ({"optim.peak_lr": ["fast"]}, "optim.peak_lr='fast' must be a number"),
    ({"seed": [1, 1]}, r"the values of seed contain a number twice: \[1, 1\]"),
    ({"optim.clip_norm": [1.0, None]}, "optim.clip_norm can only differ between models that all clip"),
])
def test_wrong_values(values, message):
    with pytest.raises(ValueError, match=message):
        tj.sweep(CONFIG, values, TEXT)


def test_what_one_program_cannot_train():
    with pytest.raises(ValueError, match="data is an iterator of batches"):
        tj.sweep(CONFIG, {"seed": [0]}, iter([]))
    with pytest.raises(ValueError, match="shards a single model"):
        tj.sweep(CONFIG.replace(mesh=MeshConfig(fsdp=2)), {"seed": [0, 1]}, TEXT)
    with pytest.raises(ValueError, match="mesh.data=3 must divide the 2 models"):
        tj.sweep(CONFIG.replace(mesh=MeshConfig(data=3)), {"seed": [0, 1]}, TEXT)
    with pytest.raises(ValueError, match="the task 'sft' starts from a trained model"):
        tj.sweep(CONFIG.replace(task="sft"), {"seed": [0]}, TEXT)
