"""ELECTRA: shared embeddings, its loss against NumPy, its config, training and export."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_families import random_model

import transformer_jax as tj
from transformer_jax.config import ElectraConfig
from transformer_jax.config.electra import REPLACED
from transformer_jax.training.replaced_tokens import discriminator_scores, replaced_token_loss, replaced_tokens

V, T, P = 23, 8, 3
CONFIG = ElectraConfig(
    vocab_size=V, max_len=T, num_layers=2, num_heads=4, model_dim=16, embedding_dim=6, num_token_types=1,
    norm_position="post", use_embedding_norm=True, activation="gelu", norm_epsilon=1e-12)
SEGMENTS = np.array([[1] * T, [1] * 5 + [0] * 3])


@jax.jit
def run(model, tokens):
    return model(tokens, segment_ids_BT=SEGMENTS).logits


@functools.cache
def make():
    """A random model whose discriminator takes about half of the tokens for replaced."""
    model = random_model(CONFIG)
    bias = model.body.head.output.bias
    bias[...] = bias[...] - jnp.median(run(model, jnp.asarray(batch()[0], jnp.int32)))
    return model


def batch():
    rng = np.random.default_rng(0)
    original = np.where(SEGMENTS, rng.integers(2, V, (2, T)), 0)
    positions, weights = np.array([[1, 4, 6], [0, 3, 0]]), np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    tokens = original.copy()
    for row, column in zip(*np.nonzero(weights), strict=True):
        tokens[row, positions[row, column]] = 1
    targets = np.take_along_axis(original, positions, axis=1) * (weights > 0)
    arrays = {"tokens": tokens, "segment_ids": SEGMENTS, "masked_positions": positions, "masked_targets": targets}
    return original, {**{name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()},
                      "masked_weights": jnp.asarray(weights, jnp.float32)}


def test_the_two_models_are_those_of_the_paper():
    config = tj.presets.get("electra-small")
    generator, discriminator = config.generator, config.discriminator
    assert (generator.model_dim, generator.mlp_dim, generator.num_heads, generator.head_dim) == (64, 256, 1, 64)
    assert (discriminator.model_dim, discriminator.mlp_dim, discriminator.num_heads) == (256, 1024, 4)
    assert generator.embedding_dim == discriminator.embedding_dim == 128
    assert (discriminator.family, discriminator.classifier.labels) == ("encoder_token_classifier", (REPLACED,))
    assert type(config.generator) is type(config.discriminator) is tj.ModelConfig


@pytest.mark.parametrize(("changes", "words"), [
    (dict(generator_width=0.3), "generator_width=0.3 of model_dim=16 is 4.8; expected a whole number"),
    (dict(generator_width=1.5), r"generator_width=1.5 must be in \(0, 1\]"),
    (dict(discriminator_weight=0), "discriminator_weight=0 must be positive"),
    (dict(tie_embeddings=False), "tie_embeddings=False is not for ELECTRA"),
    (dict(dropout=2.0), r"dropout=2.0 must be in \[0, 1\)"),
    (dict(family="encoder"), "family='encoder' needs a ModelConfig"),
])
def test_settings_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        CONFIG.replace(**changes)


def test_the_embeddings_are_shared_and_counted_once():
    parts = tj.count_parameters(CONFIG.generator) + tj.count_parameters(CONFIG.discriminator)
    shared = (V + T + 1) * 6 + 2 * 6  # tokens, positions, one type, the norm
    assert tj.count_parameters(CONFIG) == parts - shared
    model = make()
    assert model.body.trunk.embeddings.token is None
    embeddings, shared = model.discriminator.trunk.embeddings, model.generator.embeddings
    assert embeddings.token is shared.token and embeddings.norm is shared.norm
    assert embeddings.projection.kernel.shape == (6, 16) and shared.projection.kernel.shape == (6, 4)


def test_drawn_tokens_take_the_places_of_the_masks():
    original, arrays = batch()
    drawn = jnp.asarray([[7, int(original[0, 4]), 9], [2, 3, 11]])
    tokens, is_replaced = replaced_tokens(arrays, drawn)
    expected = original.copy()
    expected[0, [1, 6]], expected[1, [0, 3]] = (7, 9), (2, 3)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(is_replaced, expected != original)
    assert not is_replaced[0, 4]  # the generator drew the right token


@functools.cache
def loss_and_gradient():
    def total(model, arrays):
        loss, weight, more = replaced_token_loss(model, arrays)
        return loss / weight, (weight, more)

    return jax.jit(jax.value_and_grad(total, has_aux=True))(make(), batch()[1])


@pytest.mark.long
def test_the_loss_equals_numpy():
    """From the logits of both models, in float64."""
    arrays = batch()[1]
    (loss, (weight, more)), _ = loss_and_gradient()
    model, weights = make(), np.asarray(arrays["masked_weights"], np.float64)
    logits = np.take_along_axis(np.asarray(run(model.generator, arrays["tokens"]), np.float64),
                                np.asarray(arrays["masked_positions"])[..., None], axis=1)
    drawn = np.asarray(jax.random.categorical(jax.random.key(0), jnp.asarray(logits, jnp.float32)))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = np.asarray(arrays["masked_targets"])
    restored = -(np.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0] * weights).sum() / 5
    tokens, is_replaced = map(np.asarray, replaced_tokens(arrays, jnp.asarray(drawn)))
    odds = np.asarray(run(model, jnp.asarray(tokens)), np.float64)[..., 0]
    chance = 1 / (1 + np.exp(-odds))
    real = SEGMENTS != 0
    found = -np.log(np.where(is_replaced, chance, 1 - chance))[real].mean()
    assert weight == 5 and is_replaced.any()
    np.testing.assert_allclose(loss, restored + 50 * found, rtol=1e-5)
    means = {name: float(value) / 5 for name, value in more.items()}
    np.testing.assert_allclose(means["generator_loss"], restored, rtol=1e-5)
    np.testing.assert_allclose(means["discriminator_loss"], found, rtol=1e-5)
    assert 0.2 < (odds > 0)[real].mean() < 0.8
    for name, values in (("replaced", is_replaced), ("found", is_replaced & (odds > 0)), ("accused", odds > 0)):
        np.testing.assert_allclose(means[name], values[real].mean(), rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(discriminator_scores(means)["accuracy"], ((odds > 0) == is_replaced)[real].mean(),
                               rtol=1e-5)


def test_scores_of_a_discriminator():
    """Of 100 tokens, 15 are replaced and 12 are taken for replaced, 10 of them rightly."""
    scores = discriminator_scores({"replaced": 0.15, "found": 0.10, "accused": 0.12})
    expected = {"accuracy": 0.93, "trivial_accuracy": 0.85, "precision": 10 / 12, "recall": 10 / 15, "f1": 20 / 27}
    assert scores == pytest.approx(expected)
    assert discriminator_scores({"replaced": 0.2, "found": 0.0, "accused": 0.0})["f1"] == 0.0


def test_both_losses_train_the_shared_embeddings_alone():
    """The discriminator does not train the layers of the generator, and padding trains nothing."""
    _, gradient = loss_and_gradient()
    of_pair = np.abs(gradient.body.trunk.stack.blocks.mlp.up.kernel[...]).max()
    assert of_pair > 0 and np.abs(gradient.generator.embeddings.token[...]).max() > 0

    def restored(model, arrays):
        return replaced_token_loss(model, arrays)[2]["generator_loss"] / 5

    alone = jax.jit(jax.grad(restored))(make(), batch()[1])
    np.testing.assert_allclose(alone.generator.stack.blocks.mlp.up.kernel[...],
                               gradient.generator.stack.blocks.mlp.up.kernel[...], rtol=1e-4, atol=1e-6)
    of_one, of_both = (x.generator.embeddings.token[...] for x in (alone, gradient))
    assert np.abs(of_one - of_both).max() > 0.01
    assert np.abs(alone.body.trunk.stack.blocks.mlp.up.kernel[...]).max() == 0


def test_each_model_is_exported_as_its_own(tmp_path):
    pytest.importorskip("safetensors", reason="the extra `hf` is not installed")
    model = make()
    for name, part, architecture in (("discriminator", model.discriminator, "ElectraForPreTraining"),
                                     ("generator", model.generator, "ElectraForMaskedLM")):
        tj.to_huggingface(tj.Bundle(part, None, part.config), tmp_path / name, model_type="electra")
        assert json.loads((tmp_path / name / "config.json").read_text())["architectures"] == [architecture]
        again = tj.from_huggingface(tmp_path / name)
        assert again.config == part.config
        jax.tree.map(np.testing.assert_array_equal, again.model, part)
    with pytest.raises(ValueError, match=r"holds two models.*model\.discriminator"):
        tj.to_huggingface(tj.Bundle(model, None, CONFIG), tmp_path / "both")


def test_transformers_computes_the_same_with_the_exported_discriminator(tmp_path):
    torch = pytest.importorskip("torch", reason="the extra `bench` is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `bench` is not installed")
    part = make().discriminator
    tj.to_huggingface(tj.Bundle(part, None, part.config), tmp_path, model_type="electra")
    theirs, info = transformers.ElectraForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    original, _ = batch()
    with torch.no_grad():
        odds = theirs.eval()(torch.tensor(original), attention_mask=torch.tensor(SEGMENTS)).logits.numpy()
    ours = np.asarray(part(jnp.asarray(original), segment_ids_BT=SEGMENTS).logits)[..., 0]
    np.testing.assert_allclose(ours[SEGMENTS == 1], odds[SEGMENTS == 1], atol=2e-5)


WORDS = ("the king", "a queen", "my son"), ("saw", "took", "said"), ("the water", "a ship", "my home")


@pytest.mark.long
def test_training_from_the_named_config(tmp_path, capsys):
    rng = np.random.default_rng(0)
    lines = [" ".join(words[rng.integers(3)] for words in WORDS) + "." for _ in range(200)]
    config = tj.recipes.get("book_electra")
    data = config.data.__class__(validation_fraction=0.2, tokenizer=config.data.tokenizer.__class__(
        kind="bpe", vocab_size=340))
    config = config.replace(
        steps=100, batch_size=8, data=data, sample=config.sample.__class__(every=50, prompt="the king <mask> the ship"),
        optim=dataclasses.replace(config.optim, peak_lr=1e-2, warmup_steps=10),
        model=config.model.replace(max_len=24, num_layers=1, model_dim=32, embedding_dim=16, generator_width=0.5,
                                   unroll=1))
    bundle = tj.train(config, lines, workdir=tmp_path / "run")
    assert "replaced: " in capsys.readouterr().out
    again = tj.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, again.model, bundle.model)
    assert again.config == bundle.config and isinstance(again.config, ElectraConfig)
    measured = tj.evaluate(again, ["\n".join(lines[:40])])
    assert measured["generator_accuracy"] > 0.2 and 0 < measured["trivial_accuracy"] < measured["accuracy"]
    encoder = again.model.discriminator.trunk
    tuned = tj.train(tj.recipes.get("classify_finetuned").replace(steps=2, batch_size=8),
                     [(line, line.split()[0]) for line in lines[:40]],
                     base=tj.Bundle(encoder, again.tokenizer, encoder.config))
    assert tuned.config.family == "encoder_classifier"
