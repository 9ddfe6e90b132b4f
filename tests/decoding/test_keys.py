"""The keys of rows."""

import jax
import numpy as np
import pytest

from transformer_jax.decoding.keys import row_keys, seeded_key_data


@pytest.mark.parametrize("seed", [0, 7, -1, -2**31, 2**31 - 1, 2**31, 2**32 - 1])
def test_the_data_of_seeded_keys_is_that_of_the_keys_of_rows(seed):
    expected = jax.random.key_data(row_keys(jax.random.key(seed), 3))
    np.testing.assert_array_equal(seeded_key_data(seed, 3), expected)


def test_only_the_lowest_32_bits_of_a_seed_count():
    np.testing.assert_array_equal(seeded_key_data(5 - 2**40, 2), seeded_key_data(5, 2))
