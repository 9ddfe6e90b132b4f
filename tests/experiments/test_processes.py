"""Several processes train one model with the same result as one process, also after one of them was
killed."""

import os
import random
import re
import signal
import socket
import time

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.runtime import join_processes
from transformer_jax.training.metrics import read_metrics

WORDS = ("the", "king", "said", "to", "his", "men", "that", "night", "we", "would", "come", "home", "over", "water")
STEPS, EVERY = 60, 10
TRAIN = ("--config=shakespeare_char", "--config.model.num_layers=1", "--config.model.num_heads=2",
         "--config.model.model_dim=16", "--config.model.max_len=16", "--config.model.unroll=1",
         "--config.model.dropout=0.1", "--config.batch_size=16", f"--config.steps={STEPS}",
         "--config.optim.warmup_steps=5", f"--config.log_every={EVERY}", f"--config.checkpoint.every={EVERY}",
         f"--config.eval.every={STEPS}", "--config.eval.batch_size=8", "--config.eval.max_batches=1",
         f"--config.sample.every={STEPS}", "--config.sample.max_new_tokens=4", "--config.mesh.fsdp=2")
LIMIT = 900  # seconds for one process, on a busy machine


@pytest.fixture(scope="module")
def launch(start, tmp_path_factory):
    """``launch(workdir, processes)``: a run of 8 devices in so many processes that find each
    other."""
    corpus = tmp_path_factory.mktemp("corpus") / "verse.txt"
    draw = random.Random(0)
    corpus.write_text("".join(" ".join(draw.choices(WORDS, k=8)) + "\n" for _ in range(200)))

    def run(workdir, count):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1] - 1
        flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={8 // count}"
        return [start("train", *TRAIN, f"--config.data.path={corpus}", f"--workdir={workdir}",
                      JAX_COORDINATOR_ADDRESS=f"localhost:{port}", JAX_NUM_PROCESSES=str(count),
                      JAX_PROCESS_ID=str(index), XLA_FLAGS=flags) for index in range(count)]

    return run


@pytest.fixture(scope="module")
def alone(launch, tmp_path_factory):
    """The workdir of one process with 8 devices."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    (process,) = launch(workdir, 1)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    return workdir


@pytest.fixture(scope="module")
def killed(launch, tmp_path_factory):
    """A run of two processes, of which the second was killed after a checkpoint: workdir, seconds,
    the first's end."""
    workdir = tmp_path_factory.mktemp("runs") / "two"
    first, second = launch(workdir, 2)
    deadline = time.monotonic() + LIMIT
    while not (workdir / "checkpoints" / str(EVERY)).exists():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.01)
    second.send_signal(signal.SIGKILL)
    since = time.monotonic()
    out, err = first.communicate(timeout=LIMIT)
    second.communicate()
    return workdir, time.monotonic() - since, (first.returncode, out, err)


def losses(workdir):
    return [line["loss"] for line in read_metrics(workdir / "metrics.jsonl") if "loss" in line]


@pytest.mark.long
def test_the_survivor_ends_soon_and_says_why(killed):
    _, seconds, (status, _, err) = killed
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1, err
    assert "another process of this run has ended" in lines[0] and "resumes from the last checkpoint" in lines[0]
    assert seconds < 60  # immediately on an idle machine; with heartbeats alone it takes 100 seconds


@pytest.fixture(scope="module")
def resumed(killed, launch):
    """The killed run, resumed: its workdir, and the output, errors and status of both processes."""
    workdir = killed[0]
    assert max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()) < STEPS
    return workdir, [(*process.communicate(timeout=LIMIT), process.returncode) for process in launch(workdir, 2)]


@pytest.mark.long
def test_two_processes_resumed_learn_what_one_does_to_the_bit(alone, resumed):
    workdir, ended = resumed
    assert [status for _, _, status in ended] == [0, 0], ended
    assert "resuming from step" in ended[0][0] and "--- step" in ended[0][0]
    # Gloo's threads print their numbers of peers, sometimes in the middle of another thread's line.
    printed = [line for line in (ended[1][0] + ended[1][1]).splitlines()
               if not re.fullmatch(r"[\s\d.:]*|.*(Gloo|peer ranks).*", line)]
    assert printed == []  # only the first process prints
    assert len(losses(alone)) == STEPS // EVERY and losses(workdir) == losses(alone)


@pytest.mark.long
def test_one_process_reads_a_checkpoint_of_two(alone, resumed):
    """The parameters, not only the losses, equal those of one process."""
    two, one = (tj.load(workdir) for workdir in (resumed[0], alone))
    assert two.step == one.step == STEPS
    for a, b in zip(jax.tree.leaves(two.model), jax.tree.leaves(one.model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(ValueError, match="the numbers JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set as well"):
        join_processes()


def test_without_an_address_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    assert join_processes() is False and "JAX_COORDINATOR_ADDRESS" not in os.environ
