"""The collectives in the compiled gradient of each layout are the expected ones, and no others."""

import functools
import math
import re

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import LossConfig, MeshConfig
from transformer_jax.sharding import batch_sharding, make_mesh, shardings
from transformer_jax.training.objectives import next_token_loss

# Sizes that identify each array.
V, L, D, F, N, K, H, B, T = 80, 3, 32, 160, 4, 2, 8, 8, 24
CONFIG = tj.ModelConfig(vocab_size=V, max_len=T, num_layers=L, num_heads=N, num_kv_heads=K, model_dim=D, mlp_dim=F)
LAYOUTS = {"data": dict(data=8), "fsdp": dict(fsdp=8), "tensor": dict(data=4, tensor=2), "all": dict(fsdp=2, tensor=2),
           "sequence": dict(fsdp=2, sequence=4), "long": dict(tensor=2, sequence=4)}
_COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


@functools.cache
def model():
    return jax.tree.map(np.asarray, jax.jit(lambda key: tj.Decoder(CONFIG, key=key))(
        jax.random.key(0, impl="unsafe_rbg")))


@functools.cache
def gradient(name, most_logits=2**26):
    """Loss, gradient, and the collectives of the program: kind -> shapes."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if name is None else make_mesh(MeshConfig(**LAYOUTS[name]))
    rows = np.random.default_rng(0).integers(V, size=(B, T + 1)).astype(np.int32)
    loss = next_token_loss(LossConfig(most_logits=most_logits))  # summed over the tokens
    with jax.set_mesh(mesh):
        weights = jax.device_put(model(), shardings(model(), mesh))
        batch = jax.device_put({"tokens": rows[:, :-1], "targets": rows[:, 1:]}, batch_sharding(mesh))
        program = jax.jit(jax.value_and_grad(lambda model, batch: loss(model, batch)[0]),
                          out_shardings=(None, shardings(model(), mesh))).lower(weights, batch).compile()
        value, grads = program(weights, batch)
    found = {}
    for line in program.as_text().splitlines():
        if match := _COLLECTIVE.search(line):
            shapes = re.findall(r"[a-z]\w*\[([\d,]*)\]", match[1])
            found.setdefault(match[2], []).extend(tuple(map(int, filter(None, shape.split(",")))) for shape in shapes)
    return float(value), jax.tree.map(np.asarray, grads), found


def sizes(shapes):
    return {math.prod(shape) for shape in shapes}


@pytest.mark.long
@pytest.mark.parametrize("most_logits", [2**26, 0])
@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_gradient_are_those_of_one_device(name, most_logits, capfd):
    if not most_logits and name not in ("all", "long"):
        pytest.skip("the chunked loss is tried where the vocabulary is divided")
    value, grads, _ = gradient(name, most_logits)
    wanted, wanted_grads, _ = gradient(None)
    # XLA would say so here if it had found no better way than to gather an array first.
    assert "rematerialization" not in capfd.readouterr().err
    assert value == pytest.approx(wanted, rel=1e-6)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_over_data_alone_gradients_are_summed_and_nothing_else_is_sent():
    assert set(gradient("data")[2]) == {"all-reduce"}


def test_fsdp_gathers_weights_layer_by_layer():
    all_gathers = gradient("fsdp")[2]["all-gather"]
    assert {D * F, D * N * H, D * K * H, V * D} <= sizes(all_gathers)  # a layer's kernels, and the table for logits
    assert max(sizes(all_gathers)) == D * F
    assert sizes(all_gathers).isdisjoint({L * D * F, L * D * N * H, L * D * K * H})
    assert [shape for shape in all_gathers if math.prod(shape) == V * D] == [(V, D)]  # once, not again for the tokens
    # Both kernels of the feed-forward layer, and again for the gradient: between, no device holds
    # them whole.
    assert sum(math.prod(shape) == D * F for shape in all_gathers) == 4


def test_tensor_parallel_layers_gather_no_weight():
    found = gradient("tensor")[2]
    kernels = {D * F, D * N * H, D * K * H, V * D}
    assert "all-reduce" in found and sizes(found.get("all-gather", [])).isdisjoint(kernels)
    assert {2 * T * D} <= sizes(found["all-reduce"])  # what each layer adds to the stream, of a device's 2 rows


def test_with_all_axes_weights_are_gathered_over_fsdp_alone():
    all_gathers = gradient("all")[2]["all-gather"]
    assert {D * F // 2, D * N * H // 2, D * K * H // 2, V * D // 2} <= sizes(all_gathers)
    assert max(sizes(all_gathers)) <= D * F // 2


@pytest.mark.parametrize("name", ["sequence", "long"])
def test_over_the_sequence_keys_and_values_are_gathered_and_no_scores(name):
    all_gathers = gradient(name)[2]["all-gather"]
    parts = LAYOUTS[name]
    keys = B // parts.get("fsdp", 1) * T * K // parts.get("tensor", 1) * H
    assert sum(math.prod(shape) == keys for shape in all_gathers) >= 2
    assert not [shape for shape in all_gathers if shape.count(T) > 1]
    if name == "long":
        assert max(sizes(all_gathers)) == keys  # no weight
