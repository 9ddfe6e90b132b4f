"""The content of the page that shows attention. The tests in test_viewer_in_browser.py open it in a
browser."""

import base64
import fnmatch
import hashlib
import html.parser
import json
import pathlib
import re
import tomllib
import zlib

import numpy as np
import pytest

from transformer_jax.inspection import viewer
from transformer_jax.inspection.characters import joined, shown
from transformer_jax.inspection.labels import shorten, visible
from transformer_jax.inspection.viewer import AttentionMaps

HOSTILE = ["<script>window.harmed = true</script>", "</script>", "</script/", "<!--<script/", "]]>", "\"'&amp;\\",
           "\u2028", "\u2029", "😀", "e\u0301", "\u0301", "<0xE2>", "\n", "\r", "\t", " água", "", "\u200b", "\x00",
           "\u202egnirts", "\ud83d", "{{data}}", "${1}", "<img src=x onerror='window.harmed = true'>"]


def attention(*shape, seed=0):
    """Random weights whose rows sum to one, some of them very small."""
    scores = 4 * np.random.default_rng(seed).normal(size=shape)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


class Parsed(html.parser.HTMLParser):
    """The elements of a page, where every one that is opened is closed."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.text, self.problems = [], [], {}, []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, text):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(text)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def data_of(page):
    return json.loads(Parsed(page).text["script"][0])


def kinds_of(page, text=0):
    return data_of(page)["texts"][text]["kinds"]


def codes_of(kind):
    codes = np.frombuffer(zlib.decompress(base64.b64decode(kind["weights"])), np.uint8)
    return codes.reshape(kind["layers"], kind["heads"], len(kind["queries"]), len(kind["keys"]))


def test_the_page_is_whole_and_well_formed():
    page = viewer.html({"self": AttentionMaps(attention(2, 3, 5, 5), list("abcde"))}, title="a & b")
    parsed = Parsed(page)
    assert not parsed.problems and not parsed.open
    assert page.startswith("<!doctype html>") and page.isascii()
    assert parsed.text["title"] == ["a & b"]
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    # Every control has a name for people who use a screen reader.
    labelled = page.count("<label>")
    controls = len(parsed.all("select")) + len(parsed.all("input"))
    assert labelled + sum("aria-label" in each for each in parsed.all("select")) == controls


def test_the_page_makes_no_request_and_has_one_script():
    page = viewer.html({"self": AttentionMaps(attention(1, 1, 2, 2), ["a", "b"])})
    parsed = Parsed(page)
    policy = next(each["content"] for each in parsed.all("meta") if "http-equiv" in each)
    script = parsed.text["script"][1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    addresses = [value for _, attributes in parsed.elements for name, value in attributes.items()
                 if name in ("src", "href", "action", "data")]
    assert addresses == ["data:,"]
    assert not re.search(r"https?:|url\(|@import|import\(|fetch\(|XMLHttpRequest|innerHTML|eval\(", page)


@pytest.mark.parametrize("spread", ["random", "uniform", "extreme"])
def test_weights_come_back_within_a_255th(spread):
    weights = {"random": attention(2, 3, 7, 9), "uniform": np.full((2, 3, 7, 300), 1 / 300),
               "extreme": np.broadcast_to(np.linspace(0, 1, 9), (2, 3, 7, 9))}[spread]
    maps = AttentionMaps(weights, list("abcdefg"), list(map(str, range(weights.shape[-1]))))
    kind, = kinds_of(viewer.html({"cross": maps}))
    back = (codes_of(kind) / 255) ** 2
    assert kind["name"] == "cross" and back.shape == weights.shape
    error = np.abs(back - weights)
    assert error.max() <= 1 / 255 + 1e-6
    # The error is at most half a code of the square root, so small weights are stored more
    # precisely than with equal steps.
    assert (error <= np.sqrt(weights) / 255 + (0.5 / 255) ** 2 + 1e-6).all()


def test_the_order_of_the_strongest_keys_outlives_the_rounding():
    # If a head attends to all tokens equally, all its weights have the same code.
    near = np.full((1, 2, 4, 300), 1 / 300) + 1e-6 * np.random.default_rng(0).permuted(
        np.broadcast_to(np.arange(300.0), (1, 2, 4, 300)), axis=-1)
    near /= near.sum(-1, keepdims=True)
    kind, = kinds_of(viewer.html({"self": AttentionMaps(near, list("abcd"), list(map(str, range(300))))}))
    assert len(np.unique(codes_of(kind))) < 5
    moved = np.frombuffer(zlib.decompress(base64.b64decode(kind["moved"])), "<u2").reshape(1, 2, 4, 20)
    by_code = np.argsort(-codes_of(kind).astype(int), axis=-1, kind="stable")[..., :20]
    ranks = (by_code + moved) % 65536
    assert (by_code != ranks).any()
    largest = np.sort(near.astype(np.float32), axis=-1)[..., ::-1][..., :20]
    np.testing.assert_array_equal(np.take_along_axis(near.astype(np.float32), ranks.astype(int), axis=-1), largest)
    equal = np.full((1, 1, 2, 3), 1 / 3, np.float32)
    assert viewer.strongest(equal).tolist() == [[[[0, 1, 2]] * 2]], "ties: as they stand"


def test_texts_of_one_page_have_their_own_maps():
    texts = [{"self": AttentionMaps(attention(2, 3, len(words), len(words)), words)}
             for words in ([" a", " b", " caf", "<0xC3>", "<0xA9>"], ["x" * 50, "y"])]
    data = data_of(viewer.html(texts, layer=1))
    assert [text["name"] for text in data["texts"]] == ["0: a b café", f"1: {'x' * 36}…"]
    for number, text in enumerate(texts):
        kind, = kinds_of(viewer.html(texts), number)
        np.testing.assert_allclose((codes_of(kind) / 255) ** 2, text["self"].weights, atol=1 / 255)
    assert data["texts"][0] == data_of(viewer.html(texts[0]))["texts"][0], "as on a page of its own"
    assert data["layer"] == 1
    assert viewer.iframe_html(texts).count("<iframe") == 1


def test_a_large_model_makes_a_small_page():
    weights = attention(12, 12, 128, 128)
    page = viewer.html({"self": AttentionMaps(weights, [f" token{n}" for n in range(128)])})
    packed, = re.findall(r'"weights": "([^"]*)"', page)
    assert len(page) - len(packed) < 300_000
    assert len(packed) <= weights.size * 4 / 3


@pytest.mark.parametrize("title", [HOSTILE[0], "</script >", "</title><script >", "água 😀 {{data}}"])
def test_tokens_and_titles_are_text(title):
    page = viewer.html({"self": AttentionMaps(attention(1, 1, len(HOSTILE), len(HOSTILE)), HOSTILE)}, title=title)
    parsed = Parsed(page)
    assert not parsed.problems and len(parsed.all("script")) == 2 and not parsed.all("img")
    assert parsed.text["title"] == [title]
    kind, = kinds_of(page)
    assert kind["queries"] == kind["keys"] == list(map(visible, HOSTILE))
    assert data_of(page)["title"] == title


@pytest.mark.parametrize(("token", "label"), [
    (" água", "·água"), ("\n", "↵"), ("\r\n", "<U+000D>↵"), ("\t", "⇥"), ("", "∅"), ("e\u0301", "e\u0301"),
    ("\u0301", "◌\u0301"), ("<0xE2>", "<0xE2>"), ("\u2028", "<U+2028>"), ("\u00a0", "<U+00A0>"), ("\x00", "<U+0000>"),
    ("\ud83d", "<U+D83D>"),
    ("👩\u200d👧", "👩\u200d👧"), ("\u200d", "<U+200D>"), ("\u202eabc", "<U+202E>abc"), ("$x$", "$x$"), ("▁", "▁"),
])
def test_invisible_characters_get_a_visible_label(token, label):
    assert visible(token) == label


@pytest.mark.parametrize(("tokens", "labels"), [
    ([" caf", "<0xC3>", "<0xA9>", " to"], ["·caf", "é 1/2", "é 2/2", "·to"]),
    (["<0xE2>", "<0x82>", "<0xAC>"], ["€ 1/3", "€ 2/3", "€ 3/3"]),
    (["<0xE2><0x82>", "<0xAC>"], ["€ 1/2", "€ 2/2"]),
    (["<0xF0><0x9F>", "<0x98><0x80>"], ["😀 1/2", "😀 2/2"]),
    # A token may end one character and begin the next, or contain whole characters.
    (["<0xE6><0x97>", "<0xA5><0xE6>", "<0x9C><0xAC>"], ["日 1/2", "日 2/2 本 1/2", "本 2/2"]),
    (["<0xC3><0xA9><0xC3><0xA9>", "<0x20><0xC3>", "<0xA9>"], ["éé", "· é 1/2", "é 2/2"]),
    # Bytes that form no valid character keep their numbers: alone, cut off, in the wrong order, a
    # surrogate, too large.
    (["<0xE2>", "a", "<0xAC>"], ["<0xE2>", "a", "<0xAC>"]),
    (["<0xC3>", "<0xC3>", "<0xA9>"], ["<0xC3>", "é 1/2", "é 2/2"]),
    (["<0xED>", "<0xA0>", "<0x80>"], ["<0xED>", "<0xA0>", "<0x80>"]),
    (["<0xFF>", "<0xF5>", "<0xC0>"], ["<0xFF>", "<0xF5>", "<0xC0>"]),
    (["<0x0A>", "<0x20>", "<0x41>"], ["↵", "·", "A"]),
    ([], []),
])
def test_bytes_are_shown_as_parts_of_their_character(tokens, labels):
    assert shown(tokens) == labels
    text = b"".join(bytes.fromhex(token.replace("<0x", "").replace(">", "")) if token.startswith("<0x") else
                    token.encode() for token in tokens).decode("utf-8", "replace")
    assert joined(tokens) == " ".join(text.split())


def test_long_labels_are_cut():
    assert shorten("<0xE2>") == "<0xE2>" and shorten("a" * 16) == "a" * 16
    assert shorten("a" * 17) == "a" * 15 + "…" and shorten("abcdef", 4) == "abc…"


def test_several_kinds_and_where_the_page_opens():
    maps = {"cross": AttentionMaps(attention(4, 2, 3, 5), list("xyz"), list("abcde")),
            "encoder": AttentionMaps(attention(6, 8, 5, 5), list("abcde"))}
    data = data_of(viewer.html(maps, layer=-1, head=1))
    assert [(kind["name"], kind["layers"], kind["heads"]) for kind in data["texts"][0]["kinds"]] == [("cross", 4, 2),
                                                                                       ("encoder", 6, 8)]
    assert (data["layer"], data["head"]) == (3, 1)


def test_the_frame_holds_the_page_and_gives_it_no_rights():
    maps = {"self": AttentionMaps(attention(1, 2, len(HOSTILE), len(HOSTILE)), HOSTILE)}
    parsed = Parsed(viewer.iframe_html(maps, title="x"))
    (tag, attributes), = parsed.elements
    assert tag == "iframe" and attributes["srcdoc"] == viewer.html(maps, title="x") and attributes["title"]
    assert attributes["sandbox"] == "allow-scripts"


def test_saving(tmp_path):
    maps = {"self": AttentionMaps(attention(1, 2, 2, 2), ["a", "é"])}
    viewer.save_html(tmp_path / "maps.html", maps, title="t", head=1)
    assert (tmp_path / "maps.html").read_bytes().decode() == viewer.html(maps, title="t", head=1)


def test_the_wheel_holds_the_page():
    root = pathlib.Path(viewer.__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["transformer_jax"]
    assert any(fnmatch.fnmatch("inspection/viewer.html", pattern) for pattern in patterns)


@pytest.mark.parametrize(("weights", "message"), [
    (np.ones((2, 2)), r"weights are \[layers, heads, 2 queries, 2 keys\], all at least 1; got \[2, 2\]"),
    (np.ones((1, 1, 2, 3)), r"got \[1, 1, 2, 3\]"),
    (np.ones((0, 1, 2, 2)), r"all at least 1; got \[0, 1, 2, 2\]"),
    (np.full((1, 1, 2, 2), np.nan), "attention weights are from 0 to 1; got nan to nan"),
    (np.full((1, 1, 2, 2), -0.1), "attention weights are from 0 to 1; got -0.1"),
    (np.full((1, 1, 2, 2), 1.5), "attention weights are from 0 to 1; got 1.5 to 1.5"),
])
def test_weights_that_are_none(weights, message):
    with pytest.raises(ValueError, match=message):
        AttentionMaps(weights, ["a", "b"])


def test_pages_that_cannot_be():
    maps = {"self": AttentionMaps(attention(2, 3, 2, 2), ["a", "b"])}
    with pytest.raises(ValueError, match="there are no maps to show; pass"):
        viewer.html({})
    with pytest.raises(ValueError, match="layers=2: index 2 is out of range for 2 layers"):
        viewer.html(maps, layer=2)
    with pytest.raises(ValueError, match="heads=-4: index -4 is out of range for 3 heads"):
        viewer.html(maps, head=-4)
    with pytest.raises(ValueError, match="'self' attention over 513 tokens is more than the 512 that a page shows: "
                                         "shorten the text, or draw single maps"):
        viewer.html({"self": AttentionMaps(np.zeros((1, 1, 513, 2)), ["a"] * 513, ["a", "b"])})
    with pytest.raises(ValueError, match="75,497,472 attention weights are more than the 67,108,864 that a page holds: "
                                         "shorten the text, or show fewer texts, layers or heads"):
        viewer.check_size([{"self": (12, 12, 512, 512)}, {"self": (12, 12, 512, 512)}])
    with pytest.raises(ValueError, match="all texts of a page need the same kinds of attention; got self and cross"):
        viewer.html([maps, {"cross": maps["self"]}])
    with pytest.raises(ValueError, match="there are no maps to show; pass"):
        viewer.html([])
