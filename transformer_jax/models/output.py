"""What a forward pass returns: logits, and the trace that the compiler prunes where nobody reads
it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.models import names
from transformer_jax.nn.blocks import LayerTrace
from transformer_jax.nn.cache import KVCache
from transformer_jax.ops.attention import Bias, masked_softmax
from transformer_jax.ops.masks import AttentionMask, take
from transformer_jax.ops.positions import PositionBias

Index = int | Sequence[int] | np.ndarray | jax.Array | None


class _Named:
    """Reading by name: the names are those of the sites of interventions, see docs/notation.md."""

    def names(self) -> dict[str, tuple[int, ...]]:
        """Every name that the trace can be read by, such as ``"layers.3.head_output"``, with the
        shape of its value."""
        return names.names(self.parts())

    def __getitem__(self, name: str) -> jax.Array:
        """The value of a name; of a site alone, such as ``"head_output"``, that of all layers
        ``[L, ...]``.

        Raises:
          KeyError: for a name that there is not, with the nearest one.
        """
        return names.read(self.parts(), name)

    def __repr__(self) -> str:
        return names.table(self.parts(), type(self).__name__)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Trace(_Named):
    """The inside of a forward pass, linear in the length of the text; maps are computed when asked
    for.

    Attributes:
      layers: every field of :class:`LayerTrace` with a leading layer axis ``[L, ...]``.
      final: the stream after the last layer, before the final norm ``[B, T, D]``; ``None`` in the
        trace of cross attention.
      mask: who may attend to whom.
      bias: the structured bias of positions, if any.
    """

    layers: LayerTrace
    final: jax.Array | None
    mask: AttentionMask
    bias: Bias

    def parts(self) -> dict[str, Trace]:
        """The trace of each kind of attention; here there is one, ``"self"``."""
        return {"self": self}

    @property
    def residual(self) -> jax.Array:
        """The residual stream before each layer and after the last, ``[L + 1, B, T, D]``.

        Of cross attention, the stream that entered it in each layer, ``[L, B, T, D]``.
        """
        if self.final is None:
            return self.layers.residual
        return jnp.concatenate([self.layers.residual, self.final[None]])

    @property
    def queries(self) -> jax.Array:
        """``[L, B, T, N, H]``, after norm and rotation."""
        return self.layers.queries

    @property
    def keys(self) -> jax.Array:
        """``[L, B, S, K, H]``, after norm and rotation."""
        return self.layers.keys

    @property
    def values(self) -> jax.Array:
        """``[L, B, S, K, H]``."""
        return self.layers.values

    def attention(self, layers: Index = None, heads: Index = None, queries: Index = None) -> jax.Array:
        """Attention maps from the saved queries and keys: only those asked for are computed.

        Args:
          layers: one layer, several, or all (``None``); negative indices count from the end.
          heads: likewise.
          queries: likewise, the rows of the map.

        Returns:
          float32 ``[layers, B, heads, queries, S]``; an axis indexed by a single number is dropped.
          Rows sum to one (to zero where nothing may be attended to).

        Raises:
          ValueError: for an index out of range.
        """
        return self._maps(layers, heads, queries, masked_softmax)

    def scores(self, layers: Index = None, heads: Index = None, queries: Index = None) -> jax.Array:
        """Attention scores before the softmax, with the bias; -inf where a query may not attend.

        Arguments and shape are those of :meth:`attention`.
        """
        return self._maps(layers, heads, queries, lambda scores_BNRS, allowed: (
            scores_BNRS if allowed is None else jnp.where(allowed, scores_BNRS, -jnp.inf)))

    def _maps(self, layers: Index, heads: Index, queries: Index,
              finish: Callable[[jax.Array, jax.Array | None], jax.Array]) -> jax.Array:
        L, _, T, N, H = self.queries.shape
        S, K = self.keys.shape[2:4]
        layer_R, one_layer = resolve("layers", layers, L)
        head_R, one_head = resolve("heads", heads, N)
        query_R, one_query = resolve("queries", queries, T)
        layer_R, head_R, query_R = map(jnp.asarray, (layer_R, head_R, query_R))

        allowed = self.mask.materialize(T, S, query_R)
        if allowed is not None and allowed.shape[1] == N and N > 1:
            allowed = allowed[:, head_R]

        def one(layer: jax.Array) -> jax.Array:
            q_BRNH = self.queries[layer][:, query_R][:, :, head_R].astype(jnp.float32)
            k_BSNH = self.keys[layer][:, :, head_R // (N // K)].astype(jnp.float32)
            scores_BNRS = jnp.einsum("BRNH,BSNH->BNRS", q_BRNH / jnp.sqrt(H), k_BSNH)
            bias = self._bias_rows(layer, T, S, query_R)
            if bias is not None:
                scores_BNRS += bias[:, head_R]
            return finish(scores_BNRS, allowed)

        maps = jax.lax.map(one, layer_R)
        squeezed = tuple(axis for axis, single in ((0, one_layer), (2, one_head), (3, one_query)) if single)
        return jnp.squeeze(maps, squeezed)

    def _bias_rows(self, layer: jax.Array, T: int, S: int, query_R: jax.Array) -> jax.Array | None:
        if self.layers.bias is not None:
            return self.layers.bias[layer][:, :, query_R]
        if isinstance(self.bias, PositionBias):
            return self.bias.materialize(T, S, query_R)
        return None if self.bias is None else take(self.bias, query_R, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class PairTrace(_Named):
    """The inside of an encoder-decoder's forward pass.

    Attributes:
      encoder: the source's; ``None`` when decoding from a cache.
      decoder: the target's, its attention to itself.
      cross: the decoder's attention to the source: queries of the target, keys of the source.
    """

    encoder: Trace | None
    decoder: Trace
    cross: Trace

    def parts(self) -> dict[str, Trace]:
        """The trace of each kind of attention; without the encoder's when decoding from a cache."""
        found = {"self": self.decoder, "encoder": self.encoder, "cross": self.cross}
        return {kind: trace for kind, trace in found.items() if trace is not None}


def resolve(name: str, wanted: Index, size: int) -> tuple[jax.Array | np.ndarray, bool]:
    """Indices from 0, and whether a single one was meant; negative ones count from the end,
    ``None`` is all.

    Raises:
      ValueError: for an index out of range, where it is known before the program runs.
    """
    if wanted is None:
        return np.arange(size, dtype=np.int32), False
    if isinstance(wanted, jax.core.Tracer):
        return jnp.where(wanted < 0, wanted + size, wanted).reshape(-1), wanted.ndim == 0
    array = np.asarray(wanted, np.int32)
    for index in array.flat:
        if not -size <= index < size:
            raise ValueError(f"{name}={wanted}: index {index} is out of range for {size} {name}")
    return np.where(array < 0, array + size, array).reshape(-1), array.ndim == 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """The result of a forward pass.

    Attributes:
      logits: float32 ``[B, T, V]``.
      hidden: the final stream, normed: what the unembedding reads ``[B, T, D]``.
      trace: everything on the way; a :class:`PairTrace` in an encoder-decoder.
      cache: the extended cache when one was given.
    """

    logits: jax.Array
    hidden: jax.Array
    trace: Trace | PairTrace
    cache: KVCache | None
