"""Shows where a trained model attends: a page to explore every layer and head, and pictures.

python -m experiments.attention --workdir=DIR --text="..." --out=maps.html
python -m experiments.attention --workdir=DIR --text="..." --png=maps.png [--layer=3 [--head=5]] [--kind=encoder]
"""

from __future__ import annotations

import numpy as np
from absl import flags

import transformer_jax as tj
from experiments import cli
from transformer_jax.inspection import plots, viewer
from transformer_jax.inspection.parts import trace_of

_WORKDIR = flags.DEFINE_string("workdir", None, "A directory that experiments.train wrote.")
_STEP = flags.DEFINE_string("step", None, "A step kept there, or 'best'; by default the last.")
_TEXT = flags.DEFINE_string("text", None, "What the model reads.")
_TARGET = flags.DEFINE_string("target", None, "Of a translator the translation, by default its own; of a language "
                              "model a continuation.")
_OUT = flags.DEFINE_string("out", None, "Where the page goes: an HTML file for any browser.")
_PNG = flags.DEFINE_string("png", None, "Where a picture goes: a file that ends in .png or .svg.")
_KIND = flags.DEFINE_string("kind", None, "Of a translator: cross (the default), encoder, or self (the target's).")
_LAYER = flags.DEFINE_integer("layer", None, "The layer of the picture, and that the page opens with; -1 is the last.")
_HEAD = flags.DEFINE_integer("head", None, "Likewise the head; a picture of a layer without it shows every head.")


def main() -> None:
    for name, value in (("workdir", _WORKDIR.value), ("text", _TEXT.value)):
        if value is None:
            raise ValueError(f"--{name} is missing")
    if _OUT.value is None and _PNG.value is None:
        raise ValueError("say what to write: --out=maps.html is a page for the browser, --png=maps.png a picture")
    if _HEAD.value is not None and _LAYER.value is None:
        raise ValueError(f"--head={_HEAD.value} is a head of a layer; add --layer")
    bundle = tj.load(_WORKDIR.value, step=_STEP.value)
    if bundle.tokenizer is None:
        raise ValueError(f"{_WORKDIR.value} holds no tokenizer")
    seen = tj.inspect_text(bundle, _TEXT.value, target=_TARGET.value)
    kind = seen.kinds[-1] if _KIND.value is None else _KIND.value
    if kind not in seen.kinds:
        raise ValueError(f"--kind={kind} is not one of {', '.join(seen.kinds)}")
    for name, index, size in zip(("layer", "head"), (_LAYER.value, _HEAD.value), shape(seen, kind), strict=False):
        if index is not None and not -size <= index < size:
            raise ValueError(f"--{name}={index} is out of range: {size} {name}s, 0 to {size - 1}")
    if _OUT.value is not None:
        write_page(seen, kind)
    if _PNG.value is not None:
        draw(seen, kind)


def shape(seen: tj.Inspection, kind: str) -> tuple[int, int, int, int]:
    """Layers, heads, queries and keys of one kind of attention."""
    num_layers, _, num_queries, num_heads, _ = trace_of(seen.trace, kind).queries.shape
    return num_layers, num_heads, num_queries, len(seen.labels(kind)[1])


def labels(seen: tj.Inspection, kind: str) -> tuple[list[str], list[str]]:
    """The tokens of queries and keys; between languages a query has the name of the token that it predicts."""
    queries, keys = seen.labels(kind)
    return ([*queries[1:], "(next)"] if kind == "cross" else queries), keys


def write_page(seen: tj.Inspection, first: str) -> None:
    """Writes the page of all kinds of attention, which opens with the first."""
    kinds = sorted(seen.kinds, key=lambda kind: kind != first)
    viewer.check_size({kind: shape(seen, kind) for kind in kinds})
    maps = {kind: viewer.AttentionMaps(np.asarray(seen.attention(kind)), *labels(seen, kind)) for kind in kinds}
    viewer.save_html(_OUT.value, maps, title=_TEXT.value, layer=_LAYER.value or 0, head=_HEAD.value or 0)
    print(f"{_OUT.value}: open it in a browser")


def draw(seen: tj.Inspection, kind: str) -> None:
    """Draws one map, or every head of a layer (from target to source their mean), or every head of every layer."""
    layer, head = _LAYER.value, _HEAD.value
    if layer is None:
        viewer.check_size({kind: shape(seen, kind)})
    weights = np.asarray(seen.attention(kind, layers=layer, heads=head))
    queries, keys = labels(seen, kind)
    where = f"{kind} attention" + "".join(f", {name} {index}" for name, index in (("layer", layer), ("head", head))
                                          if index is not None)
    if kind == "cross" and layer is not None:
        figure = plots.alignment(weights, keys, queries, title=where)
    elif head is not None:
        figure = plots.attention_map(weights, queries, keys, title=where)
    else:
        figure = plots.head_grid(weights, queries, keys, title=where)
    plots.save(figure, _PNG.value)
    print(f"{_PNG.value}: {where}")


if __name__ == "__main__":
    cli.run(main)
