"""Lenses, attributions and gradients against NumPy, finite differences and the logits
themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.inspection.attribution import direct_logit_attribution
from transformer_jax.inspection.lens import (
    input_gradient,
    integrated_gradients,
    logit_lens,
    target_logprobs,
    value_norms,
    value_weighted,
)
from transformer_jax.models.functional import make_model

L, N, T, D, V = 3, 4, 6, 16, 13
BASE = tj.ModelConfig(vocab_size=V, max_len=T, num_layers=L, num_heads=N, model_dim=D, init_std=0.3)
RNG = np.random.default_rng(0)
TOKENS, SOURCE = RNG.integers(0, V, (2, T), np.int32), RNG.integers(0, V, (2, 5), np.int32)
TARGETS = RNG.integers(0, V, (2, T), np.int32)
VARIANTS = {
    "gpt2": {},
    "llama": dict(positions="rope", norm="rmsnorm", use_bias=False, activation="swiglu", num_kv_heads=2,
                  tie_embeddings=False),
    "mup": dict(mup=tj.config.MupConfig(base_dim=4, base_head_dim=2)),
    "post-norm": dict(norm_position="post", positions="alibi", activation="relu"),
    "encoder": dict(family="encoder", norm_position="post", num_token_types=1, use_embedding_norm=True),
    "encoder, pre-norm": dict(family="encoder"),
    "paper": dict(family="encoder_decoder", norm_position="post", positions="sinusoidal", scale_embeddings=True,
                  num_encoder_layers=2),
    "encoder-decoder, pre-norm": dict(family="encoder_decoder", num_encoder_layers=2, positions="relative",
                                      attention_scale=1.0, scale_logits=True, use_output_bias=True),
}


@functools.cache
def make(variant):
    """A model whose biases and norms are random too."""
    rng = np.random.default_rng(1)

    def weight(path, leaf):
        mean = 1.0 if ".scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(rng.normal(mean, 0.3, leaf.shape), leaf.dtype)

    config = BASE.replace(**VARIANTS[variant])
    return jax.tree_util.tree_map_with_path(weight, jax.eval_shape(
        lambda key: make_model(config, key=key), jax.random.key(0)))


def inputs(variant):
    return (SOURCE, TOKENS) if "decoder" in variant or variant == "paper" else (TOKENS,)


@functools.cache
def run(variant):
    return jax.jit(lambda model, tokens: model(*tokens))(make(variant), inputs(variant))


def part_of(trace, kind):
    return trace if isinstance(trace, tj.Trace) else {"self": trace.decoder, "encoder": trace.encoder,
                                                      "cross": trace.cross}[kind]


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parts_of_a_logit_sum_to_it(variant):
    out = run(variant)
    parts = jax.jit(direct_logit_attribution)(make(variant), out.trace, TARGETS)
    logits = np.take_along_axis(np.asarray(out.logits), TARGETS[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(parts.total, logits, rtol=1e-5, atol=1e-4)
    assert parts.heads.shape == (L, 2, T, N) and parts.mlp.shape == (L, 2, T) and parts.embeddings.shape == (2, T)
    assert (parts.cross_heads is None) == (variant not in ("paper", "encoder-decoder, pre-norm"))
    some = direct_logit_attribution(make(variant), out.trace, TARGETS[:, [1, 4]], positions=[1, -2])
    np.testing.assert_allclose(some.heads, parts.heads[:, :, [1, 4]], atol=1e-5)


def test_the_part_of_each_head_by_numpy():
    model, out = make("gpt2"), run("gpt2")
    parts = direct_logit_attribution(model, out.trace, TARGETS)
    row, t, H = 1, 3, D // N
    final = np.asarray(out.trace.final[row, t], np.float64)
    scale = np.asarray(model.final_norm.scale[...], np.float64) / np.sqrt(final.var() + 1e-5)
    unembedding = np.asarray(model.embeddings.token[...], np.float64)[TARGETS[row, t]]

    def part(x):
        x = np.asarray(x, np.float64)
        return ((x - x.mean()) * scale) @ unembedding

    for layer, head in np.ndindex(L, N):
        rows = np.asarray(model.stack.blocks.attention.output.kernel[layer])[head * H : (head + 1) * H]
        wrote = np.asarray(out.trace.layers.head_output[layer, row, t, head]) @ rows
        np.testing.assert_allclose(parts.heads[layer, row, t, head], part(wrote), atol=1e-5)
    np.testing.assert_allclose(parts.mlp[2, row, t], part(out.trace.layers.mlp_output[2, row, t]), atol=1e-5)
    np.testing.assert_allclose(parts.embeddings[row, t], part(out.trace.residual[0, row, t]), atol=1e-5)
    assert np.abs(parts.heads).max() > 0.1


def test_a_part_through_post_norm_by_differences():
    model, out = make("post-norm"), run("post-norm")
    parts = direct_logit_attribution(model, out.trace, TARGETS)
    layer, head, H = 1, 2, D // N
    blocks, trace = model.stack.blocks, out.trace

    def frozen(module, index, was, x):
        was, x = np.asarray(was, np.float64), np.asarray(x, np.float64)
        scale = np.asarray(module.scale[index], np.float64) / np.sqrt(was.var(-1, keepdims=True) + 1e-5)
        return (x - x.mean(-1, keepdims=True)) * scale

    rows = np.asarray(blocks.attention.output.kernel[layer])[head * H : (head + 1) * H]
    wrote = np.asarray(trace.layers.head_output[layer][:, :, head]) @ rows
    for index in range(layer, L):
        entered = np.asarray(trace.residual[index] + trace.layers.attention_output[index], np.float64)
        normed = frozen(blocks.attention_norm, index, entered, entered) + np.asarray(blocks.attention_norm.bias[index])
        wrote = frozen(blocks.attention_norm, index, entered, wrote)
        wrote = frozen(blocks.mlp_norm, index, normed + np.asarray(trace.layers.mlp_output[index]), wrote)
    wanted = (wrote * np.asarray(model.embeddings.token[...])[TARGETS]).sum(-1)
    np.testing.assert_allclose(parts.heads[layer, :, :, head], wanted, atol=2e-5)


@pytest.mark.parametrize("variant", ["gpt2", "encoder", "paper"])
def test_the_last_lens_is_the_prediction(variant):
    model, out = make(variant), run(variant)
    lens = jax.jit(functools.partial(logit_lens, top_k=V))(model, out.trace)
    assert lens.ids.shape == lens.probabilities.shape == (L + 1, 2, T, V)
    wanted = np.asarray(jax.nn.softmax(out.logits))
    np.testing.assert_allclose(np.take_along_axis(wanted, np.asarray(lens.ids[-1]), -1), lens.probabilities[-1],
                               atol=1e-5)
    np.testing.assert_array_equal(lens.ids[-1, ..., 0], wanted.argmax(-1))
    np.testing.assert_allclose(lens.probabilities.sum(-1), 1.0, atol=1e-5)
    chosen = target_logprobs(model, out.trace, TARGETS[:, [0, 2]], positions=[0, 2])
    for layer in range(L + 1):
        by_id = np.zeros((2, T, V))
        np.put_along_axis(by_id, np.asarray(lens.ids[layer]), np.asarray(lens.probabilities[layer]), -1)
        wanted = np.log(np.take_along_axis(by_id[:, [0, 2]], TARGETS[:, [0, 2], None], -1)[..., 0])
        np.testing.assert_allclose(chosen[layer], wanted, atol=1e-4)


def test_an_early_lens_is_the_model_without_later_layers():
    model, out = make("gpt2"), run("gpt2")
    silent = jax.tree.map(lambda leaf: leaf, model)
    for linear in (silent.stack.blocks.attention.output, silent.stack.blocks.mlp.down):
        for parameter in (linear.kernel, linear.bias):
            parameter.set_value(parameter[...].at[2:].set(0.0))
    lens = logit_lens(model, out.trace, positions=-1, top_k=3)
    probabilities = np.asarray(jax.nn.softmax(tj.forward(silent, TOKENS)[:, -1]))
    np.testing.assert_array_equal(lens.ids[2, :, 0], np.argsort(-probabilities)[:, :3])
    np.testing.assert_allclose(lens.probabilities[2, :, 0], -np.sort(-probabilities)[:, :3], atol=1e-5)


@pytest.mark.parametrize("kind", ["self", "encoder", "cross"])
def test_value_weighted_maps_are_norms_of_vectors(kind):
    model, trace = make("paper"), run("paper").trace
    part = part_of(trace, kind)
    maps = part.attention()
    got = np.asarray(value_weighted(maps, jax.jit(functools.partial(value_norms, kind=kind))(model, trace)))
    assert got.shape == maps.shape
    blocks = (model.encoder if kind == "encoder" else model.decoder).blocks
    kernel = np.asarray((blocks.cross_attention if kind == "cross" else blocks.attention).output.kernel[...])
    for layer, head, i, j in ((0, 0, 1, 0), (1, 3, 4, 2), (1, 1, 3, 3)):
        vector = np.asarray(part.values[layer, 1, j, head], np.float64) @ kernel[layer, head * 4 : (head + 1) * 4]
        np.testing.assert_allclose(got[layer, 1, head, i, j], np.linalg.norm(maps[layer, 1, head, i, j] * vector),
                                   rtol=1e-5)


def test_value_norms_of_shared_heads():
    model, trace = make("llama"), run("llama").trace
    kernel = np.asarray(model.stack.blocks.attention.output.kernel[2], np.float64)
    wanted = np.linalg.norm(np.asarray(trace.values[2, 0, :, 1], np.float64) @ kernel[12:16], axis=-1)
    np.testing.assert_allclose(value_norms(model, trace)[2, 0, 3], wanted, rtol=1e-5)


def answer(logits_BTV):
    return logits_BTV[:, -1, 5].sum()


@pytest.mark.parametrize(("variant", "kind"), [("gpt2", "self"), ("encoder", "self"), ("paper", "self"),
                                               ("paper", "encoder")])
@pytest.mark.long
def test_gradients_of_the_input(variant, kind):
    model, tokens = make(variant), inputs(variant)
    got = jax.jit(functools.partial(input_gradient, metric=answer, kind=kind))(model, tokens)
    assert got.shape == tokens[0 if kind == "encoder" else -1].shape
    trace = run(variant).trace
    site = "encoder_residual" if kind == "encoder" else "residual"
    stream = part_of(trace, kind).residual[0]

    @jax.jit
    def moved(row, t, step):  # the embedding of one token a little longer
        def scale(name, layer, value):
            return jnp.where(layer == 0, stream.at[row, t].multiply(1 + step), value) if name == site else value

        return answer(model(*tokens, intervene=scale).logits)

    for row, t in ((0, 0), (1, 3)):
        slope = (moved(row, t, 1e-2) - moved(row, t, -1e-2)) / 2e-2
        np.testing.assert_allclose(got[row, t], slope, rtol=2e-2, atol=2e-3)


@pytest.mark.long
@pytest.mark.parametrize(("variant", "kind"), [("gpt2", "self"), ("paper", "encoder")])
def test_integrated_gradients_add_up(variant, kind):
    model, tokens = make(variant), inputs(variant)
    place = 0 if kind == "encoder" else -1
    got = jax.jit(functools.partial(integrated_gradients, metric=answer, baseline=12, steps=64, kind=kind))(
        model, tokens)
    assert got.shape == tokens[place].shape
    neutral = list(tokens)
    neutral[place] = np.full_like(tokens[place], 12)
    difference = answer(tj.forward(model, *tokens)) - answer(tj.forward(model, *neutral))
    np.testing.assert_allclose(got.sum(), difference, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(got[tokens[place] == 12], 0.0, atol=1e-6)  # where nothing differs
    assert np.abs(got).max() > 1e-2


def test_wrong_arguments_raise_errors_that_say_what_to_pass():
    model, trace = make("gpt2"), run("gpt2").trace
    with pytest.raises(ValueError, match="index 6 is out of range for 6 positions"):
        logit_lens(model, trace, positions=6)
    with pytest.raises(ValueError, match=r"targets_BP has shape \(2, 6\); expected \(2, 1\)"):
        direct_logit_attribution(model, trace, TARGETS, positions=-1)
    with pytest.raises(ValueError, match="kind='cross' has no input tokens of its own"):
        input_gradient(make("paper"), inputs("paper"), answer, kind="cross")
    with pytest.raises(ValueError, match="token id 13 is outside the vocabulary"):
        integrated_gradients(model, TOKENS, answer, baseline=13)
    with pytest.raises(ValueError, match="kind='encoder' is not one of self, the attention of a Decoder"):
        value_norms(model, trace, kind="encoder")
