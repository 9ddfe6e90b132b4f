"""Estimated and exact effects of edges and nodes: attribution patching, EAP and EAP-IG.

A ``metric`` is a function that takes logits ``[B, T, V]`` and returns one number. Define it once and
pass the same function object each time: JAX compiles a new program for every new function object.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from transformer_jax.inspection.causal import Metric, checked_pair
from transformer_jax.inspection.circuits.edges import edited_logits
from transformer_jax.inspection.circuits.graph import edge_graph
from transformer_jax.inspection.interventions import patch, together
from transformer_jax.inspection.parts import LanguageModel, Tokens, site, trace_of
from transformer_jax.models.gradients import site_gradients_in_jit
from transformer_jax.nn.sites import Intervene

_NODE_SITES = ("residual", "attention_output", "head_output", "neurons", "mlp_output")


def edge_attribution(model: LanguageModel, clean: Tokens, corrupted: Tokens, metric: Metric, *, steps: int = 0,
                     **options: jax.Array | np.ndarray) -> Float[Array, "V U"]:
    """Estimates the effect of every edge on a metric at once (edge attribution patching, EAP).

    The score of an edge is the difference of the sender's output, corrupted minus clean, times the
    gradient of the metric with respect to what the receiver reads. It estimates what
    ``edge_effects`` measures.

    Source: Syed et al. (2023); with ``steps``, Hanna et al. (2024), EAP-IG.

    Args:
      model: the model.
      clean: token ids ``tokens_BT``; for an encoder-decoder ``(source_BS, target_BT)``.
      corrupted: token ids of the same shape, with the relevant tokens changed.
      metric: a function from logits to one number, such as a difference of two logits.
      steps: 0 takes the gradient in the clean run (EAP). A larger number takes the mean gradient of
        so many runs whose embeddings lie between the corrupted and the clean ones, at the nodes of
        the Gauss-Legendre quadrature (EAP-IG); 5 is usual.
      **options: further array arguments of the model, the same for both runs.

    Returns:
      float32 ``[V, U]``, a score for each receiver and sender of ``edge_graph(model)``, 0 where
      there is no edge.

    Raises:
      ValueError: if the two runs have different shapes, if ``steps`` is negative, or if the model
        is made of custom blocks.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps={steps!r}; expected 0 for the gradient of the clean run, or a number of steps")
    clean, corrupted = checked_pair(model, clean, corrupted, "self")
    mixes, parts = quadrature(steps)
    return _edge_attribution(model, clean, corrupted, options, mixes, parts, metric)


def quadrature(steps: int) -> tuple[jax.Array, jax.Array]:
    """Returns the points between the clean run, 0, and the corrupted run, 1, and their weights."""
    if steps == 0:
        return jnp.zeros(1), jnp.ones(1)
    nodes, parts = np.polynomial.legendre.leggauss(steps)
    return jnp.asarray((nodes + 1) / 2, jnp.float32), jnp.asarray(parts / 2, jnp.float32)


