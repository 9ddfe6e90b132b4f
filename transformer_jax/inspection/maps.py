"""Attention maps in numbers: pure functions of ``weights_TS``, any axes before it, for jit, vmap
and grad.

Arguments that several take:
  weights_TS: maps ``[..., T, S]`` whose rows sum to one, or to zero where nothing may be attended
    to.
  tokens_S: ids of the keys ``[S]``; ``[B, S]`` for maps ``[..., B, N, T, S]``.
  allowed_TS: which keys each query may attend to (True = may attend), broadcastable to the maps,
    such as ``trace.mask.materialize(T, S)``; ``None`` for all of them. It keeps padding and other
    documents out of a score.
  queries_T: the places of the rows among the keys where not all rows are there, as in
    ``trace.attention(queries=...)``.

A result is the mean over the queries that have one (that attend to something, that have an earlier
occurrence), float32 ``[...]``, 0 where none has.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.models.output import Trace

_WEIGHTS_AT_A_TIME = 1 << 22


@jax.jit
def entropy(weights_TS: Float[Array, "*batch T S"]) -> Float[Array, "*batch"]:
    """How spread the attention is, in nats: -sum_j w_ij ln w_ij, from 0 (one key) to ln S (all
    alike).

    Source: Ghader and Monz (2017), section 4.2; Clark et al. (2019), section 3.3.
    """
    return _mean(*_entropy(weights_TS))


@jax.jit
def distance(weights_TS: Float[Array, "*batch T S"], *,
             queries_T: Int[Array, " rows"] | None = None) -> Float[Array, "*batch"]:
    """How far the attention reaches, in tokens: sum_j w_ij |i - j|.

    Source: Vig and Belinkov (2019), section 4.2.
    """
    return _mean(*_distance(weights_TS, _places(weights_TS, queries_T)))


@jax.jit
def sink_mass(weights_TS: Float[Array, "*batch T S"], *,
              allowed_TS: Bool[Array, "*#batch T S"] | None = None) -> Float[Array, "*batch"]:
    """The weight on the first token that a query may attend to: w_i,first(i).

    Source: Xiao et al. (2023), attention sinks.
    """
    return _mean(*_weight_on(weights_TS, _first(weights_TS, allowed_TS), None))


@jax.jit
def previous_token_score(weights_TS: Float[Array, "*batch T S"], *,
                         allowed_TS: Bool[Array, "*#batch T S"] | None = None,
                         queries_T: Int[Array, " rows"] | None = None) -> Float[Array, "*batch"]:
    """The weight on the token before: w_i,i-1.

    Source: Elhage et al. (2021); Olsson et al. (2022).
    """
    return _mean(*_weight_on(weights_TS, _at(weights_TS, -1, _places(weights_TS, queries_T)), allowed_TS))


@jax.jit
def diagonal_score(weights_TS: Float[Array, "*batch T S"], *, allowed_TS: Bool[Array, "*#batch T S"] | None = None,
                   queries_T: Int[Array, " rows"] | None = None) -> Float[Array, "*batch"]:
    """The weight on the token itself: w_ii.

    Source: Kovaleva et al. (2019), the diagonal type.
    """
    return _mean(*_weight_on(weights_TS, _at(weights_TS, 0, _places(weights_TS, queries_T)), allowed_TS))


@jax.jit
def duplicate_token_score(weights_TS: Float[Array, "*batch T S"], tokens_S: Int[Array, "*rows S"], *,
                          allowed_TS: Bool[Array, "*#batch T S"] | None = None,
                          queries_T: Int[Array, " rows"] | None = None) -> Float[Array, "*batch"]:
    """The weight on earlier occurrences of the same token: sum over j < i with t_j = t_i of w_ij.

    Source: Wang et al. (2022), section 3.1.
    """
    places_T = _places(weights_TS, queries_T)
    return _mean(*_weight_on(weights_TS, _earlier_occurrences(tokens_S, places_T), allowed_TS))


@jax.jit
def induction_score(weights_TS: Float[Array, "*batch T S"], tokens_S: Int[Array, "*rows S"], *,
                    allowed_TS: Bool[Array, "*#batch T S"] | None = None,
                    queries_T: Int[Array, " rows"] | None = None) -> Float[Array, "*batch"]:
    """The weight on tokens that follow an earlier occurrence: sum over j <= i with t_j-1 = t_i of
    w_ij.

    Source: Olsson et al. (2022), prefix matching.
    """
    earlier_TS = _earlier_occurrences(tokens_S, _places(weights_TS, queries_T))
    return _mean(*_weight_on(weights_TS, _after(earlier_TS, allowed_TS), allowed_TS))


@jax.jit
def head_agreement(weights_NTS: Float[Array, "*batch N T S"]) -> Float[Array, "*batch N N"]:
    """How alike the heads of a layer attend: 1 - JS(p, q) / ln 2 for each two, the mean over
    queries.

    JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2 is the Jensen-Shannon divergence of two rows;
    equal heads agree by 1, heads that share no key by 0.

    Source: Clark et al. (2019), section 6.

    Args:
      weights_NTS: ``[..., N, T, S]``.

    Returns:
      ``[..., N, N]``.
    """
    weights_NTS = weights_NTS.astype(jnp.float32)
    entropy_NT, counts_NT = _entropy(weights_NTS)

    def with_all(one: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        weights_1TS, entropy_1T, counts_1T = (x[..., None, :, :] if x.ndim == weights_NTS.ndim - 1 else x[..., None, :]
                                              for x in one)
        divergence_NT = _entropy((weights_NTS + weights_1TS) / 2)[0] - (entropy_NT + entropy_1T) / 2
        return _mean(1.0 - divergence_NT / jnp.log(2.0), counts_NT & counts_1T)

    heads_first = (jnp.moveaxis(weights_NTS, -3, 0), jnp.moveaxis(entropy_NT, -2, 0), jnp.moveaxis(counts_NT, -2, 0))
    return jnp.moveaxis(jax.lax.map(with_all, heads_first), 0, -2)


@jax.jit
def summaries(trace: Trace, tokens_BT: Int[Array, "B T"] | None = None) -> dict[str, Float[Array, "L N"]]:
    """Every cheap reduction of every head of a forward pass, a few query rows at a time.

    Args:
      trace: of self-attention, or of cross attention (``trace.final`` is ``None``), which has no
        distances.
      tokens_BT: the ids that were read, for the scores that compare tokens.

    Returns:
      float32 ``[L, N]`` for each of ``"entropy"``, ``"sink"``, in self-attention ``"distance"``,
      ``"previous_token"`` and ``"diagonal"``, and with tokens ``"duplicate_token"`` and
      ``"induction"``: the mean over all queries of the batch that have one.
    """
    L, B, T, N, _ = trace.queries.shape
    S = trace.keys.shape[2]
    size = max(1, min(T, _WEIGHTS_AT_A_TIME // (B * N * S)))
    # The sink is the first token of the text, seen through a sliding window or not.
    unlimited = dataclasses.replace(trace.mask, window=None)

    def block(layer: jax.Array, start: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        rows_R = start + jnp.arange(size)
        inside_R, rows_R = rows_R < T, jnp.minimum(rows_R, T - 1)
        weights_BNRS = trace.attention(layers=layer, queries=rows_R)
        allowed = trace.mask.materialize(T, S, rows_R)
        found = {"entropy": _entropy(weights_BNRS),
                 "sink": _weight_on(weights_BNRS, _first(weights_BNRS, unlimited.materialize(T, S, rows_R)), allowed)}
        if trace.final is not None:
            found |= {"distance": _distance(weights_BNRS, rows_R),
                      "previous_token": _weight_on(weights_BNRS, _at(weights_BNRS, -1, rows_R), allowed),
                      "diagonal": _weight_on(weights_BNRS, _at(weights_BNRS, 0, rows_R), allowed)}
            if tokens_BT is not None:
                earlier = _earlier_occurrences(tokens_BT, rows_R)
                found |= {"duplicate_token": _weight_on(weights_BNRS, earlier, allowed),
                          "induction": _weight_on(weights_BNRS, _after(earlier, allowed), allowed)}
        return {name: (jnp.where(counts & inside_R, values, 0.0).sum((0, 2)), (counts & inside_R).sum((0, 2)))
                for name, (values, counts) in found.items()}

    def of_layer(layer: jax.Array) -> dict[str, jax.Array]:
        blocks = jax.lax.map(lambda start: block(layer, start), jnp.arange(0, T, size))
        return {name: values.sum(0) / jnp.maximum(counts.sum(0), 1) for name, (values, counts) in blocks.items()}

    return jax.lax.map(of_layer, jnp.arange(L))


# Below: values [..., T] of each query, and booleans that say which queries have one.


def _mean(values_T: jax.Array, counts_T: jax.Array) -> jax.Array:
    return jnp.where(counts_T, values_T, 0.0).sum(-1) / jnp.maximum(counts_T.sum(-1), 1)


def _entropy(weights_TS: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights_TS = weights_TS.astype(jnp.float32)
    # Never log 0, whose gradient would be infinite. A product and not a sum: ten times as fast on
    # XLA:CPU.
    logs_TS = jnp.log(jnp.where(weights_TS > 0, weights_TS, 1.0))
    return -_row_products(weights_TS, logs_TS), (weights_TS > 0).any(-1)


def _distance(weights_TS: jax.Array, places_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    apart_TS = jnp.abs(places_T[:, None] - jnp.arange(weights_TS.shape[-1]))
    return _row_products(weights_TS.astype(jnp.float32), apart_TS.astype(jnp.float32)), (weights_TS > 0).any(-1)


def _row_products(a_TS: jax.Array, b_TS: jax.Array) -> jax.Array:
    return jnp.einsum("...TS,...TS->...T", a_TS, b_TS, precision=jax.lax.Precision.HIGHEST)


def _weight_on(weights_TS: jax.Array, wanted_TS: jax.Array,
               allowed_TS: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    wanted_TS = wanted_TS if allowed_TS is None else wanted_TS & allowed_TS
    values_T = jnp.where(wanted_TS, weights_TS.astype(jnp.float32), 0.0).sum(-1)
    return values_T, jnp.broadcast_to(wanted_TS.any(-1), values_T.shape) & (weights_TS > 0).any(-1)


# Below: which keys a score is about, booleans that broadcast to [..., T, S].


def _places(weights_TS: jax.Array, queries_T: jax.Array | None) -> jax.Array:
    T, S = weights_TS.shape[-2:]
    if queries_T is None:
        if T != S:
            raise ValueError(f"maps of {T} queries over {S} keys need queries_T, the places of the rows among the keys")
        return jnp.arange(T)
    queries_T = jnp.asarray(queries_T)
    if queries_T.shape != (T,):
        raise ValueError(f"queries_T has shape {queries_T.shape}; the maps have {T} rows")
    return jnp.where(queries_T < 0, queries_T + S, queries_T)


def _at(weights_TS: jax.Array, offset: int, places_T: jax.Array) -> jax.Array:
    return jnp.arange(weights_TS.shape[-1]) == places_T[:, None] + offset


def _first(weights_TS: jax.Array, allowed_TS: jax.Array | None) -> jax.Array:
    keys_S = jnp.arange(weights_TS.shape[-1])
    if allowed_TS is None:
        return jnp.broadcast_to(keys_S == 0, weights_TS.shape[-2:])
    return keys_S == jnp.where(allowed_TS, keys_S, keys_S.size).min(-1, keepdims=True)


def _earlier_occurrences(tokens_S: jax.Array, places_T: jax.Array) -> jax.Array:
    tokens_S = jnp.asarray(tokens_S)
    same_TS = tokens_S[..., places_T][..., :, None] == tokens_S[..., None, :]
    same_TS &= jnp.arange(tokens_S.shape[-1]) < places_T[:, None]
    return same_TS if tokens_S.ndim == 1 else same_TS[:, None]  # [B, 1, T, S]: the same for every head


def _after(earlier_TS: jax.Array, allowed_TS: jax.Array | None) -> jax.Array:
    if allowed_TS is not None:  # an occurrence in another document does not count
        earlier_TS = earlier_TS & allowed_TS
    return jnp.roll(earlier_TS, 1, axis=-1).at[..., 0].set(False)
