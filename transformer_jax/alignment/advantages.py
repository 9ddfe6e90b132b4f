"""From rewards to advantages: the KL leash, generalised advantage estimation, whitening; all
masked.

Arrays are ``[B, R]``: the R places of each response, of which a boolean mask tells those that hold
a token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of the entries where the mask is True; 0 where there is none."""
    return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def token_rewards(scores_B: jax.Array, logprobs_BR: jax.Array, reference_logprobs_BR: jax.Array, mask_BR: jax.Array,
                  kl_coefficient: jax.Array | float) -> jax.Array:
    """The reward of every token: minus the penalty for leaving the reference, and at the last one
    the score.

    Source: Ziegler et al. (2019), section 2.

    Args:
      scores_B: the reward of each response.
      logprobs_BR: log P of the tokens under the policy that drew them, in nats.
      reference_logprobs_BR: log P under the reference.
      mask_BR: True for the tokens of the response, which are contiguous from the first place on.
      kl_coefficient: reward a nat.

    Returns:
      float32 ``[B, R]``, 0 outside the mask.
    """
    last_BR = mask_BR & ~jnp.pad(mask_BR[:, 1:], ((0, 0), (0, 1)))
    penalties_BR = kl_coefficient * (logprobs_BR - reference_logprobs_BR)
    return jnp.where(mask_BR, jnp.where(last_BR, scores_B[:, None], 0.0) - penalties_BR, 0.0)


def generalized_advantages(rewards_BR: jax.Array, values_BR: jax.Array, mask_BR: jax.Array, *, discount: float = 1.0,
                           trace_decay: float = 0.95) -> tuple[jax.Array, jax.Array]:
    """Advantages and returns of every token; nothing is worth anything after the last one.

    Source: Schulman et al. (2016), "High-dimensional continuous control using generalized advantage
      estimation".

    Args:
      rewards_BR: of each token.
      values_BR: what the critic expected before each token was drawn.
      mask_BR: True for the tokens of the response, contiguous from the first place on.
      discount: gamma.
      trace_decay: lambda; 1 is the return minus the value, 0 the one-step temporal difference.

    Returns:
      Advantages, and returns (advantage plus value), float32 ``[B, R]``, 0 outside the mask.
    """
    values_BR = jnp.where(mask_BR, values_BR, 0.0)
    following_BR = jnp.pad(values_BR[:, 1:], ((0, 0), (0, 1)))
    deltas_BR = jnp.where(mask_BR, rewards_BR + discount * following_BR - values_BR, 0.0)

    def back(after_B: jax.Array, delta_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        advantage_B = delta_B + discount * trace_decay * after_B
        return advantage_B, advantage_B

    _, advantages_RB = jax.lax.scan(back, jnp.zeros_like(deltas_BR[:, 0]), deltas_BR.T, reverse=True)
    advantages_BR = jnp.where(mask_BR, advantages_RB.T, 0.0)
    return advantages_BR, advantages_BR + values_BR


def whiten(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean 0 and standard deviation 1 over the entries where the mask is True; 0 elsewhere."""
    centered = x - masked_mean(x, mask)
    return jnp.where(mask, centered * jax.lax.rsqrt(masked_mean(centered**2, mask) + 1e-8), 0.0)


def group_advantages(scores_B: jax.Array, group_size: int) -> jax.Array:
    """How many standard deviations each response is better than the others to its prompt: no value
    model needed.

    Source: Shao et al. (2024), DeepSeekMath (GRPO), section 4.1.

    Args:
      scores_B: the responses to one prompt are neighbours.
      group_size: responses a prompt.

    Returns:
      float32 ``[B]``; 0 in a group whose scores are all equal.
    """
    scores_PG = scores_B.reshape(-1, group_size)
    centered_PG = scores_PG - scores_PG.mean(1, keepdims=True)
    return (centered_PG / (centered_PG.std(1, keepdims=True) + 1e-6)).reshape(-1)


def explained_variance(values_BR: jax.Array, returns_BR: jax.Array, mask_BR: jax.Array) -> jax.Array:
    """The fraction of the returns' variance that the values foresaw: 1 is all, 0 none, negative
    worse than none."""
    def variance(x: jax.Array) -> jax.Array:
        return masked_mean((x - masked_mean(x, mask_BR)) ** 2, mask_BR)

    return 1.0 - variance(returns_BR - values_BR) / jnp.maximum(variance(returns_BR), 1e-8)


def adapted_kl_coefficient(coefficient: float, kl: float, target: float, rate: float = 0.1) -> float:
    """The coefficient for the next rollout: higher when the KL was above its target, lower when
    below.

    Source: Ziegler et al. (2019), section 2.2, with K = ``rate``.

    Args:
      coefficient: of the last rollout.
      kl: its mean KL to the reference, in nats a response.
      target: the KL wanted.
      rate: the largest change is a fifth of it.
    """
    return coefficient * (1.0 + rate * min(max(kl / target - 1.0, -0.2), 0.2))
