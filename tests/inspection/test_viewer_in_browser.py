"""Tests the page in a real browser: moving the mouse, choosing and pressing change what is
visible."""

import contextlib
import itertools
import json
import time

import chromium
import numpy as np
import pytest
from test_viewer import HOSTILE, attention

from transformer_jax.inspection import viewer
from transformer_jax.inspection.labels import visible
from transformer_jax.inspection.viewer import AttentionMaps

WORDS = ["<s>", " Ela", " derramou", " água", "."]
SOURCE = [" she", " poured", " water"]
MAPS = {"decoder": AttentionMaps(attention(2, 3, 5, 5), WORDS),
        "cross": AttentionMaps(attention(4, 2, 5, 3), WORDS, SOURCE)}
SHOWN = "[...document.querySelectorAll('{} .token')].map(each => each.textContent)"


@pytest.fixture
def page(browser, tmp_path):
    """Opens the page of MAPS. At the end the console is empty and the page has requested no other
    file."""
    with opened(browser, tmp_path, MAPS) as page:
        yield page


@contextlib.contextmanager
def opened(browser, folder, maps, *, width=1200, dark=False, **options):
    viewer.save_html(folder / "maps.html", maps, **options)
    browser.resize(width, 760, dark=dark)
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=5, y=750)
    browser.open((folder / "maps.html").as_uri())
    yield browser
    assert browser.console == []
    assert browser.requests == [(folder / "maps.html").as_uri()]


def wait(condition, what):
    end = time.monotonic() + chromium.TIMEOUT
    while not condition():
        assert time.monotonic() < end, what


def numbers(page, side):
    """The weights written beside the tokens of a side, 0 where there is none."""
    return np.array(page.run(f"[...document.querySelectorAll('#{side} data')].map(each => Number(each.textContent))"))


def settings(page):
    return page.run("['kind', 'layer', 'head', 'top'].map(name => document.getElementById(name).value)")


def test_tokens_are_shown_as_text_and_never_run_as_html(browser, tmp_path):
    maps = {"self": AttentionMaps(attention(1, 2, len(HOSTILE), len(HOSTILE)), HOSTILE)}
    with opened(browser, tmp_path, maps) as page:
        assert page.run(SHOWN.format("#queries")) == page.run(SHOWN.format("#keys")) == list(map(visible, HOSTILE))
        page.click("[data-view=matrix]")
        assert page.run(SHOWN.format("#rows")) == page.run(SHOWN.format("#columns")) == list(map(visible, HOSTILE))
        assert page.run("window.harmed === undefined && document.querySelectorAll('script').length === 2")


def test_hovering_a_query_shows_where_it_attends(page):
    weights = MAPS["decoder"].weights
    before = page.screenshot("#edges")
    assert not numbers(page, "keys").any()
    for query in (1, 3):
        page.hover("#queries .token", query)
        np.testing.assert_allclose(numbers(page, "keys"), weights[0, 0, query], atol=1 / 255 + 0.005)
        assert not numbers(page, "queries").any()
        status = page.run("document.getElementById('status').textContent")
        strongest = visible(WORDS[weights[0, 0, query].argmax()])
        assert status.startswith(f"layer 0, head 0: “{visible(WORDS[query])}” attends to “{strongest}” ")
    during = page.screenshot("#edges")
    # Only the edges that begin at this token remain.
    left = (during[:, 2] != during[0, 0]).any(-1)
    assert left[24 * 3 + 6:24 * 4 - 6].any() and not left[:24 * 3].any() and not left[24 * 4:].any()
    page.hover("header", at=(0.7, 0.5))
    assert np.array_equal(page.screenshot("#edges"), before) and not np.array_equal(during, before)


def test_hovering_a_key_shows_who_attends_to_it(page):
    page.hover("#keys .token", 1)
    np.testing.assert_allclose(numbers(page, "queries"), MAPS["decoder"].weights[0, 0, :, 1], atol=1 / 255 + 0.005)
    assert not numbers(page, "keys").any()
    shot = page.screenshot("#edges")
    right = (shot[:, -2] != shot[0, 0]).any(-1)
    assert right[24 * 1 + 6:24 * 2 - 6].any() and not right[:24].any() and not right[24 * 2:].any()
    assert "“·Ela” is attended to by “" in page.run("document.getElementById('status').textContent")


