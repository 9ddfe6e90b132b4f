"""Trains a model on text. The config selects a GPT, a BERT or a translator.

python -m experiments.train --config=shakespeare_char --config.data.path=FILE --workdir=DIR
python -m experiments.train --config=book_mlm --config.data.path=BOOK --workdir=DIR
python -m experiments.train --config=multi30k_ende --config.data.path=SOURCE,TARGET --workdir=DIR

The same command resumes a stopped run.
"""

from transformer_jax.cli.train import program

if __name__ == "__main__":
    program()
