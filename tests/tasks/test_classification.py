"""The tasks ``classify`` and ``classify_tokens``: training from scratch and from a trained model,
measuring, classifying, resuming."""

import dataclasses

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import CheckpointConfig, ClassifierConfig, DataConfig, EvalConfig, OptimConfig
from transformer_jax.tasks.label_scores import label_scores

WORDS = ("cat", "dog", "sun", "sea", "hut", "fog")
TEXTS = [(f"{a} {b} {c}", "has cat" if "cat" in (a, b, c) else "no cat") for a in WORDS for b in WORDS for c in WORDS]
CONFIG = tj.ExperimentConfig(
    task="classify", steps=60, batch_size=16, log_every=20, optim=OptimConfig(peak_lr=1e-2, warmup_steps=5),
    model=tj.ModelConfig(family="encoder", max_len=16, num_layers=1, num_heads=2, model_dim=16),
    data=DataConfig(tokenizer=tj.config.TokenizerConfig(kind="word", vocab_size=270)), eval=EvalConfig(every=30),
    checkpoint=CheckpointConfig(every=30))


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("classify")
    return tj.train(CONFIG, TEXTS, workdir=workdir, mesh=tj.sharding.make_mesh(devices=jax.devices()[:1])), workdir


def test_it_learns_from_scratch(trained):
    bundle, workdir = trained
    assert bundle.config.family == "encoder_classifier"
    assert bundle.config.classifier == ClassifierConfig(("has cat", "no cat"), "first", "tanh")
    measured = tj.evaluate(bundle, TEXTS)
    assert measured["accuracy"] > 0.95 and measured["labels"] == 216
    found = tj.classify(bundle, [text for text, _ in TEXTS], batch_size=50)
    predicted = [each.label for each in found]
    assert measured["accuracy"] == pytest.approx(np.mean([a == b for a, (_, b) in zip(predicted, TEXTS, strict=True)]))
    assert all(sum(each.probabilities.values()) == pytest.approx(1, abs=1e-5) and
               each.probability == max(each.probabilities.values()) == each.probabilities[each.label] for each in found)
    loss = -np.mean([np.log(each.probabilities[label]) for each, (_, label) in zip(found, TEXTS, strict=True)])
    assert measured["loss"] == pytest.approx(loss, rel=1e-4)
    logged = tj.training.read_metrics(workdir / "metrics.jsonl")
    assert {"validation_loss", "validation_accuracy", "validation_macro_f1"} <= logged[-1].keys()
    held_out = tj.evaluate(tj.load(workdir), dict_of_held_out())
    assert held_out["macro_f1"] == pytest.approx(logged[-1]["validation_macro_f1"], abs=1e-6)


