"""The nodes that cause things in a text, and what they add to linear functions of the text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from transformer_jax.features.explained import ExplainedLayer
from transformer_jax.features.graph import Node


@dataclasses.dataclass(frozen=True)
class SourceNodes:
    """The embeddings, errors and active features of a text.

    Attributes:
      layers: The feed-forward layers.
      embeddings_TD: The residual stream that enters the first layer.
      nodes: The nodes: T embeddings, L * T errors, and the features by layers.
    """

    layers: Sequence[ExplainedLayer]
    embeddings_TD: np.ndarray
    nodes: list[Node]

    @classmethod
    def of(cls, tokens: np.ndarray, layers: Sequence[ExplainedLayer], embeddings_TD: np.ndarray) -> SourceNodes:
        """Lists the nodes.

        Args:
          tokens: The tokens of the text.
          layers: The feed-forward layers.
          embeddings_TD: The residual stream that enters the first layer.

        Returns:
          The nodes.
        """
        T = len(tokens)
        nodes = [Node("embedding", -1, place, int(token), 1.0) for place, token in enumerate(tokens)]
        nodes += [Node("error", layer, place, 0, 1.0) for layer in range(len(layers)) for place in range(T)]
        nodes += [Node("feature", layer, int(place), int(number), float(each.features_TF[place, number]))
                  for layer, each in enumerate(layers) for place, number in np.argwhere(each.features_TF)]
        return cls(layers, np.asarray(embeddings_TD, np.float64), nodes)

    @property
    def features(self) -> list[Node]:
        """The nodes that are features."""
        return [node for node in self.nodes if node.kind == "feature"]

    def contributions(self, of_outputs_CLTD: np.ndarray, of_embeddings_CTD: np.ndarray) -> np.ndarray:
        """Computes what each node adds to linear functions of the text.

        Args:
          of_outputs_CLTD: The gradients of C functions with respect to the outputs of the
            feed-forward layers.
          of_embeddings_CTD: The gradients with respect to the embeddings.

        Returns:
          ``[C, nodes]``, float64.
        """
        errors_LTD = np.stack([each.error_TD for each in self.layers])
        parts = [np.einsum("ctd,td->ct", of_embeddings_CTD, self.embeddings_TD),
                 np.einsum("cltd,ltd->clt", of_outputs_CLTD, errors_LTD).reshape(len(of_outputs_CLTD), -1)]
        for layer, each in enumerate(self.layers):
            places, numbers = np.nonzero(each.features_TF)
            written_NKD = each.weights.decoder_FKD[numbers] * each.features_TF[places, numbers][:, None, None]
            of_outputs_CKND = of_outputs_CLTD[:, layer:layer + written_NKD.shape[1], places]
            parts.append(np.einsum("cknd,nkd->cn", of_outputs_CKND, written_NKD))
        return np.concatenate(parts, axis=1)

    def biases(self, of_outputs_CLTD: np.ndarray) -> np.ndarray:
        """Computes what the biases of the transcoders add to linear functions of the text.

        Args:
          of_outputs_CLTD: See ``contributions``.

        Returns:
          ``[C]``, float64.
        """
        return np.einsum("cltd,ld->c", of_outputs_CLTD, np.stack([each.weights.bias_D for each in self.layers]))
