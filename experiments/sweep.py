"""Trains small models of several seeds and learning rates together, in one program.

python -m experiments.sweep --config=shakespeare_char --config.data.path=input.txt --workdir=runs/sweep \
    --over=optim.peak_lr=1e-3,3e-3,1e-2 --over=seed=0,1,2

There is a model for each combination of the values.
"""

from transformer_jax.cli import sweep

if __name__ == "__main__":
    sweep.main()
