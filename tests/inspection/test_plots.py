"""Figures: their content, readable labels and bounded sizes."""

import itertools
import json
import pathlib
import subprocess
import sys
import warnings
import xml.etree.ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from test_viewer import attention

from transformer_jax.inspection import figures, plots

FIVE = ["<s>", " Ela", " derramou", " água", "."]
ODD = ["$x^$", "$", "<0xE2>", "e\u0301", "\u0301", "\n", "", "日本語", "👩\u200d👧", "\u202eabc",
       "<script>alert(1)</script>", "otorrinolaringologista"]
SIXTY = (FIVE + ODD + [f" palavra{n}" for n in range(60)])[:60]


def drawn(figure):
    """The figure's labels, after it was drawn without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    return [[label.get_text() for label in axis.get_ticklabels()] for axis in (axes.yaxis, axes.xaxis)]


def make(name, tokens):
    T = len(tokens)
    values = np.random.default_rng(1).normal(size=(4, 3, T))
    return {
        "attention_map": lambda: plots.attention_map(attention(T, T), tokens),
        "head_grid": lambda: plots.head_grid(attention(3, 4, T, T), tokens, title="of all layers"),
        "heads_of_a_layer": lambda: plots.head_grid(attention(5, T, T), tokens),
        "layer_head_summary": lambda: plots.layer_head_summary(abs(values[..., 0]), "entropy (nats)"),
        "alignment": lambda: plots.alignment(attention(8, T, 7), list("abcdefg"), tokens),
        "chosen_experts": lambda: plots.chosen_experts(attention(T, 8), np.arange(2 * T).reshape(T, 2) % 8, tokens),
        "patching_effects": lambda: plots.patching_effects(values[:, 0], tokens, title="of a fact"),
        "over_training": lambda: plots.over_training(range(0, 40, 10), values[:, :, :4], "entropy (nats)"),
    }[name]()


EVERY = ("attention_map", "head_grid", "heads_of_a_layer", "layer_head_summary", "alignment", "patching_effects",
         "over_training", "chosen_experts")


@pytest.mark.long
@pytest.mark.parametrize("tokens", [FIVE, SIXTY], ids=["5", "60"])
@pytest.mark.parametrize("name", EVERY)
def test_every_figure_is_drawn_whole(name, tokens):
    figure = make(name, tokens)
    assert isinstance(figure, Figure)
    drawn(figure)
    width, height = figure.get_size_inches()
    assert 2 < width <= 14 and 2 < height <= 14
    bounds = figure.get_tightbbox()  # in inches
    assert min(bounds.x0, bounds.y0) > -0.03 and bounds.x1 < width + 0.03 and bounds.y1 < height + 0.03
    for labels in (figure.axes[0].get_yticklabels(), figure.axes[0].get_xticklabels()):
        if name != "over_training":
            assert_apart([label for label in labels if label.get_text()])


def assert_apart(labels):
    """Neighbouring labels do not overlap; only the corners of slanted labels may."""
    boxes = [label.get_window_extent() for label in labels if label.get_rotation() in (0, 90)]
    for a, b in itertools.pairwise(boxes):
        overlap = min(min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0))
        assert overlap < 1, (a, b)
    assert all(label.get_fontsize() >= 5 for label in labels)


@pytest.mark.long
@pytest.mark.parametrize(("queries", "keys"), [(FIVE, FIVE), (SIXTY, SIXTY), (FIVE, SIXTY), (SIXTY, SIXTY[:30])])
def test_cells_are_about_square(queries, keys):
    figure = plots.attention_map(attention(len(queries), len(keys)), queries, keys)
    drawn(figure)
    box = figure.axes[0].get_window_extent()
    assert 0.75 < (box.width / len(keys)) / (box.height / len(queries)) < 1.35


@pytest.mark.parametrize(("make", "limit"), [
    (lambda: plots.attention_map(attention(500, 500), ["x"] * 500), 13),
    (lambda: plots.head_grid(np.zeros((24, 16, 130, 130)), ["x"] * 130), 13),
    (lambda: plots.layer_head_summary(np.ones((96, 96)), "x"), 13),
    (lambda: plots.patching_effects(np.ones((96, 512)), ["x"] * 512), 13),
    (lambda: plots.attention_map(attention(1, 1), ["a"]), 5),
])
def test_sizes_are_bounded(make, limit):
    assert max(make().get_size_inches()) <= limit


def test_the_map_shows_its_weights():
    weights = attention(5, 5)
    figure = plots.attention_map(weights, FIVE, title="layer 0, head 0")
    rows, columns = drawn(figure)
    assert rows == columns == ["<s>", "·Ela", "·derramou", "·água", "."]
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), weights, rtol=1e-6)
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("key", "query", "layer 0, head 0")
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(key, query): f"{weights[query, key]:.2f}" for query in range(5) for key in range(5)
                       if np.float32(weights[query, key]) >= np.float32(0.005)}


def test_labels_of_odd_tokens():
    rows, _ = drawn(plots.attention_map(attention(len(ODD), len(ODD)), ODD))
    assert rows == ["$x^$", "$", "<0xE2>", "e\u0301", "◌\u0301", "↵", "∅", "<U+65E5><U+672C…", "<U+1F469>\u200d<U+1F…",
                    "<U+202E>abc", "<script>alert(1…", "otorrinolaringo…"]


def test_many_tokens_have_labels_at_equal_distances():
    tokens = [f"w{n}" for n in range(300)]
    rows, _ = drawn(plots.attention_map(attention(300, 300), tokens))
    assert 60 < len(rows) <= 160 and rows == tokens[::300 // len(rows)]


def test_the_grid_shows_every_map_in_its_place():
    weights = attention(2, 3, 5, 4)
    figure = plots.head_grid(weights, FIVE, list("abcd"))
    axes = figure.axes[0]
    mosaic = axes.images[0].get_array().filled(np.nan)
    names = {text.get_text(): text.get_position() for text in axes.texts}
    for layer, head in np.ndindex(2, 3):
        x, y = names[f"L{layer} H{head}"]
        left, top = round(x - 1.5), round(y + 0.5)
        np.testing.assert_allclose(mosaic[top:top + 5, left:left + 4], weights[layer, head], rtol=1e-6)
    assert np.isfinite(mosaic).sum() == weights.size
    rows, columns = drawn(figure)
    assert rows == ["<s>", "·Ela", "·derramou", "·água", "."] * 2 and columns == list("abcd") * 3


@pytest.mark.parametrize(("L", "N", "T", "every"), [(3, 4, 30, 2), (12, 12, 57, 8), (1, 2, 300, 6), (2, 2, 5, 1)])
def test_the_grid_names_tokens_and_says_which(L, N, T, every):
    tokens = [f"w{n}" for n in range(T)]
    figure = plots.head_grid(np.zeros((L, N, T, T)), tokens)
    axes = figure.axes[0]
    # Either all labels are shown, or so few that the first label of the next map does not overlap.
    named = [name for index, name in enumerate(tokens) if index % every == 0 and (index == 0 or index + every <= T)]
    rows, columns = drawn(figure)
    assert rows == named * L and columns == named * N
    note = "" if every == 1 else f" (every {every}{'nd' if every == 2 else 'th'} of {T} is named)"
    pooled = ", several tokens in a cell: their largest weight" if T > 128 else ""
    assert (axes.get_ylabel(), axes.get_xlabel()) == (f"query{pooled}{note}", f"key{pooled}{note}")
    for axis in (axes.yaxis, axes.xaxis):
        assert_apart(axis.get_ticklabels())
    # Each name stands at its own cell: in the third part of a map of three parts.
    first_map = np.argwhere(np.isfinite(axes.images[0].get_array().filled(np.nan)))
    top, left = first_map.min(0)
    side = min(T, 128)
    for start, places in ((top, axes.get_yticks()[:len(named)]), (left, axes.get_xticks()[:len(named)])):
        expected = start - 0.5 + (np.arange(T)[::every][:len(named)] + 0.5) * side / T
        np.testing.assert_allclose(places, expected, atol=1e-6)


def test_other_figures_say_which_tokens_are_named():
    axes = plots.attention_map(attention(300, 300), [f"w{n}" for n in range(300)]).axes[0]
    assert axes.get_xlabel() == "key (every 3rd of 300 is named)" and len(axes.get_xticks()) == 100
    axes = plots.patching_effects(np.ones((50, 200)), ["x"] * 200).axes[0]
    assert axes.get_xlabel() == "layer (every 2nd of 50 is named)"
    assert axes.get_ylabel() == "token (every 2nd of 200 is named)"
    assert [figures._ordinal(number) for number in (1, 2, 3, 4, 11, 12, 13, 21, 22, 103, 112)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "103rd", "112th"]


@pytest.mark.parametrize(("values", "ends"), [
    ([[3.4, 3.4001]], (3.4 * 0.95, 3.4 * 1.05)), ([[-2.0, -2.0]], (-2.1, -1.9)), ([[0.0, 0.0]], (0, 1)),
    ([[1.0, 3.0]], (1, 3)), ([[1e-9, 1.001e-9]], (0.95e-9, 1.05e-9)), ([[-1.0, 2.0]], (-2, 2)),
])
def test_values_that_are_alike_look_alike(values, ends):
    figure = plots.layer_head_summary(np.array(values), "entropy (nats)")
    image = figure.axes[0].images[0]
    np.testing.assert_allclose(image.get_clim(), ends, rtol=1e-3)
    colors = image.cmap(image.norm(np.array(values)))[0]
    nearly_alike = np.ptp(values) <= 0.01 * np.abs(values).max()
    assert (np.abs(colors[0] - colors[1]).max() < 0.05) == nearly_alike
    drawn(figure)
    scale = image.colorbar.ax
    assert "+" not in scale.yaxis.get_offset_text().get_text(), "there is no number to add"


def test_a_flat_curve_is_flat():
    axes = plots.over_training([0, 10], 1234.5 + 1e-3 * np.random.default_rng(0).random((2, 2, 2)), "x").axes[0]
    axes.figure.canvas.draw()
    assert np.ptp(axes.get_ylim()) > 100 and axes.yaxis.get_offset_text().get_text() == ""


def test_bytes_are_shown_as_characters_in_figures():
    rows, columns = drawn(plots.attention_map(attention(3, 3), [" caf", "<0xC3>", "<0xA9>"]))
    assert rows == columns == ["·caf", "é 1/2", "é 2/2"]


def test_large_maps_in_the_grid_keep_their_strongest_cells():
    diagonal = np.eye(300)[None, None]
    figure = plots.head_grid(diagonal, ["x"] * 300)
    shown = figure.axes[0].images[0].get_array().filled(0)
    assert shown.shape[0] < 200 and (shown[-128:].max(1) == 1).all()


def test_alignment_frames_all_that_counts_in_the_mean():
    weights = attention(8, 5, 7)
    figure = plots.alignment(weights, list("abcdefg"), FIVE)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), weights.mean(0), rtol=1e-5)
    frames, = (each for each in figure.axes[0].collections if isinstance(each, LineCollection))
    centers = {tuple(frame[:4].mean(0).tolist()) for frame in frames.get_segments()}
    mean = weights.mean(0)
    assert centers == {(key, query) for query in range(5) for key in range(7)
                       if mean[query, key] >= mean[query].max() / 2}
    assert len(centers) > 5, "more than one of a row"
    one = plots.alignment(weights[3], list("abcdefg"), FIVE)
    np.testing.assert_allclose(one.axes[0].images[0].get_array(), weights[3], rtol=1e-6)


def test_the_chosen_experts_have_frames():
    probabilities = np.array([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]])
    figure = plots.chosen_experts(probabilities, np.array([[1, 2], [0, 2]]), ["a", "b"])
    assert drawn(figure) == [["a", "b"], ["0", "1", "2"]]
    frames, = (each for each in figure.axes[0].collections if isinstance(each, LineCollection))
    centers = {tuple(path.vertices[:4].mean(0).tolist()) for path in frames.get_paths()}
    assert centers == {(1, 0), (2, 0), (0, 1), (2, 1)}  # column and row
    with pytest.raises(ValueError, match="experts"):
        plots.chosen_experts(probabilities, np.array([[1, 2]]), ["a", "b"])


def test_both_signs_are_drawn_around_white():
    values = np.array([[0.5, -0.1], [0.0, np.nan]])
    figure = plots.layer_head_summary(values, "change of the loss (nats)")
    image = figure.axes[0].images[0]
    assert image.get_clim() == (-0.5, 0.5)
    assert min(image.cmap(image.norm(0.0))[:3]) > 0.95
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["-0.10", "0.00", "0.50"], "NaN stays blank"
    positive = plots.layer_head_summary(abs(values), "entropy").axes[0].images[0]
    lightness = np.array([positive.cmap(x)[:3] for x in np.linspace(0, 1, 64)]) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all(), "told apart without any hue"


def test_patching_has_a_row_for_each_token():
    effects = np.random.default_rng(0).normal(size=(3, 5))
    figure = plots.patching_effects(effects, FIVE)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), effects.T, rtol=1e-6)
    assert drawn(figure) == [["<s>", "·Ela", "·derramou", "·água", "."], ["0", "1", "2"]]


def test_over_training_draws_heads_and_the_means_of_layers():
    values = np.random.default_rng(0).random((4, 20, 3))
    figure = plots.over_training([0, 10, 20, 30], values, "entropy (nats)")
    lines = figure.axes[0].lines
    assert len(lines) == 20 * (3 + 1)
    named = [line for line in lines if line.get_label().startswith("layer ")]
    assert [line.get_label() for line in named] == [f"layer {layer}" for layer in range(0, 20, 2)]
    np.testing.assert_allclose(named[1].get_ydata(), values[:, 2].mean(-1), rtol=1e-6)


def test_attention_over_training_is_what_a_run_wrote(tmp_path):
    path, values = tmp_path / "metrics.jsonl", np.random.default_rng(0).random((3, 2, 4))
    lines = [{"step": 5, "loss": 1.5}]
    for step, values_LN in zip((10, 20, 25), values, strict=True):
        lines += [{"step": step, "self_attention/entropy": (2 * values_LN).tolist(),
                   "self_attention/previous_token": values_LN.tolist()},
                  {"step": step, "cross_attention/entropy": (3 * values_LN).tolist()}]
    cut = '{"step": 30, "self_attention/entropy": [[0.1, 0.2]'
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)
    for arguments, expected, label, title in (
            ((), 2 * values, "entropy (nats)", "self attention"),
            (("previous_token",), values, "previous token", "self attention"),
            (("entropy", "cross"), 3 * values, "entropy (nats)", "cross attention")):
        axes = plots.attention_over_training(path, *arguments).axes[0]
        means = {line.get_label(): line for line in axes.lines if line.get_label().startswith("layer")}
        for layer in range(2):
            np.testing.assert_allclose(means[f"layer {layer}"].get_xydata().T,
                                       [[10, 20, 25], expected[:, layer].mean(-1)], rtol=1e-6)
        assert (axes.get_ylabel(), axes.get_title()) == (label, title)
    with pytest.raises(ValueError, match="has no 'encoder_attention/sink'; it has cross_attention/entropy, self_atten"):
        plots.attention_over_training(path, "sink", "encoder")
    path.write_text('{"step": 5, "loss": 1.5}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl has no .* train with --config\.metrics\.attention_every=100"):
        plots.attention_over_training(path)


def test_saving(tmp_path):
    figure = plots.attention_map(attention(5, 5), FIVE, title="água & <b>")
    for name in ("map.png", "MAP.PNG", "map.svg"):
        plots.save(figure, tmp_path / name)
    assert Image.open(tmp_path / "map.png").size == tuple(np.round(figure.get_size_inches() * 150))
    assert xml.etree.ElementTree.parse(tmp_path / "map.svg").getroot().tag.endswith("svg")
    with pytest.raises(ValueError, match=r"map\.pdf: a figure is saved as \.png or \.svg; name the file so"):
        plots.save(figure, pathlib.Path("map.pdf"))
    assert not pathlib.Path("map.pdf").exists()


@pytest.mark.parametrize(("make", "message"), [
    (lambda: plots.attention_map(np.ones((5, 4)), FIVE), r"weights are \[5 queries, 5 keys\]; got \[5, 4\]"),
    (lambda: plots.attention_map(np.full((5, 5), np.nan), FIVE), "weights must be finite numbers; got infinity or NaN"),
    (lambda: plots.head_grid(np.ones((5, 5)), FIVE), r"\[layers, heads, queries, keys\] or \[heads, queries, keys\]"),
    (lambda: plots.head_grid(np.ones((2, 5, 4)), FIVE), r"weights are \[maps, 5 queries, 5 keys\]; got \[2, 5, 4\]"),
    (lambda: plots.layer_head_summary(np.ones(3), "x"), r"values are \[layers, heads\]; got \[3\]"),
    (lambda: plots.layer_head_summary(np.full((1, 2), np.nan), "x"), "values must be finite numbers"),
    (lambda: plots.layer_head_summary(np.array([[np.inf]]), "x"), "values must be finite numbers"),
    (lambda: plots.patching_effects(np.ones((3, 4)), FIVE), r"effects are \[layers, 5 tokens\]; got \[3, 4\]"),
    (lambda: plots.over_training([1, 2], np.ones((3, 4, 5)), "x"), r"values are \[2 steps, layers, heads\]; got"),
])
def test_arrays_of_a_wrong_shape_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_labels_are_those_that_the_fonts_have():
    assert figures.labels(["água", "日"]) == ["água", "<U+65E5>"]


def test_no_pyplot_and_matplotlib_only_when_drawing():
    program = ("import sys; from transformer_jax.inspection import plots; assert 'matplotlib' not in sys.modules; "
               "plots.layer_head_summary([[1.0]], 'x'); assert 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", program], check=True)
