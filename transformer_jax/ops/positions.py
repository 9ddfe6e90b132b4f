"""Where a token stands: sinusoids, rotations and linear biases."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp


def sinusoidal(positions: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal position embeddings: PE(pos, 2i) = sin(pos / 10000^(2i/dim)), PE(pos, 2i+1) = cos(same).

    Source: Vaswani et al. (2017), section 3.5.

    Args:
      positions: integers ``[...]``.
      dim: even number of channels.

    Returns:
      float32 ``[..., dim]``.
    """
    if dim % 2:
        raise ValueError(f"sinusoidal positions come in pairs of sine and cosine: dim={dim} must be even")
    angles = positions[..., None] * jnp.exp(jnp.arange(0, dim, 2) * (-math.log(10_000.0) / dim))
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, dim)


def rotary_angles(positions_BT: jax.Array, head_dim: int, base: float = 10_000.0) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 ``[B, T, 1, head_dim / 2]``, for :func:`rotary`."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotary(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair (i, i + H/2) of channels by its position's angle; inner products keep distances only.

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

    Source: Press et al. (2021); for N that is no power of two, the series of the power below it, then every
    other term of the series of the power above it, as in the authors' code.
    """
    def series(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    power = 2 ** math.floor(math.log2(num_heads))
    return jnp.asarray(series(power) + series(2 * power)[0::2][: num_heads - power], jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearBias:
    """ALiBi: minus slope times distance, added to the scores; kept as structure and made row by row.

    Attributes:
      slopes_N: one slope a head.
      query_start: the place of the first query among the keys; ``None`` is 0.
    """

    slopes_N: jax.Array
    query_start: jax.Array | int | None = None

    def materialize(self, num_queries: int, num_keys: int, queries: jax.Array | None = None) -> jax.Array:
        """The bias ``[1, N, T, S]``, or of the rows ``queries`` only, ``[1, N, R, S]``."""
        rows_T = jnp.arange(num_queries) if queries is None else queries
        rows_T = rows_T + (0 if self.query_start is None else self.query_start)
        distance_TS = jnp.abs(rows_T[:, None] - jnp.arange(num_keys)[None, :])
        return -self.slopes_N[None, :, None, None] * distance_TS.astype(jnp.float32)
