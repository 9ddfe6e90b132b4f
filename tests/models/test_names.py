"""The names for reading traces and changing forward passes, and texts in place of arrays."""

import functools
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_decoder import random_decoder

import transformer_jax as tj
from transformer_jax.inspection.interventions import patch
from transformer_jax.models.functional import make_model
from transformer_jax.nn.sites import SITES

BASE = tj.ModelConfig(vocab_size=17, max_len=12, num_layers=3, num_heads=4, num_kv_heads=2, model_dim=16, mlp_dim=24,
                      activation="swiglu", positions="alibi")
TOKENS = jax.random.randint(jax.random.key(5), (2, 9), 0, BASE.vocab_size)
STORED = ("residual", "queries", "keys", "values", "head_output", "attention_output", "residual_middle",
          "mlp_input", "neurons", "mlp_output")


@functools.cache
def make(family="decoder"):
    if family == "decoder":
        return random_decoder(BASE)
    positions = {"positions": "learned", "init_std": 0.3}
    return make_model(BASE.replace(family=family, num_encoder_layers=2 if family == "encoder_decoder" else None,
                                   **positions), key=jax.random.key(1))


@functools.cache
def traced(family="decoder"):
    tokens = (TOKENS[:, :5], TOKENS) if family == "encoder_decoder" else (TOKENS,)
    return tj.trace(make(family), *tokens)


@pytest.mark.long
@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_every_name_has_the_shape_that_is_listed(family):
    trace = traced(family)
    for name, shape in trace.names().items():
        assert trace[name].shape == shape, name
        site = name.rpartition(".")[2]
        assert site in SITES or site.endswith(("scores", "pattern"))
        if name.startswith("layers."):
            np.testing.assert_array_equal(trace[site][int(name.split(".")[1])], trace[name])
    assert "layers.0..2.neurons" in repr(trace) and "[2, 9, 24]" in repr(trace)
    assert ("layers.1.encoder_neurons" in trace.names()) == (family == "encoder_decoder")


def test_the_names_of_captured_values_match_the_values():
    trace, model = traced(), make()
    for site in STORED:
        np.testing.assert_array_equal(trace[site], getattr(trace.layers, site))
    np.testing.assert_allclose(trace["residual_middle"], trace["residual"] + trace["attention_output"], atol=1e-6)
    norm = model.stack.blocks.mlp_norm
    np.testing.assert_allclose(trace["mlp_input"], jax.vmap(lambda norm, x: norm(x))(
        norm, trace["residual_middle"]), atol=1e-5)
    np.testing.assert_array_equal(trace["final"], trace.final)
    pattern, scores = np.asarray(trace["pattern"], np.float64), np.asarray(trace["scores"], np.float64)
    exponents = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(pattern, exponents / exponents.sum(-1, keepdims=True), atol=1e-6)
    assert (np.isneginf(scores) == ~np.tri(9, dtype=bool)).all()
    kernel = np.asarray(model.stack.blocks.mlp.down.kernel[...], np.float64)
    bias = np.asarray(model.stack.blocks.mlp.down.bias[...], np.float64)[:, None, None]
    np.testing.assert_allclose(trace["mlp_output"], np.einsum("lbtf,lfd->lbtd", trace["neurons"], kernel) + bias,
                               atol=2e-4)
    np.testing.assert_array_equal(trace["layers.-1.keys"], trace["layers.2.keys"])


@pytest.mark.parametrize(("name", "words"), [
    ("layers.1.head_ouput", "did you mean 'layers.1.head_output'"), ("patern", "did you mean 'pattern'"),
    ("layers.3.keys", "no value named 'layers.3.keys'"), ("layers.0.final", "no value named 'layers.0.final'"),
    ("x", "names.. lists"),
])
def test_a_name_that_there_is_not(name, words):
    with pytest.raises(KeyError, match=words):
        traced()[name]


def test_unread_values_are_not_computed():
    def program(function):
        return jax.jit(function).lower(make(), TOKENS).compile().as_text()

    neurons = r"f32\[3,2,9,24\]"  # of all layers together
    assert re.search(neurons, program(lambda model, tokens: model(tokens).trace["neurons"]))
    for read in (lambda out: out.logits, lambda out: out.trace["residual"], lambda out: out.trace["layers.1.pattern"]):
        assert not re.search(neurons, program(lambda model, tokens, read=read: read(model(tokens))))
    gradient = program(jax.grad(lambda model, tokens: model(tokens).logits.sum()))
    assert not re.search(r"\[3,2,4,9,9\]", gradient)


@pytest.mark.parametrize("site", ["queries", "keys", "values", "neurons"])
def test_activations_of_another_text_can_be_patched_in(site):
    other = tj.trace(make(), (TOKENS + 1) % 17)
    out = tj.trace(make(), TOKENS, intervene=patch(site, 1, other[f"layers.1.{site}"], positions=4))
    wanted = traced()[f"layers.1.{site}"].at[:, 4].set(other[f"layers.1.{site}"][:, 4])
    np.testing.assert_allclose(out[f"layers.1.{site}"], wanted, atol=1e-5)
    assert np.abs(out["final"] - traced()["final"])[:, 4:].max() > 1e-3
    np.testing.assert_allclose(out["final"][:, :4], traced()["final"][:, :4], atol=1e-4)


