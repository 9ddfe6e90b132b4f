"""Position encodings as pure functions: sinusoids, and linear and learned biases."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def sinusoidal(positions: Int[Array, "*tokens"], dim: int, *, halves: bool = False,
               closed: bool = False) -> Float[Array, "*tokens D"]:
    """Computes sinusoidal position embeddings.

    PE(pos, 2i) = sin(pos / 10000^(2i/dim)) and PE(pos, 2i+1) = cos(pos / 10000^(2i/dim)).

    Source: Vaswani et al. (2017), section 3.5.

    Args:
      positions: Integers ``[...]``.
      dim: The number of channels, which must be even.
      halves: If true, all sines come before all cosines, as in Marian. Otherwise sines and cosines
        alternate.
      closed: If true, the lowest frequency is exactly 1 / 10000, as in fairseq: 2i / (dim - 2)
        takes the place of 2i / dim.

    Returns:
      float32 ``[..., dim]``.

    Raises:
      ValueError: ``dim`` is odd, or less than 4 with ``closed``.
    """
    if dim % 2:
        raise ValueError(f"sinusoidal positions come in pairs of sine and cosine: dim={dim} must be even")
    if closed and dim < 4:
        raise ValueError(f"dim={dim} has one frequency, which cannot be both the highest and the lowest: expected at "
                         "least 4")
    period = dim - 2 if closed else dim
    angles = positions[..., None] * jnp.exp(jnp.arange(0, dim, 2) * (-math.log(10_000.0) / period))
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-2 if halves else -1)
    return waves.reshape(*positions.shape, dim)


def alibi_slopes(num_heads: int) -> Float[Array, " N"]:
    """Computes the slope of each head's ALiBi bias: a geometric series that starts at 2^(-8/N).

    Source: Press et al. (2021). If N is not a power of two, the slopes are the series of the next
    lower power, followed by every other term of the series of the next higher power, as in the
    authors' code.

    Args:
      num_heads: The number of heads, N.

    Returns:
      float32 ``[N]``.
    """
    def series(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    power = 2 ** math.floor(math.log2(num_heads))
    return jnp.asarray(series(power) + series(2 * power)[0::2][: num_heads - power], jnp.float32)


@runtime_checkable
class PositionBias(Protocol):
    """A bias of the attention scores that stores its structure instead of an array.

    Any registered pytree with the method ``materialize`` is a ``PositionBias``. If the bias depends
    only on distances, derive it from ``OffsetBias``, which takes a few lines.

    On a mesh that shards the tokens of a row, each device can materialize its own part of the bias
    if the bias is a frozen dataclass that has a field ``query_start`` and declares the axes of its
    other arrays: ``dataclasses.field(metadata={"axes": "N"})``. The letters B, T, S and N stand for
    axes that may be sharded, any other letter for an axis that is not. Any other bias is
    materialized before it is sharded.

    If materializing is expensive, set the class attribute ``materialize_once = True``: for short
    texts, all layers of a stack then share one array. Otherwise each layer materializes what it
    needs.
    """

    def materialize(self, num_queries: int, num_keys: int, queries: Int[Array, " R"] | None = None,
                    keys: Int[Array, " C"] | None = None) -> Float[Array, "B N T S"]:
        """Converts the bias to an array, for all queries and keys or for some of them.

        Args:
          num_queries: The number of queries, T.
          num_keys: The number of keys, S.
          queries: The indices ``[R]`` of the wanted queries; ``None`` means all T.
          keys: The indices ``[C]`` of the wanted keys; ``None`` means all S.

        Returns:
          ``[B or 1, N, T or R, S or C]``.
        """
        ...


class _ByOffset:
    """The base of biases that depend only on the position of the key minus that of the query."""

    query_start: jax.Array | int | None
    positions: tuple[jax.Array, jax.Array] | None

    def values(self, offsets_BTS: jax.Array) -> jax.Array:
        """Computes the bias for given offsets.

        Args:
          offsets_BTS: The position of each key minus that of each query, integers
            ``[B or 1, T, S]``.

        Returns:
          ``[B or 1, N, T, S]``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method values(offsets_BTS)")

    def materialize(self, num_queries: int, num_keys: int, queries: jax.Array | None = None,
                    keys: jax.Array | None = None) -> jax.Array:
        """Converts the bias to an array; see ``PositionBias.materialize``."""
        return self.values(self._offsets(num_queries, num_keys, queries, keys))

    def _offsets(self, num_queries: int, num_keys: int, queries: jax.Array | None,
                 keys: jax.Array | None) -> jax.Array:
        """Returns key position minus query position for each pair, ``[B or 1, T or R, S or C]``."""
        rows_T = jnp.arange(num_queries) if queries is None else queries
        columns_S = jnp.arange(num_keys) if keys is None else keys
        if self.positions is not None:
            query_BT, key_BS = self.positions
            return (jnp.take(key_BS, columns_S, axis=1, mode="clip")[:, None, :]
                    - jnp.take(query_BT, rows_T, axis=1, mode="clip")[:, :, None])
        rows_T = rows_T + (0 if self.query_start is None else self.query_start)
        return (columns_S[None, :] - rows_T[:, None])[None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffsetBias(_ByOffset):
    """A base class for biases that depend only on the position of the key minus that of the query.

    A subclass must be a registered, frozen dataclass. Its fields hold the weights and declare their
    axes (see ``PositionBias``), and its method ``values`` computes the bias ``[B or 1, N, T, S]``
    from the offsets ``[B or 1, T, S]``.

    Attributes:
      query_start: The index of the first query among the keys; ``None`` is 0.
      positions: The positions of the queries ``[B, T]`` and of the keys ``[B, S]`` in their text.
        ``None`` means that the indices among the keys give the distances.
    """

    query_start: jax.Array | int | None = None
    positions: tuple[jax.Array, jax.Array] | None = dataclasses.field(default=None, metadata={"axes": ("BT", "BS")})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearBias(_ByOffset):
    """The bias of ALiBi: minus slope times distance is added to the scores.

    Attributes:
      slopes_N: One slope for each head, float32 ``[N]``.
      query_start: The index of the first query among the keys; ``None`` is 0.
      positions: The positions of the queries ``[B, T]`` and of the keys ``[B, S]`` in their text.
        ``None`` means that the indices among the keys give the distances.
    """

    slopes_N: jax.Array = dataclasses.field(metadata={"axes": "N"})
    query_start: jax.Array | int | None = None
    positions: tuple[jax.Array, jax.Array] | None = dataclasses.field(default=None, metadata={"axes": ("BT", "BS")})

    def values(self, offsets_BTS: Int[Array, "B T S"]) -> Float[Array, "B N T S"]:
        """Computes the bias for given offsets; see ``OffsetBias``."""
        return -self.slopes_N[None, :, None, None] * jnp.abs(offsets_BTS)[:, None].astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RelativeBias(_ByOffset):
    """The bias of T5: a learned number for each head and each bucket of distances.

    Half of the buckets (of each direction, if there are two) hold one distance each. The other
    buckets divide the larger distances up to ``max_distance`` evenly on a logarithmic scale. The
    last bucket also holds all distances beyond.

    Source: Raffel et al. (2020), section 2.1; the buckets are those of the authors' code.

    Attributes:
      table_RN: The learned numbers ``[R, N]``, one row for each bucket.
      max_distance: All distances from this one on share a bucket.
      is_causal: If true, keys after the query share the bucket of distance 0. Otherwise half of the
        buckets are for keys after the query.
      query_start: The index of the first query among the keys; ``None`` is 0.
      positions: See ``LinearBias``.
    """

    table_RN: jax.Array = dataclasses.field(metadata={"axes": "RN"})
    max_distance: int = dataclasses.field(metadata={"static": True})
    is_causal: bool = dataclasses.field(metadata={"static": True})
    query_start: jax.Array | int | None = None
    positions: tuple[jax.Array, jax.Array] | None = dataclasses.field(default=None, metadata={"axes": ("BT", "BS")})

    materialize_once: ClassVar[bool] = True

    def values(self, offsets_BTS: Int[Array, "B T S"]) -> Float[Array, "B N T S"]:
        """Computes the bias for given offsets; see ``OffsetBias``."""
        farthest = self.max_distance
        buckets_O = relative_buckets(np.arange(-farthest, farthest + 1), self.table_RN.shape[0], farthest,
                                     self.is_causal)
        values_NO = self.table_RN[buckets_O].T.astype(jnp.float32)  # one column for each distance
        return jnp.take(values_NO, jnp.clip(offsets_BTS, -farthest, farthest) + farthest, axis=1).swapaxes(0, 1)


def relative_buckets(offsets: np.ndarray, num_buckets: int, max_distance: int, is_causal: bool) -> np.ndarray:
    """Computes T5's bucket (see ``RelativeBias``) for each offset.

    Args:
      offsets: The position of the key minus that of the query, integers ``[...]``.
      num_buckets: The number of buckets.
      max_distance: All distances from this one on share a bucket.
      is_causal: Whether keys after the query share the bucket of distance 0.

    Returns:
      Integers ``[...]`` in ``[0, num_buckets)``.
    """
    after = np.zeros_like(offsets)
    distances = np.maximum(-offsets, 0)
    if not is_causal:
        num_buckets //= 2
        after, distances = num_buckets * (offsets > 0), np.abs(offsets)
    exact = num_buckets // 2
    share = np.log(np.maximum(distances, exact) / exact) / np.log(max_distance / exact)
    # Without the small constant, rounding could put the first distance of a bucket into the one
    # before.
    far = exact + np.floor(share * (num_buckets - exact) + 1e-6).astype(int)
    return after + np.where(distances < exact, distances, np.minimum(far, num_buckets - 1))
