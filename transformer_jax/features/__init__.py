"""Sparse autoencoders, transcoders and cross-layer transcoders: features that are learned from the activations of a
model."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.features.attributed_scores import Pair, ScoreAttribution, score_attribution
    from transformer_jax.features.attribution_graphs import attribution_graph, measured_without
    from transformer_jax.features.autoencoder import SparseAutoencoder
    from transformer_jax.features.circuit_tracer import from_circuit_tracer, to_circuit_tracer
    from transformer_jax.features.cross_layer import CrossLayerTranscoder
    from transformer_jax.features.examples import FeatureReport, examine
    from transformer_jax.features.graph import AttributionGraph, Node
    from transformer_jax.features.graph_reports import GraphReport, graph_report
    from transformer_jax.features.linked_heads import Link, attention_links
    from transformer_jax.features.measuring import FeatureMetrics, LossRecovered, loss_recovered, measure
    from transformer_jax.features.saelens import from_saelens, to_saelens
    from transformer_jax.features.sources import Rows, fit_config, fit_cross_layer_config
    from transformer_jax.features.splicing import set_feature, splice, spliced
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "AttributionGraph", "CrossLayerTranscoder", "FeatureMetrics", "FeatureReport", "GraphReport", "Link",
    "LossRecovered", "Node", "Pair", "Rows", "ScoreAttribution", "SparseAutoencoder", "attention_links",
    "attribution_graph", "examine", "fit_config", "fit_cross_layer_config", "from_circuit_tracer", "from_saelens",
    "graph_report", "loss_recovered", "measure", "measured_without", "score_attribution", "set_feature", "splice",
    "spliced", "to_circuit_tracer", "to_saelens",
]
