"""Classifiers: their logits are a formula of the trunk's hidden states, whatever the padding."""

import jax
import numpy as np
import pytest
from scipy.special import erf

import transformer_jax as tj
from transformer_jax.config import ClassifierConfig
from transformer_jax.models.functional import make_model

TOKENS = np.array([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
REAL = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
SMALL = tj.ModelConfig(vocab_size=20, max_len=8, num_layers=1, num_heads=2, model_dim=8, init_std=0.5)
# Written from their definitions, in float64.
ACTIVATIONS = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0), "gelu": lambda x: x * (1 + erf(x / 2**0.5)) / 2}


def linear(module, x):
    kernel = np.asarray(module.kernel[...], np.float64)
    return x @ kernel + (0 if module.bias is None else np.asarray(module.bias[...], np.float64))


@pytest.mark.parametrize(("family", "pooling", "activation"), [
    ("encoder_classifier", None, None), ("encoder_classifier", "mean", "none"), ("encoder_classifier", "last", "relu"),
    ("decoder_classifier", None, None), ("encoder_token_classifier", None, "gelu")])
@pytest.mark.long
def test_logits_are_a_formula_of_the_hidden_states(family, pooling, activation):
    config = SMALL.replace(family=family, classifier=ClassifierConfig(("a", "b", "c"), pooling, activation))
    model = make_model(config, key=jax.random.key(0))
    hidden = np.asarray(model.trunk(TOKENS, segment_ids_BT=REAL).hidden, np.float64)
    pooled = {"first": hidden[:, 0], "last": hidden[[0, 1], [4, 2]],
              "mean": np.stack([hidden[0].mean(0), hidden[1, :3].mean(0)]),
              None: hidden}[pooling or {"encoder_classifier": "first", "decoder_classifier": "last"}.get(family)]
    activation = activation or {"encoder_classifier": "tanh"}.get(family)
    if activation not in (None, "none"):
        pooled = ACTIVATIONS[activation](linear(model.head.hidden, pooled))
    out = model(TOKENS, segment_ids_BT=REAL)
    np.testing.assert_allclose(out.logits, linear(model.head.output, pooled), atol=1e-5)
    assert out.logits.dtype == np.float32 and np.ptp(out.logits) > 0.1
    np.testing.assert_array_equal(tj.trace(model, TOKENS).residual, tj.trace(model.trunk, TOKENS).residual)
    if out.logits.ndim == 2:  # padding on the left changes nothing
        left = model(TOKENS[1:, [3, 4, 0, 1, 2]], segment_ids_BT=REAL[1:, [3, 4, 0, 1, 2]])
        np.testing.assert_allclose(left.logits, out.logits[1:], atol=1e-5)


def test_a_trained_model_is_kept_without_its_own_head(tmp_path):
    base = tj.Encoder(SMALL.replace(family="encoder", tie_embeddings=False), key=jax.random.key(0))
    model = tj.Classifier.of(base, ClassifierConfig(("a", "b")), key=jax.random.key(1))
    assert model.config.family == "encoder_classifier" and model.config.classifier.activation == "tanh"
    np.testing.assert_array_equal(model(TOKENS).hidden, base(TOKENS).hidden)
    assert model.trunk.head is None and model.trunk.embeddings.output is None
    with pytest.raises(ValueError, match="this encoder has no head that predicts tokens"):
        model.trunk.predict(model(TOKENS).hidden)
    tj.save(tmp_path, tj.Bundle(model, None, model.config))
    loaded = tj.load(tmp_path)
    assert loaded.config == model.config
    np.testing.assert_array_equal(tj.forward(loaded.model, TOKENS), tj.forward(model, TOKENS))


@pytest.mark.parametrize(("changes", "message"), [
    (dict(family="encoder_classifier"), "needs classifier.labels"),
    (dict(family="encoder", classifier=ClassifierConfig(("a",))), "is for the families encoder_classifier"),
    (dict(family="decoder_token_classifier", classifier=ClassifierConfig(("a",), "mean")), "is for classifiers of tex"),
])
def test_a_head_that_the_family_does_not_have(changes, message):
    with pytest.raises(ValueError, match=message):
        SMALL.replace(**changes)


def test_bad_settings_of_the_head():
    with pytest.raises(ValueError, match=r"pooling='max' is not one of first, last, mean"):
        ClassifierConfig(pooling="max")
    with pytest.raises(ValueError, match="has a name twice"):
        ClassifierConfig(("a", "a"))
    with pytest.raises(ValueError, match="needs family='encoder_classifier'"):
        tj.Classifier(SMALL, key=jax.random.key(0))
