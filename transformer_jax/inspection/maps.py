"""Scores of attention maps: pure functions that work under jit, vmap and grad.

Each function takes maps ``weights_TS`` with any number of leading axes. The rows of a map sum to
one, or to zero if the query may not attend to any key. ``allowed_TS`` keeps padding and other
documents out of a score; ``trace.mask.materialize(T, S)`` makes it. ``queries_T`` is needed for
maps that ``trace.attention(queries=...)`` made. A result is the mean over the queries that have a
value (for example, those that attend to a key, or whose token occurs earlier), and 0 if there are
none.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.inspection import per_query
from transformer_jax.models.output import Trace

_WEIGHTS_AT_A_TIME = 1 << 22

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def as_maps(weights: Any) -> jax.Array | np.ndarray:
    """Converts maps or a list of maps to an array; raises ValueError if they are not numbers
    ``[..., T, S]``."""
    weights = _as_array(weights)
    if weights.ndim < 2 or not (np.issubdtype(weights.dtype, np.number) or weights.dtype == jnp.bfloat16):
        raise ValueError(f"attention maps are numbers [..., T, S], such as inspect_text(...).attention(); got "
                         f"{weights.dtype} {list(weights.shape)}")
    return weights


def _as_array(given: Any) -> jax.Array | np.ndarray:
    """Converts lists to a NumPy array, and leaves arrays unchanged."""
    return given if isinstance(given, jax.Array | np.ndarray) else np.asarray(given)


def _of_maps(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Compiles a function of maps, and lets it accept lists in place of arrays."""
    compiled = jax.jit(function)

    @functools.wraps(function)
    def call(*given: Parameters.args, **options: Parameters.kwargs) -> Result:
        weights, *others = given
        arrays = {name: value if value is None else _as_array(value) for name, value in options.items()}
        return compiled(as_maps(weights), *map(_as_array, others), **arrays)

    return call


@_of_maps
def entropy(weights_TS: Float[Array, "*batch T S"]) -> Float[Array, "*batch"]:
    """Computes the entropy of attention in nats: -sum_j w_ij ln w_ij.

    It ranges from 0 (all weight on one key) to ln S (equal weights).

    Source: Ghader and Monz (2017), section 4.2; Clark et al. (2019), section 3.3.

    Args:
      weights_TS: attention maps ``[..., T, S]``.

    Returns:
      float32 ``[...]``: the mean over the queries that have a value.
    """
    return per_query.mean(*per_query.entropy(weights_TS))


@_of_maps
def distance(weights_TS: Float[Array, "*batch T S"], *,
             queries_T: Int[Array, " rows"] | None = None) -> Float[Array, "*batch"]:
    """Computes the mean distance of attention in tokens: sum_j w_ij |i - j|.

    Source: Vig and Belinkov (2019), section 4.2.

    Args:
      weights_TS: attention maps ``[..., T, S]``.
      queries_T: the position of each row among the keys, if the maps do not have all rows.

    Returns:
      float32 ``[...]``: the mean over the queries that have a value.
    """
    return per_query.mean(*per_query.distance(weights_TS, per_query.places(weights_TS, queries_T)))


@_of_maps
def sink_mass(weights_TS: Float[Array, "*batch T S"], *,
              allowed_TS: Bool[Array, "*#batch T S"] | None = None) -> Float[Array, "*batch"]:
    """Computes the weight on the first token that a query may attend to: w_i,first(i).

    Source: Xiao et al. (2023), attention sinks.

    Args:
      weights_TS: attention maps ``[..., T, S]``.
      allowed_TS: True for each key that a query may attend to, broadcastable to the maps; ``None``
        for all keys.

    Returns:
      float32 ``[...]``: the mean over the queries that have a value.
    """
    return per_query.mean(*per_query.weight_on(weights_TS, per_query.first(weights_TS, allowed_TS), None))


@_of_maps
def previous_token_score(weights_TS: Float[Array, "*batch T S"], *,
                         allowed_TS: Bool[Array, "*#batch T S"] | None = None,
                         queries_T: Int[Array, " rows"] | None = None) -> Float[Array, "*batch"]:
    """Computes the weight on the previous token: w_i,i-1.

    Source: Elhage et al. (2021); Olsson et al. (2022).

    Args:
      weights_TS: attention maps ``[..., T, S]``.
      allowed_TS: True for each key that a query may attend to, broadcastable to the maps; ``None``
        for all keys.
      queries_T: the position of each row among the keys, if the maps do not have all rows.

    Returns:
      float32 ``[...]``: the mean over the queries that have a value.
    """
    previous_TS = per_query.at(weights_TS, -1, per_query.places(weights_TS, queries_T))
    return per_query.mean(*per_query.weight_on(weights_TS, previous_TS, allowed_TS))


