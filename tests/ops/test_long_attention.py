"""Attention of long contexts, block by block, against one explicit softmax."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.ops import AttentionMask, LinearBias, alibi_slopes, attention, attention_weights, chunked_attention

B, T, N, K, H = 2, 37, 4, 2, 6
RNG = np.random.default_rng(0)
SEGMENTS = jnp.asarray(np.sort(RNG.integers(0, 3, (B, T)), axis=1))
CASES = {
    "everything": (None, None),
    "causal": (AttentionMask.causal() & AttentionMask.segments(SEGMENTS), None),
    "window": (AttentionMask.sliding_window(5) & AttentionMask.padding(SEGMENTS > 0), None),
    "causal window": (AttentionMask.sliding_window(5) & AttentionMask.causal(), None),
    "in the middle of a cache": (AttentionMask.causal(jnp.int32(3)) & AttentionMask.sliding_window(9), None),
    "lengths": (AttentionMask.lengths(jnp.asarray([20, 0])), None),
    "boolean array": (jnp.asarray(RNG.random((B, 1, T, T)) < 0.5), None),
    "alibi": (AttentionMask.causal(), LinearBias(alibi_slopes(N))),
    "bias array": (None, jnp.asarray(RNG.normal(size=(N, T, T)), jnp.float32)),
    "bias of keys": (None, jnp.asarray(RNG.normal(size=(1, N, 1, T)), jnp.float32)),
    "bias of -inf": (None, jnp.where(jnp.asarray(RNG.random((T, T)) < 0.5), 1.0, -jnp.inf).at[3].set(-jnp.inf)),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 5 queries and 8 keys, neither of which divides the 37 tokens; every attention
    counts as long."""
    monkeypatch.setattr(attention, "_MANY_SCORES_OF_A_HEAD", 100)
    monkeypatch.setattr(chunked_attention, "_MOST_QUERIES", 5)
    monkeypatch.setattr(chunked_attention, "_KEYS", 8)


def qkv():
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K))


def with_gradients(function):
    """Returns the output and its gradients with respect to queries, keys, values and the bias."""
    return jax.jit(jax.value_and_grad(lambda *args: ((out := function(*args)) ** 2).sum() + out.sum(), (0, 1, 2, 3),
                                      allow_int=True))


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_attention_in_blocks_equals_attention_at_once(case, small_blocks):
    (mask, bias), cap = CASES[case], 0.8 if case == "causal window" else None

    def explicit(q, k, v, bias):
        weights = attention_weights(q, k, mask, bias=bias, cap=cap)
        return jnp.einsum("BNTS,BSNH->BTNH", weights, jnp.repeat(v, N // K, axis=2))

    def chunked(q, k, v, bias):
        return attention.attend(q, k, v, mask, bias=bias, cap=cap)

    arguments = (*qkv(), bias)
    np.testing.assert_allclose(jax.jit(chunked)(*arguments), explicit(*arguments), atol=2e-6)
    for got, wanted in zip(*(jax.tree.leaves(with_gradients(function)(*arguments)) for function in (chunked, explicit)),
                           strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)
    # Forward and backward, no float is there for every query and key, but for the gradient of a
    # bias that is an array.
    if bias is None or isinstance(bias, LinearBias):
        text = with_gradients(chunked).lower(*arguments).compile().as_text()
        assert not re.search(rf"f32\[[\d,]*{T},{T}\]", text)
        assert re.search(rf"f32\[[\d,]*{T},{T}\]", with_gradients(explicit).lower(*arguments).compile().as_text())


def test_rows_that_see_nothing_are_zero_with_zero_gradients(small_blocks):
    q, k, v = qkv()
    mask = AttentionMask.causal() & AttentionMask.segments(SEGMENTS)
    out, gradients = with_gradients(lambda q, k, v, _: attention.attend(q, k, v, mask))(q, k, v, None)
    empty = np.asarray(SEGMENTS == 0)
    assert empty.any() and np.isfinite(out)
    assert (attention.attend(q, k, v, mask)[empty] == 0).all() and (gradients[0][empty] == 0).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients[:3])


def test_dropout_is_the_same_forward_and_backward(small_blocks):
    q, k, _ = qkv()
    alike = jnp.ones((B, T, K, H))  # without dropout every output is 1
    key = jax.random.key(0)

    def dropped(v):
        return attention.attend(q, k, v, dropout=0.5, key=key)

    out = np.asarray(dropped(alike))[..., 0]
    assert abs(out.mean() - 1) < 0.1 and len(np.unique(out.round(4))) > 0.9 * out.size
    # The output is linear in the values: its gradient's product with them is the output itself,
    # dropped alike.
    probe = jnp.asarray(np.random.default_rng(5).normal(size=(B, T, N, H)), jnp.float32)
    value, gradient = jax.value_and_grad(lambda v: (dropped(v) * probe).sum())(alike)
    np.testing.assert_allclose((gradient * alike).sum(), value, rtol=1e-4)

    @jax.jit
    def moved(step):
        return (attention.attend(q + step, k, alike, dropout=0.5, key=key) * probe).sum()

    np.testing.assert_allclose(jax.grad(moved)(0.0), (moved(1e-2) - moved(-1e-2)) / 2e-2, rtol=2e-2, atol=2e-2)


def test_fully_masked_blocks_are_not_visited():
    """Of 2,048 x 2,048 positions, a causal window of 100 lets 8 of the 16 blocks be visited, in a
    loop of known length."""
    settings = chunked_attention.Settings(1.0, 0.0, None, 2048, 2048, 512, 512, None)

    def visited(mask):
        return [tuple(int(x) for x in chunked_attention._visible_blocks(settings, i, mask)) for i in range(4)]

    assert visited(AttentionMask.causal()) == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert visited(AttentionMask.causal() & AttentionMask.sliding_window(100)) == [(0, 1), (0, 2), (1, 3), (2, 4)]
    assert visited(AttentionMask.sliding_window(100)) == [(0, 2), (0, 3), (1, 4), (2, 4)]
    assert visited(AttentionMask.causal(query_start=600)) == [(0, 3), (0, 4), (0, 4), (0, 4)]
    assert visited(None) == [(0, 4)] * 4


def test_32k_tokens_within_2_gb():
    """Twelve heads of 64, forward and backward: arguments, results and everything between."""
    long = jax.ShapeDtypeStruct((1, 32_768, 12, 64), jnp.float32)
    function = jax.jit(jax.grad(lambda q, k, v: attention.attend(q, k, v, AttentionMask.causal()).sum(), (0, 1, 2)))
    memory = function.lower(long, long, long).compile().memory_analysis()
    assert memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes < 2e9
    assert memory.temp_size_in_bytes > 4 * 32_768 * 512  # the compiler does not remove all of it


@pytest.mark.long
def test_32k_tokens_equal_the_formula():
    """Some rows of one head in float64."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 32_768, 1, 8)) for _ in range(3))
    mask = AttentionMask.causal() & AttentionMask.sliding_window(9000)
    out = jax.jit(lambda q, k, v: attention.attend(q, k, v, mask))(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    for row in (0, 511, 512, 9_000, 20_000, 32_767):
        first = max(0, row - 8999)
        scores = k[0, first:row + 1, 0] @ q[0, row, 0] / np.sqrt(8)
        weights = np.exp(scores - scores.max())
        np.testing.assert_allclose(out[0, row, 0], weights @ v[0, first:row + 1, 0] / weights.sum(), atol=1e-5)
