"""Where a token stands: sinusoids, rotations, linear and learned biases."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.config import RopeScaling


def sinusoidal(positions: jax.Array, dim: int, *, halves: bool = False) -> jax.Array:
    """Sinusoidal position embeddings: PE(pos, 2i) = sin(pos / 10000^(2i/dim)), PE(pos, 2i+1) =
    cos(same).

    Source: Vaswani et al. (2017), section 3.5.

    Args:
      positions: integers ``[...]``.
      dim: even number of channels.
      halves: all sines before all cosines, as in Marian, instead of one after the other.

    Returns:
      float32 ``[..., dim]``.
    """
    if dim % 2:
        raise ValueError(f"sinusoidal positions come in pairs of sine and cosine: dim={dim} must be even")
    angles = positions[..., None] * jnp.exp(jnp.arange(0, dim, 2) * (-math.log(10_000.0) / dim))
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-2 if halves else -1)
    return waves.reshape(*positions.shape, dim)


def rotary_angles(positions_BT: jax.Array, head_dim: int, base: float = 10_000.0,
                  scaling: RopeScaling = RopeScaling()) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 ``[B, T, 1, head_dim / 2]``, for :func:`rotary`."""
    frequencies = jnp.asarray(rotary_frequencies(head_dim, base, scaling), jnp.float32)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotary_frequencies(head_dim: int, base: float, scaling: RopeScaling) -> np.ndarray:
    """Radians a position of each pair of channels, float64 ``[head_dim / 2]``; see
    :class:`RopeScaling` for sources."""
    frequencies = base ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_max_len * frequencies / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return frequencies


