"""Fills in masked tokens with a trained encoder.

python -m experiments.fill_mask --workdir=DIR --text="digo que o amor é <mask>" [--top_k=5]
python -m experiments.fill_mask --model=FacebookAI/roberta-base --text="The house is <mask>."
"""

from __future__ import annotations

from absl import flags

import transformer_jax as tj
from transformer_jax.cli import loading
from transformer_jax.cli.flags import run

_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of a run, which transformer-jax train wrote.")
_MODEL = flags.DEFINE_string("model", None, "Instead of --workdir: a directory or id of Hugging Face, or a GGUF file.")
_STEP = flags.DEFINE_string("step", None, "The step of a checkpoint in --workdir, or 'best'; by default the last.")
_TEXT = flags.DEFINE_multi_string("text", None, "A text with <mask> (for BERT [MASK]) in the place of each token to "
                                  "predict; may be repeated.")
_TOP_K = flags.DEFINE_integer("top_k", 5, "The number of candidates for each mask.")


def _main() -> None:
    loading.check(_WORKDIR.value, _MODEL.value)
    if not _TEXT.value:
        raise ValueError("--text is missing: a text with at least one mask")
    bundle = loading.load(_WORKDIR.value, _MODEL.value, step=_STEP.value)
    if bundle.config.role != "encoder" or bundle.tokenizer is None:
        raise ValueError(f"{loading.name(_WORKDIR.value, _MODEL.value)} is not a masked language model with its "
                         "tokenizer")
    filled = tj.fill_mask(bundle.model, _TEXT.value, tokenizer=bundle.tokenizer, top_k=_TOP_K.value)
    for text, masks in zip(_TEXT.value, filled, strict=True):
        print(text)
        for number, candidates in enumerate(masks, start=1):
            if len(masks) > 1:
                print(f"mask {number}:")
            for candidate in candidates:
                print(f"  {candidate.probability:.4f}  {candidate.token!r:16}  {candidate.text}")


def main() -> None:
    """Runs ``transformer-jax fill-mask``."""
    run(_main)


if __name__ == "__main__":
    main()
