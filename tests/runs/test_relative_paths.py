"""Relative paths in the config of a run mean files of the directory that it was started in."""

import dataclasses
import json
import os
import shutil

import jax
import pytest

import transformer_jax as tj
from transformer_jax.config import CheckpointConfig, DataConfig, SampleConfig
from transformer_jax.runs.paths import current_directory, found_from, with_equal_paths
from transformer_jax.training.leaves import tree_digest

CONFIG = tj.ExperimentConfig(
    steps=2, batch_size=2, model=tj.ModelConfig(max_len=8, num_layers=1, num_heads=1, model_dim=4),
    data=DataConfig(path="text.txt"), checkpoint=CheckpointConfig(every=100), sample=SampleConfig(every=0))


def train(config=None, **options):
    return tj.train(config, mesh=tj.sharding.make_mesh(devices=jax.devices()[:1]), **options)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A directory with a text and a run of two steps, which was started there."""
    (tmp_path / "home").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "home" / "text.txt").write_text("the cat sat on the mat\n" * 20)
    monkeypatch.chdir(tmp_path / "home")
    train(CONFIG, workdir="run")
    monkeypatch.chdir(tmp_path / "other")
    return tmp_path


@pytest.mark.long
def test_a_run_is_resumed_from_any_directory(started, monkeypatch):
    run = started / "home" / "run"
    (started / "other" / "text.txt").write_text("another text of the same name\n" * 20)
    longer = train(workdir=run, steps=4)
    assert longer.step == 4
    monkeypatch.chdir(started / "home")
    assert tree_digest(longer.model) == tree_digest(train(CONFIG, steps=4).model)
    # The path in the record and the path in the first command name the same file.
    assert json.loads((run / "run.json").read_text())["config"]["data"]["path"] == str(started / "home" / "text.txt")
    assert train(CONFIG.replace(steps=4), workdir=run).step == 4
    for path in (started / "home" / "text.txt", "../home/text.txt", "./text.txt"):
        config = CONFIG.replace(steps=4, data=dataclasses.replace(CONFIG.data, path=str(path)))
        assert train(config, workdir=run).step == 4


def test_a_run_that_moves_with_its_data_is_resumed_by_the_same_command(started, monkeypatch):
    shutil.move(started / "home", started / "moved")
    monkeypatch.chdir(started / "moved")
    assert train(CONFIG, workdir="run").step == 2
    assert train(workdir="run").step == 2


def test_other_data_is_still_refused(started):
    (started / "other" / "text.txt").write_text("another text\n" * 20)
    with pytest.raises(ValueError, match="the training data is not the same"):
        train(CONFIG, workdir=started / "home" / "run")
    other = CONFIG.replace(data=dataclasses.replace(CONFIG.data, path="else.txt"))
    with pytest.raises(ValueError, match=r"another config \(data.path: 'text.txt' -> 'else.txt'\)"):
        train(other, workdir=started / "home" / "run")


@pytest.mark.parametrize(("path", "found"), [
    ("a.txt", "{}/a.txt"), ("a.txt,b.txt", "{}/a.txt,{}/b.txt"), ("*.txt", "{}/*.txt"), ("a,b.tsv", "{}/a,b.tsv"),
    ("missing", "missing"), ("a.txt,missing", "a.txt,missing"), ("/dev/null", "/dev/null")])
def test_forms_of_paths(tmp_path, path, found):
    for name in ("a.txt", "b.txt", "a,b.tsv"):
        (tmp_path / name).touch()
    config = CONFIG.replace(data=dataclasses.replace(CONFIG.data, path=path))
    assert found_from(config, str(tmp_path)).data.path == found.format(tmp_path, tmp_path)
    assert found_from(config, None) == config and found_from(config, os.getcwd()) == config


def test_paths_of_a_mixture(tmp_path):
    (tmp_path / "a.txt").touch()
    mixture = (("a", "a.txt", 1.0), ("b", "missing", 2.0))
    config = CONFIG.replace(data=dataclasses.replace(CONFIG.data, path=None, mixture=mixture))
    found = found_from(config, str(tmp_path))
    assert [corpus.path for corpus in found.data.mixture] == [f"{tmp_path}/a.txt", "missing"]
    assert found != config and with_equal_paths(found, config, str(tmp_path)) == config


def test_the_current_directory_may_be_deleted(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 20)
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    assert current_directory() is None
    config = CONFIG.replace(data=dataclasses.replace(CONFIG.data, path=str(tmp_path / "text.txt")))
    assert train(config, workdir=tmp_path / "run").step == 2
    assert train(workdir=tmp_path / "run").step == 2
