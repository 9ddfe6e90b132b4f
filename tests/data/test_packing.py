import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_jax.data import pack


def fill(lengths_NK, rows_N):
    """Tokens of every row and side."""
    used_RK = np.zeros((rows_N.max() + 1, lengths_NK.shape[1]), int)
    np.add.at(used_RK, rows_N, lengths_NK)
    return used_RK


def first_fit(lengths, capacities, max_open):
    """The same packing with plain lists: each example goes to the first open row that has room;
    when too many rows are open, the fullest one is closed."""
    used, open_rows, rows = [], [], []
    for sides in lengths:
        fits = [r for r in open_rows if all(u + s <= c for u, s, c in zip(used[r], sides, capacities, strict=True))]
        if not fits:
            if len(open_rows) == max_open:
                open_rows.remove(max(open_rows, key=lambda r: sum(used[r])))
            fits = [len(used)]
            open_rows.append(len(used))
            used.append([0] * len(capacities))
        used[fits[0]] = [u + s for u, s in zip(used[fits[0]], sides, strict=True)]
        rows.append(fits[0])
    return rows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=60))
def test_no_row_overflows_and_at_most_one_is_half_empty(lengths):
    lengths_NK = np.array(lengths)[:, None]
    rows_N = pack(lengths_NK, [10])
    assert rows_N.dtype == np.int32 and rows_N.shape == (len(lengths),)
    assert np.unique(rows_N).tolist() == list(range(rows_N.max() + 1))
    used = fill(lengths_NK, rows_N)
    assert used.max() <= 10
    # If two rows are at most half full, the example that opened the later one would have fitted
    # into the earlier one.
    assert np.sum(used <= 5) <= 1


@pytest.mark.parametrize("capacities", [[20], [20, 30], [50, 9]])
def test_it_is_first_fit_with_at_most_64_open_rows(capacities):
    lengths_NK = np.random.default_rng(0).integers(1, np.array(capacities) + 1, (2000, len(capacities)))
    rows_N = pack(lengths_NK, capacities)
    assert rows_N.tolist() == first_fit(lengths_NK.tolist(), capacities, max_open=64)
    assert (fill(lengths_NK, rows_N) <= capacities).all()


def test_a_row_that_closes_takes_no_more():
    lengths = [[7]] * 64 + [[8]] + [[3]] * 66  # the 65th row closes the first, the fullest of the 7s
    rows_N = pack(np.array(lengths), [10])
    assert rows_N.tolist() == [*range(65), *range(1, 64), 65, 65, 65]


def test_both_sides_must_have_room():
    assert pack(np.array([[4, 1], [4, 9], [2, 1], [2, 8]]), [10, 10]).tolist() == [0, 0, 1, 1]
    assert pack(np.array([[9, 1], [1, 9], [1, 1]]), [10, 10]).tolist() == [0, 0, 1]


def test_edges():
    assert pack(np.zeros((0, 1), int), [5]).tolist() == []
    assert pack([[5], [5]], [5]).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"example 1 has \[3, 9\] tokens, more than the \[8, 8\] of a row"):
        pack([[8, 8], [3, 9]], [8, 8])
