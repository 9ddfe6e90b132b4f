"""The splash kernel, interpreted on a CPU, compared with float64; and the arguments that it does
not support."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import reference_attend

from tests.long_cases import mostly_long
from transformer_jax.config import MeshConfig
from transformer_jax.ops import AttentionMask, LinearBias, alibi_slopes, attend, attention
from transformer_jax.ops.splash_attention import splash_attend
from transformer_jax.sharding import make_mesh

B, T, N, K, H = 2, 256, 4, 2, 64
SEGMENTS = np.sort(np.random.default_rng(3).integers(0, 4, (B, T)), axis=1)
CASES = {
    "causal": lambda: AttentionMask.causal(),
    "causal window and segments": lambda: (AttentionMask.causal() & AttentionMask.sliding_window(40)
                                           & AttentionMask.segments(jnp.asarray(SEGMENTS))),
    "window": lambda: AttentionMask.sliding_window(40),
    "padding": lambda: AttentionMask.padding(jnp.asarray(SEGMENTS > 0)),
    "lengths": lambda: AttentionMask.lengths(jnp.asarray([100, 0])),
}


def qkv(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, T, heads, H)), dtype) for heads in (N, K, K))


@pytest.mark.parametrize("case", mostly_long(CASES, "causal window and segments", "lengths"))
def test_equals_the_formula_with_gradients(case):
    mask, probe = CASES[case](), jnp.asarray(np.random.default_rng(1).normal(size=(B, T, N, H)), jnp.float32)
    q, k, v = qkv()

    def loss(function):
        return jax.jit(jax.value_and_grad(lambda q, k, v: ((out := function(q, k, v)) * probe).sum() + (out**2).sum(),
                                          (0, 1, 2)))

    def kernel(q, k, v):
        return splash_attend(q, k, v, mask, None, cap, interpret=True)

    allowed, cap = mask.materialize(T, T), 1.5 if case == "causal" else None
    np.testing.assert_allclose(jax.jit(kernel)(q, k, v), reference_attend(q, k, v, allowed=allowed, cap=cap), atol=3e-6)
    plain = loss(lambda q, k, v: attend(q, k, v, mask, implementation="xla", cap=cap))(q, k, v)
    for got, wanted in zip(*map(jax.tree.leaves, (loss(kernel)(q, k, v), plain)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)
    if allowed is not None and not np.broadcast_to(allowed, (B, 1, T, T)).any(-1).all():
        empty = ~np.broadcast_to(allowed, (B, 1, T, T)).any(-1)[:, 0]
        assert (np.asarray(kernel(q, k, v))[empty] == 0).all()


@pytest.mark.parametrize("mesh", [dict(fsdp=2, tensor=2), dict(data=1, tensor=2, sequence=2)], ids=str)
def test_over_a_mesh_each_device_takes_its_rows_heads_and_queries(mesh):
    size = 4
    mask = AttentionMask.causal() & AttentionMask.segments(jnp.asarray(SEGMENTS))
    q, k, v = qkv()
    expected = jax.jit(lambda *x: attend(*x, mask, implementation="xla"))(q, k, v)
    with jax.set_mesh(make_mesh(MeshConfig(**mesh), jax.devices()[:size])):
        compiled = jax.jit(lambda *x: splash_attend(*x, mask, None, interpret=True)).lower(q, k, v).compile()
        np.testing.assert_allclose(compiled(q, k, v), expected, atol=3e-6)


def on_a_tpu(monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: "tpu")


SHAPE = (2, 256, 4, 64)
REASONS = {
    "no bias": dict(bias=LinearBias(alibi_slopes(4))),
    "multiples of 128": dict(q=(2, 250, 4, 64), k=(2, 250, 4, 64)),
    "head dims": dict(q=(2, 256, 4, 40), k=(2, 256, 4, 40)),
    "no dropout": dict(dropout=0.1, key=True),
    "no explicit mask": dict(mask=jnp.ones((256, 256), bool)),
    "after those in a cache": dict(mask=AttentionMask.causal(query_start=3)),
    "precision='highest'": dict(precision="highest"),
    "one pair of segment ids": dict(mask=AttentionMask.segments(jnp.ones((2, 256), int))
                                    & AttentionMask.segments(jnp.ones((2, 256), int))),
    "float16": dict(dtype=jnp.float16),
    "self-attention only": dict(q=(2, 128, 4, 64), mask=AttentionMask.sliding_window(3)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_auto_skips_unsupported_inputs_and_an_explicit_choice_raises(reason, monkeypatch):
    on_a_tpu(monkeypatch)
    wanted = dict(REASONS[reason])
    dtype = wanted.pop("dtype", jnp.float32)
    q, k = (jnp.ones(wanted.pop(name, SHAPE), dtype) for name in "qk")
    if wanted.pop("key", False):
        wanted["key"] = jax.random.key(0)
    with pytest.raises(ValueError, match="implementation='splash' cannot compute this attention.*" + reason):
        attend(q, k, k, implementation="splash", **wanted)
    assert np.isfinite(attend(q, k, k, **wanted)).all()


def test_on_this_platform_it_says_where_it_runs():
    q = jnp.ones(SHAPE)
    with pytest.raises(ValueError, match="runs on a TPU, and this is a CPU"):
        attend(q, q, q, implementation="splash")
    with pytest.raises(ValueError, match="runs on a GPU, and this is a CPU"):
        attend(q, q, q, implementation="cudnn")
