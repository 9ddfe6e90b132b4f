"""Which edges are a circuit, and tests of a circuit: faithfulness, minimality and completeness."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.inspection.circuits.attribution import CircuitMetric
from transformer_jax.inspection.circuits.graph import EdgeGraph
from transformer_jax.inspection.parts import check_count


@dataclasses.dataclass(frozen=True)
class FaithfulnessCurve:
    """The faithfulness of circuits of several sizes, beside that of controls of the same size.

    Attributes:
      sizes: the number of edges of each circuit, ``[C]``.
      num_edges: the number of edges of the model.
      circuit: the faithfulness of the edges with the largest scores, ``[C]``.
      random: the faithfulness of as many random edges, for each draw, ``[C, draws]``.
      degree_matched: the same for random edges of which every receiver reads as many as in the
        circuit, ``[C, draws]``.
    """

    sizes: Int[np.ndarray, " C"]
    num_edges: int
    circuit: Float[np.ndarray, " C"]
    random: Float[np.ndarray, "C draws"]
    degree_matched: Float[np.ndarray, "C draws"]


def top_edges(graph: EdgeGraph, scores_VU: Float[np.ndarray | Array, "V U"], num_edges: int) -> Bool[
        np.ndarray, "V U"]:
    """Returns the edges with the largest absolute scores.

    Edges among them that lie on no path from the embeddings to the logits are left out, because they
    have no effect. The result may therefore have fewer edges.

    Args:
      graph: the graph of the model.
      scores_VU: a score for each edge, such as ``edge_attribution`` returns.
      num_edges: how many edges to choose.

    Returns:
      True for the edges of the circuit, ``[V, U]``.

    Raises:
      ValueError: if the model does not have so many edges.
    """
    check_count("num_edges", num_edges, graph.num_edges)
    ranked = np.where(graph.allowed_VU, np.abs(np.asarray(scores_VU, np.float32)), -1.0)
    chosen = np.zeros(ranked.size, bool)
    chosen[np.argsort(-ranked, axis=None, kind="stable")[:num_edges]] = True
    return graph.connected(chosen.reshape(ranked.shape))


def prune_greedily(measure: CircuitMetric, threshold: float) -> Bool[np.ndarray, "V U"]:
    """Removes every edge whose removal changes the metric little, from the logits to the embeddings.

    Source: Conmy et al. (2023), ACDC, with the change of a metric in place of a KL divergence.

    Args:
      measure: the metric of circuits. One forward pass is computed for each edge.
      threshold: an edge is removed if the metric of the circuit changes by less than this.

    Returns:
      True for the edges that remain, ``[V, U]``.
    """
    graph = measure.graph
    kept_VU = graph.allowed_VU.copy()
    current = measure(kept_VU)
    for receiver in reversed(range(len(graph.receivers))):
        for sender in np.flatnonzero(graph.allowed_VU[receiver])[::-1]:
            kept_VU[receiver, sender] = False
            value = measure(kept_VU)
            if abs(value - current) < threshold:
                current = value
            else:
                kept_VU[receiver, sender] = True
    return graph.connected(kept_VU)


def faithfulness(measure: CircuitMetric, kept_VU: Bool[np.ndarray, "V U"]) -> float:
    """Measures which part of the effect of the clean tokens a circuit keeps.

    Source: Hanna et al. (2024), section 2.

    Args:
      measure: the metric of circuits.
      kept_VU: True for the edges of the circuit.

    Returns:
      The metric of the circuit minus that of the corrupted run, divided by the metric of the clean
      run minus that of the corrupted run: 1 for the whole model and 0 without edges. It may be
      larger than 1 or negative.

    Raises:
      ValueError: if the clean and the corrupted run have the same metric.
    """
    whole, nothing = _ends(measure)
    return (measure(kept_VU) - nothing) / (whole - nothing)


def faithfulness_curve(measure: CircuitMetric, scores_VU: Float[np.ndarray | Array, "V U"], *,
                       sizes: Sequence[int] | None = None, draws: int = 3, seed: int = 0) -> FaithfulnessCurve:
    """Measures the faithfulness of circuits of several sizes and of random edges.

    Args:
      measure: the metric of circuits.
      scores_VU: a score for each edge, such as ``edge_attribution`` returns.
      sizes: how many edges to choose for each circuit; by default 12 sizes from 1 % of the edges to
        all, in equal ratios.
      draws: the number of random circuits of each size and kind.
      seed: the seed of the random circuits.

    Returns:
      The curve. Its sizes count only edges that lie on a path from the embeddings to the logits.

    Raises:
      ValueError: if a size exceeds the number of edges, or if the clean and the corrupted run have
        the same metric.
    """
    graph, rng = measure.graph, np.random.default_rng(seed)
    usual = np.unique(np.geomspace(max(1, graph.num_edges // 100), graph.num_edges, 12).astype(int)).tolist()
    whole, nothing = _ends(measure)
    circuits = [top_edges(graph, scores_VU, size) for size in (usual if sizes is None else sizes)]

    def part(kept_VU: np.ndarray) -> float:
        return (measure(kept_VU) - nothing) / (whole - nothing)

    return FaithfulnessCurve(
        np.array([kept_VU.sum() for kept_VU in circuits]), graph.num_edges,
        np.array([part(kept_VU) for kept_VU in circuits]),
        np.array([[part(random_edges(graph, int(kept_VU.sum()), rng)) for _ in range(draws)] for kept_VU in circuits]),
        np.array([[part(degree_matched_edges(graph, kept_VU, rng)) for _ in range(draws)] for kept_VU in circuits]))


def random_edges(graph: EdgeGraph, num_edges: int, rng: np.random.Generator) -> Bool[np.ndarray, "V U"]:
    """Draws edges of the graph with equal probability.

    Args:
      graph: the graph of the model.
      num_edges: how many edges to draw.
      rng: the random generator.

    Returns:
      True for the drawn edges, ``[V, U]``.
    """
    drawn = np.zeros(graph.allowed_VU.size, bool)
    drawn[rng.choice(np.flatnonzero(graph.allowed_VU), num_edges, replace=False)] = True
    return drawn.reshape(graph.allowed_VU.shape)


def degree_matched_edges(graph: EdgeGraph, kept_VU: Bool[np.ndarray, "V U"],
                         rng: np.random.Generator) -> Bool[np.ndarray, "V U"]:
    """Draws, for every receiver, as many random senders as it has in a circuit.

    Args:
      graph: the graph of the model.
      kept_VU: True for the edges of the circuit.
      rng: the random generator.

    Returns:
      True for the drawn edges, ``[V, U]``.
    """
    drawn = np.zeros_like(graph.allowed_VU)
    for receiver, kept_U in enumerate(kept_VU):
        drawn[receiver, rng.choice(np.flatnonzero(graph.allowed_VU[receiver]), kept_U.sum(), replace=False)] = True
    return drawn


def minimality(measure: CircuitMetric, kept_VU: Bool[np.ndarray, "V U"]) -> Float[np.ndarray, "V U"]:
    """Measures how much faithfulness a circuit loses without each of its edges.

    Source: Wang et al. (2022), section 4.

    Args:
      measure: the metric of circuits.
      kept_VU: True for the edges of the circuit.

    Returns:
      The faithfulness of the circuit minus that without the edge, ``[V, U]``; NaN for other edges.
      An edge of about 0 is not needed.

    Raises:
      ValueError: if the clean and the corrupted run have the same metric.
    """
    kept_VU = measure.checked(kept_VU)
    whole, nothing = _ends(measure)
    losses_VU = np.full(kept_VU.shape, np.nan)
    of_circuit = measure(kept_VU)
    for place in map(tuple, np.argwhere(kept_VU)):
        without_VU = kept_VU.copy()
        without_VU[place] = False
        losses_VU[place] = (of_circuit - measure(without_VU)) / (whole - nothing)
    return losses_VU


def completeness(measure: CircuitMetric, kept_VU: Bool[np.ndarray, "V U"], *, draws: int = 10,
                 seed: int = 0) -> Float[np.ndarray, "draws 2"]:
    """Compares a circuit with the model when both lose the same edges of the circuit.

    A complete circuit has all edges that do the task, so both lose the same. If the model loses
    less, other edges can take over.

    Source: Wang et al. (2022), section 4.

    Args:
      measure: the metric of circuits.
      kept_VU: True for the edges of the circuit.
      draws: how many random halves of the circuit are removed, one after another. One more row
        removes the whole circuit.
      seed: the seed of the draws.

    Returns:
      The faithfulness of the circuit and of the model without the same edges,
      ``[draws + 1, 2]``. The last row is without the whole circuit.

    Raises:
      ValueError: if the clean and the corrupted run have the same metric.
    """
    kept_VU, rng = measure.checked(kept_VU), np.random.default_rng(seed)
    whole, nothing = _ends(measure)
    removed = [kept_VU & (rng.random(kept_VU.shape) < 0.5) for _ in range(draws)]
    return np.array([[(measure(edges_VU & ~lost_VU) - nothing) / (whole - nothing)
                      for edges_VU in (kept_VU, measure.graph.allowed_VU)] for lost_VU in [*removed, kept_VU]])


def _ends(measure: CircuitMetric) -> tuple[float, float]:
    """Returns the metrics of the clean and of the corrupted run; raises ValueError if they are
    equal."""
    allowed_VU = measure.graph.allowed_VU
    whole, nothing = measure(allowed_VU), measure(np.zeros_like(allowed_VU))
    if whole == nothing:
        raise ValueError(f"the clean and the corrupted run have the same metric, {whole}: choose tokens between which "
                         "the metric differs")
    return whole, nothing
