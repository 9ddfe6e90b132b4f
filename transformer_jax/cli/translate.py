"""Translates sentences with a trained encoder-decoder, by beam search.

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

_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of a run, which transformer-jax train wrote.")
_MODEL = flags.DEFINE_string("model", None, "Instead of --workdir: a directory or id of Hugging Face, or a GGUF file.")
_STEP = flags.DEFINE_string("step", None, "The step of a checkpoint in --workdir, or 'best'; by default the last.")
_AVERAGE = flags.DEFINE_integer("average", 1, "The number of last checkpoints whose weights are averaged.")
_TEXT = flags.DEFINE_multi_string("text", [], "A sentence to translate; may be repeated.")
_INPUT = flags.DEFINE_string("input", None,
                             "A file to translate, with one sentence in each line; it may be a .gz file.")
_OUTPUT = flags.DEFINE_string("output", None, "The file for the translations; by default they are printed.")
_BEAM_SIZE = flags.DEFINE_integer("beam_size", 5, "The number of hypotheses of beam search; 1 is greedy search.")
_N_BEST = flags.DEFINE_integer("n_best", 1, "The number of translations of each sentence; if it is above 1, each line "
                               "has the number of the sentence, the score and the text.")
_LENGTH_PENALTY = flags.DEFINE_float("length_penalty", 1.0, "The exponent of the length, by which log P is divided.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "The number of sentences in a batch.", lower_bound=1)


def _main() -> None:
    if bool(_TEXT.value) == (_INPUT.value is not None):
        raise ValueError('pass the sentences to translate: either --text="..." or --input=FILE')
    # Blank lines are kept, so that line n of the output is the translation of line n of the input.
    sources = _TEXT.value or [line.rstrip("\r\n") for line in read_lines(pathlib.Path(_INPUT.value or ""))]
    bundle = loading.load(_WORKDIR.value, _MODEL.value, step=_STEP.value, average=_AVERAGE.value)
    if bundle.config.role != "encoder_decoder" or bundle.tokenizer is None:
        raise ValueError(f"{loading.name(_WORKDIR.value, _MODEL.value)} is not a translation model with its tokenizer")
    if _OUTPUT.value is not None:
        pathlib.Path(_OUTPUT.value).open("a").close()  # a path that cannot be written fails here, before the search
    found = translate(bundle, sources, beam_size=_BEAM_SIZE.value, n_best=_N_BEST.value,
                      length_penalty=_LENGTH_PENALTY.value, batch_size=_BATCH_SIZE.value)
    if _N_BEST.value == 1:
        lines = [_one_line(hypotheses[0].text or "") for hypotheses in found]
    else:
        lines = [f"{number}\t{hypothesis.score:.4f}\t{_one_line(hypothesis.text or '')}"
                 for number, hypotheses in enumerate(found, start=1) for hypothesis in hypotheses]
    if _OUTPUT.value is None:
        print("\n".join(lines))
    else:
        pathlib.Path(_OUTPUT.value).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _one_line(text: str) -> str:
    """Replaces line ends by spaces, because a model with byte tokens can generate line ends."""
    return text.replace("\n", " ")


def main() -> None:
    """Runs ``transformer-jax translate``."""
    run(_main)


if __name__ == "__main__":
    main()
