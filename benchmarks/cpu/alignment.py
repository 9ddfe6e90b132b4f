"""The benchmark of reinforcement learning; run by ``python -m benchmarks rl``."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

import transformer_jax as tj
from benchmarks.peers.trl import grpo_training
from benchmarks.timing import OtherProcess, take_turns
from transformer_jax.alignment.experience import Experience
from transformer_jax.alignment.ppo import grpo_loss, ppo_loss, with_value_head
from transformer_jax.config import OptimConfig, ReinforcementConfig
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_train_step

_WORDS = [f"w{number}" for number in range(3900)]
_PROMPT_WORDS, _NUM_PROMPTS = 8, 256
_RL = ReinforcementConfig(algorithm="grpo", num_prompts=8, num_samples=8, max_new_tokens=48, epochs=4,
                          kl_coefficient=0.05)
_CONFIG = tj.ExperimentConfig(
    batch_size=32, rl=_RL, optim=OptimConfig(peak_lr=2e-4, schedule="constant", warmup_steps=0, weight_decay=0.0))
_GPT2 = tj.presets.get("gpt2-small").replace(vocab_size=None, max_len=128, num_heads=4)
_SHAPES = {"2 layers x 64": _GPT2.replace(num_layers=2, model_dim=64, unroll=2),
           "4 layers x 256": _GPT2.replace(num_layers=4, model_dim=256, unroll=4)}


def share_of_sevens(texts: list[str]) -> list[float]:
    """Returns the reward of each text: the fraction of its words that end in 7."""
    return [float(np.mean([word.endswith("7") for word in text.split()] or [0.0])) for text in texts]


def rl(rounds: int) -> list[dict]:
    """Measures the updates per hour of GRPO and of PPO, compared with TRL's GRPO. The time includes
    the generation of responses and the computation of their rewards.

    All sides use a policy with random weights, and rollouts of 64 responses of at most 48 tokens to
    prompts of 8 words. Each rollout is used for 4 epochs of minibatches of 32. A round is a rollout
    and its 8 updates.
    """
    tokenizer = tj.Tokenizer.train([" ".join(_WORDS)], kind="word")
    rng = np.random.default_rng(0)
    prompts = [" ".join(rng.choice(_WORDS, _PROMPT_WORDS)) for _ in range(_NUM_PROMPTS)]
    spare = [f"<{number}>" for number in range(tokenizer.vocab_size - len(_WORDS))]  # three of them are special
    rows = []
    for shape, model in _SHAPES.items():
        config = _CONFIG.replace(model=model.replace(vocab_size=tokenizer.vocab_size))
        theirs = OtherProcess(grpo_training, config, [*spare, *_WORDS], prompts, share_of_sevens)
        lengths: dict[str, float] = {}

        def run_theirs(theirs=theirs, lengths=lengths):
            lengths["TRL GRPO"] = theirs()

        medians = take_turns({"GRPO": _side(config, tokenizer, prompts, lengths, "GRPO"),
                              "PPO": _side(_with_critic(config), tokenizer, prompts, lengths, "PPO"),
                              "TRL GRPO": run_theirs}, rounds)
        theirs.close()
        updates = _RL.epochs * _RL.num_prompts * _RL.num_samples // config.batch_size
        rows += [{"shape": shape, "side": side, "updates/h": 3600 * updates / seconds, "seconds/rollout": seconds,
                  "ratio": medians["TRL GRPO"] / seconds, "response length": lengths[side]}
                 for side, seconds in medians.items()]
    return rows


def _with_critic(config: tj.ExperimentConfig) -> tj.ExperimentConfig:
    """Returns the config for PPO, with one response to each of the same number of prompts."""
    settings = dataclasses.replace(config.rl, algorithm="ppo", num_prompts=_RL.num_prompts * _RL.num_samples,
                                   num_samples=1)
    return config.replace(rl=settings)


def _side(config: tj.ExperimentConfig, tokenizer: tj.Tokenizer, prompts: list[str], lengths: dict[str, float],
          name: str):
    """Returns a function that generates a rollout and makes its updates."""
    ppo = config.rl.algorithm == "ppo"
    reference = tj.Decoder(config.model, key=jax.random.key(config.seed))
    policy = with_value_head(reference, key=jax.random.key(1)) if ppo else reference
    optimizer = make_optimizer(config.optim, 10**6)
    step = make_train_step((ppo_loss if ppo else grpo_loss)(config.rl), optimizer)
    state = init_state(lambda key: jax.tree.map(jax.numpy.copy, policy), optimizer, jax.random.key(0))
    experience = Experience(config, [tokenizer.encode(prompt) for prompt in prompts], reference=reference,
                            reward=share_of_sevens, tokenizer=tokenizer)
    updates = config.rl.epochs * config.rl.num_prompts * config.rl.num_samples // config.batch_size

    def turn():
        nonlocal state
        metrics = None
        for _ in range(updates):
            means = experience.follow(state.params, metrics)
            lengths[name] = means.get("response_length", lengths.get(name))
            state, metrics = step(state, next(experience))
        jax.block_until_ready(metrics)

    return turn
