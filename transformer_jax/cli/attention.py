"""Shows the attention of a trained model: as an HTML page with every layer and head, and as
pictures.

python -m experiments.attention --workdir=DIR --text="..." --out=maps.html
python -m experiments.attention --workdir=DIR --text="..." --png=maps.png [--layer=3 [--head=5]] [--kind=encoder]
python -m experiments.attention --model=openai-community/gpt2 --text="..." --out=maps.html
"""

from __future__ import annotations

from absl import flags

import transformer_jax as tj
from transformer_jax.cli import loading
from transformer_jax.cli.flags import run
from transformer_jax.inspection import plots

_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of a run, which transformer-jax train wrote.")
_MODEL = flags.DEFINE_string("model", None, "Instead of --workdir: a directory or id of Hugging Face, or a GGUF file.")
_STEP = flags.DEFINE_string("step", None, "The step of a checkpoint in --workdir, or 'best'; by default the last.")
_TEXT = flags.DEFINE_string("text", None, "The text that the model reads.")
_TARGET = flags.DEFINE_string("target", None, "For a translator: the translation, by default the one that the model "
                              "generates. For a language model: a continuation of --text.")
_OUT = flags.DEFINE_string("out", None, "The HTML file to write, which any browser can show.")
_PNG = flags.DEFINE_string("png", None, "The picture to write: a file that ends in .png or .svg.")
_KIND = flags.DEFINE_string("kind", None, "For a translator: cross (the default), encoder, or self (the decoder).")
_LAYER = flags.DEFINE_integer("layer", None, "The layer that is shown first; -1 is the last layer.")
_HEAD = flags.DEFINE_integer("head", None, "The head that is shown first; without it, a picture shows all heads.")


def _main() -> None:
    loading.check(_WORKDIR.value, _MODEL.value)
    if _TEXT.value is None:
        raise ValueError("--text is missing: the text that the model reads")
    if _OUT.value is None and _PNG.value is None:
        raise ValueError("no output is named; pass --out=maps.html for an HTML page, or --png=maps.png for a picture")
    for flag, value in (("out", _OUT.value), ("png", _PNG.value)):
        if value is not None and not value.strip():
            raise ValueError(f"--{flag} is empty: name a file")
    if _PNG.value is not None:  # before the page is written
        plots.check_name(_PNG.value)
    if _HEAD.value is not None and _LAYER.value is None:
        raise ValueError(f"--head={_HEAD.value} needs the layer of the head; add --layer")
    bundle = loading.load(_WORKDIR.value, _MODEL.value, step=_STEP.value)
    if bundle.tokenizer is None:
        raise ValueError(f"{loading.name(_WORKDIR.value, _MODEL.value)} has no tokenizer; choose a model that is "
                         "stored with its tokenizer")
    inspected = tj.inspect_text(bundle, _TEXT.value, target=_TARGET.value)
    if _OUT.value is not None:
        inspected.to_html(_OUT.value, kind=_KIND.value, layer=_LAYER.value or 0, head=_HEAD.value or 0,
                          title=_TEXT.value)
        print(f"{_OUT.value}: open it in a browser")
    if _PNG.value is not None:
        plots.save(inspected.plot(_KIND.value, _LAYER.value, _HEAD.value), _PNG.value)
        print(f"{_PNG.value}: open it in an image viewer")


def main() -> None:
    """Runs ``transformer-jax attention``."""
    run(_main)


if __name__ == "__main__":
    main()
