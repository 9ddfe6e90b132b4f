"""A mixture of experts on eight simulated devices: the gradient is that of one device, and the
compiled program has the expected collectives."""

import functools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_collectives import _COLLECTIVE

import transformer_jax as tj
from transformer_jax.config import ExpertConfig, MeshConfig
from transformer_jax.sharding import batch_sharding, make_mesh, shardings
from transformer_jax.training.objectives import next_token_loss

# Sizes that identify each array.
V, L, D, F, E, k, B, T = 80, 2, 32, 24, 4, 2, 8, 20
CONFIG = tj.ModelConfig(vocab_size=V, max_len=T, num_layers=L, num_heads=4, model_dim=D, mlp_dim=F, positions="rope",
                        norm="rmsnorm", activation="swiglu", use_bias=False, init_std=0.2,
                        moe=ExpertConfig(E, k, shared_experts=1))
LAYOUTS = {"expert": dict(data=2, expert=4), "all": dict(fsdp=2, expert=2, tensor=2),
           "sequence": dict(data=1, expert=2, sequence=2, tensor=2)}


@functools.cache
def gradient(name):
    """Loss, gradient, the shardings, and the collectives of the program: kind -> shapes."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if name is None else make_mesh(MeshConfig(**LAYOUTS[name]))
    model = jax.jit(lambda key: tj.Decoder(CONFIG, key=key))(jax.random.key(0, impl="unsafe_rbg"))
    rows = np.random.default_rng(0).integers(V, size=(B, T + 1)).astype(np.int32)
    segments = (np.arange(T) >= np.arange(B)[:, None]).astype(np.int32)  # padded on the left
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "segment_ids": segments,
             "weights": segments.astype(np.float32)}
    key = jax.random.key(1)
    with jax.set_mesh(mesh):
        weights = jax.device_put(model, shardings(model, mesh))
        program = jax.jit(jax.value_and_grad(lambda model, batch: next_token_loss()(model, batch, key)[0]),
                          out_shardings=(None, shardings(model, mesh))).lower(
            weights, jax.device_put(batch, batch_sharding(mesh))).compile()
        value, grads = program(weights, jax.device_put(batch, batch_sharding(mesh)))
    found = {}
    for line in program.as_text().splitlines():
        if match := _COLLECTIVE.search(line):
            shapes = re.findall(r"[a-z]\w*\[([\d,]*)\]", match[1])
            found.setdefault(match[2], set()).update(
                math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)
    return float(value), jax.tree.map(np.asarray, grads), weights, found


@pytest.mark.long
@pytest.mark.parametrize("name", ["expert", "all", "sequence"])
def test_loss_and_gradient_are_those_of_one_device(name, capfd):
    value, grads, _, _ = gradient(name)
    wanted, wanted_grads, _, _ = gradient(None)
    assert "rematerialization" not in capfd.readouterr().err
    assert value == pytest.approx(wanted, rel=1e-6)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(wanted_grads))
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_each_device_holds_its_experts():
    mlp = gradient("all")[2].stack.blocks.mlp
    assert mlp.up.get_value().sharding.spec == P(None, "expert", "fsdp", "tensor")
    assert mlp.down.get_value().sharding.spec == P(None, "expert", "tensor", "fsdp")
    assert mlp.router.kernel.get_value().sharding.spec == P(None, "fsdp", None)
    assert mlp.up.get_value().sharding.shard_shape((L, E, D, F)) == (L, E // 2, D // 2, F // 2)


def test_experts_exchange_tokens_and_no_weights():
    found = gradient("expert")[3]
    tokens = B // 2 * T * D  # the rows of the four devices that share the experts
    assert tokens in found["all-gather"]
    assert tokens // 4 in found["reduce-scatter"]
    assert found["all-gather"].isdisjoint({E * D * F, E // 4 * D * F, L * E * D * F})


def test_fsdp_gathers_the_experts_of_a_device_alone():
    all_gathers = gradient("all")[3]["all-gather"]
    assert E // 2 * D * F // 2 in all_gathers
    assert all_gathers.isdisjoint({E * D * F, E * D * F // 2, L * E * D * F, L * E // 2 * D * F // 2})
