"""Reductions of attention maps against loops over their definitions, SciPy and brute force."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

import transformer_jax as tj
from transformer_jax.inspection import maps, mixing
from transformer_jax.ops import AttentionMask

L, B, N, T = 2, 2, 3, 9
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 4, (B, T))
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 0, 0]])  # packed; padded on both sides
ALLOWED = (np.tril(np.ones((T, T), bool)) & (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (SEGMENTS != 0)[:, None])


def random_maps(allowed_BTS, shape=(L, B, N, T, T)):
    weights = RNG.random(shape) * np.broadcast_to(allowed_BTS[:, None], shape[1:])
    return (weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)).astype(np.float32)


WEIGHTS = random_maps(ALLOWED)

# The definitions: the value of row i of a map, given the keys that it may attend to; None where
# it has no value.
def mass(row, wanted):
    return sum(float(row[j]) for j in wanted) if wanted else None


DEFINITIONS = {
    "entropy": lambda row, i, visible, ids: -sum(w * math.log(w) for w in map(float, row) if w > 0),
    "distance": lambda row, i, visible, ids: sum(float(w) * abs(i - j) for j, w in enumerate(row)),
    "sink": lambda row, i, visible, ids: mass(row, visible[:1]),
    "previous_token": lambda row, i, visible, ids: mass(row, [j for j in visible if j == i - 1]),
    "diagonal": lambda row, i, visible, ids: mass(row, [i]),
    "duplicate_token": lambda row, i, visible, ids: mass(row, [j for j in visible if j < i and ids[j] == ids[i]]),
    "induction": lambda row, i, visible, ids: mass(
        row, [j for j in visible if j - 1 in visible and j - 1 < i and ids[j - 1] == ids[i]]),
}
REDUCTIONS = {
    "entropy": lambda weights, tokens, **places: maps.entropy(weights),
    "distance": lambda weights, tokens, allowed_TS, queries_T=None: maps.distance(weights, queries_T=queries_T),
    "sink": lambda weights, tokens, allowed_TS, queries_T=None: maps.sink_mass(weights, allowed_TS=allowed_TS),
    "previous_token": lambda weights, tokens, **places: maps.previous_token_score(weights, **places),
    "diagonal": lambda weights, tokens, **places: maps.diagonal_score(weights, **places),
    "duplicate_token": lambda weights, tokens, **places: maps.duplicate_token_score(weights, tokens, **places),
    "induction": lambda weights, tokens, **places: maps.induction_score(weights, tokens, **places),
}


def by_definition(name, weights_TS, allowed_TS, ids, rows=None):
    """The values of the rows that have one."""
    values = [DEFINITIONS[name](weights_TS[k], i, list(np.flatnonzero(allowed_TS[i])), ids)
              for k, i in enumerate(range(T) if rows is None else rows) if allowed_TS[i].any()]
    return [value for value in values if value is not None]


def mean(values):
    return sum(values) / max(len(values), 1)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_reductions_follow_their_definitions(name):
    got = jax.jit(REDUCTIONS[name])(WEIGHTS, TOKENS, allowed_TS=ALLOWED[:, None])
    assert got.shape == (L, B, N) and got.dtype == jnp.float32
    for layer, row, head in np.ndindex(L, B, N):
        wanted = mean(by_definition(name, WEIGHTS[layer, row, head], ALLOWED[row], TOKENS[row]))
        np.testing.assert_allclose(got[layer, row, head], wanted, atol=1e-6)
    assert len(np.unique(np.round(got, 6))) == got.size  # every map has its own value


def test_of_one_map_and_of_some_of_its_rows():
    weights, allowed, rows = WEIGHTS[1, 0, 2], ALLOWED[0], np.array([7, 3, -1])
    for name, reduction in REDUCTIONS.items():
        whole = reduction(weights, TOKENS[0], allowed_TS=allowed)
        np.testing.assert_allclose(whole, mean(by_definition(name, weights, allowed, TOKENS[0])), atol=1e-6)
        some = reduction(weights[rows], TOKENS[0], allowed_TS=allowed[rows], queries_T=rows)
        wanted = by_definition(name, weights[rows], allowed, TOKENS[0], rows % T)
        np.testing.assert_allclose(some, mean(wanted), atol=1e-6, err_msg=name)
    with pytest.raises(ValueError, match="3 queries and 9 keys need queries_T"):
        maps.distance(weights[rows])
    with pytest.raises(ValueError, match=r"queries_T has shape \(2,\); expected \(3,\)"):
        maps.diagonal_score(weights[rows], queries_T=rows[:2])


def test_known_maps():
    uniform = np.full((8, 8), 1 / 8, np.float32)
    np.testing.assert_allclose(maps.entropy(uniform), math.log(8), rtol=1e-6)
    np.testing.assert_allclose(maps.distance(uniform), 63 / 24, rtol=1e-6)  # (n^2 - 1) / 3n
    np.testing.assert_allclose(maps.sink_mass(uniform), 1 / 8)
    assert maps.entropy(np.eye(5)) == 0 and maps.diagonal_score(np.eye(5)) == 1
    assert maps.previous_token_score(np.eye(5, k=-1)) == 1 and maps.previous_token_score(np.eye(5)) == 0
    nothing = np.zeros((4, 4), np.float32)
    assert all(reduction(nothing, np.zeros(4, int), allowed_TS=None) == 0 for reduction in REDUCTIONS.values())
    # "a b c d a b c d": an induction head goes from the second a to the first b, a duplicate-token
    # head to the first a.
    repeated = np.tile(np.arange(4), 2)
    assert maps.induction_score(np.eye(8, k=-3), repeated) == 1 and maps.induction_score(np.eye(8, k=-4), repeated) == 0
    assert maps.duplicate_token_score(np.eye(8, k=-4), repeated) == 1


def test_gradients_are_finite():
    def total(scores):
        weights = jax.nn.softmax(jnp.where(np.tri(5, dtype=bool), scores, -jnp.inf))
        return maps.entropy(weights) + maps.distance(weights) + maps.induction_score(weights, np.array([1, 2, 1, 2, 1]))

    slopes = jax.jit(jax.grad(total))(jnp.asarray(RNG.normal(size=(5, 5)), jnp.float32))
    assert np.isfinite(slopes).all() and np.abs(slopes).max() > 1e-3


def test_head_agreement_is_jensen_shannon():
    got = jax.jit(maps.head_agreement)(WEIGHTS)
    assert got.shape == (L, B, N, N)
    for layer, row, one, other in np.ndindex(L, B, N, N):
        p, q = (WEIGHTS[layer, row, head].astype(np.float64) for head in (one, other))
        wanted = [1 - jensenshannon(p[i], q[i]) ** 2 / math.log(2) for i in range(T) if ALLOWED[row, i].any()]
        np.testing.assert_allclose(got[layer, row, one, other], np.mean(wanted), atol=2e-6)
    apart = maps.head_agreement(np.stack([np.eye(4), np.eye(4)[::-1]]))
    np.testing.assert_allclose(apart, np.eye(2), atol=1e-6)


def mixed_loops(weights):
    mixed = np.zeros(weights.shape)
    for layer, i in np.ndindex(weights.shape[:2]):
        row = [0.5 * float(weights[layer, i, j]) + 0.5 * (i == j) for j in range(weights.shape[2])]
        mixed[layer, i] = np.array(row) / sum(row)
    return mixed


def test_rollout_is_a_product_of_mixed_maps():
    got = jax.jit(mixing.rollout)(WEIGHTS.mean(2))
    assert got.shape == (L, B, T, T)
    for row in range(B):
        first, second = mixed_loops(WEIGHTS.mean(2)[:, row])
        np.testing.assert_allclose(got[0, row], first, atol=1e-6)
        np.testing.assert_allclose(got[1, row], second @ first, atol=1e-6)
    np.testing.assert_allclose(got.sum(-1), 1.0, atol=1e-6)  # a row of padding attends only to itself


def smallest_cut(mixed, query, key):
    """The largest flow, found by trying every cut: the largest flow equals the smallest cut (Ford
    and Fulkerson)."""
    num_layers, length, _ = mixed.shape
    nodes = list(np.ndindex(num_layers + 1, length))
    free = [node for node in nodes if node not in ((num_layers, query), (0, key))]
    best = math.inf
    for sides in itertools.product((False, True), repeat=len(free)):
        near = dict(zip(free, sides, strict=True)) | {(num_layers, query): True, (0, key): False}
        best = min(best, sum(mixed[layer, i, j] for layer, i, j in np.ndindex(mixed.shape)
                             if near[layer + 1, i] and not near[layer, j]))
    return best


def test_flow_is_the_smallest_cut():
    weights = random_maps(np.tri(3, dtype=bool)[None], (2, 1, 1, 3, 3))[:, 0, 0]
    mixed = mixed_loops(weights)
    wanted = [[smallest_cut(mixed, query, key) for key in range(3)] for query in range(3)]
    np.testing.assert_allclose(mixing.flow(weights), wanted, atol=1e-7)
    np.testing.assert_allclose(mixing.flow(weights, queries=[-1]), wanted[2:], atol=1e-7)


@functools.cache
def traced(**changes):
    config = tj.ModelConfig(vocab_size=5, max_len=T, num_layers=L, num_heads=4, model_dim=16, init_std=0.5, **changes)
    trace = tj.trace(tj.Decoder(config, key=jax.random.key(0)), jnp.asarray(TOKENS),
                     segment_ids_BT=jnp.asarray(SEGMENTS))
    return trace, np.asarray(trace.attention())


@pytest.mark.long
@pytest.mark.parametrize("window", [None, 3])
def test_summaries_are_the_means_of_the_maps(window, monkeypatch):
    # Two rows of every map at a time, the last block reaching past the end.
    monkeypatch.setattr(maps, "_WEIGHTS_AT_A_TIME", 2 * B * 4 * T)
    trace, weights = traced(sliding_window=window, num_kv_heads=2)
    near = ALLOWED if window is None else ALLOWED & (np.abs(np.arange(T)[:, None] - np.arange(T)) < window)
    program = maps._summaries.lower(trace, jnp.asarray(TOKENS)).compile()
    assert not re.findall(rf"f32\[[\d,]*{T},{T}\]", program.as_text())
    got = program(trace, jnp.asarray(TOKENS))
    assert set(got) == set(DEFINITIONS)
    for name, values in got.items():
        assert values.shape == (L, 4)
        for layer, head in np.ndindex(L, 4):
            wanted = []
            for row in range(B):
                rows = by_definition(name, weights[layer, row, head], near[row], TOKENS[row])
                if name == "sink":  # the first token of the text, for the queries that can see it
                    first = {i: np.flatnonzero(ALLOWED[row, i])[0] for i in range(T) if ALLOWED[row, i].any()}
                    rows = [float(weights[layer, row, head, i, j]) for i, j in first.items() if near[row, i, j]]
                wanted += rows
            np.testing.assert_allclose(values[layer, head], mean(wanted), atol=2e-6, err_msg=name)


def test_summaries_of_cross_attention_and_without_tokens():
    trace, _ = traced()
    assert set(maps.summaries(trace)) == set(DEFINITIONS) - {"duplicate_token", "induction"}
    cross = tj.Trace(layers=trace.layers, final=None, mask=AttentionMask.segments(jnp.asarray(SEGMENTS)), bias=None)
    got = maps.summaries(cross)
    assert set(got) == {"entropy", "sink"}
    counted = (np.asarray(cross.attention()).sum(-1) > 0).sum((1, 3))
    rows = np.asarray(cross.attention())
    np.testing.assert_allclose(got["entropy"], -(rows * np.log(np.maximum(rows, 1e-30))).sum((1, 3, 4)) / counted,
                               rtol=1e-5)
