"""The heads and positions through which a node of an attribution graph gets its value."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from transformer_jax.features.explained import Transcoders, feature_weights
from transformer_jax.features.graph import AttributionGraph
from transformer_jax.features.linearised import frozen, pulled_to_heads
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.functional import trace
from transformer_jax.models.output import Trace
from transformer_jax.settings import require


class Link(NamedTuple):
    """A head that carries information from one position to another.

    Attributes:
      layer: The layer of the head.
      head: The head.
      query: The position that the head writes to.
      key: The position that it reads.
      weight: The attention weight.
      effect: What the head adds to the value of a node with what it reads at this position.
    """

    layer: int
    head: int
    query: int
    key: int
    weight: float
    effect: float


def attention_links(bundle_or_model: Any, transcoders: Transcoders, graph: AttributionGraph, place: int, *,
                    count: int = 5) -> list[Link]:
    """Finds the heads and positions that add most to a feature or a logit.

    ``score_attribution`` then says why such a head looks at the position.

    Args:
      bundle_or_model: The decoder of the graph.
      transcoders: The transcoders of the graph.
      graph: The graph.
      place: The place of the feature or logit among the nodes.
      count: How many links.

    Returns:
      The links, the largest absolute effect first. Effects are direct: they pass through later
      heads, whose patterns are frozen, and not through feed-forward layers.

    Raises:
      ValueError: If the node is neither a feature nor a logit.
    """
    model: Decoder = getattr(bundle_or_model, "model", bundle_or_model)
    node, ids = graph.nodes[place], graph.tokens[None]
    require(node.kind in ("feature", "logit"), f"node {place} is of kind {node.kind!r}, but only features and logits "
            "have causes")
    of_inputs_LTD = np.zeros((model.config.num_layers, len(graph.tokens), model.config.model_dim), np.float32)
    of_logits_V = np.zeros(cast(int, model.config.vocab_size), np.float32)
    if node.kind == "logit":
        of_logits_V[node.number] = 1.0
    else:
        encoder_FD = feature_weights(model, transcoders)[node.layer].encoder_FD
        of_inputs_LTD[node.layer, node.position] = encoder_FD[node.number]
    gradient_LTNH = np.asarray(pulled_to_heads(frozen(model), jnp.asarray(ids), jnp.asarray(node.position),
                                               jnp.asarray(of_inputs_LTD), jnp.asarray(of_logits_V)))
    found = cast(Trace, trace(model, ids))
    weights_LNTS = np.asarray(found.attention()[:, 0])
    values_LSNH = np.repeat(np.asarray(found.values[:, 0], np.float32),
                            model.config.num_heads // found.values.shape[3], axis=2)
    effects_LNTS = np.stack([weights * np.einsum("tnh,snh->nts", gradient, values) for weights, gradient, values in
                             zip(weights_LNTS, gradient_LTNH, values_LSNH, strict=True)])
    order = np.argsort(-np.abs(effects_LNTS).ravel(), kind="stable")[:count]
    links = []
    for layer, head, query, key in zip(*np.unravel_index(order, effects_LNTS.shape), strict=True):
        if effect := float(effects_LNTS[layer, head, query, key]):
            weight = float(weights_LNTS[layer, head, query, key])
            links.append(Link(int(layer), int(head), int(query), int(key), weight, effect))
    return links
