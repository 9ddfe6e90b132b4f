"""Positions against their published formulas and properties."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.ops import LinearBias, alibi_slopes, rotary, rotary_angles, sinusoidal


def test_sinusoids_equal_the_formula():
    positions, dim = np.array([[0, 1, 2, 7], [40, 500, 1023, 3]]), 10
    expected = np.zeros((2, 4, dim))
    for b, t in np.ndindex(2, 4):
        for i in range(dim // 2):
            angle = positions[b, t] / 10_000 ** (2 * i / dim)
            expected[b, t, 2 * i], expected[b, t, 2 * i + 1] = math.sin(angle), math.cos(angle)
    made = sinusoidal(jnp.asarray(positions), dim)
    assert made.dtype == jnp.float32
    np.testing.assert_allclose(made, expected, atol=1e-4)  # a float32 angle near 1000 is known to 6e-5
    np.testing.assert_allclose(made[0], expected[0], atol=1e-6)


def test_sinusoids_of_four_channels():
    # pos 1, d 4: sin(1), cos(1), sin(1/100), cos(1/100).
    np.testing.assert_allclose(sinusoidal(jnp.asarray([0, 1]), 4),
                               [[0, 1, 0, 1], [0.841471, 0.540302, 0.0099998, 0.99995]], atol=1e-6)


def test_sinusoids_need_an_even_width():
    with pytest.raises(ValueError, match="dim=7"):
        sinusoidal(jnp.arange(3), 7)


def test_rotary_multiplies_complex_numbers():
    B, T, N, H, base = 2, 5, 3, 8, 500.0
    x = np.asarray(jax.random.normal(jax.random.key(0), (B, T, N, H)))
    positions = np.array([[0, 1, 2, 3, 4], [3, 0, 90, 2, 7]])
    numbers = x[..., : H // 2].astype(np.float64) + 1j * x[..., H // 2:]
    turns = np.exp(1j * positions[:, :, None, None] * base ** (-2 * np.arange(H // 2) / H))
    expected = np.concatenate([(numbers * turns).real, (numbers * turns).imag], axis=-1)
    rotated = jax.jit(lambda x, positions: rotary(x, rotary_angles(positions, H, base)))(x, positions)
    np.testing.assert_allclose(rotated, expected, atol=2e-5)


def test_rotary_keeps_norms_and_sees_only_distances():
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 16))

    @jax.jit
    def rotated(x, position):
        return rotary(x, rotary_angles(jnp.asarray([[position]]), 16)).reshape(16)

    np.testing.assert_array_equal(rotated(q, 0), q.reshape(16))
    np.testing.assert_allclose(jnp.linalg.norm(rotated(q, 37)), jnp.linalg.norm(q), rtol=1e-6)
    near = rotated(q, 9) @ rotated(k, 4)
    np.testing.assert_allclose(rotated(q, 105) @ rotated(k, 100), near, atol=1e-4)
    assert abs(float(rotated(q, 9) @ rotated(k, 5) - near)) > 1e-2


def test_rotary_keeps_the_type():
    x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    assert rotary(x, rotary_angles(jnp.asarray([[0, 1]]), 4)).dtype == jnp.bfloat16


def test_alibi_slopes_as_published():
    # Press et al. (2021): 8 heads have 1/2, 1/4, ... 1/256; 16 heads interleave their square roots.
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)], rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(16), [2.0 ** (-i / 2) for i in range(1, 17)], rtol=1e-6)
    # 12 heads, as the authors' get_slopes(12) prints them: those of 8, then every other one of 16.
    np.testing.assert_allclose(alibi_slopes(12), [
        0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625,
        0.7071067811865476, 0.35355339059327384, 0.17677669529663692, 0.08838834764831849], rtol=1e-6)
    assert alibi_slopes(1).shape == (1,) and alibi_slopes(1)[0] == 2.0**-8


def test_linear_bias_equals_loops_in_full_and_by_row():
    slopes = np.array([0.5, 0.125], np.float32)
    for start in (None, 3):
        expected = np.zeros((1, 2, 4, 6))
        for n, t, s in np.ndindex(2, 4, 6):
            expected[0, n, t, s] = -slopes[n] * abs(t + (start or 0) - s)
        bias = LinearBias(jnp.asarray(slopes), start)
        np.testing.assert_array_equal(bias.materialize(4, 6), expected)
        np.testing.assert_array_equal(bias.materialize(4, 6, jnp.asarray([3, 1])), expected[:, :, [3, 1]])
    traced = jax.jit(lambda bias: bias.materialize(4, 6))(LinearBias(jnp.asarray(slopes), jnp.int32(3)))
    np.testing.assert_array_equal(traced, expected)
