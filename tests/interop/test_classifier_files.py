"""Files of classifiers, without torch: labels, exact round trips, and heads that no file can hold.

The fixtures ``*_texts`` and ``*_tokens`` of ``test_published_models`` compare the logits with those
of transformers.
"""

import json

import jax
import numpy as np
import pytest
from fixture_weights import model_directory
from test_saved_forms import change, tensors_of

import transformer_jax as tj
from transformer_jax.config import ClassifierConfig, LayerKind
from transformer_jax.models.functional import make_model

numpy_files = pytest.importorskip("safetensors.numpy", reason="the extra `hf` is not installed")
LABELS = ("bad", "so so", "good")


ENCODER = tj.presets.get("bert-base").replace(
    family="encoder_classifier", vocab_size=17, max_len=9, num_layers=2, num_heads=2, model_dim=6, mlp_dim=10,
    classifier=ClassifierConfig(LABELS))
MODERNBERT = tj.presets.get("modernbert-base").replace(
    family="encoder_classifier", vocab_size=17, max_len=9, num_layers=2, num_heads=2, model_dim=12, mlp_dim=10,
    layer_pattern=(LayerKind(), LayerKind(3, rope_base=10_000.0)),
    classifier=ClassifierConfig(LABELS, "mean", "gelu", use_norm=True, dropout=0.0))
DECODER = tj.presets.get("gpt2-small").replace(vocab_size=17, max_len=9, num_layers=2, num_heads=2, model_dim=6,
                                               family="decoder_classifier", classifier=ClassifierConfig(LABELS))


def bundle_of(config):
    shapes = jax.eval_shape(lambda key: make_model(config, key=key), jax.random.key(0))
    rng = np.random.default_rng(0)
    model = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)
    if not config.use_first_norm:  # this norm is not in the files, and keeps its initial values
        scale = model.trunk.stack.blocks.attention_norm.scale
        scale[...] = scale[...].at[0].set(1.0)
    return tj.Bundle(model, None, config)


@pytest.mark.parametrize(("config", "model_type", "architecture", "head"), [
    (ENCODER, "bert", "BertForSequenceClassification", {"classifier", "bert.pooler.dense"}),
    (ENCODER.replace(position_offset=2, num_token_types=1), "roberta", "RobertaForSequenceClassification",
     {"classifier.dense", "classifier.out_proj"}),
    (ENCODER.replace(family="encoder_token_classifier", classifier=ClassifierConfig(LABELS, dropout=0.3)), "bert",
     "BertForTokenClassification", {"classifier"}),
    (MODERNBERT, "modernbert", "ModernBertForSequenceClassification", {"classifier", "head.dense", "head.norm"}),
    (MODERNBERT.replace(family="encoder_token_classifier", classifier=ClassifierConfig(
        LABELS, activation="gelu", use_norm=True, dropout=0.0)), "modernbert", "ModernBertForTokenClassification",
     {"classifier", "head.dense", "head.norm"}),
    (DECODER, "gpt2", "GPT2ForSequenceClassification", {"score"}),
])
def test_there_and_back_is_exact(config, model_type, architecture, head, tmp_path):
    bundle = bundle_of(config)
    tj.to_huggingface(bundle, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["model_type"], settings["architectures"]) == (model_type, [architecture])
    assert settings["id2label"] == {"0": "bad", "1": "so so", "2": "good"}
    assert settings["label2id"] == {"bad": 0, "so so": 1, "good": 2}
    names = tensors_of(tmp_path)
    assert {f"{part}.weight" for part in head} <= names.keys()
    assert not any(name.startswith(("cls.", "lm_head", "decoder.")) for name in names)
    again = tj.from_huggingface(tmp_path)
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, again.model, bundle.model)


def test_files_without_names_of_labels(tmp_path):
    tj.to_huggingface(bundle_of(ENCODER.replace(classifier=ClassifierConfig(("a", "b")))), tmp_path)
    change(tmp_path, id2label=None, label2id=None)
    assert tj.from_huggingface(tmp_path).config.classifier.labels == ("LABEL_0", "LABEL_1")
    change(tmp_path, id2label={"0": "a", "2": "b"})
    with pytest.raises(ValueError, match='expected an object with the keys "0", "1" and so on'):
        tj.from_huggingface(tmp_path)


@pytest.mark.parametrize(("settings", "message"), [
    ({"id2label": {"0": "a", "1": "a", "2": "b"}}, "has a name twice"),
    ({"id2label": {"0": "a", "1": "", "2": "b"}}, "must be names that are not empty"),
    ({"id2label": {"0": "a", "1": None, "2": "b"}}, "a label in id2label=null: expected a string"),
    ({"id2label": {"0": "a", "1": "b"}}, r"classifier.weight is \[3, 6\], expected \[2, 6\]"),
    ({"id2label": []}, "expected an object with the keys"),
    ({"id2label": {}}, "needs classifier.labels"),
    ({"id2label": None, "num_labels": 10**30}, "num_labels=1000.*: expected a whole number from 1 to"),
    ({"id2label": None, "num_labels": 0}, "num_labels=0: expected a whole number from 1 to"),
])
def test_labels_that_are_missing_or_given_twice(settings, message, tmp_path):
    tj.to_huggingface(bundle_of(ENCODER), tmp_path)
    change(tmp_path, label2id=None, **settings)
    with pytest.raises(ValueError, match=message) as raised:
        tj.from_huggingface(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_a_classifier_of_several_labels_at_a_time_is_read_without_its_head(tmp_path):
    directory = model_directory("bert_texts-published", tmp_path)
    change(directory, problem_type="multi_label_classification")
    with pytest.warns(UserWarning, match="holds a BertForSequenceClassification; its head for that task is left out"):
        assert tj.from_huggingface(directory).config.family == "encoder"


@pytest.mark.parametrize("head", [ClassifierConfig(LABELS, "mean"), ClassifierConfig(LABELS, activation="relu")])
def test_a_head_that_the_family_does_not_have_is_refused(head, tmp_path):
    with pytest.raises(ValueError, match=r"bert: classifier=ClassifierConfig.*\(expected ClassifierConfig"):
        tj.to_huggingface(bundle_of(ENCODER.replace(classifier=head)), tmp_path, model_type="bert")


def test_fine_tuning_of_an_imported_model_keeps_its_files(tmp_path):
    """An encoder of the hub becomes a classifier, which is exported as one of its family."""
    directory = model_directory("roberta-transformers5", tmp_path / "base")
    base = tj.from_huggingface(directory)
    task = tj.tasks.make(tj.ExperimentConfig(task="classify"))
    task.read([("a", "x"), ("b", "y")] * 10)
    started = task.start_from(base)
    tj.to_huggingface(started, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["architectures"] == ["RobertaForSequenceClassification"] and settings["pad_token_id"] == 1
    assert settings["id2label"] == {"0": "x", "1": "y"}
    before, after = tensors_of(directory), tensors_of(tmp_path / "out")
    assert len(before.keys() & after.keys()) > 30
    assert all((before[name] == after[name]).all() for name in before.keys() & after.keys())
