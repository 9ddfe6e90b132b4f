"""The page of an attribution graph: its data are those of the graph, and a browser shows them."""

import json
import re

import jax
import numpy as np
import pytest

import transformer_jax as tj
from tests.features.test_attribution_graph import randomized
from tests.inspection.test_viewer import HOSTILE
from transformer_jax.config import CrossLayerTranscoderConfig, SparseAutoencoderConfig
from transformer_jax.features.attributed_scores import ScoreAttribution
from transformer_jax.features.examples import Example, Feature
from transformer_jax.features.graph import AttributionGraph, Node
from transformer_jax.features.graph_reports import GraphReport
from transformer_jax.features.linked_heads import Link

BIAS = Node("bias", -1, 0, 0, 1.0)


def report():
    """A report of two layers and four tokens, with tokens that would harm a careless page."""
    nodes = [Node("embedding", -1, place, place, 1.0) for place in range(4)]
    nodes += [Node("error", 0, 3, 0, 1.0), Node("feature", 0, 1, 12, 0.8), Node("feature", 0, 3, 7, 2.5),
              Node("feature", 1, 3, 30, 1.25), Node("logit", 2, 3, 5, 3.5), Node("logit", 2, 3, 6, 1.5)]
    edges = np.zeros((10, 10))
    for target, source, value in ((5, 1, 0.7), (6, 3, -1.5), (7, 5, 1.0), (7, 6, -0.25), (8, 7, 3.0), (8, 4, 0.2),
                                  (9, 7, -1.0), (8, 0, 0.1)):
        edges[target, source] = value
    graph = AttributionGraph(np.arange(4), nodes, edges, np.arange(10) / 10, np.array([0.8, 0.1]))
    histogram = np.zeros(40, int)
    example = Example(HOSTILE, np.linspace(0, 3, len(HOSTILE)), 7, 100)
    features = {(0, 12): Feature(12, 0.25, [example], histogram, [("<b>", 0.5)], [(" no", -0.5)]),
                (0, 7): Feature(7, 0.01, [], histogram, None, None)}
    links = [[] for _ in nodes]
    links[7] = [Link(1, 3, 3, 1, 0.6, 1.125)]
    parts = np.array([[0.5, 2.0], [-0.25, 0.125]])
    score = ScoreAttribution(1, 3, 3, 1, [nodes[5], BIAS], parts, -0.375, 2.0, 0.6)
    return GraphReport(graph, ["the", "<b>cat</b>", "sat", " on"], ["mat", "dog"], features, links,
                       {(1, 3, 3, 1): score}, 2, "Why <mat>?")


def test_the_page_holds_the_data_and_nothing_else(tmp_path):
    text = report().to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == text and text.isascii()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["tokens"][1] == "<b>cat</b>" and len(data["edges"]) == 8
    assert [7, 8, 3.0] in data["edges"] and data["nodes"][8]["probability"] == 0.8
    score = data["scores"]["1.3.3.1"]
    assert score["rest"] == -0.125 and score["positionBias"] == -0.375 and score["pairs"][0][2] == 2.0
    assert score["pairs"][0][0]["place"] == 5 and score["pairs"][0][1]["place"] is None
    assert text.count("<script>") == 1 and "http://" not in text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("width", [400, 1300])
