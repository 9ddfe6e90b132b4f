"""Rewards, advantages and returns, against a plain re-derivation in float64 on hand-made
rollouts."""

import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.alignment.advantages import (
    adapted_kl_coefficient,
    explained_variance,
    generalized_advantages,
    group_advantages,
    masked_mean,
    token_rewards,
    whiten,
)

LENGTHS = (5, 3, 1, 5)  # four responses of at most 5 tokens: two are full, one is short, one has 1 token
B, R = len(LENGTHS), 5
MASK = np.arange(R) < np.array(LENGTHS)[:, None]
RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=B)
# Values outside the mask must not matter: they are large, and the log-probabilities there are NaN.
LOGPROBS = np.where(MASK, -RNG.exponential(size=(B, R)), np.nan)
REFERENCE = np.where(MASK, -RNG.exponential(size=(B, R)), np.nan)
VALUES = np.where(MASK, RNG.normal(size=(B, R)), 1e6)


def rewards_of(row, coefficient):
    """The rewards of one response, token by token."""
    rewards = [coefficient * (REFERENCE[row, t] - LOGPROBS[row, t]) for t in range(LENGTHS[row])]
    rewards[-1] += SCORES[row]
    return rewards


def advantages_of(rewards, values, discount, trace_decay):
    """The sum over all later temporal differences, written out."""
    length = len(rewards)
    deltas = [rewards[t] + (discount * values[t + 1] if t + 1 < length else 0.0) - values[t] for t in range(length)]
    return [sum((discount * trace_decay) ** (later - t) * deltas[later] for later in range(t, length))
            for t in range(length)]


def padded(rows):
    return np.array([[*row, *[0.0] * (R - len(row))] for row in rows])


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_the_penalty_is_for_every_token_and_the_score_for_the_last(coefficient):
    found = token_rewards(jnp.float32(SCORES), jnp.float32(LOGPROBS), jnp.float32(REFERENCE), jnp.array(MASK),
                          coefficient)
    np.testing.assert_allclose(found, padded([rewards_of(row, coefficient) for row in range(B)]), atol=1e-6)


@pytest.mark.parametrize(("discount", "trace_decay"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_generalized_advantages(discount, trace_decay):
    rewards = [rewards_of(row, 0.3) for row in range(B)]
    values = [VALUES[row, :LENGTHS[row]] for row in range(B)]
    expected = padded([advantages_of(*row, discount, trace_decay) for row in zip(rewards, values, strict=True)])
    advantages, returns = generalized_advantages(
        jnp.float32(padded(rewards)), jnp.float32(VALUES), jnp.array(MASK), discount=discount, trace_decay=trace_decay)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, expected + np.where(MASK, VALUES, 0), rtol=1e-5, atol=1e-6)
    if discount == trace_decay == 1.0:  # then the return is the sum of the rewards to come
        to_come = padded([np.cumsum(row[::-1])[::-1] for row in rewards])
        np.testing.assert_allclose(returns, to_come, rtol=1e-5, atol=1e-6)


def test_whitening_looks_at_the_mask_only():
    x = np.where(MASK, RNG.normal(3.0, 5.0, size=(B, R)), 1e6)
    found = np.asarray(whiten(jnp.float32(x), jnp.array(MASK)))
    inside = x[MASK]
    np.testing.assert_allclose(found[MASK], (inside - inside.mean()) / inside.std(), rtol=1e-5, atol=1e-6)
    assert not found[~MASK].any()
    assert not np.asarray(whiten(jnp.full((2, 3), 4.0), jnp.ones((2, 3), bool))).any()  # all equal: no preference


def test_group_advantages():
    scores = np.array([1.0, 2.0, 6.0, -1.0, -1.0, -1.0])
    first = scores[:3]
    found = group_advantages(jnp.float32(scores), 3)
    np.testing.assert_allclose(found[:3], (first - first.mean()) / first.std(), rtol=1e-5)
    assert not np.asarray(found[3:]).any()


def test_masked_mean_of_nothing_is_zero():
    assert float(masked_mean(jnp.array([jnp.nan, 1.0]), jnp.array([False, False]))) == 0.0


def test_explained_variance():
    returns = RNG.normal(size=(B, R))
    values = returns + 0.5 * RNG.normal(size=(B, R))
    expected = 1 - (returns - values)[MASK].var() / returns[MASK].var()
    found = explained_variance(jnp.float32(np.where(MASK, values, 1e6)), jnp.float32(returns), jnp.array(MASK))
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(explained_variance(jnp.float32(returns), jnp.float32(returns), jnp.array(MASK))) == 1.0


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (12.0, 1.02), (5.4, 0.99), (0.0, 0.98)])
def test_the_coefficient_follows_its_target(kl, factor):
    """Ziegler et al. (2019): the error is clipped to 0.2, and the coefficient changes by a tenth of
    it."""
    assert adapted_kl_coefficient(0.2, kl, target=6.0) == pytest.approx(0.2 * factor)
