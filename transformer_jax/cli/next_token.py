"""Prints the probabilities of the next token after a text, with any language model: n-grams, a
recurrent network, a GPT of this library or one of Hugging Face.

python -m experiments.next_token --workdir=DIR --text="To be or not to" [--top=10 --figure=next.png]
python -m experiments.next_token --model=openai-community/gpt2 --text="To be or not to"
"""

from __future__ import annotations

import pathlib

from absl import flags

from transformer_jax.baselines.next_token_tables import next_token_table, next_tokens, plot_next_tokens
from transformer_jax.baselines.ngram_files import DESCRIPTION, load_ngrams
from transformer_jax.cli import loading
from transformer_jax.cli.flags import required, run
from transformer_jax.files import naming

_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of a run, or of an n-gram model.")
_MODEL = flags.DEFINE_string("model", None, "Instead of --workdir: a directory or id of Hugging Face, or a GGUF file.")
_STEP = flags.DEFINE_string("step", None, "The step of a checkpoint in --workdir, or 'best'; by default the last.")
_TEXT = flags.DEFINE_string("text", None, "The text before the token; an empty text asks for the first token.")
_TOP = flags.DEFINE_integer("top", 10, "The number of tokens to print.", lower_bound=1)
_FIGURE = flags.DEFINE_string("figure", None, "A picture to draw, such as next.png.")


def _main() -> None:
    loading.check(_WORKDIR.value, _MODEL.value)
    text = required(_TEXT)
    workdir = _WORKDIR.value
    if workdir is not None and (pathlib.Path(workdir) / DESCRIPTION).is_file():
        if _STEP.value is not None:
            raise ValueError(f"--step={_STEP.value} selects a checkpoint, but {workdir} has an n-gram model, which has "
                             "none; leave --step out")
        model = load_ngrams(workdir)
    else:
        model = loading.load(workdir, _MODEL.value, step=_STEP.value)
    found = next_tokens(model, text, top=_TOP.value)
    print(next_token_table(found))
    if _FIGURE.value is not None:
        with naming(_FIGURE.value):
            plot_next_tokens(found, text, _FIGURE.value)
        print(f"the picture is in {_FIGURE.value}")


def main() -> None:
    """Runs ``transformer-jax next-token``."""
    run(_main)


if __name__ == "__main__":
    main()
