"""Log-probabilities of continuations, against a float64 formula row by row, with few programs."""

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.evaluation.continuations import _scores, continuation_scores

CONFIG = tj.ModelConfig(vocab_size=30, max_len=32, num_layers=1, num_heads=2, model_dim=16, init_std=0.5)
MODEL = tj.Decoder(CONFIG, key=jax.random.key(0))


def expected(context, continuation):
    row = [*context, *continuation][-33:]
    padded_1T = np.zeros((1, 32), np.int32)
    padded_1T[0, :len(row) - 1] = row[:-1]
    logits_TV = np.asarray(tj.forward(MODEL, padded_1T))[0].astype(np.float64)
    logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    places = range(len(row) - 1 - len(continuation), len(row) - 1)
    total = sum(logprobs_TV[place, token] for place, token in zip(places, continuation, strict=True))
    return total, all(logits_TV[place].argmax() == token for place, token in zip(places, continuation, strict=True))


def greedy(context, size):
    return tj.generate(MODEL, [context], max_new_tokens=size, sampling=tj.Sampling(temperature=0)).tokens[0]


def test_scores_are_those_of_the_formula_and_few_programs_are_compiled():
    random = np.random.default_rng(0)
    pairs = [(random.integers(0, 30, size).tolist(), random.integers(0, 30, 1 + size % 4).tolist())
             for size in [3, 1, 20, 9, 31, 40, 14, 2, 25, 30]]
    pairs.append(([4, 5, 6], greedy([4, 5, 6], 2)))
    before, done = _scores._cache_size(), []
    found = continuation_scores(MODEL, pairs, batch_size=4, progress=done.append)
    assert _scores._cache_size() - before == 2  # rows of 16 and of 32 tokens
    assert sum(done) == len(pairs)
    for (total, is_greedy), pair in zip(found, pairs, strict=True):
        formula = expected(*pair)
        np.testing.assert_allclose(total, formula[0], rtol=1e-5)
        assert is_greedy == formula[1]
    assert found[-1][1] and not all(is_greedy for _, is_greedy in found)


@pytest.mark.parametrize(("pair", "message"), [
    (([], [1]), "pair 0 has an empty context"), (([1], []), "pair 0 has an empty continuation"),
    (([1], [2] * 33), "do not fit in the model's context of 32"), (([1], [30]), "outside the vocabulary"),
])
def test_wrong_pairs(pair, message):
    with pytest.raises(ValueError, match=message):
        continuation_scores(MODEL, [pair])
