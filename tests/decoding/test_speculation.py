"""Speculative decoding gives the tokens of plain decoding, for every kind of position and rule."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.decoding import speculation as loop
from transformer_jax.decoding import speculative_session as session

VOCAB = 20
CONFIG = tj.ModelConfig(vocab_size=VOCAB, max_len=96, num_layers=2, num_heads=2, num_kv_heads=1, model_dim=16,
                        init_std=0.4, tie_embeddings=False)
CONFIGS = {"rope": CONFIG.replace(positions="rope"),
           "alibi": CONFIG.replace(positions="alibi"),
           "rope-window": CONFIG.replace(positions="rope", sliding_window=5)}
PROMPTS = [[7, 1, 3, 2, 18, 5, 5, 1, 9, 10], [4], [11, 9, 0, 12]]
GREEDY = tj.Sampling(temperature=0)


@functools.cache
def model(name="rope"):
    return tj.Decoder(CONFIGS[name], key=jax.random.key(1))


@functools.cache
def close_draft():
    """A draft model that is often right: the model with a little noise on its weights."""
    leaves, structure = jax.tree.flatten(model())
    noise = jax.random.split(jax.random.key(9), len(leaves))
    return jax.tree.unflatten(structure, [leaf + 0.02 * jax.random.normal(key, leaf.shape)
                                          for leaf, key in zip(leaves, noise, strict=True)])


def check_equal(plain, fast):
    assert fast.tokens == plain.tokens and fast.finish_reasons == plain.finish_reasons
    assert fast.lengths == plain.lengths and fast.texts == plain.texts
    for a, b in zip(plain.logprobs, fast.logprobs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


SETTINGS = {
    "greedy": dict(sampling=GREEDY),
    "sampled": dict(sampling=tj.Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.2), key=jax.random.key(3)),
    "ends": dict(sampling=tj.Sampling(min_new_tokens=4, no_repeat_ngram=3), key=jax.random.key(4), end_ids=[3, 8],
                 num_samples=2),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["lookup", "draft"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_tokens_are_those_of_plain_decoding(name, kind):
    speculation = tj.Speculation(close_draft() if kind == "draft" else None, num_guesses=3)
    arguments = dict(max_new_tokens=30, **SETTINGS[name])
    plain = tj.generate(model(), PROMPTS, **arguments)
    fast = tj.generate(model(), PROMPTS, speculation=speculation, **arguments)
    check_equal(plain, fast)
    assert plain.acceptance_rate is None and 0 <= fast.acceptance_rate < 1
    if kind == "draft":
        assert fast.acceptance_rate > 0.4  # the guesses use the random numbers of the model


@pytest.mark.long
@pytest.mark.parametrize("name", ["alibi", "rope-window"])
def test_windows_and_biases_do_not_count_the_gaps_of_wrong_guesses(name):
    arguments = dict(max_new_tokens=30, sampling=GREEDY)
    prompts = PROMPTS if name == "alibi" else PROMPTS[:1]
    plain = tj.generate(model(name), prompts, **arguments)
    fast = tj.generate(model(name), prompts, speculation=tj.Speculation(num_guesses=3), **arguments)
    check_equal(plain, fast)
    assert fast.acceptance_rate > 0
    if name == "rope-window":
        with pytest.raises(ValueError, match="pass one prompt at a time"):
            tj.generate(model(name), PROMPTS, speculation=tj.Speculation(), **arguments)


@pytest.mark.long
def test_a_full_cache_is_read_again(monkeypatch):
    # Rows accept different numbers of guesses, so that the slots of the gaps fill the cache early.
    starts = []
    start = session.SpeculativeSession._start
    monkeypatch.setattr(session.SpeculativeSession, "_start", lambda self: starts.append(1) or start(self))
    monkeypatch.setattr(session, "bucket", lambda length: length + 2)
    fast = tj.generate(model(), PROMPTS, speculation=tj.Speculation(close_draft(), num_guesses=3), max_new_tokens=30,
                       key=jax.random.key(5))
    assert len(starts) > 1
    check_equal(tj.generate(model(), PROMPTS, max_new_tokens=30, key=jax.random.key(5)), fast)


class Letters:
    """A tokenizer with one letter for each id."""

    vocab_size, end_ids, bos_id = VOCAB, (19,), None

    def encode_prompt(self, text):
        return [ord(letter) - 97 for letter in text]

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

    def stream_decoder(self, context):
        return SimpleNamespace(push=lambda token: chr(97 + token), pending=lambda: "", finish=lambda: "")


def test_stop_strings_and_one_compilation():
    plain = tj.generate(model(), PROMPTS, max_new_tokens=30, sampling=GREEDY)
    text = Letters().decode(plain.tokens[0])
    stop = text[9:11]
    arguments = dict(tokenizer=Letters(), max_new_tokens=30, sampling=GREEDY, stop=stop)
    speculation = tj.Speculation(num_guesses=3)
    expected = tj.generate(model(), ["hbdcsffbjk", "e", "ljam"], **arguments)
    before = loop.speculate.num_programs
    fast = tj.generate(model(), ["hbdcsffbjk", "e", "ljam"], speculation=speculation, **arguments)
    assert "stop" in expected.finish_reasons
    check_equal(expected, fast)
    tj.generate(model(), PROMPTS, max_new_tokens=25, sampling=tj.Sampling(top_k=3), key=jax.random.key(0),
                speculation=speculation)
    assert loop.speculate.num_programs <= before + 1


@pytest.mark.long
def test_samples_follow_the_distribution_of_the_model():
    # The exact probabilities of all texts of two tokens, by the chain rule in float64.
    tiny = tj.Decoder(CONFIG.replace(vocab_size=4, positions="rope"), key=jax.random.key(2))
    logits = np.asarray([tj.forward(tiny, jnp.asarray([[1, first]]))[0] for first in range(4)], np.float64)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = (softmax[0, 0][:, None] * softmax[:, 1]).ravel()
    draws = 4000
    result = tj.generate(tiny, [[1]], num_samples=draws, max_new_tokens=2, key=jax.random.key(6),
                         speculation=tj.Speculation(num_guesses=2))
    counts = np.bincount([4 * a + b for a, b in result.tokens], minlength=16)
    chi_square = ((counts - draws * expected) ** 2 / (draws * expected)).sum()
    assert chi_square < 37.7  # exceeded with probability 0.001 at 15 degrees of freedom
    assert abs(counts / draws - expected).sum() < 4 * math.sqrt(16 / draws)


def test_a_text_that_repeats_itself_is_looked_up():
    text = jnp.asarray([0, 0, 5, 6, 7, 8, 5, 6, 0, 0])
    guesses = loop._look_up(text, 2, 8, num_guesses=5, ngram=3)
    assert guesses.tolist() == [7, 8, 5, 6, 7]  # then the period of four tokens again


def test_what_cannot_speculate_is_refused():
    with pytest.raises(ValueError, match="num_guesses=0 must be a whole number from 1 to 64"):
        tj.Speculation(num_guesses=0)
    with pytest.raises(ValueError, match=r"speculation=4 is not a tj\.Speculation"):
        tj.generate(model(), PROMPTS, sampling=GREEDY, max_new_tokens=4, speculation=4)
    other = tj.Decoder(CONFIG.replace(vocab_size=9), key=jax.random.key(0))
    with pytest.raises(ValueError, match="vocabulary of 9, but the model one of 20"):
        tj.generate(model(), PROMPTS, sampling=GREEDY, max_new_tokens=4, speculation=tj.Speculation(other))
    with pytest.raises(ValueError, match="ask for fewer new tokens"):
        tj.generate(model(), PROMPTS, sampling=GREEDY, max_new_tokens=100, slide=True, speculation=tj.Speculation())
    with pytest.raises(ValueError, match="cannot be combined with intervene"):
        tj.generate(model(), PROMPTS, sampling=GREEDY, max_new_tokens=4, intervene=lambda site, layer, value: value,
                    speculation=tj.Speculation())
