"""Several short examples in one row, kept apart by segment ids."""

from collections.abc import Sequence

import numpy as np

_OPEN_ROWS = 64  # rows that still take examples: what bounds the search, and the memory, in a large corpus


def pack(lengths_NK: np.ndarray, capacities_K: Sequence[int] | np.ndarray) -> np.ndarray:
    """Assigns examples to rows, each to the first open row with room for it.

    Args:
        lengths_NK: Tokens of each example, in each of K sides that fill up together (source and
          target, say).
        capacities_K: Tokens of a row, in each side.

    Returns:
        The row of each example, int32 [N]; rows are numbered from 0 without a gap.

    Raises:
        ValueError: an example longer than a row.
    """
    lengths_NK, capacities_K = np.asarray(lengths_NK), np.asarray(capacities_K)
    if (lengths_NK > capacities_K).any():
        longest = int(np.flatnonzero((lengths_NK > capacities_K).any(1))[0])
        raise ValueError(f"example {longest} has {lengths_NK[longest].tolist()} tokens, more than the "
                         f"{capacities_K.tolist()} of a row")
    rows_N = np.zeros(len(lengths_NK), np.int32)
    room_RK = np.zeros((0, len(capacities_K)), np.int64)
    numbers_R = np.zeros(0, np.int32)
    num_rows = 0
    for index, lengths_K in enumerate(lengths_NK):
        fits_R = np.flatnonzero((room_RK >= lengths_K).all(1))
        if fits_R.size:
            place = fits_R[0]
        else:
            if len(numbers_R) == _OPEN_ROWS:  # the fullest is closed
                closed = room_RK.sum(1).argmin()
                room_RK, numbers_R = np.delete(room_RK, closed, axis=0), np.delete(numbers_R, closed)
            room_RK, numbers_R = np.vstack([room_RK, capacities_K]), np.append(numbers_R, np.int32(num_rows))
            num_rows += 1
            place = len(numbers_R) - 1
        room_RK[place] -= lengths_K
        rows_N[index] = numbers_R[place]
    return rows_N


def lay_out(examples: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Lays examples end to end in rows, as `pack` assigns them.

    Args:
        examples: What each place of an example holds, C integers a place, each [C, n] with n at
          most `length`.
        length: T, places of a row.

    Returns:
        The rows, int32 [C, R, T], and segment ids, int32 [R, T]: 1, 2, ... for the examples of a
        row. Where no example lies, all is 0.
    """
    rows_N = pack(np.array([example.shape[1:] for example in examples]), [length])
    values_CRT = np.zeros((len(examples[0]), rows_N.max() + 1, length), np.int32)
    segment_ids_RT = np.zeros(values_CRT.shape[1:], np.int32)
    ends_R, counts_R = np.zeros((2, len(segment_ids_RT)), int)
    for example, row in zip(examples, rows_N, strict=True):
        place = slice(ends_R[row], ends_R[row] + example.shape[1])
        counts_R[row] += 1
        values_CRT[:, row, place] = example
        segment_ids_RT[row, place] = counts_R[row]
        ends_R[row] = place.stop
    return values_CRT, segment_ids_RT
