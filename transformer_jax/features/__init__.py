"""Sparse autoencoders and transcoders: features that are learned from the activations of a
model."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.features.attribution_graph import attribution_graph, measured_without
    from transformer_jax.features.autoencoder import SparseAutoencoder
    from transformer_jax.features.examples import FeatureReport, examine
    from transformer_jax.features.graph import AttributionGraph, Node
    from transformer_jax.features.measuring import FeatureMetrics, LossRecovered, loss_recovered, measure
    from transformer_jax.features.saelens import from_saelens, to_saelens
    from transformer_jax.features.sources import Rows, fit_config
    from transformer_jax.features.splicing import set_feature, splice, spliced
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "AttributionGraph", "FeatureMetrics", "FeatureReport", "LossRecovered", "Node", "Rows", "SparseAutoencoder",
    "attribution_graph", "examine", "fit_config", "from_saelens", "loss_recovered", "measure", "measured_without",
    "set_feature", "splice", "spliced", "to_saelens",
]
