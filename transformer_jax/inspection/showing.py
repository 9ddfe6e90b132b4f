"""Display of an ``Inspection``: choose the figure, collect the maps for a page, and describe it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from transformer_jax.inspection import characters, plots, viewer
from transformer_jax.inspection.labels import shorten
from transformer_jax.inspection.parts import check_kind, trace_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from transformer_jax.inspection.inspection import Inspection

_MOST_TEXTS = 5  # in the printed description


def plot(inspected: Inspection, kind: str | None, layer: int | None, head: int | None) -> Figure:
    """Draws one map, all heads of a layer (for cross-attention their mean), or all heads of all
    layers."""
    kind = _kind(inspected, kind)
    if layer is None:
        if head is not None:
            raise ValueError(f"head={head} needs the layer of this head: pass layer=... too")
        viewer.check_size([{kind: _shape(inspected, kind)}])
    weights = np.asarray(inspected.attention(kind, layers=layer, heads=head))
    queries, keys = inspected.labels(kind)
    title = f"{kind} attention" + "".join(f", {name} {index}" for name, index in (("layer", layer), ("head", head))
                                          if index is not None)
    if kind == "cross" and layer is not None:
        return plots.alignment(weights, keys, queries, title=title)
    if head is not None:
        return plots.attention_map(weights, queries, keys, title=title)
    return plots.head_grid(weights, queries, keys, title=title)


def page_maps(inspected: Inspection, kind: str | None) -> list[viewer.Maps]:
    """Returns for each text the maps of all kinds of attention, the given kind first; raises
    ValueError if they are too many for a page."""
    kind = _kind(inspected, kind)
    kinds = [kind, *(other for other in inspected.kinds if other != kind)]
    viewer.check_size([{name: _shape(text, name) for name in kinds} for text in inspected.texts])
    return [{name: viewer.AttentionMaps(np.asarray(text.attention(name)), *text.labels(name)) for name in kinds}
            for text in inspected.texts]


def describe(inspected: Inspection) -> str:
    """Describes an inspection in a few lines: its texts, the shapes of its maps, and the methods to
    call."""
    lines = [f"Inspection of {type(inspected.model).__name__}: {inspected.model.config.num_layers} layers, "
             f"{inspected.model.config.num_heads} heads"]
    for number, text in enumerate(inspected.texts[:_MOST_TEXTS]):
        name = "  text" if len(inspected.texts) == 1 else f"  texts[{number}]"
        sides = [("source", text.source_tokens), ("target", text.tokens)] if text.source_tokens else [("", text.tokens)]
        for side, tokens in sides:
            line = f"{name} {side} ({len(tokens)} tokens): {'|'.join(characters.shown(tokens))}"
            lines.append(shorten(line.replace("  (", " ("), 100))
    if len(inspected.texts) > _MOST_TEXTS:
        lines.append(f"  and {len(inspected.texts) - _MOST_TEXTS} more in .texts")
    of = "  " if len(inspected.texts) == 1 else "  texts[0]."
    for kind in inspected.kinds:
        L, N, T, S = _shape(inspected.texts[0], kind)
        lines.append(f"{of}attention({kind!r}): [{L} layers, {N} heads, {T} queries, {S} keys]")
    return "\n".join(lines)


def _kind(inspected: Inspection, kind: str | None) -> str:
    """Returns the given kind of attention after a check, or the last kind by default."""
    if kind is None:
        return inspected.kinds[-1]
    check_kind(inspected.model, kind)
    return kind


def _shape(inspected: Inspection, kind: str) -> tuple[int, int, int, int]:
    """Returns the shape of the maps: layers, heads, queries, keys."""
    trace = trace_of(inspected.trace, kind)
    L, _, T, N, _ = trace.queries.shape
    return L, N, T, trace.keys.shape[2]
