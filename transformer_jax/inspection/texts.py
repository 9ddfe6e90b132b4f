"""Split a batch or a packed row into its texts, and the trace into the part of each text."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from transformer_jax.models.output import PairTrace, Trace
from transformer_jax.ops.masks import AttentionMask


class Place(NamedTuple):
    """The place of a text in an array ``[B, T]``: its row, the index of its first token, and the
    index after its last token."""

    row: int
    start: int
    stop: int

    def of(self, ids_BT: np.ndarray) -> np.ndarray:
        """Returns the part of the array that belongs to the text, ``[length]``."""
        return ids_BT[self.row, self.start:self.stop]


def places(segment_ids_BT: np.ndarray) -> list[dict[int, Place]]:
    """Returns for each row a dict from the segment id of each text to its place; 0 is padding.

    Raises:
      ValueError: if the tokens of a text are not contiguous.
    """
    found = []
    for row, segment_ids_T in enumerate(segment_ids_BT):
        numbers = list(dict.fromkeys(segment_ids_T[segment_ids_T != 0].tolist()))
        found.append({number: _place(row, segment_ids_T, number) for number in numbers})
    return found


def places_of_texts(segment_ids: np.ndarray, source_segment_ids: np.ndarray | None) -> list[tuple[Place, Place | None]]:
    """Returns for each text its place and, in an encoder-decoder, the place of its source.

    Args:
      segment_ids: ``[T]`` or ``[B, T]``.
      source_segment_ids: those of the source, ``[S]`` or ``[B, S]``; ``None`` without a source.

    Raises:
      ValueError: if the tokens of a text are not contiguous.
    """
    rows = places(np.atleast_2d(segment_ids))
    if source_segment_ids is None:
        return [(own, None) for row in rows for own in row.values()]
    sources = places(np.atleast_2d(source_segment_ids))
    return [(own, source[number]) for row, source in zip(rows, sources, strict=True) for number, own in row.items()
            if number in source]


def cut(trace: Trace | PairTrace, own: Place, source: Place | None) -> Trace | PairTrace:
    """Returns the trace of one text, with a batch axis of 1; ``source`` is the place of its source
    in an encoder-decoder."""
    if isinstance(trace, Trace):
        return _cut(trace, own, own)
    if source is not None and set(trace.parts()) == {"cross"}:  # a recurrent network attends only to the source
        return dataclasses.replace(trace, cross=_cut(trace.cross, own, source))
    if source is None or trace.encoder is None:
        raise ValueError("the trace does not contain the source: pass a trace of a whole forward pass, with the source "
                         "and the target")
    return PairTrace(_cut(trace.encoder, source, source), _cut(trace.decoder, own, own), _cut(trace.cross, own, source))


def _place(row: int, segment_ids_T: np.ndarray, number: int) -> Place:
    """Returns the place of one text; raises ValueError if its tokens are not contiguous."""
    at = np.flatnonzero(segment_ids_T == number)
    if at[-1] - at[0] + 1 != at.size:
        raise ValueError(f"the tokens of document {number} are not contiguous: pass segment ids in which each document "
                         "is one run of equal numbers")
    return Place(row, int(at[0]), int(at[-1]) + 1)


def _cut(trace: Trace, queries: Place, keys: Place) -> Trace:
    """Cuts one trace. Causality, the sliding window and the linear bias depend only on distances,
    so they hold within a text as they did in its row."""
    row, of_queries, of_keys = (slice(queries.row, queries.row + 1), slice(queries.start, queries.stop),
                                slice(keys.start, keys.stop))
    sides = {"keys": of_keys, "values": of_keys}
    layers = {field.name: getattr(trace.layers, field.name) for field in dataclasses.fields(trace.layers)}

    def of_pairs(bias: jax.Array) -> jax.Array:
        """Cuts a bias ``[..., B or 1, N, T, S]``."""
        return bias[..., row if bias.shape[-4] > 1 else slice(None), :, of_queries, of_keys]

    cut_layers = {name: of_pairs(x) if name == "bias" else x[:, row, sides.get(name, of_queries)]
                  for name, x in layers.items() if x is not None}
    return Trace(
        layers=dataclasses.replace(trace.layers, **cut_layers),
        final=None if trace.final is None else trace.final[row, of_queries],
        mask=AttentionMask(is_causal=trace.mask.is_causal, window=trace.mask.window), windows=trace.windows,
        cap=trace.cap,
        bias=of_pairs(trace.bias) if isinstance(trace.bias, jax.Array) else trace.bias)
