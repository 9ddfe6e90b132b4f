"""Scaled rotary positions against those of transformers, which ``make_rotations.py`` stored."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.config import ModelConfig, RopeScaling
from transformer_jax.ops import rotary_angles

VALUES = np.load(pathlib.Path(__file__).parent / "fixtures" / "rotations.npz")
FIRST, BEYOND = 16, 40
_FACTORS = dict(short_factors=(1.0, 1.1, 1.3, 1.5, 1.6, 1.8, 2.0, 2.2),
                long_factors=(1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 9.0, 11.0), original_max_len=FIRST)
CASES = {
    "none": RopeScaling(),
    "linear": RopeScaling("linear", 3.0),
    "dynamic": RopeScaling("dynamic", 3.0, original_max_len=FIRST),
    "yarn": RopeScaling("yarn", 4.0, original_max_len=FIRST),
    "yarn, own factor": RopeScaling("yarn", 4.0, original_max_len=FIRST, attention_factor=1.3, beta_fast=4.0,
                                    beta_slow=0.5, truncate=False),
    "llama3": RopeScaling("llama3", 8.0, original_max_len=FIRST),
    "longrope": RopeScaling("longrope", BEYOND / FIRST, **_FACTORS),
    "longrope, own factor": RopeScaling("longrope", 5.0, attention_factor=1.2, **_FACTORS),
}
angles = jax.jit(rotary_angles, static_argnums=(1, 2, 3))


@pytest.mark.parametrize("length", [FIRST, BEYOND])
@pytest.mark.parametrize("name", CASES)
def test_equal_those_of_transformers(name, length):
    found = angles(jnp.arange(length)[None], 16, 500.0, CASES[name])
    for kind, values in zip(("cos", "sin"), found, strict=True):
        np.testing.assert_allclose(values[0, :, 0], VALUES[f"{name}: {kind} of {length}"], atol=1e-5)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_each_row_depends_on_its_own_length(name):
    rows = jnp.stack([jnp.minimum(jnp.arange(BEYOND), FIRST - 1), jnp.arange(BEYOND)])
    cos, _ = angles(rows, 16, 500.0, CASES[name])
    np.testing.assert_allclose(cos[0, :FIRST, 0], VALUES[f"{name}: cos of {FIRST}"], atol=1e-5)
    np.testing.assert_allclose(cos[1, :, 0], VALUES[f"{name}: cos of {BEYOND}"], atol=1e-5)
    assert np.abs(cos[0, :FIRST] - cos[1, :FIRST]).max() > 0.1


@pytest.mark.parametrize(("make", "words"), [
    (lambda: RopeScaling("yarn", beta_slow=40.0), "beta_slow=40.0 must be below beta_fast=32.0"),
    (lambda: RopeScaling("longrope", short_factors=(1.0, -1.0)), r"short_factors=\(1.0, -1.0\) must be positive"),
    (lambda: RopeScaling("yarm"), "kind='yarm' is not one of none, linear, dynamic, yarn, .*did you mean 'yarn'"),
    (lambda: ModelConfig(positions="rope", rope_scaling=RopeScaling("longrope", short_factors=(1.0,) * 32)),
     "32 short_factors and 0 long_factors; expected one for each of the 32 pairs"),
])
def test_what_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
