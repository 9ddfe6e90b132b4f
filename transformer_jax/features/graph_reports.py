"""An attribution graph with what is known about its features and its attention, for one page."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from transformer_jax.features.attributed_scores import Pair, ScoreAttribution, score_attribution
from transformer_jax.features.cross_layer import CrossLayerTranscoder
from transformer_jax.features.examples import Feature, examine
from transformer_jax.features.explained import Transcoders
from transformer_jax.features.graph import AttributionGraph
from transformer_jax.features.linked_heads import Link, attention_links
from transformer_jax.inspection.characters import shown
from transformer_jax.inspection.viewer import filled, framed
from transformer_jax.settings import checked_path


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """An attribution graph and what its page shows.

    Attributes:
      graph: The graph.
      tokens: The tokens of the text, for display.
      logits: The tokens whose logits are nodes, for display.
      features: What is known about each feature of the graph, by its layer and number.
      links: For each node the heads that add most to its value.
      scores: For each link, by its layer, head, query and key, the parts of its attention score.
      pairs: How many pairs of each score the page shows.
      title: The title of the page.
    """

    graph: AttributionGraph
    tokens: list[str]
    logits: list[str]
    features: dict[tuple[int, int], Feature]
    links: list[list[Link]]
    scores: dict[tuple[int, int, int, int], ScoreAttribution]
    pairs: int
    title: str

    def to_html(self, path: str | pathlib.Path | None = None) -> str:
        """Makes one page, which needs no network, server or library.

        Args:
          path: The file to write; ``None`` writes none.

        Returns:
          The page in ASCII. Values are rounded to four digits.
        """
        text = filled(pathlib.Path(__file__).with_name("graph_page.html"), self.title, _data(self))
        if path is not None:
            checked_path("path", path).write_text(text, encoding="ascii")
        return text

    def _repr_html_(self) -> str:
        """Returns the page in a frame, for Jupyter and Colab."""
        return framed(self.to_html(), self.title)


def graph_report(bundle: Any, transcoders: Transcoders, graph: AttributionGraph, texts: Iterable[Any] | None = None, *,
                 num_examples: int = 5, links: int = 3, pairs: int = 6, tokenizer: Any = None,
                 title: str = "Attribution graph") -> GraphReport:
    """Collects what the page of an attribution graph shows.

    Args:
      bundle: The language model of the graph: the result of ``tj.load``, or a model.
      transcoders: The transcoders of the graph.
      graph: The graph; pass a pruned one, because the page shows every node.
      texts: The texts in which to look for examples of the features, as for ``examine``; ``None``
        shows none.
      num_examples: How many examples of each feature.
      links: How many heads to explain for each node.
      pairs: How many pairs of each attention score to show.
      tokenizer: The tokenizer; by default that of the bundle.
      title: The title of the page.

    Returns:
      The report.

    Raises:
      ValueError: If there is no tokenizer.
    """
    tokenizer = getattr(bundle, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError("the page shows tokens as text; pass a bundle, or tokenizer=...")
    pieces = lambda ids: [piece.replace("\u00b7", " ") for piece in shown(tokenizer.pieces([int(id) for id in ids]))]
    features: dict[tuple[int, int], Feature] = {}
    numbers: dict[int, set[int]] = {}
    for node in graph.nodes:
        if node.kind == "feature":
            numbers.setdefault(node.layer, set()).add(node.number)
    for layer, chosen in numbers.items():
        if texts is None:
            break
        found = examine(bundle, _of_layer(transcoders, layer), texts, features=sorted(chosen),
                        num_examples=num_examples, width=12, tokenizer=tokenizer)
        features |= {(layer, feature.number): feature for feature in found.features}
    all_links = [attention_links(bundle, transcoders, graph, place, count=links)
                 if node.kind in ("feature", "logit") else [] for place, node in enumerate(graph.nodes)]
    wanted = dict.fromkeys(link[:4] for each in all_links for link in each)
    scores = {place: score_attribution(bundle, transcoders, graph, *place) for place in wanted}
    return GraphReport(graph, pieces(graph.tokens), pieces(graph.nodes[place].number for place in graph.logits),
                       features, all_links, scores, pairs, title)


def _of_layer(transcoders: Transcoders, layer: int) -> Any:
    """Returns the transcoder with the features of a layer."""
    if isinstance(transcoders, CrossLayerTranscoder):
        return transcoders.of_layer(layer)
    return next(each for each in transcoders if each.config.site == f"layers.{layer}.mlp_input")


def _data(report: GraphReport) -> dict[str, Any]:
    """Returns the data for the page's script."""
    graph = report.graph
    influence = graph.influence()
    names = iter(report.logits)
    nodes = [{"kind": node.kind, "layer": node.layer, "position": node.position, "number": node.number,
              "value": _rounded(node.value), "influence": _rounded(influence[place]),
              "bias": _rounded(graph.bias[place]), "token": next(names) if node.kind == "logit" else None,
              "links": [[*link[:4], _rounded(link.effect)] for link in report.links[place]]}
             for place, node in enumerate(graph.nodes)]
    for place, probability in zip(graph.logits, graph.probabilities, strict=True):
        nodes[place]["probability"] = _rounded(probability)
    place_of = {node[:4]: place for place, node in enumerate(graph.nodes)}
    edges = [[int(source), int(target), _rounded(float(graph.edges[target, source]))]
             for target, source in np.argwhere(graph.edges)]
    layers = max((node.layer for node in graph.nodes if node.kind == "logit"), default=0)
    return {"title": report.title, "tokens": report.tokens, "layers": layers, "nodes": nodes, "edges": edges,
            "features": {f"{layer}.{number}": _feature(each) for (layer, number), each in report.features.items()},
            "scores": {".".join(map(str, place)): _score(each, place_of, report.pairs)
                       for place, each in report.scores.items()}}


def _feature(feature: Feature) -> dict[str, Any]:
    """Returns the data of a feature."""
    effects = {name: None if values is None else [[token, _rounded(value)] for token, value in values[:5]]
               for name, values in (("raised", feature.raised), ("lowered", feature.lowered))}
    return effects | {"density": feature.density, "examples": [
        {"tokens": each.tokens, "values": [_rounded(value) for value in each.values], "text": each.text,
         "start": each.start} for each in feature.examples]}


def _score(score: ScoreAttribution, place_of: dict[tuple, int], count: int) -> dict[str, Any]:
    """Returns the data of an attention score. Nodes that the graph has are given by their places."""
    side = lambda node: {"kind": node.kind, "layer": node.layer, "position": node.position, "number": node.number,
                         "place": place_of.get(node[:4])}
    pair = lambda each: [side(each.query), side(each.key), _rounded(each.value)]
    largest: list[Pair] = score.largest(count)
    rest = score.parts.sum() - sum(each.value for each in largest)
    return {"score": _rounded(score.score), "weight": _rounded(score.weight), "rest": _rounded(rest),
            "positionBias": _rounded(score.position_bias), "pairs": [pair(each) for each in largest]}


def _rounded(value: float) -> float:
    """Rounds to four digits, which keeps the page small."""
    return float(f"{value:.4g}")
