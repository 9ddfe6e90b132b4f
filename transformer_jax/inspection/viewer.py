"""Attention maps in one self-contained HTML page, which needs no network, server or library."""

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

from transformer_jax.inspection.characters import joined, shown
from transformer_jax.inspection.figures import numbers
from transformer_jax.inspection.labels import shorten
from transformer_jax.models.output import resolve
from transformer_jax.settings import checked_path

MAX_TOKENS = 512
MAX_WEIGHTS = 64 << 20  # one byte for each in the browser's memory

_MOST_EDGES = 20  # for each query: the largest choice in the page's "top edges", except "all"
_ADVICE = "shorten the text, or show fewer texts, layers or heads"


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """The maps of one kind of attention in all layers and heads, with the tokens on both sides.

    Attributes:
      weights: the attention weights from 0 to 1, ``[L, N, T, S]``.
      queries: the T query tokens.
      keys: the S key tokens; ``None`` if they are the same as the queries.

    Raises:
      ValueError: if the weights have a wrong shape, or are not from 0 to 1.
    """

    weights: np.ndarray
    queries: Sequence[str]
    keys: Sequence[str] | None = None

    def __post_init__(self):
        weights = numbers("weights", self.weights)
        keys = self.queries if self.keys is None else self.keys
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "keys", keys)
        if weights.ndim != 4 or weights.shape[2:] != (len(self.queries), len(keys)) or 0 in weights.shape:
            raise ValueError(f"weights are [layers, heads, {len(self.queries)} queries, {len(keys)} keys], all at "
                             f"least 1; got {list(weights.shape)}")
        # Weights that were rounded may be slightly above one.
        if not (weights.min() >= 0 and weights.max() <= 1 + 1e-3):
            raise ValueError(f"attention weights are from 0 to 1; got {weights.min()} to {weights.max()}")


Maps = Mapping[str, AttentionMaps]


def check_size(texts: Sequence[Mapping[str, Sequence[int]]]) -> None:
    """Raises ValueError if one page cannot hold maps of these shapes. Callers check the shapes
    before they compute the maps.

    Args:
      texts: for each text, the shape ``[L, N, T, S]`` of its maps by kind of attention.
    """
    for kind, (*_, T, S) in (item for shapes in texts for item in shapes.items()):
        if max(T, S) > MAX_TOKENS:
            raise ValueError(f"{kind!r} attention over {max(T, S)} tokens is more than the {MAX_TOKENS} that a page "
                             f"shows: {_ADVICE.split(',')[0]}, or draw single maps")
    total = sum(math.prod(shape) for shapes in texts for shape in shapes.values())
    if total > MAX_WEIGHTS:
        raise ValueError(f"{total:,} attention weights are more than the {MAX_WEIGHTS:,} that a page holds: {_ADVICE}")


def html(maps: Maps | Sequence[Maps], *, title: str = "Attention", layer: int = 0, head: int = 0) -> str:
    """Makes a page to explore attention: lines between tokens, thumbnails of all heads, and single
    maps.

    Args:
      maps: the maps by kind of attention, such as ``{"self": AttentionMaps(weights, tokens)}``, or
        a list of such dicts, one for each text and all with the same kinds. The page first shows
        the first kind and the first text.
      title: the title of the page.
      layer: the layer that the page first shows; negative numbers count from the end.
      head: the head that the page first shows; negative numbers count from the end.

    Returns:
      The page in ASCII. It stores the square root of each weight in 8 bits, with an error of at
      most 1/255 for large weights and far less for small ones. It preserves the order of the 20
      largest weights of each query.

    Raises:
      ValueError: if there are no maps, if a page cannot hold them, if the texts have different
        kinds of attention, or if the layer or head is out of range.
    """
    texts = [maps] if isinstance(maps, Mapping) else list(maps)
    if not texts or not texts[0]:
        raise ValueError('there are no maps to show; pass {"self": AttentionMaps(weights, tokens)}')
    for text in texts[1:]:
        if list(text) != list(texts[0]):
            raise ValueError(f"all texts of a page need the same kinds of attention; got {', '.join(texts[0])} and "
                             f"{', '.join(text)}")
    check_size([{kind: each.weights.shape for kind, each in text.items()} for text in texts])
    num_layers, num_heads = next(iter(texts[0].values())).weights.shape[:2]
    data = {"title": title, "layer": _index("layer", layer, num_layers), "head": _index("head", head, num_heads),
            "texts": [{"name": _name(number, text), "kinds": [_kind(name, each) for name, each in text.items()]}
                      for number, text in enumerate(texts)]}
    return filled(pathlib.Path(__file__).with_name("viewer.html"), title, data)


