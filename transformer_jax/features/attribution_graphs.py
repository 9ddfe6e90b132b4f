"""Attribution graphs: how features cause each other, and the logits, in one text (Ameisen et al.,
2025)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from transformer_jax.features.explained import (
    ExplainedLayer,
    HeldOutputs,
    Transcoders,
    explained_layers,
    feature_weights,
    with_errors,
)
from transformer_jax.features.graph import AttributionGraph, Node
from transformer_jax.features.linearised import frozen, pulled_back
from transformer_jax.features.source_nodes import SourceNodes
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.functional import forward, trace
from transformer_jax.models.output import Trace
from transformer_jax.settings import require

_CHUNK = 16  # functions whose gradients are computed together


def attribution_graph(bundle_or_model: Any, transcoders: Transcoders, text: Any, *,
                      position: int = -1, num_logits: int = 3, targets: Sequence[int] | None = None,
                      max_features: int = 500, tokenizer: Any = None) -> AttributionGraph:
    """Computes which features, errors and tokens cause the logits of some next tokens.

    Feed-forward layers count as their transcoders plus an error, so the values are those of the
    model itself. Attention patterns and the scales of norms are frozen, which makes every value a
    linear function of the nodes before it.

    Args:
      bundle_or_model: A decoder, or its bundle.
      transcoders: Transcoders of its feed-forward layers, or one cross-layer transcoder. A layer
        without one has errors only.
      text: A string or token ids.
      position: The position of the logits.
      num_logits: How many of the most probable next tokens are nodes.
      targets: The ids of the tokens whose logits are nodes, in place of the most probable ones. The
        difference of the edges into two of them explains why one is preferred to the other.
      max_features: The largest number of features. Those with the smallest direct effect on the
        logits become a part of the errors.
      tokenizer: The tokenizer; by default that of the bundle.

    Returns:
      The graph.

    Raises:
      ValueError: If the model is not a decoder, a transcoder does not fit, or ``targets`` is empty
        or has ids that are repeated or not in the vocabulary.
    """
    model = getattr(bundle_or_model, "model", bundle_or_model)
    tokenizer = getattr(bundle_or_model, "tokenizer", None) if tokenizer is None else tokenizer
    require(isinstance(model, Decoder) and model.config.limits.logits is None,
            "an attribution graph needs a decoder whose logits have no limit")
    ids = np.asarray(tokenizer.encode_prompt(text) if isinstance(text, str) else text, np.int32).reshape(1, -1)
    position = range(ids.shape[1])[position]
    found = cast(Trace, trace(model, ids))
    layers = explained_layers(model, transcoders, found)
    logits_V = np.asarray(forward(model, ids)[0, position], np.float64)
    chosen = np.argsort(-logits_V)[:num_logits] if targets is None else _checked(targets, len(logits_V))
    probabilities = np.exp(logits_V - logits_V.max())
    probabilities /= probabilities.sum()
    outputs_LTD = np.asarray(found["mlp_output"][:, 0], np.float64)
    pull = _Pull(frozen(model), ids, position)
    of_outputs_CLTD = np.concatenate([each for each, _, _ in pull.gradients([], chosen)])
    sources = SourceNodes.of(ids[0], _limited(layers, outputs_LTD, of_outputs_CLTD, max_features),
                             np.asarray(found.layers.residual[0, 0]))
    logits = [Node("logit", len(layers), position, int(token), float(logits_V[token])) for token in chosen]
    edges, bias = _edges(sources, pull, chosen)
    return AttributionGraph(ids[0], sources.nodes + logits, edges, bias, probabilities[chosen])


def measured_without(bundle_or_model: Any, transcoders: Transcoders, graph: AttributionGraph,
                     places: int | Sequence[int]) -> np.ndarray:
    """Measures how the values of features and logits change if features are removed from the model.

    What a feature writes is subtracted from the outputs of the feed-forward layers that it writes
    to. These outputs are held otherwise, because they already contain what the feature does to them
    (the constrained patching of Ameisen et al., 2025). Attention, norms and later layers are free.

    For a transcoder, compare the result with ``graph.predicted_without(places)``. A feature of a
    cross-layer transcoder writes to all later layers, so compare its result with the direct
    effects, ``-graph.edges[:, place]``, which add up for several features.

    Args:
      bundle_or_model: The decoder of the graph.
      transcoders: The transcoders of the graph.
      graph: The graph.
      places: The place of the feature among the nodes, or the places of several features, which are
        removed together.

    Returns:
      The changes ``[N]``; 0 for embeddings and errors. A feature's value counts before its
      activation function.

    Raises:
      ValueError: If a node is not a feature.
    """
    model = getattr(bundle_or_model, "model", bundle_or_model)
    weights, ids, removed = feature_weights(model, transcoders), graph.tokens[None], graph.checked_features(places)
    before = cast(Trace, trace(model, ids))
    outputs_LTD = np.array(before["mlp_output"][:, 0], np.float32)
    is_held_L = np.zeros(len(weights), bool)
    for node in (graph.nodes[place] for place in removed):
        written_KD = weights[node.layer].decoder_FKD[node.number]
        written_to = slice(node.layer, node.layer + len(written_KD))
        outputs_LTD[written_to, node.position] -= node.value * written_KD
        is_held_L[written_to] = True
    edit = HeldOutputs(jnp.asarray(outputs_LTD), jnp.asarray(is_held_L))
    after = cast(Trace, trace(model, ids, intervene=edit))
    changed_TV = np.asarray(forward(model, ids, intervene=edit)[0] - forward(model, ids)[0])
    changed_LTD = np.asarray(after["mlp_input"][:, 0], np.float64) - np.asarray(before["mlp_input"][:, 0])
    found = np.zeros(len(graph.nodes))
    for index, each in enumerate(graph.nodes):
        if each.kind == "feature":
            found[index] = changed_LTD[each.layer, each.position] @ weights[each.layer].encoder_FD[each.number]
        elif each.kind == "logit":
            found[index] = changed_TV[each.position, each.number]
    for place in removed:
        found[place] = -graph.nodes[place].value
    return found


def _checked(targets: Sequence[int], vocab_size: int) -> np.ndarray:
    """Returns the ids of tokens as an array, or raises an error that says what is wrong."""
    ids = np.asarray(targets)
    require(ids.ndim == 1 and ids.size > 0 and np.issubdtype(ids.dtype, np.integer)
            and len(set(ids.tolist())) == len(ids) and ids.min() >= 0 and ids.max() < vocab_size,
            f"targets={targets!r} must be different token ids from 0 to {vocab_size - 1}")
    return ids


class _Pull:
    """Computes the gradients of many linear functions of a text, a few functions at a time."""

    def __init__(self, model: Decoder, ids: np.ndarray, position: int):
        self._model, self._ids, self._position = model, jnp.asarray(ids), jnp.asarray(position)

    def gradients(self, inputs: Sequence[tuple[int, int, np.ndarray]],
                  tokens: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Computes the gradients of functions in chunks, so that memory does not depend on their
        number.

        Args:
          inputs: Functions of the inputs of feed-forward layers: the layer, the position, and the
            direction whose product with the input is the value.
          tokens: The tokens whose logits are the other functions.

        Yields:
          The results of ``pulled_back`` for the next functions, float64.
        """
        config = self._model.config
        shape = (config.num_layers, self._ids.shape[1], config.model_dim)
        for start in range(0, len(inputs) + len(tokens), _CHUNK):
            of_inputs = np.zeros((_CHUNK, *shape), np.float32)
            of_logits = np.zeros((_CHUNK, cast(int, config.vocab_size)), np.float32)
            count = min(_CHUNK, len(inputs) + len(tokens) - start)
            for index in range(count):
                if start + index < len(inputs):
                    layer, place, direction_D = inputs[start + index]
                    of_inputs[index, layer, place] = direction_D
                else:
                    of_logits[index, tokens[start + index - len(inputs)]] = 1.0
            found = pulled_back(self._model, self._ids, self._position, jnp.asarray(of_inputs), jnp.asarray(of_logits))
            added, embedded, bias = (np.asarray(each[:count], np.float64) for each in found)
            yield added, embedded, bias


