"""Attention of long contexts, some queries at a time, against one explicit softmax."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.ops import AttentionMask, LinearBias, alibi_slopes, attention, attention_weights

B, T, N, K, H = 2, 37, 4, 2, 6
RNG = np.random.default_rng(0)
SEGMENTS = jnp.asarray(np.sort(RNG.integers(0, 3, (B, T)), axis=1))
CASES = {
    "everything": (None, None),
    "causal": (AttentionMask.causal() & AttentionMask.segments(SEGMENTS), None),
    "window": (AttentionMask.sliding_window(5) & AttentionMask.padding(SEGMENTS > 0), None),
    "boolean array": (jnp.asarray(RNG.random((B, 1, T, T)) < 0.5), None),
    "alibi": (AttentionMask.causal(), LinearBias(alibi_slopes(N))),
    "bias array": (None, jnp.asarray(RNG.normal(size=(N, T, T)), jnp.float32)),
    "bias of keys": (None, jnp.asarray(RNG.normal(size=(1, N, 1, T)), jnp.float32)),
}


def qkv():
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K))


@pytest.mark.parametrize("case", CASES)
def test_some_queries_at_a_time_are_all_of_them(case, monkeypatch):
    monkeypatch.setattr(attention, "_LONG", 100)
    monkeypatch.setattr(attention, "_SCORES_AT_A_TIME", B * N * T * 5)  # 8 times 5 queries, of which 37 are there
    mask, bias = CASES[case]

    def explicit(q, k, v):
        weights = attention_weights(q, k, mask, bias=bias)
        return jnp.einsum("BNTS,BSNH->BTNH", weights, jnp.repeat(v, N // K, axis=2))

    def by_rows(q, k, v):
        return attention.attend(q, k, v, mask, bias=bias)

    def with_gradients(function):
        return jax.jit(jax.value_and_grad(lambda q, k, v: ((out := function(q, k, v)) ** 2).sum() + out.sum(),
                                          (0, 1, 2)))

    np.testing.assert_allclose(jax.jit(by_rows)(*qkv()), explicit(*qkv()), atol=2e-6)
    for got, wanted in zip(*(jax.tree.leaves(with_gradients(function)(*qkv())) for function in (by_rows, explicit)),
                           strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)
    if case != "bias array":  # forward and backward, no float is there for every query and key
        text = with_gradients(by_rows).lower(*qkv()).compile().as_text()
        assert not re.search(rf"f32\[[\d,]*{T},{T}\]", text)
        assert re.search(rf"f32\[[\d,]*{T},{T}\]", with_gradients(explicit).lower(*qkv()).compile().as_text())


def test_dropout_has_a_key_for_every_part(monkeypatch):
    monkeypatch.setattr(attention, "_LONG", 100)
    monkeypatch.setattr(attention, "_SCORES_AT_A_TIME", B * N * T * 5)
    q, k, _ = qkv()
    alike = jnp.ones((B, T, K, H))  # without dropout every output is 1
    out = np.asarray(attention.attend(q, k, alike, dropout=0.5, key=jax.random.key(0)))[..., 0]
    assert abs(out.mean() - 1) < 0.1 and len(np.unique(out.round(4))) > 0.9 * out.size
