"""The peers of the benchmarks compute what this library computes, so that the two can be timed
beside each other."""

import importlib.util

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import ExperimentConfig, OptimConfig
from transformer_jax.interop.huggingface import to_huggingface
from transformer_jax.training.objectives import masked_token_loss
from transformer_jax.training.optimizer import make_optimizer, make_schedule
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_train_step

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]


needs_peers = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {' and '.join(MISSING)}: pip install 'transformer_jax[bench]'")


@needs_peers
def test_roberta_learns_as_ours_does_where_there_is_no_dropout(tmp_path):
    from benchmarks.peers.huggingface import roberta_training
    from benchmarks.timing import OtherProcess

    steps, rng = 12, np.random.default_rng(0)
    model = tj.presets.get("roberta-base").replace(vocab_size=60, max_len=16, num_layers=2, num_heads=2, model_dim=16,
                                                   init_std=0.1, dropout=0.0, position_offset=1)
    optim = OptimConfig(peak_lr=1e-2, schedule="linear", warmup_steps=3, weight_decay=0.1)
    config = ExperimentConfig(steps=steps, model=model, optim=optim)
    tokens = rng.integers(1, 60, (steps, 4, 16))
    segments = np.repeat([[1] * 7 + [2] * 9, [1] * 12 + [0] * 4], 2, axis=0)
    positions = np.tile(np.array([0, 3, 8, 11]), (4, 1))
    weights = np.array([[1, 1, 1, 0]] * 4, np.float32)
    batches = [{"tokens": one, "segment_ids": segments, "masked_positions": positions, "masked_weights": weights,
                "masked_targets": rng.integers(1, 60, (4, 4))} for one in tokens.astype(np.int32)]
    schedule, optimizer = make_schedule(optim, steps), make_optimizer(optim, steps)
    step = make_train_step(masked_token_loss(), optimizer)
    state = init_state(lambda key: tj.Encoder(model, key=key), optimizer, jax.random.key(0))
    to_huggingface(tj.Bundle(state.params, None, model), tmp_path)
    theirs = OtherProcess(roberta_training, config, [float(schedule(at)) for at in range(steps)], str(tmp_path))
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append((float(metrics["loss"]), theirs(("train", [batch]))))
    theirs.close()
    ours, expected = np.array(losses).T
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


@needs_peers
def test_marian_with_our_weights_has_our_logits(tmp_path):
    import torch

    from benchmarks.peers.huggingface import marian, write_marian

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
    write_marian(model, str(tmp_path))
    theirs = marian(config, str(tmp_path), {"pad": 0, "bos": 1, "eos": 2})
    with torch.no_grad():
        logits = theirs(input_ids=torch.from_numpy(source), attention_mask=torch.from_numpy(valid),
                        decoder_input_ids=torch.from_numpy(target)).logits
    assert np.abs(logits.numpy()).max() > 1
    np.testing.assert_allclose(ours, logits.numpy(), atol=1e-4)
