"""Classifies texts, or the words of texts, with a trained classifier.

python -m experiments.classify --workdir=DIR --text="a quiet, moving film" [--text=...]
python -m experiments.classify --model=DIRECTORY_OR_ID --text="Anna lives in Rome"
"""

from transformer_jax.cli import classify

if __name__ == "__main__":
    classify.main()
