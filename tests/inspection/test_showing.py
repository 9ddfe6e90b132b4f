"""The figure, the page and the notebook output of an inspection show its maps with the right
tokens."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_viewer import Parsed

import transformer_jax as tj
from transformer_jax.inspection import viewer
from transformer_jax.models.functional import make_model

L, N = 3, 2
CONFIG = tj.ModelConfig(max_len=600, num_layers=L, num_heads=N, model_dim=8, positions="sinusoidal", init_std=0.4)


@functools.cache
def inspect(family, text="a <b>", **options):
    tokenizer = tj.Tokenizer.train(["a <b> ção"], kind="char")
    model = make_model(CONFIG.replace(family=family, vocab_size=tokenizer.vocab_size), key=jax.random.key(0))
    return tj.inspect_text(model, text, tokenizer, **options)


def translation():
    return inspect("encoder_decoder", target="ção")


@functools.cache
def maps(family):
    """Every kind of attention, from the trace itself."""
    if family != "encoder_decoder":
        return {"self": np.asarray(inspect(family).trace.attention()[:, 0])}
    trace = translation().trace
    return {kind: np.asarray(part.attention()[:, 0])
            for kind, part in (("self", trace.decoder), ("encoder", trace.encoder), ("cross", trace.cross))}


def image(figure):
    return np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)


def ticks(figure):
    axes = figure.axes[0]
    return [[label.get_text() for label in axis.get_ticklabels()] for axis in (axes.yaxis, axes.xaxis)]


@pytest.mark.long
def test_one_map_and_an_alignment():
    marked = list("a·<b>")
    figure = inspect("decoder").plot(layer=-1, head=1)
    np.testing.assert_allclose(image(figure), maps("decoder")["self"][-1, 1], atol=1e-6)
    assert ticks(figure) == [marked, marked] and figure.axes[0].get_title() == "self attention, layer -1, head 1"
    for head, expected in ((None, maps("encoder_decoder")["cross"][1].mean(0)),
                           (0, maps("encoder_decoder")["cross"][1, 0])):
        figure = translation().plot(layer=1, head=head)
        np.testing.assert_allclose(image(figure), expected, atol=1e-6)
        assert ticks(figure) == [[*"ção", "(next)"], [*marked, "</s>"]]
        assert figure.axes[0].get_xlabel() == "source" and figure.axes[0].collections, "the strongest are framed"
    assert figure.axes[0].get_title() == "cross attention, layer 1, head 0"


@pytest.mark.parametrize(("arguments", "kind", "layers", "names"), [
    ((), "cross", slice(None), {f"L{layer} H{head}" for layer in range(L) for head in range(N)}),
    (("self",), "self", slice(None), {f"L{layer} H{head}" for layer in range(L) for head in range(N)}),
    (("encoder", 2), "encoder", slice(2, 3), {f"head {head}" for head in range(N)}),
])
def test_grids_of_heads(arguments, kind, layers, names):
    figure = translation().plot(*arguments)
    assert {text.get_text() for text in figure.axes[0].texts} == names
    expected = maps("encoder_decoder")[kind][layers]
    shown = image(figure)
    np.testing.assert_allclose(np.sort(shown[np.isfinite(shown)]), np.sort(expected.ravel()), atol=1e-6)


@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder_decoder"])
def test_the_page_and_the_notebook(family, tmp_path):
    inspected = translation() if family == "encoder_decoder" else inspect(family)
    read = [*"a <b>", "</s>"] if family == "encoder_decoder" else ["<s>", *"a <b>", "</s>"]
    labels = {"decoder": {"self": (list("a <b>"), None)}, "encoder": {"self": (read, None)},
              "encoder_decoder": {"cross": ([*"ção", "(next)"], read), "self": (["<s>", *"ção"], None),
                                  "encoder": (read, None)}}[family]
    shown = {kind: viewer.AttentionMaps(maps(family)[kind], *sides) for kind, sides in labels.items()}
    assert inspected.to_html() == viewer.html(shown)
    assert inspected._repr_html_() == viewer.iframe_html(shown)
    options = dict(title="<i>", layer=-1, head=1)
    assert inspected.to_html(tmp_path / "maps.html", kind="self", **options) is None
    first = {kind: shown[kind] for kind in ("self", "encoder", "cross") if kind in shown}
    assert (tmp_path / "maps.html").read_text() == viewer.html(first, **options)


def test_a_notebook_is_told_why_there_is_no_page():
    long = inspect("decoder", "<b>a" * 130)
    shown = Parsed(long._repr_html_())
    assert [tag for tag, _ in shown.elements] == ["pre"] and not shown.problems
    text = "".join(shown.text["pre"])
    assert text == f"{long!r}\n'self' attention over 520 tokens is more than the 512 that a page shows: shorten the " \
                   "text, or draw single maps"
    assert text.startswith("Inspection of Decoder: 3 layers, 2 heads\n  text (520 tokens): <|b|>|a|<|b|>")
    broken = dataclasses.replace(inspect("decoder"), trace=jax.tree.map(lambda x: x * np.nan, inspect("decoder").trace))
    assert "attention weights are from 0 to 1; got nan" in broken._repr_html_()
    assert long.plot(layer=0, head=0).axes[0].images, "a single map of it is drawn"


@pytest.mark.parametrize(("call", "words"), [
    (lambda: inspect("decoder").plot("cross"), "kind='cross' is not one of self, the attention of a Decoder"),
    (lambda: inspect("decoder").to_html(kind="cross"), "kind='cross' is not one of self"),
    (lambda: inspect("decoder").plot(head=1), "head=1 needs the layer of this head"),
    (lambda: inspect("decoder").plot(layer=3), "3 is out of range for 3 layers"),
    (lambda: inspect("decoder").plot(layer=0, head=-3), "-3 is out of range for 2 heads"),
    (lambda: inspect("decoder").to_html(layer=3), "layers=3: index 3 is out of range for 3 layers"),
    (lambda: inspect("decoder", "<b>a" * 130).plot(), "520 tokens is more than the 512"),
    (lambda: inspect("decoder", "<b>a" * 130).to_html("x.html"), "520 tokens is more than the 512"),
])
def test_texts_too_large_or_wrong_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
