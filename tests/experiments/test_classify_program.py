"""The program ``classify``: labels of texts and of words, and its errors."""

import jax
import pytest

import transformer_jax as tj
from transformer_jax.config import ClassifierConfig
from transformer_jax.models.functional import make_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved(family)`` is the directory of a model that is not trained."""
    tokenizer = tj.Tokenizer.train(["the king sat"], kind="char")

    def save(family):
        head = ClassifierConfig() if family == "encoder" else ClassifierConfig(("bad", "good"))
        config = tj.ModelConfig(family=family, vocab_size=tokenizer.vocab_size, max_len=32, num_layers=1, num_heads=1,
                                model_dim=8, classifier=head)
        directory = tmp_path_factory.mktemp(family)
        model = jax.jit(lambda key: make_model(config, key=key))(jax.random.key(0))
        tj.save(directory, tj.Bundle(model, tokenizer, config))
        return directory

    return save


def test_labels_of_texts(program, saved):
    directory = saved("encoder_classifier")
    ended = program("classify", f"--workdir={directory}", "--text=the king", "--text=sat")
    assert ended.status == 0
    lines = ended.out.splitlines()
    found = tj.classify(tj.load(directory), ["the king", "sat"])
    assert [lines[0], lines[3]] == ["the king", "sat"]
    assert lines[1] == f"  {found[0].probability:.4f}  {found[0].label}"
    assert {lines[4].split()[1], lines[5].split()[1]} == {"bad", "good"}


def test_labels_of_words(program, saved):
    ended = program("classify", f"--workdir={saved('decoder_token_classifier')}", "--text=the king")
    assert [line.split("\t")[0] for line in ended.out.splitlines()] == ["the", "king", ""]


def test_errors(program, saved):
    directory = saved("encoder")
    assert "is not a classifier with its tokenizer" in program("classify", f"--workdir={directory}", "--text=a").error
    assert "--text is missing" in program("classify", f"--workdir={directory}").error
