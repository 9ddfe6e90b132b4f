"""Positions against their published formulas and properties."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.ops import LinearBias, alibi_slopes, rotary, rotary_angles, sinusoidal
from transformer_jax.ops.positions import RelativeBias, relative_buckets


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


def test_interleaved_pairs_of_the_first_channels():
    B, T, N, H, R = 1, 4, 2, 10, 6
    x = np.asarray(jax.random.normal(jax.random.key(0), (B, T, N, H)))
    positions = np.array([[0, 1, 5, 40]])
    numbers = x[..., 0:R:2].astype(np.float64) + 1j * x[..., 1:R:2]
    numbers = numbers * np.exp(1j * positions[:, :, None, None] * 10_000.0 ** (-2 * np.arange(R // 2) / R))
    expected = x.copy()  # the last channels stay
    expected[..., 0:R:2], expected[..., 1:R:2] = numbers.real, numbers.imag
    rotated = jax.jit(lambda x, at: rotary(x, rotary_angles(at, R), interleaved=True))(x, positions)
    np.testing.assert_allclose(rotated, expected, atol=2e-5)
    np.testing.assert_array_equal(rotated[..., R:], x[..., R:])


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


def test_a_bias_of_given_positions_is_that_of_a_text_in_order():
    """The bias of a key depends on its position in the text and not on its slot, row by row."""
    rng = np.random.default_rng(0)
    keys, queries = np.stack([rng.permutation(9) for _ in range(2)]), np.array([[8, 2, 5], [0, 7, 3]])
    table = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    for make in (functools.partial(LinearBias, table[0]), functools.partial(RelativeBias, table, 6, True)):
        in_order = np.asarray(make().materialize(9, 9))[0]
        got = make(positions=(jnp.asarray(queries), jnp.asarray(keys))).materialize(3, 9)
        wanted = np.stack([in_order[:, q][:, :, k] for q, k in zip(queries, keys, strict=True)])
        np.testing.assert_array_equal(got, wanted)
        rows = make(positions=(jnp.asarray(queries), jnp.asarray(keys))).materialize(
            3, 9, jnp.asarray([2, 0]), jnp.asarray([4, 1, 1]))
        np.testing.assert_array_equal(rows, wanted[:, :, [2, 0]][..., [4, 1, 1]])


def test_relative_buckets_of_t5():
    """T5's own sizes: 8 distances alone in each direction, and from 91 on (of 128) the last
    bucket."""
    buckets = relative_buckets(np.arange(-130, 131), 32, 128, False)
    at = dict(zip(range(-130, 131), buckets.tolist(), strict=True))
    assert [at[-d] for d in range(9)] == list(range(9)) and [at[d] for d in range(1, 8)] == list(range(17, 24))
    # Boundaries at 8 * 16^(i / 8): 11.3, 16, 22.6, 32, 45.3, 64, 90.5.
    assert [at[-d] for d in (11, 12, 15, 16, 22, 23, 31, 32, 45, 46, 63, 64, 90, 91, 128, 130)] == [
        8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 15]
    causal = relative_buckets(np.array([5, 0, -15, -16, -127, -128, -500]), 32, 128, True)
    assert causal.tolist() == [0, 0, 15, 16, 31, 31, 31]


def test_sinusoids_of_fairseq_reach_the_lowest_frequency():
    """As fairseq's code: the frequencies are a geometric series from 1 to 1 / 10000, both
    included."""
    angles = np.arange(9)[:, None] * np.geomspace(1.0, 1e-4, 5)
    made = sinusoidal(jnp.arange(9), 10, halves=True, closed=True)
    np.testing.assert_allclose(made, np.concatenate([np.sin(angles), np.cos(angles)], axis=1), atol=1e-6)
    with pytest.raises(ValueError, match="dim=2 has one frequency"):
        sinusoidal(jnp.arange(3), 2, closed=True)


def test_sinusoids_in_halves_are_those_in_pairs():
    pairs, halves = (np.asarray(sinusoidal(jnp.arange(7), 10, halves=halves)) for halves in (False, True))
    np.testing.assert_array_equal(halves, np.concatenate([pairs[:, 0::2], pairs[:, 1::2]], axis=1))
