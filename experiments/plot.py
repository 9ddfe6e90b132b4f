"""Draws the losses of one or several runs over their steps.

python -m experiments.plot runs/a runs/b --out=losses.png [--log_steps] [--log_loss]

Each run is a workdir, or its metrics.jsonl.
"""

from transformer_jax.cli import plot

if __name__ == "__main__":
    plot.main()
