"""Logit processors against plain float64 formulas and Hugging Face's, and draws against their
probabilities."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from transformer_jax.decoding import formulas, logits, processors
from transformer_jax.decoding.logits import Sampling, Settings
from transformer_jax.decoding.rules import History

BATCH, VOCAB = 4, 23
NO_TEXT = History(np.zeros((1, 1), np.int32), np.zeros((1, 1), bool), 0)
INF = np.inf


def make_logits() -> np.ndarray:
    """Random logits; a row with ties, one with tokens already excluded, one that is nearly
    certain."""
    logits_BV = np.random.default_rng(0).normal(scale=2.0, size=(BATCH, VOCAB)).astype(np.float32)
    logits_BV[1] = np.round(logits_BV[1])
    logits_BV[2, ::3] = -INF
    logits_BV[3, 7] = 30.0
    return logits_BV


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def keep_best(row: np.ndarray, rank: np.ndarray, weights: np.ndarray, target: float) -> np.ndarray:
    """Takes tokens one at a time, the best first, until the weights reach the target; then also
    takes the tokens that tie with the last one."""
    reached, last = 0.0, None
    for token in np.argsort(-rank, kind="stable"):
        reached, last = reached + weights[token], rank[token]
        if reached >= target:
            break
    return np.where(rank >= last, row, -INF)


def expected_top_k(row: np.ndarray, k: int) -> np.ndarray:
    return keep_best(row, row.astype(np.float64), np.ones(len(row)), min(k, len(row)))


def expected_top_p(row: np.ndarray, p: float) -> np.ndarray:
    return keep_best(row, row.astype(np.float64), softmax(row), p)


def expected_min_p(row: np.ndarray, p: float) -> np.ndarray:
    probabilities = softmax(row)
    return np.where(probabilities >= p * probabilities.max(), row, -INF)


def expected_typical_p(row: np.ndarray, p: float) -> np.ndarray:
    probabilities = softmax(row)
    possible = probabilities > 0
    surprise = np.full(len(row), INF)
    surprise[possible] = -np.log(probabilities[possible])
    entropy = (probabilities[possible] * surprise[possible]).sum()
    rank = -np.abs(surprise - entropy)
    rank[possible] = np.round(rank[possible], 5)  # float32 surprises of tied logits
    return keep_best(row, rank, probabilities, p)


TRUNCATIONS = [
    *[("top_k", k) for k in (1, 2, 5, VOCAB - 1, VOCAB, 10 * VOCAB)],
    *[("top_p", p) for p in (1e-50, 1e-6, 0.3, 0.65, 0.95, 0.999)],
    *[("min_p", p) for p in (1e-50, 0.01, 0.2, 1.0)],
    *[("typical_p", p) for p in (1e-50, 0.1, 0.5, 0.9)],
]


@pytest.mark.parametrize(("name", "value"), TRUNCATIONS)
def test_truncation_keeps_the_tokens_of_the_plain_formula(name, value):
    logits_BV = make_logits()
    given = np.asarray(jax.jit(getattr(formulas, name))(logits_BV, jnp.float32(value)))
    expected = np.stack([globals()[f"expected_{name}"](row, value) for row in logits_BV])
    np.testing.assert_array_equal(given, expected)
    assert np.isfinite(given).any(-1).all()  # at least one token is left, however small p is


def test_ties_with_the_last_token_are_kept():
    logits_BV = np.array([[1.0, 0.0, 1.0, -1.0], [0.0, -INF, 0.0, 0.0]], np.float32)
    assert np.isfinite(formulas.top_k(logits_BV, jnp.int32(1))).tolist() == [[1, 0, 1, 0], [1, 0, 1, 1]]
    assert np.isfinite(formulas.top_p(logits_BV, jnp.float32(0.4))).tolist() == [[1, 0, 1, 0], [1, 0, 1, 1]]


def test_settings_of_one_change_nothing():
    logits_BV = make_logits()
    settings = Settings.of(Sampling(top_p=1.0, typical_p=1.0, min_p=0.0, top_k=0), VOCAB)
    kept = jax.jit(logits.truncate)(logits_BV, NO_TEXT, settings)
    np.testing.assert_array_equal(kept, logits_BV)


def test_truncations_follow_one_another_and_renormalise():
    row = np.log([0.4, 0.3, 0.2, 0.1]).astype(np.float32)
    # Of the three that top_k leaves (4/9, 3/9, 2/9), the first two reach 0.75; of all four they
    # would not.
    kept = jax.jit(logits.truncate)(row[None], NO_TEXT, Settings.of(Sampling(top_k=3, top_p=0.75), 4))
    assert np.isfinite(kept).tolist() == [[True, True, False, False]]
    kept = jax.jit(logits.truncate)(row[None], NO_TEXT, Settings.of(Sampling(top_p=0.75), 4))
    assert np.isfinite(kept).tolist() == [[True, True, True, False]]


def make_history() -> tuple[np.ndarray, np.ndarray]:
    """Texts of few different tokens between padding on the left, which holds token 1, and slots not
    yet used."""
    history_BS = np.random.default_rng(1).integers(0, 3, size=(BATCH, 16)).astype(np.int32)
    starts, end = [0, 5, 12, 13], 14
    valid_BS = np.zeros(history_BS.shape, bool)
    for row, start in enumerate(starts):
        valid_BS[row, start:end] = True
    history_BS[~valid_BS] = 1
    history_BS[3, 13] = 2
    return history_BS, valid_BS


def test_presence_and_frequency_penalties_count_new_tokens_only():
    """The formula of the OpenAI API: logit - count * frequency - (count > 0) * presence."""
    logits_BV = np.arange(8, dtype=np.float32).reshape(2, 4)
    history = History(np.array([[0, 3, 2, 1, 1, 0], [2, 2, 2, 3, 3, 3]], np.int32),
                      np.array([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool), np.array([[2], [4]], np.int32))
    count_BV = np.array([[0, 2, 0, 0], [0, 0, 1, 3]])
    penalty_B1 = np.array([[0.5], [0.25]], np.float32)
    np.testing.assert_array_equal(processors.FrequencyPenalty(0.5)(logits_BV, history), logits_BV - 0.5 * count_BV)
    np.testing.assert_array_equal(processors.PresencePenalty(2.0)(logits_BV, history), logits_BV - 2.0 * (count_BV > 0))
    of_rows = jax.tree.map(lambda _: penalty_B1, processors.PresencePenalty(0.0))
    np.testing.assert_array_equal(of_rows(logits_BV, history), logits_BV - penalty_B1 * (count_BV > 0))


@pytest.mark.long
def test_settings_may_differ_from_row_to_row():
    """Rows with settings of their own draw what they draw alone, with the settings as numbers."""
    settings = [Sampling(temperature=0), Sampling(temperature=0.7, top_k=3), Sampling(top_p=0.6, no_repeat_ngram=1),
                Sampling(typical_p=0.5, repetition_penalty=1.5, min_p=0.1, frequency_penalty=1.0)]
    logits_BV, keys_B = make_logits(), jax.random.split(jax.random.key(5), BATCH)
    tokens_BS = np.tile(np.array([[3, 7, 3, 3]], np.int32), (BATCH, 1))
    new_B1 = np.array([[0], [3], [1], [2]], np.int32)
    alone = [Settings.of(each, VOCAB, [2]) for each in settings]
    together = jax.tree.map(lambda *leaves: np.stack([np.atleast_1d(leaf) for leaf in leaves]), *alone)
    drawn_B, can_draw_B = jax.jit(logits.sample)(
        logits_BV, History(tokens_BS, tokens_BS > 0, new_B1, together.ends_V), keys_B, together)
    for row, each in enumerate(alone):
        one = slice(row, row + 1)
        history = History(tokens_BS[one], tokens_BS[one] > 0, int(new_B1[row, 0]), each.ends_V)
        assert logits.sample(logits_BV[one], history, keys_B[one], each)[0][0] == drawn_B[row]
    assert can_draw_B.all()


def test_repetition_penalty():
    logits_BV, (history_BS, valid_BS) = make_logits(), make_history()
    expected = logits_BV.astype(np.float64)
    for row, token in itertools.product(range(BATCH), range(VOCAB)):
        if token in history_BS[row][valid_BS[row]]:
            value = expected[row, token]
            expected[row, token] = value / 1.7 if value > 0 else value * 1.7
    given = jax.jit(formulas.penalize_repetition)(logits_BV, history_BS, valid_BS, jnp.float32(1.7))
    np.testing.assert_allclose(given, expected, rtol=1e-6)
    assert (np.asarray(given) != logits_BV).any()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 14, 15, 16, 17, 2**31 - 1])
def test_no_repeated_ngram(n):
    logits_BV, (history_BS, valid_BS) = make_logits(), make_history()
    expected = logits_BV.copy()
    for row in range(BATCH):
        text = history_BS[row][valid_BS[row]].tolist()
        ngrams = {tuple(text[i:i + n]) for i in range(len(text) - n + 1)}
        for token in range(VOCAB):
            if len(text) >= n - 1 and tuple([*text[len(text) - n + 1:], token]) in ngrams:
                expected[row, token] = -INF
    given = jax.jit(formulas.forbid_repeated_ngrams)(logits_BV, history_BS, valid_BS, jnp.int32(n))
    np.testing.assert_array_equal(given, expected)
    assert (expected != logits_BV).any() == (n <= 3)


def test_a_row_without_a_new_ngram_keeps_its_logits():
    logits_BV = np.zeros((2, 2), np.float32)
    history_BS, valid_BS = np.array([[0, 1, 1], [1, 1, 1]]), np.ones((2, 3), bool)
    given = formulas.forbid_repeated_ngrams(logits_BV, history_BS, valid_BS, jnp.int32(1))
    np.testing.assert_array_equal(given, [[0.0, 0.0], [0.0, -INF]])


def test_processors_equal_those_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    logits_BV = rng.normal(scale=2.0, size=(BATCH, VOCAB)).astype(np.float32)
    logits_BV[1, ::4] = -INF
    history_BS = rng.integers(0, 4, size=(BATCH, 12))
    valid_BS = np.ones(history_BS.shape, bool)
    pairs = [
        (transformers.TopKLogitsWarper(4), formulas.top_k, (jnp.int32(4),)),
        (transformers.TopKLogitsWarper(99), formulas.top_k, (jnp.int32(99),)),
        (transformers.TopPLogitsWarper(0.8), formulas.top_p, (jnp.float32(0.8),)),
        (transformers.TopPLogitsWarper(0.01), formulas.top_p, (jnp.float32(0.01),)),
        (transformers.MinPLogitsWarper(0.1), formulas.min_p, (jnp.float32(0.1),)),
        (transformers.TypicalLogitsWarper(0.6), formulas.typical_p, (jnp.float32(0.6),)),
        (transformers.RepetitionPenaltyLogitsProcessor(1.3), formulas.penalize_repetition,
         (history_BS, valid_BS, jnp.float32(1.3))),
        *[(transformers.NoRepeatNGramLogitsProcessor(n), formulas.forbid_repeated_ngrams,
           (history_BS, valid_BS, jnp.int32(n))) for n in (1, 2, 3)],
    ]
    for theirs, ours, arguments in pairs:
        expected = theirs(torch.from_numpy(history_BS), torch.from_numpy(logits_BV.copy())).numpy()
        np.testing.assert_allclose(ours(logits_BV, *arguments), expected, rtol=1e-6, err_msg=type(theirs).__name__)


def restrict(logits_BV, sampling, num_new=0, end_ids=()):
    settings = Settings.of(sampling, VOCAB, end_ids)
    history = History(*make_history(), jnp.int32(num_new), settings.ends_V)
    return np.asarray(jax.jit(logits.restrict)(logits_BV, history, settings))


def test_bias_banned_and_minimum_length():
    logits_BV = make_logits()
    given = restrict(logits_BV, Sampling(bias={3: 2.5, 5: -INF}, banned=[0, 5]))
    expected = logits_BV.copy()
    expected[:, 3] += 2.5
    expected[:, [0, 5]] = -INF
    np.testing.assert_array_equal(given, expected)
    expected = logits_BV.copy()
    expected[:, [2, 4]] = -INF
    np.testing.assert_array_equal(restrict(logits_BV, Sampling(min_new_tokens=3), 2, end_ids=(2, 4)), expected)
    np.testing.assert_array_equal(restrict(logits_BV, Sampling(min_new_tokens=3), 3, end_ids=(2, 4)), logits_BV)


def test_inverse_cdf_golden():
    """Probabilities 0.4, 0.3, 0.2, 0.1: a draw of 0.65 takes the second token."""
    probabilities_BV = jnp.tile(jnp.array([0.4, 0.3, 0.2, 0.1]), (7, 1))
    draws = jnp.array([0.0, 0.39, 0.41, 0.65, 0.71, 0.91, 1 - 2**-23])
    assert formulas.inverse_cdf(probabilities_BV, draws).tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_inverse_cdf_never_takes_a_token_of_probability_zero():
    """A parallel cumulative sum rises and falls by a rounding at tokens that add nothing; no draw
    may land there."""
    vocab = 50_257
    rng = np.random.default_rng(0)
    row = np.full(vocab, -INF, np.float32)
    row[rng.choice(vocab, 40, replace=False)] = rng.normal(size=40)
    probabilities_V = jax.nn.softmax(row)
    cumulative_V = np.asarray(jnp.cumsum(probabilities_V))
    draws_R = np.unique(cumulative_V / cumulative_V[-1])
    draws_R = draws_R[draws_R < 1]
    draw = jax.jit(jax.vmap(lambda uniform: formulas.inverse_cdf(probabilities_V[None], uniform[None])[0]))
    tokens_R = np.asarray(draw(draws_R))
    assert (np.asarray(probabilities_V)[tokens_R] > 0).all()
    assert np.isin(np.flatnonzero(row > -INF), [*tokens_R, tokens_R.max()]).mean() > 0.9
    assert formulas.inverse_cdf(jnp.array([[0.0, 0.5, 0.0, 0.5, 0.0]] * 3), jnp.array([0.0, 0.5, 0.99])).tolist() == [
        1, 3, 3]


NUM_DRAWS = 20_000
KEYS = jax.random.split(jax.random.key(7), NUM_DRAWS)


def draw_many(row: np.ndarray, sampling: Sampling, num_new: int = 3) -> np.ndarray:
    logits_BV = jnp.tile(jnp.asarray(row), (NUM_DRAWS, 1))
    empty_BS = jnp.zeros((NUM_DRAWS, 1), jnp.int32)
    history = History(empty_BS, empty_BS != 0, jnp.int32(num_new))
    token_B, can_draw_B = jax.jit(logits.sample)(logits_BV, history, KEYS, Settings.of(sampling, len(row)))
    assert can_draw_B.all()
    return np.asarray(token_B)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.6), Sampling(temperature=2.5, top_k=4),
                                      Sampling(top_p=0.9, bias={2: 1.5}), Sampling(banned=[0, 6])], ids=str)
def test_draws_follow_the_probabilities(sampling):
    """Chi-square of 20,000 draws against softmax(x / T) of the tokens kept."""
    row = np.array([1.0, 0.5, -2.0, 0.0, 1.5, -0.5, 0.2], np.float32)
    expected = row.astype(np.float64)
    for token, bias in sampling.bias.items():
        expected[token] += bias
    expected[list(sampling.banned)] = -INF
    expected /= sampling.temperature
    if sampling.top_k:
        expected = expected_top_k(expected, sampling.top_k)
    expected = softmax(expected_top_p(expected, sampling.top_p)) * NUM_DRAWS
    observed = np.bincount(draw_many(row, sampling), minlength=len(row))
    possible = expected > 0
    assert observed[~possible].sum() == 0
    statistic = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    assert statistic < scipy.stats.chi2.ppf(0.999, possible.sum() - 1)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-37, 1e-42, 1e-60])
def test_temperature_towards_zero_is_argmax(temperature):
    row = np.array([1.0, 3.5, -2.0, 80.0, 79.5, 0.0, 1.0], np.float32)
    assert (draw_many(row, Sampling(temperature=temperature, banned=[2])) == 3).all()


@pytest.mark.parametrize("num_new", [0, 5])
def test_a_row_is_drawn_by_its_own_key_and_the_number_of_the_token(num_new):
    uniforms_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, num_new)))(KEYS)
    np.testing.assert_array_equal(draw_many(np.zeros(7, np.float32), Sampling(), num_new), np.floor(uniforms_B * 7))


@pytest.mark.parametrize(("wrong", "words"), [
    (dict(temperature=-0.1), "temperature=-0.1"), (dict(temperature=INF), "temperature=inf"),
    (dict(temperature=math.nan), "temperature=nan"), (dict(top_k=-1), "top_k=-1"), (dict(top_k=2.5), "whole number"),
    (dict(top_p=0.0), r"top_p=0.0 must be in \(0, 1\]"), (dict(top_p=1.1), "top_p=1.1"), (dict(min_p=-0.1), "min_p"),
    (dict(min_p=1.5), r"\[0, 1\]"), (dict(typical_p=0), "typical_p=0"), (dict(repetition_penalty=0.0), "positive"),
    (dict(repetition_penalty=INF), "repetition_penalty"), (dict(no_repeat_ngram=-2), "no_repeat_ngram=-2"),
    (dict(min_new_tokens=-1), "min_new_tokens=-1"), (dict(bias={1: math.nan}), "bias"), (dict(bias={1: INF}), "bias"),
], ids=str)
def test_settings_out_of_range_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**wrong)


def test_tokens_out_of_range_and_nothing_left_are_refused():
    for sampling, ends, words in [
            (Sampling(banned=[-1]), (), "banned: token id -1 is outside the vocabulary of 4"),
            (Sampling(bias={4: 1.0}), (), "bias: token id 4"), (Sampling(), [9], "end_ids: token id 9"),
            (Sampling(banned=range(4)), (), "none of 4 tokens"),
            (Sampling(banned=[0, 1, 2], min_new_tokens=1), [3], "before min_new_tokens")]:
        with pytest.raises(ValueError, match=words):
            Settings.of(sampling, 4, ends)
    assert Settings.of(Sampling(banned=[0, 1, 2]), 4, [3]).ends_V.tolist() == [False, False, False, True]