def test_a_click_keeps_a_token(page):
    page.click("#queries .token", 2)
    page.hover("#keys .token", 4)
    page.hover("header", at=(0.7, 0.5))
    kept = numbers(page, "keys")
    np.testing.assert_allclose(kept, MAPS["decoder"].weights[0, 0, 2], atol=1 / 255 + 0.005)
    page.choose("#head", 2)
    np.testing.assert_allclose(numbers(page, "keys"), MAPS["decoder"].weights[0, 2, 2], atol=1 / 255 + 0.005)
    page.click("#queries .token", 2)
    page.hover("header", at=(0.7, 0.5))
    assert not numbers(page, "keys").any()


def test_pickers_change_the_drawing(page):
    screenshots = [page.screenshot("main")]
    for picker, value in (("layer", 1), ("head", 2), ("head", "mean"), ("top", 1), ("kind", 1), ("layer", 3)):
        page.choose(f"#{picker}", value)
        screenshots.append(page.screenshot("main"))
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(screenshots, 2))
    # The selected head is still the mean, now of the two heads of cross-attention.
    assert settings(page) == ["1", "3", "mean", "1"]
    assert page.run(SHOWN.format("#keys")) == list(map(visible, SOURCE))
    page.hover("#queries .token", 4)
    np.testing.assert_allclose(numbers(page, "keys"), MAPS["cross"].weights[3, :, 4].mean(0), atol=1 / 255 + 0.005)
    page.choose("#kind", 0)
    assert settings(page)[:2] == ["0", "1"], "a layer that the other kind has not: its last"


def test_fewer_edges_are_the_strongest(page):
    def ink():
        shot = page.screenshot("#edges").astype(int)
        return (np.abs(shot - shot[0, 0]).max(-1) > 8).sum()

    drawn = []
    for top in (1, 3, 0):
        page.choose("#top", top)
        drawn.append(ink())
    assert 0 < drawn[0] < drawn[1] < drawn[2]
    page.choose("#top", 1)
    # One edge from each query, to its strongest key: an edge ends there and nowhere else.
    ends = (np.abs(page.screenshot("#edges").astype(int)[:, -2] - 255).max(-1) > 8).reshape(-1)
    strongest = set(MAPS["decoder"].weights[0, 0].argmax(-1))
    assert {key for key in range(5) if ends[24 * key + 8:24 * key + 16].any()} == strongest


def edges(page):
    """Returns the keys to which each query is joined, after a check of the number that the page
    states."""
    assert page.run("document.getElementById('edges').ariaLabel").endswith(f": {page.run('edgesNow().length')}")
    return page.run("current.edges")


