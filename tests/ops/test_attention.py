"""Attention against the float64 formula written out, for values, gradients, masks, biases and
dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax import ops
from transformer_jax.ops import AttentionMask, LinearBias, alibi_slopes, kernels
from transformer_jax.ops.attention import masked_softmax

attend = jax.jit(ops.attend, static_argnames=("scale", "dropout", "implementation", "cap"))
attention_weights = jax.jit(ops.attention_weights, static_argnames=("scale", "cap"))


def reference_weights(q, k, allowed=None, bias=None, scale=None, cap=None):
    """softmax(q k^T * scale + bias) head by head, row by row, in float64."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    scale = 1 / np.sqrt(H) if scale is None else scale
    allowed = np.broadcast_to(True if allowed is None else allowed, (B, N, T, S))
    bias = np.broadcast_to(0.0 if bias is None else np.asarray(bias, np.float64), (B, N, T, S))
    weights = np.zeros((B, N, T, S))
    for b, n, t in np.ndindex(B, N, T):
        scores = scale * k[b, :, n // (N // K)] @ q[b, t, n]
        scores = (scores if cap is None else cap * np.tanh(scores / cap)) + bias[b, n, t]
        keys = np.flatnonzero(allowed[b, n, t])
        if keys.size:
            exponentials = np.exp(scores[keys] - scores[keys].max())
            weights[b, n, t, keys] = exponentials / exponentials.sum()
    return weights


def reference_attend(q, k, v, **kwargs):
    weights = reference_weights(q, k, **kwargs)
    v = np.repeat(np.asarray(v, np.float64), weights.shape[1] // v.shape[2], axis=2)
    return np.einsum("bnts,bsnh->btnh", weights, v)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def qkv(B=2, T=5, S=7, N=4, K=2, H=8, dtype=jnp.float32):
    return normal(0, B, T, N, H, dtype=dtype), normal(1, B, S, K, H, dtype=dtype), normal(2, B, S, K, H, dtype=dtype)


def test_published_scores():
    # d_k = 64: scores 112, 96, 24 become 14, 12, 3; their softmax is 0.8808, 0.1192, 1.47e-5.
    q = jnp.ones((1, 1, 1, 64))
    k = jnp.asarray([112.0, 96.0, 24.0])[None, :, None, None] / 64 * jnp.ones((1, 3, 1, 64))
    weights = attention_weights(q, k)[0, 0, 0]
    np.testing.assert_allclose(weights[:2], [0.8808, 0.1192], atol=5e-5)
    np.testing.assert_allclose(weights[2], 1.47e-5, rtol=2e-3)
    np.testing.assert_allclose(attention_weights(q, k, scale=0.125), attention_weights(q, k))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_equals_the_formula(num_kv_heads):
    q, k, v = qkv(K=num_kv_heads)
    np.testing.assert_allclose(attention_weights(q, k), reference_weights(q, k), atol=1e-6)
    np.testing.assert_allclose(attend(q, k, v), reference_attend(q, k, v), atol=2e-6)


def test_mask_bias_and_scale_together():
    q, k, v = qkv(T=6, S=6)
    valid = np.arange(6) < np.array([[6], [4]])
    segments = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 0]])
    explicit = np.random.default_rng(3).random((2, 4, 6, 6)) < 0.8
    mask = (AttentionMask.causal() & AttentionMask.padding(jnp.asarray(valid))
            & AttentionMask.segments(jnp.asarray(segments)) & AttentionMask.explicit(jnp.asarray(explicit)))
    allowed = (np.tril(np.ones((6, 6), bool)) & valid[:, None, None, :] & explicit
               & (segments[:, None, :, None] == segments[:, None, None, :]) & (segments != 0)[:, None, None, :])
    bias = normal(4, 4, 6, 6)
    expected = dict(allowed=allowed, bias=np.asarray(bias)[None], scale=0.3)
    assert not allowed.any(-1).all(), "some rows should have nothing to attend to"
    np.testing.assert_allclose(attention_weights(q, k, mask, bias=bias, scale=0.3), reference_weights(q, k, **expected),
                               atol=1e-6)
    np.testing.assert_allclose(attend(q, k, v, mask, bias=bias, scale=0.3), reference_attend(q, k, v, **expected),
                               atol=2e-6)


