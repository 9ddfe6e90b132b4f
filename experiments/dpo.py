"""Trains a policy on ranked answers without a reward model: direct preference optimisation.

python -m experiments.dpo --model=SFT_WORKDIR --workdir=DIR --config.data.path=COMPARISONS

The reference is the model to start from. The same command resumes a run that was stopped.
"""

from transformer_jax.cli.train import program

if __name__ == "__main__":
    program("dpo", task_name="dpo")
