"""Models whose vocabulary is larger than the tokenizer's: ids that cannot be decoded are never
drawn."""

import jax
import numpy as np
import pytest
from test_generate import count_compiles

import transformer_jax as tj
from transformer_jax.alignment.rollouts import collect

TOKENIZER = tj.Tokenizer.train(["abcdefgh"], kind="char")
KNOWN = TOKENIZER.vocab_size
VOCAB = KNOWN + 30
CONFIG = tj.ModelConfig(vocab_size=VOCAB, max_len=32, num_layers=1, num_heads=2, model_dim=16, tie_embeddings=False)
GREEDY = tj.Sampling(temperature=0)
PROMPT = "abc"  # one row everywhere: the tests share compiled programs


def prefers_unknown_ids(model):
    """The model with logits so large beyond the tokenizer that nothing else would be drawn."""
    model.final_norm.bias[...] = model.final_norm.bias[...].at[0].set(50.0)
    model.embeddings.output[...] = model.embeddings.output[...].at[KNOWN:, 0].set(5.0)
    return model


@pytest.fixture(scope="module")
def model():
    return prefers_unknown_ids(tj.Decoder(CONFIG, key=jax.random.key(0)))


def known(rows):
    return all(0 <= token < KNOWN for tokens in rows for token in tokens)


SAMPLINGS = [GREEDY, tj.Sampling(), tj.Sampling(top_k=1), tj.Sampling(temperature=2.0, top_p=0.5, typical_p=0.5),
             tj.Sampling(temperature=0, bias={KNOWN + 1: 100.0}, repetition_penalty=1.5, min_new_tokens=3)]


@pytest.mark.long
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=range(len(SAMPLINGS)))
def test_generate_and_stream_draw_what_can_be_decoded(model, sampling):
    arguments = dict(key=jax.random.key(1), max_new_tokens=16, sampling=sampling)
    assert not known(tj.generate(model, [TOKENIZER.encode(PROMPT)], **arguments).tokens)
    arguments["tokenizer"] = TOKENIZER
    result = tj.generate(model, PROMPT, **arguments)
    assert known(result.tokens) and result.lengths[0] > 5
    assert "".join(tj.stream(model, PROMPT, **arguments)) == result.texts[0]


def test_another_tokenizer_compiles_nothing(model):
    arguments = dict(key=jax.random.key(1), max_new_tokens=16)
    tj.generate(model, PROMPT, tokenizer=TOKENIZER, **arguments)
    other = tj.Tokenizer.train(["abcdefghijkl"], kind="char")
    with count_compiles() as compiles:
        tokens = tj.generate(model, PROMPT, tokenizer=other, **arguments).tokens
    assert compiles == [] and max(tokens[0]) < other.vocab_size


def test_beam_search_finds_what_can_be_decoded(model):
    assert not known(tj.beam_search(model, [TOKENIZER.encode(PROMPT)], n_best=4, max_new_tokens=8).tokens)
    found = tj.beam_search(model, PROMPT, tokenizer=TOKENIZER, n_best=4, max_new_tokens=8)
    assert known(one.tokens for hypotheses in found.n_best for one in hypotheses)


def test_an_end_that_is_given_may_lie_beyond_the_tokenizer(model):
    arguments = dict(tokenizer=TOKENIZER, end_ids=[KNOWN + 2], max_new_tokens=8)
    result = tj.generate(model, PROMPT, sampling=GREEDY, **arguments)
    assert (result.tokens, result.texts) == ([[KNOWN + 2]], [""])
    found = tj.beam_search(model, PROMPT, n_best=4, **arguments)
    assert (found.tokens, found.texts) == ([[KNOWN + 2]], [""])


def test_an_encoder_decoder_translates_with_what_can_be_decoded():
    config = CONFIG.replace(family="encoder_decoder")
    model = prefers_unknown_ids(tj.EncoderDecoder(config, key=jax.random.key(0)))
    arguments = dict(sampling=GREEDY, max_new_tokens=8, start_id=1)
    assert not known(tj.generate(model, [TOKENIZER.encode(PROMPT)], **arguments).tokens)
    assert known(tj.generate(model, PROMPT, tokenizer=TOKENIZER, **arguments).tokens)


def test_rollouts_draw_what_can_be_decoded(model):
    rollout, texts = collect(model, [TOKENIZER.encode(PROMPT)], reference=model, reward=lambda texts: [0.0],
                             tokenizer=TOKENIZER, key=jax.random.key(0), prompt_len=4, max_new_tokens=16)
    assert len(texts) == 1 and np.asarray(rollout.tokens_BT).max() < KNOWN
