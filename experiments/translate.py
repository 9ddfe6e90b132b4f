"""Translates sentences with a trained encoder-decoder, by beam search.

python -m experiments.translate --workdir=DIR --text="..." [--beam_size=5 --n_best=1 --length_penalty=1]
python -m experiments.translate --workdir=DIR --input=FILE --output=FILE
python -m experiments.translate --model=DIRECTORY_OR_ID --text="..."                     a model of Hugging Face
"""

from transformer_jax.cli import translate

if __name__ == "__main__":
    translate.main()
