"""Pyright finds no error in the package; tests check the shapes
of signatures."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, Int

import transformer_jax as tj
from tests.shape_checks import ShapeError, checked
from transformer_jax.inspection import space

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.long
def test_pyright_finds_no_error():
    pytest.importorskip("pyright", reason="needs pyright: pip install 'pyright[nodejs]'")
    done = subprocess.run([sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable],
                          cwd=ROOT, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] > 200
    assert [f"{found['file']}:{found['range']['start']['line'] + 1}: {found['message']}"
            for found in report["generalDiagnostics"]] == []


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "transformer_jax" / "py.typed").is_file()


def double(x_BT: Float[Array, "B T"], weights_T: Float[Array, " T"] | None = None) -> Float[Array, "B T"]:
    """Returns the argument without its first row if there are weights, which breaks its promise."""
    return 2 * x_BT if weights_T is None else x_BT[1:]


def halves(x_BT: Float[Array, "B T"]) -> tuple[Float[Array, "B T"], Int[Array, " B"]]:
    return x_BT / 2, jnp.zeros(len(x_BT) + 1, jnp.int32)


@pytest.mark.parametrize(("function", "arguments", "wrong"), [
    (double, (jnp.zeros(3),), "double: x_BT"),
    (double, (jnp.zeros((3, 4), jnp.int32),), "double: x_BT"),
    (double, (jnp.zeros((3, 4)), jnp.zeros(5)), "double: weights_T"),
    (double, (jnp.zeros((3, 4)), jnp.zeros(4)), "double: return"),
    (halves, (jnp.zeros((3, 4)),), "halves: return"),
])
def test_arrays_are_compared_with_the_annotations(function, arguments, wrong):
    with pytest.raises(ShapeError, match=wrong):
        checked(function)(*arguments)


def test_right_arrays_and_errors_of_the_function_pass():
    np.testing.assert_array_equal(checked(double)(np.ones((2, 3), np.float32)), 2 * np.ones((2, 3)))
    np.testing.assert_array_equal(jax.jit(checked(double))(jnp.ones((2, 3))), 2 * np.ones((2, 3)))
    with pytest.raises(ValueError, match="top_k=10; expected a whole number from 1 to 5"):
        space.nearest(jnp.zeros((5, 3)), jnp.zeros(3))


def test_the_functions_of_the_package_are_compared():
    with pytest.raises(ShapeError, match="transformer_jax.inspection.maps.entropy: weights_TS is annotated as"):
        tj.inspection.entropy(jnp.zeros((2, 4), jnp.int32))
