"""Attribution graphs: how features cause each other, and the logits, in one text (Ameisen et al.,
2025)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from transformer_jax.features.autoencoder import SparseAutoencoder
from transformer_jax.features.graph import AttributionGraph, Node
from transformer_jax.features.linearised import frozen, pulled_back
from transformer_jax.features.splicing import in_own_units, site_and_layer
from transformer_jax.inspection.interventions import steer
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.functional import forward, trace
from transformer_jax.models.output import Trace
from transformer_jax.settings import require

_CHUNK = 16  # targets whose edges are computed together


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer of one text.

    Attributes:
      transcoder: Its transcoder; ``None`` if the layer has none.
      features_TF: The features.
      error_TD: What the features do not explain of the output of the feed-forward layer.
    """

    transcoder: SparseAutoencoder | None
    features_TF: np.ndarray
    error_TD: np.ndarray


def attribution_graph(bundle_or_model: Any, transcoders: Sequence[SparseAutoencoder], text: Any, *,
                      position: int = -1, num_logits: int = 3, max_features: int = 500,
                      tokenizer: Any = None) -> AttributionGraph:
    """Computes which features, errors and tokens cause the most probable next tokens.

    Feed-forward layers count as their transcoders plus an error, so the values are those of the
    model itself. Attention patterns and the scales of norms are frozen, which makes every value a
    linear function of the nodes before it.

    Args:
      bundle_or_model: A decoder, or its bundle.
      transcoders: Transcoders of its feed-forward layers. A layer without one has errors only.
      text: A string or token ids.
      position: The position of the logits.
      num_logits: How many of the most probable tokens are nodes.
      max_features: The largest number of features. Those with the smallest direct effect on the
        logits become a part of the errors.
      tokenizer: The tokenizer; by default that of the bundle.

    Returns:
      The graph.

    Raises:
      ValueError: If the model is not a decoder, or a transcoder does not fit.
    """
    model = getattr(bundle_or_model, "model", bundle_or_model)
    tokenizer = getattr(bundle_or_model, "tokenizer", None) if tokenizer is None else tokenizer
    require(isinstance(model, Decoder) and model.config.limits.logits is None,
            "an attribution graph needs a decoder whose logits have no limit")
    ids = np.asarray(tokenizer.encode_prompt(text) if isinstance(text, str) else text, np.int32).reshape(1, -1)
    position = range(ids.shape[1])[position]
    found = cast(Trace, trace(model, ids))
    layers = _layers(model, transcoders, found)
    logits_V = np.asarray(forward(model, ids)[0, position], np.float64)
    chosen = np.argsort(-logits_V)[:num_logits]
    probabilities = np.exp(logits_V - logits_V.max())
    probabilities /= probabilities.sum()
    pull = _Pull(frozen(model), ids, position, len(layers))
    pull.add_logits(chosen)
    layers = _limited(layers, pull.gradients()[0], max_features)
    features = [(layer, *map(int, place)) for layer, each in enumerate(layers)
                for place in np.argwhere(each.features_TF)]
    pull = _Pull(frozen(model), ids, position, len(layers))
    for layer, place, number in features:
        transcoder = cast(SparseAutoencoder, layers[layer].transcoder)
        pull.add_input(layer, place, np.asarray(transcoder.encoder[...][number]))
    pull.add_logits(chosen)
    T = ids.shape[1]
    nodes = [Node("embedding", -1, place, int(ids[0, place]), 1.0) for place in range(T)]
    nodes += [Node("error", layer, place, 0, 1.0) for layer in range(len(layers)) for place in range(T)]
    nodes += [Node("feature", layer, place, number, float(layers[layer].features_TF[place, number]))
              for layer, place, number in features]
    nodes += [Node("logit", len(layers), position, int(token), float(logits_V[token])) for token in chosen]
    edges, bias = _edges(nodes, layers, np.asarray(found.layers.residual[0, 0]), *pull.gradients())
    return AttributionGraph(ids[0], nodes, edges, bias, probabilities[chosen])


def measured_without(bundle_or_model: Any, transcoders: Sequence[SparseAutoencoder], graph: AttributionGraph,
                     place: int) -> np.ndarray:
    """Measures how the values of features and logits change if a feature is removed from the model.

    Nothing is frozen. Compare the result with ``graph.predicted_without(place)``.

    Args:
      bundle_or_model: The decoder of the graph.
      transcoders: The transcoders of the graph.
      graph: The graph.
      place: The place of the feature among the nodes.

    Returns:
      The changes ``[N]``; 0 for embeddings and errors. A feature's value counts before its
      activation function.
    """
    model = getattr(bundle_or_model, "model", bundle_or_model)
    by_layer = {site_and_layer(each.config.site, model)[1]: in_own_units(each) for each in transcoders}
    node = graph.nodes[place]
    edit = steer(node.layer, by_layer[node.layer].decoder[...][node.number], -node.value, positions=node.position,
                 site="mlp_output")
    ids = graph.tokens[None]
    before, after = (cast(Trace, trace(model, ids, **options)) for options in ({}, {"intervene": edit}))
    changed_TV = np.asarray(forward(model, ids, intervene=edit)[0] - forward(model, ids)[0])
    pre = {layer: np.asarray(made.pre_activations(after["mlp_input"][layer, 0])
                             - made.pre_activations(before["mlp_input"][layer, 0])) for layer, made in by_layer.items()}
    found = np.zeros(len(graph.nodes))
    for index, each in enumerate(graph.nodes):
        if each.kind == "feature":
            found[index] = pre[each.layer][each.position, each.number]
        elif each.kind == "logit":
            found[index] = changed_TV[each.position, each.number]
    found[place] = -node.value
    return found


