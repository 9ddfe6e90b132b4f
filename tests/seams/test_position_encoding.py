"""The encodings of docs/extending/positions.md: maps, decoding, gradients, eight devices, save and
load."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import MeshConfig
from transformer_jax.models.functional import make_model
from transformer_jax.nn.positions import BUILT_IN, ENCODINGS
from transformer_jax.sharding import make_mesh, shardings

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "extending" / "positions.md"
SCOPE: dict = {}
for block in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S):
    exec(compile(block, PAGE.name, "exec"), SCOPE)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyBias:
    """Depends on the positions of the key and of the query in their text, and not only on
    distances."""

    positions_BT: jax.Array
    key_positions_BS: jax.Array

    def materialize(self, num_queries, num_keys, queries=None, keys=None):
        rows = jnp.arange(num_queries) if queries is None else queries
        columns = jnp.arange(num_keys) if keys is None else keys
        return jnp.cos(1.0 * self.key_positions_BS[:, None, None, columns] * self.positions_BT[:, None, rows, None])


@tj.nn.register_positions
class Absolute(tj.nn.PositionEncoding):
    name = "absolute_bias"

    def bias(self, config, weights, places):
        return KeyBias(places.positions_BT, places.key_positions_BS)


@tj.nn.register_positions
class Together(SCOPE["HalfRotary"], SCOPE["LearnedWaves"], SCOPE["LogDistance"]):
    """All three kinds in one encoding."""

    name = "together"


NAMES = ("half_rotary", "learned_waves", "log_distance", "absolute_bias")
CONFIG = tj.ModelConfig(vocab_size=16, max_len=16, num_layers=2, num_heads=4, num_kv_heads=2, model_dim=32,
                        init_std=0.3)
TOKENS = np.random.default_rng(0).integers(16, size=(2, 10), dtype=np.int32)
SEGMENTS = np.asarray([[1, 1, 1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 2, 2, 2, 0, 0, 0]], np.int32)
GREEDY = tj.Sampling(temperature=0)


@functools.cache
def make(name, **changes):
    return make_model(CONFIG.replace(positions=name, **changes), key=jax.random.key(1))


def added(name, weights, position):
    """What each position adds to an embedding ``[D]``, in float64."""
    if name not in ("learned_waves", "together"):
        return np.zeros(32)
    angles = position / 10_000 ** (np.arange(0, 32, 2) / 32)
    return np.float64(weights[...]) * np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(-1)


def rotated(name, x_NH, position):
    """Heads of eight channels, of which the first and third, and the second and fourth, turn."""
    if name not in ("half_rotary", "together"):
        return x_NH
    numbers = (x_NH[:, :2] + 1j * x_NH[:, 2:4]) * np.exp(1j * position * 10_000.0 ** (-np.arange(2) / 2))
    return np.concatenate([numbers.real, numbers.imag, x_NH[:, 4:]], axis=-1)


def bias_of(name, weights, query, key):
    """What each head adds to the score of two positions, ``[N]``."""
    if name == "absolute_bias":
        return np.full(4, np.cos(query * key))
    return -np.float64(weights[...]) * np.log1p(abs(query - key)) if name in ("log_distance", "together") else 0.0


def maps64(model, tokens, segments):
    """The maps ``[N, T, T]`` of the first layer for one packed row, written out in float64."""
    name, T = model.config.positions, len(tokens)
    position = [t - list(segments).index(segments[t]) for t in range(T)]
    x_TD = np.stack([np.float64(model.embeddings.token[...])[token] + added(name, model.embeddings.position, p)
                     for token, p in zip(tokens, position, strict=True)])
    x_TD = x_TD - x_TD.mean(-1, keepdims=True)
    x_TD /= np.sqrt((x_TD**2).mean(-1, keepdims=True) + CONFIG.norm_epsilon)
    attention = model.stack.blocks.attention
    q_TNH, k_TKH = (np.stack([rotated(name, (x_D @ np.float64(linear.kernel[0])).reshape(-1, 8), p)
                              for x_D, p in zip(x_TD, position, strict=True)])
                    for linear in (attention.query, attention.key))
    maps = np.zeros((4, T, T))
    for query in range(T):
        visible_keys = [key for key in range(query + 1) if segments[key] == segments[query] != 0]
        scores = [(q_TNH[query] * k_TKH[key].repeat(2, axis=0)).sum(-1) / np.sqrt(8)
                  + bias_of(name, model.stack.relative, position[query], position[key]) for key in visible_keys]
        if visible_keys:
            weights = np.exp(np.stack(scores) - np.max(scores, axis=0))
            maps[:, query, visible_keys] = (weights / weights.sum(0)).T
    return maps


@pytest.mark.parametrize("name", [*NAMES, "together"])
def test_maps_of_packed_rows_are_the_float64_softmax(name):
    trace = tj.trace(make(name), TOKENS, segment_ids_BT=SEGMENTS)
    for row in range(2):
        wanted = maps64(make(name), TOKENS[row], SEGMENTS[row])
        np.testing.assert_allclose(trace["layers.0.pattern"][row], wanted, atol=5e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", [*NAMES, "together"])
def test_a_padded_pass_with_a_cache_equals_one_without(name):
    model, lengths = make(name).for_decoding(), (10, 6)
    segments = np.arange(10) >= 10 - np.array(lengths)[:, None]

    @jax.jit
    def in_steps(model, cache):
        logits = []
        for start, stop in ((0, 6), (6, 7), (7, 10)):
            out = model.step(TOKENS[:, start:stop], cache, segment_ids_BT=jnp.asarray(segments[:, start:stop], int))
            logits, cache = [*logits, out.logits], out.cache
        return jnp.concatenate(logits, axis=1)

    found = in_steps(model, model.start_cache(2, 16))
    # A text alone, starting at the left: the padding after it has no effect.
    alone = tj.forward(make(name), np.stack([TOKENS[0], np.roll(TOKENS[1], -4)]), segment_ids_BT=segments[:, ::-1])
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found[row, 10 - length :], alone[row, :length], atol=2e-5)


@pytest.mark.long
@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_beam_search_finds_probabilities_of_the_full_pass(family):
    for name in ("together", "absolute_bias") if family == "decoder" else ("together",):
        model = make(name, family=family)
        prompts = [[1, 2, 3, 4, 5], [7]]
        found = tj.beam_search(model, prompts, beam_size=3, max_new_tokens=4, n_best=2,
                               **({} if family == "decoder" else {"start_id": 1}))
        for prompt, hypotheses in zip(prompts, found.n_best, strict=True):
            for hypothesis in hypotheses:
                before = [1] if family == "encoder_decoder" else prompt
                text = np.asarray([[*before, *hypothesis.tokens]])
                inputs = (text[:, :-1],) if family == "decoder" else (np.asarray([prompt]), text[:, :-1])
                log_p = jax.nn.log_softmax(tj.forward(model, *inputs))[0, len(before) - 1 :]
                wanted = sum(log_p[place, token] for place, token in enumerate(hypothesis.tokens))
                np.testing.assert_allclose(hypothesis.logprob, wanted, atol=1e-4)


def test_an_intervention_removes_an_edge():
    def cut(site, layer, value):
        return value.at[:, :, :, 0].set(-jnp.inf) if site == "attention_bias" else value

    maps = tj.trace(make("together"), TOKENS[:, 1:6], intervene=cut)["layers.0.pattern"]
    wanted = maps64(make("together"), TOKENS[0, 1:6], np.ones(5, int))
    wanted[..., 0] = 0.0
    np.testing.assert_allclose(maps[0, :, 1:], wanted[:, 1:] / wanted[:, 1:].sum(-1, keepdims=True), atol=5e-6)


@jax.jit
def value_and_gradient(model, tokens):
    def loss(model):
        return tj.training.next_token_loss()(model, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})[0]

    return jax.value_and_grad(loss)(model)


@pytest.mark.long
def test_gradients_are_slopes_and_the_same_on_eight_devices():
    model, tokens = make("together"), jnp.asarray(np.tile(TOKENS, (2, 1))[:, :9])
    value, gradient = value_and_gradient(model, tokens)
    for read in (lambda model: model.embeddings.position, lambda model: model.stack.relative):
        def moved(amount, read=read):
            copy = jax.tree.map(lambda leaf: leaf, model)
            weights = read(copy)
            weights.set_value(weights[...] + amount * jnp.arange(1.0, 1.0 + weights[...].size) / weights[...].size)
            return float(value_and_gradient(copy, tokens)[0])

        slope = read(gradient)[...]
        along = float((slope * jnp.arange(1.0, 1.0 + slope.size)).sum() / slope.size)
        np.testing.assert_allclose(along, (moved(1e-2) - moved(-1e-2)) / 2e-2, rtol=2e-2)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, shardings(model, mesh))
        assert not placed.embeddings.position[...].sharding.is_fully_replicated
        spread = value_and_gradient(placed, tokens)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=3e-5), spread, (value, gradient))


@pytest.mark.long
def test_a_saved_model_loads_and_generates_the_same(tmp_path):
    model = make("together")
    tj.save(tmp_path, tj.Bundle(model=model, tokenizer=None, config=model.config))
    loaded = tj.load(tmp_path)
    assert loaded.config.positions == "together"
    jax.tree.map(np.testing.assert_array_equal, loaded.model, model)
    prompts = [[1, 2, 3, 4, 5], [7]]
    together = tj.generate(loaded.model, prompts, max_new_tokens=4, sampling=GREEDY).tokens
    for prompt, row in zip(prompts, together, strict=True):
        text = [*prompt, *row]
        logits = tj.forward(model, np.asarray([text + [0] * (9 - len(text))]))
        assert row == logits[0, len(prompt) - 1 : len(text) - 1].argmax(-1).tolist()


def test_built_in_encodings_have_the_same_form():
    assert set(BUILT_IN) == {"learned", "sinusoidal", "sinusoidal_halves", "sinusoidal_fairseq", "rope", "alibi",
                             "relative", "none"}
    assert {name for name in BUILT_IN if BUILT_IN[name].has_bias} == {"alibi", "relative"}
    assert not ENCODINGS["half_rotary"].has_bias and ENCODINGS["log_distance"].has_bias


def test_invalid_registrations_raise():
    with pytest.raises(ValueError, match="'rope' is a built-in encoding"):
        tj.nn.register_positions(type("Mine", (tj.nn.PositionEncoding,), {"name": "rope"}))
    with pytest.raises(ValueError, match="Mine has no name"):
        tj.nn.register_positions(type("Mine", (tj.nn.PositionEncoding,), {}))
    with pytest.raises(ValueError, match="positions='half_rotari' is not one of .*; did you mean 'half_rotary'"):
        tj.ModelConfig(positions="half_rotari")
