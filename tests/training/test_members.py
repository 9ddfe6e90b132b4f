"""The step of several models beside steps of each alone, for every optimizer; their batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer_jax.config import ExperimentConfig, OptimConfig
from transformer_jax.data import Windows, make_batches
from transformer_jax.sharding import make_mesh
from transformer_jax.training.members import TRACEABLE, MemberBatches, init_members, make_members_step, member_of
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_train_step

VALUES = {"peak_lr": (0.01, 0.05), "muon_lr": (0.02, 0.1), "end_lr": (0.1, 0.5), "weight_decay": (0.0, 0.3),
          "beta1": (0.9, 0.8), "beta2": (0.9, 0.99), "epsilon": (1e-8, 1e-3), "clip_norm": (0.1, 10.0)}


def make_params(key):
    matrix, stacked = jax.random.split(key)
    return {"matrix": nnx.Param(jax.random.normal(matrix, (4, 6)), axes=("embed", "mlp")),
            "stacked": nnx.Param(jax.random.normal(stacked, (3, 4, 4)), axes=("embed", "mlp")),
            "bias": nnx.Param(jnp.zeros(6), axes=("mlp",))}


def loss_fn(params, batch, key):
    hidden = batch["x"] + jax.random.normal(key, batch["x"].shape) * 0.1
    for layer in range(3):
        hidden = jnp.tanh(hidden @ params["stacked"][...][layer])
    return jnp.square(hidden @ params["matrix"][...] + params["bias"][...] - batch["y"]).sum(), jnp.float32(len(hidden))


def batch(seed):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(4, 4)).astype(np.float32), "y": rng.normal(size=(4, 6)).astype(np.float32)}


@pytest.mark.parametrize("name", [name if name == "adamw" else pytest.param(name, marks=pytest.mark.long)
                                  for name in TRACEABLE])
def test_every_setting_has_the_effect_it_has_alone(name):
    mesh = make_mesh(devices=jax.devices()[:1])
    numbers = {field: np.array(VALUES[field]) for field in TRACEABLE[name]}
    base = OptimConfig(name=name, schedule="linear", warmup_steps=2)
    config = ExperimentConfig(steps=4, batch_size=4, optim=base)
    together = init_members(make_params, config, [5, 6], mesh)
    step = make_members_step(loss_fn, config, numbers, mesh)
    batches = [[batch(10 * number + member) for member in range(2)] for number in range(4)]
    for pair in batches:
        together, metrics = step(together, jax.tree.map(lambda *rows: np.stack(rows), *pair))
    for member in range(2):
        own = OptimConfig(**{"name": name, "schedule": "linear", "warmup_steps": 2}
                          | {field: float(values[member]) for field, values in numbers.items()})
        optimizer = make_optimizer(own, 4)
        alone = init_state(make_params, optimizer, jax.random.key(5 + member))
        single = make_train_step(loss_fn, optimizer)
        for pair in batches:
            alone, expected = single(alone, pair[member])
        for mine, theirs in zip(jax.tree.leaves(member_of(together.params, member)), jax.tree.leaves(alone.params),
                                strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=2e-6)
        assert float(metrics["loss"][member]) == pytest.approx(float(expected["loss"]), rel=1e-5)


def test_batches_are_those_of_each_seed_and_continue_where_they_were():
    windows = Windows(np.arange(200) % 17, 8)
    made = []

    def make(seed):
        made.append(seed)
        return make_batches(windows, batch_size=2, seed=seed)

    batches = MemberBatches(make, [3, 5, 3])
    assert made == [3, 5]  # members with the same seed share their batches
    alone = [make_batches(windows, batch_size=2, seed=seed) for seed in (3, 5, 3)]
    for _ in range(3):
        joint = next(batches)
        for member, iterator in enumerate(alone):
            np.testing.assert_array_equal(joint["tokens"][member], next(iterator)["tokens"])
    position = batches.get_state()
    expected = next(batches)["targets"]
    again = MemberBatches(make, [3, 5, 3])
    again.set_state(position)
    np.testing.assert_array_equal(next(again)["targets"], expected)