class _Pull:
    """Collects linear functions of a text, and computes their gradients in chunks."""

    def __init__(self, model: Decoder, ids: np.ndarray, position: int, num_layers: int):
        self._model, self._ids, self._position = model, jnp.asarray(ids), jnp.asarray(position)
        self._shape = (num_layers, ids.shape[1], model.config.model_dim)
        self._functions: list[tuple[tuple[int, int, np.ndarray] | None, int | None]] = []

    def add_input(self, layer: int, place: int, direction_D: np.ndarray) -> None:
        """Adds the product of a direction with the input of a feed-forward layer at a position."""
        self._functions.append(((layer, place, direction_D), None))

    def add_logits(self, tokens: np.ndarray) -> None:
        """Adds the logits of tokens."""
        self._functions += [(None, int(token)) for token in tokens]

    def gradients(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the three results of ``pulled_back`` for all functions."""
        parts = []
        for start in range(0, len(self._functions), _CHUNK):
            functions = self._functions[start:start + _CHUNK]
            of_inputs = np.zeros((_CHUNK, *self._shape), np.float32)
            of_logits = np.zeros((_CHUNK, cast(int, self._model.config.vocab_size)), np.float32)
            for index, (of_input, token) in enumerate(functions):
                if of_input is not None:
                    of_inputs[index, of_input[0], of_input[1]] = of_input[2]
                if token is not None:
                    of_logits[index, token] = 1.0
            found = pulled_back(self._model, self._ids, self._position, jnp.asarray(of_inputs), jnp.asarray(of_logits))
            parts.append([np.asarray(each)[:len(functions)] for each in found])
        added, embedded, bias = (np.concatenate(each).astype(np.float64) for each in zip(*parts, strict=True))
        return added, embedded, bias


def _layers(model: Decoder, transcoders: Sequence[SparseAutoencoder], found: Trace) -> list[_Layer]:
    """Returns the features and errors of every layer."""
    by_layer: dict[int, SparseAutoencoder] = {}
    for each in transcoders:
        layer = site_and_layer(each.config.site, model)[1]
        require((each.config.site, each.config.targets) == (f"layers.{layer}.mlp_input", f"layers.{layer}.mlp_output")
                and each.config.activation != "gated" and layer not in by_layer,
                f"a model with activation={each.config.activation!r} from {each.config.site!r} to "
                f"{each.config.targets!r} cannot be used; pass one transcoder for each feed-forward layer, not gated")
        by_layer[layer] = in_own_units(each)
    layers = []
    for layer in range(model.config.num_layers):
        x_TD, output_TD = (np.asarray(found[f"layers.{layer}.{site}"][0]) for site in ("mlp_input", "mlp_output"))
        made = by_layer.get(layer)
        features = np.zeros((len(x_TD), 0)) if made is None else np.asarray(made.encode(jnp.asarray(x_TD)))
        explained = 0.0 if made is None else np.asarray(made.decode(jnp.asarray(features)))
        layers.append(_Layer(made, features, np.asarray(output_TD - explained, np.float64)))
    return layers


def _limited(layers: list[_Layer], of_logits_CLTD: np.ndarray, most: int) -> list[_Layer]:
    """Moves the features with the smallest direct effects on the logits to the errors."""
    effects = [np.zeros((0,)) if each.transcoder is None else each.features_TF * np.abs(np.einsum(
        "fd,ctd->ctf", np.asarray(each.transcoder.decoder[...]), of_logits_CLTD[:, layer])).max(0)
        for layer, each in enumerate(layers)]
    everything = np.sort(np.concatenate([each[each > 0] for each in effects] or [np.zeros(0)]))[::-1]
    if len(everything) <= most:
        return layers
    limited = []
    for each, effect in zip(layers, effects, strict=True):
        if each.transcoder is None:
            limited.append(each)
            continue
        kept_TF = each.features_TF * (effect >= everything[most - 1])
        moved_TD = (each.features_TF - kept_TF) @ np.asarray(each.transcoder.decoder[...])
        limited.append(dataclasses.replace(each, features_TF=kept_TF, error_TD=each.error_TD + moved_TD))
    return limited


def _edges(nodes: list[Node], layers: list[_Layer], embeddings_TD: np.ndarray, added_CLTD: np.ndarray,
           embedded_CTD: np.ndarray, bias_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the edges and biases of all nodes, from the gradients of the targets."""
    N, C = len(nodes), len(bias_C)
    edges_CN, bias_C = np.zeros((C, N)), bias_C.copy()
    for source, node in enumerate(nodes):
        if node.kind == "embedding":
            edges_CN[:, source] = embedded_CTD[:, node.position] @ embeddings_TD[node.position]
        elif node.kind == "error":
            edges_CN[:, source] = added_CLTD[:, node.layer, node.position] @ layers[node.layer].error_TD[node.position]
        elif node.kind == "feature":
            direction = np.asarray(cast(SparseAutoencoder, layers[node.layer].transcoder).decoder[...][node.number])
            edges_CN[:, source] = node.value * (added_CLTD[:, node.layer, node.position] @ direction)
    for layer, each in enumerate(layers):
        if each.transcoder is not None:
            bias_C += added_CLTD[:, layer].sum(1) @ np.asarray(each.transcoder.decoder_bias[...])
    for target, node in enumerate(nodes[N - C:]):
        if node.kind == "feature":
            encoder_bias_F = cast(SparseAutoencoder, layers[node.layer].transcoder).encoder_bias[...]
            bias_C[target] += float(encoder_bias_F[node.number])
    edges, bias = np.zeros((N, N)), np.zeros(N)
    edges[N - C:], bias[N - C:] = edges_CN, bias_C
    return edges, bias
