"""Checks of the values of arrays, which are possible only outside of a compiled program."""

from __future__ import annotations

import jax
import numpy as np
from jax.core import Tracer


def check_ids(name: str, ids: jax.Array | np.ndarray | None, size: int, whose: str) -> None:
    """Raises an error for ids outside of ``[0, size)``.

    Without this check, JAX would silently clamp such ids, or count them from the end. Traced ids,
    and arrays that this process does not hold completely, are not checked.

    Args:
      name: What the ids are, for the message.
      ids: Integers of any shape; ``None`` is not checked.
      size: The number of valid ids.
      whose: What has this size, for the message.

    Raises:
      ValueError: An id is outside of the range.
    """
    if ids is None or isinstance(ids, Tracer):
        return
    if not getattr(ids, "is_fully_addressable", True):
        return
    array = np.asarray(ids)
    outside = (array < 0) | (array >= size)
    if outside.any():
        raise ValueError(f"{name} {int(array[outside][0])} is outside {whose} of {size} "
                         f"({name.split()[-1]}s 0 to {size - 1})")
