"""Loggers that fail, a disk that is full and a clock that is set back neither hang nor end a
run."""

import os
import signal
import time

import jax
import numpy as np
import pytest
from flax import nnx
from tensorboardX import record_writer

from transformer_jax.config import CheckpointConfig, ExperimentConfig, ModelConfig, OptimConfig
from transformer_jax.data import make_batches
from transformer_jax.sharding import make_mesh
from transformer_jax.training.errors import Interrupted
from transformer_jax.training.loggers import JsonlLogger
from transformer_jax.training.metrics import read_metrics
from transformer_jax.training.session import run_training

STEPS = 40
CONFIG = ExperimentConfig(
    steps=STEPS, batch_size=4, log_every=1, model=ModelConfig(vocab_size=3, max_len=4, num_layers=1, num_heads=1,
                                                              model_dim=2),
    optim=OptimConfig(warmup_steps=1), checkpoint=CheckpointConfig(every=100))


class Rows:
    """Rows to learn from; one of them can be made to fail where it is read, in the thread that
    reads ahead."""

    def __init__(self, damaged=None):
        self._damaged = damaged

    def __len__(self):
        return 16

    def __getitem__(self, indices):
        if self._damaged in indices:
            raise OSError(5, "Input/output error", "tokens.bin")
        return {"x": np.ones((len(indices), 1), np.float32)}


def make_params(key):
    return {"w": nnx.Param(jax.random.normal(key, (2,)), axes=("embed",))}


def loss_fn(params, batch, key):
    return (batch["x"] * params["w"][...] ** 2).sum(), np.float32(4)


def run(workdir, loggers=(), hooks=(), damaged=None):
    return run_training(CONFIG, workdir, make_params=make_params, loss_fn=loss_fn, loggers=loggers, hooks=hooks,
                        batches=make_batches(Rows(damaged), batch_size=4, seed=0),
                        mesh=make_mesh(devices=jax.devices()[:1]))


class Logger:
    """A custom logger."""

    def __init__(self, fails_at=None, fails_closing=False):
        self.steps, self.closed, self._fails_at, self._fails_closing = [], 0, fails_at, fails_closing

    def write(self, step, values):
        if step == self._fails_at:
            raise RuntimeError("the server is\ngone")
        self.steps.append(step)

    def close(self):
        self.closed += 1
        if self._fails_closing:
            raise RuntimeError("still gone")


def logged(workdir):
    return [line["step"] for line in read_metrics(workdir / "metrics.jsonl")]


def test_a_full_disk_under_tensorboard_does_not_hang_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record_writer, "open_file", lambda path: open("/dev/full", "wb", buffering=64))  # noqa: SIM115
    assert int(run(tmp_path).step) == STEPS and logged(tmp_path) == list(range(1, STEPS + 1))
    stderr_text = capsys.readouterr().err
    assert stderr_text.count("TensorBoardLogger failed and is not used any more; training continues") == 1
    assert "No space left on device" in stderr_text


def test_a_tensorboard_that_cannot_begin_is_left_out(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file in its place")
    assert int(run(tmp_path).step) == STEPS
    assert capsys.readouterr().err.count("the metric logger TensorBoardLogger failed") == 1


def test_a_clock_that_is_set_back_by_weeks_and_a_signal(tmp_path, monkeypatch):
    """A thread of tensorboardX would then wait for longer than a lock can: it would end, and its
    queue fill up."""
    now = time.time

    def happens(loop):
        if loop.step == 3:
            monkeypatch.setattr(time, "time", lambda: now() - 60 * 24 * 3600)
        if loop.step == 30:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="saved step 30"):
        run(tmp_path, hooks=[happens])
    assert logged(tmp_path) == list(range(1, 31))


def test_a_logger_that_fails_is_left_out_and_the_others_go_on(capsys):
    broken, other, stuck = Logger(fails_at=5, fails_closing=True), Logger(), Logger(fails_closing=True)
    state = run(None, loggers=[broken, other, stuck])
    assert int(state.step) == STEPS and broken.steps == [1, 2, 3, 4] and other.steps == list(range(1, STEPS + 1))
    assert broken.closed == other.closed == stuck.closed == 1
    stderr_text = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert stderr_text == ["warning: the metric logger Logger failed and is not used any more; training continues "
                    f"without it (RuntimeError: {reason} gone)" for reason in ("the server is", "still")]


def test_the_record_of_the_run_is_not_done_without(tmp_path, monkeypatch):
    write = JsonlLogger.write

    def fill(self, step, values):
        if step == 4:
            self._file = open("/dev/full", "a")  # noqa: SIM115
        write(self, step, values)

    monkeypatch.setattr(JsonlLogger, "write", fill)
    with pytest.raises(OSError, match="No space left on device") as error:
        run(tmp_path)
    assert error.value.filename == str(tmp_path / "metrics.jsonl")


def test_an_error_in_the_thread_that_reads_ahead_ends_the_run():
    with pytest.raises(OSError, match="Input/output error"):
        run(None, damaged=11)
