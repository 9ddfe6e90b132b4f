"""Trains a policy by rewards of its own answers: PPO, or GRPO with --config=grpo.

python -m experiments.ppo --model=SFT_WORKDIR --workdir=DIR --config.data.path=PROMPTS --config.rl.reward=REWARD_WORKDIR

The reward may also be a Python function from texts to numbers, --config.rl.reward=module:function.
The reference is the model to start from. The same command resumes a run that was stopped, also in
the middle of a rollout.
"""

from transformer_jax.cli.train import program

if __name__ == "__main__":
    program("ppo", task_name="policy")