@_of_maps
def diagonal_score(weights_TS: Float[Array, "*batch T S"], *, allowed_TS: Bool[Array, "*#batch T S"] | None = None,
                   queries_T: Int[Array, " rows"] | None = None) -> Float[Array, "*batch"]:
    """Computes the weight on the token itself: w_ii.

    Source: Kovaleva et al. (2019), the diagonal type.

    Args:
      weights_TS: attention maps ``[..., T, S]``.
      allowed_TS: True for each key that a query may attend to, broadcastable to the maps; ``None``
        for all keys.
      queries_T: the position of each row among the keys, if the maps do not have all rows.

    Returns:
      float32 ``[...]``: the mean over the queries that have a value.
    """
    same_TS = per_query.at(weights_TS, 0, per_query.places(weights_TS, queries_T))
    return per_query.mean(*per_query.weight_on(weights_TS, same_TS, allowed_TS))


@_of_maps
def duplicate_token_score(weights_TS: Float[Array, "*batch T S"], tokens_S: Int[Array, "*rows S"], *,
                          allowed_TS: Bool[Array, "*#batch T S"] | None = None,
                          queries_T: Int[Array, " rows"] | None = None) -> Float[Array, "*batch"]:
    """Computes the weight on earlier occurrences of the same token: the sum of w_ij over all j < i
    with t_j = t_i.

    Source: Wang et al. (2022), section 3.1.

    Args:
      weights_TS: attention maps ``[..., T, S]``.
      tokens_S: the token ids of the keys, ``[S]``; ``[B, S]`` for maps ``[..., B, N, T, S]``.
      allowed_TS: True for each key that a query may attend to, broadcastable to the maps; ``None``
        for all keys.
      queries_T: the position of each row among the keys, if the maps do not have all rows.

    Returns:
      float32 ``[...]``: the mean over the queries that have a value.
    """
    earlier_TS = per_query.earlier_occurrences(tokens_S, per_query.places(weights_TS, queries_T))
    return per_query.mean(*per_query.weight_on(weights_TS, earlier_TS, allowed_TS))


@_of_maps
def induction_score(weights_TS: Float[Array, "*batch T S"], tokens_S: Int[Array, "*rows S"], *,
                    allowed_TS: Bool[Array, "*#batch T S"] | None = None,
                    queries_T: Int[Array, " rows"] | None = None) -> Float[Array, "*batch"]:
    """Computes the weight on tokens that follow an earlier occurrence of the same token: the sum of
    w_ij over all j <= i with t_(j-1) = t_i.

    Source: Olsson et al. (2022), prefix matching.

    Args:
      weights_TS: attention maps ``[..., T, S]``.
      tokens_S: the token ids of the keys, ``[S]``; ``[B, S]`` for maps ``[..., B, N, T, S]``.
      allowed_TS: True for each key that a query may attend to, broadcastable to the maps; ``None``
        for all keys.
      queries_T: the position of each row among the keys, if the maps do not have all rows.

    Returns:
      float32 ``[...]``: the mean over the queries that have a value.
    """
    earlier_TS = per_query.earlier_occurrences(tokens_S, per_query.places(weights_TS, queries_T))
    return per_query.mean(*per_query.weight_on(weights_TS, per_query.after(earlier_TS, allowed_TS), allowed_TS))


