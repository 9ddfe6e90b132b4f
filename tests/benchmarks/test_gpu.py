"""The GPU benchmark at very small size on this machine, without the packages that GPU machines may
not have."""

import json
import os
import subprocess
import sys

import pytest

# Packages that need not be installed where the benchmark runs.
LACKING = ("grain", "tensorflow_datasets", "ml_collections", "tensorboardX", "sacrebleu", "torch")
PROGRAM = f"""
import sys
for name in {LACKING}:
    sys.modules[name] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
from absl import app
from benchmarks.__main__ import main
app.run(main)
"""


def run(*arguments):
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", PROGRAM, "gpu", *arguments], env=environment, capture_output=True,
                          text=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpu")
    (directory / "input.txt").write_text("To be, or not to be, that is the question.\n" * 200)
    done = run("--tiny", f"--data={directory / 'input.txt'}", f"--json={directory / 'figures.json'}")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((directory / "figures.json").read_text()), done.stdout


@pytest.mark.long
def test_every_part_has_its_figures(found):
    figures, shown = found
    assert list(figures) == ["machine", "ceilings", "kernels against float64", "training", "attention", "cross entropy",
                             "decoding", "compiling", "nanoGPT's characters", "determinism"]
    for part, rows in figures.items():
        assert rows and not any("failed" in row or "left out" in row for row in rows), (part, rows)
        assert f"### {part}\n" in shown
    assert "| model | rows x tokens |" in shown
    training = figures["training"][0]
    assert training["tokens/s"] > 0 and training["PyTorch tokens/s"] == "not installed, or no GPU"
    assert figures["determinism"][0]["share"] > 0


@pytest.mark.long
def test_kernels_are_checked_before_they_are_timed(found):
    rows = found[0]["kernels against float64"]
    assert {row["kernel"] for row in rows} == {"xla", "chunked"}
    assert all(row["within 2 %"] and 0 < row["largest relative error"] < 0.02 for row in rows)
    assert {row["kernel"] for row in found[0]["attention"]} == {"xla", "chunked", "cuDNN through PyTorch"}
    assert found[0]["cross entropy"][0]["largest error against float64"] < 0.05


def test_without_a_gpu_it_ends_with_one_line():
    done = run()
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "error: this benchmark needs a GPU, but the device is a CPU; pass --tiny for a test run")


def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch):
    from benchmarks.gpu import kernels
    from benchmarks.gpu.sizes import TINY

    right = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *args, **kwargs: 1.1 * right(*args, **kwargs))
    rows = kernels.errors(TINY, {}, None)
    assert not any(row["within 2 %"] for row in rows)
    timed = kernels.attention(TINY, {"kernels against float64": rows}, None)
    assert [row.get("note") for row in timed][:2] == ["wrong results, not timed"] * 2
