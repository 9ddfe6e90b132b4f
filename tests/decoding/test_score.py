"""log P of a text is the sum of the log-probabilities of its tokens, each given those before it."""

import jax
import numpy as np
import pytest

import transformer_jax as tj

TOKENIZER = tj.Tokenizer.train(["the cat sat on the mat"], kind="char")
# The shape of test_generate.py, whose compiled programs are used again; ids from
# TOKENIZER.vocab_size on have no text.
CONFIG = tj.ModelConfig(vocab_size=40, max_len=64, num_layers=2, num_heads=4, model_dim=32, init_std=0.4)
MODEL = tj.Decoder(CONFIG, key=jax.random.key(0))
TEXTS = ["the cat", "t", "the cat sat on the mat" * 2 + " on the cat on a mat", "on the mat"]


def plain_logprobs(text: str) -> list[float]:
    """Computes log P with one forward pass for each text alone and a log-softmax in float64."""
    ids = TOKENIZER.encode(text)
    inputs = np.full((1, CONFIG.max_len), 0, np.int32)
    inputs[0, :len(ids)] = [TOKENIZER.end_of_text_id, *ids[:-1]]  # tokens after the text do not influence it
    logits = np.asarray(tj.forward(MODEL, inputs), np.float64)[0, :len(ids)]
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_p[np.arange(len(ids)), ids].tolist()


def test_chain_rule_over_texts_of_different_lengths():
    assert max(map(len, TEXTS)) == CONFIG.max_len
    score = tj.score(MODEL, TEXTS, tokenizer=TOKENIZER)
    assert score.tokens == [TOKENIZER.encode(text) for text in TEXTS]
    for text, total, logprobs in zip(TEXTS, score.totals, score.logprobs, strict=True):
        expected = plain_logprobs(text)
        np.testing.assert_allclose(logprobs, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(total, sum(expected), rtol=1e-5)


def test_one_string_is_one_text():
    assert tj.score(MODEL, TEXTS[0], tokenizer=TOKENIZER).totals == pytest.approx([sum(plain_logprobs(TEXTS[0]))], 1e-5)


def test_probabilities_of_all_continuations_sum_to_one():
    """P(t) P(x | t) summed over every token x is P(t)."""
    first, *_ = TOKENIZER.encode("t")

    class Ids:  # reads a text as its number: texts that no characters spell, such as "t</s>", have a number too
        start_id = TOKENIZER.start_id

        def frame(self, form: str) -> tuple[list[int], list[int]]:
            return [], []

        def encode_prompt(self, text: str) -> list[int]:
            return [first, int(text)]

    totals = tj.score(MODEL, [str(token) for token in range(CONFIG.vocab_size)], tokenizer=Ids()).totals
    first_logprob = plain_logprobs("t")[0]
    np.testing.assert_allclose(np.exp(totals).sum(), np.exp(first_logprob), rtol=1e-5)


def test_scores_equal_the_log_probabilities_of_generation():
    sampling = tj.Sampling(temperature=0.7, top_k=4, banned=[*range(6), *range(TOKENIZER.vocab_size, 40)])
    result = tj.generate(MODEL, "", tokenizer=TOKENIZER, key=jax.random.key(1), max_new_tokens=16, sampling=sampling,
                         num_samples=3)
    score = tj.score(MODEL, result.texts, tokenizer=TOKENIZER)  # without control tokens the text spells the tokens
    assert score.tokens == result.tokens
    for given, expected in zip(result.logprobs, score.logprobs, strict=True):
        np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)


def test_errors():
    for texts, words in [([], "at least one text"), ("", "no empty one"), (["t", ""], "no empty one"),
                         ("t" * 65, "a text of 65 tokens is longer than the model's context of 64")]:
        with pytest.raises(ValueError, match=words):
            tj.score(MODEL, texts, tokenizer=TOKENIZER)
    larger = tj.Tokenizer.train(["".join(map(chr, range(40, 100)))], kind="char")
    with pytest.raises(ValueError, match="is outside the vocabulary of"):
        tj.score(MODEL, "".join(map(chr, range(40, 100))), tokenizer=larger)