def _limited(layers: list[ExplainedLayer], outputs_LTD: np.ndarray, of_logits_CLTD: np.ndarray,
             most: int) -> list[ExplainedLayer]:
    """Moves the features with the smallest direct effects on the logits to the errors."""
    effects = []
    for layer, each in enumerate(layers):
        decoder_FKD = each.weights.decoder_FKD
        of_outputs_CKTD = of_logits_CLTD[:, layer:layer + decoder_FKD.shape[1]]
        effects.append(each.features_TF * np.abs(np.einsum("fkd,cktd->ctf", decoder_FKD, of_outputs_CKTD)).max(0))
    everything = np.sort(np.concatenate([each[each > 0] for each in effects]))[::-1]
    if len(everything) <= most:
        return layers
    kept = [each.features_TF * (effect >= everything[most - 1]) for each, effect in zip(layers, effects, strict=True)]
    return with_errors([each.weights for each in layers], kept, outputs_LTD)


def _edges(sources: SourceNodes, pull: _Pull, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the edges and biases of all nodes; the logits of the tokens are the last nodes."""
    features = sources.features
    weights = [each.weights for each in sources.layers]
    inputs = [(node.layer, node.position, weights[node.layer].encoder_FD[node.number]) for node in features]
    chunks = [(sources.contributions(added, embedded), of_biases + sources.biases(added))
              for added, embedded, of_biases in pull.gradients(inputs, tokens)]
    edges_CN, bias_C = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    bias_C[:len(features)] += [weights[node.layer].encoder_bias_F[node.number] for node in features]
    N, C = len(sources.nodes) + len(tokens), len(bias_C)
    edges, bias = np.zeros((N, N)), np.zeros(N)
    edges[N - C:, :N - len(tokens)], bias[N - C:] = edges_CN, bias_C
    return edges, bias
