"""Attention masks that store their structure instead of an array.

Each kernel converts the structure to the form that it needs.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys each query may attend to. A key must be allowed by all parts of the mask.

    Make masks with ``causal``, ``sliding_window``, ``padding``, ``lengths``, ``segments`` or
    ``explicit`` and combine them with ``&``. An empty mask allows everything.

    Attributes:
      is_causal: Whether a query may attend only to keys at its own index and before.
      window: A query may attend only to keys fewer than this many indices away; ``None`` is no
        limit.
      positions: The positions of queries ``[B, T]`` and keys ``[B, S]`` in their text. If they are
        given, the window counts positions instead of indices.
      query_start: The index of the first query among the keys, which is the number of keys in the
        cache before it. ``None`` is 0.
      segment_pairs: Pairs of segment ids, ``[B, T]`` of queries and ``[B, S]`` of keys. A query may
        attend to keys with the same id, unless the id is 0.
      valid_BS: ``True`` for keys that are not padding.
      lengths_B: In each row, the keys from this index on are padding.
      allowed_BNTS: An explicit mask; B and N may be 1.
    """

    is_causal: bool = dataclasses.field(default=False, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    positions: tuple[jax.Array, jax.Array] | None = dataclasses.field(default=None, metadata={"axes": ("BT", "BS")})
    query_start: jax.Array | int | None = None
    segment_pairs: tuple[tuple[jax.Array, jax.Array], ...] = dataclasses.field(
        default=(), metadata={"axes": ("BT", "BS")})
    valid_BS: jax.Array | None = dataclasses.field(default=None, metadata={"axes": "BS"})
    lengths_B: jax.Array | None = dataclasses.field(default=None, metadata={"axes": "B"})
    allowed_BNTS: jax.Array | None = dataclasses.field(default=None, metadata={"axes": "BNTS"})

    @classmethod
    def causal(cls, query_start: jax.Array | int | None = None) -> Self:
        """Makes a mask in which each query attends to keys at its own index and before.

        Args:
          query_start: The index of the first query among the keys; ``None`` is 0.

        Returns:
          The mask.
        """
        return cls(is_causal=True, query_start=query_start)

    @classmethod
    def sliding_window(cls, window: int, query_start: jax.Array | int | None = None) -> Self:
        """Makes a mask in which each query attends to keys fewer than ``window`` indices away.

        The window extends to both sides. Combine it with ``causal()`` to exclude later keys.

        Args:
          window: The size of the window on each side, 1 or more. It includes the query's own index.
          query_start: The index of the first query among the keys; ``None`` is 0.

        Returns:
          The mask.

        Raises:
          ValueError: ``window`` is less than 1.
        """
        if window < 1:
            raise ValueError(f"window={window} must be at least 1 (the position itself)")
        return cls(window=window, query_start=query_start)

    @classmethod
    def padding(cls, valid_BS: Bool[Array, "B S"]) -> Self:
        """Makes a mask that allows only the keys where ``valid_BS`` is true.

        Args:
          valid_BS: ``[B, S]``; true (or nonzero) for keys that are not padding.

        Returns:
          The mask.
        """
        return cls(valid_BS=valid_BS.astype(bool))

    @classmethod
    def lengths(cls, lengths_B: Int[Array, " B"]) -> Self:
        """Makes a mask that allows only the first ``lengths_B`` keys of each row.

        Args:
          lengths_B: The number of keys in each row, integers ``[B]``.

        Returns:
          The mask.
        """
        return cls(lengths_B=lengths_B)

    @classmethod
    def segments(cls, query_ids_BT: Shaped[Array, "B T"], key_ids_BS: Shaped[Array, "B S"] | None = None) -> Self:
        """Makes a mask that allows attention only between equal segment ids.

        Id 0 marks padding: it attends to nothing, and nothing attends to it.

        Args:
          query_ids_BT: The segment ids of the queries, integers ``[B, T]``.
          key_ids_BS: The segment ids of the keys, integers ``[B, S]``. ``None`` means that the keys
            have the ids of the queries.

        Returns:
          The mask.
        """
        return cls(segment_pairs=((query_ids_BT, query_ids_BT if key_ids_BS is None else key_ids_BS),))

    @classmethod
    def explicit(cls, allowed_BNTS: Bool[Array, ...]) -> Self:
        """Makes a mask from a boolean array.

        Args:
          allowed_BNTS: ``True`` where a query may attend to a key; ``[T, S]``, ``[B, T, S]`` or
            ``[B, N, T, S]``. Missing axes are broadcast.

        Returns:
          The mask.

        Raises:
          ValueError: The array is not boolean, or has fewer than 2 or more than 4 axes.
        """
        if allowed_BNTS.dtype != bool:
            raise ValueError(f"an attention mask is boolean (True = may attend), not {allowed_BNTS.dtype}; "
                             "an additive mask is a bias")
        if allowed_BNTS.ndim == 2:
            allowed_BNTS = allowed_BNTS[None, None]
        elif allowed_BNTS.ndim == 3:
            allowed_BNTS = allowed_BNTS[:, None]
        elif allowed_BNTS.ndim != 4:
            raise ValueError(f"an attention mask has 2 to 4 dimensions ([B, N,] T, S), not {allowed_BNTS.ndim}")
        return cls(allowed_BNTS=allowed_BNTS)

    def __and__(self, other: Self) -> Self:
        """Returns the mask that allows what both masks allow."""
        starts = [start for start in (self.query_start, other.query_start) if start is not None]
        if len(starts) == 2 and starts[0] is not starts[1]:
            raise ValueError("two masks that both have a query_start cannot be combined; give query_start to only "
                             "one of them")
        return type(self)(
            is_causal=self.is_causal or other.is_causal,
            window=min((w for w in (self.window, other.window) if w is not None), default=None),
            positions=other.positions if self.positions is None else self.positions,
            query_start=starts[0] if starts else None,
            segment_pairs=self.segment_pairs + other.segment_pairs,
            valid_BS=_both(self.valid_BS, other.valid_BS),
            lengths_B=_least(self.lengths_B, other.lengths_B),
            allowed_BNTS=_both(self.allowed_BNTS, other.allowed_BNTS))

    def block(self, start: int, stop: int) -> Self:
        """Returns the part of a self-attention mask for one block of queries.

        Args:
          start: The index of the block's first query.
          stop: The index after the block's last query.

        Returns:
          The mask of the queries from ``start`` to ``stop`` and the keys before ``stop``.
        """
        def queries(x: jax.Array, axis: int) -> jax.Array:
            return x if x.shape[axis] == 1 else jax.lax.slice_in_dim(x, start, stop, axis=axis)

        def keys(x: jax.Array, axis: int) -> jax.Array:
            return x if x.shape[axis] == 1 else jax.lax.slice_in_dim(x, 0, stop, axis=axis)

        return dataclasses.replace(
            self, query_start=start + (0 if self.query_start is None else self.query_start),
            positions=None if self.positions is None else (queries(self.positions[0], 1), keys(self.positions[1], 1)),
            segment_pairs=tuple((queries(a, 1), keys(b, 1)) for a, b in self.segment_pairs),
            valid_BS=None if self.valid_BS is None else keys(self.valid_BS, 1),
            allowed_BNTS=None if self.allowed_BNTS is None else keys(queries(self.allowed_BNTS, 2), 3))

    def materialize(self, num_queries: int, num_keys: int, queries: Int[Array, " R"] | None = None,
                    keys: Int[Array, " C"] | None = None) -> Bool[Array, "B N T S"] | None:
        """Converts the mask to a boolean array, for all queries and keys or for some of them.

        Args:
          num_queries: The number of queries, T.
          num_keys: The number of keys, S.
          queries: The indices ``[R]`` of the wanted queries; ``None`` means all T.
          keys: The indices ``[C]`` of the wanted keys; ``None`` means all S.

        Returns:
          ``[B or 1, N or 1, T or R or 1, S or C or 1]``, or ``None`` if everything is allowed.
        """
        rows_T = jnp.arange(num_queries) if queries is None else queries
        columns_S = jnp.arange(num_keys) if keys is None else keys
        allowed = None
        if self.is_causal or self.window is not None:
            query_TS = (rows_T + (0 if self.query_start is None else self.query_start))[:, None]
            key_TS = columns_S[None, :]
            if self.is_causal:
                allowed = (key_TS <= query_TS)[None, None]
            if self.window is not None:
                distances_BTS = (query_TS - key_TS)[None]
                if self.positions is not None:
                    query_BT, key_BS = take(self.positions[0], queries, 1), take(self.positions[1], keys, 1)
                    distances_BTS = query_BT[:, :, None] - key_BS[:, None, :]
                allowed = _both(allowed, (jnp.abs(distances_BTS) < self.window)[:, None])
        for query_ids_BT, key_ids_BS in self.segment_pairs:
            query_ids_BT, key_ids_BS = take(query_ids_BT, queries, 1), take(key_ids_BS, keys, 1)
            same_BTS = (query_ids_BT[:, :, None] == key_ids_BS[:, None, :]) & (key_ids_BS != 0)[:, None, :]
            allowed = _both(allowed, same_BTS[:, None])
        if self.valid_BS is not None:
            allowed = _both(allowed, take(self.valid_BS, keys, 1)[:, None, None, :])
        if self.lengths_B is not None:
            allowed = _both(allowed, (columns_S[None, :] < self.lengths_B[:, None])[:, None, None, :])
        if self.allowed_BNTS is not None:
            allowed = _both(allowed, take(take(self.allowed_BNTS, queries, 2), keys, 3))
        return allowed


def take(x: jax.Array, indices: jax.Array | None, axis: int) -> jax.Array:
    """Takes the entries of an axis with the given indices.

    Args:
      x: Any array.
      indices: Integers ``[R]``; ``None`` means all entries.
      axis: The axis. If its size is 1, it is a broadcast axis and stays as it is.

    Returns:
      ``x`` with R entries on the axis, or ``x`` itself.
    """
    return x if indices is None or x.shape[axis] == 1 else jnp.take(x, indices, axis=axis, mode="clip")


def _least(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    """Returns the elementwise minimum; ``None`` is no limit."""
    if a is None:
        return b
    return a if b is None else jnp.minimum(a, b)


def _both(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    """Returns the elementwise conjunction; ``None`` allows everything."""
    if a is None:
        return b
    return a if b is None else a & b