def test_the_page_in_a_browser(browser, tmp_path, width):
    report().to_html(tmp_path / "page.html")
    last, cat = "\u201c on\u201d (3)", "feature 12 of layer 0 at \u201c<b>cat</b>\u201d (1)"
    texts = lambda selector: browser.run(f"[...document.querySelectorAll('{selector}')].map(each => each.textContent)")
    for dark in (False, True):
        browser.resize(width, 800, dark=dark)
        browser.open((tmp_path / "page.html").as_uri())
        assert texts("#name") == ["logit of \u201cmat\u201d"] and len(texts(".node")) == 10
        assert texts("#inputs li") == [f"feature 30 of layer 1 at {last}+3", f"error of layer 0 at {last}+0.2",
                                       "token \u201cthe\u201d (0)+0.1", "biases+0.8"]
        assert not browser.run("document.querySelector('#scores-part').checkVisibility()")
        browser.click("#inputs li:first-child button")  # follow the edge to the feature
        assert texts("#name") == [f"feature 30 of layer 1 at {last}"]
        assert texts("#outputs data") == ["+3", "-1"] and texts("#inputs data") == ["+1", "-0.25", "+0.7"]
        assert browser.run("document.querySelectorAll('#edges path').length") == 4
        assert browser.run("document.activeElement.id") == "name"
        browser.click("#scores summary")
        assert texts("#scores li") == [
            f"{cat} looks for biases+2", f"{cat} looks for {cat}+0.5", "all other pairs-0.125", "position bias-0.375"]
        browser.run("document.querySelector('.node[aria-pressed=true]').focus()")
        for key, name in (("ArrowDown", "error of layer 0"), ("ArrowRight", "feature 7 of layer 0"),
                          ("ArrowLeft", "error of layer 0"), ("ArrowLeft", "feature 12 of layer 0")):
            browser.press(key)
            assert texts("#name")[0].startswith(name)
        assert texts("#examples .piece") == HOSTILE and texts("#effects span") == ["<b>", " no"]
        browser.click("#all")
        assert browser.run("document.querySelectorAll('#edges path').length") == 8
        labels = browser.run("[...document.querySelectorAll('.node')].map(each => each.getAttribute('aria-label'))")
        assert labels[0].startswith("token \u201cthe\u201d (0), influence 0.") and all(labels)
        assert browser.run("document.documentElement.scrollWidth") == width
        assert browser.run("window.harmed") is None and browser.console == []
        assert browser.requests == [(tmp_path / "page.html").as_uri()]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["transcoders", "cross_layer"])
def test_a_report_says_what_the_functions_say(kind):
    texts = ["a b c a d", "b b a", "c d e f a b c d e f", "f e d c b a"]
    tokenizer = tj.Tokenizer.train(texts, kind="word")
    config = tj.ModelConfig(vocab_size=tokenizer.vocab_size, max_len=12, num_layers=2, num_heads=2, model_dim=8)
    model = randomized(tj.Decoder(config, key=jax.random.key(0)), 7, 0.2)
    bundle = tj.Bundle(model, tokenizer, config)
    if kind == "cross_layer":
        made = tj.features.CrossLayerTranscoder(CrossLayerTranscoderConfig(
            num_layers=2, input_dim=8, num_features=12, k=3), key=jax.random.key(1))
    else:
        made = [tj.features.SparseAutoencoder(SparseAutoencoderConfig(
            site=f"layers.{layer}.mlp_input", target=f"layers.{layer}.mlp_output", input_dim=8, num_features=12, k=3,
            subtract_bias=False), key=jax.random.key(layer)) for layer in range(2)]
    graph = tj.features.attribution_graph(bundle, made, "a b c a", num_logits=1).pruned(0.7, 0.9)
    found = tj.features.graph_report(bundle, made, graph, texts, num_examples=2, links=2)
    assert found.tokens[-4:] == ["a", " b", " c", " a"] or [token.strip() for token in found.tokens[-4:]] == [*"abca"]
    assert set(found.features) == {(node.layer, node.number) for node in graph.nodes if node.kind == "feature"}
    for place, node in enumerate(graph.nodes):
        assert len(found.links[place]) <= 2 and (node.kind in ("feature", "logit") or not found.links[place])
    for place, score in found.scores.items():
        expected = tj.features.score_attribution(bundle, made, graph, *place)
        np.testing.assert_array_equal(score.parts, expected.parts)
    assert len(found.links[graph.logits[0]]) == 2 and "Attribution graph" in found.to_html()
    with pytest.raises(ValueError, match="shows tokens as text"):
        tj.features.graph_report(model, made, graph)
