"""Circuits: the edges between heads and feed-forward layers that a behaviour needs."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.inspection.circuits.attribution import (
        CircuitMetric,
        attribution_patching,
        edge_attribution,
        edge_effects,
    )
    from transformer_jax.inspection.circuits.circuit import (
        FaithfulnessCurve,
        completeness,
        degree_matched_edges,
        faithfulness,
        faithfulness_curve,
        minimality,
        prune_greedily,
        random_edges,
        top_edges,
    )
    from transformer_jax.inspection.circuits.graph import EdgeGraph, edge_graph
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "CircuitMetric",
    "EdgeGraph",
    "FaithfulnessCurve",
    "attribution_patching",
    "completeness",
    "degree_matched_edges",
    "edge_attribution",
    "edge_effects",
    "edge_graph",
    "faithfulness",
    "faithfulness_curve",
    "minimality",
    "prune_greedily",
    "random_edges",
    "top_edges",
]
