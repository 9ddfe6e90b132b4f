"""Attention rollout and attention flow: how attention and residual connections mix the tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from transformer_jax.inspection.maps import as_maps
from transformer_jax.models.output import Index, resolve

_FLOW_UNITS = 1 << 28  # scipy computes integer flows


def rollout(weights_LTT: Float[Array | np.ndarray, "L *batch T T"]) -> Float[Array, "L *batch T T"]:
    """Computes attention rollout: the share of each input token in each token of each layer.

    The model assumes that attention and residual connections only mix tokens: R_l = A_l R_(l-1),
    where R_0 = I and A_l = 0.5 W_l + 0.5 I with its rows normalised to sum to one.

    Source: Abnar and Zuidema (2020), section 3.

    Args:
      weights_LTT: one map for each layer, such as the mean over its heads, ``[L, ..., T, T]``.

    Returns:
      float32 ``[L, ..., T, T]``: the rollout up to each layer.

    Raises:
      ValueError: if the maps have a different shape.
    """
    return _rollout(_checked(weights_LTT))


@jax.jit
def _rollout(weights_LTT: jax.Array) -> jax.Array:
    """Compiled part of ``rollout``."""
    identity_TT = jnp.eye(weights_LTT.shape[-1], dtype=jnp.float32)

    def layer(rolled_TT: jax.Array, weights_TT: jax.Array) -> tuple[jax.Array, jax.Array]:
        rolled_TT = _with_residual(weights_TT, identity_TT) @ rolled_TT
        return rolled_TT, rolled_TT

    return jax.lax.scan(layer, jnp.broadcast_to(identity_TT, weights_LTT.shape[1:]), weights_LTT)[1]


def flow(weights_LTT: Float[np.ndarray | Array, "L T T"],
         queries: Index = None) -> Float[np.ndarray, "Q T"]:
    """Computes attention flow: the maximum flow from each token of the last layer to each input
    token, with attention weights as capacities.

    The capacities include the residual connections, as in ``rollout``. The function solves one flow
    problem for each pair of tokens on the host, so it is practical for tens of tokens.

    Source: Abnar and Zuidema (2020), section 3.

    Args:
      weights_LTT: one map for each layer, ``[L, T, T]``.
      queries: positions in the last layer; ``None`` for all. Negative ones count from the end.

    Returns:
      float64 ``[queries, T]``: the maximum flows.

    Raises:
      ValueError: if the maps have a different shape, or if a position is out of range.
    """
    from scipy.sparse import coo_array, csr_array
    from scipy.sparse.csgraph import maximum_flow

    weights_LTT = np.asarray(_checked(weights_LTT), np.float64)
    if weights_LTT.ndim != 3:
        raise ValueError(f"flow takes one map for each layer [L, T, T], such as the mean over heads; got "
                         f"{list(weights_LTT.shape)}")
    num_layers, length, _ = weights_LTT.shape
    mixed_LTT = np.asarray(_with_residual(weights_LTT, np.eye(length)))
    layer, query, key = np.nonzero(mixed_LTT)
    units = np.rint(mixed_LTT[layer, query, key] * _FLOW_UNITS).astype(np.int32)
    size = (num_layers + 1) * length
    edges = coo_array((units, ((layer + 1) * length + query, layer * length + key)), (size, size))
    graph = csr_array(edges)
    wanted = np.asarray(resolve("queries", queries, length)[0]).tolist()
    return np.array([[maximum_flow(graph, num_layers * length + query, key).flow_value for key in range(length)]
                     for query in wanted]) / _FLOW_UNITS


def _checked(weights_LTT: Any) -> jax.Array | np.ndarray:
    """Returns the maps as an array; raises ValueError if they are not ``[L, ..., T, T]``."""
    weights_LTT = as_maps(weights_LTT)
    if weights_LTT.ndim < 3 or weights_LTT.shape[-1] != weights_LTT.shape[-2]:
        raise ValueError(f"maps are self-attention maps [L, ..., T, T], one for each layer; got "
                         f"{list(weights_LTT.shape)}")
    return weights_LTT


def _with_residual(weights_TT: jax.Array | np.ndarray, identity_TT: jax.Array | np.ndarray) -> Any:
    """Averages a map with the identity, which stands for the residual connection."""
    mixed_TT = 0.5 * weights_TT + 0.5 * identity_TT
    return mixed_TT / mixed_TT.sum(-1, keepdims=True)
