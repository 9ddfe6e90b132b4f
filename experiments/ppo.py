"""Trains a policy with rewards for its answers, by PPO or, with --config=grpo, by GRPO.

python -m experiments.ppo --model=SFT_WORKDIR --workdir=DIR --config.data.path=PROMPTS --config.rl.reward=REWARD_WORKDIR

The reward may also be a Python function from texts to numbers, --config.rl.reward=module:function.
The reference is the model that training starts from. The same command resumes a stopped run, even
if it was stopped in the middle of a rollout.
"""

from transformer_jax.cli.train import program

if __name__ == "__main__":
    program("ppo", task_name="policy")
