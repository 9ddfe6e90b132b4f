"""Wrong arguments of the public functions: each raises an error of one line that says what to
pass."""

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.data.token_file import measure

TOKENIZER = tj.Tokenizer.train(["abcdefgh"], kind="char")
CONFIG = tj.ModelConfig(vocab_size=TOKENIZER.vocab_size, max_len=16, num_layers=1, num_heads=2, model_dim=8)
MODEL = tj.Decoder(CONFIG, key=jax.random.key(0))
ENCODER = tj.Encoder(CONFIG.replace(family="encoder"), key=jax.random.key(0))
BUNDLE = tj.Bundle(model=MODEL, tokenizer=TOKENIZER, config=CONFIG, step=0)
CALLS = {
    "generate": lambda model, text, tokenizer=TOKENIZER, **more: tj.generate(
        model, text, tokenizer=tokenizer, max_new_tokens=1, sampling=tj.Sampling(temperature=0), **more),
    "score": lambda model, text, tokenizer=TOKENIZER: tj.score(model, text, tokenizer=tokenizer),
    "embed": lambda model, text, tokenizer=TOKENIZER, **more: tj.embed(model, text, tokenizer=tokenizer, **more),
    "forward": lambda model, text, tokenizer=TOKENIZER: tj.forward(model, text, tokenizer=tokenizer),
    "trace": lambda model, text, tokenizer=TOKENIZER: tj.trace(model, text, tokenizer=tokenizer),
    "inspect_text": lambda model, text, tokenizer=TOKENIZER: tj.inspect_text(model, text, tokenizer),
}


def assert_refused(call, *arguments, match, **more):
    with pytest.raises(ValueError, match=match) as raised:
        CALLS[call](*arguments, **more)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.parametrize("call", CALLS)
def test_values_that_are_not_texts_are_refused(call):
    for text in (3, np.int64(3), MODEL, True, b"abc", bytearray(b"abc"), np.array(3)):
        assert_refused(call, MODEL, text, match=r"text|string|integers \[B, T\]")
    for text in ({"a": 1, 2: 3}, {1, 2}, [np.zeros((2, 2), int)], [[[1]]], ["ab", None], [MODEL]):
        if call == "score" or not isinstance(text, set):
            assert_refused(call, MODEL, text, match=r"is not a|needs|integers \[B, T\]|outside the vocabulary|string")


@pytest.mark.parametrize("call", CALLS)
def test_half_a_surrogate_pair_is_named_with_its_place(call):
    assert_refused(call, MODEL, "ab\ud800", match="half a surrogate pair at character 2")


def test_half_a_surrogate_pair_in_a_corpus():
    with pytest.raises(ValueError, match="half a surrogate pair at character 2"):
        measure(["a", "ab\ud800"])


@pytest.mark.parametrize("call", [call for call in CALLS if call != "inspect_text"])  # it takes bundles
def test_values_that_are_not_models_are_refused(call):
    assert_refused(call, BUNDLE, "ab", match=rf"{call} was given an object of type Bundle, .* pass its \.model")
    for model in (None, "gpt2", CONFIG, [MODEL]):
        assert_refused(call, model, "ab", match="is not a model; pass a Decoder")


@pytest.mark.parametrize("call", CALLS)
def test_values_that_are_not_tokenizers_are_refused(call):
    for tokenizer in ("gpt2", object(), tj.Tokenizer):
        assert_refused(call, MODEL, "ab", tokenizer, match="is not a tokenizer; pass bundle.tokenizer")


def test_rows_in_an_array_of_objects_and_from_a_generator():
    wanted = tj.forward(MODEL, [[5, 6], [7]])
    np.testing.assert_array_equal(tj.forward(MODEL, np.array([[5, 6], [7]], dtype=object)), wanted)
    np.testing.assert_array_equal(tj.forward(MODEL, (row for row in [[5, 6], [7]])), wanted)
    assert len(tj.inspect_text(MODEL, (row for row in [[5, 6], [7]]), TOKENIZER).texts) == 2


def test_other_arguments():
    assert_refused("generate", MODEL, "ab", stop=3, match="stop=3 must be a string or several")
    assert_refused("generate", MODEL, "ab", end_ids=[True], match="True, which is not a token id")
    assert_refused("embed", MODEL, "ab", layer=True, match="layer=True must be a whole number")
    assert_refused("embed", MODEL, "ab", word=2.5, match=r"word=2\.5 is not a string")
    for vector in (None, "a", [[1], [2, 3]], ["a"]):
        with pytest.raises(ValueError, match=r"similarity takes arrays of numbers.*tj\.embed"):
            tj.similarity(vector, np.ones(3))
    with pytest.raises(ValueError, match="a text is of type bytes; expected a string"):
        TOKENIZER.encode(b"ab")
    with pytest.raises(ValueError, match="expected a string") as raised:
        tj.fill_mask(ENCODER, [MODEL], tokenizer=TOKENIZER)
    assert "\n" not in str(raised.value)
