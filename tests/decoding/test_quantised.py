"""Decoding with weights of 8 and 4 bits equals decoding with the rounded weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.nn import quantised

GREEDY = tj.Sampling(temperature=0)
CONFIG = tj.ModelConfig(vocab_size=101, max_len=48, num_layers=2, num_heads=4, model_dim=64, mlp_dim=192,
                        positions="rope", activation="swiglu", tie_embeddings=False, init_std=0.3)


def numpy_rounded(kernel, weights):
    """Rounds to the nearest multiple of the largest absolute value / 127, or / 7 of 32 inputs."""
    size, largest = (len(kernel), 127) if weights == "int8" else (32, 7)
    parts = []
    for start in range(0, len(kernel), size):
        part = kernel[start:start + size].astype(np.float64)
        scale = np.abs(part).max(0) / largest
        parts.append(np.rint(part / scale) * scale)
    return np.concatenate(parts)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("columns", [5, 200])  # one block, and several with a last one that is not full
def test_a_linear_map_multiplies_with_the_rounded_kernel(monkeypatch, weights, columns):
    monkeypatch.setattr(quantised, "_BLOCK_BYTES", 4 * 128 * 64)
    random = np.random.default_rng(0)
    kernel, x = random.normal(size=(128, columns)).astype(np.float32), random.normal(size=(3, 2, 128))
    linear = quantised.QuantisedLinear(jnp.asarray(kernel), None, weights)
    assert linear.numbers[...].shape[0] == -(-columns // 64) and linear.numbers[...].dtype.itemsize == 1
    expected = x @ numpy_rounded(kernel, weights)
    np.testing.assert_allclose(linear(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-4)
    assert abs(expected - x @ kernel).max() > 1e-3  # the rounding is seen
    zeros = quantised.QuantisedLinear(jnp.zeros((128, 4)), None, weights)
    assert not np.asarray(zeros(jnp.ones((1, 128)))).any()


@pytest.mark.long
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_decoding_equals_that_of_the_rounded_model(weights):
    model = tj.Decoder(CONFIG, key=jax.random.key(0))
    small = tj.prepare_for_decoding(model, weights=weights)
    expected = tj.generate(tj.decoding.round_weights(model, weights), [[3, 1, 4], [1]], max_new_tokens=20,
                           sampling=GREEDY)
    result = tj.generate(small, [[3, 1, 4], [1]], max_new_tokens=20, sampling=GREEDY)
    assert result.tokens == expected.tokens
    np.testing.assert_allclose(result.logprobs, expected.logprobs, rtol=1e-3, atol=1e-4)
    plain = tj.generate(model, [[3, 1, 4], [1]], max_new_tokens=20, sampling=GREEDY)
    assert not np.allclose(result.logprobs, plain.logprobs, atol=1e-4)
    matrices = [leaf for leaf in jax.tree.leaves(small.stack) if leaf.ndim == 3 and leaf.dtype != jnp.float32]
    stored = sum(leaf.nbytes for leaf in matrices)
    assert stored == sum(leaf.size for leaf in jax.tree.leaves(model.stack) if leaf.ndim == 3) // (
        1 if weights == "int8" else 2)


def test_unknown_weights_and_sizes_are_refused():
    model = tj.Decoder(CONFIG.replace(mlp_dim=96), key=jax.random.key(0))
    with pytest.raises(ValueError, match="weights='int5' is unknown; expected 'int8', 'int4' or None"):
        tj.prepare_for_decoding(model, weights="int5")
    with pytest.raises(ValueError, match="multiple of 64, but one has 96; use weights='int8'"):
        tj.prepare_for_decoding(model, weights="int4")
