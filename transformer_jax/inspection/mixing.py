"""How tokens mix on the way through all layers, by attention maps and the residual stream alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

_FLOW_UNITS = 1 << 28  # scipy's flows are integers


@jax.jit
def rollout(weights_LTT: Float[Array, "L *batch T T"]) -> Float[Array, "L *batch T T"]:
    """How much each layer's tokens hold of each input token, if attention and the residual stream
    only mixed tokens.

    R_l = A_l R_l-1 with A_l = 0.5 W_l + 0.5 I, its rows normed to sum to one, and R_0 = I.

    Source: Abnar and Zuidema (2020), section 3.

    Args:
      weights_LTT: ``[L, ..., T, T]``, one map a layer, such as the mean over its heads.

    Returns:
      float32 ``[L, ..., T, T]``: the rollout up to each layer.
    """
    identity_TT = jnp.eye(weights_LTT.shape[-1], dtype=jnp.float32)

    def layer(rolled_TT: jax.Array, weights_TT: jax.Array) -> tuple[jax.Array, jax.Array]:
        rolled_TT = _with_residual(weights_TT, identity_TT) @ rolled_TT
        return rolled_TT, rolled_TT

    return jax.lax.scan(layer, jnp.broadcast_to(identity_TT, weights_LTT.shape[1:]), weights_LTT)[1]


def flow(weights_LTT: Float[np.ndarray | Array, "L T T"],
         queries: Sequence[int] | None = None) -> Float[np.ndarray, "Q T"]:
    """The largest flow from each token of the last layer to each input token, attention weights
    being capacities.

    The maps are those of :func:`rollout`, the residual stream included. One flow problem for each
    two tokens, on the
    host: for tens of tokens.

    Source: Abnar and Zuidema (2020), section 3.

    Args:
      weights_LTT: ``[L, T, T]``, one map a layer.
      queries: the tokens of the last layer; all by default.

    Returns:
      float64 ``[queries, T]``.
    """
    from scipy.sparse import coo_array, csr_array
    from scipy.sparse.csgraph import maximum_flow

    weights_LTT = np.asarray(weights_LTT, np.float64)
    num_layers, length, _ = weights_LTT.shape
    mixed_LTT = np.asarray(_with_residual(weights_LTT, np.eye(length)))
    layer, query, key = np.nonzero(mixed_LTT)
    units = np.rint(mixed_LTT[layer, query, key] * _FLOW_UNITS).astype(np.int32)
    size = (num_layers + 1) * length
    edges = coo_array((units, ((layer + 1) * length + query, layer * length + key)), (size, size))
    graph = csr_array(edges)
    wanted = range(length) if queries is None else [range(length)[query] for query in queries]
    return np.array([[maximum_flow(graph, num_layers * length + query, key).flow_value for key in range(length)]
                     for query in wanted]) / _FLOW_UNITS


def _with_residual(weights_TT: jax.Array | np.ndarray, identity_TT: jax.Array | np.ndarray) -> Any:
    mixed_TT = 0.5 * weights_TT + 0.5 * identity_TT
    return mixed_TT / mixed_TT.sum(-1, keepdims=True)
