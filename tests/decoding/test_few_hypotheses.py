"""Beam search where there are fewer texts than were asked for: never an empty hypothesis, never a
score of minus infinity."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj

VOCAB, LIMIT, END = 8, 4, 7
CONFIG = tj.ModelConfig(vocab_size=VOCAB, max_len=16, num_layers=1, num_heads=1, model_dim=8, init_std=0.7)
PROMPTS = [[1, 2, 3], [4]]


@functools.cache
def make(allowed):
    """A model that can draw only these tokens."""
    banned = tuple(token for token in range(VOCAB) if token not in allowed)
    return tj.Decoder(CONFIG.replace(banned_ids=banned), key=jax.random.key(0))


def exists(allowed, limit, ends):
    """All texts of the allowed tokens: up to an end, or to the limit."""
    return {text for length in range(1, limit + 1) for text in itertools.product(allowed, repeat=length)
            if not set(text[:-1]) & set(ends) and (text[-1] in ends or length == limit)}


@pytest.mark.long
@pytest.mark.parametrize("ends", [(END,), ()], ids=["end", "no-end"])
@pytest.mark.parametrize("allowed", [(END,), (3,), (3, END), (3, 5), (0, 3, END)], ids=str)
def test_the_texts_that_exist_and_no_others(allowed, ends):
    model = make(allowed)
    for limit in (1, LIMIT):
        found = tj.beam_search(model, PROMPTS, beam_size=6, n_best=6, max_new_tokens=limit, end_ids=ends)
        there_are = exists(allowed, limit, ends)
        for hypotheses in found.n_best:
            texts = [tuple(one.tokens) for one in hypotheses]
            assert len(set(texts)) == len(texts) and set(texts) <= there_are
            assert len(texts) == min(6, len(there_are))  # a beam of 6 drops no text of at most two tokens that go on
            assert all(np.isfinite(one.score) and np.isfinite(one.logprob) and one.tokens for one in hypotheses)
            assert [one.score for one in hypotheses] == sorted((one.score for one in hypotheses), reverse=True)
        assert found.tokens == [hypotheses[0].tokens for hypotheses in found.n_best]


def test_banning_every_token_raises():
    model = make(())
    for call in (lambda: tj.beam_search(model, PROMPTS, max_new_tokens=2),
                 lambda: tj.generate(model, PROMPTS, max_new_tokens=2, sampling=tj.Sampling(temperature=0))):
        with pytest.raises(ValueError, match="banned_ids leave none of 8 tokens to draw"):
            call()


def test_a_model_that_gives_all_that_is_allowed_probability_0_is_an_error():
    model = tj.Decoder(CONFIG.replace(banned_ids=(0, 1, 2, 3), tie_embeddings=False), key=jax.random.key(0))
    model.embeddings.output[...] = model.embeddings.output[...].at[:4].set(1.0).at[4:].set(-jnp.inf)
    model.final_norm.scale[...] = jnp.zeros_like(model.final_norm.scale[...])
    model.final_norm.bias[...] = jnp.ones_like(model.final_norm.bias[...])
    with pytest.raises(ValueError, match="there is no hypothesis for source 0: .* probability 0"):
        tj.beam_search(model, PROMPTS, beam_size=6, n_best=6, max_new_tokens=LIMIT, end_ids=[END])
