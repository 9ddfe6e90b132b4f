"""The attention kernel of docs/extending/kernels.md: decoding, maps, gradients, eight devices, save
and load."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import MeshConfig
from transformer_jax.ops.kernels import KERNELS
from transformer_jax.sharding import batch_sharding, make_mesh, shardings

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "extending" / "kernels.md"
TOKENS = np.random.default_rng(0).integers(32, size=(8, 12), dtype=np.int32)


@pytest.fixture(scope="module")
def model():
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S):
        exec(compile(block, PAGE.name, "exec"), scope)
    yield scope["model"]
    del KERNELS["plain"]  # else "auto" would choose it in the tests of other files


@pytest.fixture(scope="module")
def by_xla(model):
    """The same weights under the built-in implementation."""
    config = model.config.replace(attention_implementation="xla")
    other = tj.Decoder(config, key=jax.random.key(1))
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(model))


@pytest.mark.long
def test_logits_and_gradients_are_those_of_xla(model, by_xla):
    np.testing.assert_allclose(tj.forward(model, TOKENS), tj.forward(by_xla, TOKENS), atol=2e-6)
    batch = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}
    ours, theirs = (jax.jit(jax.grad(lambda m: tj.training.next_token_loss()(m, batch)[0]))(m) for m in (model, by_xla))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_it_is_the_one_that_computes(model, monkeypatch):
    calls = []
    kernel = KERNELS["plain"]
    monkeypatch.setitem(KERNELS, "plain", tj.ops.Kernel("plain", kernel.why_not, lambda *a, **k: (
        calls.append(1), kernel.attend(*a, **k))[1]))
    model(jnp.asarray(TOKENS))
    tj.ops.attend(*(jnp.ones((1, 4, 2, 8)),) * 3)  # "auto" asks it first
    assert len(calls) == 2  # once a scan, and once by "auto"


@pytest.mark.long
def test_cached_padded_and_alone_decode_the_same(model, by_xla):
    prompts = [[1, 2, 3, 4, 5], [7], [9, 10, 11]]
    greedy = tj.Sampling(temperature=0)
    together = tj.generate(model, prompts, max_new_tokens=6, sampling=greedy).tokens
    assert together == tj.generate(by_xla, prompts, max_new_tokens=6, sampling=greedy).tokens
    for prompt, row in zip(prompts, together, strict=True):
        assert tj.generate(model, [prompt], max_new_tokens=6, sampling=greedy).tokens == [row]
        text = list(prompt)
        for token in row:  # without a cache
            assert token == int(tj.forward(model, np.asarray([text]))[0, -1].argmax())
            text.append(token)


def test_maps_are_the_float64_softmax(model):
    trace = tj.trace(model, TOKENS)
    q, k = (np.asarray(x, np.float64) for x in (trace.queries, trace.keys))
    scores = np.einsum("LBTNH,LBSNH->LBNTS", q, k.repeat(2, axis=3)) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(trace.attention(), weights / weights.sum(-1, keepdims=True), atol=2e-6)


def test_eight_devices_and_a_saved_model(model, tmp_path):
    expected = tj.forward(model, TOKENS)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, shardings(model, mesh))
        logits = tj.forward(placed, jax.device_put(TOKENS, batch_sharding(mesh)))
        np.testing.assert_allclose(logits, expected, atol=5e-6)
    tj.save(tmp_path, tj.Bundle(model=model, tokenizer=None, config=model.config))
    loaded = tj.load(tmp_path)
    assert loaded.config.attention_implementation == "plain"
    np.testing.assert_array_equal(tj.forward(loaded.model, TOKENS), expected)


def test_unsupported_inputs_raise_with_the_reason(model):
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match="implementation='plain' cannot compute this attention: it takes no bias"):
        tj.ops.attend(q, q, q, bias=jnp.zeros((1, 2, 4, 4)), implementation="plain")
    tj.ops.attend(q, q, q, bias=jnp.zeros((1, 2, 4, 4)))  # "auto" passes over it
    with pytest.raises(ValueError, match="'xla' is a built-in"):
        tj.ops.register_kernel(tj.ops.Kernel("xla", None, None))
    with pytest.raises(ValueError, match="attention_implementation='plian' is not one of .*; did you mean 'plain'"):
        tj.ModelConfig(attention_implementation="plian")
