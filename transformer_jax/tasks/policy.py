"""Reinforcement learning: a policy learns from rewards of its own answers, by PPO or GRPO."""

from __future__ import annotations

import hashlib
import importlib
import pathlib
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np

from transformer_jax.alignment.experience import Experience
from transformer_jax.alignment.ppo import grpo_loss, ppo_loss, with_value_head
from transformer_jax.alignment.rollouts import Reward, excluded_ids
from transformer_jax.config import ExperimentConfig
from transformer_jax.data import Conversation, encode_prompt, read_prompts
from transformer_jax.data.conversations import AnyTokenizer
from transformer_jax.data.examples import as_question
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.heads import RewardModel
from transformer_jax.tasks.answering import AnsweringTask, answering
from transformer_jax.tasks.task_data import TaskData
from transformer_jax.training.bundle import Bundle, load
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.step import Batch, Sums


class PolicyLearning(AnsweringTask):
    """Reinforcement learning from prompts and a reward (Schulman et al., 2017; Shao et al., 2024).
    The reference model is the model that training starts from.

    Args:
      config: The config of the run. ``config.rl`` selects the algorithm and the reward.
      reward: A reward model, or a function from texts to numbers. ``None`` means
        ``config.rl.reward``.
      **options: Further arguments of ``Task``.
    """

    name = "policy"
    shows_base = True
    examples = "prompts"
    read_file = staticmethod(read_prompts)
    read_example = staticmethod(as_question)

    def __init__(self, config: ExperimentConfig, *, reward: Reward | None = None, **options: Any):
        super().__init__(config, **options)
        self._reward = reward
        self._excluded_V: np.ndarray | None = None

    def start_from(self, base: Bundle) -> Bundle:
        """Makes the policy from the base; for PPO it also has a value head."""
        model, tokenizer = answering(base)
        if self.config.rl.algorithm == "ppo":
            model = with_value_head(model, key=jax.random.key(self.config.seed))
        return Bundle(model=model, tokenizer=tokenizer, config=model.config, files=base.files)

    def prepare(self, examples: Sequence[Conversation], held_out: Sequence[Conversation], tokenizer: AnyTokenizer,
                cache_dir: pathlib.Path) -> TaskData:
        """Encodes the prompts. The batches come later: the policy generates answers during
        training."""
        reference, _ = answering(self.base)
        reward = load_reward(self.config.rl.reward, tokenizer) if self._reward is None else self._reward
        encoded = [encode_prompt(prompt, tokenizer) for prompt in examples]
        held_out_encoded = [encode_prompt(prompt, tokenizer) for prompt in held_out][:self.config.eval.batch_size]
        experience = Experience(self.config, encoded, held_out_encoded, reference=reference, reward=reward,
                                tokenizer=tokenizer)
        self._excluded_V = excluded_ids(reference.config, tokenizer)
        contents = [hashlib.sha256(repr((encoded, held_out_encoded)).encode()).hexdigest()]
        if isinstance(reward, RewardModel):
            contents.append(tree_digest(reward))
        return TaskData(train=experience, contents=contents, follow=experience.follow,
                        summary=f"{len(encoded):,} prompts, {len(held_out_encoded):,} held out",
                        shown=self.shown_prompts(held_out, tokenizer))

    def loss(self, model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the clipped surrogate loss of PPO, or the loss of GRPO."""
        make_loss = ppo_loss if self.config.rl.algorithm == "ppo" else grpo_loss
        return make_loss(self.config.rl, self._excluded_V)(model, batch, key)

    def evaluate(self, model: Decoder, data: TaskData) -> dict[str, float]:
        """Generates answers to the held-out prompts, and returns their mean reward, their KL
        divergence from the reference, and their mean length."""
        means = cast(Experience, data.train).measure(model)
        return {"validation_loss": -means["reward"]} | {f"validation_{name}": mean for name, mean in means.items()}

    def next_command(self, workdir: str) -> str:
        """Returns the command that compares the policy with the model that it started from."""
        return f"transformer-jax evaluate --compare BASE {workdir} --data=PROMPTS --judge=JUDGE"


def load_reward(reward: str | None, tokenizer: AnyTokenizer) -> Reward:
    """Loads a reward: a reward model, or a function of a Python module.

    Args:
      reward: The workdir of a reward model, whose best checkpoint is taken where there is one; a
        directory that ``tj.save`` wrote; or ``module:function``.
      tokenizer: The tokenizer of the policy, which a reward model must share.

    Returns:
      The reward model, or the function.

    Raises:
      ValueError: If no reward is given, the module has no such function, the workdir holds another
        kind of model, or the reward model has another tokenizer.
    """
    if reward is None:
        raise ValueError("no reward is given; set --config.rl.reward to the workdir of a reward model, or to "
                         "module:function")
    module, colon, name = reward.partition(":")
    if colon and not pathlib.Path(reward).exists():
        function = getattr(importlib.import_module(module), name, None)
        if not callable(function):
            raise ValueError(f"rl.reward={reward!r}: the module {module} has no function {name!r}")
        return cast(Reward, function)
    bundle = load(reward, step="best" if pathlib.Path(reward, "best").is_dir() else None)
    if not isinstance(bundle.model, RewardModel):
        raise ValueError(f"rl.reward={reward!r} holds a model of family {bundle.config.family}; expected a reward "
                         "model, which transformer-jax reward trains")
    if bundle.tokenizer is None or bundle.tokenizer.digest != tokenizer.digest:
        raise ValueError(f"rl.reward={reward!r} has a different tokenizer from the policy; train the reward model "
                         "from the same base as the policy")
    return bundle.model
