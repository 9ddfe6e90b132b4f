"""Methods that turn a base model into an assistant: reward models, reinforcement learning, direct
preference optimisation, and the comparison of models by a judge."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.alignment.advantages import generalized_advantages, group_advantages, token_rewards, whiten
    from transformer_jax.alignment.bag_of_words import BagOfWords
    from transformer_jax.alignment.dpo import dpo_loss, response_logprobs, with_reference
    from transformer_jax.alignment.experience import Experience
    from transformer_jax.alignment.judging import distinct_n, elo_ratings, win_rate
    from transformer_jax.alignment.ppo import (
        clipped_policy_loss,
        clipped_value_loss,
        grpo_loss,
        kl_estimate,
        ppo_loss,
        with_value_head,
    )
    from transformer_jax.alignment.rankings import Rankings
    from transformer_jax.alignment.reward import expected_calibration_error, ranking_loss, reward_loss
    from transformer_jax.alignment.rollouts import Rollout, collect
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "BagOfWords", "Experience", "Rankings", "Rollout", "clipped_policy_loss", "clipped_value_loss", "collect",
    "distinct_n", "dpo_loss", "elo_ratings", "expected_calibration_error", "generalized_advantages",
    "group_advantages", "grpo_loss", "kl_estimate", "ppo_loss", "ranking_loss", "response_logprobs", "reward_loss",
    "token_rewards", "whiten", "win_rate", "with_reference", "with_value_head",
]
