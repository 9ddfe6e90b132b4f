"""The library works with the oldest versions of its dependencies that pyproject.toml allows."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib
import venv

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
# What the tests themselves need, at any version that the installed packages allow.
TOOLS = ["pytest>=8", "hypothesis>=6.100", "pillow"]
# One file of each package of ours that calls much of jax, flax, optax, orbax, grain and
# sentencepiece.
TESTS = ["tests/test_import.py", "tests/ops/test_masks.py", "tests/models/test_decoder.py",
         "tests/data/test_windows.py", "tests/data/test_conversations.py", "tests/decoding/test_generate.py",
         "tests/training/test_checkpoint.py", "tests/runs/test_open_house.py"]


def oldest_versions():
    """``name==version`` for every dependency, and for those of the extra ``hf``."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return [re.sub(r">=([\d.]+).*", r"==\1", requirement)
            for requirement in project["dependencies"] + project["optional-dependencies"]["hf"]]


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the oldest Python, 3.11, goes with the oldest versions")
@pytest.mark.long
def test_the_oldest_versions(tmp_path):
    pins = oldest_versions()
    assert len(pins) > 12 and all(re.search(r"==\d", pin) for pin in pins), pins
    venv.create(tmp_path / "environment", with_pip=True)
    python = tmp_path / "environment" / "bin" / "python"
    jaxlib = next(pin for pin in pins if pin.startswith("jax==")).replace("jax", "jaxlib")
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins, jaxlib, *TOOLS])
    shown = run([python, "-m", "pytest", "-o", "addopts=", "-q", "-m", "not long", "-p", "no:cacheprovider", *TESTS])
    assert re.search(r"\d{3} passed", shown), shown[-2000:]


def run(command):
    done = subprocess.run(list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True, timeout=1500,
                          env=os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout
