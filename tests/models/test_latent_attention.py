"""Multi-head latent attention and dense layers among experts: the model of DeepSeek-V3 in plain
NumPy, caches of latents, interventions, decoding, meshes, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_decoder import abstract_decoder, array, linear, norm, random_decoder, rotate

import transformer_jax as tj
from transformer_jax.config import ExpertConfig, LatentConfig, LayerKind, MeshConfig, ModelConfig, RopeLayout
from transformer_jax.inspection.attribution import direct_logit_attribution
from transformer_jax.inspection.interventions import patch
from transformer_jax.settings import from_dict, to_dict
from transformer_jax.sharding import make_mesh, shardings

V, T, N, H, R = 29, 11, 4, 10, 6
LATENT = LatentConfig(10, 12, 3)
MOE = ExpertConfig(8, 2, mlp_dim=12, shared_experts=1, scores="sigmoid", weight_scale=2.5, use_choice_bias=True,
                   groups=4, groups_per_token=2, dense_layers=1)
CONFIG = ModelConfig(
    vocab_size=V, max_len=64, num_layers=3, num_heads=N, model_dim=24, head_dim=H, mlp_dim=40, positions="rope",
    rope_layout=RopeLayout(R, "interleaved"), norm="rmsnorm", activation="swiglu", use_bias=False,
    tie_embeddings=False, attention_scale=0.4, latent=LATENT, moe=MOE)
TOKENS = np.random.default_rng(0).integers(0, V, (2, T), np.int32)
PATTERN = (LayerKind(sliding_window=4), LayerKind(use_experts=False))


@functools.cache
def make():
    return random_decoder(CONFIG)


@jax.jit
def outputs(model, tokens):
    out = model(tokens)
    return out.logits, out.trace


@functools.cache
def whole():
    logits, trace = outputs(make(), TOKENS)
    return logits, trace, np.asarray(trace.attention())


def swiglu(x, gate, up, down):
    return (x @ gate / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down


def rotated(x_TNR):
    """Rotates the pairs of channels 2i and 2i + 1, and puts the first of each pair first."""
    halves = np.concatenate([x_TNR[..., ::2], x_TNR[..., 1::2]], axis=-1)
    return rotate(halves, np.arange(len(x_TNR)), CONFIG.rope_base)


def reference_attention(attention, layer, x):
    """The output of attention and its maps, equations 37 to 47 of DeepSeek-V2."""
    q = linear(attention.query, layer, norm(
        attention.query_latent_norm, layer, linear(attention.query_latent, layer, x), "rmsnorm", 1e-6))
    q = q.reshape(T, N, H)
    q = np.concatenate([q[..., :H - R], rotated(q[..., H - R:])], axis=-1)
    latent = norm(attention.latent_norm, layer, linear(attention.latent, layer, x), "rmsnorm", 1e-6)
    shared = rotated(linear(attention.rotated_key, layer, x)[:, None])
    k = np.concatenate([linear(attention.key, layer, latent).reshape(T, N, H - R), np.repeat(shared, N, 1)], axis=-1)
    v = linear(attention.value, layer, latent).reshape(T, N, 3)
    scores = np.where(np.tri(T, dtype=bool), 0.4 * np.einsum("tnh,snh->nts", q, k), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return linear(attention.output, layer, np.einsum("nts,snv->tnv", weights, v).reshape(T, -1)), weights


def reference_experts(mlp, layer, x):
    """The output of the experts, section 2.1.2 of DeepSeek-V3, token by token."""
    scores = 1 / (1 + np.exp(-linear(mlp.router, layer, x)))
    out = swiglu(x, *(array(part.kernel, layer) for part in (mlp.shared.gate, mlp.shared.up, mlp.shared.down)))
    for t, row in enumerate(scores):
        biased = row + array(mlp.choice_bias, layer)
        best = np.argsort([-np.sort(group)[-2:].sum() for group in biased.reshape(4, 2)])[:2]
        allowed = [expert for expert in range(8) if expert // 2 in best]
        chosen = sorted(allowed, key=lambda expert: -biased[expert])[:2]
        for expert in chosen:
            weight = 2.5 * row[expert] / row[chosen].sum()
            out[t] += weight * swiglu(x[t], *(array(part, layer)[expert] for part in (mlp.gate, mlp.up, mlp.down)))
    return out


def test_the_model_is_that_of_the_papers():
    model, epsilon = make(), CONFIG.norm_epsilon
    dense, experts = model.stack.dense_blocks, model.stack.blocks
    logits, _, maps = whole()
    for row in range(2):
        x = array(model.embeddings.token)[TOKENS[row]]
        for layer in range(3):
            block, index = (dense, 0) if layer == 0 else (experts, layer - 1)
            added, weights = reference_attention(
                block.attention, index, norm(block.attention_norm, index, x, "rmsnorm", epsilon))
            np.testing.assert_allclose(maps[layer, row], weights, atol=1e-5)
            x = x + added
            read = norm(block.mlp_norm, index, x, "rmsnorm", epsilon)
            x = x + (reference_experts(block.mlp, index, read) if layer else swiglu(
                read, *(array(part.kernel, 0) for part in (block.mlp.gate, block.mlp.up, block.mlp.down))))
        expected = norm(model.final_norm, None, x, "rmsnorm", epsilon) @ array(model.embeddings.output).T
        np.testing.assert_allclose(logits[row], expected, atol=1e-4)


@pytest.mark.long
def test_pieces_of_a_text_with_a_cache_of_latents_equal_the_whole():
    """Pieces of few tokens attend to latents, and longer ones to the keys of heads."""
    @jax.jit
    def in_pieces(model, tokens):
        cache, pieces, maps, start = model.start_cache(2, 16), [], [], 0
        for size in sizes:
            out = model(tokens[:, start:start + size], cache=cache)
            cache, start = out.cache, start + size
            pieces.append(out.logits)
            maps.append(out.trace.attention()[..., :T])
        return jnp.concatenate(pieces, 1), jnp.concatenate(maps, 3)

    sizes = (7, 1, 3)
    cache = make().start_cache(2, 16)
    assert [keys.shape for keys in cache.keys] == [(2, 16, 16)] * 3 and cache.values == ()
    assert CONFIG.cached_per_token == 3 * 16
    attention = make().stack.block_of(0).attention
    assert attention.is_short(3) and not attention.is_short(7)
    logits, maps = in_pieces(make(), TOKENS)
    np.testing.assert_allclose(maps, whole()[2], atol=1e-5)
    np.testing.assert_allclose(logits, whole()[0], atol=5e-5)


@pytest.mark.long
@pytest.mark.parametrize("config", [CONFIG, CONFIG.replace(
    moe=dataclasses.replace(MOE, dense_layers=0), layer_pattern=PATTERN)], ids=["dense first", "dense every other"])
def test_generation_and_a_beam_of_one_write_the_tokens_of_the_whole_text(config):
    model, options = random_decoder(config), dict(max_new_tokens=12, end_ids=[])
    prompts = [TOKENS[0, :3].tolist(), TOKENS[1, :9].tolist()]
    found = tj.generate(model, prompts, sampling=tj.Sampling(temperature=0), **options)
    for prompt, new in zip(prompts, found.tokens, strict=True):
        text = np.zeros((1, 32), np.int32)
        text[0, :len(prompt) + 12] = [*prompt, *new]
        best = np.asarray(tj.forward(model, text))[0].argmax(-1)
        assert best[len(prompt) - 1:len(prompt) + 11].tolist() == new
    assert tj.beam_search(model, prompts, beam_size=1, **options).tokens == found.tokens


@pytest.mark.long
def test_interventions_change_the_keys_of_heads_in_a_cache():
    """They are applied to the keys of all slots, because a cache holds only latents."""
    def without_head(site, layer, value):
        return value.at[:, :, 2].set(0.0) if site == "keys" else value

    @jax.jit
    def last_row(model):
        cache = model.step(TOKENS[:, :T - 1], model.start_cache(2, 16), intervene=without_head).cache
        out = model.step(TOKENS[:, T - 1:], cache, intervene=without_head)
        return out.logits[:, -1], out.trace.attention(layers=1)[..., :T]

    expected = jax.jit(lambda model: model(TOKENS, intervene=without_head).logits)(make())
    logits, maps = last_row(make())
    np.testing.assert_allclose(logits, expected[:, -1], atol=5e-5)
    np.testing.assert_allclose(maps[:, 2, 0], 1 / T, atol=1e-6)
    assert np.abs(expected - whole()[0]).max() > 0.1


def test_the_trace_says_which_layers_have_experts():
    trace = whole()[1]
    assert trace["router_logits"].shape == (2, 2, T, 8) and trace["neurons"].shape == (1, 2, T, 40)
    np.testing.assert_array_equal(trace["layers.2.experts"], trace["experts"][1])
    np.testing.assert_array_equal(trace["layers.-1.experts"], trace["experts"][1])
    names = trace.names()
    assert "layers.0.neurons" in names and "layers.1.experts" in names
    assert "layers.0.experts" not in names and "layers.1.neurons" not in names
    with pytest.raises(KeyError, match="no value named 'layers.0.experts'"):
        trace["layers.0.experts"]
    assert "layers.1..2.experts" in repr(trace) and "layers.0.neurons" in repr(trace)


@pytest.mark.parametrize(("site", "layer", "words"), [
    ("router_logits", 0, "layer 0 has no site 'router_logits', because it has a dense feed-forward layer; .* are 1, 2"),
    ("neurons", [0, 2], "layer 2 has no site 'neurons', because it has a mixture of experts; .* site are 0"),
])
def test_an_edit_of_a_site_that_a_layer_does_not_have_is_refused(site, layer, words):
    with pytest.raises(ValueError, match=words):
        tj.forward(make(), TOKENS, intervene=patch(site, layer, 0.0))


@pytest.mark.long
def test_outputs_add_up_to_the_logits():
    logits, trace, _ = whole()
    targets = np.random.default_rng(1).integers(0, V, (2, T))
    found = direct_logit_attribution(make(), trace, targets)
    np.testing.assert_allclose(found.total, np.take_along_axis(np.asarray(logits), targets[..., None], -1)[..., 0],
                               atol=1e-4)


@pytest.mark.long
def test_a_mesh_computes_the_same():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    where = shardings(make(), mesh).stack.blocks
    assert tuple(where.attention.key.kernel.get_raw_value().spec) == (None, "fsdp", "tensor")
    assert tuple(where.attention.latent.kernel.get_raw_value().spec) == (None, "fsdp", None)
    with jax.set_mesh(mesh):
        logits = tj.forward(jax.device_put(make(), shardings(make(), mesh)), np.repeat(TOKENS, 2, axis=0))
    np.testing.assert_allclose(logits[::2], whole()[0], atol=5e-5)


def test_the_compiled_program_does_not_grow_with_depth():
    def products(config):
        return str(jax.make_jaxpr(lambda model: model(TOKENS).logits)(abstract_decoder(config))).count("dot_general")

    assert products(CONFIG.replace(num_layers=4)) == products(CONFIG.replace(num_layers=40))
    alternating = CONFIG.replace(moe=dataclasses.replace(MOE, dense_layers=0), layer_pattern=PATTERN)
    assert products(alternating.replace(num_layers=4)) == products(alternating.replace(num_layers=40))


def test_saved_and_loaded(tmp_path):
    tj.save(tmp_path, tj.Bundle(make(), None, CONFIG))
    bundle = tj.load(tmp_path)
    assert bundle.config == CONFIG == from_dict(ModelConfig, to_dict(CONFIG))
    jax.tree.map(np.testing.assert_array_equal, bundle.model, make())


@pytest.mark.parametrize(("changes", "words"), [
    (dict(rope_layout=RopeLayout()), "latent needs positions='rope' and the width of the rotated key"),
    (dict(positions="alibi", rope_layout=RopeLayout()), "latent needs positions='rope'.*got positions='alibi'"),
    (dict(num_kv_heads=2), "latent gives every head its own keys: num_kv_heads=2 must be num_heads=4"),
    (dict(use_qk_norm=True), "latent cannot be combined with use_qk_norm or limits.projections"),
    (dict(layer_pattern=(LayerKind(use_rope=False), LayerKind())), "latent needs rotary positions in every layer"),
    (dict(latent=LatentConfig(), family="encoder", moe=None), "latent is for family='decoder' and 'reward'"),
    (dict(num_layers=1), "no layer has experts: moe.dense_layers=1 must be below num_layers=1"),
    (dict(layer_pattern=PATTERN), "moe.dense_layers=1 and a LayerKind with use_experts=False both say which"),
    (dict(layer_pattern=PATTERN, moe=None), "has no experts, but neither has the model: moe is None"),
])
def test_what_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        CONFIG.replace(**changes)
