"""Cleans a corpus; see ``transformer_jax.cli.clean_corpus``.

python -m experiments.clean_corpus --data=GLOB_OR_JSONL --output=DIR
"""

from transformer_jax.cli import clean_corpus

if __name__ == "__main__":
    clean_corpus.main()
