"""The result of a forward pass: logits, and a trace whose unread parts the compiler removes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp

from transformer_jax.config import ModelConfig
from transformer_jax.models import names
from transformer_jax.models.indices import Index, resolve
from transformer_jax.nn.attention import AttentionContext
from transformer_jax.nn.blocks import LayerTrace
from transformer_jax.nn.cache import KVCache
from transformer_jax.ops.attention import Bias, masked_softmax
from transformer_jax.ops.linear import soft_cap
from transformer_jax.ops.masks import AttentionMask, take
from transformer_jax.ops.positions import PositionBias

_NO_WINDOW = 2**31 - 1  # more than any distance


class _Named:
    """A trace whose values can be read by the names of intervention sites, see docs/notation.md."""

    def parts(self) -> dict[str, Trace]:
        """Returns the trace of each kind of attention, by the name of the kind.

        Returns:
          A dictionary from the kind of attention to its trace.
        """
        raise NotImplementedError

    def names(self) -> dict[str, tuple[int, ...]]:
        """Lists the names that the trace can be read by.

        Returns:
          A dictionary from each name, such as ``"layers.3.head_output"``, to the shape of its
          value.
        """
        return names.names(self.parts())

    def __getitem__(self, name: str) -> jax.Array:
        """Returns the value of a name; for the name of a site alone, such as ``"head_output"``, the
        values in all layers ``[L, ...]``.

        Raises:
          KeyError: if the trace has no such name; the message suggests the nearest one.
        """
        return names.read(self.parts(), name)

    def __repr__(self) -> str:
        return names.table(self.parts(), type(self).__name__)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Trace(_Named):
    """The intermediate values of a forward pass, whose size is linear in the length of the text.

    Attention maps, whose size is quadratic, are computed only on request.

    Attributes:
      layers: a ``LayerTrace``, every field of which has a leading layer axis ``[L, ...]``.
      final: the residual stream after the last layer, before the final norm ``[B, T, D]``; ``None``
        in the trace of cross attention.
      mask: the keys that each query may attend to.
      bias: the position bias of the attention scores, if there is one.
      windows: the sliding window of each layer, ``None`` for layers without one. ``()``: the window
        of ``mask`` is that of all layers.
      cap: the soft cap of the attention scores, see ``transformer_jax.config.Limits``.
      expert_layers: the layers that have experts, if others have none. The values of the router are
        then those of these layers alone, and ``neurons`` those of the other layers. ``()``: all
        layers are alike.
    """

    layers: LayerTrace
    final: jax.Array | None
    mask: AttentionMask
    bias: Bias
    windows: tuple[int | None, ...] = dataclasses.field(default=(), metadata={"static": True})
    cap: float | None = dataclasses.field(default=None, metadata={"static": True})
    expert_layers: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    @classmethod
    def of(cls, config: ModelConfig, layers: LayerTrace, final: jax.Array | None, context: AttentionContext) -> Trace:
        """Makes the trace of a stack's self-attention.

        Args:
          config: the model's config.
          layers: the stacked traces of the layers.
          final: the residual stream after the last layer.
          context: the inputs of attention, with the mask that all layers share.

        Returns:
          The trace.
        """
        experts = () if config.moe is None else config.moe.layers(config)
        return cls(layers=layers, final=final, mask=context.mask, bias=context.bias, cap=config.limits.scores,
                   windows=config.windows(layers.residual.shape[0]) if config.layer_pattern else (),
                   expert_layers=experts if len(experts) < config.num_layers else ())

    def parts(self) -> dict[str, Trace]:
        """Returns the trace of each kind of attention, by the name of the kind.

        Returns:
          A dictionary with this trace as ``"self"``.
        """
        return {"self": self}

    @property
    def residual(self) -> jax.Array:
        """The residual stream before each layer and after the last, ``[L + 1, B, T, D]``.

        In a trace of cross attention: the residual stream before the cross attention of each layer,
        ``[L, B, T, D]``.
        """
        if self.final is None:
            return self.layers.residual
        return jnp.concatenate([self.layers.residual, self.final[None]])

    @property
    def queries(self) -> jax.Array:
        """Queries after norm and rotation, ``[L, B, T, N, H]``."""
        return self.layers.queries

    @property
    def keys(self) -> jax.Array:
        """Keys after norm and rotation, ``[L, B, S, K, H]``."""
        return self.layers.keys

    @property
    def values(self) -> jax.Array:
        """Values, ``[L, B, S, K, H]``."""
        return self.layers.values

    def allowed(self, layer: jax.Array | int, queries: jax.Array) -> jax.Array | None:
        """Returns the keys that some queries may attend to in a layer.

        Args:
          layer: the index of the layer, which may be traced.
          queries: the indices ``[R]`` of the queries.

        Returns:
          ``[B or 1, N or 1, R, S]``, or ``None`` if everything is allowed.
        """
        mask = self.mask
        if self.windows:
            sizes_L = jnp.asarray([_NO_WINDOW if window is None else window for window in self.windows])
            mask = dataclasses.replace(mask, window=cast(int, sizes_L[layer]))
        return mask.materialize(self.queries.shape[2], self.keys.shape[2], queries)

    def attention(self, layers: Index = None, heads: Index = None, queries: Index = None) -> jax.Array:
        """Computes attention maps from the saved queries and keys, for the requested indices only.

        Args:
          layers: one layer, several, or all (``None``); negative indices count from the end.
          heads: the same for the heads.
          queries: the same for the queries, which are the rows of a map.

        Returns:
          float32 ``[layers, B, heads, queries, S]``; an axis indexed by a single number is dropped.
          Each row sums to one, to less with sinks (``config.use_sinks``), or to zero if the query may
          not attend to any key.

        Raises:
          ValueError: if an index is out of range.
        """
        return self._maps(layers, heads, queries, masked_softmax)

    def scores(self, layers: Index = None, heads: Index = None, queries: Index = None) -> jax.Array:
        """Computes attention scores: the input of the softmax, with the position bias added.

        Args:
          layers: one layer, several, or all (``None``); negative indices count from the end.
          heads: the same for the heads.
          queries: the same for the queries, which are the rows of a map.

        Returns:
          float32, with the shape that ``attention`` returns; -inf where a query may not attend to a
          key.

        Raises:
          ValueError: if an index is out of range.
        """
        return self._maps(layers, heads, queries, lambda scores_BNRS, allowed, sinks_N11: (
            scores_BNRS if allowed is None else jnp.where(allowed, scores_BNRS, -jnp.inf)))

    def _maps(self, layers: Index, heads: Index, queries: Index,
              finish: Callable[[jax.Array, jax.Array | None, jax.Array | None], jax.Array]) -> jax.Array:
        """Computes the scores of the requested indices, layer by layer, and applies
        ``finish(scores, allowed, sinks)``."""
        L, _, T, N, H = self.queries.shape
        S, K = self.keys.shape[2:4]
        layer_R, one_layer = resolve("layers", layers, L)
        head_R, one_head = resolve("heads", heads, N)
        query_R, one_query = resolve("queries", queries, T)
        layer_R, head_R, query_R = map(jnp.asarray, (layer_R, head_R, query_R))

        def one(layer: jax.Array) -> jax.Array:
            allowed = self.allowed(layer, query_R)
            if allowed is not None and allowed.shape[1] == N and N > 1:
                allowed = allowed[:, head_R]
            q_BRNH = self.queries[layer][:, query_R][:, :, head_R].astype(jnp.float32)
            k_BSNH = self.keys[layer][:, :, head_R // (N // K)].astype(jnp.float32)
            scores_BNRS = jnp.einsum("BRNH,BSNH->BNRS", q_BRNH / jnp.sqrt(H), k_BSNH)
            if self.cap is not None:
                scores_BNRS = soft_cap(scores_BNRS, self.cap)
            bias = self._bias_rows(layer, T, S, query_R)
            if bias is not None:
                scores_BNRS += bias[:, head_R]
            sinks = self.layers.sinks
            return finish(scores_BNRS, allowed, None if sinks is None else sinks[layer][head_R, None, None])

        maps = jax.lax.map(one, layer_R)
        squeezed = tuple(axis for axis, single in ((0, one_layer), (2, one_head), (3, one_query)) if single)
        return jnp.squeeze(maps, squeezed)

    def _bias_rows(self, layer: jax.Array, T: int, S: int, query_R: jax.Array) -> jax.Array | None:
        """Returns the position bias of some queries in one layer, or ``None`` if there is no
        bias."""
        if self.layers.bias is not None:
            return self.layers.bias[layer][:, :, query_R]
        if isinstance(self.bias, PositionBias):
            return self.bias.materialize(T, S, query_R)
        return None if self.bias is None else take(self.bias, query_R, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class PairTrace(_Named):
    """The intermediate values of an encoder-decoder's forward pass.

    Attributes:
      encoder: the trace of the encoder; ``None`` when decoding from a cache.
      decoder: the trace of the decoder, with its self attention.
      cross: the decoder's attention to the source: queries of the target, keys of the source.
    """

    encoder: Trace | None
    decoder: Trace
    cross: Trace

    def parts(self) -> dict[str, Trace]:
        """Returns the trace of each kind of attention, by the name of the kind.

        Returns:
          A dictionary with the keys ``"self"``, ``"encoder"`` and ``"cross"``; without
          ``"encoder"`` when decoding from a cache.
        """
        found = {"self": self.decoder, "encoder": self.encoder, "cross": self.cross}
        return {kind: trace for kind, trace in found.items() if trace is not None}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """The result of a forward pass.

    Attributes:
      logits: float32 ``[B, T, V]``.
      hidden: the hidden states after the final norm, which the unembedding reads ``[B, T, D]``.
      trace: the intermediate values; a ``PairTrace`` for an encoder-decoder.
      cache: the extended cache if one was given, else ``None``.
    """

    logits: jax.Array
    hidden: jax.Array
    trace: Trace | PairTrace
    cache: KVCache | None