def test_scores_are_capped_before_the_bias_is_added():
    q, k, v = qkv()
    bias = normal(6, 4, 5, 7)
    expected = dict(bias=np.asarray(bias)[None], cap=0.7)
    np.testing.assert_allclose(attention_weights(q, k, bias=bias, cap=0.7), reference_weights(q, k, **expected),
                               atol=1e-6)
    np.testing.assert_allclose(attend(q, k, v, bias=bias, cap=0.7), reference_attend(q, k, v, **expected), atol=2e-6)


def test_kernels_that_cannot_cap_say_so(monkeypatch):
    kernel = ops.Kernel("without cap", lambda *args, **settings: None, lambda *args, **settings: 0 * args[0])
    monkeypatch.setitem(kernels.KERNELS, "without cap", kernel)
    q, k, v = qkv()
    assert not ops.attend(q, k, v).any()
    np.testing.assert_allclose(ops.attend(q, k, v, cap=0.7), reference_attend(q, k, v, cap=0.7), atol=2e-6)
    with pytest.raises(ValueError, match="the kernel 'without cap' cannot cap scores; let implementation='auto'"):
        ops.attend(q, k, v, cap=0.7, implementation="without cap")


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (2, 1, 5, 7), (1, 4, 5, 7), (2, 4, 5, 7), (1, 1, 1, 7)])
def test_boolean_masks_broadcast(shape):
    q, k, v = qkv()
    allowed = np.random.default_rng(5).random(shape) < 0.6
    full = allowed[:, None] if allowed.ndim == 3 else allowed
    expected = reference_attend(q, k, v, allowed=full)
    np.testing.assert_allclose(attend(q, k, v, jnp.asarray(allowed)), expected, atol=2e-6)


@pytest.mark.parametrize("shape", [(5, 7), (4, 5, 7), (1, 1, 5, 7), (2, 4, 5, 7), (1, 4, 1, 7), (7,), (2, 1, 1, 7)])
def test_biases_broadcast(shape):
    q, k, v = qkv()
    bias = normal(6, *shape)
    np.testing.assert_allclose(attend(q, k, v, bias=bias), reference_attend(q, k, v, bias=bias), atol=2e-6)


def test_linear_bias_equals_its_array():
    q, k, v = qkv(T=3)
    slopes = alibi_slopes(4)
    distance = np.abs(np.arange(4, 7)[:, None] - np.arange(7))
    expected = reference_attend(q, k, v, bias=-np.asarray(slopes, np.float64)[:, None, None] * distance)
    np.testing.assert_allclose(attend(q, k, v, bias=LinearBias(slopes, query_start=4)), expected, atol=2e-6)


def test_rows_sum_to_one_and_scores_are_shift_invariant():
    q, k, _ = qkv()
    weights = attention_weights(100 * q, k, AttentionMask.causal(query_start=2))
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(attention_weights(q, k, bias=jnp.full((5, 7), 50.0)), attention_weights(q, k), atol=5e-6)


def test_keys_may_come_in_any_order():
    q, k, v = qkv()
    order = np.random.default_rng(0).permutation(7)
    np.testing.assert_allclose(attend(q, k[:, order], v[:, order]), attend(q, k, v), atol=1e-6)


def test_bfloat16_has_a_float32_softmax():
    q, k, v = qkv(S=300, dtype=jnp.bfloat16)
    weights, out = attention_weights(q, k), attend(q, k, v)
    assert weights.dtype == jnp.float32 and out.dtype == jnp.bfloat16
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)  # in bfloat16 the error would be about 1e-3
    np.testing.assert_allclose(weights, reference_weights(q, k), rtol=0.05, atol=1e-5)
    np.testing.assert_allclose(out.astype(jnp.float32), reference_attend(q, k, v), atol=0.01)


