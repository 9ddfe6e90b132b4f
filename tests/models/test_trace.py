"""Attention on demand against a plain NumPy forward, and interventions against edited weights."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_decoder
from reference_decoder import abstract_decoder, random_decoder

import transformer_jax as tj
from transformer_jax.ops import AttentionMask

BASE = tj.ModelConfig(vocab_size=17, max_len=12, num_layers=3, num_heads=4, model_dim=16)
VARIANTS = {
    "gpt2": {},
    "grouped queries": dict(num_kv_heads=2, positions="rope", use_qk_norm=True),
    "alibi": dict(positions="alibi", norm_position="post", num_kv_heads=2),
    "sliding window": dict(sliding_window=3, positions="none"),
}
TOKENS = jax.random.randint(jax.random.key(5), (2, 9), 0, BASE.vocab_size)
L, N, T = 3, 4, 9


@functools.cache
def make(variant="gpt2"):
    return random_decoder(BASE.replace(**VARIANTS[variant]))


@functools.cache
def traced(variant="gpt2"):
    return tj.trace(make(variant), TOKENS)


@functools.cache
def expected(variant="gpt2"):
    """``[L, B, N, T, S]`` in float64."""
    return np.stack([reference_decoder.run(make(variant), row)[1] for row in np.asarray(TOKENS)], axis=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_equal_plain_numpy(variant):
    maps = traced(variant).attention()
    assert maps.dtype == jnp.float32 and maps.shape == (L, 2, N, T, T)
    np.testing.assert_allclose(maps, expected(variant), atol=3e-6)
    np.testing.assert_allclose(maps.sum(-1), 1.0, atol=1e-6)


@pytest.mark.parametrize("wanted", [
    dict(layers=1), dict(layers=-1), dict(heads=3), dict(heads=-4), dict(queries=-1), dict(queries=0),
    dict(layers=[2, 0]), dict(heads=[3, -4, 3]), dict(queries=[-1, 4]), dict(layers=np.array([1, 1])),
    dict(layers=2, heads=1, queries=5), dict(layers=[0, -1], heads=[1], queries=[-1]), dict(layers=0, queries=range(3)),
    dict(layers=np.int64(1), heads=jnp.int32(-1)), dict(heads=jnp.asarray([2]), queries=np.arange(4)),
], ids=str)
def test_only_the_requested_maps_are_computed(wanted):
    rows = expected("alibi")
    for axis, name in ((3, "queries"), (2, "heads"), (0, "layers")):
        if name in wanted:
            rows = np.take(rows, np.asarray(wanted[name]), axis=axis)
    maps = traced("alibi").attention(**wanted)
    assert maps.shape == rows.shape
    np.testing.assert_allclose(maps, rows, atol=3e-6)


def test_the_indices_may_be_traced():
    select = jax.jit(lambda trace, layer, rows: trace.attention(layers=layer, queries=rows))
    for layer, rows in ((1, [0, -1]), (-1, [3, 4])):
        np.testing.assert_allclose(select(traced(), layer, jnp.asarray(rows)), expected()[layer][:, :, rows], atol=3e-6)


@pytest.mark.parametrize("wanted", [dict(layers=3), dict(layers=-4), dict(heads=[0, 4]), dict(queries=9),
                                    dict(queries=[-10])], ids=str)
def test_indices_out_of_range_are_refused(wanted):
    (name, value), = wanted.items()
    bad = value if isinstance(value, int) else value[-1]
    size = {"layers": L, "heads": N, "queries": T}[name]
    with pytest.raises(ValueError, match=f"index {bad} is out of range for {size} {name}"):
        traced().attention(**wanted)


def test_maps_of_packed_and_padded_rows():
    segments = np.array([[0, 1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0]])
    maps = np.asarray(tj.trace(make(), TOKENS, segment_ids_BT=jnp.asarray(segments)).attention())
    wanted = np.zeros_like(maps)
    for row, start, end in ((0, 1, 4), (0, 4, 8), (1, 0, 5)):
        wanted[:, row, :, start:end, start:end] = reference_decoder.run(make(), np.asarray(TOKENS[row, start:end]))[1]
    np.testing.assert_allclose(maps, wanted, atol=3e-6)  # a padding row attends to nothing: it is zero


def test_maps_with_a_mask_of_each_head():
    allowed = np.random.default_rng(0).random((2, N, T, T)) < 0.7
    trace = traced()
    cut = tj.Trace(layers=trace.layers, final=trace.final, bias=None,
                   mask=trace.mask & AttentionMask.explicit(jnp.asarray(allowed)))
    wanted = expected() * allowed
    wanted /= np.maximum(wanted.sum(-1, keepdims=True), 1e-300)
    np.testing.assert_allclose(cut.attention(heads=[2, 0], queries=[3, 8]), wanted[:, :, [2, 0]][:, :, :, [3, 8]],
                               atol=5e-6)


def test_one_row_computes_no_square():
    model, length = make(), 12
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    shapes = jax.eval_shape(lambda tokens: model(tokens).trace, tokens)

    def squares(function):
        text = jax.jit(function).lower(shapes).compile().as_text()
        return re.findall(rf"\[[\d,]*{length},{length}\]", text)

    assert squares(lambda trace: trace.attention())
    assert not squares(lambda trace: trace.attention(layers=1, heads=2, queries=-1))
    assert not squares(lambda trace: trace.attention(queries=[3, 5]))
    assert all(length not in leaf.shape[-2:] or leaf.shape[-2:].count(length) == 1 for leaf in jax.tree.leaves(shapes))


def test_the_trace_is_linear_in_the_length():
    def size(length):
        shapes = jax.eval_shape(lambda model, tokens: model(tokens).trace, abstract_decoder(BASE.replace(max_len=4096)),
                                jax.ShapeDtypeStruct((1, length), jnp.int32))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert size(4096) == 64 * size(64)


def test_residual_stream_adds_up():
    out = jax.jit(lambda model: model(TOKENS))(make())
    trace = out.trace
    assert trace.residual.shape == (L + 1, 2, T, 16)
    np.testing.assert_allclose(trace.residual[1:] - trace.residual[:-1],
                               trace.layers.attention_output + trace.layers.mlp_output, atol=2e-5)
    model = make()
    np.testing.assert_allclose(model.embeddings.unembed(model.final_norm(trace.residual[-1])), out.logits, atol=2e-5)
    mixed = np.einsum("lbnts,lbsnh->lbtnh", expected(), np.asarray(trace.values, np.float64))
    np.testing.assert_allclose(trace.layers.head_output, mixed, atol=2e-5)


@functools.partial(jax.jit, static_argnums=1)
def run(model, intervene=None):
    return model(TOKENS, intervene=intervene)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_identity_changes_nothing(variant):
    sites = []

    def identity(site, layer, value):
        sites.append(site)
        return value

    out, plain = run(make(variant), identity), run(make(variant))
    assert sites == ["residual", "queries", "keys", "values", "attention_bias", "head_output", "attention_output",
                    "residual_middle", "mlp_input", "neurons", "mlp_output", "final"]
    np.testing.assert_allclose(out.logits, plain.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.trace.attention(), expected(variant), atol=3e-6)


def zeroed(model, layer, head):
    """The same model, with the rows of the output projection that read one head set to zero."""
    H = model.config.head_dim
    copy = jax.tree.map(lambda leaf: leaf, model)
    kernel = copy.stack.blocks.attention.output.kernel
    kernel.set_value(kernel[...].at[layer, head * H : (head + 1) * H].set(0.0))
    return copy


@pytest.mark.parametrize("variant", ["gpt2", "grouped queries"])
def test_a_silenced_head_is_one_with_no_output_rows(variant):
    def silence(site, layer, value):
        return jnp.where(layer == 1, value.at[:, :, 2].set(0.0), value) if site == "head_output" else value

    edited = zeroed(make(variant), layer=1, head=2)
    expected_logits = np.stack([reference_decoder.run(edited, row)[0] for row in np.asarray(TOKENS)])
    out = run(make(variant), silence)
    np.testing.assert_allclose(out.logits, expected_logits, atol=1e-5 * np.abs(expected_logits).max())
    assert not np.allclose(out.logits, run(make(variant)).logits, atol=1e-2)


def test_every_site_reaches_what_comes_after_it():
    sites = ("residual", "queries", "keys", "values", "attention_bias", "head_output", "attention_output",
             "residual_middle", "mlp_input", "neurons", "mlp_output")

    @jax.jit
    def moved(strengths):
        def move(site, layer, value):
            if site == "final":  # only the logits are computed after it
                return value
            noise = np.random.default_rng(0).normal(size=value.shape).astype(np.float32)
            return value + jnp.where(layer == 1, strengths[sites.index(site)], 0.0) * noise

        return make()(TOKENS, intervene=move)

    plain = run(make())
    for site, strengths in zip(sites, jnp.eye(len(sites)), strict=True):
        out = moved(strengths)
        np.testing.assert_allclose(out.trace.residual[:1], plain.trace.residual[:1], atol=1e-5)
        assert np.abs(out.trace.residual[2] - plain.trace.residual[2]).max() > 1e-2, site
        assert np.abs(out.logits - plain.logits).max() > 1e-2, site


def test_patching_the_residual_stream_takes_over():
    other = tj.trace(make(), (TOKENS + 1) % 17)

    def patch(site, layer, value):
        return jnp.where(layer == 2, other.residual[2], value) if site == "residual" else value

    np.testing.assert_allclose(run(make(), patch).logits, tj.forward(make(), (TOKENS + 1) % 17), atol=1e-4)


@pytest.mark.parametrize("variant", ["gpt2", "alibi"])
def test_knocked_out_edges_carry_nothing(variant):
    def knock_out(site, layer, value):
        return jnp.where(layer == 1, value.at[:, 2, 6, 4].set(-jnp.inf), value) if site == "attention_bias" else value

    plain, out = run(make(variant)), run(make(variant), knock_out)
    maps = np.asarray(out.trace.attention())
    wanted = expected(variant)[1].copy()
    wanted[:, 2, 6, 4] = 0.0
    wanted[:, 2, 6] /= wanted[:, 2, 6].sum(-1, keepdims=True)
    np.testing.assert_allclose(maps[1], wanted, atol=3e-6)
    np.testing.assert_allclose(maps[0], expected(variant)[0], atol=3e-6)
    np.testing.assert_allclose(out.logits[:, :6], plain.logits[:, :6], rtol=1e-5, atol=1e-5)
    assert np.abs(out.logits[:, 6] - plain.logits[:, 6]).max() > 1e-3


def test_a_head_with_every_edge_knocked_out_is_silent():
    def knock_out(site, layer, value):
        return jnp.where(layer == 1, value.at[:, 2].set(-jnp.inf), value) if site == "attention_bias" else value

    out = run(make(), knock_out)
    edited = zeroed(make(), layer=1, head=2)
    np.testing.assert_allclose(out.logits, tj.forward(edited, TOKENS), atol=2e-5)
    assert (out.trace.attention(layers=1, heads=2) == 0.0).all()


def test_an_intervention_has_gradients():
    def loss(strength):
        def scale(site, layer, value):
            chosen = site == "head_output"
            return jnp.where(layer == 1, value.at[:, :, 2].multiply(strength), value) if chosen else value

        return make()(TOKENS, intervene=scale).logits[0, -1, 3]

    slope = jax.jit(jax.grad(loss))(1.0)
    logits = jax.jit(jax.vmap(loss))(jnp.asarray([1.01, 0.99]))
    np.testing.assert_allclose(slope, (logits[0] - logits[1]) / 0.02, rtol=1e-2)
