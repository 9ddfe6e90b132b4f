"""Reductions of attention maps to one number for each query, and the keys that each score selects.

Functions that reduce a map return values ``[..., T]`` and booleans that are True for the queries
that have a value. Functions that select keys return booleans that broadcast to ``[..., T, S]``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def mean(values_T: jax.Array, counts_T: jax.Array) -> jax.Array:
    """Returns the mean over the queries for which ``counts_T`` is True; 0 if there are none."""
    return jnp.where(counts_T, values_T, 0.0).sum(-1) / jnp.maximum(counts_T.sum(-1), 1)


def entropy(weights_TS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the entropy of each query in nats; queries with a positive weight have one."""
    weights_TS = weights_TS.astype(jnp.float32)
    # The inner where avoids log 0, whose gradient is infinite. A matrix product is ten times as
    # fast as a sum on XLA:CPU.
    logs_TS = jnp.log(jnp.where(weights_TS > 0, weights_TS, 1.0))
    return -_row_products(weights_TS, logs_TS), (weights_TS > 0).any(-1)


def distance(weights_TS: jax.Array, places_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean distance in tokens between each query and its keys."""
    apart_TS = jnp.abs(places_T[:, None] - jnp.arange(weights_TS.shape[-1]))
    return _row_products(weights_TS.astype(jnp.float32), apart_TS.astype(jnp.float32)), (weights_TS > 0).any(-1)


def _row_products(a_TS: jax.Array, b_TS: jax.Array) -> jax.Array:
    """Returns the dot products of corresponding rows."""
    return jnp.einsum("...TS,...TS->...T", a_TS, b_TS, precision=jax.lax.Precision.HIGHEST)


def weight_on(weights_TS: jax.Array, wanted_TS: jax.Array,
               allowed_TS: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns the weight of each query on the wanted and allowed keys; queries with such a key have
    one."""
    wanted_TS = wanted_TS if allowed_TS is None else wanted_TS & allowed_TS
    values_T = jnp.where(wanted_TS, weights_TS.astype(jnp.float32), 0.0).sum(-1)
    return values_T, jnp.broadcast_to(wanted_TS.any(-1), values_T.shape) & (weights_TS > 0).any(-1)


def places(weights_TS: jax.Array, queries_T: jax.Array | None) -> jax.Array:
    """Returns the position of each query among the keys, ``[T]``, counted from 0.

    Raises:
      ValueError: if the positions are needed and missing, or if their number is wrong.
    """
    T, S = weights_TS.shape[-2:]
    if queries_T is None:
        if T != S:
            raise ValueError(f"maps of {T} queries and {S} keys need queries_T, the positions of the queries among the "
                             "keys")
        return jnp.arange(T)
    queries_T = jnp.asarray(queries_T)
    if queries_T.shape != (T,):
        raise ValueError(f"queries_T has shape {queries_T.shape}; expected {(T,)}, one position for each row")
    return jnp.where(queries_T < 0, queries_T + S, queries_T)


def at(weights_TS: jax.Array, offset: int, places_T: jax.Array) -> jax.Array:
    """Selects the key at an offset from each query, such as -1 for the previous token."""
    return jnp.arange(weights_TS.shape[-1]) == places_T[:, None] + offset


def first(weights_TS: jax.Array, allowed_TS: jax.Array | None) -> jax.Array:
    """Selects the first key that each query may attend to."""
    keys_S = jnp.arange(weights_TS.shape[-1])
    if allowed_TS is None:
        return jnp.broadcast_to(keys_S == 0, weights_TS.shape[-2:])
    return keys_S == jnp.where(allowed_TS, keys_S, keys_S.size).min(-1, keepdims=True)


def earlier_occurrences(tokens_S: jax.Array, places_T: jax.Array) -> jax.Array:
    """Selects the earlier keys that are the same token as the query."""
    tokens_S = jnp.asarray(tokens_S)
    same_TS = tokens_S[..., places_T][..., :, None] == tokens_S[..., None, :]
    same_TS &= jnp.arange(tokens_S.shape[-1]) < places_T[:, None]
    return same_TS if tokens_S.ndim == 1 else same_TS[:, None]  # [B, 1, T, S]: the same for every head


def after(earlier_TS: jax.Array, allowed_TS: jax.Array | None) -> jax.Array:
    """Selects the keys that directly follow the given earlier occurrences."""
    if allowed_TS is not None:  # an occurrence in another document does not count
        earlier_TS = earlier_TS & allowed_TS
    return jnp.roll(earlier_TS, 1, axis=-1).at[..., 0].set(False)
