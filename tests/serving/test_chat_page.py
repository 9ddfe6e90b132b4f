"""The chat page in a real browser, with a real model behind it."""

import functools
import pathlib
import sys
import time

import jax
import numpy as np
import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
sys.path.append(str(pathlib.Path(__file__).parents[1] / "inspection"))

import running
from PIL import Image

import transformer_jax as tj

pytestmark = pytest.mark.long
TEXT = "[...document.querySelectorAll('.reply .text')].map(each => each.textContent)"


@functools.cache
def make_model(num_layers):
    """A model that never ends its text."""
    return running.make_decoder(num_layers=num_layers, banned_ids=running.TOKENIZER.end_ids)


@pytest.fixture(scope="module")
def models():
    return {name: running.make_served(name, model=make_model(num_layers), max_batch=4)
            for name, num_layers in (("base", 2), ("tuned", 1))}


@pytest.fixture(scope="module")
def address(models):
    with running.served(models) as address:
        yield address


@pytest.fixture
def page(browser, address):
    """The page without earlier conversations. At the end the console is empty, and every request
    went to the server."""
    browser.resize(1200, 760)
    browser.open(address)
    browser.run("localStorage.clear()")
    browser.open(address)
    yield browser
    assert browser.console == []
    assert {request.split("/")[2] for request in browser.requests if request.startswith("http")} == {address[7:]}


def write(page, text, **settings):
    defaults = {"max_tokens": 12, "seed": 3, "temperature": 0.8} | settings
    page.run(f"Object.assign(settings, {defaults!r}), 0")
    page.run("document.getElementById('message').focus()")
    page.send("Input.insertText", text=text)
    page.press("Enter")


def finish(page):
    page.until("!running && document.querySelectorAll('.reply .text').length > 0")


def test_a_reply_streams_and_is_the_text_that_generate_draws(page, address):
    write(page, "the quick")
    finish(page)
    expected = tj.generate(make_model(2), ["the quick"], tokenizer=running.TOKENIZER, key=jax.random.key(3),
                           max_new_tokens=12, sampling=tj.Sampling(temperature=0.8))
    reply = page.run("current.turns[0].replies.base")
    assert [token["id"] for token in reply["tokens"]] == expected.tokens[0]
    assert page.run(TEXT) == [expected.texts[0]]
    np.testing.assert_allclose([token["logprob"] for token in reply["tokens"]], expected.logprobs[0], atol=1e-4)
    page.open(address)  # the conversation is kept
    page.click("nav li button")
    assert page.run(TEXT) == [expected.texts[0]]


def test_models_answer_side_by_side_and_a_click_shows_where_a_token_attended(page):
    page.click("#models input", 1)
    write(page, "the quick", max_tokens=6)
    finish(page)
    assert page.run("[...document.querySelectorAll('.reply h3')].map(each => each.textContent)") == ["base", "tuned"]
    page.hover(".reply .token", 2)
    assert page.run("document.querySelectorAll('#tip tr').length") == 5
    page.click(".reply .token", 2)
    page.until("document.querySelectorAll('.seen').length > 0")
    weights = np.array(page.run("[...document.querySelectorAll('.seen')].map(each => Number(each.dataset.weight))"))
    tokens = [*running.TOKENIZER.encode("the quick"), *(token["id"] for token in page.run(
        "current.turns[0].replies.base.tokens"))][:len("the quick") + 2]
    maps = tj.trace(make_model(2), np.array([tokens])).attention(queries=[-1])
    np.testing.assert_allclose(weights, np.asarray(maps).mean((0, 1, 2))[0], atol=2e-4)


def test_stop_regenerate_edit_and_resend(page, models, monkeypatch):
    batch = models["base"].engine._batch
    decode = batch.decode
    monkeypatch.setattr(batch, "decode", lambda: (time.sleep(0.1), decode())[1])
    write(page, "over the lazy", max_tokens=200, temperature=1.0)
    page.until("document.querySelectorAll('.token').length > 0 && Boolean(running)")
    page.click("#stop")
    finish(page)
    assert page.run("current.turns[0].replies.base.reason") == "cut"
    page.run("settings.max_tokens = 4, 0")
    page.click(".again")
    page.until("!running && current.turns[0].replies.base.reason === 'length'")
    page.click(".edit")
    page.send("Input.insertText", text=" dog")
    page.press("Enter")
    page.until("!running && current.turns[0].user === 'over the lazy dog'")
    page.until("!running && current.turns[0].replies.base?.reason === 'length'")


def test_the_page_fits_400_pixels_in_light_and_dark(page, tmp_path):
    write(page, "the quick", max_tokens=30)
    finish(page)
    colours = []
    for dark in (False, True):
        page.resize(400, 760, dark=dark)
        assert page.run("document.documentElement.scrollWidth <= 400")
        assert page.run("[...document.querySelectorAll('header, main, footer, .reply, #send')].every("
                        "each => each.getBoundingClientRect().right <= 400)")
        picture = page.screenshot()
        Image.fromarray(picture).save(tmp_path / f"chat-{'dark' if dark else 'light'}.png")
        colours.append(picture.mean())
    assert colours[0] > 200 > 100 > colours[1]
    page.click("#menu")
    assert page.run("document.querySelector('nav').getBoundingClientRect().width > 200")


def test_everything_has_a_name_and_tokens_are_reached_by_keys(page):
    write(page, "the", max_tokens=5)
    finish(page)
    nameless = page.run("""[...document.querySelectorAll('button, input, select, textarea, [role=button]')].filter(
        each => !(each.ariaLabel || each.textContent.trim() || each.closest('label')?.textContent.trim())).length""")
    assert nameless == 0
    page.run("document.querySelector('.token').focus()")
    page.press("ArrowRight")
    assert page.run("[...document.querySelectorAll('.token')].indexOf(document.activeElement)") == 1
    assert page.run("!document.getElementById('tip').hidden")


def test_text_of_a_model_is_never_run_as_html(page):
    write(page, "<img src=x onerror='window.harmed = 1'>", max_tokens=3)
    finish(page)
    assert page.run("window.harmed === undefined && document.querySelectorAll('main img').length === 0")


def test_the_passages_that_a_reply_used_are_shown(browser, tmp_path):
    pytest.importorskip("bm25s", reason='needs pip install "transformer_jax[documents]"')
    (tmp_path / "fox.txt").write_text("the <b>quick</b> fox jumps\n\nthe lazy dog sleeps")
    tokenizer = tj.Tokenizer.train(running.TEXT, kind="char", chat=True)
    shape = running.SHAPE | dict(vocab_size=tokenizer.vocab_size, num_layers=1, max_len=128)
    model = tj.Decoder(tj.ModelConfig(**shape), key=jax.random.key(0))
    chat = running.ServedModel("chat", model, tokenizer, running.Engine(model, tokenizer=tokenizer, max_batch=1),
                               documents=tj.tools.Passages.read(tmp_path, max_words=6))
    with running.served({"chat": chat}) as address:
        browser.open(address)
        browser.run("localStorage.clear()")
        browser.open(address)
        write(browser, "the quick fox", max_tokens=3)
        finish(browser)
        shown = browser.run("document.querySelector('.passages').textContent")
        assert shown.startswith("2 passages used") and "fox.txt, passage 1" in shown and "<b>quick</b>" in shown
        browser.run("settings.documents = false, 0")
        browser.click(".again")
        browser.until("!running && current.turns[0].replies.chat.reason === 'length'")
        assert browser.run("document.querySelector('.passages').hidden")
