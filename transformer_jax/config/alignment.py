"""Settings of the methods that train a model on preferences and rewards."""

from __future__ import annotations

import dataclasses

from transformer_jax.config.ranges import check_fields
from transformer_jax.settings import check_choice, require


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Settings of direct preference optimization (Rafailov et al., 2023).

    Attributes:
      beta: The factor that converts a log-probability ratio, in nats, into a reward. A higher value
        keeps the policy closer to the reference model.
    """

    beta: float = 0.1

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class ReinforcementConfig:
    """Settings of reinforcement learning for a policy that responds to prompts.

    In each rollout the policy writes responses to a set of prompts. In each epoch the trainer goes
    through all responses of the rollout once, in minibatches of ``batch_size``.

    Attributes:
      algorithm: ``ppo`` or ``grpo``. In PPO a value head estimates the expected reward. GRPO
        compares each response with the other responses to the same prompt.
      reward: The reward function: the workdir of a reward model, or ``module:function``, where the
        function maps texts to numbers.
      num_prompts: Number of prompts in a rollout.
      num_samples: Number of responses to each prompt.
      max_new_tokens: The longest response, in tokens.
      min_length: The length below which a response is penalized, in tokens. The penalty grows with
        the fraction of tokens that is missing. It prevents the policy from writing shorter and
        shorter responses for a reward model that prefers short ones.
      epochs: Number of passes over each rollout.
      clip: The clipping range of PPO: probability ratios gain nothing outside ``[1 - clip, 1 +
        clip]``.
      value_clip: The clipping range of the value loss, in units of reward.
      value_coefficient: Weight of the value loss.
      entropy_coefficient: Weight of the entropy bonus.
      discount: The discount factor gamma for the reward of the next token.
      trace_decay: The parameter lambda of generalized advantage estimation.
      kl_coefficient: The penalty, in units of reward, for each nat of KL divergence from the
        initial model.
      kl_target: The desired KL divergence, in nats for each response; ``kl_coefficient`` is adapted
        to reach it. ``None`` keeps ``kl_coefficient`` constant.
      max_step_kl: Training stops using a rollout, and draws the next one, when the policy differs
        from the policy that drew the rollout by more than this KL divergence, in nats for each
        token. ``None`` disables this check.
    """

    algorithm: str = "ppo"
    reward: str | None = None
    num_prompts: int = 64
    num_samples: int = 1
    max_new_tokens: int = 48
    min_length: int = 0
    epochs: int = 4
    clip: float = 0.2
    value_clip: float = 0.2
    value_coefficient: float = 0.1
    entropy_coefficient: float = 0.0
    discount: float = 1.0
    trace_decay: float = 0.95
    kl_coefficient: float = 0.05
    kl_target: float | None = None
    max_step_kl: float | None = None

    def __post_init__(self):
        check_fields(self)
        check_choice(self, "algorithm", ("ppo", "grpo"))
        require(self.algorithm == "ppo" or self.num_samples > 1,
                "rl.algorithm='grpo' compares the responses to a prompt: rl.num_samples must be at least 2")
        require(0 <= self.min_length <= self.max_new_tokens,
                f"rl.min_length={self.min_length} must be from 0 to rl.max_new_tokens={self.max_new_tokens}")
