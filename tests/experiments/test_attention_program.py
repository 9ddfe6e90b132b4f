"""The program that shows attention writes the maps of the model's trace."""

import base64
import functools
import json
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import transformer_jax as tj
from transformer_jax.inspection import plots
from transformer_jax.inspection.labels import visible
from transformer_jax.models.functional import make_model

SENTENCE = "ela derramou água da jarra para o copo até que ficasse cheio\n"
TOO_LONG = ("'self' attention over 550 tokens is more than the 512 that a page shows: shorten the text, or draw single "
            "maps")
SHAPES = {"decoder": {"num_layers": 2, "max_len": 1024},
          "encoder": {"num_layers": 2, "max_len": 64, "norm_position": "post"},
          "encoder_decoder": {"num_layers": 1, "max_len": 64, "num_encoder_layers": 1, "num_decoder_layers": 2}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved(family)``: where a model with random weights is, and the model."""
    @functools.cache
    def save(family):
        workdir = tmp_path_factory.mktemp(family)
        tokenizer = tj.Tokenizer.train([SENTENCE], kind="char")
        config = tj.ModelConfig(family=family, vocab_size=tokenizer.vocab_size, num_heads=2, model_dim=16,
                                positions="sinusoidal", **SHAPES[family])
        model = jax.jit(lambda key: make_model(config, key=key))(jax.random.key(0))
        bundle = tj.Bundle(model=model, tokenizer=tokenizer, config=config, step=3)
        tj.save(workdir, bundle)
        return workdir, bundle

    return save


def maps_of(path):
    """The tokens and the rounded maps of a page, by kind in their order."""
    page = path.read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    found = {}
    for kind in data["texts"][0]["kinds"]:
        codes = np.frombuffer(zlib.decompress(base64.b64decode(kind["weights"])), np.uint8)
        shape = kind["layers"], kind["heads"], len(kind["queries"]), len(kind["keys"])
        found[kind["name"]] = kind["queries"], kind["keys"], (codes.reshape(shape) / 255) ** 2
    return found, (data["layer"], data["head"])


@pytest.mark.long
@pytest.mark.parametrize("family", SHAPES)
def test_the_page_holds_every_kind_of_attention(program, saved, tmp_path, family):
    workdir, bundle = saved(family)
    tokenizer = bundle.tokenizer
    arguments = ["--target=copo"] if family == "encoder_decoder" else []
    ended = program("attention", f"--workdir={workdir}", "--text=da água", f"--out={tmp_path / 'maps.html'}",
                    "--layer=1", "--head=-1", *arguments)
    assert ended.status == 0, ended.err
    assert ended.out == f"{tmp_path / 'maps.html'}: open it in a browser\n"
    text, marked = tokenizer.encode("da água"), list("da·água")
    if family == "encoder_decoder":
        source, target = [*text, tokenizer.eos_id], tokenizer.encode("copo")
        trace = tj.trace(bundle.model, jnp.array([source]), jnp.array([[tokenizer.bos_id, *target]]))
        read, target = [*marked, "</s>"], ["<s>", *"copo"]
        expected = {"cross": ([*"copo", "(next)"], read, trace.cross), "self": (target, target, trace.decoder),
                    "encoder": (read, read, trace.encoder)}
    elif family == "encoder":
        trace = tj.trace(bundle.model, jnp.array([[tokenizer.bos_id, *text, tokenizer.eos_id]]))
        expected = {"self": (["<s>", *marked, "</s>"], ["<s>", *marked, "</s>"], trace)}
    else:
        expected = {"self": (marked, marked, tj.trace(bundle.model, jnp.array([text])))}
    found, opens_with = maps_of(tmp_path / "maps.html")
    assert list(found) == list(expected) and opens_with == (1, 1)
    for kind, (queries, keys, trace) in expected.items():
        assert found[kind][:2] == (queries, keys)
        np.testing.assert_allclose(found[kind][2], trace.attention()[:, 0], atol=1 / 255 + 1e-6)


@pytest.mark.long
@pytest.mark.parametrize(("family", "arguments", "plotted"), [
    ("decoder", [], (None, None, None)),
    ("decoder", ["--layer=1", "--head=1"], (None, 1, 1)),
    ("encoder_decoder", ["--layer=1"], ("cross", 1, None)),
    ("encoder_decoder", ["--kind=encoder"], ("encoder", None, None)),
])
def test_pictures(program, saved, tmp_path, family, arguments, plotted):
    (workdir, bundle), png = saved(family), tmp_path / "maps.png"
    target = "água" if family == "encoder_decoder" else None
    arguments = [*arguments, *([f"--target={target}"] if target else [])]
    ended = program("attention", f"--workdir={workdir}", "--text=água", f"--png={png}", *arguments)
    assert ended.status == 0, ended.err
    assert ended.out == f"{png}: open it in an image viewer\n"
    plots.save(tj.inspect_text(bundle, "água", target=target).plot(*plotted), tmp_path / "expected.png")
    np.testing.assert_array_equal(Image.open(png), Image.open(tmp_path / "expected.png"))


@pytest.mark.long
def test_a_translator_shows_its_own_translation(program, saved, tmp_path):
    workdir, bundle = saved("encoder_decoder")
    ended = program("attention", f"--workdir={workdir}", "--text=da jarra", "--kind=self",
                    f"--out={tmp_path / 'maps.html'}")
    assert ended.status == 0, ended.err
    found, _ = maps_of(tmp_path / "maps.html")
    assert list(found) == ["self", "encoder", "cross"]
    tokens = tj.generate(bundle.model, ["da jarra"], tokenizer=bundle.tokenizer, sampling=tj.Sampling(temperature=0),
                         max_new_tokens=15).tokens[0]
    pieces = [visible(piece) for piece in bundle.tokenizer.pieces(tokens)]
    assert found["self"][0][:16] == ["<s>", *pieces][:len(found["self"][0])]
    assert found["cross"][0] == [*found["self"][0][1:], "(next)"], "named by what they predict"


def test_a_continuation_and_a_mask(program, saved, tmp_path):
    page, (decoder, _), (encoder, _) = tmp_path / "maps.html", saved("decoder"), saved("encoder")
    assert program("attention", f"--workdir={decoder}", "--text=da ", "--target=jarra", f"--out={page}").status == 0
    assert maps_of(page)[0]["self"][0] == list("da·jarra")
    assert program("attention", f"--workdir={decoder}", "--text=", f"--out={page}").status == 0
    assert maps_of(page)[0]["self"][0] == ["<|endoftext|>"]
    assert program("attention", f"--workdir={encoder}", "--text=da <mask> o", f"--out={page}").status == 0
    assert maps_of(page)[0]["self"][0] == ["<s>", "d", "a", "<mask>", "·", "o", "</s>"]


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "--workdir is missing: the directory of a run, which transformer-jax train wrote; or pass --model, a "
         "directory or an id of Hugging Face"),
    (["--workdir={}"], "--text is missing: the text that the model reads"),
    (["--workdir={}", "--text=da"], "no output is named; pass --out=maps.html for an HTML page, or --png=maps.png for "
                                    "a picture"),
    (["--workdir={}", "--text=da", "--png=x.png", "--head=1"], "--head=1 needs the layer of the head; add --layer"),
    (["--workdir={}", "--text=da", "--png=x.png", "--layer=2"], "layers=2: index 2 is out of range for 2 layers"),
    (["--workdir={}", "--text=da", "--out=x.html", "--layer=0", "--head=-3"],
     "heads=-3: index -3 is out of range for 2 heads"),
    (["--workdir={}", "--text=da", "--png=x.png", "--kind=cross"],
     "kind='cross' is not one of self, the attention of a Decoder"),
    (["--workdir={}", "--text=da", "--png=x.pdf"], "x.pdf: a figure is saved as .png or .svg; name the file so"),
    (["--workdir={}", "--text=da", "--out=x.html", "--png=x.pdf"],
     "x.pdf: a figure is saved as .png or .svg; name the file so"),
    (["--workdir={}", "--text=da", "--out= "], "--out is empty: name a file"),
    (["--workdir={}", "--text=da", "--png="], "--png is empty: name a file"),
    (["--workdir={}", "--text=da", "--out=nowhere/x.html"], "nowhere/x.html: No such file or directory"),
    (["--workdir=nowhere", "--text=da", "--out=x.html"], "there is no directory nowhere"),
    (["--workdir={}", f"--text={'água ' * 110}", "--out=x.html"], TOO_LONG),
    (["--workdir={}", f"--text={'água ' * 110}", "--png=x.png"], TOO_LONG),
    (["--workdir={}", f"--text={'água ' * 300}", "--out=x.html"], "1500 tokens are longer than the 1024 that "
     "config.max_len has room for"),
])
def test_wrong_flags_end_with_one_line(program, saved, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    ended = program("attention", *(argument.format(saved("decoder")[0]) for argument in arguments))
    assert ended.error == f"error: {message}"
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_long_texts_single_map(program, saved, tmp_path):
    ended = program("attention", f"--workdir={saved('decoder')[0]}", f"--text={'água ' * 110}", "--layer=0", "--head=0",
                    f"--png={tmp_path / 'x.png'}")
    assert ended.status == 0, ended.err


def test_a_masked_models_target(program, saved):
    ended = program("attention", f"--workdir={saved('encoder')[0]}", "--text=da", "--target=o", "--out=x.html")
    assert ended.error == "error: an encoder reads one text: it has no target"
