"""A custom bias, defined only in this file: its maps, its gradients, and the same results on eight
devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import MeshConfig
from transformer_jax.nn.attention import AttentionContext
from transformer_jax.ops import AttentionMask, attend
from transformer_jax.ops.positions import PositionBias
from transformer_jax.sharding import make_mesh

B, T, N, H = 2, 8, 2, 4
CONFIG = tj.ModelConfig(vocab_size=16, max_len=T, num_layers=2, num_heads=N, model_dim=N * H, positions="none",
                        init_std=0.4)
STRENGTH = np.asarray([0.7, -0.4], np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Undeclared:
    """Each head adds its learned strength times sin(distance); no field says what its axes are."""

    strength: jax.Array

    def materialize(self, num_queries, num_keys, queries=None, keys=None):
        rows = jnp.arange(num_queries) if queries is None else queries
        columns = jnp.arange(num_keys) if keys is None else keys
        return self.strength[None, :, None, None] * jnp.sin(1.0 * columns[None, :] - rows[:, None])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Declared:
    """The same bias, which stays structure on each device because its fields say what their axes
    are."""

    strength: jax.Array = dataclasses.field(metadata={"axes": "N"})
    query_start: jax.Array | int | None = None

    def materialize(self, num_queries, num_keys, queries=None, keys=None):
        rows = jnp.arange(num_queries) if queries is None else queries
        rows = rows + (0 if self.query_start is None else self.query_start)
        return Undeclared(self.strength).materialize(num_queries, num_keys, rows, keys)


def softmax64(q, k, strength, queries=slice(None)):
    """float64 weights ``[B, N, T, S]`` of causal attention with the bias, written out."""
    q, k = np.asarray(q, np.float64)[:, queries], np.asarray(k, np.float64)
    places = np.arange(T)
    offsets = places[None, :] - places[queries, None]
    scores = np.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(H) + np.float64(strength)[:, None, None] * np.sin(offsets)
    scores = np.where(offsets <= 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32) for _ in range(3)]


@pytest.fixture
def model_with_bias(monkeypatch):
    """A decoder whose layers all get the bias of this file."""
    def of(config, mask, positions_BT, **others):
        return AttentionContext(mask, Undeclared(jnp.asarray(STRENGTH)))

    monkeypatch.setattr(AttentionContext, "of", of)
    return tj.Decoder(CONFIG, key=jax.random.key(0))


def test_a_bias_is_any_object_with_the_method():
    assert isinstance(Undeclared(jnp.asarray(STRENGTH)), PositionBias)
    assert not isinstance(jnp.zeros(3), PositionBias)


@pytest.mark.parametrize("make", [Undeclared, Declared])
@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_attention_is_that_of_a_float64_softmax(make, implementation, qkv):
    got = attend(*qkv, AttentionMask.causal(), bias=make(jnp.asarray(STRENGTH)), implementation=implementation)
    wanted = np.einsum("BNTS,BSNH->BTNH", softmax64(*qkv[:2], STRENGTH), np.asarray(qkv[2], np.float64))
    np.testing.assert_allclose(got, wanted, atol=2e-6)


def test_the_maps_of_a_model_are_those_of_a_float64_softmax(model_with_bias):
    """Maps once raised ``TypeError: 'MyBias' object is not subscriptable`` for a bias that is not
    built in."""
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 16, (B, T)))
    trace = tj.trace(model_with_bias, tokens)
    for layer in range(2):
        wanted = softmax64(trace.queries[layer], trace.keys[layer], STRENGTH)
        np.testing.assert_allclose(trace.attention(layers=layer), wanted, atol=2e-6)
        np.testing.assert_allclose(trace.attention(layers=layer, queries=[5, 2], heads=1), wanted[:, 1][:, [5, 2]],
                                   atol=2e-6)
    array = dataclasses.replace(trace, bias=trace.bias.materialize(T, T))
    np.testing.assert_array_equal(array.attention(queries=[5, 2]), trace.attention(queries=[5, 2]))


def test_an_intervention_sees_the_bias_as_an_array(model_with_bias):
    shapes = {}

    def look(site, layer, value):
        if site == "attention_bias":
            shapes["shape"] = value.shape
            return value + 1.0  # the same for every key: the softmax does not change
        return value

    tokens = jnp.arange(T)[None] % 16
    plain, changed = tj.trace(model_with_bias, tokens), tj.trace(model_with_bias, tokens, intervene=look)
    assert shapes["shape"] == (1, N, T, T)
    np.testing.assert_allclose(changed.attention(), plain.attention(), atol=2e-6)


@pytest.mark.long
@pytest.mark.parametrize("mesh", [MeshConfig(data=1, fsdp=2, sequence=4), MeshConfig(data=1, sequence=4, tensor=2)],
                         ids=["rows and tokens", "tokens and heads"])
@pytest.mark.parametrize("make", [Undeclared, Declared])
def test_eight_devices_compute_what_one_does(make, mesh, qkv):
    @functools.partial(jax.jit, static_argnames="implementation")
    def value_and_gradients(q, k, v, strength, implementation):
        def loss(q, k, v, strength):
            out = attend(q, k, v, AttentionMask.causal(), bias=make(strength), implementation=implementation)
            return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out
        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, strength)

    alone = value_and_gradients(*qkv, STRENGTH, "xla")
    assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(alone))
    for implementation in ("xla", "chunked"):
        with jax.set_mesh(make_mesh(mesh)):
            spread = value_and_gradients(*qkv, STRENGTH, implementation)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=5e-6), spread, alone)
