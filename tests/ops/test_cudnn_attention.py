"""cuDNN's kernel: the program that is lowered for CUDA on any machine, and its results where there
is a GPU."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import reference_attend

from transformer_jax.config import MeshConfig
from transformer_jax.ops import AttentionMask, LinearBias, alibi_slopes, attend, attention
from transformer_jax.ops.cudnn_attention import why_not_cudnn
from transformer_jax.sharding import make_mesh

B, T, N, K, H = 2, 64, 4, 2, 32
SEGMENTS = np.sort(np.random.default_rng(3).integers(0, 4, (B, T)), axis=1)
# The mask, the bias, and the arguments of the kernel.
CASES = {
    "causal": (lambda: AttentionMask.causal(), None, "CAUSAL"),
    "everything": (lambda: None, None, "NO_MASK"),
    "causal window": (lambda: AttentionMask.causal() & AttentionMask.sliding_window(9), None, "CAUSAL"),
    "lengths": (lambda: AttentionMask.lengths(jnp.asarray([40, 0])), None, "PADDING"),
    "causal lengths": (lambda: AttentionMask.causal() & AttentionMask.lengths(jnp.asarray([40, 3])), None,
                       "PADDING_CAUSAL"),
    "segments": (lambda: AttentionMask.causal() & AttentionMask.segments(jnp.asarray(SEGMENTS)), None, "CAUSAL"),
    "alibi": (lambda: AttentionMask.causal(), LinearBias(alibi_slopes(N)), "CAUSAL"),
    "bias of -inf": (lambda: None, jnp.where(np.random.default_rng(0).random((T, T)) < 0.5, 1.0, -jnp.inf), "NO_MASK"),
}


def qkv(dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, T, heads, H)), dtype) for heads in (N, K, K))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Replaces the version check of cuDNN, which runs while tracing. The program itself is not
    run."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions",
                        types.SimpleNamespace(cudnn_get_version=lambda: 91200))
    monkeypatch.setattr(attention, "platform", lambda: "gpu")


@pytest.mark.parametrize("case", CASES)
def test_the_program_for_cuda_holds_the_kernel_forward_and_backward(case, on_a_gpu):
    make_mask, bias, told = CASES[case]

    def loss(q, k, v, bias):
        return attend(q, k, v, make_mask(), bias=bias).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2), allow_int=True)).trace(*qkv(), bias).lower(
        lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__cudnn$fmha") == 2
    assert f'"mask_type": "{told}"' in text.replace("\\22", '"')
    assert ("ScaleBiasSoftmax" in text) == (case in ("segments", "alibi", "bias of -inf"))


REASONS = {
    "not queries of float32": dict(dtype=jnp.float32),
    "head dim that is a multiple of 8": dict(head_dim=36),
    "after those in a cache": dict(mask=AttentionMask.causal(query_start=3)),
    "only together with a causal mask": dict(mask=AttentionMask.sliding_window(3)),
    "even lengths": dict(length=63, bias=jnp.ones((63, 63))),
    "is too large": dict(length=8192, mask=AttentionMask.segments(jnp.ones((B, 8192), int))),
}


@pytest.mark.parametrize("reason", REASONS)
def test_unsupported_inputs_raise_with_the_reason(reason):
    asked = REASONS[reason]
    x = jax.ShapeDtypeStruct((B, asked.get("length", T), N, asked.get("head_dim", H)),
                             asked.get("dtype", jnp.bfloat16))
    assert reason in why_not_cudnn(x, x, asked.get("mask"), asked.get("bias"))


def test_queries_divided_over_a_mesh_are_not_for_it():
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)
    with jax.set_mesh(make_mesh(MeshConfig(sequence=2), jax.devices()[:2])):
        assert "on a mesh" in why_not_cudnn(x, x, None, None)
    with jax.set_mesh(make_mesh(MeshConfig(tensor=2), jax.devices()[:2])):
        assert why_not_cudnn(x, x, None, None) is None


def test_auto_skips_unsupported_inputs(on_a_gpu):
    q, k, v = qkv(jnp.float32)
    assert np.isfinite(attend(q, k, v)).all()
    q, k, v = qkv()
    assert np.isfinite(attend(q, k, v, dropout=0.5, key=jax.random.key(0)).astype(jnp.float32)).all()
    with pytest.raises(ValueError, match="no dropout"):
        attend(q, k, v, dropout=0.5, key=jax.random.key(0), implementation="cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula_on_a_gpu(case):
    make_mask, bias, _ = CASES[case]
    mask, (q, k, v) = make_mask(), qkv()
    allowed = None if mask is None else mask.materialize(T, T)
    array = bias if bias is None or isinstance(bias, jax.Array) else bias.materialize(T, T)
    expected = reference_attend(*(x.astype(jnp.float32) for x in (q, k, v)), allowed=allowed, bias=array)

    def loss(implementation):
        def squared(q, k, v):
            out = attend(q, k, v, mask, bias=bias, implementation=implementation)
            return (out.astype(jnp.float32) ** 2).sum()

        return jax.jit(jax.value_and_grad(squared, (0, 1, 2)))

    out = attend(q, k, v, mask, bias=bias, implementation="cudnn")
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)
    for got, wanted in zip(*(jax.tree.leaves(loss(name)(q, k, v)) for name in ("cudnn", "xla")), strict=True):
        got, wanted = (np.asarray(x, np.float32) for x in (got, wanted))
        assert np.abs(got - wanted).max() < 0.03 * max(np.abs(wanted).max(), 1)
