"""Trains a reward model on ranked answers. The training starts from a trained policy.

python -m experiments.reward --model=SFT_WORKDIR --workdir=DIR --config.data.path=COMPARISONS

The same command resumes a stopped run.
"""

from transformer_jax.cli.train import program

if __name__ == "__main__":
    program("reward", task_name="reward")
