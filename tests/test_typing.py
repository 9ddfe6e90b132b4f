"""Pyright finds no error in a file that uses the public names, nor in the parts of the package listed here."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PARTS = ("__init__.py", "config", "data", "lazy.py", "presets.py", "runtime.py", "settings.py", "sharding.py")


def test_pyright_finds_no_error():
    pytest.importorskip("pyright", reason="needs pyright: pip install 'pyright[nodejs]'")
    paths = ["tests/typing/public_names.py", *(f"transformer_jax/{part}" for part in PARTS)]
    done = subprocess.run([sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *paths],
                          cwd=ROOT, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] >= len(paths)
    assert [f"{found['file']}:{found['range']['start']['line'] + 1}: {found['message']}"
            for found in report["generalDiagnostics"]] == []


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "transformer_jax" / "py.typed").is_file()
