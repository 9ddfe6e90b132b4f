"""The class ``Inspection``: the tokens of texts, the trace of a model, and analysis methods."""

from __future__ import annotations

import dataclasses
import functools
import html as markup
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from transformer_jax.data.tokens import TextTokenizer
from transformer_jax.inspection import labels, maps, showing, texts, viewer
from transformer_jax.inspection.attribution import Attribution, direct_logit_attribution
from transformer_jax.inspection.lens import Lens, logit_lens, value_norms, value_weighted
from transformer_jax.inspection.mixing import rollout
from transformer_jax.inspection.parts import LanguageModel, check_kind, trace_of
from transformer_jax.models.output import Index, PairTrace, Trace, resolve

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, repr=False)
class Inspection:
    """One text (one row) or several texts (a padded batch), with the trace of a model that read it.

    Methods that return arrays work on one text, and their arrays have no batch axis. If the
    inspection holds several texts, call these methods on one element of ``texts``. Figures and
    pages leave padding out.

    Attributes:
      model: the model.
      tokenizer: its tokenizer, or ``None``.
      ids: the ids of the tokens that the model read (in an encoder-decoder, the decoder): ``[T]``,
        or ``[B, T]`` for several texts.
      trace: the trace of the forward pass, with a batch axis of 1 or B. Attention maps are computed
        from it on demand.
      segment_ids: the document of each token, 0 for padding, in the shape of ``ids``, or ``None``.
      source_ids: the token ids of an encoder-decoder's source, ``[S]`` or ``[B, S]``.
      source_segment_ids: the segment ids of the source, in the same form.
    """

    model: LanguageModel
    tokenizer: TextTokenizer | None
    ids: Int[np.ndarray, "*B T"]
    trace: Trace | PairTrace
    segment_ids: Int[np.ndarray, "*B T"] | None = None
    source_ids: Int[np.ndarray, "*B S"] | None = None
    source_segment_ids: Int[np.ndarray, "*B S"] | None = None

    def __repr__(self) -> str:
        return showing.describe(self)

    @functools.cached_property
    def texts(self) -> list[Inspection]:
        """One inspection for each text of a batch or document of a packed row, without padding.

        Raises:
          ValueError: if the tokens of a document are not contiguous.
        """
        if self.segment_ids is None:
            return [self]
        places = texts.places_of_texts(self.segment_ids, self.source_segment_ids)
        return [dataclasses.replace(
            self, ids=own.of(np.atleast_2d(self.ids)), trace=texts.cut(self.trace, own, source), segment_ids=None,
            source_ids=None if self.source_ids is None or source is None else source.of(np.atleast_2d(self.source_ids)),
            source_segment_ids=None) for own, source in places]

    def documents(self) -> list[Inspection]:
        """Splits a packed row into its documents.

        Returns:
          One inspection for each document, with its own tokens and its own part of the trace.

        Raises:
          ValueError: if the row has no segment ids, or if the tokens of a document are not
            contiguous.
        """
        if self.segment_ids is None:
            raise ValueError("this inspection has no segment ids: pass segment_ids=... to inspect_text")
        return self.texts

    @property
    def tokens(self) -> list[str]:
        """The tokens, those of the target if there is one; without a tokenizer, their ids."""
        self._check_single("tokens")
        return self.strings(self.ids)

    @property
    def source_tokens(self) -> list[str]:
        """The tokens of the source as strings; empty for a model without a source."""
        self._check_single("source_tokens")
        return [] if self.source_ids is None else self.strings(self.source_ids)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of attention that the model has, such as ``("self",)``."""
        return tuple(self.trace.parts())

    def labels(self, kind: str = "self") -> tuple[list[str], list[str]]:
        """Returns the labels of the axes of an attention map.

        Args:
          kind: the kind of attention, as in ``attention``.

        Returns:
          The tokens of the queries, and the tokens of the keys. In ``"cross"`` attention, the label
          of a query is the token that it predicts; the last one of a text is ``"(next)"``.
        """
        check_kind(self.model, kind)
        self._check_single("labels()")
        if kind != "cross":
            tokens = self.source_tokens if kind == "encoder" else self.tokens
            return tokens, tokens
        return labels.predicted_tokens(self.tokens, self.segment_ids), self.source_tokens

    def strings(self, ids: Any) -> Any:
        """Converts token ids to strings for display.

        Args:
          ids: one token id, or an array of token ids of any shape.

        Returns:
          A string, or lists of strings nested like the array.
        """
        ids = np.asarray(ids)
        if ids.ndim:
            return [self.strings(part) for part in ids]
        if self.tokenizer is None or ids >= self.tokenizer.vocab_size:  # padded vocabulary
            return str(int(ids))
        return self.tokenizer.pieces([int(ids)])[0]

    def attention(self, kind: str = "self", *, layers: Index = None, heads: Index = None,
                  queries: Index = None) -> Float[Array, "*layers_heads_queries S"]:
        """Computes the chosen attention maps, and no others.

        Args:
          kind: ``"self"``; in an encoder-decoder ``"self"`` (in the decoder), ``"encoder"``, or
            ``"cross"`` (from the target to the source).
          layers, heads, queries: one index, several, or all (``None``); negative indices count from
            the end. The queries are the rows of the maps.

        Returns:
          float32 ``[layers, heads, queries, S]``, without the axes that one number indexes.

        Raises:
          ValueError: if the kind or an index does not exist, or for several texts.
        """
        chosen, single = self._choose("attention()", kind, layers, heads, queries)
        return jnp.squeeze(_maps(trace_of(self.trace, kind), *chosen), single)

    def value_weighted(self, kind: str = "self", *, layers: Index = None, heads: Index = None,
                       queries: Index = None) -> Float[Array, "*layers_heads_queries S"]:
        """Computes attention maps weighted by value norms, as in Kobayashi et al. (2020).

        Args:
          kind, layers, heads, queries: as in ``attention``.

        Returns:
          float32 ``[layers, heads, queries, S]``, without the axes that one number indexes.
        """
        chosen, single = self._choose("value_weighted()", kind, layers, heads, queries)
        norms_LNS = value_norms(self.model, self.trace, kind=kind)[:, 0]
        weights = _maps(trace_of(self.trace, kind), *chosen)
        return jnp.squeeze(value_weighted(weights, norms_LNS[chosen[0]][:, chosen[1]]), single)

    def _choose(self, method: str, kind: str, layers: Index, heads: Index,
                queries: Index) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        check_kind(self.model, kind)
        self._check_single(method)
        L, _, T, N, _ = trace_of(self.trace, kind).queries.shape
        chosen = resolve("layers", layers, L), resolve("heads", heads, N), resolve("queries", queries, T)
        return tuple(indices for indices, _ in chosen), tuple(axis for axis, (_, one) in enumerate(chosen) if one)

    def summaries(self, kind: str = "self") -> dict[str, Float[Array, "L N"]]:
        """Computes summary statistics of every head with ``transformer_jax.inspection.summaries``.

        Args:
          kind: the kind of attention, as in ``attention``.

        Returns:
          float32 ``[L, N]`` for each statistic, by name. Several texts are averaged together.
        """
        check_kind(self.model, kind)
        ids = {"self": self.ids, "encoder": self.source_ids, "cross": None}[kind]
        return maps.summaries(trace_of(self.trace, kind), None if ids is None else np.atleast_2d(ids))

    def rollout(self, kind: str = "self") -> Float[Array, "L T T"]:
        """Computes the attention rollout up to each layer from the mean attention over heads.

        Args:
          kind: ``"self"`` or ``"encoder"``.

        Returns:
          float32 ``[L, T, T]``.

        Raises:
          ValueError: if ``kind`` is ``"cross"``.
        """
        if kind == "cross":
            raise ValueError("kind='cross' attends from one text to another; rollout needs kind='self' or 'encoder'")
        return rollout(self.attention(kind).mean(1))

    def logit_lens(self, positions: Index = None, *, top_k: int = 5) -> Lens:
        """Computes the predictions that the model would make if it ended before each layer.

        Args:
          positions: one position, several, or all (``None``); negative ones count from the end.
          top_k: the number of predictions.

        Returns:
          A ``Lens`` with arrays ``[L + 1, positions, top_k]``, or ``[L + 1, top_k]`` for one
          position. ``strings(lens.ids)`` gives the tokens.
        """
        self._check_single("logit_lens()")
        _, one = resolve("positions", positions, len(self.ids))
        found = logit_lens(self.model, self.trace, positions=positions, top_k=top_k)
        return jax.tree.map(lambda x: x[:, 0, 0] if one else x[:, 0], found)

    def attribution(self, position: int = -1, target: int | None = None) -> Attribution:
        """Computes how much each part of the model adds to the logit of a token.

        Args:
          position: the position whose prediction is explained; negative ones count from the end.
          target: the id of the token; by default the most probable token at this position.

        Returns:
          The contributions: ``heads`` ``[L, N]``, ``mlp`` ``[L]``, and scalars for the others.

        Raises:
          ValueError: if ``position`` is not one position in range, or ``target`` no token id.
        """
        self._check_single("attribution()")
        if np.ndim(position):
            raise ValueError(f"position={position!r}: pass one position; direct_logit_attribution accepts several")
        token = int(self.logit_lens(position, top_k=1).ids[-1, 0]) if target is None else target
        parts = direct_logit_attribution(self.model, self.trace, [[token]], positions=position)
        return jax.tree.map(lambda x: x[0, 0] if x.ndim == 2 else x[:, 0, 0], parts)

    def plot(self, kind: str | None = None, layer: int | None = None, head: int | None = None) -> Figure:
        """Draws the attention maps of all heads, of the heads of one layer, or of one head.

        Args:
          kind: the kind of attention; by default ``"cross"`` if the model has it, else ``"self"``.
          layer: one layer; by default all. Of one ``"cross"`` layer the mean over heads is drawn.
          head: one head of this layer; by default all.

        Returns:
          A matplotlib figure, which ``transformer_jax.inspection.plots.save`` can write to a file.

        Raises:
          ValueError: if the kind or an index does not exist, if a head is given without a layer, if
            the maps are too many for a figure, or if the inspection holds several texts.
        """
        self._check_single("plot()")
        return showing.plot(self, kind, layer, head)

    def to_html(self, path: str | pathlib.Path | None = None, *, kind: str | None = None, layer: int = 0,
                head: int = 0, title: str = "Attention") -> str | None:
        """Makes one HTML page to explore all attention maps of all texts in any browser.

        Args:
          path: the file to write; ``None`` to return the page instead.
          kind: the kind of attention that the page shows first; by default as in ``plot``.
          layer, head: the map that it shows first; negative indices count from the end.
          title: the title of the page.

        Returns:
          The page as a string if ``path`` is ``None``, else ``None``.

        Raises:
          ValueError: if the kind or an index does not exist, or if a page cannot hold the texts.
        """
        page_maps = showing.page_maps(self, kind)
        if path is None:
            return viewer.html(page_maps, title=title, layer=layer, head=head)
        return viewer.save_html(path, page_maps, title=title, layer=layer, head=head)

    def _repr_html_(self) -> str:
        """Returns the page in a frame for Jupyter and Colab; if it is too large, a description."""
        try:
            return viewer.iframe_html(showing.page_maps(self, None))
        except ValueError as reason:
            return f"<pre>{markup.escape(repr(self))}\n{markup.escape(str(reason))}</pre>"

    def _check_single(self, method: str) -> None:
        if self.ids.ndim > 1:
            raise ValueError(f"{method} works on one text, and this inspection holds {len(self.texts)}: choose one "
                             f"from .texts, such as inspected.texts[0].{method}")


@jax.jit
def _maps(trace: Trace, layers: jax.Array, heads: jax.Array, queries: jax.Array) -> jax.Array:
    return trace.attention(layers=layers, heads=heads, queries=queries)[:, 0]
