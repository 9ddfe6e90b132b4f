"""Indices of layers, heads and queries, as users give them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Index = int | np.integer | Sequence[int] | np.ndarray | jax.Array | None


def as_indices(name: str, wanted: Index) -> np.ndarray:
    """Converts one index or several to an array of integers.

    Raises:
      ValueError: if it is not an integer or a list of integers, if it is empty, or if it is too
        large for any axis.
    """
    try:
        array = np.asarray(wanted)
    except ValueError:  # NumPy cannot make an array of lists of different lengths
        array = np.asarray("")
    if not array.size:
        raise ValueError(f"{name}={wanted!r} is empty; pass at least one index, or None for all")
    if array.ndim > 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name}={wanted!r} is not an index; pass an integer, a list of integers, or None for all")
    if np.abs(array).max() > np.iinfo(np.int32).max:
        raise ValueError(f"{name}={wanted!r} is out of range: an index must fit in 32 bits")
    return array


def resolve(name: str, wanted: Index, size: int) -> tuple[jax.Array | np.ndarray, bool]:
    """Converts indices to non-negative ones; negative indices count from the end, and ``None``
    means all.

    Returns:
      The indices, and True if a single index was given.

    Raises:
      ValueError: if it is not an index or is empty; if an index is out of range (not checked for
        traced indices).
    """
    if wanted is None:
        return np.arange(size, dtype=np.int32), False
    if isinstance(wanted, jax.Array) and isinstance(wanted, Tracer):
        return jnp.where(wanted < 0, wanted + size, wanted).reshape(-1), wanted.ndim == 0
    array = as_indices(name, wanted)
    for index in array.flat:
        if not -size <= index < size:
            raise ValueError(f"{name}={wanted}: index {index} is out of range for {size} {name}")
    return np.where(array < 0, array + size, array).astype(np.int32).reshape(-1), array.ndim == 0
