"""Blocks whose attention and feed-forward layer read the same stream: what inspection, caches and
meshes see of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from reference_decoder import random_decoder

import transformer_jax as tj
from transformer_jax.config import MeshConfig, RopeLayout
from transformer_jax.inspection.attribution import direct_logit_attribution
from transformer_jax.inspection.interventions import patch
from transformer_jax.sharding import make_mesh, shardings

L, T, V = 2, 8, 16
CONFIG = tj.ModelConfig(
    vocab_size=V, max_len=16, num_layers=L, num_heads=4, model_dim=16, positions="rope", tie_embeddings=False,
    rope_layout=RopeLayout(2, "interleaved"), residual="parallel_shared", norm="layernorm_without_weights")
TOKENS = np.random.default_rng(0).integers(0, V, (2, T), np.int32)


@functools.cache
def make():
    return random_decoder(CONFIG)


@functools.cache
def traced():
    return tj.trace(make(), TOKENS)


def test_each_layer_adds_both_outputs_to_the_stream():
    layers = traced().layers
    stream = np.asarray(layers.residual[0]) + layers.attention_output[0] + layers.mlp_output[0]
    np.testing.assert_allclose(layers.residual[1], stream, atol=2e-5)
    assert make().stack.blocks.mlp_norm is None and make().final_norm.scale is None


def test_the_feed_forward_layer_does_not_see_the_attention_of_its_layer():
    change = patch("attention_output", 0, 0.0)
    changed, before = tj.trace(make(), TOKENS, intervene=change).layers, traced().layers
    assert float(jnp.abs(changed.attention_output[0]).max()) == 0.0
    np.testing.assert_array_equal(changed.mlp_output[0], before.mlp_output[0])
    assert float(jnp.abs(changed.mlp_output[1] - before.mlp_output[1]).max()) > 0.01


def test_contributions_add_up_to_the_logit():
    targets = np.random.default_rng(1).integers(0, V, (2, T))
    found = direct_logit_attribution(make(), traced(), targets)
    logits = np.take_along_axis(np.asarray(tj.forward(make(), TOKENS)), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.total, logits, atol=1e-4)


def test_the_cache_gives_the_tokens_of_the_whole_text():
    prompts = [TOKENS[0, :5].tolist(), TOKENS[1, :3].tolist()]
    greedy = tj.Sampling(temperature=0)
    found = tj.generate(make(), prompts, max_new_tokens=4, end_ids=[], sampling=greedy)
    for prompt, new in zip(prompts, found.tokens, strict=True):
        text = np.zeros((2, T + 1), np.int32)  # causal: what follows the text does not matter
        text[0, :len(prompt) + 4] = [*prompt, *new]
        best = np.asarray(tj.forward(make(), text))[0].argmax(-1)
        assert best[len(prompt) - 1:len(prompt) + 3].tolist() == new


def test_a_mesh_computes_the_same():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        model = jax.device_put(make(), shardings(make(), mesh))
        logits = tj.forward(model, TOKENS)
    np.testing.assert_allclose(logits, tj.forward(make(), TOKENS), atol=2e-5)


def test_saved_and_loaded(tmp_path):
    tj.save(tmp_path, tj.Bundle(make(), None, CONFIG))
    bundle = tj.load(tmp_path)
    assert bundle.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, bundle.model, make())