def everything_forbidden():
    return {
        "boolean": dict(mask=jnp.zeros((5, 7), bool)),
        "padding": dict(mask=AttentionMask.padding(jnp.zeros((2, 7), bool))),
        "causal before the first key": dict(mask=AttentionMask.causal(query_start=-9)),
        "a bias of -inf": dict(bias=jnp.full((5, 7), -jnp.inf)),
        "a bias of -inf and a mask": dict(bias=jnp.full((5, 7), -jnp.inf), mask=AttentionMask.causal(query_start=2)),
    }


@pytest.mark.parametrize("kind", everything_forbidden())
def test_nothing_to_attend_to_is_zero_with_finite_gradients(kind):
    arguments = everything_forbidden()[kind]
    out, gradients = jax.value_and_grad(lambda args: attend(*args, **arguments).sum(), argnums=0)(qkv())
    assert out == 0.0
    assert attention_weights(*qkv()[:2], **arguments).any() == np.False_
    assert all((gradient == 0.0).all() for gradient in gradients)


def test_one_empty_row_leaves_the_others_alone():
    q, k, v = qkv()
    allowed = jnp.ones((5, 7), bool).at[3].set(False)
    out = attend(q, k, v, allowed)
    assert (out[:, 3] == 0.0).all()
    np.testing.assert_allclose(jnp.delete(out, 3, axis=1), jnp.delete(attend(q, k, v), 3, axis=1), atol=1e-6)
    gradients = jax.grad(lambda q, k, v: (attend(q, k, v, allowed) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)
    assert (gradients[0][:, 3] == 0.0).all() and (gradients[0][:, 2] != 0.0).any()


def test_gradients_equal_float64_differences():
    q, k, v = qkv(B=1, T=3, S=4, N=2, K=1, H=3)
    allowed = np.tril(np.ones((3, 4), bool), 1)
    allowed[1] = False
    probe, bias = np.random.default_rng(0).normal(size=(1, 3, 2, 3)), normal(8, 2, 3, 4)
    gradients = jax.jit(jax.grad(lambda *args: (attend(*args[:3], allowed, bias=args[3]) * probe).sum(),
                                 argnums=(0, 1, 2, 3)))(q, k, v, bias)

    arguments = [np.asarray(x, np.float64) for x in (q, k, v, bias)]

    def loss(q, k, v, bias):
        return (reference_attend(q, k, v, allowed=allowed, bias=bias) * probe).sum()

    for position, gradient in enumerate(gradients):
        for index in np.ndindex(gradient.shape):
            change = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in arguments]
                moved[position][index] += step
                change.append(loss(*moved))
            np.testing.assert_allclose(gradient[index], (change[0] - change[1]) / 2e-5, atol=2e-6)


def test_dropout_drops_single_edges_and_scales_the_rest():
    q, k, _ = qkv(B=4, T=32, S=16, N=4, K=4, H=16)
    v = jnp.broadcast_to(jnp.eye(16)[None, :, None], k.shape)  # the output is then the weights themselves
    weights = jnp.swapaxes(attention_weights(q, k), 1, 2)
    out = attend(q, k, v, dropout=0.25, key=jax.random.key(9))
    kept = out != 0.0
    np.testing.assert_allclose(out, np.where(kept, weights / 0.75, 0.0), rtol=1e-5)
    n = kept.size
    assert abs(float(kept.mean()) - 0.75) < 5 * np.sqrt(0.25 * 0.75 / n)
    assert not (kept == kept[:1]).all(), "each row of the batch has its own mask"
    assert not (kept == kept[:, :, :1]).all(), "each head has its own mask"


