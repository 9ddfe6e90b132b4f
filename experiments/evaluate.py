"""Measures a trained model; see ``transformer_jax.cli.evaluate``.

python -m experiments.evaluate --workdir=DIR --data=FILE
"""

from transformer_jax.cli import evaluate

if __name__ == "__main__":
    evaluate.main()
