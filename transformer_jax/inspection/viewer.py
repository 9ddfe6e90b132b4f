"""Attention maps as one self-contained HTML page: no network, no server, no library."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import html as markup
import json
import math
import pathlib
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transformer_jax.inspection.labels import visible

MAX_TOKENS = 512
MAX_WEIGHTS = 64 << 20  # a byte each, in the browser's memory

_ADVICE = "shorten the text, or show fewer layers or heads"


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """One kind of attention: the maps of all its layers and heads, and the tokens on both sides.

    Attributes:
      weights: ``[L, N, T, S]``, from 0 to 1.
      queries: the T tokens that attend.
      keys: the S tokens that are attended to; ``None``: the queries.

    Raises:
      ValueError: for weights of another shape, or that are no probabilities.
    """

    weights: np.ndarray
    queries: Sequence[str]
    keys: Sequence[str] | None = None

    def __post_init__(self):
        weights = np.asarray(self.weights, np.float32)
        keys = self.queries if self.keys is None else self.keys
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "keys", keys)
        if weights.ndim != 4 or weights.shape[2:] != (len(self.queries), len(keys)) or 0 in weights.shape:
            raise ValueError(f"weights are [layers, heads, {len(self.queries)} queries, {len(keys)} keys], none of "
                             f"them 0; got {list(weights.shape)}")
        # Sums of rounded weights may be a little above one.
        if not (weights.min() >= 0 and weights.max() <= 1 + 1e-3):
            raise ValueError(f"attention weights are from 0 to 1; got {weights.min()} to {weights.max()}")


def check_size(shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError for maps ``[L, N, T, S]`` that one page cannot hold, before they are
    computed."""
    for kind, (*_, T, S) in shapes.items():
        if max(T, S) > MAX_TOKENS:
            raise ValueError(f"{kind!r} attention over {max(T, S)} tokens is more than the {MAX_TOKENS} that a page "
                             f"shows: {_ADVICE.split(',')[0]}, or draw single maps")
    total = sum(map(math.prod, shapes.values()))
    if total > MAX_WEIGHTS:
        raise ValueError(f"{total:,} attention weights are more than the {MAX_WEIGHTS:,} that a page holds: {_ADVICE}")


def html(maps: Mapping[str, AttentionMaps], *, title: str = "Attention", layer: int = 0, head: int = 0) -> str:
    """A page to look at attention with: lines between tokens, all heads as thumbnails, single
    matrices.

    Args:
      maps: by kind, such as ``{"self": AttentionMaps(weights, tokens)}``; the page opens with the
        first.
      title: of the page.
      layer: the layer that the page opens with; negative numbers count from the end.
      head: likewise.

    Returns:
      The whole page, ASCII. Its weights are rounded: the square root is kept in 8 bits, an error of
      at most 1/255 for large weights and far less for small ones.

    Raises:
      ValueError: for no maps, more than a page holds, or a layer or head out of range.
    """
    if not maps:
        raise ValueError('there are no maps to show; pass {"self": AttentionMaps(weights, tokens)}')
    check_size({kind: shown.weights.shape for kind, shown in maps.items()})
    num_layers, num_heads = next(iter(maps.values())).weights.shape[:2]
    data = {"title": title, "layer": _index("layer", layer, num_layers), "head": _index("head", head, num_heads),
            "kinds": [_kind(name, shown) for name, shown in maps.items()]}
    # No character of a token can end the element or begin another: neither < nor & is left.
    escaped = re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(data))
    template, script_hash = _template()
    parts = {"title": markup.escape(title), "data": escaped, "script_hash": script_hash}
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)
    return page.encode("ascii", "xmlcharrefreplace").decode()


def save_html(path: str | pathlib.Path, maps: Mapping[str, AttentionMaps], **options: Any) -> None:
    """Writes the page of :func:`html`, which takes the same ``options``; it opens from
    ``file://``."""
    pathlib.Path(path).write_text(html(maps, **options), encoding="ascii")


def iframe_html(maps: Mapping[str, AttentionMaps], **options: Any) -> str:
    """The page of :func:`html` in a frame, for ``_repr_html_`` in Jupyter and Colab.

    The frame is sandboxed: what it shows can neither read nor change the notebook.
    """
    longest = max((len(side) for shown in maps.values() for side in (shown.queries, shown.keys or ())), default=0)
    height = min(max(420, 170 + 24 * longest), 720)
    page = markup.escape(html(maps, **options))
    return (f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="attention maps" '
            f'style="width: 100%; height: {height}px; border: 0"></iframe>')


def quantize(weights: np.ndarray) -> np.ndarray:
    """The square root of each weight in 8 bits: small weights keep their first digits."""
    return np.rint(255 * np.sqrt(np.clip(weights, 0, 1))).astype(np.uint8)


def _kind(name: str, maps: AttentionMaps) -> dict[str, object]:
    packed = base64.b64encode(zlib.compress(quantize(maps.weights).tobytes()))
    return {"name": name, "layers": maps.weights.shape[0], "heads": maps.weights.shape[1],
            "queries": list(map(visible, maps.queries)), "keys": list(map(visible, maps.keys or ())),
            "weights": packed.decode()}


def _index(name: str, index: int, size: int) -> int:
    if not -size <= index < size:
        raise ValueError(f"{name}={index} is out of range for {size} {name}s (0 to {size - 1})")
    return index % size


@functools.cache
def _template() -> tuple[str, str]:
    """The page without its data, and the hash by which the browser knows its script: no other one
    runs in it."""
    template = pathlib.Path(__file__).with_name("viewer.html").read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    return template, f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
