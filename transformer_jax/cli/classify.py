"""Classifies texts, or the words of texts, with a trained classifier.

python -m experiments.classify --workdir=DIR --text="a quiet, moving film" [--text=...]
python -m experiments.classify --model=DIRECTORY_OR_ID --text="Anna lives in Rome"
"""

from __future__ import annotations

from absl import flags

import transformer_jax as tj
from transformer_jax.cli import loading
from transformer_jax.cli.flags import run

_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of a run, which transformer-jax train wrote.")
_MODEL = flags.DEFINE_string("model", None, "Instead of --workdir: a directory or an id of Hugging Face.")
_STEP = flags.DEFINE_string("step", None, "The step of a checkpoint in --workdir, or 'best'; by default the last.")
_TEXT = flags.DEFINE_multi_string("text", None, "A text to classify; may be repeated.")


def _main() -> None:
    loading.check(_WORKDIR.value, _MODEL.value)
    if not _TEXT.value:
        raise ValueError("--text is missing: a text to classify")
    bundle = loading.load(_WORKDIR.value, _MODEL.value, step=_STEP.value)
    if bundle.config.role == "token_classifier":
        for words in tj.classify_tokens(bundle, _TEXT.value):
            for found in words:
                print(f"{found.word}\t{found.label}\t{found.probability:.4f}")
            print()
        return
    if bundle.config.role != "classifier" or bundle.tokenizer is None:
        raise ValueError(f"{loading.name(_WORKDIR.value, _MODEL.value)} is not a classifier with its tokenizer; train "
                         "one with --config=classify")
    for text, found in zip(_TEXT.value, tj.classify(bundle, _TEXT.value), strict=True):
        print(text)
        for label, probability in sorted(found.probabilities.items(), key=lambda item: -item[1]):
            print(f"  {probability:.4f}  {label}")


def main() -> None:
    """Runs ``transformer-jax classify``."""
    run(_main)


if __name__ == "__main__":
    main()
