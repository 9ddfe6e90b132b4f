"""How good a trained model is: loss, perplexity and bits per byte; masked-token accuracy; BLEU and chrF.

python -m experiments.evaluate --workdir=DIR --data=FILE                                    a language model
python -m experiments.evaluate --workdir=DIR [--data=FILE]                                  a masked language model
python -m experiments.evaluate --workdir=DIR [--data=SOURCE,TARGET --target_language=de]    a translator

Without --data the last two are measured on what their run held out.
"""

from __future__ import annotations

from absl import flags

import transformer_jax as tj
from experiments import cli, language_model, masked_language_model, translation

_WORKDIR = flags.DEFINE_string("workdir", None, "A directory that experiments.train wrote.")
_STEP = flags.DEFINE_string("step", None, "A step kept there, or 'best'; by default the last.")
_AVERAGE = flags.DEFINE_integer("average", 1, "Use the mean weights of so many last checkpoints.")
_DATA = flags.DEFINE_string("data", None, "A text file, a glob, or JSONL; for a translator SOURCE,TARGET or TSV.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Windows, rows or sentences at a time.", lower_bound=1)
_BEAM_SIZE = flags.DEFINE_integer("beam_size", 5, "Hypotheses of beam search, for a translator.")
_LENGTH_PENALTY = flags.DEFINE_float("length_penalty", 1.0, "Exponent of the length that divides log P.")
_TARGET_LANGUAGE = flags.DEFINE_string("target_language", None, "Such as 'de': to tokenise for tokenised BLEU.")


def main() -> None:
    if _WORKDIR.value is None:
        raise ValueError("--workdir is missing")
    bundle = tj.load(_WORKDIR.value, step=_STEP.value, average=_AVERAGE.value)
    if bundle.tokenizer is None:
        raise ValueError(f"{_WORKDIR.value} holds no tokenizer")
    if bundle.config.family == "decoder":
        if _DATA.value is None:
            raise ValueError("--data is missing")
        language_model.evaluate(bundle, _DATA.value, _BATCH_SIZE.value)
    elif bundle.config.family == "encoder":
        masked_language_model.evaluate(bundle, _DATA.value, _BATCH_SIZE.value)
    else:
        translation.evaluate(bundle, _DATA.value, batch_size=_BATCH_SIZE.value, beam_size=_BEAM_SIZE.value,
                             length_penalty=_LENGTH_PENALTY.value, language=_TARGET_LANGUAGE.value)


if __name__ == "__main__":
    cli.run(main)
