"""Why a head looks where it looks: an attention score as a sum over pairs of features (Kamath et
al., 2025, "Tracing attention computation through feature interactions")."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from transformer_jax.features.explained import Transcoders, explained_layers, with_errors
from transformer_jax.features.graph import AttributionGraph, Node
from transformer_jax.features.linearised import frozen, pulled_to_scores
from transformer_jax.features.source_nodes import SourceNodes
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.functional import trace
from transformer_jax.models.output import Trace
from transformer_jax.ops.positions import PositionBias
from transformer_jax.settings import require


class Pair(NamedTuple):
    """What two nodes together add to an attention score.

    Attributes:
      query: The node on the side of the query.
      key: The node on the side of the key.
      value: What they add.
    """

    query: Node
    key: Node
    value: float


@dataclasses.dataclass(frozen=True)
class ScoreAttribution:
    """The parts of one attention score, before the softmax.

    Attributes:
      layer: The layer of the head.
      head: The head.
      query: The position of the query.
      key: The position of the key.
      nodes: The N nodes before the layer: embeddings, errors, features, and last one of kind
        ``"bias"`` for all biases of model and transcoders.
      parts: ``parts[i, j]`` is what node i on the side of the query and node j on the side of the
        key add to the score ``[N, N]``.
      position_bias: What the position encoding adds to the score, such as ALiBi.
      score: The score of the model. The parts and the position bias add up to it.
      weight: The attention weight after the softmax.
    """

    layer: int
    head: int
    query: int
    key: int
    nodes: list[Node]
    parts: np.ndarray
    position_bias: float
    score: float
    weight: float

    def largest(self, count: int = 10) -> list[Pair]:
        """Finds the pairs that add or subtract most.

        Args:
          count: How many pairs.

        Returns:
          The pairs, the largest absolute value first.
        """
        order = np.argsort(-np.abs(self.parts).ravel(), kind="stable")[:count]
        places = zip(*np.unravel_index(order, self.parts.shape), strict=True)
        return [Pair(self.nodes[i], self.nodes[j], float(self.parts[i, j])) for i, j in places]


def score_attribution(bundle_or_model: Any, transcoders: Transcoders, graph: AttributionGraph, layer: int, head: int,
                      query: int, key: int) -> ScoreAttribution:
    """Splits an attention score into what pairs of features add to it.

    The query is a linear function of the nodes before the layer, and so is the key, if attention
    patterns and the scales of norms of earlier layers are frozen as in the graph. Their product is
    a sum over pairs of nodes.

    Args:
      bundle_or_model: The decoder of the graph.
      transcoders: The transcoders of the graph.
      graph: The graph, not pruned or pruned. Features that are not in it are a part of the errors.
      layer: The layer of the head, counted from 0.
      head: The head, counted from 0.
      query: The position of the query; negative numbers count from the end.
      key: The position of the key, at most that of the query.

    Returns:
      The parts of the score.

    Raises:
      ValueError: If the model has no such head or the text no such position, or if the model limits
        scores or projections.
    """
    model: Decoder = getattr(bundle_or_model, "model", bundle_or_model)
    config, ids = model.config, graph.tokens[None]
    require(config.limits.scores is None and config.limits.projections is None,
            "the model limits scores or projections (config.limits), so a score is not a sum over pairs of features")
    for name, value, count in (("layer", layer, config.num_layers), ("head", head, config.num_heads)):
        require(0 <= value < count, f"{name}={value} is not from 0 to {count - 1}")
    for name, value in (("query", query), ("key", key)):
        require(-len(graph.tokens) <= value < len(graph.tokens), f"{name}={value} is not a position of a text of "
                f"{len(graph.tokens)} tokens")
    query, key = range(len(graph.tokens))[query], range(len(graph.tokens))[key]
    found = cast(Trace, trace(model, ids))
    score = float(found.scores(layer, head, query)[0, key])
    require(np.isfinite(score), f"the query at position {query} may not attend to the key at position {key} in layer "
            f"{layer}")
    sources = graph_sources(model, transcoders, graph, found)
    gradients = pulled_to_scores(frozen(model), jnp.asarray(ids), *map(jnp.asarray, (layer, head, query, key)))
    added, embedded, biases = (np.asarray(each, np.float64) for each in gradients)
    vectors_CN = np.concatenate([sources.contributions(added, embedded),
                                 (biases + sources.biases(added))[:, None]], axis=1)
    is_before = np.array([node.layer < layer for node in sources.nodes] + [True])
    query_HN, key_HN = np.split(vectors_CN[:, is_before], 2)
    nodes = [node for node in sources.nodes if node.layer < layer] + [Node("bias", -1, 0, 0, 1.0)]
    return ScoreAttribution(layer, head, query, key, nodes, query_HN.T @ key_HN,
                            _position_bias(found, head, query, key), score,
                            float(found.attention(layer, head, query)[0, key]))


def graph_sources(model: Decoder, transcoders: Transcoders, graph: AttributionGraph, found: Trace) -> SourceNodes:
    """Returns the sources of a graph; features that are not nodes of it are a part of the errors.

    Args:
      model: The decoder.
      transcoders: The transcoders of the graph.
      graph: The graph.
      found: The trace of its text.

    Returns:
      The sources, also those that are not in a pruned graph.
    """
    layers = explained_layers(model, transcoders, found)
    kept = [np.zeros_like(each.features_TF) for each in layers]
    for node in graph.nodes:
        if node.kind == "feature":
            kept[node.layer][node.position, node.number] = layers[node.layer].features_TF[node.position, node.number]
    layers = with_errors([each.weights for each in layers], kept, np.asarray(found["mlp_output"][:, 0], np.float64))
    return SourceNodes.of(graph.tokens, layers, np.asarray(found.layers.residual[0, 0]))


def _position_bias(found: Trace, head: int, query: int, key: int) -> float:
    """Returns what the position encoding adds to a score."""
    bias, T = found.bias, found.queries.shape[2]
    if bias is None:
        return 0.0
    rows = bias.materialize(T, T) if isinstance(bias, PositionBias) else jnp.asarray(bias)
    return float(rows[0, head, query, key])
