"""Layers that differ by a pattern: masks, caches that hold only a window, decoding, compiled
size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_decoder import abstract_decoder, random_decoder

import transformer_jax as tj
from transformer_jax.config import LayerKind, Limits, MeshConfig, ModelConfig
from transformer_jax.inspection.attribution import direct_logit_attribution
from transformer_jax.inspection.interventions import patch
from transformer_jax.settings import from_dict, to_dict
from transformer_jax.sharding import make_mesh, shardings

V, T = 17, 14
PATTERN = (LayerKind(sliding_window=4), LayerKind(sliding_window=3, rope_base=100.0), LayerKind(use_rope=False))
WINDOWS = (4, 3, None, 4, 3)
CONFIG = ModelConfig(
    vocab_size=V, max_len=32, num_layers=5, num_heads=4, num_kv_heads=2, model_dim=16, mlp_dim=24, positions="rope",
    norm="rmsnorm_one_plus", norm_position="both", use_bias=False, use_qk_norm=True, layer_pattern=PATTERN,
    limits=Limits(scores=2.0, logits=3.0))
TOKENS = np.random.default_rng(0).integers(0, V, (2, T), np.int32)


@functools.cache
def make():
    return random_decoder(CONFIG)


@functools.cache
def whole():
    out = jax.jit(lambda model, tokens: model(tokens))(make(), TOKENS)
    return out, np.asarray(out.trace.attention())


def test_each_layer_attends_within_its_window():
    maps = whole()[1]
    distances = np.arange(T)[:, None] - np.arange(T)
    for layer, window in enumerate(WINDOWS):
        allowed = (distances >= 0) & (distances < (window or T))
        assert (maps[layer][..., ~allowed] == 0).all() and (maps[layer][..., allowed] > 0).all()
    np.testing.assert_allclose(maps.sum(-1), 1.0, atol=1e-5)


def test_maps_are_those_of_the_capped_scores():
    trace, scores = whole()[0].trace, np.asarray(whole()[0].trace.scores(layers=2))
    queries, keys = (np.asarray(x[2], np.float64) for x in (trace.queries, trace.keys))
    plain = np.einsum("btnh,bsnh->bnts", queries, np.repeat(keys, 2, axis=2)) / np.sqrt(queries.shape[-1])
    seen = np.isfinite(scores)
    assert np.abs(plain).max() > 2
    np.testing.assert_allclose(scores[seen], (2 * np.tanh(plain / 2))[seen], atol=1e-5)


def test_layers_without_rotation_have_the_queries_of_their_projection():
    trace, blocks = whole()[0].trace, make().stack.blocks
    for layer, rotates in ((0, True), (2, False)):
        block = jax.tree.map(lambda leaf: leaf[layer], blocks)  # noqa: B023
        plain = block.attention._heads(block.attention.query, block.attention_norm(trace.residual[layer]))
        same = np.allclose(trace.queries[layer], block.attention.query_norm(plain), atol=1e-5)
        assert same is not rotates


@pytest.mark.long
def test_pieces_of_a_text_with_caches_of_a_window_equal_the_whole():
    @jax.jit
    def step(model, tokens, cache):
        out = model(tokens, cache=cache)
        return out.logits, out.cache, out.trace.attention()

    out, maps = whole()
    cache, pieces, start = make().start_cache(2, 16), [], 0
    assert [keys.shape[1] for keys in cache.keys] == [4, 3, 16, 4, 3] == [values.shape[1] for values in cache.values]
    for size in (6, 1, 1, 3, 3):
        logits, cache, found = step(make(), TOKENS[:, start:start + size], cache)
        np.testing.assert_allclose(found[..., :T], maps[:, :, :, start:start + size], atol=1e-5)
        pieces.append(logits)
        start += size
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), out.logits, atol=2e-5)


def test_the_cache_of_32k_tokens_of_gemma_3_is_that_of_its_windows():
    config = tj.presets.get("gemma-3-1b")
    shapes, everything = (jax.eval_shape(functools.partial(
        tj.KVCache.empty, config, 1, 32_768, keeps_all=keeps_all)) for keeps_all in (False, True))
    assert [keys.shape[1] for keys in shapes.keys] == [32_768 if (layer + 1) % 6 == 0 else 512 for layer in range(26)]
    sizes = [sum(array.size for array in (*cache.keys, *cache.values)) for cache in (shapes, everything)]
    assert sizes[0] == 2 * 256 * (4 * 32_768 + 22 * 512) and sizes[1] == 2 * 256 * 26 * 32_768


def test_the_compiled_step_of_32k_tokens_needs_the_memory_of_the_windows():
    """A step of decoding gets its cache in place, and computes with no array of 32k tokens for a
    layer with a window."""
    length, window = 32_768, 512
    config = ModelConfig(vocab_size=64, max_len=length, num_layers=6, num_heads=2, model_dim=64, positions="rope",
                            layer_pattern=(LayerKind(window),) * 5 + (LayerKind(),))

    @functools.partial(jax.jit, donate_argnums=2)
    def step(model, tokens, cache):
        out = model.step(tokens, cache)
        return out.logits, out.cache

    model = jax.eval_shape(lambda: tj.Decoder(config, key=jax.random.key(0)))
    cache = jax.eval_shape(functools.partial(tj.KVCache.empty, config, 1, length))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    memory = step.lower(model, token, cache).compile().memory_analysis()
    in_cache = 4 * 2 * 64 * (length + 5 * window)
    with_all_tokens = 4 * 2 * 64 * 6 * length
    assert in_cache <= memory.alias_size_in_bytes < 1.1 * in_cache
    weights = 4 * tj.count_parameters(config)
    assert memory.argument_size_in_bytes < 1.1 * in_cache + weights
    assert memory.temp_size_in_bytes < 1.1 * in_cache  # XLA on a CPU may copy the one layer that keeps all tokens
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < with_all_tokens / 2


@pytest.mark.long
def test_generation_and_a_beam_of_one_write_the_tokens_of_the_whole_text():
    prompts = [TOKENS[0, :3].tolist(), TOKENS[1, :9].tolist()]
    options = dict(max_new_tokens=12, end_ids=[])
    found = tj.generate(make(), prompts, sampling=tj.Sampling(temperature=0), **options)
    for prompt, new in zip(prompts, found.tokens, strict=True):
        text = np.zeros((1, 32), np.int32)  # causal: what follows the text does not matter
        text[0, :len(prompt) + 12] = [*prompt, *new]
        best = np.asarray(tj.forward(make(), text))[0].argmax(-1)
        assert best[len(prompt) - 1:len(prompt) + 11].tolist() == new
    assert tj.beam_search(make(), prompts, beam_size=1, **options).tokens == found.tokens


@pytest.mark.long
def test_interventions_on_the_bias_see_all_slots_of_a_cache():
    def forbid(site, layer, value):
        return value.at[..., 1].set(-jnp.inf) if site == "attention_bias" else value

    expected = tj.trace(make(), TOKENS[:, :4], intervene=forbid).attention(queries=[-1])
    assert not np.allclose(expected, whole()[1][:, :, :, 3:4, :4])
    @jax.jit
    def last_maps(model):
        cache = model.step(TOKENS[:, :3], model.start_cache(2, 8), intervene=forbid).cache
        return model.step(TOKENS[:, 3:4], cache, intervene=forbid).trace.attention()

    found = last_maps(make())
    np.testing.assert_allclose(found[..., :4], expected, atol=1e-5)


def test_selected_slots_need_a_cache_of_all_tokens():
    visible, positions = jnp.ones((2, 1, 16), bool), jnp.zeros((2, 1), int)
    with pytest.raises(ValueError, match=r"keeps only its window; make the cache with .*keeps_all=True"):
        make().step(TOKENS[:, :1], make().start_cache(2, 16), visible_BTS=visible, positions_BT=positions)


def test_outputs_add_up_to_the_stream_and_to_the_logits():
    layers = whole()[0].trace.layers
    np.testing.assert_allclose(layers.residual[0] + layers.attention_output[0] + layers.mlp_output[0],
                               layers.residual[1], atol=2e-5)
    targets = np.random.default_rng(1).integers(0, V, (2, T))
    found = direct_logit_attribution(make(), whole()[0].trace, targets)
    logits = np.take_along_axis(np.asarray(whole()[0].logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(3 * np.tanh(np.asarray(found.total) / 3), logits, atol=1e-4)
    changed = tj.trace(make(), TOKENS, intervene=patch("attention_output", 1, 0.0)).layers
    assert float(jnp.abs(changed.attention_output[1]).max()) == 0.0


def test_the_compiled_program_does_not_grow_with_depth():
    def products(num_layers):
        model = abstract_decoder(CONFIG.replace(num_layers=num_layers))
        return str(jax.make_jaxpr(lambda model: model(TOKENS).logits)(model)).count("dot_general")

    assert products(3) == products(6) == products(48) > products(2)


def test_a_mesh_computes_the_same():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        logits = tj.forward(jax.device_put(make(), shardings(make(), mesh)), TOKENS)
    np.testing.assert_allclose(logits, whole()[0].logits, atol=2e-5)


def test_saved_and_loaded(tmp_path):
    tj.save(tmp_path, tj.Bundle(make(), None, CONFIG))
    bundle = tj.load(tmp_path)
    assert bundle.config == CONFIG == from_dict(ModelConfig, to_dict(CONFIG))
    jax.tree.map(np.testing.assert_array_equal, bundle.model, make())


@pytest.mark.parametrize(("changes", "words"), [
    (dict(sliding_window=4), "sliding_window=4 is for models whose layers are alike; with a layer_pattern, give each"),
    (dict(positions="alibi"), "sets rotary positions, but the model has positions='alibi', not 'rope'"),
    (dict(layer_pattern=(LayerKind(use_rope=False, rope_base=5.0),)), "does not rotate, so it has no rope_base"),
    (dict(layer_pattern=("local",)), "layer_pattern has an entry 'local'; expected entries of transformer_jax.config"),
    (dict(norm_position="output", residual="parallel"), "residual='parallel' needs norm_position='pre'"),
    (dict(use_qk_norm=False, qk_norm_width="all"), "qk_norm_width='all' needs use_qk_norm=True"),
    (dict(family="encoder"), "limits.logits is for models that predict the next token, not for family='encoder'"),
    (dict(family="encoder_decoder"), "norm_position='both' is for families without cross-attention"),
])
def test_what_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        CONFIG.replace(**changes)
