"""Fills in masked tokens with a trained encoder.

python -m experiments.fill_mask --workdir=DIR --text="digo que o amor é <mask>" [--top_k=5]
python -m experiments.fill_mask --model=FacebookAI/roberta-base --text="The house is <mask>."
"""

from transformer_jax.cli import fill_mask

if __name__ == "__main__":
    fill_mask.main()