def test_dropout_keeps_the_expectation_and_is_decided_by_the_key():
    q, k, v = qkv(T=3)
    sample = jax.jit(jax.vmap(lambda key: attend(q, k, v, dropout=0.3, key=key)))
    outs = sample(jax.random.split(jax.random.key(0), 4000))
    error = (outs.mean(0) - attend(q, k, v)) / (outs.std(0) / np.sqrt(len(outs)))
    assert np.abs(error).max() < 5
    assert (outs[0] != outs[1]).any()
    np.testing.assert_array_equal(outs, sample(jax.random.split(jax.random.key(0), 4000)))
    np.testing.assert_array_equal(attend(q, k, v, dropout=0.3), attend(q, k, v))  # no key: no dropout


def test_masked_softmax_equals_softmax_where_all_is_allowed():
    scores = 30 * normal(10, 3, 9)
    np.testing.assert_allclose(masked_softmax(scores, jnp.ones((3, 9), bool)), masked_softmax(scores, None), rtol=2e-6)


@pytest.mark.parametrize(("shapes", "words"), [
    (((2, 5, 8), (2, 7, 2, 8), (2, 7, 2, 8)), ["[B, T, N, H]", "(2, 5, 8)"]),
    (((2, 5, 4, 8), (3, 7, 2, 8), (3, 7, 2, 8)), ["batch", "(3, 7, 2, 8)"]),
    (((2, 5, 4, 8), (2, 7, 2, 6), (2, 7, 2, 6)), ["head dim", "(2, 7, 2, 6)"]),
    (((2, 5, 4, 8), (2, 7, 3, 8), (2, 7, 3, 8)), ["4 query heads", "3 key heads"]),
    (((2, 5, 4, 8), (2, 7, 2, 8), (2, 6, 2, 8)), ["(2, 7, 2, 8)", "(2, 6, 2, 8)"]),
    (((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 1, 8)), ["(2, 7, 2, 8)", "(2, 7, 1, 8)"]),
])
def test_shapes_that_do_not_fit(shapes, words):
    with pytest.raises(ValueError) as error:
        attend(*(jnp.zeros(shape) for shape in shapes))
    assert all(word in str(error.value) for word in words)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="implementation='flash3'"):
        attend(*qkv(), implementation="flash3")


def test_a_float_mask_is_refused():
    with pytest.raises(ValueError, match="boolean.*float32"):
        attend(*qkv(), jnp.zeros((5, 7)))


@pytest.mark.parametrize("kind", ["causal", "segments", "window", "explicit"])
def test_long_causal_attention_in_blocks_equals_one_explicit_mask(kind):
    # 300 positions are cut into blocks that skip later keys; a boolean array takes the undivided
    # path.
    q, k, v = qkv(B=2, T=300, S=300, N=2, K=1, H=4)
    segments = jnp.asarray(np.sort(np.random.default_rng(3).integers(0, 4, (2, 300)), axis=1))
    mask = AttentionMask.causal() & {
        "causal": AttentionMask(), "segments": AttentionMask.segments(segments),
        "window": AttentionMask.sliding_window(20) & AttentionMask.padding(segments > 0),
        "explicit": AttentionMask.explicit(jnp.asarray(np.random.default_rng(4).random((2, 1, 300, 300)) < 0.5)),
    }[kind]
    whole = jnp.broadcast_to(mask.materialize(300, 300), (2, 1, 300, 300))

    def loss(mask):
        return jax.value_and_grad(lambda q, k, v: (attend(q, k, v, mask) ** 2).sum(), (0, 1, 2))(q, k, v)

    np.testing.assert_allclose(attend(q, k, v, mask), reference_attend(q, k, v, allowed=whole), atol=3e-6)
    for got, wanted in zip(jax.tree.leaves(loss(mask)), jax.tree.leaves(loss(whole)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=3e-5)
    # No float array over all queries and all keys, where the undivided path has one.
    assert "300x300xf32" not in jax.jit(attend).lower(q, k, v, mask).as_text()
    assert "300x300xf32" in jax.jit(attend).lower(q, k, v, whole).as_text()
