"""The key/value cache: a decoder that reads a text in pieces equals one that reads it at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.nn.stack import unstack

BASE = tj.ModelConfig(vocab_size=17, max_len=16, num_layers=2, num_heads=4, num_kv_heads=2, model_dim=16)
TOKENS = jax.random.randint(jax.random.key(5), (3, 10), 0, 17)


def random_decoder(config):
    shapes = jax.eval_shape(lambda key: tj.Decoder(config, key=key), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.2, 0.3, leaf.shape), leaf.dtype), shapes)


@jax.jit
def step(model, tokens, segments, cache):
    out = model(tokens, segment_ids_BT=segments, cache=cache)
    return out.logits, out.cache


def read_in_pieces(model, tokens, cuts, segments=None):
    cache = tj.KVCache.empty(model.config, tokens.shape[0], 14)
    segments = jnp.ones_like(tokens) if segments is None else segments
    pieces = []
    for start, end in zip((0, *cuts), (*cuts, tokens.shape[1]), strict=True):
        logits, cache = step(model, tokens[:, start:end], segments[:, start:end], cache)
        pieces.append(logits)
    return jnp.concatenate(pieces, axis=1), cache


@pytest.mark.parametrize("changes", [dict(positions="learned"), dict(positions="rope", sliding_window=4),
                                     dict(positions="alibi", use_qk_norm=True),
                                     dict(positions="sinusoidal", norm_position="post")], ids=str)
def test_pieces_equal_the_whole(changes):
    model = random_decoder(BASE.replace(**changes))
    whole = tj.forward(model, TOKENS)
    logits, cache = read_in_pieces(model, TOKENS, (6, 7, 9))
    np.testing.assert_allclose(logits, whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())
    assert cache.length == 10 and cache.capacity == 14
    np.testing.assert_array_equal(cache.segment_ids_BS, np.broadcast_to(np.arange(14) < 10, (3, 14)))


@pytest.mark.long
@pytest.mark.parametrize("positions", ["learned", "rope", "alibi"])
def test_ragged_rows_are_aligned_on_the_right(positions):
    model = random_decoder(BASE.replace(positions=positions))
    lengths = np.array([10, 7, 4])
    segments = jnp.asarray(np.arange(10) >= 10 - lengths[:, None], jnp.int32)
    logits, cache = read_in_pieces(model, TOKENS, (8, 9), segments)
    assert jnp.isfinite(logits).all()
    for row, length in enumerate(lengths):
        alone = tj.forward(model, TOKENS[row : row + 1, 10 - length :])
        np.testing.assert_allclose(logits[row, 10 - length :], alone[0], rtol=1e-5, atol=1e-5 * np.abs(alone).max())
    np.testing.assert_array_equal((cache.segment_ids_BS != 0).sum(1), lengths)


def test_the_unstacked_form_computes_the_same():
    model = random_decoder(BASE)
    separate = jax.tree.map(lambda leaf: leaf, model)
    separate.stack = unstack(model.stack)
    np.testing.assert_allclose(read_in_pieces(separate, TOKENS, (6, 7))[0], read_in_pieces(model, TOKENS, (6, 7))[0],
                               atol=1e-5)
    assert len(separate.stack.blocks) == 2 and model.stack.blocks.mlp.up.kernel.shape == (2, 16, 64)


def test_maps_of_a_cached_pass_have_the_keys_of_the_cache():
    model = random_decoder(BASE.replace(positions="alibi"))
    _, cache = read_in_pieces(model, TOKENS[:, :7], ())
    trace = jax.jit(lambda cache: model(TOKENS[:, 7:], cache=cache).trace)(cache)
    maps = trace.attention()
    assert maps.shape == (2, 3, 4, 3, 14)
    np.testing.assert_allclose(maps[..., :10], tj.trace(model, TOKENS).attention(queries=[7, 8, 9]), atol=5e-6)
    assert (maps[..., 10:] == 0.0).all()


def test_append_is_pure():
    cache = tj.KVCache.empty(BASE.replace(positions="relative"), batch_size=2, capacity=5)
    new, ones = jnp.ones((2, 2, 2, 4)), jnp.ones((2, 2), jnp.int32)
    longer = cache.append_segments(ones, 7 * ones).append_layer(1, new, 2 * new).advance(2)
    assert all((array == 0).all() for array in jax.tree.leaves(cache))
    assert (longer.keys[0] == 0).all() and (longer.keys[1][:, :2] == 1).all() and (longer.keys[1][:, 2:] == 0).all()
    assert (longer.values[1][:, :2] == 2).all() and longer.length == 2
    assert longer.positions_BS.tolist() == [[7, 7, 0, 0, 0]] * 2
    assert longer.resized(jnp.asarray([1]), 2).positions_BS.tolist() == [[7, 7, 0, 0, 0, 0, 0]]
    assert tj.KVCache.empty(BASE, 1, 3).positions_BS is None
    assert tj.KVCache.empty(BASE.replace(dtype="bfloat16"), 1, 3).keys[0].dtype == jnp.bfloat16


def test_more_tokens_than_the_cache_holds_are_refused():
    model, cache = random_decoder(BASE), tj.KVCache.empty(BASE, 3, 4)
    with pytest.raises(ValueError, match="10 tokens are longer than the 4 that the cache has room for"):
        model(TOKENS, cache=cache)
