"""Reinforcement learning: a policy learns from rewards of its own answers, by PPO or GRPO."""

from __future__ import annotations

import hashlib
import importlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from transformer_jax.alignment.experience import Experience
from transformer_jax.alignment.ppo import grpo_loss, ppo_loss, with_value_head
from transformer_jax.alignment.rollout import Reward
from transformer_jax.data import Conversation, Tokenizer, encode_prompt, read_prompts
from transformer_jax.models.decoder import Decoder
from transformer_jax.tasks.answering import AnsweringTask, check_can_answer
from transformer_jax.tasks.base import TaskData
from transformer_jax.training.bundle import Bundle, load
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.step import Batch, Sums


class PolicyLearning(AnsweringTask):
    """Prompts and a reward; the reference is the model to start from (Schulman et al., 2017; Shao
    et al., 2024).

    Args:
      config: its ``rl`` says which algorithm, and which reward.
      reward: a reward model or a function from texts to numbers, in place of ``config.rl.reward``.
      **options: see :class:`Task`.
    """

    name = "policy"
    shows_base = True
    examples = "prompts"
    read_file = staticmethod(read_prompts)

    def __init__(self, config, *, reward: Reward | None = None, **options: Any):
        super().__init__(config, **options)
        self._reward = reward

    def start_from(self, base: Bundle) -> Bundle:
        """The base as a policy, with a value head for PPO."""
        check_can_answer(base)
        model = base.model
        if self.config.rl.algorithm == "ppo":
            model = with_value_head(model, key=jax.random.key(self.config.seed))
        return Bundle(model=model, tokenizer=base.tokenizer, config=model.config)

    def prepare(self, examples: Sequence[Conversation], held_out: Sequence[Conversation], tokenizer: Tokenizer,
                cache_dir: pathlib.Path) -> TaskData:
        """Encodes the prompts; batches are drawn by the policy while it learns."""
        reward = load_reward(self.config.rl.reward, tokenizer) if self._reward is None else self._reward
        encoded = [encode_prompt(prompt, tokenizer) for prompt in examples]
        asked = [encode_prompt(prompt, tokenizer) for prompt in held_out][:self.config.eval.batch_size]
        experience = Experience(self.config, encoded, asked, reference=self.base.model, reward=reward,
                                tokenizer=tokenizer)
        contents = [hashlib.sha256(repr((encoded, asked)).encode()).hexdigest()]
        if hasattr(reward, "rewards"):
            contents.append(tree_digest(reward))
        return TaskData(train=experience, contents=contents, follow=experience.follow,
                        summary=f"{len(encoded):,} prompts, {len(asked):,} held out",
                        shown=self.shown_prompts(held_out, tokenizer))

    def loss(self, model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """The clipped surrogate loss of PPO, or that of GRPO."""
        make_loss = ppo_loss if self.config.rl.algorithm == "ppo" else grpo_loss
        return make_loss(self.config.rl)(model, batch, key)

    def evaluate(self, model: Decoder, data: TaskData) -> dict[str, float]:
        """Mean reward, KL to the reference and length of answers to the held-out prompts."""
        means = data.train.measure(model)
        return {"validation_loss": -means["reward"]} | {f"validation_{name}": mean for name, mean in means.items()}

    def next_command(self, workdir: str) -> str:
        """Compare the policy with the model that it started from."""
        return f"transformer-jax evaluate --compare BASE {workdir} --data=PROMPTS --judge=JUDGE"


def load_reward(reward: str | None, tokenizer: Tokenizer) -> Reward:
    """The reward model of a workdir, or the function ``module:function``.

    Raises:
      ValueError: for neither, or a reward model with another tokenizer.
    """
    if reward is None:
        raise ValueError("say what is rewarded: --config.rl.reward=WORKDIR of experiments.reward, or module:function")
    module, colon, name = reward.partition(":")
    if colon and not pathlib.Path(reward).exists():
        function = getattr(importlib.import_module(module), name, None)
        if not callable(function):
            raise ValueError(f"rl.reward={reward!r}: the module {module} has no function {name!r}")
        return function
    bundle = load(reward, step="best")
    if bundle.config.family != "reward":
        raise ValueError(f"rl.reward={reward!r} holds a model of family {bundle.config.family}, not a reward model")
    if bundle.tokenizer is None or bundle.tokenizer.digest != tokenizer.digest:
        raise ValueError(f"rl.reward={reward!r} has another tokenizer than the policy; train it from the same base")
    return bundle.model
