"""Rankings: their likelihood compared with a sum over all orders, accuracy, calibration,
normalisation and batches."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.alignment.rankings import Rankings
from transformer_jax.alignment.reward import (
    expected_calibration_error,
    normalized,
    pair_margins,
    ranking_loss,
    ranking_sums,
    reward_loss,
    score_rows,
)
from transformer_jax.data.conversations import Message, encode_conversation, encode_prompt
from transformer_jax.data.preferences import Comparison

SCORES = np.array([0.7, -1.2, 2.0, 0.1])


def probability(order, scores):
    """The log-probability of drawing the responses in this order, each in proportion to exp(score)
    among those that are left."""
    left, product = list(order), 1.0
    while left:
        product *= math.exp(scores[left[0]]) / sum(math.exp(scores[k]) for k in left)
        left.pop(0)
    return product


def loss_of(scores, ranks):
    return float(ranking_loss(jnp.float32(np.array([scores])), jnp.array([ranks]))[0])


def test_plackett_luce_is_a_distribution_over_all_orders():
    total = 0.0
    for order in itertools.permutations(range(4)):
        ranks = np.argsort(order) + 1
        expected = probability(order, SCORES)
        assert loss_of(SCORES, ranks) == pytest.approx(-math.log(expected), rel=1e-5)
        total += expected
    assert total == pytest.approx(1.0)


def test_two_responses_are_bradley_terry():
    assert loss_of([1.5, 0.3], [1, 2]) == pytest.approx(math.log1p(math.exp(-1.2)), rel=1e-5)


def test_ties_are_not_compared_with_each_other():
    """Best, then two equal ones, then the worst: each only against those below it."""
    def against(best, *below):
        return math.log(sum(math.exp(SCORES[k]) for k in (best, *below))) - SCORES[best]

    assert loss_of(SCORES, [2, 1, 2, 3]) == pytest.approx(against(1, 0, 2, 3) + against(0, 3) + against(2, 3), rel=1e-5)
    assert loss_of(SCORES, [1, 1, 1, 1]) == pytest.approx(0.0, abs=1e-6)
    moved = SCORES + np.array([0.0, 0.0, 0.5, 0.0])
    gradient = jax.grad(lambda x: ranking_loss(x[None], jnp.array([[1, 2, 2, 0]]))[0])(jnp.float32(moved))
    assert gradient[3] == 0.0 and gradient[0] < 0 < gradient[1] < gradient[2]


def test_missing_responses_and_ties_carry_no_weight():
    scores = jnp.float32([[1.0, 0.0, 9.0], [0.0, 1.0, 2.0], [3.0, 3.0, 9.0], [0.0, 0.0, 0.0]])
    ranks = jnp.array([[1, 2, 0], [1, 1, 1], [2, 1, 0], [0, 0, 0]])
    loss, weight, sums = ranking_sums(scores, ranks)
    assert float(weight) == 2.0
    assert float(loss) == pytest.approx(math.log1p(math.exp(-1)) + math.log(2), rel=1e-5)
    assert float(sums["accuracy"]) == 1.0 + 0.5 and float(sums["margin"]) == 1.0
    gradient = jax.grad(lambda x: ranking_sums(x, ranks)[0])(scores)
    assert np.isfinite(gradient).all() and not np.asarray(gradient[3]).any() and not np.asarray(gradient[:, 2]).any()


def test_accuracy_is_over_the_pairs_that_are_ranked():
    """Of 0 > 1, 0 > 2 and 1 = 2 the scores get one of two right."""
    _, _, sums = ranking_sums(jnp.float32([[1.0, 2.0, 0.0]]), jnp.array([[1, 2, 2]]))
    assert float(sums["accuracy"]) == 0.5 and float(sums["margin"]) == pytest.approx(0.0)
    np.testing.assert_allclose(pair_margins(np.array([[1.0, 2.0, 0.0]]), np.array([[1, 2, 2]])), [-1.0, 1.0])


def test_calibration():
    """Confidences of 0.9 that are right 9 of 10 times are calibrated; of 0.6 that are always right,
    off by 0.4."""
    sure, unsure = math.log(9), math.log(1.5)
    assert expected_calibration_error([sure] * 9 + [-sure]) == pytest.approx(0.0, abs=1e-9)
    assert expected_calibration_error([unsure] * 10) == pytest.approx(0.4)
    mixed = [sure] * 9 + [-sure] + [unsure] * 10
    assert expected_calibration_error(mixed) == pytest.approx(0.2)
    assert expected_calibration_error([800.0, -800.0]) == pytest.approx(0.5)


COMPARISONS = [Comparison("the cat", ("sat on a mat", "sat", "bad")),
               Comparison("good or bad", ("good", "or"), ranks=(4, 7)),
               Comparison((Message("system", "it was"), Message("user", "or")), ("mat", "cat"), ranks=(2, 2))]


@pytest.fixture(scope="module")
def rankings(tokenizer, config):
    return Rankings.build(COMPARISONS, tokenizer, config.max_len)


def test_rankings_hold_the_conversations(rankings, tokenizer):
    batch = rankings[np.array([1, 0, 2])]
    np.testing.assert_array_equal(batch["ranks"], [[1, 2, 0], [1, 2, 3], [1, 1, 0]])
    for n, comparison in zip((1, 0, 2), COMPARISONS[1::-1] + COMPARISONS[2:], strict=True):
        for k in range(3):
            row = list((1, 0, 2)).index(n)
            real = batch["segment_ids"][row, k] == 1
            if k >= len(comparison.responses):
                assert not real.any() and not batch["mask"][row, k].any()
                continue
            messages = (*comparison.prompt, Message("assistant", comparison.responses[k]))
            ids, learned = encode_conversation(messages, tokenizer)
            assert batch["tokens"][row, k, real].tolist() == ids and real[:len(ids)].all()
            assert batch["mask"][row, k, real].tolist() == learned
            assert int(real.sum() - batch["mask"][row, k].sum()) == len(encode_prompt(comparison.prompt, tokenizer))
    assert batch["tokens"].shape[2] % 8 == 0 and len(rankings) == 3


def test_only_the_last_answer_is_the_response(tokenizer):
    prompt = (Message("user", "cat"), Message("assistant", "mat"), Message("user", "or"))
    rankings = Rankings.build([Comparison(prompt, ("good", "bad"))], tokenizer, 40)
    batch = rankings[np.array([0])]
    assert tokenizer.decode(batch["tokens"][0, 0, batch["mask"][0, 0]][:-1].tolist()) == "good"


def test_evaluation_batches_fill_up_with_nothing(rankings):
    batches = rankings.batches(2)
    assert [batch["ranks"].shape for batch in batches] == [(2, 3), (2, 3)]
    assert not batches[1]["ranks"][1].any() and not batches[1]["segment_ids"][1].any()


def test_the_digest_tells_rankings_apart(rankings, tokenizer, config):
    again = Rankings.build(COMPARISONS, tokenizer, config.max_len)
    other = Rankings.build([*COMPARISONS[:2], Comparison("or", ("mat", "cat"))], tokenizer, config.max_len)
    assert again.digest == rankings.digest != other.digest


def test_bad_comparisons(tokenizer):
    with pytest.raises(ValueError, match="got no comparisons"):
        Rankings.build([], tokenizer, 40)
    with pytest.raises(ValueError, match=r"comparison 2: a response and its prompt have 48 tokens together, which is "
                                         r"more than the model's context of 40 tokens"):
        Rankings.build([COMPARISONS[0], Comparison("cat " * 10, ("good", "bad"))], tokenizer, 40)


@pytest.mark.long
def test_the_loss_of_a_reward_model(rankings, reward_model):
    """The scores of a batch equal those of each text alone."""
    batch = rankings[np.arange(3)]
    loss, weight, sums = jax.jit(reward_loss)(reward_model, batch)
    scores = np.zeros((3, 3))
    for n, k in np.ndindex(3, 3):
        ids = batch["tokens"][n, k][batch["segment_ids"][n, k] == 1]
        if len(ids):
            scores[n, k] = float(reward_model(jnp.asarray(ids)[None])[0])
    expected = (-math.log(probability([0, 1, 2], scores[0])) - math.log(probability([0, 1], scores[1])))
    assert float(weight) == 2.0 and float(loss) == pytest.approx(expected, rel=1e-4)
    right = np.mean([scores[0, 0] > scores[0, 1], scores[0, 0] > scores[0, 2], scores[0, 1] > scores[0, 2]])
    assert float(sums["accuracy"]) == pytest.approx(right + (scores[1, 0] > scores[1, 1]), rel=1e-5)


@pytest.mark.long
def test_normalisation_over_a_reference_set(rankings, reward_model):
    batch = rankings[np.arange(3)]
    tokens, segment_ids = (batch[name].reshape(9, -1)[:5] for name in ("tokens", "segment_ids"))
    scores = score_rows(reward_model, tokens, segment_ids, batch_size=2)
    alone = [float(reward_model(row[None], segment_ids_BT=ids[None])[0])
             for row, ids in zip(tokens, segment_ids, strict=True)]
    np.testing.assert_allclose(scores, alone, rtol=1e-4, atol=1e-6)
    rewards = normalized(reward_model, scores).rewards(tokens, segment_ids_BT=segment_ids)
    assert float(rewards.mean()) == pytest.approx(0, abs=1e-5) and float(rewards.std()) == pytest.approx(1, rel=1e-4)
    assert float(reward_model.std[...]) == 1.0  # the given model has not changed
    for bad in (np.array([1.0, 1.0]), np.array([1.0, np.nan])):
        with pytest.raises(ValueError, match="cannot be normalised; give scores that are finite and not all equal"):
            normalized(reward_model, bad)