def rotary(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair (i, i + H/2) of channels by its position's angle; inner products keep
    distances only.

    Source: Su et al. (2021), RoFormer; the pairing of halves is that of GPT-NeoX and Llama.

    Args:
      x_BTNH: queries or keys.
      angles: from :func:`rotary_angles`.

    Returns:
      The same shape and type.
    """
    cos, sin = angles
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


def alibi_slopes(num_heads: int) -> jax.Array:
    """The slope of each head's linear bias, float32 ``[N]``: a geometric series from 2^(-8/N).

    Source: Press et al. (2021); for N that is no power of two, the series of the power below it,
    then every other term of the series of the power above it, as in the authors' code.
    """
    def series(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    power = 2 ** math.floor(math.log2(num_heads))
    return jnp.asarray(series(power) + series(2 * power)[0::2][: num_heads - power], jnp.float32)


@runtime_checkable
class PositionBias(Protocol):
    """A bias of the scores that is kept as structure; any registered pytree with this method is
    one.

    Where a mesh divides the tokens of a row, a frozen dataclass that has a field ``query_start``
    and declares the axes of its other arrays stays structure on each device:
    ``dataclasses.field(metadata={"axes": "N"})``, with the letters B, T, S and N for what may be
    divided and any other letter for what is not. A bias that does not is materialized.
    """

    def materialize(self, num_queries: int, num_keys: int, queries: jax.Array | None = None,
                    keys: jax.Array | None = None) -> jax.Array:
        """The bias ``[B or 1, N, T, S]``, or of the rows ``queries`` and the columns ``keys``
        only."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearBias:
    """ALiBi: minus slope times distance, added to the scores; kept as structure and made row by
    row.

    Attributes:
      slopes_N: one slope a head.
      query_start: the place of the first query among the keys; ``None`` is 0.
      positions: of queries ``[B, T]`` and keys ``[B, S]``, where places among the keys are not
        those in the text.
    """

    slopes_N: jax.Array = dataclasses.field(metadata={"axes": "N"})
    query_start: jax.Array | int | None = None
    positions: tuple[jax.Array, jax.Array] | None = dataclasses.field(default=None, metadata={"axes": ("BT", "BS")})

    def materialize(self, num_queries: int, num_keys: int, queries: jax.Array | None = None,
                    keys: jax.Array | None = None) -> jax.Array:
        """The bias ``[B or 1, N, T, S]``, or of rows ``queries`` and columns ``keys`` only,
        ``[B or 1, N, R, C]``."""
        distance_BTS = jnp.abs(_offsets(self, num_queries, num_keys, queries, keys))
        return -self.slopes_N[None, :, None, None] * distance_BTS[:, None].astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """T5's bias: a learned number for each head and bucket of distances; kept as structure and made
    row by row.

    Half of the buckets (of each direction, where there are two) hold one distance each. The others
    divide what lies between there and ``max_distance`` evenly on a logarithmic scale; the last
    holds all that is farther.

    Source: Raffel et al. (2020), section 2.1; the buckets are those of the authors' code.

    Attributes:
      table_RN: one row a bucket.
      max_distance: from which on all distances share a bucket.
      is_causal: keys after the query share the bucket of distance 0; otherwise they have half of
        the buckets.
      query_start: the place of the first query among the keys; ``None`` is 0.
      positions: see :class:`LinearBias`.
    """

    table_RN: jax.Array = dataclasses.field(metadata={"axes": "RN"})
    max_distance: int = dataclasses.field(metadata={"static": True})
    is_causal: bool = dataclasses.field(metadata={"static": True})
    query_start: jax.Array | int | None = None
    positions: tuple[jax.Array, jax.Array] | None = dataclasses.field(default=None, metadata={"axes": ("BT", "BS")})

    def materialize(self, num_queries: int, num_keys: int, queries: jax.Array | None = None,
                    keys: jax.Array | None = None) -> jax.Array:
        """The bias ``[B or 1, N, T, S]``, or of rows ``queries`` and columns ``keys`` only,
        ``[B or 1, N, R, C]``."""
        farthest = self.max_distance
        buckets_O = relative_buckets(np.arange(-farthest, farthest + 1), self.table_RN.shape[0], farthest,
                                     self.is_causal)
        values_NO = self.table_RN[buckets_O].T.astype(jnp.float32)  # of every distance, once
        offsets_BTS = _offsets(self, num_queries, num_keys, queries, keys)
        return jnp.take(values_NO, jnp.clip(offsets_BTS, -farthest, farthest) + farthest, axis=1).swapaxes(0, 1)


def relative_buckets(offsets: np.ndarray, num_buckets: int, max_distance: int, is_causal: bool) -> np.ndarray:
    """The bucket of T5 (see :class:`RelativeBias`) for each place of a key less that of the
    query."""
    after = np.zeros_like(offsets)
    distances = np.maximum(-offsets, 0)
    if not is_causal:
        num_buckets //= 2
        after, distances = num_buckets * (offsets > 0), np.abs(offsets)
    exact = num_buckets // 2
    share = np.log(np.maximum(distances, exact) / exact) / np.log(max_distance / exact)
    # Rounding must not push a distance that begins a bucket into the one before.
    far = exact + np.floor(share * (num_buckets - exact) + 1e-6).astype(int)
    return after + np.where(distances < exact, distances, np.minimum(far, num_buckets - 1))


def _offsets(bias: LinearBias | RelativeBias, num_queries: int, num_keys: int, queries: jax.Array | None,
             keys: jax.Array | None) -> jax.Array:
    """The position of each key less that of each query, ``[B or 1, T or R, S or C]``."""
    rows_T = jnp.arange(num_queries) if queries is None else queries
    columns_S = jnp.arange(num_keys) if keys is None else keys
    if bias.positions is not None:
        query_BT, key_BS = bias.positions
        return (jnp.take(key_BS, columns_S, axis=1, mode="clip")[:, None, :]
                - jnp.take(query_BT, rows_T, axis=1, mode="clip")[:, :, None])
    rows_T = rows_T + (0 if bias.query_start is None else bias.query_start)
    return (columns_S[None, :] - rows_T[:, None])[None]
