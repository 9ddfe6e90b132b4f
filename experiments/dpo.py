"""Trains a policy on ranked answers by direct preference optimisation, without a reward model.

python -m experiments.dpo --model=SFT_WORKDIR --workdir=DIR --config.data.path=COMPARISONS

The reference is the model that training starts from. The same command resumes a stopped run.
"""

from transformer_jax.cli.train import program

if __name__ == "__main__":
    program("dpo", task_name="dpo")
