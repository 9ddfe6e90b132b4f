"""The task ``embed``: the contrastive loss by its formula, training, and retrieval."""

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import ContrastiveConfig, DataConfig, EvalConfig, OptimConfig
from transformer_jax.data.pair_rows import PairRows
from transformer_jax.training.contrastive import contrastive_loss, contrastive_losses

LETTERS = "abcdefgh"
PAIRS = [(f"{a}{b}{c}", f"{a}{b}{c}".upper()) for a in LETTERS for b in LETTERS for c in LETTERS[:4]]


def formula(a, b, temperature):
    """InfoNCE in both directions, written for each pair, in float64."""
    a, b = (np.asarray(x, np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    losses = []
    for row in range(len(a)):
        forth, back = np.exp(a[row] @ b.T / temperature), np.exp(b[row] @ a.T / temperature)
        losses.append(-(np.log(forth[row] / forth.sum()) + np.log(back[row] / back.sum())) / 2)
    return np.array(losses)


def test_the_loss_is_its_formula():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    losses, hits = contrastive_losses(a, b, np.ones(5, bool), 0.3)
    np.testing.assert_allclose(losses, formula(a, b, 0.3), rtol=1e-4)
    nearest = np.asarray(tj.similarity(a, b)).argmax(1)
    np.testing.assert_array_equal(hits, nearest == np.arange(5))
    # Rows that fill a batch are no negative examples.
    some, _ = contrastive_losses(a, b, np.arange(5) < 3, 0.3)
    np.testing.assert_allclose(some[:3], formula(a[:3], b[:3], 0.3), rtol=1e-4)


@pytest.fixture(scope="module")
def trained():
    config = tj.ExperimentConfig(
        task="embed", steps=60, batch_size=32, log_every=20, optim=OptimConfig(peak_lr=1e-2, warmup_steps=5),
        model=tj.ModelConfig(family="encoder", max_len=8, num_layers=1, num_heads=2, model_dim=16),
        data=DataConfig(), contrastive=ContrastiveConfig(dims=(8,)), eval=EvalConfig(every=60))
    return tj.train(config, PAIRS, mesh=tj.sharding.make_mesh(devices=jax.devices()[:1]))


def test_the_vectors_of_the_loss_are_those_of_embed(trained):
    pairs, tokenizer = PAIRS[:4], trained.tokenizer
    batch = next(PairRows.build(pairs, tokenizer, "masked", 8).batches(6))
    settings = ContrastiveConfig(dims=(8, 3), temperature=0.2)
    loss, weight, sums = contrastive_loss(settings)(trained.model, batch)
    a, b = (tj.embed(trained.model, [pair[side] for pair in pairs], tokenizer=tokenizer) for side in (0, 1))
    wanted = np.mean([formula(a[:, :dim], b[:, :dim], 0.2) for dim in (16, 8, 3)], axis=0).sum()
    assert float(loss) == pytest.approx(wanted, rel=1e-4)
    hits = np.asarray(tj.similarity(a, b)).argmax(1) == np.arange(4)
    assert (float(weight), float(sums["accuracy"])) == (4.0, hits.sum())


def test_pairs_find_each_other(trained):
    found = tj.evaluate(trained, PAIRS)
    untrained = tj.Bundle(tj.Encoder(trained.config, key=jax.random.key(5)), trained.tokenizer, trained.config,
                          experiment=trained.experiment)
    assert found["top1"] > 0.9 and found["top1_8"] > 0.8 and found["pairs"] == 256
    assert tj.evaluate(untrained, PAIRS)["top1"] < 0.5
    assert found["top1"] <= found["mrr"] <= 1


def test_bad_settings():
    with pytest.raises(ValueError, match=r"contrastive.dims=\(0,\) must be positive integers"):
        ContrastiveConfig(dims=(0,))
    config = tj.ExperimentConfig(task="embed", contrastive=ContrastiveConfig(dims=(64,)),
                                 model=tj.ModelConfig(family="encoder", model_dim=16, num_heads=2, vocab_size=9))
    with pytest.raises(ValueError, match="contrastive.dims has 64, but the vectors of the model have only 16 numbers"):
        tj.tasks.make(config).prepare(PAIRS, PAIRS, tj.Tokenizer.train(["a"], kind="char"), None)
