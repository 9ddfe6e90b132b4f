"""The peers of the benchmarks compute what this library computes, so that the two can be timed beside each other."""

import importlib.util

import jax
import numpy as np
import pytest

import transformer_jax as tj

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: pip install 'transformer_jax[bench]'")
def test_marian_with_our_weights_has_our_logits():
    import torch

    from experiments.huggingface_peers import marian, marian_weights

    config = tj.presets.get("transformer-base").replace(
        vocab_size=50, max_len=16, num_layers=2, num_decoder_layers=3, num_heads=2, model_dim=16, mlp_dim=24)
    model = jax.jit(lambda key: tj.EncoderDecoder(config, key=key))(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    # Biases and norms too: at the start they are 0 and 1.
    model = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), model)
    rng = np.random.default_rng(0)
    source, target = (rng.integers(3, config.vocab_size, (2, length)) for length in (7, 5))
    valid = np.ones(source.shape, int)
    source[1, 4:] = valid[1, 4:] = 0
    ours = tj.forward(model, source, target, source_segment_ids_BS=valid)
    theirs = marian(config, marian_weights(model), {"pad": 0, "bos": 1, "eos": 2})
    with torch.no_grad():
        logits = theirs(input_ids=torch.from_numpy(source), attention_mask=torch.from_numpy(valid),
                        decoder_input_ids=torch.from_numpy(target)).logits
    assert np.abs(logits.numpy()).max() > 1
    np.testing.assert_allclose(ours, logits.numpy(), atol=1e-4)
