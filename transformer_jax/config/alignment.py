"""How a model learns from preferences and rewards."""

from __future__ import annotations

import dataclasses

from transformer_jax.settings import check_choice, check_positive, require


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Direct preference optimisation (Rafailov et al., 2023).

    Attributes:
      beta: the reward of a nat, and so the strength of the pull towards the reference model.
    """

    beta: float = 0.1

    def __post_init__(self):
        require(self.beta > 0, f"dpo.beta={self.beta} must be positive")


@dataclasses.dataclass(frozen=True)
class ReinforcementConfig:
    """Reinforcement learning of a policy that responds to prompts.

    A rollout is responses to some prompts; each epoch goes through them once in minibatches of
    ``batch_size``.

    Attributes:
      algorithm: ``ppo`` (a value head tells what was to be expected) or ``grpo`` (the other
        responses to a prompt do).
      reward: the workdir of a reward model, or ``module:function`` from texts to numbers.
      num_prompts: of a rollout.
      num_samples: responses to each prompt.
      max_new_tokens: longest response.
      min_length: a response of fewer tokens loses as much reward as the share of them that it
        lacks, so that a reward model that likes few words is not served with fewer and fewer.
      epochs: how often a rollout is gone through.
      clip: how far from 1 the ratio of the probabilities now and then still gains.
      value_clip: likewise for values, in units of reward.
      value_coefficient: weight of the value loss.
      entropy_coefficient: weight of the entropy bonus.
      discount: of the reward of the next token; gamma.
      trace_decay: lambda of generalised advantage estimation.
      kl_coefficient: reward lost by a nat of distance from the model that training began with.
      kl_target: change ``kl_coefficient`` so that the distance comes to so many nats a response;
        ``None``: keep it.
      max_step_kl: leave a rollout for the next when the policy is so many nats a token away from
        that which drew it; ``None``: never.
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
        check_choice(self, "algorithm", ("ppo", "grpo"))
        check_positive(self, "num_prompts", "num_samples", "max_new_tokens", "epochs")
        require(self.algorithm == "ppo" or self.num_samples > 1,
                "rl.algorithm='grpo' compares the responses to a prompt: rl.num_samples must be at least 2")
        require(0 <= self.min_length <= self.max_new_tokens,
                f"rl.min_length={self.min_length} must be from 0 to rl.max_new_tokens={self.max_new_tokens}")
        for field in ("clip", "value_clip", "kl_target", "max_step_kl"):
            value = getattr(self, field)
            require(value is None or value > 0, f"rl.{field}={value} must be positive")
        for field in ("value_coefficient", "entropy_coefficient", "kl_coefficient"):
            require(getattr(self, field) >= 0, f"rl.{field}={getattr(self, field)} must not be negative")
        for field in ("discount", "trace_decay"):
            require(0 <= getattr(self, field) <= 1, f"rl.{field}={getattr(self, field)} must be in [0, 1]")
