"""Counts the n-grams of a text, measures the models of all orders on its last part, prints a text
in the manner of each order, and saves the model.

python -m experiments.ngrams --data=FILE --order=3 --workdir=DIR
python -m experiments.ngrams --data=FILE --order=5 --workdir=DIR --tokenizer=bpe --vocab_size=4000
python -m experiments.next_token --workdir=DIR --text="..."
"""

from transformer_jax.cli import ngrams

if __name__ == "__main__":
    ngrams.main()
