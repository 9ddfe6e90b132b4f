"""Cuts rows into evaluation batches of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np


def fixed_batches(num_rows: int, batch_size: int,
                  read: Callable[[range], dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """Yields every row once, in order, in batches of one shape, so that one compiled program
    evaluates them all.

    Args:
      num_rows: The number of rows.
      batch_size: Rows of every batch. The last batch is filled with rows in which all values are 0.
      read: A function that takes the numbers of some rows and returns arrays whose first axis is
        these rows.

    Returns:
      An iterator over batches.

    Raises:
      ValueError: If ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    starts = range(0, num_rows, batch_size)
    return (_filled(read(range(start, min(start + batch_size, num_rows))), batch_size) for start in starts)


def _filled(batch: dict[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
    """Adds rows of zeros to the arrays of a batch that has fewer rows than ``batch_size``."""
    return {name: np.pad(array, [(0, batch_size - len(array)), *[(0, 0)] * (array.ndim - 1)])
            for name, array in batch.items()}
