"""Gradients with respect to sites, and errors of interventions that store or read traced values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.models.functional import make_model

CONFIG = tj.ModelConfig(vocab_size=11, max_len=8, num_layers=2, num_heads=2, model_dim=8, init_std=0.4)
TOKENS = np.asarray([[1, 2, 3, 2]], np.int32)


@functools.cache
def make(family="decoder"):
    return make_model(CONFIG.replace(family=family), key=jax.random.key(0))


def last(logits):
    return logits[0, -1, 3]


@pytest.mark.long
@pytest.mark.parametrize(("family", "site"), [("decoder", "final"), ("encoder_decoder", "cross_attention_bias")])
def test_gradients_are_slopes(family, site):
    model, tokens = make(family), (TOKENS,) * (2 if family == "encoder_decoder" else 1)
    gradient = tj.models.site_gradients(model, *tokens, metric=last, sites=[site])[site]
    direction = jnp.cos(jnp.arange(gradient.size, dtype=jnp.float32)).reshape(gradient.shape)

    @jax.jit
    def moved(amount):
        def add(name, layer, value):
            by = direction if site == "final" else direction[layer]
            return value + amount * by if name == site else value

        return last(model(*tokens, intervene=add).logits)

    slope = (moved(1e-2) - moved(-1e-2)) / 2e-2
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-2, atol=1e-4)


def test_gradients_of_a_changed_pass():
    """Nothing flows through heads that an intervention sets to zero."""
    ablated = tj.inspection.patch("head_output", 0, 0.0)
    found = tj.models.site_gradients(make(), TOKENS, metric=last, sites=["values"], intervene=ablated)["values"]
    assert not np.any(found[0]) and np.any(found[1])
    with pytest.raises(ValueError, match="has no site 'cross_values'"):
        tj.models.site_gradients(make(), TOKENS, metric=last, sites=["cross_values"])
    with pytest.raises(ValueError, match="did you mean 'neurons'"):
        tj.models.site_gradients(make(), TOKENS, metric=last, sites=["neuron"])


STORED = []


class Keeper:
    def __init__(self):
        self.recorded = {}

    def __call__(self, site, layer, value):
        return self.keep(site, layer, value)

    def keep(self, site, layer, value):
        self.recorded[str(site)] = value
        return value


def storing(how):
    recorded, box = [], None

    def by_append(site, layer, value):
        if site == "neurons":
            recorded.append(value.mean())
        return value

    def by_nonlocal(site, layer, value):
        nonlocal box
        box = value
        return value

    def by_global(site, layer, value):
        STORED.append((layer, value))
        return value

    def layer_only(site, layer, value):
        recorded.append(layer)
        return value

    return {"append": by_append, "nonlocal": by_nonlocal, "global": by_global, "method": Keeper().keep,
            "object": Keeper(), "layer": layer_only}[how]


@pytest.mark.parametrize("how", ["append", "nonlocal", "global", "method", "object", "layer"])
def test_a_value_that_is_stored_is_refused_with_what_to_write(how):
    calls = {"forward": lambda: tj.forward(make(), TOKENS, intervene=storing(how)),
             "the model": lambda: make()(jnp.asarray(TOKENS), intervene=storing(how))}
    if how == "append":
        calls["generate"] = lambda: tj.generate(make(), [[1, 2]], max_new_tokens=2, intervene=storing(how),
                                                sampling=tj.Sampling(temperature=0))
    for call in calls.values():
        STORED.clear()
        with pytest.raises(ValueError, match=r"stores a value outside of itself .*read it from the trace: `tj.trace\("):
            call()


def test_numbers_of_traced_values_are_refused_with_what_to_write():
    def as_number(site, layer, value):
        return value * float(value.mean())

    def as_array(site, layer, value):
        return jnp.asarray(np.asarray(value))

    def as_index(site, layer, value):
        return value * [1.0, 2.0][layer]

    for intervene in (as_number, as_array, as_index):
        with pytest.raises(ValueError, match="compute with jnp instead, and read values from the trace"):
            tj.forward(make(), TOKENS, intervene=intervene)


def test_names_shapes_and_enclosed_arrays_may_be_kept():
    shapes, factors = {}, jnp.ones(2)

    @jax.jit
    def with_traced(amount):
        def intervene(site, layer, value):
            shapes[str(site)] = value.shape
            return value * (amount * factors[layer]) if site == "neurons" else value

        return make()(jnp.asarray(TOKENS), intervene=intervene).logits

    np.testing.assert_allclose(with_traced(1.0), tj.forward(make(), TOKENS), atol=1e-6)
    assert shapes["neurons"] == (1, 4, 32)
