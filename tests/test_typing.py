"""Pyright finds no error in the public names, nor in the parts listed here; tests check the shapes
of signatures."""

import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import jaxtyping
import pytest

from transformer_jax.inspection import lens, maps, mixing, space

ROOT = pathlib.Path(__file__).resolve().parents[1]
CLEAN_INSPECTION = ("__init__", "causal", "figures", "interventions", "labels", "lens", "maps", "mixing", "plots",
                    "showing", "viewer")
PARTS = ("__init__.py", "config", "data", "lazy.py", "presets.py", "runtime.py", "settings.py", "sharding.py",
         *(f"inspection/{module}.py" for module in CLEAN_INSPECTION))


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


@pytest.mark.parametrize("call", [
    lambda: maps.entropy(jnp.zeros(3)),
    lambda: maps.induction_score(jnp.zeros((2, 4, 4)), jnp.zeros(5, jnp.int32)),
    lambda: mixing.rollout(jnp.zeros((2, 4, 3))),
    lambda: space.nearest(jnp.zeros((5, 3)), jnp.zeros(4)),
    lambda: lens.value_weighted(jnp.zeros((2, 4, 4)), jnp.zeros((2, 5))),
])
def test_the_shapes_of_signatures_are_checked_here(call):
    with pytest.raises(jaxtyping.TypeCheckError, match="(?s)typechecking (parameter|the return)"):
        call()
