"""Trains a policy by rewards of its own answers: PPO, or GRPO with --config=grpo.

python -m experiments.ppo --model=SFT_WORKDIR --workdir=DIR --config.data.path=PROMPTS --config.rl.reward=REWARD_WORKDIR

The reward may also be a Python function from texts to numbers, --config.rl.reward=module:function. The reference is the
model to start from. The same command resumes a run that was stopped, also in the middle of a rollout.
"""

from __future__ import annotations

from absl import flags

import transformer_jax as tj
from experiments import answers, cli, reinforcement
from transformer_jax.data import read_prompts

_CONFIG = cli.define_config("ppo")
_MODEL = flags.DEFINE_string("model", None, "The workdir of the policy to start from, such as that of experiments.sft.")
_STEP = flags.DEFINE_string("step", None, "A step kept there, or 'best'; by default the last.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the tokenizer go.")


def main() -> None:
    config = _CONFIG()
    workdir, model = cli.required(_WORKDIR), cli.required(_MODEL)
    prompts, held_out = answers.examples(config.data, read_prompts, "prompts")
    base = tj.load(model, step=_STEP.value)
    answers.check_base(base)
    reward = reinforcement.load_reward(config.rl.reward, base.tokenizer)
    reinforcement.train(config, workdir, base, prompts, held_out, reward)
    print(f"done; next: python -m experiments.evaluate --compare {model} {workdir} --data=PROMPTS")


if __name__ == "__main__":
    cli.run(main)
