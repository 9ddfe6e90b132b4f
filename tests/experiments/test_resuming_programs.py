"""The programs resume with only --workdir, extend a run, start from a trained model, and refuse an
empty name."""

import json

import pytest

from transformer_jax.training.metrics import read_metrics

TINY = ("--config=shakespeare_char", "--config.model.num_layers=1", "--config.model.num_heads=1",
        "--config.model.model_dim=8", "--config.model.max_len=16", "--config.model.unroll=1", "--config.batch_size=8",
        "--config.steps=2", "--config.eval.every=2", "--config.sample.every=0", "--config.optim.warmup_steps=1",
        "--config.log_every=1", "--config.eval.batch_size=8")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("the king said to his men that night we would come home\n" * 40)
    return path


@pytest.mark.long
def test_extended_taken_further_and_resumed(program, tmp_path, text):
    first = program("train", *TINY, f"--config.data.path={text}", f"--workdir={tmp_path}/run")
    assert first.status == 0
    other = program("train", "--config.optim.peak_lr=0.5", f"--workdir={tmp_path}/run")
    assert other.error.endswith("add --change (in Python change=True) to continue with the new settings")
    longer = program("train", "--config.optim.peak_lr=0.5", "--config.steps=4", "--change", f"--workdir={tmp_path}/run")
    assert longer.status == 0
    assert "settings changed after step 2: optim.peak_lr: 0.001 -> 0.5; steps: 2 -> 4" in longer.out
    assert "resuming from step 2 of 4" in longer.out and "done; next: " in longer.out
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4]
    shorter = program("train", "--config.steps=3", f"--workdir={tmp_path}/run")
    assert shorter.error == (f"error: steps=3, but the run in {tmp_path}/run has already taken 4 steps; set more "
                             "steps, or use another --workdir")
    more = program("train", f"--model={tmp_path}/run", f"--config.data.path={text}", f"--workdir={tmp_path}/more",
                   "--config.steps=1", "--config.optim.warmup_steps=0", "--config.eval.batch_size=8")
    assert more.status == 0, more
    record = json.loads((tmp_path / "more" / "run.json").read_text())
    assert record["base"] == {"source": f"{tmp_path}/run", "step": 4} and record["config"]["optim"]["peak_lr"] == 5e-5
    assert "resuming from step 1 of 1" in program("train", "--workdir", f"{tmp_path}/more").out


@pytest.mark.parametrize(("name", "arguments", "message"), [
    ("train", ["--config=shakespeare_char", "--workdir="], "--workdir is missing"),
    ("train", ["--workdir=", "--config.steps=3"], "--config is missing"),
    ("train", ["--model=", "--workdir=x", "--config=continued"], "--model is empty"),
    ("generate", ["--workdir="], "--workdir is empty: name a directory"),
    ("evaluate", ["--workdir=", "--data=x"], "--workdir is empty: name a directory"),
    ("quickstart", ["--workdir="], "--workdir is empty: name a directory"),
    ("train", ["--config=shakespeare_char", "--workdir=x", "--config.model.family=reward"],
     "--model is missing; --help describes it"),
])
def test_an_empty_name_is_no_directory(program, tmp_path, monkeypatch, name, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert program(name, *arguments).error.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "message"), [
    ("raise RuntimeError('no\\nluck')", "RuntimeError: no luck"),
    ("import sys\nsys.exit(3)", "SystemExit: 3"),
    ("def get_config():\n    return 1 / 0", "ZeroDivisionError: division by zero"),
    ("x = 3", "AttributeError: module 'mine' has no attribute 'get_config'"),
    ("def get_config(:", "SyntaxError: invalid syntax"),
])
def test_a_config_file_that_raises(program, tmp_path, content, message):
    (tmp_path / "mine.py").write_text(content)
    error = program("train", f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run").error
    assert error.startswith(f"error: the config file {tmp_path}/mine.py fails: {message}")


@pytest.mark.long
def test_a_rate_that_ruins_the_weights_ends_a_short_run_with_an_error(program, tmp_path, text):
    ended = program("train", *TINY, "--config.optim.name=sgd", "--config.optim.peak_lr=1e38", "--config.eval.every=9",
                    "--config.checkpoint.every=1", f"--config.data.path={text}", f"--workdir={tmp_path}/run")
    assert ended.error.startswith(
        "error: step 2: the last 2 updates of the run were skipped, because the new weights would not have been "
        f"finite; training stops. No step is saved in {tmp_path}/run/")
    assert "done" not in ended.out and list((tmp_path / "run" / "checkpoints").iterdir()) == []