@_of_maps
def head_agreement(weights_NTS: Float[Array, "*batch N T S"]) -> Float[Array, "*batch N N"]:
    """Computes how similar the attention of each two heads of a layer is: 1 - JS(p, q) / ln 2.

    JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2 is the Jensen-Shannon divergence of two rows. The
    agreement is 1 for equal heads, and 0 for heads that have no key in common.

    Source: Clark et al. (2019), section 6.

    Args:
      weights_NTS: the maps of the N heads, ``[..., N, T, S]``.

    Returns:
      float32 ``[..., N, N]``: the mean over queries for each two heads.
    """
    weights_NTS = weights_NTS.astype(jnp.float32)
    entropy_NT, counts_NT = per_query.entropy(weights_NTS)

    def with_all(one: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        weights_1TS, entropy_1T, counts_1T = (x[..., None, :, :] if x.ndim == weights_NTS.ndim - 1 else x[..., None, :]
                                              for x in one)
        divergence_NT = per_query.entropy((weights_NTS + weights_1TS) / 2)[0] - (entropy_NT + entropy_1T) / 2
        return per_query.mean(1.0 - divergence_NT / jnp.log(2.0), counts_NT & counts_1T)

    heads_first = (jnp.moveaxis(weights_NTS, -3, 0), jnp.moveaxis(entropy_NT, -2, 0), jnp.moveaxis(counts_NT, -2, 0))
    return jnp.moveaxis(jax.lax.map(with_all, heads_first), 0, -2)


def summaries(trace: Trace, tokens_BT: Int[Array | np.ndarray, "B T"] | None = None) -> dict[str, Float[Array, "L N"]]:
    """Computes scores of every head in a forward pass, a few query rows at a time.

    Args:
      trace: the trace of one kind of attention. Cross-attention, where ``trace.final`` is ``None``,
        has no distances.
      tokens_BT: the ids of the tokens that the model read, ``[B, T]``, for the scores that compare
        tokens.

    Returns:
      float32 ``[L, N]`` for each score, by name: ``"entropy"`` and ``"sink"``; for self-attention
      also ``"distance"``, ``"previous_token"`` and ``"diagonal"``; with ``tokens_BT`` also
      ``"duplicate_token"`` and ``"induction"``. Each score is the mean over all queries of the
      batch that have a value.

    Raises:
      ValueError: if ``trace`` is not the trace of one kind of attention, or if the ids have a
        different shape.
    """
    if not isinstance(trace, Trace):
        raise ValueError(f"summaries need the trace of one kind of attention; got {type(trace).__name__}: pass "
                         "trace(model, tokens); for an encoder-decoder, its .decoder, .encoder or .cross")
    if tokens_BT is not None:
        tokens_BT = _as_array(tokens_BT)
        if tokens_BT.shape != trace.queries.shape[1:3]:
            raise ValueError(f"tokens_BT has shape {tokens_BT.shape}; expected that of the trace, "
                             f"{trace.queries.shape[1:3]}")
    return _summaries(trace, tokens_BT)


@jax.jit
def _summaries(trace: Trace, tokens_BT: jax.Array | None) -> dict[str, jax.Array]:
    """Compiled part of ``summaries``."""
    L, B, T, N, _ = trace.queries.shape
    S = trace.keys.shape[2]
    size = max(1, min(T, _WEIGHTS_AT_A_TIME // (B * N * S)))
    # The sink is the first token of the text, even if it is outside the sliding window.
    unlimited = dataclasses.replace(trace.mask, window=None)

    def block(layer: jax.Array, start: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        rows_R = start + jnp.arange(size)
        inside_R, rows_R = rows_R < T, jnp.minimum(rows_R, T - 1)
        weights_BNRS = trace.attention(layers=layer, queries=rows_R)
        allowed = trace.allowed(layer, rows_R)
        sink = per_query.first(weights_BNRS, unlimited.materialize(T, S, rows_R))
        found = {"entropy": per_query.entropy(weights_BNRS),
                 "sink": per_query.weight_on(weights_BNRS, sink, allowed)}
        if trace.final is not None:
            previous, same = (per_query.at(weights_BNRS, offset, rows_R) for offset in (-1, 0))
            found |= {"distance": per_query.distance(weights_BNRS, rows_R),
                      "previous_token": per_query.weight_on(weights_BNRS, previous, allowed),
                      "diagonal": per_query.weight_on(weights_BNRS, same, allowed)}
            if tokens_BT is not None:
                earlier = per_query.earlier_occurrences(tokens_BT, rows_R)
                found |= {"duplicate_token": per_query.weight_on(weights_BNRS, earlier, allowed),
                          "induction": per_query.weight_on(weights_BNRS, per_query.after(earlier, allowed), allowed)}
        return {name: (jnp.where(counts & inside_R, values, 0.0).sum((0, 2)), (counts & inside_R).sum((0, 2)))
                for name, (values, counts) in found.items()}

    def of_layer(layer: jax.Array) -> dict[str, jax.Array]:
        blocks = jax.lax.map(lambda start: block(layer, start), jnp.arange(0, T, size))
        return {name: values.sum(0) / jnp.maximum(counts.sum(0), 1) for name, (values, counts) in blocks.items()}

    return jax.lax.map(of_layer, jnp.arange(L))
