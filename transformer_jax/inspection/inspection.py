"""One text as a model read it: its tokens, its trace, and what can be asked of them."""

from __future__ import annotations

import dataclasses
import html as markup
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.data.tokens import TextTokenizer
from transformer_jax.inspection import maps, showing, viewer
from transformer_jax.inspection.attribution import Attribution, direct_logit_attribution
from transformer_jax.inspection.lens import Lens, logit_lens, value_norms, value_weighted
from transformer_jax.inspection.mixing import rollout
from transformer_jax.inspection.parts import check_kind, trace_of
from transformer_jax.models.functional import Model
from transformer_jax.models.output import Index, PairTrace, Trace, resolve
from transformer_jax.ops.masks import AttentionMask

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Inspection:
    """One text (one row), as a model read it. Arrays of its methods have no batch axis.

    Attributes:
      model: the model.
      tokenizer: its tokenizer, if it has one.
      ids: the tokens that were read, of an encoder-decoder those of the target ``[T]``.
      trace: of the forward pass, with a batch axis of 1; maps are computed from it when asked for.
      segment_ids: which document of a packed row each token belongs to ``[T]``; ``None``: one
        document.
      source_ids: the tokens of an encoder-decoder's source ``[S]``.
      source_segment_ids: theirs.
    """

    model: Model = dataclasses.field(repr=False)
    tokenizer: TextTokenizer | None = dataclasses.field(repr=False)
    ids: np.ndarray
    trace: Trace | PairTrace = dataclasses.field(repr=False)
    segment_ids: np.ndarray | None = None
    source_ids: np.ndarray | None = None
    source_segment_ids: np.ndarray | None = None

    @property
    def tokens(self) -> list[str]:
        """The tokens as strings, those of the target in an encoder-decoder; numbers without a
        tokenizer."""
        return self.strings(self.ids)

    @property
    def source_tokens(self) -> list[str]:
        """The source's tokens as strings; empty where there is no source."""
        return [] if self.source_ids is None else self.strings(self.source_ids)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of attention that the model has."""
        return tuple(self.trace.parts())

    def labels(self, kind: str = "self") -> tuple[list[str], list[str]]:
        """The tokens that attend, and those that are attended to.

        Of ``"cross"``, each query is named by the token that it predicts, the last of a text by
        ``"(next)"``.
        """
        check_kind(self.model, kind)
        if kind != "cross":
            tokens = self.source_tokens if kind == "encoder" else self.tokens
            return tokens, tokens
        segment_ids = np.zeros(len(self.ids)) if self.segment_ids is None else self.segment_ids
        is_last = np.diff(segment_ids, append=-1) != 0
        following = [*self.tokens[1:], ""]
        return ["(next)" if last else token for token, last in zip(following, is_last, strict=True)], self.source_tokens

    def strings(self, ids: Any) -> Any:
        """Tokens to show, in lists nested as the array of ids is."""
        ids = np.asarray(ids)
        if ids.ndim:
            return [self.strings(part) for part in ids]
        if self.tokenizer is None or ids >= self.tokenizer.vocab_size:  # a model may have more rows
            return str(int(ids))
        return self.tokenizer.pieces([int(ids)])[0]

    def attention(self, kind: str = "self", *, layers: Index = None, heads: Index = None,
                  queries: Index = None) -> jax.Array:
        """Attention maps: only what is asked for is computed.

        Args:
          kind: ``"self"``; in an encoder-decoder ``"self"`` is the target's, ``"encoder"`` the
            source's, and ``"cross"`` the target's to the source.
          layers: one layer, several, or all (``None``); negative indices count from the end.
          heads: likewise.
          queries: likewise, the rows of the maps.

        Returns:
          float32 ``[layers, heads, queries, S]``; an axis indexed by a single number is dropped.

        Raises:
          ValueError: for another kind, or an index out of range.
        """
        chosen, single = self._choose(kind, layers, heads, queries)
        return jnp.squeeze(_maps(trace_of(self.trace, kind), *chosen), single)

    def value_weighted(self, kind: str = "self", *, layers: Index = None, heads: Index = None,
                       queries: Index = None) -> jax.Array:
        """Maps in which a weight counts as much as what it lets through; arguments as in
        :meth:`attention`.

        Source: Kobayashi et al. (2020).
        """
        (layers, heads, queries), single = self._choose(kind, layers, heads, queries)
        norms_LNS = value_norms(self.model, self.trace, kind=kind)[:, 0]
        weights = _maps(trace_of(self.trace, kind), layers, heads, queries)
        return jnp.squeeze(value_weighted(weights, norms_LNS[layers][:, heads]), single)

    def _choose(self, kind: str, layers: Index, heads: Index, queries: Index) -> tuple[tuple, tuple[int, ...]]:
        check_kind(self.model, kind)
        L, _, T, N, _ = trace_of(self.trace, kind).queries.shape
        chosen = resolve("layers", layers, L), resolve("heads", heads, N), resolve("queries", queries, T)
        return tuple(indices for indices, _ in chosen), tuple(axis for axis, (_, one) in enumerate(chosen) if one)

    def summaries(self, kind: str = "self") -> dict[str, jax.Array]:
        """Every cheap reduction of every head ``[L, N]``, see
        :func:`~transformer_jax.inspection.maps.summaries`."""
        check_kind(self.model, kind)
        ids = {"self": self.ids, "encoder": self.source_ids, "cross": None}[kind]
        return maps.summaries(trace_of(self.trace, kind), None if ids is None else ids[None])

    def rollout(self, kind: str = "self") -> jax.Array:
        """Attention rollout up to each layer ``[L, T, T]``, heads averaged; of ``"self"`` or
        ``"encoder"``."""
        if kind == "cross":
            raise ValueError("kind='cross' attends from one text to another: rollout is of 'self' or 'encoder'")
        return rollout(self.attention(kind).mean(1))

    def logit_lens(self, positions: Index = None, *, top_k: int = 5) -> Lens:
        """What would be predicted if the model ended before each layer.

        Args:
          positions: one token, several, or all (``None``); negative indices count from the end.
          top_k: how many predictions.

        Returns:
          :class:`~transformer_jax.inspection.lens.Lens` of ``[L + 1, positions, top_k]``;
          :meth:`strings` of its ``ids`` are the tokens. The positions' axis is dropped for a single
          number.
        """
        _, one = resolve("positions", positions, len(self.ids))
        found = logit_lens(self.model, self.trace, positions=positions, top_k=top_k)
        return jax.tree.map(lambda x: x[:, 0, 0] if one else x[:, 0], found)

    def attribution(self, position: int = -1, target: int | None = None) -> Attribution:
        """What each part adds to the logit of a token: ``heads`` ``[L, N]``, ``mlp`` ``[L]``, the
        others numbers.

        Args:
          position: where it is predicted.
          target: the token's id; by default the one that the model holds most probable there.
        """
        token = self.logit_lens(position, top_k=1).ids[-1, 0] if target is None else target
        parts = direct_logit_attribution(self.model, self.trace, jnp.reshape(token, (1, 1)), positions=position)
        return jax.tree.map(lambda x: x[0, 0] if x.ndim == 2 else x[:, 0, 0], parts)

    def plot(self, kind: str | None = None, layer: int | None = None, head: int | None = None) -> Figure:
        """A figure of every head, of a layer's heads, or of one map; :func:`plots.save` writes it.

        Args:
          kind: of attention; by default ``"cross"`` where there is one, else ``"self"``.
          layer: which layer, of all by default. Of ``"cross"`` attention the mean over its heads is
            drawn.
          head: which of its heads.

        Raises:
          ValueError: for a kind that the model has not, an index out of range, a head without its
            layer, or more maps than a figure shows.
        """
        return showing.plot(self, kind, layer, head)

    def to_html(self, path: str | pathlib.Path | None = None, *, kind: str | None = None, layer: int = 0,
                head: int = 0, title: str = "Attention") -> str | None:
        """The page to explore every layer and head of every kind of attention: one file, for any
        browser.

        Args:
          path: where it goes; ``None``: it is returned.
          kind: that it opens with, likewise layer and head; see :meth:`plot`.
          layer: negative numbers count from the end.
          head: likewise.
          title: of the page.

        Raises:
          ValueError: as :meth:`plot`, and for a text too long for a page.
        """
        shown = showing.page_maps(self, kind)
        if path is None:
            return viewer.html(shown, title=title, layer=layer, head=head)
        return viewer.save_html(path, shown, title=title, layer=layer, head=head)

    def _repr_html_(self) -> str:
        """The page in a frame, for Jupyter and Colab; what has no page is shown as text, with the
        reason."""
        try:
            return viewer.iframe_html(showing.page_maps(self, None))
        except ValueError as reason:
            return f"<pre>{markup.escape(repr(self))}\n{markup.escape(str(reason))}</pre>"

    def documents(self) -> list[Inspection]:
        """The documents of a packed row, each with its own tokens and its own part of the trace.

        Raises:
          ValueError: where the row was given without segment ids, or a document is not in one
            piece.
        """
        if self.segment_ids is None:
            raise ValueError("there are no segment ids: pass inspect_text the packed row and segment_ids=...")
        found = []
        for number in dict.fromkeys(self.segment_ids[self.segment_ids != 0].tolist()):
            own = _place(self.segment_ids, number)
            if not self.model.reads_sources:
                found.append(dataclasses.replace(self, ids=self.ids[own], trace=_cut(self.trace, own, own),
                                                 segment_ids=None))
                continue
            source = _place(self.source_segment_ids, number)
            trace = PairTrace(_cut(self.trace.encoder, source, source), _cut(self.trace.decoder, own, own),
                              _cut(self.trace.cross, own, source))
            found.append(dataclasses.replace(self, ids=self.ids[own], source_ids=self.source_ids[source], trace=trace,
                                             segment_ids=None, source_segment_ids=None))
        return found


def _place(segment_ids: np.ndarray, number: int) -> slice:
    places = np.flatnonzero(segment_ids == number)
    if not places.size or places[-1] - places[0] + 1 != places.size:
        raise ValueError(f"the tokens of document {number} are not in one piece")
    return slice(int(places[0]), int(places[-1]) + 1)


def _cut(trace: Trace, queries: slice, keys: slice) -> Trace:
    """The trace of one document: within it causality, window and linear bias are what they were."""
    sides = {"keys": keys, "values": keys}
    layers = {field.name: getattr(trace.layers, field.name) for field in dataclasses.fields(trace.layers)}
    return Trace(
        layers=dataclasses.replace(trace.layers, **{name: x[:, :, sides.get(name, queries)]
                                                    for name, x in layers.items() if x is not None}),
        final=None if trace.final is None else trace.final[:, queries],
        mask=AttentionMask(is_causal=trace.mask.is_causal, window=trace.mask.window), bias=trace.bias)


@jax.jit
def _maps(trace: Trace, layers: jax.Array, heads: jax.Array, queries: jax.Array) -> jax.Array:
    return trace.attention(layers=layers, heads=heads, queries=queries)[:, 0]