def filled(template: pathlib.Path, title: str, data: Any) -> str:
    """Puts a title and data into the template of a page.

    Args:
      template: the file of the page, with one script and the places ``{{title}}``, ``{{data}}`` and
        ``{{script_hash}}``.
      title: the title.
      data: the data for the script, which JSON can store.

    Returns:
      The page in ASCII.
    """
    # Escape these characters, so that no token can end the script element or begin another one.
    escaped = re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(data))
    page, script_hash = _template(template)
    parts = {"title": markup.escape(title), "data": escaped, "script_hash": script_hash}
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)
    return page.encode("ascii", "xmlcharrefreplace").decode()


def save_html(path: str | pathlib.Path, maps: Maps | Sequence[Maps], **options: Any) -> None:
    """Writes the page that ``html`` makes with the same ``options``; browsers can open it from
    ``file://``."""
    checked_path("path", path).write_text(html(maps, **options), encoding="ascii")


def iframe_html(maps: Maps | Sequence[Maps], **options: Any) -> str:
    """Makes the page of ``html`` in a frame, for ``_repr_html_`` in Jupyter and Colab."""
    texts = [maps] if isinstance(maps, Mapping) else maps
    longest = max((max(each.weights.shape[2:]) for text in texts for each in text.values()), default=0)
    height = min(max(420, 170 + 24 * longest), 720)
    return framed(html(maps, **options), "attention maps", height)


def framed(page: str, title: str, height: int = 720) -> str:
    """Puts a page into a frame for ``_repr_html_``. Scripts in it cannot read or change the
    notebook."""
    return (f'<iframe srcdoc="{markup.escape(page)}" sandbox="allow-scripts" title="{markup.escape(title)}" '
            f'style="width: 100%; height: {height}px; border: 0"></iframe>')


def quantize(weights: np.ndarray) -> np.ndarray:
    """Encodes the square root of each weight in 8 bits, which keeps more precision for small
    ones."""
    return np.rint(255 * np.sqrt(np.clip(weights, 0, 1))).astype(np.uint8)


def strongest(weights: np.ndarray) -> np.ndarray:
    """Finds the keys with the largest weights for each query, in descending order of the weights.
    Among equal weights, the earlier key comes first.

    Args:
      weights: the attention weights, ``[L, N, T, S]``.

    Returns:
      The indices of the keys, uint16 ``[L, N, T, min(S, 20)]``.
    """
    layers = [np.argsort(-weights_NTS, axis=-1, kind="stable")[..., :_MOST_EDGES] for weights_NTS in weights]
    return np.stack(layers).astype(np.uint16)


def _name(number: int, text: Maps) -> str:
    """Returns the name of a text in the page's menu: its number and its first words."""
    return shorten(f"{number}: {joined(next(iter(text.values())).keys or ())}", 40)


def _kind(name: str, maps: AttentionMaps) -> dict[str, object]:
    """Returns the data of one kind of attention for the page's script."""
    codes = quantize(maps.weights)
    # The page sorts the 8-bit codes. These corrections restore the order of weights with equal
    # codes. They are mostly zeros, which compress well.
    moved = strongest(maps.weights) - strongest(codes.astype(np.int16))
    return {"name": name, "layers": maps.weights.shape[0], "heads": maps.weights.shape[1],
            "queries": shown(maps.queries), "keys": shown(maps.keys or ()),
            "weights": _packed(codes), "moved": _packed(moved.astype("<u2"))}


def _packed(numbers: np.ndarray) -> str:
    """Compresses an array and encodes it in base64."""
    return base64.b64encode(zlib.compress(numbers.tobytes())).decode()


def _index(name: str, index: int, size: int) -> int:
    """Returns the index of one layer or head, counted from 0; raises ValueError if out of range."""
    indices, is_one = resolve(f"{name}s", index, size)
    if not is_one:
        raise ValueError(f"{name}={index!r}; expected one {name}, the one that the page first shows")
    return int(indices[0])


@functools.cache
def _template(path: pathlib.Path) -> tuple[str, str]:
    """Returns the page without its data, and the hash of its script. The page's content security
    policy contains the hash, so the browser runs no other script."""
    template = path.read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    return template, f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
