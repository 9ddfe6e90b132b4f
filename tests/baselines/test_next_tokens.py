"""The table of the next token, of an n-gram model and of a decoder."""

import jax
import numpy as np
import pytest
from PIL import Image

import transformer_jax as tj
from transformer_jax.baselines import (
    NextToken,
    NgramModel,
    count_ngrams,
    next_token_table,
    next_tokens,
    plot_next_tokens,
)

TEXTS = ["the cat sat", "the rat sat"]


@pytest.fixture(scope="module")
def letters():
    return tj.Tokenizer.train(TEXTS, kind="char")


def test_the_table_of_an_ngram_model(letters):
    model = NgramModel.train(TEXTS, order=3, tokenizer=letters)
    expected = model.next_token_probabilities(letters.encode("the "))
    found = next_tokens(model, "the ", top=4)
    assert [token.probability for token in found] == sorted(expected, reverse=True)[:4]
    assert {found[0].piece, found[1].piece} == {"c", "r"} and found[0].probability == expected[found[0].token]
    beginning = next_tokens(model, "", top=1)[0]
    assert beginning.piece == "t"


def test_the_table_of_a_decoder(letters):
    size = letters.vocab_size + 3  # the last three are no tokens
    config = tj.ModelConfig(vocab_size=size, max_len=8, num_layers=1, num_heads=1, model_dim=8)
    bundle = tj.Bundle(tj.Decoder(config, key=jax.random.key(0)), letters, config)
    found = next_tokens(bundle, "the cat sat on", top=1000)
    tokens = letters.encode("the cat sat on")[-8:]
    logits = np.asarray(tj.forward(bundle.model, [tokens])[0, -1], np.float64)[:letters.vocab_size]
    expected = np.exp(logits) / np.exp(logits).sum()
    assert len(found) == letters.vocab_size and sum(token.probability for token in found) == pytest.approx(1)
    for token in found:
        assert token.probability == pytest.approx(expected[token.token], rel=1e-6)


def test_the_lines_and_the_figure(tmp_path):
    found = [NextToken(1, "a", 0.5), NextToken(2, "$b", 0.25)]
    assert next_token_table(found) == f"  0.5000  {'#' * 30}  'a'\n  0.2500  {'#' * 15}{' ' * 15}  '$b'"
    plot_next_tokens(found, "of $x", tmp_path / "next.png")
    assert Image.open(tmp_path / "next.png").size[0] > 300


def test_models_without_a_next_token(letters):
    with pytest.raises(ValueError, match="has no tokenizer"):
        next_tokens(NgramModel(count_ngrams(np.array([0, 1]), 1, vocab_size=2)), "a")
    config = tj.ModelConfig(family="encoder", vocab_size=letters.vocab_size, max_len=8, num_layers=1, num_heads=1,
                            model_dim=8)
    with pytest.raises(ValueError, match="a model of family 'encoder' does not predict the next token"):
        next_tokens(tj.Bundle(tj.Encoder(config, key=jax.random.key(0)), letters, config), "a")
    with pytest.raises(ValueError, match="top=0 must be at least 1"):
        next_tokens(NgramModel.train(TEXTS, order=1, tokenizer=letters), "a", top=0)
