"""Dropout: its rate and its mean within binomial bounds, its scale exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.ops.dropout import drop

KEY = jax.random.key(0)
COUNT = 1 << 16
RATES = [0.0, 0.001, 0.1, 0.25, 0.5, 0.9, 0.999]


def dropped_of(rate):
    """The number of the 256 values of a byte that drop an entry, which is never 256."""
    return min(round(rate * 256), 255)


@pytest.mark.parametrize("rate", RATES)
def test_rate_scale_and_mean(rate):
    y = np.asarray(drop(jnp.ones((64, COUNT // 64)), rate, KEY))
    probability = dropped_of(rate) / 256
    assert abs(probability - rate) <= 1 / 256
    scale = 256 / (256 - dropped_of(rate))
    assert set(np.unique(y)) <= {0.0, np.float32(scale)} and (y != 0).any()
    sigma = np.sqrt(probability * (1 - probability) / COUNT)
    assert abs((y == 0).mean() - probability) <= 5 * sigma
    assert abs(y.mean(dtype=np.float64) - 1) <= 5 * sigma * scale


def test_every_byte_of_the_bits_drops_as_often():
    zeros = np.asarray(drop(jnp.ones((COUNT // 16, 16)), 0.25, KEY)) == 0
    sigma = np.sqrt(0.25 * 0.75 / len(zeros))
    assert (np.abs(zeros.mean(0) - 0.25) < 5 * sigma).all()
    correlations = np.corrcoef(zeros.T) - np.eye(16)
    assert np.abs(correlations).max() < 5 / np.sqrt(len(zeros))


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (4, 1, 7), (2, 3, 4), (2, 0), (0, 6)])
def test_any_last_axis(shape):
    x = jnp.arange(1, 1 + np.prod(shape), dtype=jnp.float32).reshape(shape)
    y = np.asarray(drop(x, 0.5, KEY))
    assert y.shape == shape
    assert ((y == 0) | (y == 2 * np.asarray(x))).all()


def test_a_wide_odd_axis_drops_to_its_end():
    zeros = np.asarray(drop(jnp.ones((4096, 7)), 0.5, KEY)) == 0
    assert (np.abs(zeros.mean(0) - 0.5) < 5 * 0.5 / 64).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_type_is_kept(dtype):
    x = jnp.full((8, 8), 3, dtype)
    y = drop(x, 0.5, KEY)
    assert y.dtype == x.dtype
    assert set(np.unique(y.astype(jnp.float32))) == {0.0, 6.0}


def test_the_key_decides():
    x = jnp.ones((8, 64))
    first, again, other = (np.asarray(drop(x, 0.5, jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_the_gradient_has_the_mask_and_the_scale():
    x = jnp.linspace(1, 2, 60).reshape(4, 15)
    y, pull = jax.vjp(lambda x: drop(x, 0.3, KEY), x)
    gradient, = pull(jnp.ones_like(y))
    np.testing.assert_array_equal(gradient, np.where(np.asarray(y) == 0, 0, np.float32(256 / (256 - 77))))
