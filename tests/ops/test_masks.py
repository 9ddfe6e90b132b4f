"""Structured masks against loops over every query and key."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.ops import AttentionMask

B, N, T, S = 2, 3, 6, 6
VALID = np.array([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1]], bool)
SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 1, 1, 1]])
EXPLICIT = np.random.default_rng(0).random((B, N, T, S)) < 0.7

# Each part: how it is made, and whether query t of row b and head n may see key s.
PARTS = {
    "causal": (lambda: AttentionMask.causal(), lambda b, n, t, s: s <= t),
    "window": (lambda: AttentionMask.sliding_window(3), lambda b, n, t, s: abs(s - t) < 3),
    "padding": (lambda: AttentionMask.padding(jnp.asarray(VALID)), lambda b, n, t, s: VALID[b, s]),
    "segments": (lambda: AttentionMask.segments(jnp.asarray(SEGMENTS)),
                 lambda b, n, t, s: SEGMENTS[b, t] == SEGMENTS[b, s] and SEGMENTS[b, s] != 0),
    "explicit": (lambda: AttentionMask.explicit(jnp.asarray(EXPLICIT)), lambda b, n, t, s: EXPLICIT[b, n, t, s]),
}
SUBSETS = [names for size in range(1, 6) for names in itertools.combinations(PARTS, size)]


def table(*rules, num_queries=T, num_keys=S):
    allowed = np.ones((B, N, num_queries, num_keys), bool)
    for index in np.ndindex(allowed.shape):
        allowed[index] = all(rule(*index) for rule in rules)
    return allowed


def full(mask, num_queries, num_keys, rows=None):
    made = mask.materialize(num_queries, num_keys, rows)
    return np.broadcast_to(made, (B, N, num_queries if rows is None else len(rows), num_keys))


def joined(names):
    mask = AttentionMask()
    for name in names:
        mask &= PARTS[name][0]()
    return mask


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_conjunctions_equal_loops(names):
    mask, expected = joined(names), table(*(PARTS[name][1] for name in names))
    np.testing.assert_array_equal(full(mask, T, S), expected)
    np.testing.assert_array_equal(full(joined(reversed(names)), T, S), expected)
    rows = np.array([4, 0, 4])
    np.testing.assert_array_equal(full(mask, T, S, jnp.asarray(rows)), expected[:, :, rows])


def test_an_empty_mask_allows_everything():
    assert AttentionMask().materialize(T, S) is None
    assert (AttentionMask() & AttentionMask()).materialize(T, S) is None


def test_repeated_parts_are_a_conjunction():
    other = np.array([[1, 1, 1, 2, 2, 2], [1, 2, 1, 2, 1, 2]])
    mask = AttentionMask.segments(jnp.asarray(SEGMENTS)) & AttentionMask.segments(jnp.asarray(other))
    np.testing.assert_array_equal(full(mask, T, S),
                                  table(PARTS["segments"][1], lambda b, n, t, s: other[b, t] == other[b, s]))
    windows = AttentionMask.sliding_window(4) & AttentionMask.sliding_window(2)
    np.testing.assert_array_equal(full(windows, T, S), table(lambda b, n, t, s: abs(s - t) < 2))
    padding = AttentionMask.padding(jnp.asarray(VALID)) & AttentionMask.padding(jnp.asarray(~VALID))
    assert not padding.materialize(T, S).any()


@pytest.mark.parametrize("start", [0, 3, -2])
def test_query_start_places_queries_among_the_keys(start):
    T, S = 4, 7
    mask = AttentionMask.causal(start) & AttentionMask.sliding_window(3)
    expected = table(lambda b, n, t, s: s <= t + start and abs(s - t - start) < 3, num_queries=T, num_keys=S)
    np.testing.assert_array_equal(full(mask, T, S), expected)
    # The start is traced, so one compiled function serves every start.
    function = jax.jit(lambda start: (AttentionMask.causal(start) & AttentionMask.sliding_window(3)).materialize(T, S))
    np.testing.assert_array_equal(np.broadcast_to(function(jnp.int32(start)), expected.shape), expected)
    rows = jnp.asarray([3, 1])
    np.testing.assert_array_equal(full(mask, T, S, rows), expected[:, :, [3, 1]])


def test_segments_between_other_keys():
    keys = np.array([[1, 1, 2, 2, 0, 0, 1, 3], [3, 0, 3, 1, 1, 1, 1, 0]])
    mask = AttentionMask.segments(jnp.asarray(SEGMENTS), jnp.asarray(keys))
    np.testing.assert_array_equal(full(mask, T, 8), table(
        lambda b, n, t, s: SEGMENTS[b, t] == keys[b, s] and keys[b, s] != 0, num_keys=8))


@pytest.mark.parametrize("cut", [(0, 0), (slice(None), 0), (slice(None), slice(None, 1)), (slice(None), slice(None))])
def test_explicit_masks_of_two_to_four_axes(cut):
    allowed = EXPLICIT[cut]
    expected = np.broadcast_to(allowed[:, None] if allowed.ndim == 3 else allowed, EXPLICIT.shape)
    np.testing.assert_array_equal(full(AttentionMask.explicit(jnp.asarray(allowed)), T, S), expected)


def test_explicit_with_one_row_for_all_queries():
    mask = AttentionMask.explicit(jnp.asarray(EXPLICIT[:, :, :1]))
    rows = mask.materialize(T, S, jnp.asarray([5, 2]))
    np.testing.assert_array_equal(np.broadcast_to(rows, (B, N, 2, S)), EXPLICIT[:, :, [0, 0]])


def test_is_a_pytree():
    mask = joined(PARTS)
    rebuilt = jax.tree.unflatten(*reversed(jax.tree.flatten(mask)))
    assert rebuilt.is_causal and rebuilt.window == 3
    expected = table(*(rule for _, rule in PARTS.values()))
    traced = jax.jit(lambda mask: mask.materialize(T, S))(mask)
    np.testing.assert_array_equal(traced, expected)
    stacked = jax.tree.map(lambda x: x[:, None], mask)  # one mask a row, as vmap hands them in
    np.testing.assert_array_equal(jax.vmap(lambda mask: mask.materialize(T, S))(stacked)[:, 0], expected)


def test_works_under_vmap_over_starts():
    starts = jnp.arange(3)
    masks = jax.vmap(lambda start: AttentionMask.causal(start).materialize(2, 5)[0, 0])(starts)
    expected = [[[s <= t + start for s in range(5)] for t in range(2)] for start in range(3)]
    np.testing.assert_array_equal(masks, expected)


def test_wrong_masks_are_refused():
    with pytest.raises(ValueError, match="window=0"):
        AttentionMask.sliding_window(0)
    with pytest.raises(ValueError, match="boolean.*int32"):
        AttentionMask.explicit(jnp.ones((3, 3), jnp.int32))
    with pytest.raises(ValueError, match="2 to 4 dimensions.*5"):
        AttentionMask.explicit(jnp.ones((1, 1, 1, 3, 3), bool))
    with pytest.raises(ValueError, match="query_start"):
        AttentionMask.causal(1) & AttentionMask.sliding_window(2, query_start=2)


def test_lengths_equal_a_loop_and_the_shorter_one_counts():
    lengths = np.array([4, 0])
    mask = AttentionMask.lengths(jnp.asarray(lengths)) & AttentionMask.lengths(jnp.asarray([6, 3])) & joined(["window"])
    expected = table(lambda b, n, t, s: s < lengths[b], PARTS["window"][1])
    np.testing.assert_array_equal(full(mask, T, S), expected)
    np.testing.assert_array_equal(mask.block(2, 5).materialize(3, 5), expected[:, :1, 2:5, :5])


def test_single_rows_and_columns_equal_those_of_the_whole_array():
    mask = joined(PARTS) & AttentionMask.lengths(jnp.asarray([5, 2]))
    rows, columns = np.array([4, 0, 4]), np.array([5, 1])
    whole = np.asarray(mask.materialize(T, S))
    np.testing.assert_array_equal(mask.materialize(T, S, jnp.asarray(rows), jnp.asarray(columns)),
                                  whole[:, :, rows][..., columns])
    # For indices beyond the end, as in a last block that is not full, the last stored row and key
    # are used.
    beyond = mask.materialize(T, S, jnp.asarray([T + 1]), jnp.asarray([1]))
    assert beyond.shape == (B, N, 1, 1)