def test_the_final_stream_can_be_put_in_place():
    other = tj.trace(make(), (TOKENS + 1) % 17)
    logits = tj.forward(make(), TOKENS, intervene=patch("final", 2, other["final"]))
    np.testing.assert_allclose(logits, tj.forward(make(), (TOKENS + 1) % 17), atol=1e-4)


def test_a_head_of_the_keys_is_one_of_the_key_heads():
    with pytest.raises(ValueError, match="index 2 is out of range for 2 heads"):
        tj.forward(make(), TOKENS, intervene=patch("keys", 0, 0.0, heads=2))


def test_mistakes_in_a_custom_intervention_say_what_to_write():
    def asks_if(site, layer, value):
        if site == "residual" and layer == 1:
            return value * 0
        return value

    with pytest.raises(ValueError, match=r"jnp.where\(layer == 1, new, value\)"):
        tj.forward(make(), TOKENS, intervene=asks_if)
    with pytest.raises(ValueError, match="'mlp_ouput' is not one of .*did you mean 'mlp_output'"):
        tj.forward(make(), TOKENS, intervene=lambda site, layer, value: value * 0 if site == "mlp_ouput" else value)
    named = {"mlp_output": 0.0}
    tj.forward(make(), TOKENS, intervene=lambda site, layer, value: value * named.get(site, 1.0))


class Letters:
    """The letters of the alphabet as tokens from 5 on; <s> is 1 and </s> is 2."""

    bos_id, eos_id = 1, 2

    def encode(self, text):
        return [5 + ord(letter) - ord("a") for letter in text]

    def encode_prompt(self, text):
        return self.encode(text) or [0]

    def encode_source(self, text):
        return [*self.encode(text), 2]

    def encode_target(self, text, *, after=()):
        assert after == (1,)
        return self.encode(text)

    def encode_masked(self, text):
        return [1, *self.encode(text), 2]


@pytest.mark.long
@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder_decoder"])
def test_strings_and_lists_are_read_as_arrays_are(family):
    model, pair = make(family), family == "encoder_decoder"
    rows = {"decoder": [[5, 6, 7], [8]], "encoder": [[1, 5, 6, 7, 2], [1, 8, 2]],
            "encoder_decoder": [[5, 6, 7, 2], [8, 2]]}[family]
    targets = [([[1, 9, 10], [1, 9]])] if pair else []
    texts = (["abc", "d"], ["ef", "e"]) if pair else (["abc", "d"],)
    logits = tj.forward(model, *texts, tokenizer=Letters())
    np.testing.assert_array_equal(logits, tj.forward(model, rows, *targets))
    for index, row in enumerate(rows):
        alone = [row, *(target[index] for target in targets)]
        wanted = tj.forward(model, *(jnp.asarray([ids]) for ids in alone))
        np.testing.assert_allclose(logits[index, :len(alone[-1])], wanted[0], atol=2e-5)
        np.testing.assert_allclose(tj.forward(model, *alone), wanted, atol=2e-5)
    np.testing.assert_allclose(tj.forward(model, *(text[0] for text in texts), tokenizer=Letters()),
                               logits[:1], atol=2e-5)


@pytest.mark.parametrize(("text", "words"), [
    ("abc", "strings need tokenizer"), ([], "the list of texts is empty"), ([[1], []], "is not a text"),
    ([1.5], "is not a text"), ([1, 17], "outside the vocabulary"),
])
def test_unsuitable_texts_raise(text, words):
    with pytest.raises(ValueError, match=words):
        tj.trace(make(), text)


@pytest.mark.long
def test_the_page_of_names_runs():
    page = pathlib.Path(__file__).resolve().parents[2] / "docs" / "notation.md"
    config = tj.ModelConfig(vocab_size=32, max_len=32, num_layers=4, num_heads=6, model_dim=24, mlp_dim=8)
    tokenizer = types.SimpleNamespace(encode_prompt=lambda text: [ord(letter) % 32 for letter in text])
    names = {"tj": tj, "jax": jax, "jnp": jnp, "model": random_decoder(config), "tokenizer": tokenizer, "answer": 3}
    names["tokens"] = jnp.asarray([tokenizer.encode_prompt("The key to the cabinets")])
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    np.testing.assert_allclose(names["gradients"]["neurons"][3], names["gradient"], atol=1e-5)
    assert names["gradients"]["head_output"].shape == names["trace"]["head_output"].shape
    step = jnp.zeros_like(names["gradient"]).at[0, -1, 2].set(1e-2)
    slope = (names["loss"](step) - names["loss"](-step)) / 2e-2
    np.testing.assert_allclose(names["gradient"][0, -1, 2], slope, rtol=2e-2)
    listed = re.findall(r"^\| `(\w+)` \|", page.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted([*(site for site, kind in SITES.items() if kind == "self"), "scores", "pattern"])


@pytest.mark.parametrize("residual", ["parallel", "parallel_shared"])
def test_blocks_whose_parts_are_side_by_side_have_no_middle(residual, tmp_path):
    model = random_decoder(BASE.replace(residual=residual))
    assert "layers.0.residual_middle" not in tj.trace(model, TOKENS).names()
    with pytest.raises(ValueError, match="no site 'residual_middle', because attention and the feed-forward"):
        tj.models.site_gradients(model, TOKENS, sites=["residual_middle"], metric=lambda logits: logits.sum())
    with pytest.raises(ValueError, match=r"layers.0.residual_middle' is not a value that the model has"):
        tj.inspection.collect(model, [[1, 2, 3]], "layers.0.residual_middle", tmp_path / "activations")
