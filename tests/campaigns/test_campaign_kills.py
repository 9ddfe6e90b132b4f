"""Kills runs of every kind at random moments, at least half of them during a save. A resumed run
must end with the same bits as an uninterrupted one."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import campaign
import numpy as np
import pytest

from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.metrics import read_metrics

pytestmark = campaign.MARKS

KINDS = ("language_model", "masked_language_model", "translation", "sft", "dpo", "ppo")


class Server:
    """The process that forks the runs."""

    def __init__(self, place: pathlib.Path):
        here = pathlib.Path(__file__).resolve().parent
        # A cache of their own: JAX does not write its entries atomically.
        environment = os.environ | {"PYTHONPATH": f"{here.parents[1]}:{here}", "JAX_PLATFORMS": "cpu",
                                    "JAX_COMPILATION_CACHE_DIR": str(place / "compiled")}
        self.place, self.base = place, place / "base"
        self._process = subprocess.Popen([sys.executable, here / "runs_to_kill.py"], env=environment, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, kind: str, workdir: pathlib.Path) -> int:
        self._process.stdin.write(f"{kind}\t{self.base}\t{workdir}\t{workdir}.log\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def status(self) -> int:
        return int(self._process.stdout.readline())

    def run(self, kind: str, workdir: pathlib.Path) -> None:
        self.start(kind, workdir)
        status = self.status()
        assert status == 0, pathlib.Path(f"{workdir}.log").read_text()[-600:]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("kills"))
    server.run("base", server.base)
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(server):
    """The final state of a run of one kind, and the time from its first to its last save."""
    found = {}

    def of(kind):
        if kind not in found:
            workdir = server.place / f"whole-{kind}"
            server.run(kind, workdir)
            start = time.monotonic()  # once more, when all programs are compiled
            server.run(kind, server.place / f"again-{kind}")
            assert outcome(workdir) == outcome(server.place / f"again-{kind}")
            found[kind] = outcome(workdir), time.monotonic() - start
        return found[kind]

    return of


def outcome(workdir):
    """The digests of all arrays and files of the last step and of the best, and every number that
    was logged."""
    import orbax.checkpoint as ocp

    steps = {}
    for name in ("checkpoints", "best"):
        checkpoints = Checkpoints(workdir / name, read_only=True)
        last = checkpoints.steps()[-1]
        # Files with equal arrays differ only in the times at which they were written.
        manifest = json.loads((workdir / name / str(last) / "manifest.json").read_text())
        arrays = ocp.PyTreeCheckpointHandler().restore(workdir / name / str(last) / "state")
        steps[name] = (last, manifest["arrays"], {key: np.asarray(value).tobytes() for key, value in arrays.items()},
                       checkpoints.restore({}).metadata, checkpoints.restore({}).files)
    clock = ("tokens_per_second", "model_flops_per_second")
    lines = [{key: value for key, value in line.items() if key not in clock and "second" not in key}
             for line in read_metrics(workdir / "metrics.jsonl")]
    return steps, [line for line in lines if len(line) > 1]


def kill(server, kind, workdir, rng, seconds):
    """Starts a run and kills it, mostly once a save has begun. Returns whether it was killed, and
    in a save."""
    child = server.start(kind, workdir)
    wants_save = rng.random() < 0.75
    end = time.monotonic() + rng.uniform(0.1, 1.0) * seconds
    before = {path.name for path in workdir.glob("checkpoints/*")}
    number, is_saving = int(rng.integers(1, 5)), False
    steps_being_saved = set()
    while time.monotonic() < end + 60 * wants_save:
        if _has_ended(child):
            break
        writing = {path.name for path in workdir.glob("*/*.writing")} - before
        steps_being_saved |= writing
        if wants_save and writing and len(steps_being_saved) >= number:
            time.sleep(rng.uniform(0, 0.02))
            is_saving = any(workdir.glob("*/*.writing")) or any(workdir.glob("*/*.deleting"))
            break
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return server.status() == -signal.SIGKILL, is_saving


def _has_ended(child: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True


def test_killed_and_resumed_runs_equal_an_uninterrupted_one(server, whole, tmp_path):
    counts = {"killed": 0, "while saving": 0}
    kinds = iter(KINDS * 10_000)

    def case(rng):
        kind = next(kinds)
        expected, seconds = whole(kind)
        workdir = tmp_path / f"{kind}-{counts['killed']}-{rng.integers(1 << 30)}"
        for _ in range(int(rng.integers(1, 4))):
            was_killed, is_saving = kill(server, kind, workdir, rng, seconds)
            counts["killed"] += was_killed
            counts["while saving"] += was_killed and is_saving
        server.run(kind, workdir)
        assert outcome(workdir) == expected, f"{kind} in {workdir}"
        return True

    campaign.run_cases("kills", case, least=len(KINDS))
    print(counts)
    assert counts["killed"] < 20 or 2 * counts["while saving"] >= counts["killed"]
