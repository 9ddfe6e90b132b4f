"""Reinforcement learning: a policy learns from rewards of its own answers, by PPO or GRPO."""

from __future__ import annotations

import functools
import hashlib
import importlib
import pathlib
from collections.abc import Sequence

import jax

from experiments import answers, runs
from transformer_jax.alignment.experience import Experience
from transformer_jax.alignment.ppo import grpo_loss, ppo_loss, with_value_head
from transformer_jax.alignment.rollout import Reward
from transformer_jax.config import ExperimentConfig
from transformer_jax.data import Conversation, Tokenizer, encode_prompt
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.heads import RewardModel
from transformer_jax.training.bundle import Bundle, load
from transformer_jax.training.checkpoint import tree_digest
from transformer_jax.training.state import TrainState

Prompts = Sequence[Conversation]


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
    if not isinstance(bundle.model, RewardModel):
        raise ValueError(f"rl.reward={reward!r} holds a model of family {bundle.config.family}, not a reward model")
    if bundle.tokenizer is None or bundle.tokenizer.digest != tokenizer.digest:
        raise ValueError(f"rl.reward={reward!r} has another tokenizer than the policy; train it from the same base")
    return bundle.model


def train(config: ExperimentConfig, workdir: str | pathlib.Path, base: Bundle, prompts: Prompts, held_out: Prompts,
          reward: Reward) -> TrainState:
    """Trains a policy, with the model that it begins as for a reference, or resumes.

    Raises:
      ValueError: for a base that cannot answer, or a reward that is none; and as
        :class:`transformer_jax.alignment.experience.Experience` and :func:`experiments.runs.run`.
    """
    answers.check_base(base)
    policy = base.model
    if config.rl.algorithm == "ppo":
        policy = with_value_head(policy, key=jax.random.key(config.seed))
    task = functools.partial(_task, prompts, held_out, base.model, reward, pathlib.Path(workdir))
    return runs.run(config, workdir, (), task,
                    Bundle(model=policy, tokenizer=base.tokenizer, config=policy.config))


def _task(prompts: Prompts, held_out: Prompts, reference: Decoder, reward: Reward, workdir: pathlib.Path,
          config: ExperimentConfig, tokenizer: Tokenizer, cache_dir: pathlib.Path) -> runs.Task:
    del cache_dir
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    asked = [encode_prompt(prompt, tokenizer) for prompt in held_out][:config.eval.batch_size]
    experience = Experience(config, encoded, asked, reference=reference, reward=reward, tokenizer=tokenizer)
    show = answers.shower(config, tokenizer, held_out, workdir)
    show(reference, 0)

    def evaluate(policy: Decoder) -> dict[str, float]:
        means = experience.measure(policy)
        return {"validation_loss": -means["reward"]} | {f"validation_{name}": mean for name, mean in means.items()}

    contents = [hashlib.sha256(repr((encoded, asked)).encode()).hexdigest()]
    if isinstance(reward, RewardModel):
        contents.append(tree_digest(reward))
    return runs.Task(
        train=experience, contents=contents, follow=experience.follow, sample=show, evaluate=evaluate,
        summary=f"{len(encoded):,} prompts, {len(asked):,} held out",
        loss_fn=(ppo_loss if config.rl.algorithm == "ppo" else grpo_loss)(config.rl))