@pytest.mark.parametrize("spread", [0.0, 0.003])
def test_the_number_of_top_edges_holds_for_each_query_with_equal_weights(browser, tmp_path, spread):
    # 60 weights of about 1/60: all have one or two codes, and the order of their values is kept.
    weights = np.exp(spread * np.random.default_rng(1).normal(size=(1, 2, 60, 60)))
    weights = (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
    order = np.argsort(-weights[0, 0], axis=-1, kind="stable")
    with opened(browser, tmp_path, {"self": AttentionMaps(weights, list(map(str, range(60))))}) as page:
        for top in (5, 1, 20):
            page.choose("#top", top)
            assert edges(page) == order[:, :top].tolist()
        page.choose("#top", 0)
        assert set(map(len, edges(page))) == {60}
        page.choose("#top", 3)
        page.choose("#head", "mean")
        assert set(map(len, edges(page))) == {3}
        page.hover("#queries .token", 7)
        assert page.run("edgesNow().length") == 3


def test_no_edge_goes_where_nothing_is_attended_to(browser, tmp_path):
    weights = np.tril(np.ones((1, 1, 8, 8))) / np.arange(1, 9)[:, None]
    with opened(browser, tmp_path, {"self": AttentionMaps(weights, list("abcdefgh"))}) as page:
        assert edges(page) == [list(range(min(query + 1, 5))) for query in range(8)]


@pytest.mark.parametrize(("layer", "head"), [(2, 1), (-1, 0), (0, -1)])
def test_it_opens_at_the_layer_that_was_asked_for_and_comes_back_to_it(browser, tmp_path, layer, head):
    maps = {"self": AttentionMaps(attention(4, 2, 3, 3), list("abc")),
            "encoder": AttentionMaps(attention(2, 2, 3, 3), list("abc"))}
    wanted = [str(layer % 4), str(head % 2)]
    with opened(browser, tmp_path, maps, layer=layer, head=head) as page:
        assert settings(page)[1:3] == wanted
        assert page.run("document.getElementById('status').textContent") == f"layer {wanted[0]}, head {wanted[1]}"
        np.testing.assert_allclose(page.run("[...current.weights]"), maps["self"].weights[layer, head].ravel(),
                                   atol=1 / 255)
        page.choose("#kind", 1)
        assert settings(page)[1:3] == [str(min(layer % 4, 1)), wanted[1]], "the last one that this kind has"
        page.choose("#kind", 0)
        assert settings(page)[1:3] == wanted


def test_all_heads_are_scrolled_to_the_one_on_show(browser, tmp_path):
    with opened(browser, tmp_path, {"self": AttentionMaps(attention(30, 6, 3, 3), list("abc"))}, layer=-1,
                width=700) as page:
        page.click("[data-view=model]")
        box, main = page.box("#model [aria-current=true]"), page.box("main")
        assert main["y"] <= box["y"] and box["y"] + box["height"] <= main["y"] + main["height"] + 1


def test_several_texts_are_on_one_page(browser, tmp_path):
    texts = [{"self": AttentionMaps(attention(2, 2, 5, 5), WORDS)},
             {"self": AttentionMaps(attention(2, 2, 3, 3, seed=1), [" caf", "<0xC3>", "<0xA9>"])}]
    with opened(browser, tmp_path, texts, layer=1) as page:
        assert page.run("[...document.querySelectorAll('#text option')].map(each => each.textContent)") == [
            "0: <s> Ela derramou água.", "1: café"]
        for number, labels in ((1, ["·caf", "é 1/2", "é 2/2"]), (0, list(map(visible, WORDS)))):
            page.choose("#text", number)
            assert page.run(SHOWN.format("#keys")) == labels
            page.hover("#queries .token", 2)
            np.testing.assert_allclose(numbers(page, "keys"), texts[number]["self"].weights[1, 0, 2],
                                       atol=1 / 255 + 0.005)
        page.choose("#text", 1)
        page.click("[data-view=model]")
        assert page.run("document.querySelector('#model canvas').width") == 3
    with opened(browser, tmp_path, MAPS) as page:
        assert page.run("document.getElementById('text').parentElement.hidden"), "there is one text"


@pytest.mark.parametrize(("width", "dark"), [(400, False), (1300, True), (2400, False)])
def test_every_width_is_used(browser, tmp_path, width, dark):
    title = "a title of some ninety characters, which is shown whole, if need be in a row of its own."
    with opened(browser, tmp_path, {"self": AttentionMaps(attention(6, 4, 14, 14), list("abcdefghijklmn"))},
                title=title, width=width, dark=dark) as page:
        def reach():  # what is drawn, from the first to the last column that is not bare
            shot = page.screenshot("main").astype(int)
            columns = np.flatnonzero((np.abs(shot - shot[-3, 3]).max(-1) > 20).any(0))
            return (columns[-1] - columns[0]) / width

        assert page.run("document.documentElement.scrollWidth") <= width
        heading = page.run("(({scrollWidth, clientWidth}) => [scrollWidth, clientWidth])(document.querySelector('h1'))")
        assert heading[0] <= heading[1] or width < 600, "the title is not cut"
        assert page.run("document.querySelector('h1').title") == title
        assert reach() > 0.7
        both = page.run("[document.getElementById('lines').hidden, document.getElementById('matrix').hidden]")
        assert both == [False, width < 1100]
        for text, box in zip(page.run("[...document.querySelectorAll('#lines h2')].map(each => each.textContent)"),
                             (page.box("#lines h2", index) for index in range(3)), strict=True):
            assert box["width"] > 6 * len(text), "headings are not cut"
        page.click("[data-view=model]")
        assert reach() > 0.7


def test_a_cell_beside_the_lines_shows_its_tokens(page):
    page.hover("#cells", at=(0.3, 0.5))  # the key 1 and the query 2
    assert page.run("[...document.querySelectorAll('#lines .chosen .token')].map(each => each.textContent)") == [
        visible(WORDS[2]), visible(WORDS[1])]
    assert page.run("edgesNow()") == [[2, 1]]
    page.hover("#queries .token", 2)
    cursor, cells = page.box("#cursor"), page.box("#cells")
    assert (cursor["width"], cursor["height"]) == (cells["width"], cells["height"] / 5), "a row of the matrix"
    assert page.run("document.getElementById('tip').hidden")


def test_thumbnails_open_their_map(page):
    page.click("[data-view=model]")
    assert page.run("document.querySelectorAll('#model button').length") == 6
    names = page.run("[...document.querySelectorAll('#model button')].map(each => each.ariaLabel)")
    assert names == [f"layer {layer}, head {head}" for layer in range(2) for head in range(3)]
    pictures = page.run("[...document.querySelectorAll('#model canvas')].map(each => each.toDataURL())")
    assert len(set(pictures)) == 6
    page.click("#model button", 5)
    assert settings(page)[1:3] == ["1", "2"]
    assert page.run("document.getElementById('model').hidden && !document.getElementById('matrix').hidden")


def test_the_matrix_is_darker_where_weights_are_larger(page):
    page.click("[data-view=matrix]")
    page.choose("#layer", 1)
    weights = MAPS["decoder"].weights[1, 0]
    shot = page.screenshot("#cells").astype(float).mean(-1)
    side = shot.shape[0] // 5
    lightness = shot[side // 2::side, side // 2::side][:5, :5]
    order = np.argsort(weights, axis=None)
    assert (np.diff(lightness.reshape(-1)[order]) <= 0).all() and np.ptp(lightness) > 150
    for query, key in ((0, 0), (2, 4), (4, 1)):
        page.hover("#cells", at=((key + 0.5) / 5, (query + 0.5) / 5))
        tip = page.run("document.getElementById('tip').textContent")
        names, value = tip.rsplit(" ", 1)
        assert names == f"“{visible(WORDS[query])}” → “{visible(WORDS[key])}”"
        assert abs(float(value) - weights[query, key]) <= 1 / 255 + 0.005
        assert page.run("[...document.querySelectorAll('#matrix .chosen')].map(each => each.textContent)") == [
            visible(WORDS[key]), visible(WORDS[query])]
    before = page.box("#cells")["width"]
    page.choose("#zoom", 20)
    assert page.box("#cells")["width"] == 5 * 20 != before


def test_arrows_go_through_layers_and_heads(page):
    places = []
    for key in ("Right", "Down", "Down", "Right", "Right", "Right", "Left", "Up"):
        page.press(f"Arrow{key}")
        places.append("".join(settings(page)[1:3]))
    assert places == ["01", "11", "11", "12", "1mean", "1mean", "12", "02"]


def test_shift_and_arrows_go_through_tokens(page):
    page.press("ArrowDown", shift=True)
    page.press("ArrowDown", shift=True)
    np.testing.assert_allclose(numbers(page, "keys"), MAPS["decoder"].weights[0, 0, 1], atol=1 / 255 + 0.005)
    page.press("ArrowRight", shift=True)
    np.testing.assert_allclose(numbers(page, "queries"), MAPS["decoder"].weights[0, 0, :, 1], atol=1 / 255 + 0.005)
    page.press("Escape")
    assert not numbers(page, "queries").any() and not numbers(page, "keys").any()
    page.click("[data-view=matrix]")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):  # the first chooses the first cell
        page.press(key, shift=True)
    assert page.run("document.getElementById('tip').textContent").startswith("“·Ela” → “·Ela” ")
    assert settings(page)[1:3] == ["0", "0"]


def test_tab_reaches_every_control_and_shows_where_it_is(page):
    reached = []
    for _ in range(9):
        page.press("Tab")
        outline = page.run("(({outlineStyle, outlineWidth}) => [outlineStyle, parseFloat(outlineWidth)])("
                           "getComputedStyle(document.activeElement))")
        assert outline[0] != "none" and outline[1] >= 2
        reached.append(page.run("document.activeElement.id || document.activeElement.dataset.view "
                                "|| document.activeElement.tagName"))
    assert reached == ["lines", "model", "matrix", "kind", "layer", "head", "top", "theme", "MAIN"]
    page.click("[data-view=model]")
    page.run("document.querySelector('main').focus()")
    page.press("Tab")
    page.press("ArrowRight")
    assert page.run("document.activeElement.ariaLabel") == "layer 0, head 1"
    page.press("Enter")
    assert settings(page)[1:3] == ["0", "1"] and not page.run("document.getElementById('matrix').hidden")


def contrast(page, selector):
    """WCAG's ratio of an element's text to what is behind it."""
    def luminance(rgb):
        channels = np.array(rgb) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    colors = page.run(f"""(() => {{
        let element = document.querySelector({json.dumps(selector)});
        const text = getComputedStyle(element).color;
        while (/[,/] 0\\)|transparent/.test(getComputedStyle(element).backgroundColor)) element = element.parentElement;
        return [text, getComputedStyle(element).backgroundColor].map(color => color.match(/[\\d.]+/g).map(Number));
    }})()""")
    light, dark = sorted((luminance(color[:3]) for color in colors), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark(page, dark):
    def brightness():
        return page.screenshot().mean()

    page.resize(1200, 760, dark=dark)
    assert brightness() < 60 if dark else brightness() > 200
    for selector in ("h1", "header label", "#queries .token", "#lines h2", "#status", "#help", "select",
                     "#views button[aria-pressed=true]"):
        assert contrast(page, selector) >= 4.5, selector
    luminance = [0.2126 * (color & 255) + 0.7152 * (color >> 8 & 255) + 0.0722 * (color >> 16 & 255)
                 for color in page.run("[...palette()]")]
    assert all((a < b) == dark and a != b for a, b in itertools.pairwise(luminance)), "told apart without any hue"
    page.click("[data-view=matrix]")
    page.choose("#theme", "light" if dark else "dark")
    assert brightness() > 200 if dark else brightness() < 60
    page.choose("#theme", "system")
    assert brightness() < 60 if dark else brightness() > 200


@pytest.mark.parametrize("width", [420, 700])
def test_a_narrow_frame_needs_no_sideways_scrolling(page, width):
    page.resize(width, 500)
    for view in ("lines", "model", "matrix"):
        page.click(f"[data-view={view}]")
        assert page.run("document.documentElement.scrollWidth") <= width
        assert page.box("main")["height"] > 200


def test_in_a_notebooks_frame(browser, tmp_path):
    frame = viewer.iframe_html({"self": AttentionMaps(attention(2, 2, len(HOSTILE), len(HOSTILE)), HOSTILE)})
    (tmp_path / "notebook.html").write_text(f"<!doctype html><div class='output'>{frame}</div>")
    browser.resize(1000, 760)
    browser.open((tmp_path / "notebook.html").as_uri(), ready="document.readyState === 'complete'")

    def blue():
        shot = browser.screenshot("iframe").astype(int)
        return (shot[..., 2] - shot[..., 0] > 60).sum()

    # The frame is a page of its own, which cannot be asked whether it is ready.
    wait(lambda: blue() > 15_000, "edges are drawn")
    for x in (180, 185):
        browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=112)
    wait(lambda: 3000 < blue() < 12_000, "those of one token are left")
    assert browser.console == []


def test_a_large_page_works(browser, tmp_path):
    words = [f" word{n}" for n in range(128)]
    with opened(browser, tmp_path, {"self": AttentionMaps(attention(12, 12, 128, 128), words)}) as page:
        page.click("[data-view=model]")
        assert page.run("document.querySelectorAll('#model canvas').length") == 144
        page.click("[data-view=matrix]")
        labels = page.run(SHOWN.format("#rows"))
        assert labels == list(map(visible, words))[::128 // len(labels)], "every second or third, as there is room"
        page.click("[data-view=lines]")
        page.hover("#queries .token", 2)
        before = page.screenshot("#edges")
        page.run("document.querySelector('main').scrollTo(0, 1500)")
        page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert not np.array_equal(page.screenshot("#edges"), before), "edges follow their tokens"
