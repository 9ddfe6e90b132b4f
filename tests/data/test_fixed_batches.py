"""Evaluation batches of one shape, whatever the rows are."""

import numpy as np
import pytest

from transformer_jax.data.evaluation import fixed_batches

ROWS = {"tokens": np.arange(1, 31, dtype=np.int32).reshape(5, 3, 2), "ranks": np.arange(1, 6, dtype=np.float32)}


@pytest.mark.parametrize(("batch_size", "num_batches"), [(1, 5), (2, 3), (5, 1), (8, 1)])
def test_every_row_comes_once_and_the_last_batch_is_filled_with_zeros(batch_size, num_batches):
    batches = list(fixed_batches(5, batch_size, lambda rows: {name: x[rows.start:rows.stop]
                                                              for name, x in ROWS.items()}))
    assert len(batches) == num_batches
    for name, rows in ROWS.items():
        assert {(batch[name].shape, batch[name].dtype) for batch in batches} == {
            ((batch_size, *rows.shape[1:]), rows.dtype)}
        together = np.concatenate([batch[name] for batch in batches])
        np.testing.assert_array_equal(together[:5], rows)
        assert not together[5:].any()


def test_a_batch_has_at_least_one_row():
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        fixed_batches(5, 0, lambda rows: {})
