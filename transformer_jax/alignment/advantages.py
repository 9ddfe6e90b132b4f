"""Compute advantages from rewards: the KL penalty, generalised advantage estimation, and whitening.

Arrays have the shape ``[B, R]``: B responses with R positions each. A boolean mask is True at the
positions that hold a token of the response; all functions ignore the other positions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Shaped


def masked_mean(x: Shaped[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Returns the mean of the entries where the mask is True, or 0 if there are none."""
    return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def token_rewards(scores_B: Float[Array, " B"], logprobs_BR: Float[Array, "B R"],
                  reference_logprobs_BR: Float[Array, "B R"], mask_BR: Bool[Array, "B R"],
                  kl_coefficient: Float[Array, ""] | float) -> Float[Array, "B R"]:
    """Computes the reward of every token of the responses.

    Every token is penalised for its contribution to the KL divergence from the reference model. The
    last token of a response also receives the score of the whole response.

    Source: Ziegler et al. (2019), section 2.

    Args:
      scores_B: the score of each response, ``[B]``.
      logprobs_BR: log probabilities of the tokens under the policy that sampled them, in nats.
      reference_logprobs_BR: log probabilities of the same tokens under the reference model, in
        nats.
      mask_BR: True for the tokens of the response, which are contiguous and start at the first
        position.
      kl_coefficient: weight of the KL penalty, in units of reward per nat.

    Returns:
      The rewards, float32 ``[B, R]``; 0 outside the mask.
    """
    last_BR = mask_BR & ~jnp.pad(mask_BR[:, 1:], ((0, 0), (0, 1)))
    penalties_BR = kl_coefficient * (logprobs_BR - reference_logprobs_BR)
    return jnp.where(mask_BR, jnp.where(last_BR, scores_B[:, None], 0.0) - penalties_BR, 0.0)


def generalized_advantages(rewards_BR: Float[Array, "B R"], values_BR: Float[Array, "B R"],
                           mask_BR: Bool[Array, "B R"], *, discount: float = 1.0, trace_decay: float = 0.95,
                           ) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """Computes the generalised advantage estimate and the return of every token.

    The value after the last token of a response is taken to be 0.

    Source: Schulman et al. (2016), "High-dimensional continuous control using generalized advantage
      estimation".

    Args:
      rewards_BR: the reward of each token.
      values_BR: the critic's estimate of the future reward before each token was sampled.
      mask_BR: True for the tokens of the response, which are contiguous and start at the first
        position.
      discount: the discount factor, gamma in the paper.
      trace_decay: lambda in the paper. With 1, the advantage is the return minus the value; with 0,
        it is the one-step temporal difference.

    Returns:
      The advantages and the returns (advantage plus value), each float32 ``[B, R]``; 0 outside the
      mask.
    """
    values_BR = jnp.where(mask_BR, values_BR, 0.0)
    following_BR = jnp.pad(values_BR[:, 1:], ((0, 0), (0, 1)))
    deltas_BR = jnp.where(mask_BR, rewards_BR + discount * following_BR - values_BR, 0.0)

    def step_backwards(following_advantage_B: Array, delta_B: Array) -> tuple[Array, Array]:
        advantage_B = delta_B + discount * trace_decay * following_advantage_B
        return advantage_B, advantage_B

    _, advantages_RB = jax.lax.scan(step_backwards, jnp.zeros_like(deltas_BR[:, 0]), deltas_BR.T, reverse=True)
    advantages_BR = jnp.where(mask_BR, advantages_RB.T, 0.0)
    return advantages_BR, advantages_BR + values_BR


def whiten(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Normalises entries to mean 0 and standard deviation 1.

    Args:
      x: the entries, an array of any shape.
      mask: True for the entries that count; same shape as ``x``.

    Returns:
      The normalised entries, float32, same shape as ``x``; 0 where the mask is False.
    """
    centered = x - masked_mean(x, mask)
    return jnp.where(mask, centered * jax.lax.rsqrt(masked_mean(centered**2, mask) + 1e-8), 0.0)


def group_advantages(scores_B: Float[Array, " B"], group_size: int) -> Float[Array, " B"]:
    """Computes the advantage of each response relative to the other responses to the same prompt.

    The advantage is the distance of a score from the mean of its group, in standard deviations of
    the group. It needs no value model.

    Source: Shao et al. (2024), DeepSeekMath (GRPO), section 4.1.

    Args:
      scores_B: the scores of all responses, ``[B]``; the responses to one prompt stand next to each
        other.
      group_size: number of responses per prompt; it must divide B.

    Returns:
      The advantages, float32 ``[B]``; 0 in a group whose scores are all equal.
    """
    scores_PG = scores_B.reshape(-1, group_size)
    centered_PG = scores_PG - scores_PG.mean(1, keepdims=True)
    return (centered_PG / (centered_PG.std(1, keepdims=True) + 1e-6)).reshape(-1)


def explained_variance(values_BR: Float[Array, "B R"], returns_BR: Float[Array, "B R"],
                       mask_BR: Bool[Array, "B R"]) -> Float[Array, ""]:
    """Returns the fraction of the variance of the returns that the critic's values explain.

    It is 1 for exact predictions and 0 for a constant prediction. It is negative if the values are
    worse than a constant.
    """
    def variance(x: Array) -> Array:
        return masked_mean((x - masked_mean(x, mask_BR)) ** 2, mask_BR)

    return 1.0 - variance(returns_BR - values_BR) / jnp.maximum(variance(returns_BR), 1e-8)


def adapted_kl_coefficient(coefficient: float, kl: float, target: float, rate: float = 0.1) -> float:
    """Computes the KL coefficient for the next rollout.

    The coefficient rises if the KL divergence was above its target, and falls if it was below.

    Source: Ziegler et al. (2019), section 2.2, with K = ``rate``.

    Args:
      coefficient: the coefficient of the last rollout.
      kl: the mean KL divergence of the last rollout from the reference, in nats per response.
      target: the KL divergence to aim for, in nats per response.
      rate: how fast the coefficient changes; the largest relative change is ``rate / 5``.

    Returns:
      The new coefficient.
    """
    return coefficient * (1.0 + rate * min(max(kl / target - 1.0, -0.2), 0.2))
