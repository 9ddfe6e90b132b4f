"""Guessed masks change how many tokens a call draws, and never the text."""

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.decoding import constraints, mask_table, session

pytest.importorskip("llguidance", reason='needs pip install "transformer_jax[grammar]"')

TEXT = '{"name": "Ann", "tags": ["a", "b"]} yes no maybe 0123456789 -'
TOKENIZER = tj.Tokenizer.train([TEXT] * 2, kind="char")
CONFIG = tj.ModelConfig(vocab_size=TOKENIZER.vocab_size, max_len=96, num_layers=1, num_heads=1, model_dim=16,
                        mlp_dim=16, init_std=0.4)
SCHEMA = {"type": "object", "additionalProperties": False, "required": ["name", "tags"], "properties": {
    "name": {"type": "string", "maxLength": 6}, "tags": {"type": "array", "items": {"enum": ["a", "b"]},
                                                         "maxItems": 3}}}


@pytest.fixture(scope="module")
def model():
    return tj.Decoder(CONFIG, key=jax.random.key(3))


@pytest.fixture
def guesses(monkeypatch):
    """An empty table, which only this test uses."""
    guesses = mask_table.MaskGuesses(CONFIG.vocab_size)
    monkeypatch.setattr(constraints, "guesses_for", lambda vocab_size: guesses)
    return guesses


@pytest.fixture
def calls(monkeypatch):
    """The number of steps that each call may draw, and the numbers of tokens that were discarded."""
    calls = {"decode": [], "discard": []}

    def count(name, function, place):
        def counted(*arguments):
            calls[name].append(int(arguments[place]))
            return function(*arguments)
        monkeypatch.setattr(session, name, counted)

    count("decode", session.decode, 3)
    count("discard", session.discard, 1)
    return calls


def generate(model, seed, **options):
    """Rows with three grammars and one row without any."""
    grammars = [tj.Grammar.json_schema(SCHEMA), tj.Grammar.regex("[a-n ]{20}(yes|no)"), None,
                tj.Grammar.choice(["maybe", "yes no", "no"])]
    result = tj.generate(model, ["a", "b", "no", "yes"], tokenizer=TOKENIZER, key=jax.random.key(seed),
                         max_new_tokens=64, grammar=grammars, sampling=tj.Sampling(temperature=1.5), **options)
    return result.tokens, result.texts, result.finish_reasons, result.logprobs


def check_same(found, expected):
    assert found[:3] == expected[:3]
    for a, b in zip(found[3], expected[3], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.long
def test_texts_are_those_of_one_token_a_call(model, guesses, calls, monkeypatch):
    found = [generate(model, seed) for seed in range(4)]
    assert max(calls["decode"]) > 4 and calls["discard"]  # several tokens in a call, some of them wrong
    guessed = len(calls["decode"])
    monkeypatch.setattr(constraints, "guesses_for", lambda vocab_size: None)
    for seed in range(4):
        check_same(found[seed], generate(model, seed))
    assert guessed < 0.7 * (len(calls["decode"]) - guessed)


@pytest.mark.long
def test_wrong_guesses_cost_calls_and_change_no_text(model, guesses, calls):
    expected = generate(model, 0)
    draw = np.random.default_rng(0)
    for _ in range(2):  # all that was learned is replaced by nonsense, also "complete" and "no grammar"
        guesses._next_MV[3:] = draw.integers(0, len(guesses._masks), guesses._next_MV[3:].shape)
        guesses._table = None
        check_same(generate(model, 0), expected)
    assert len(calls["discard"]) > 10


@pytest.mark.long
def test_a_full_table_is_emptied(model, guesses, monkeypatch):
    expected = generate(model, 5)
    monkeypatch.setattr(mask_table, "NUM_PLACES", 16)
    guesses._empty()
    generation = guesses.generation
    check_same(generate(model, 5), expected)
    assert guesses.generation > generation


def test_a_known_text_takes_few_calls(model, guesses, calls):
    options = dict(tokenizer=TOKENIZER, max_new_tokens=64, sampling=tj.Sampling(temperature=0),
                   grammar=tj.Grammar.choice(["yes no maybe 0123456789 - yes no maybe"]))
    first = tj.generate(model, ["a"], **options)
    num_first = len(calls["decode"])
    assert tj.generate(model, ["a"], **options) == first
    assert num_first == first.lengths[0] - 1 and len(calls["decode"]) - num_first <= 6


def test_layers_that_keep_only_their_window_draw_one_token_a_call(guesses, calls):
    model = tj.Decoder(CONFIG.replace(positions="rope", sliding_window=8), key=jax.random.key(0))
    for _ in range(2):
        text = tj.generate(model, ["a"], tokenizer=TOKENIZER, key=jax.random.key(0), max_new_tokens=24,
                           grammar=tj.Grammar.regex("[a-n]{20}")).texts[0]
        assert len(text) == 20
    assert set(calls["decode"]) <= set(range(2, 25)) and not calls["discard"]
    assert len(calls["decode"]) == 2 * 19


def test_a_large_vocabulary_has_no_table():
    assert mask_table.guesses_for(mask_table.LARGEST_VOCABULARY + 1) is None


def test_a_token_after_the_vocabulary_does_not_change_a_guess(model, guesses, calls):
    """The end of the text is allowed after four characters. It has no token that can be drawn, so
    the guesses stay right, and the first call of the second text is as large as the first allows."""
    def write(seed):
        return tj.generate(model, ["a"], tokenizer=TOKENIZER, key=jax.random.key(seed), max_new_tokens=64, end_ids=[],
                           grammar=tj.Grammar.regex("[a-n ]{4,999}"))

    first = write(0)
    assert calls["discard"] == []
    assert guesses.first_steps == 16  # twice the 8 steps of the first call, all of which were right
    calls["decode"].clear()
    assert write(0).tokens == first.tokens
    assert calls == {"decode": [17, 49, 64], "discard": []}  # after the token of the prefill: 16, 32, and the rest
