"""Examples of features equal those found by brute force, and the page shows them in a browser."""

import contextlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from tests.inspection import chromium
from tests.inspection.test_viewer import HOSTILE
from transformer_jax.config import SparseAutoencoderConfig
from transformer_jax.features.examples import Example, Feature, FeatureReport, histogram_borders

TEXTS = ["a b c a d", "b b a", "c d e f a b c d e f", "f e d c b a", "e", "a f a f a f"]


@pytest.fixture(scope="module")
def bundle():
    tokenizer = tj.Tokenizer.train(TEXTS, kind="word")
    config = tj.ModelConfig(vocab_size=tokenizer.vocab_size, max_len=8, num_layers=2, num_heads=2, model_dim=8)
    return tj.Bundle(tj.Decoder(config, key=jax.random.key(0)), tokenizer, config)


@pytest.fixture(scope="module")
def autoencoder():
    config = SparseAutoencoderConfig(site="layers.1.residual", input_dim=8, num_features=12, activation="relu")
    made = tj.features.SparseAutoencoder(config, key=jax.random.key(3))
    made.encoder_bias.set_value(jnp.full(12, -0.02).at[5].set(-100.0))
    return made


@pytest.mark.long
def test_the_examples_are_those_of_brute_force(bundle, autoencoder):
    report = tj.features.examine(bundle, autoencoder, TEXTS, features=[5, 2, 7], num_examples=3, width=4)
    rows = []  # of each token: its text, position, id and features
    for number, text in enumerate(TEXTS):
        ids = bundle.tokenizer.encode_prompt(text)
        for start in range(0, len(ids), 8):
            piece = np.array([ids[start:start + 8]])
            features = autoencoder.encode(tj.trace(bundle.model, piece)["layers.1.residual"][0])
            rows += [(number, start + place, piece[0, place], np.asarray(values))
                     for place, values in enumerate(features)]
    values = np.array([row[3] for row in rows])
    np.testing.assert_allclose(report.densities, (values > 0).mean(0))
    assert report.num_tokens == len(rows) and report.features[0].density == 0 and report.features[0].examples == []
    for feature in report.features[1:]:
        column = values[:, feature.number]
        best = {}
        for (text, *_), value in zip(rows, column, strict=True):
            best[text] = max(best.get(text, 0), value)
        expected = sorted((value for value in best.values() if value > 0), reverse=True)[:3]
        np.testing.assert_allclose([each.values.max() for each in feature.examples], expected, rtol=1e-5)
        for each in feature.examples:
            at = next(place for place, row in enumerate(rows) if row[:2] == (each.text, each.start))
            np.testing.assert_allclose(each.values, column[at:at + len(each.values)], atol=1e-6)
            assert each.tokens == [token.replace("\u00b7", " ") for token in bundle.tokenizer.pieces(
                [int(row[2]) for row in rows[at:at + len(each.tokens)]])] and len(each.tokens) <= 4
        assert feature.histogram.sum() == (column > 0).sum()
        assert feature.histogram.tolist() == np.histogram(column[column > 0], histogram_borders())[0].tolist()


def test_logit_effects_are_those_of_a_small_step(bundle, autoencoder):
    model, direction = bundle.model, np.asarray(autoencoder.decoder[...][2])
    feature = tj.features.examine(bundle, autoencoder, TEXTS, features=[2]).features[0]
    stream = np.random.default_rng(0).normal(size=8)
    scale = np.sqrt(stream.var() + model.config.norm_epsilon)
    direction = (direction - direction.mean()) * np.asarray(model.final_norm.scale[...])
    effects = np.asarray(model.embeddings.unembedding_VD) @ direction
    assert scale > 0  # only the order counts, so the scale of the norm is left out
    order = np.argsort(-effects)
    np.testing.assert_allclose([value for _, value in feature.raised], effects[order[:8]], rtol=1e-4)
    np.testing.assert_allclose([value for _, value in feature.lowered], effects[order[::-1][:8]], rtol=1e-4)


def test_by_default_features_are_chosen_from_rare_to_frequent(bundle, autoencoder):
    report = tj.features.examine(bundle, autoencoder, TEXTS, num_features=4)
    densities = [feature.density for feature in report.features]
    assert len(densities) == 4 and densities == sorted(densities) and densities[-1] == report.densities.max()
    with pytest.raises(ValueError, match="features: 12 is not from 0 to 11"):
        tj.features.examine(bundle, autoencoder, TEXTS, features=[12])
    with pytest.raises(ValueError, match="shown as text"):
        tj.features.examine(bundle.model, autoencoder, [[1, 2]])


def report():
    """A report with tokens that would harm a careless page."""
    values = np.linspace(0, 3, len(HOSTILE))
    histogram = np.zeros(40, int)
    histogram[18:22] = 1, 30, 4, 2
    features = [Feature(4, 0.01, [Example(HOSTILE, values, 7, 100)], histogram, [("<b>", 0.5)], [(" no", -0.5)]),
                Feature(9, 0.2, [Example([" two"], np.array([5.0]), 1, 0)], histogram, None, None)]
    return FeatureReport(features, np.array([0.01, 0.2, 0.0, 0.1]), 1000, "Features of <layers>")


def test_the_page_holds_the_data_and_nothing_else(tmp_path):
    text = report().to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == text and text.isascii()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["features"][0]["examples"][0]["tokens"] == HOSTILE and data["dead"] == 1
    assert text.count("<script>") == 1 and "http://" not in text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.long
@pytest.mark.parametrize("width", [400, 1300])
def test_the_page_in_a_browser(tmp_path, width):
    program = chromium.find()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(chromium.NAMES)} is installed, and CHROMIUM is not set")
    report().to_html(tmp_path / "page.html")
    with contextlib.closing(chromium.Page(program, tmp_path / "profile", width=width, height=800)) as page:
        for dark in (False, True):
            page.resize(width, 800, dark=dark)
            page.open((tmp_path / "page.html").as_uri())
            assert page.run("document.querySelector('#feature').selectedOptions[0].textContent").startswith("9 ")
            assert not page.run("document.querySelector('#effects').checkVisibility()")
            page.click("#next")
            shown = page.run("[...document.querySelectorAll('#examples .token')].map(each => each.textContent)")
            assert len(shown) == len(HOSTILE) and shown[0] == HOSTILE[0]
            assert page.run("document.querySelector('#raised span').textContent") == "<b>"
            assert page.run("document.querySelectorAll('#values rect').length") == 4
            assert page.run("document.documentElement.scrollWidth") == width and page.run("window.harmed") is None
            assert page.console == [] and page.requests == [(tmp_path / "page.html").as_uri()]
            image = page.screenshot("#examples .largest").reshape(-1, 3).astype(int)
            assert (image[:, 0] - image[:, 2]).max() > 60  # orange