@functools.partial(jax.jit, static_argnums=6)
def _edge_attribution(model, clean, corrupted, options, mixes, parts, metric) -> jax.Array:
    """Compiled part of ``edge_attribution``."""
    graph = edge_graph(model)

    def add(scores_VU: jax.Array, mix_and_part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        mix, part = mix_and_part
        slope = jax.grad(lambda weights_VU: metric(edited_logits(model, graph, [clean, corrupted], options, weights_VU,
                                                                 mix)))
        return scores_VU + part * slope(jnp.zeros(graph.allowed_VU.shape)), None

    return jax.lax.scan(add, jnp.zeros(graph.allowed_VU.shape), (mixes, parts))[0]


def edge_effects(model: LanguageModel, clean: Tokens, corrupted: Tokens, metric: Metric, *,
                 edges_VU: Bool[np.ndarray, "V U"] | None = None,
                 **options: jax.Array | np.ndarray) -> Float[np.ndarray, "V U"]:
    """Measures the effect of every edge on a metric, with one forward pass for each.

    In each pass one receiver reads the output that one sender has in the corrupted run. All else is
    the clean run.

    Source: Goldowsky-Dill et al. (2023), path patching of one edge.

    Args:
      model: the model.
      clean: token ids ``tokens_BT``; for an encoder-decoder ``(source_BS, target_BT)``.
      corrupted: token ids of the same shape, with the relevant tokens changed.
      metric: a function from logits to one number.
      edges_VU: True for the edges to measure; by default all.
      **options: further array arguments of the model, the same for both runs.

    Returns:
      float32 ``[V, U]``: the metric with the corrupted edge minus the metric of the clean run; 0
      where there is no edge or where it was not asked for.

    Raises:
      ValueError: for the same reasons as ``edge_attribution``, and if ``edges_VU`` has another
        shape.
    """
    measure = CircuitMetric(model, clean, corrupted, metric, **options)
    everything_VU = measure.graph.allowed_VU
    effects_VU = np.zeros(everything_VU.shape, np.float32)
    of_clean = measure(everything_VU)
    for place in np.argwhere(everything_VU if edges_VU is None else measure.checked(edges_VU)):
        kept_VU = everything_VU.copy()
        kept_VU[tuple(place)] = False
        effects_VU[tuple(place)] = measure(kept_VU) - of_clean
    return effects_VU


class CircuitMetric:
    """Measures the metric of circuits: of the model with only some edges.

    The other edges carry what they carry in the corrupted run. All calls share one compiled program.

    Attributes:
      graph: the graph of the model.
    """

    def __init__(self, model: LanguageModel, clean: Tokens, corrupted: Tokens, metric: Metric,
                 **options: jax.Array | np.ndarray):
        """Checks the tokens.

        Args:
          model: the model.
          clean: token ids ``tokens_BT``; for an encoder-decoder ``(source_BS, target_BT)``.
          corrupted: token ids of the same shape, with the relevant tokens changed.
          metric: a function from logits to one number.
          **options: further array arguments of the model, the same for both runs.

        Raises:
          ValueError: for the same reasons as ``edge_attribution``.
        """
        self.graph = edge_graph(model)
        clean, corrupted = checked_pair(model, clean, corrupted, "self")
        self._evaluate = lambda weights_VU: _circuit_metric(model, clean, corrupted, options, weights_VU, metric)

    def __call__(self, kept_VU: Bool[np.ndarray, "V U"]) -> float:
        """Returns the metric of a circuit.

        Args:
          kept_VU: True for the edges that are kept. With all edges the result is the metric of the
            clean run, and with none that of the corrupted run.

        Returns:
          The metric.

        Raises:
          ValueError: if ``kept_VU`` does not have the shape of the graph.
        """
        return float(self._evaluate(1.0 - self.checked(kept_VU).astype(np.float32)))

    def checked(self, edges_VU: Any) -> Bool[np.ndarray, "V U"]:
        """Returns edges as booleans.

        Args:
          edges_VU: anything that NumPy converts to an array ``[V, U]``.

        Returns:
          The edges, without those that the graph does not have.

        Raises:
          ValueError: if they do not have the shape of the graph.
        """
        edges, allowed = np.asarray(edges_VU, bool), self.graph.allowed_VU
        if edges.shape != allowed.shape:
            raise ValueError(f"edges have shape {edges.shape}; expected {allowed.shape}, one for each receiver and "
                             "sender of edge_graph(model)")
        return edges & allowed


@functools.partial(jax.jit, static_argnums=5)
def _circuit_metric(model, clean, corrupted, options, weights_VU, metric) -> jax.Array:
    """Compiled part of ``circuit_metric``."""
    return metric(edited_logits(model, edge_graph(model), [clean, corrupted], options, weights_VU))


def attribution_patching(model: LanguageModel, clean: Tokens, corrupted: Tokens, metric: Metric, *,
                         at: str = "head_output", kind: str = "self", steps: int = 0,
                         **options: jax.Array | np.ndarray) -> Float[Array, "L T *part"]:
    """Estimates what ``patching_grid`` measures, for all layers, positions and heads or neurons at
    once.

    The estimate is the activation of the clean run minus that of the corrupted run, times the
    gradient of the metric in the corrupted run.

    Source: Nanda (2023), attribution patching; Kramar et al. (2024).

    Args:
      model: the model.
      clean: token ids ``tokens_BT``; for an encoder-decoder ``(source_BS, target_BT)``.
      corrupted: token ids of the same shape, with the relevant tokens changed.
      metric: a function from logits to one number.
      at: the site that would be restored: ``"residual"``, ``"attention_output"``,
        ``"head_output"``, ``"neurons"`` or ``"mlp_output"``.
      kind: the stack of layers: ``"self"``; in an encoder-decoder also ``"encoder"``, or
        ``"cross"`` for the attention sites.
      steps: 0 takes the gradient in the corrupted run; a larger number takes the mean gradient of so
        many runs whose embeddings lie between the corrupted and the clean ones.
      **options: further array arguments of the model, the same for both runs.

    Returns:
      float32, summed over the rows of the batch: ``[L, T, N]`` for heads, ``[L, T, F]`` for neurons,
      and ``[L, T]`` for the other sites.

    Raises:
      ValueError: if the two runs have different shapes, if ``at`` is not one of these sites, or if
        ``steps`` is negative.
    """
    clean, corrupted = checked_pair(model, clean, corrupted, kind)
    sites = ("attention_output", "head_output") if kind == "cross" else _NODE_SITES
    if at not in sites:
        raise ValueError(f"at={at!r} is not one of {', '.join(sites)}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps={steps!r}; expected 0 for the gradient of the corrupted run, or a number of steps")
    mixes, parts = quadrature(steps)
    return _node_attribution(model, clean, corrupted, options, mixes, parts, metric, at, kind)


@functools.partial(jax.jit, static_argnums=(6, 7, 8))
def _node_attribution(model, clean, corrupted, options, mixes, parts, metric, at, kind) -> jax.Array:
    """Compiled part of ``attribution_patching``."""
    first, last = (model(*tokens, **options).trace for tokens in (corrupted, clean))
    kinds = [each for each in ("self", "encoder") if each in first.parts()]
    starts = {each: [trace_of(trace, each).layers.residual[0] for trace in (first, last)] for each in kinds}

    def start_at(mix: jax.Array) -> Intervene:
        return together(*(patch(site(each, "residual"), 0, start + mix * (stop - start))
                          for each, (start, stop) in starts.items()))

    def add(total: Any, mix_and_part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        mix, part = mix_and_part
        gradient = site_gradients_in_jit(model, corrupted, options | {"intervene": start_at(mix)}, metric,
                                         (site(kind, at),))[site(kind, at)]
        return total + part * gradient, None

    before, after = (getattr(trace_of(trace, kind).layers, at) for trace in (first, last))
    gradient = jax.lax.scan(add, jnp.zeros_like(before), (mixes, parts))[0]
    product = (after - before).astype(jnp.float32) * gradient
    return product.sum(1) if at == "neurons" else product.sum((1, -1))
