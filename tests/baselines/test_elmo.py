"""ELMo, and gradients by distance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.baselines import gradient_by_distance
from transformer_jax.config import OptimConfig, RecurrentConfig, SampleConfig
from transformer_jax.models.functional import make_model
from transformer_jax.sharding import make_mesh
from transformer_jax.training.leaves import tree_digest

ONE = make_mesh(devices=jax.devices()[:1])
TEXTS = ["abcde edcba abcde", "edcba abcde"] * 20
RUN = tj.ExperimentConfig(
    model=RecurrentConfig(family="elmo", max_len=16, num_layers=2, model_dim=12), steps=60, batch_size=8,
    optim=OptimConfig(peak_lr=0.03, schedule="constant"), sample=SampleConfig(every=0),
    data=tj.config.DataConfig(tokenizer=tj.config.TokenizerConfig(kind="char")))


@pytest.fixture(scope="module")
def bundle():
    return tj.train(RUN, texts=TEXTS, mesh=ONE)


def test_each_direction_reads_only_its_side():
    model = make_model(RUN.model.replace(vocab_size=9), key=jax.random.key(0))
    tokens_BT = np.arange(8)[None]
    changed = tokens_BT.copy()
    changed[0, 4] = 8
    before, after = model(tokens_BT), model(changed)
    moved = np.abs(np.asarray(before.trace.residual - after.trace.residual)[2, 0]).max(-1) > 1e-6
    assert moved.all()  # both directions together see each token
    ahead, back = (np.abs(np.asarray(x - y)[0]).max(-1) > 1e-6 for x, y in (
        (before.hidden, after.hidden), (before.trace.backward, after.trace.backward)))
    assert ahead.tolist() == [False] * 4 + [True] * 4 and back.tolist() == [True] * 5 + [False] * 3


@pytest.mark.long
def test_both_directions_are_learned_and_the_loss_is_their_mean(bundle):
    task = tj.tasks.get("bidirectional_language_model")(bundle.experiment)
    tokens = np.asarray(bundle.tokenizer.encode("abcde edcba abcd"))[None, :]
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    total, weight = task.evaluation_loss(bundle.model, batch)
    out = bundle.model(jnp.asarray(batch["tokens"]))
    ahead = jax.nn.log_softmax(out.logits)[0, np.arange(tokens.shape[1] - 1), tokens[0, 1:]]
    back = jax.nn.log_softmax(bundle.model.unembed(out.trace.backward))[0, np.arange(1, tokens.shape[1] - 1),
                                                                      tokens[0, :-2]]
    np.testing.assert_allclose(total, -(ahead.sum() + back.sum()), rtol=1e-5)
    assert weight == ahead.size + back.size and -back.mean() < 1.9 and -ahead.mean() < 1.9


def test_vectors_depend_on_the_context_but_embeddings_do_not(bundle):
    def cosine(layer):
        first, second = tj.embed(bundle.model, ["abcde", "edcba"], tokenizer=bundle.tokenizer, word="c", layer=layer)
        assert first.shape == (24,)
        return float(tj.similarity(first, second))

    assert cosine(0) > 0.9999 and cosine(-1) < 0.9


def test_a_bundle_is_saved_loaded_and_evaluated(bundle, tmp_path):
    tj.save(tmp_path, bundle)
    loaded = tj.load(tmp_path)
    assert tree_digest(loaded.model) == tree_digest(bundle.model)
    assert tj.evaluate(loaded, TEXTS[:2])["bits_per_byte"] < 2.5


def test_wrong_uses_are_refused(bundle):
    with pytest.raises(ValueError, match="generate is for models of family decoder or encoder_decoder, not elmo"):
        tj.generate(bundle.model, "ab", tokenizer=bundle.tokenizer)
    with pytest.raises(ValueError, match="'language_model' is for models of family 'decoder'"):
        tj.train(RUN.replace(task="language_model"), texts=TEXTS)


def test_the_gradient_of_an_rnn_vanishes_as_its_matrix_says():
    """A tanh network at zero is linear: the gradient at distance d has d factors W."""
    config = RecurrentConfig(cell="rnn", vocab_size=7, model_dim=5, tie_embeddings=False)
    model = make_model(config, key=jax.random.key(0))
    layer = model.layers[0]
    model.embeddings.token[...] = jnp.zeros((7, 5))
    layer.bias[...] = jnp.zeros(5)
    layer.state_kernel[...] = 0.5 * jnp.linalg.qr(jax.random.normal(jax.random.key(1), (5, 5)))[0]
    layer.input_kernel[...] = jnp.linalg.qr(jax.random.normal(jax.random.key(2), (5, 5)))[0]
    norms = gradient_by_distance(model, np.zeros((2, 6), int), np.asarray([1, 2]))
    np.testing.assert_allclose(norms / norms[0], 0.5 ** np.arange(6), rtol=1e-4)
    with pytest.raises(ValueError, match=r"expected tokens \[B, T\] and targets \[B\]"):
        gradient_by_distance(model, np.zeros(6, int), np.asarray([1]))


def test_attention_reaches_each_token_in_one_step():
    decoder = tj.Decoder(tj.ModelConfig(vocab_size=7, max_len=32, num_layers=1, num_heads=1, model_dim=8,
                                        positions="none"), key=jax.random.key(0))
    recurrent = make_model(RecurrentConfig(cell="rnn", vocab_size=7, model_dim=8), key=jax.random.key(0))
    tokens = np.random.default_rng(0).integers(7, size=(4, 32))
    ratios = [gradient_by_distance(model, tokens, tokens[:, 0]) for model in (decoder, recurrent)]
    assert ratios[0][31] / ratios[0][1] > 0.2 and ratios[1][31] / ratios[1][1] < 0.05
