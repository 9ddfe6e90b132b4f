"""Shows where a trained model attends: a page to explore every layer and head, and pictures.

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

_WORKDIR = flags.DEFINE_string("workdir", None, "A directory that transformer-jax train wrote.")
_MODEL = flags.DEFINE_string("model", None, "Instead: a directory, or an id, of a model of Hugging Face.")
_STEP = flags.DEFINE_string("step", None, "A step kept there, or 'best'; by default the last.")
_TEXT = flags.DEFINE_string("text", None, "What the model reads.")
_TARGET = flags.DEFINE_string("target", None, "Of a translator the translation, by default its own; of a language "
                              "model a continuation.")
_OUT = flags.DEFINE_string("out", None, "Where the page goes: an HTML file for any browser.")
_PNG = flags.DEFINE_string("png", None, "Where a picture goes: a file that ends in .png or .svg.")
_KIND = flags.DEFINE_string("kind", None, "Of a translator: cross (the default), encoder, or self (the target's).")
_LAYER = flags.DEFINE_integer("layer", None, "The layer of the picture, and that the page opens with; -1 is the last.")
_HEAD = flags.DEFINE_integer("head", None, "Likewise the head; a picture of a layer without it shows every head.")


def _main() -> None:
    loading.check(_WORKDIR.value, _MODEL.value)
    if _TEXT.value is None:
        raise ValueError("--text is missing")
    if _OUT.value is None and _PNG.value is None:
        raise ValueError("say what to write: --out=maps.html is a page for the browser, --png=maps.png a picture")
    if _HEAD.value is not None and _LAYER.value is None:
        raise ValueError(f"--head={_HEAD.value} is a head of a layer; add --layer")
    bundle = loading.load(_WORKDIR.value, _MODEL.value, step=_STEP.value)
    if bundle.tokenizer is None:
        raise ValueError(f"{loading.name(_WORKDIR.value, _MODEL.value)} holds no tokenizer")
    seen = tj.inspect_text(bundle, _TEXT.value, target=_TARGET.value)
    if _OUT.value is not None:
        seen.to_html(_OUT.value, kind=_KIND.value, layer=_LAYER.value or 0, head=_HEAD.value or 0, title=_TEXT.value)
        print(f"{_OUT.value}: open it in a browser")
    if _PNG.value is not None:
        plots.save(seen.plot(_KIND.value, _LAYER.value, _HEAD.value), _PNG.value)
        print(f"{_PNG.value}: open it in an image viewer")


def main() -> None:
    """``transformer-jax attention``."""
    run(_main)


if __name__ == "__main__":
    main()
