"""Rotary position embeddings as pure functions."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer_jax.config import RopeScaling


def rotary_angles(positions_BT: Int[Array, "B T"], head_dim: int, base: float = 10_000.0,
                  scaling: RopeScaling = RopeScaling()) -> tuple[Float[Array, "B T 1 H2"], Float[Array, "B T 1 H2"]]:
    """Computes the cosines and sines by which ``rotary`` rotates.

    With ``dynamic`` and ``longrope`` scaling the length of a text is its largest position plus one,
    so that all positions of a row depend on its last one.

    Args:
      positions_BT: Integers ``[B, T]``.
      head_dim: The number of channels of a head, which must be even.
      base: The base of the geometric series of frequencies.
      scaling: How the frequencies change for texts that are longer than those in pretraining.

    Returns:
      Cosines and sines, each float32 ``[B, T, 1, head_dim / 2]``. ``yarn`` and ``longrope`` multiply
      both by ``scaling.magnitude``.
    """
    if scaling.kind in ("dynamic", "longrope"):
        lengths_B111 = positions_BT.max(axis=1)[:, None, None, None] + 1
        frequencies = _frequencies_of_length(lengths_B111, head_dim, base, scaling)
    else:
        frequencies = jnp.asarray(rotary_frequencies(head_dim, base, scaling), jnp.float32)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    return scaling.magnitude * jnp.cos(angles), scaling.magnitude * jnp.sin(angles)


def _frequencies_of_length(lengths_B111: jax.Array, head_dim: int, base: float, scaling: RopeScaling) -> jax.Array:
    """Computes the frequencies of kinds of scaling that depend on the length of the text, float32
    ``[B, 1, 1, head_dim / 2]``."""
    exponents = np.arange(0, head_dim, 2) / head_dim
    if scaling.kind == "longrope":
        short, long = (jnp.asarray(base**-exponents / np.asarray(factors), jnp.float32)
                       for factors in (scaling.short_factors, scaling.long_factors))
        return jnp.where(lengths_B111 > scaling.original_max_len, long, short)
    excess = jnp.maximum(lengths_B111 / scaling.original_max_len, 1.0)
    growth = (scaling.factor * excess - (scaling.factor - 1.0)) ** (head_dim / (head_dim - 2))
    return (base * growth) ** jnp.asarray(-exponents, jnp.float32)


def rotary_frequencies(head_dim: int, base: float, scaling: RopeScaling) -> np.ndarray:
    """Computes the frequency of each pair of channels; see ``RopeScaling`` for the sources.

    Args:
      head_dim: The number of channels of a head, which must be even.
      base: The base of the geometric series of frequencies.
      scaling: How the frequencies change for texts that are longer than those in pretraining, in a
        way that does not depend on the length of a text.

    Returns:
      float64 ``[head_dim / 2]``, in radians per position.
    """
    frequencies = base ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling.kind == "yarn":
        # The pair of channels that turns so many times in the original context, as a real number.
        first, last = (head_dim * math.log(scaling.original_max_len / (2 * math.pi * turns)) / (2 * math.log(base))
                       for turns in (scaling.beta_fast, scaling.beta_slow))
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        slow = np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)
        return slow * frequencies / scaling.factor + (1 - slow) * frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_max_len * frequencies / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return frequencies


def rotary(x_BTNH: Float[Array, "B T N H"], angles: tuple[Float[Array, "#B T 1 R2"], Float[Array, "#B T 1 R2"]], *,
           interleaved: bool = False) -> Float[Array, "B T N H"]:
    """Rotates each pair of channels by the angle of its position.

    The angles of R / 2 pairs rotate the first R channels; other channels stay as they are.

    The inner product of a query and a key then depends only on the distance between them.

    Source: Su et al. (2021), RoFormer; the pairing of halves is that of GPT-NeoX and Llama.

    Args:
      x_BTNH: Queries or keys ``[B, T, N, H]``.
      angles: The cosines and sines from ``rotary_angles``.
      interleaved: If true, channels 2i and 2i + 1 are a pair, as in GPT-J. Otherwise channels i and
        i + R / 2 are.

    Returns:
      An array of the shape and type of ``x_BTNH``.
    """
    cos, sin = angles
    R = 2 * cos.shape[-1]
    if x_BTNH.shape[-1] > R:
        rotated = rotary(x_BTNH[..., :R], angles, interleaved=interleaved)
        return jnp.concatenate([rotated, x_BTNH[..., R:]], axis=-1)
    if interleaved:
        first, second = x_BTNH[..., 0::2].astype(jnp.float32), x_BTNH[..., 1::2].astype(jnp.float32)
        pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return pairs.reshape(x_BTNH.shape).astype(x_BTNH.dtype)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """The rotation of queries and keys at given positions, which all layers share.

    Attributes:
      cos: The cosines ``[B, T, 1, R / 2]``.
      sin: The sines ``[B, T, 1, R / 2]``.
      interleaved: Which channels are pairs, see ``rotary``.
    """

    cos: jax.Array
    sin: jax.Array
    interleaved: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(self, x_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """Rotates queries or keys ``[B, T, N, H]``."""
        return rotary(x_BTNH, (self.cos, self.sin), interleaved=self.interleaved)
