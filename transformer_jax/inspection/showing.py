"""An inspection to look at: which figure shows what was asked for, and what a page holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from transformer_jax.inspection import plots, viewer
from transformer_jax.inspection.parts import check_kind, trace_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from transformer_jax.inspection.inspection import Inspection


def plot(seen: Inspection, kind: str | None, layer: int | None, head: int | None) -> Figure:
    """One map, every head of a layer (from target to source their mean), or every head of every
    layer."""
    kind = _kind(seen, kind)
    if layer is None:
        if head is not None:
            raise ValueError(f"head={head} is a head of a layer; give the layer too")
        viewer.check_size({kind: _shape(seen, kind)})
    weights = np.asarray(seen.attention(kind, layers=layer, heads=head))
    queries, keys = seen.labels(kind)
    title = f"{kind} attention" + "".join(f", {name} {index}" for name, index in (("layer", layer), ("head", head))
                                          if index is not None)
    if kind == "cross" and layer is not None:
        return plots.alignment(weights, keys, queries, title=title)
    if head is not None:
        return plots.attention_map(weights, queries, keys, title=title)
    return plots.head_grid(weights, queries, keys, title=title)


def page_maps(seen: Inspection, kind: str | None) -> dict[str, viewer.AttentionMaps]:
    """The maps of every kind of attention, one kind before the others; ValueError for more than a
    page holds."""
    kind = _kind(seen, kind)
    kinds = [kind, *(other for other in seen.kinds if other != kind)]
    viewer.check_size({name: _shape(seen, name) for name in kinds})
    return {name: viewer.AttentionMaps(np.asarray(seen.attention(name)), *seen.labels(name)) for name in kinds}


def _kind(seen: Inspection, kind: str | None) -> str:
    if kind is None:
        return seen.kinds[-1]
    check_kind(seen.model, kind)
    return kind


def _shape(seen: Inspection, kind: str) -> tuple[int, int, int, int]:
    trace = trace_of(seen.trace, kind)
    L, _, T, N, _ = trace.queries.shape
    return L, N, T, trace.keys.shape[2]
