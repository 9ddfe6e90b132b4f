"""Attention masks kept as structure, so that each kernel reads them in its own way."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys each query may attend to: the conjunction of its parts, ``True`` = may attend.

    Make one with :meth:`causal`, :meth:`sliding_window`, :meth:`padding`, :meth:`segments` or
    :meth:`explicit` and join them with ``&``. An empty mask allows everything.

    Attributes:
      is_causal: a query sees no key after its own place.
      window: a query sees keys fewer than this many places away.
      query_start: the place of the first query among the keys (the length of the cache before it);
        ``None`` is 0.
      segment_pairs: pairs of ids ``[B, T]``, ``[B, S]``; equal ids other than 0 may attend.
      valid_BS: keys that are no padding.
      lengths_B: the keys from this place of a row on are padding.
      allowed_BNTS: an explicit mask; B, N may be 1.
    """

    is_causal: bool = dataclasses.field(default=False, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    query_start: jax.Array | int | None = None
    segment_pairs: tuple[tuple[jax.Array, jax.Array], ...] = dataclasses.field(
        default=(), metadata={"axes": ("BT", "BS")})
    valid_BS: jax.Array | None = dataclasses.field(default=None, metadata={"axes": "BS"})
    lengths_B: jax.Array | None = dataclasses.field(default=None, metadata={"axes": "B"})
    allowed_BNTS: jax.Array | None = dataclasses.field(default=None, metadata={"axes": "BNTS"})

    @classmethod
    def causal(cls, query_start: jax.Array | int | None = None) -> Self:
        """Each query attends to keys at its own place and before."""
        return cls(is_causal=True, query_start=query_start)

    @classmethod
    def sliding_window(cls, window: int, query_start: jax.Array | int | None = None) -> Self:
        """Each query attends to keys fewer than ``window`` places away, on either side."""
        if window < 1:
            raise ValueError(f"window={window} must be at least 1 (the position itself)")
        return cls(window=window, query_start=query_start)

    @classmethod
    def padding(cls, valid_BS: jax.Array) -> Self:
        """Only keys where ``valid_BS`` is true are attended to."""
        return cls(valid_BS=valid_BS.astype(bool))

    @classmethod
    def lengths(cls, lengths_B: jax.Array) -> Self:
        """Only the first ``lengths_B`` keys of each row are attended to."""
        return cls(lengths_B=lengths_B)

    @classmethod
    def segments(cls, query_ids_BT: jax.Array, key_ids_BS: jax.Array | None = None) -> Self:
        """Attention stays within equal segment ids; id 0 is padding and attends to nothing."""
        return cls(segment_pairs=((query_ids_BT, query_ids_BT if key_ids_BS is None else key_ids_BS),))

    @classmethod
    def explicit(cls, allowed_BNTS: jax.Array) -> Self:
        """A boolean array; ``[T, S]`` and ``[B, T, S]`` are broadcast over what they lack."""
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
        """The mask that allows what both allow."""
        starts = [start for start in (self.query_start, other.query_start) if start is not None]
        if len(starts) == 2 and starts[0] is not starts[1]:
            raise ValueError("two masks with a query_start each cannot be joined; give it to one of them")
        return AttentionMask(
            is_causal=self.is_causal or other.is_causal,
            window=min((w for w in (self.window, other.window) if w is not None), default=None),
            query_start=starts[0] if starts else None,
            segment_pairs=self.segment_pairs + other.segment_pairs,
            valid_BS=_both(self.valid_BS, other.valid_BS),
            lengths_B=_least(self.lengths_B, other.lengths_B),
            allowed_BNTS=_both(self.allowed_BNTS, other.allowed_BNTS))

    def block(self, start: int, stop: int) -> Self:
        """The mask of the queries from ``start`` to ``stop`` over the keys before ``stop``, of
        self-attention."""
        def queries(x: jax.Array, axis: int) -> jax.Array:
            return x if x.shape[axis] == 1 else jax.lax.slice_in_dim(x, start, stop, axis=axis)

        def keys(x: jax.Array, axis: int) -> jax.Array:
            return x if x.shape[axis] == 1 else jax.lax.slice_in_dim(x, 0, stop, axis=axis)

        return dataclasses.replace(
            self, query_start=start + (0 if self.query_start is None else self.query_start),
            segment_pairs=tuple((queries(a, 1), keys(b, 1)) for a, b in self.segment_pairs),
            valid_BS=None if self.valid_BS is None else keys(self.valid_BS, 1),
            allowed_BNTS=None if self.allowed_BNTS is None else keys(queries(self.allowed_BNTS, 2), 3))

    def materialize(self, num_queries: int, num_keys: int, queries: jax.Array | None = None,
                    keys: jax.Array | None = None) -> jax.Array | None:
        """The mask as booleans, of all queries and keys or of some only.

        Args:
          num_queries: T.
          num_keys: S.
          queries: indices ``[R]`` of the rows wanted; ``None``: all T.
          keys: indices ``[C]`` of the columns wanted; ``None``: all S.

        Returns:
          ``[B or 1, N or 1, T or R or 1, S or C or 1]``; ``None`` when everything is allowed.
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
                near_TS = jnp.abs(query_TS - key_TS) < self.window
                allowed = _both(allowed, near_TS[None, None])
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
    """The entries of an axis with these indices; all of them where there are none, or the axis is
    broadcast."""
    return x if indices is None or x.shape[axis] == 1 else jnp.take(x, indices, axis=axis, mode="clip")


def _least(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    if a is None:
        return b
    return a if b is None else jnp.minimum(a, b)


def _both(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    if a is None:
        return b
    return a if b is None else a & b