def dict_of_held_out():
    """The last tenth of the texts of each label, in the form of a file."""
    parts = [[text for text in TEXTS if text[1] == label] for label in ("has cat", "no cat")]
    return [{"text": text, "label": label} for part in parts for text, label in part[len(part) - len(part) // 10:]]


@pytest.mark.long
def test_a_resumed_run_ends_with_the_same_weights(trained, tmp_path):
    bundle, _ = trained
    mesh = tj.sharding.make_mesh(devices=jax.devices()[:1])

    def stop(loop):
        if loop.step == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tj.train(CONFIG, TEXTS, workdir=tmp_path, mesh=mesh, hooks=[stop])
    again = tj.train(CONFIG, TEXTS, workdir=tmp_path, mesh=mesh)
    assert again.step == 60 and all(map(np.array_equal, leaves(again.model), leaves(bundle.model)))


@pytest.mark.long
def test_words_from_a_trained_decoder():
    """The trunk starts with the weights of the base; each word gets a label."""
    tokenizer = tj.Tokenizer.train([text for text, _ in TEXTS], kind="char")
    config = CONFIG.model.replace(family="decoder", vocab_size=tokenizer.vocab_size, tie_embeddings=False)
    base = tj.Bundle(tj.Decoder(config, key=jax.random.key(3)), tokenizer, config)
    texts = [(text.split(), ["CAT" if word == "cat" else "O" for word in text.split()]) for text, _ in TEXTS]
    run = CONFIG.replace(task="classify_tokens", model=tj.ModelConfig(dropout=0.1), data=DataConfig(), steps=80)
    task = tj.tasks.make(run)
    task.read(texts)
    started = task.start_from(base)
    np.testing.assert_array_equal(started.model.trunk.embeddings.token[...], base.model.embeddings.token[...])
    bundle = tj.train(run, texts, base=base, mesh=tj.sharding.make_mesh(devices=jax.devices()[:1]))
    assert bundle.config.family == "decoder_token_classifier" and bundle.config.dropout == 0.1
    assert bundle.config.classifier.labels == ("CAT", "O")
    # A decoder has read one letter of a word at its first token: it can tell "cat" from all but none.
    assert tj.evaluate(bundle, texts)["accuracy"] > 0.95
    found = tj.classify_tokens(bundle, ["sun  cat", "cat"])
    assert [[(each.word, each.start, each.stop) for each in words] for words in found] == [
        [("sun", 0, 3), ("cat", 5, 8)], [("cat", 0, 3)]]
    assert [each.label for each in found[0]] == ["O", "CAT"]
    again = tj.classify_tokens(bundle, [["sun", "cat"]])[0]
    assert [each.probabilities for each in again] == [each.probabilities for each in found[0]]


def test_the_head_of_a_base_that_is_a_classifier(trained):
    bundle, _ = trained

    def start(given, labels):
        task = tj.tasks.make(CONFIG.replace(model=tj.ModelConfig(classifier=given)))
        task.read([(text, labels[label == "no cat"]) for text, label in TEXTS])
        return task.start_from(bundle)

    assert start(ClassifierConfig(), ("has cat", "no cat")) is bundle
    assert start(ClassifierConfig(pooling="mean"), ("has cat", "no cat")).config.classifier.pooling == "mean"
    other = start(ClassifierConfig(), ("x", "y"))
    assert other.config.classifier.labels == ("x", "y")
    assert all(map(np.array_equal, leaves(other.model.trunk), leaves(bundle.model.trunk)))


def test_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="the extra `corpus` is not installed")
    rng = np.random.default_rng(0)
    true, predicted = rng.choice(3, 50, p=(0.7, 0.2, 0.1)), rng.choice(3, 50)
    confusion = np.zeros((4, 4))  # the fourth label does not occur
    np.add.at(confusion, (true, predicted), 1)
    found = label_scores(confusion, ("a", "b", "c", "d"))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(true, predicted))
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(true, predicted))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(true, predicted, average="macro"))
    assert [found[f"f1_{label}"] for label in "abc"] == pytest.approx(
        metrics.f1_score(true, predicted, average=None).tolist())


def test_bad_inputs(trained):
    bundle, _ = trained
    encoder = tj.Bundle(tj.Encoder(CONFIG.model.replace(vocab_size=9), key=jax.random.key(0)), None,
                        CONFIG.model.replace(vocab_size=9))
    with pytest.raises(ValueError, match="classify needs a classifier, but the model is of family 'encoder'; train"):
        tj.classify(encoder, "a")
    with pytest.raises(ValueError, match="classify_tokens needs a token classifier"):
        tj.classify_tokens(bundle, "a")
    with pytest.raises(ValueError, match="expected a tj.Bundle"):
        tj.classify(bundle.model, "a")
    with pytest.raises(ValueError, match="expected a text that is not blank"):
        tj.classify(bundle, ["a", " "])
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        tj.classify(dataclasses.replace(bundle, tokenizer=None), "a")
    with pytest.raises(ValueError, match="the label 'x', which the model does not know"):
        tj.evaluate(bundle, [("a", "x")])
    task = tj.tasks.make(CONFIG)
    with pytest.raises(ValueError, match="have the label 'x'; expected at least two labels"):
        task.read([("a", "x")] * 20)
    with pytest.raises(ValueError, match=r"example 2 of 2: 'b' is not a text with its label"):
        task.read([("a", "x"), "b"])
    with pytest.raises(ValueError, match="no training data is given; set --config.data.path"):
        task.read()
    with pytest.raises(ValueError, match="is for models of family 'classifier', but the model is of family 'reward'"):
        task.check_family("reward")
