"""Translates with a trained encoder-decoder, by beam search.

python -m experiments.translate --workdir=DIR --text="..." [--beam_size=5 --n_best=1 --length_penalty=1]
python -m experiments.translate --workdir=DIR --input=FILE --output=FILE
python -m experiments.translate --model=DIRECTORY_OR_ID --text="..."                     a model of Hugging Face
"""

from __future__ import annotations

import pathlib

from absl import flags

from transformer_jax.cli import loading
from transformer_jax.cli.flags import run
from transformer_jax.data.pairs import read_lines
from transformer_jax.tasks.translating import translate

_WORKDIR = flags.DEFINE_string("workdir", None, "A directory that transformer-jax train wrote.")
_MODEL = flags.DEFINE_string("model", None, "Instead: a directory, or an id, of a model of Hugging Face.")
_STEP = flags.DEFINE_string("step", None, "A step kept there, or 'best'; by default the last.")
_AVERAGE = flags.DEFINE_integer("average", 1, "Use the mean weights of so many last checkpoints.")
_TEXT = flags.DEFINE_multi_string("text", [], "A sentence to translate; may be repeated.")
_INPUT = flags.DEFINE_string("input", None, "A file to translate, a sentence a line; .gz too.")
_OUTPUT = flags.DEFINE_string("output", None, "Where the translations go; by default the terminal.")
_BEAM_SIZE = flags.DEFINE_integer("beam_size", 5, "Hypotheses kept at each step; 1 is greedy.")
_N_BEST = flags.DEFINE_integer("n_best", 1, "Translations of each sentence; above 1, lines of: number, score, text.")
_LENGTH_PENALTY = flags.DEFINE_float("length_penalty", 1.0, "Exponent of the length that divides log P.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Sentences at a time.", lower_bound=1)


def _main() -> None:
    if bool(_TEXT.value) == (_INPUT.value is not None):
        raise ValueError('say what to translate: either --text="..." or --input=FILE')
    # Blank lines too: line n of the output is the translation of line n.
    sources = _TEXT.value or [line.rstrip("\r\n") for line in read_lines(pathlib.Path(_INPUT.value))]
    bundle = loading.load(_WORKDIR.value, _MODEL.value, step=_STEP.value, average=_AVERAGE.value)
    if bundle.config.family != "encoder_decoder" or bundle.tokenizer is None:
        raise ValueError(f"{loading.name(_WORKDIR.value, _MODEL.value)} holds no translation model with its tokenizer")
    if _OUTPUT.value is not None:
        pathlib.Path(_OUTPUT.value).open("a").close()  # what cannot be written is found out now
    found = translate(bundle, sources, beam_size=_BEAM_SIZE.value, n_best=_N_BEST.value,
                      length_penalty=_LENGTH_PENALTY.value, batch_size=_BATCH_SIZE.value)
    if _N_BEST.value == 1:
        lines = [_one_line(hypotheses[0].text) for hypotheses in found]
    else:
        lines = [f"{number}\t{hypothesis.score:.4f}\t{_one_line(hypothesis.text)}"
                 for number, hypotheses in enumerate(found, start=1) for hypothesis in hypotheses]
    if _OUTPUT.value is None:
        print("\n".join(lines))
    else:
        pathlib.Path(_OUTPUT.value).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _one_line(text: str) -> str:
    """A text as one line, also of a model that spells a line end in bytes."""
    return text.replace("\n", " ")


def main() -> None:
    """``transformer-jax translate``."""
    run(_main)


if __name__ == "__main__":
    main()
