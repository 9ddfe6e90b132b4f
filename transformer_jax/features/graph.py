"""The graph of the causes of a logit, and what it predicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from transformer_jax.settings import require


class Node(NamedTuple):
    """A node of a graph.

    Attributes:
      kind: ``"embedding"``, ``"feature"``, ``"error"`` (what the transcoder of a layer does not
        explain) or ``"logit"``.
      layer: The layer of a feature or an error; -1 for an embedding, and L for a logit.
      position: The position of the token.
      number: The number of a feature, or the id of a token; 0 for an error.
      value: The value of a feature or logit; 1 for the others.
    """

    kind: str
    layer: int
    position: int
    number: int
    value: float


@dataclasses.dataclass(frozen=True)
class AttributionGraph:
    """The nodes and edges of one text.

    Attributes:
      tokens: The tokens of the text, ``[T]``.
      nodes: The N nodes, from the embeddings to the logits.
      edges: ``edges[target, source]`` is what the source adds directly to the value of the target:
        to the logit, or to the feature before its activation function. ``[N, N]``.
      bias: What the biases of model and transcoders add to each target ``[N]``. A row of ``edges``
        and its bias add up to the value of the target, until the graph is pruned.
      probabilities: The probability of each token whose logit is a node.
    """

    tokens: np.ndarray
    nodes: list[Node]
    edges: np.ndarray
    bias: np.ndarray
    probabilities: np.ndarray

    @property
    def logits(self) -> range:
        """The places of the logits among the nodes, which are the last ones."""
        return range(len(self.nodes) - len(self.probabilities), len(self.nodes))

    def influence(self) -> np.ndarray:
        """Computes how much each node influences the logits, directly and through other nodes.

        The absolute values of the edges into a node are divided by their sum.

        Returns:
          One number for each node; logits have their probabilities.
        """
        shares = np.abs(self.edges)
        shares /= np.maximum(shares.sum(1, keepdims=True), 1e-30)
        start = np.zeros(len(self.nodes))
        start[list(self.logits)] = self.probabilities
        return np.linalg.solve(np.eye(len(start)) - shares.T, start)

    def pruned(self, node_share: float = 0.8, edge_share: float = 0.98) -> AttributionGraph:
        """Keeps the nodes and edges with most of the influence.

        Args:
          node_share: The share of the influence of features and errors that the kept ones have.
            Embeddings and logits are always kept.
          edge_share: The share of the influence of all edges that the kept ones have.

        Returns:
          The smaller graph. Its edges no longer add up to the values.

        Raises:
          ValueError: If a share is not from 0 to 1.
        """
        require(0 <= node_share <= 1 and 0 <= edge_share <= 1,
                f"node_share={node_share} and edge_share={edge_share} must be from 0 to 1")
        influence = self.influence()
        inner = np.array([node.kind in ("feature", "error") for node in self.nodes])
        kept = np.flatnonzero(~inner | _largest(influence * inner, node_share))
        graph = dataclasses.replace(self, nodes=[self.nodes[place] for place in kept], bias=self.bias[kept],
                                    edges=self.edges[np.ix_(kept, kept)])
        shares = np.abs(graph.edges)
        shares /= np.maximum(shares.sum(1, keepdims=True), 1e-30)
        weights = shares * graph.influence()[:, None]
        is_kept = _largest(weights.ravel(), edge_share).reshape(weights.shape)
        return dataclasses.replace(graph, edges=graph.edges * is_kept)

    def predicted_without(self, places: int | Sequence[int]) -> np.ndarray:
        """Predicts how the values of all nodes change if features become zero.

        Args:
          places: The place of the feature among the nodes, or the places of several features, which
            become zero together.

        Returns:
          The changes ``[N]``, if attention, norms and the choice of active features stay the same.

        Raises:
          ValueError: If a node is not a feature.
        """
        chosen = self.checked_features(places)
        values = np.array([node.value for node in self.nodes])
        relative = self.edges / values[:, None]
        relative[chosen] = 0.0
        removed = np.zeros(len(values))
        removed[chosen] = -1.0
        return values * np.linalg.solve(np.eye(len(values)) - relative, removed)

    def checked_features(self, places: int | Sequence[int]) -> list[int]:
        """Checks that the places are those of features.

        Args:
          places: One place or several.

        Returns:
          The places, without repetitions.

        Raises:
          ValueError: If a place is not that of a feature.
        """
        given = np.atleast_1d(places).tolist()
        for place in given:
            require(place in range(len(self.nodes)), f"{place!r} is not the place of a node; expected a whole number "
                    f"from 0 to {len(self.nodes) - 1}")
        chosen = sorted(set(map(int, given)))
        for place in chosen:
            require(self.nodes[place].kind == "feature", f"node {place} is of kind {self.nodes[place].kind!r}, but "
                    "only features can be removed")
        return chosen


def _largest(weights: np.ndarray, share: float) -> np.ndarray:
    """Returns True for the largest weights, which together have this share of the sum."""
    order = np.argsort(-weights)
    before = np.cumsum(weights[order]) - weights[order]
    kept = np.zeros(len(weights), bool)
    kept[order[before < share * weights.sum()]] = True
    return kept & (weights > 0)
