"""Attention sinks, and values of another width than keys: values and gradients of each
implementation against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.ops import AttentionMask, attention, attention_weights, chunked_attention

B, T, N, K, H, V = 2, 9, 4, 2, 6, 5
MASK = AttentionMask(is_causal=True, window=6)


def arrays():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32)
                 for shape in ((B, T, N, H), (B, T, K, H), (B, T, K, V), (N,)))


def formula(q, k, v, sinks):
    """The softmax over the keys and the sink, whose weight is dropped."""
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    distances = np.arange(T)[:, None] - np.arange(T)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)
    exponentials = jnp.where((distances >= 0) & (distances < 6), jnp.exp(scores), 0.0)
    weights = exponentials / (exponentials.sum(-1, keepdims=True) + jnp.exp(sinks)[:, None, None])
    return jnp.einsum("bnts,bsnv->btnv", weights, v), weights


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_values_and_gradients(implementation, monkeypatch):
    for name, size in (("_KEYS", 4), ("_MOST_QUERIES", 4), ("_SCORES_AT_A_TIME", 1)):
        monkeypatch.setattr(chunked_attention, name, size)

    def ours(q, k, v, sinks):
        return attention.attend(q, k, v, MASK, sinks_N=sinks, implementation=implementation)

    @jax.jit
    def both(arguments, cotangent):
        (out, pull), (expected, expected_pull) = (jax.vjp(f, *arguments) for f in (
            ours, lambda *arguments: formula(*arguments)[0]))
        return (out, *pull(cotangent)), (expected, *expected_pull(cotangent))

    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, N, V)), jnp.float32)
    found, expected = both(arrays(), cotangent)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert np.abs(expected[-1]).min() > 1e-3


def test_weights_leave_out_that_of_the_sink():
    q, k, v, sinks = arrays()
    weights = attention_weights(q, k, MASK, sinks_N=sinks)
    np.testing.assert_allclose(weights, formula(q, k, v, sinks)[1], atol=1e-6)
    assert (weights.sum(-1) < 1).all()


def test_kernels_without_sinks_are_not_chosen():
    q, k, _, sinks = arrays()
    for name in ("cudnn", "splash"):
        assert attention.why_not(name, q, k, sinks_N=sinks) == f"the kernel {name!r} has no attention sinks"
