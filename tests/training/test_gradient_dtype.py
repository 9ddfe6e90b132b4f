"""Each device computes the gradient of its rows, and the devices sum the gradients once a step in
the chosen type."""

import functools
import re

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import ExperimentConfig, MeshConfig, OptimConfig
from transformer_jax.sharding import batch_sharding, make_mesh
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_train_step

CONFIG = tj.ModelConfig(vocab_size=32, max_len=16, num_layers=2, num_heads=4, model_dim=32)
STEPS = 20
OPTIMIZER = make_optimizer(OptimConfig(peak_lr=3e-3, warmup_steps=5), STEPS)


def begin(devices, gradient_dtype, accumulation, **changes):
    """Mesh, first state, step, and a function that places a batch."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    config = CONFIG.replace(**changes)
    with jax.set_mesh(mesh):
        state = init_state(lambda key: tj.Decoder(config, key=key), OPTIMIZER,
                           jax.random.key(0, impl="unsafe_rbg"), mesh)
    step = make_train_step(next_token_loss(), OPTIMIZER, accumulation, gradient_dtype)
    return mesh, state, step, lambda batch: jax.device_put(batch, batch_sharding(mesh))


def batches():
    """Rows that count up, some weights zero: devices have different sums of weights."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        row = (rng.integers(32, size=(16, 1)) + rng.integers(1, 4, size=(16, 1)) * np.arange(17)) % 32
        yield {"tokens": row[:, :-1].astype(np.int32), "targets": row[:, 1:].astype(np.int32),
               "weights": (rng.random((16, 16)) < rng.random((16, 1))).astype(np.float32)}


@functools.cache
def losses(devices, gradient_dtype=None, accumulation=1):
    mesh, state, step, place = begin(devices, gradient_dtype, accumulation)
    found = []
    with jax.set_mesh(mesh):
        for batch in batches():
            state, metrics = step(state, place(batch))
            found.append(float(metrics["loss"]))
    return np.array(found)


@pytest.mark.long
@pytest.mark.parametrize("accumulation", [1, 2])
def test_summed_in_float32_the_losses_are_those_of_one_device(accumulation):
    assert losses(1)[-1] < losses(1)[0] - 0.5
    np.testing.assert_allclose(losses(8, "float32", accumulation), losses(1), rtol=1e-5)


@pytest.mark.long
def test_summed_in_bfloat16_they_are_near():
    np.testing.assert_allclose(losses(8, "bfloat16"), losses(1), rtol=5e-3)
    assert not np.array_equal(losses(8, "bfloat16"), losses(8, "float32"))


@pytest.mark.long
def test_one_device_sums_no_gradients():
    np.testing.assert_array_equal(losses(1, "bfloat16"), losses(1))


def lowered(gradient_dtype, accumulation, **changes):
    mesh, state, step, place = begin(8, gradient_dtype, accumulation, **changes)
    with jax.set_mesh(mesh):
        return step.lower(state, place(next(batches())))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_summed_in_the_chosen_type(dtype):
    """In the program as written: XLA:CPU has no sums in bfloat16, and converts there."""
    found = re.findall(r"\"stablehlo.all_reduce\".*?-> tensor<([\dx]*)(\w+)>",
                       lowered(dtype, 1, dtype="bfloat16").as_text(), re.DOTALL)
    sizes = {}
    for shape, kind in found:
        sizes[kind] = sizes.get(kind, 0) + int(np.prod([int(n) for n in shape.split("x") if n]))
    short = {"float32": "f32", "bfloat16": "bf16"}
    gradients = tj.count_parameters(CONFIG)
    scalars = 2  # losses and weights, always in float32
    assert sizes == ({"f32": gradients + scalars} if dtype == "float32" else {short[dtype]: gradients, "f32": scalars})


def in_loops(program):
    """Sums over devices inside and outside of the loop over microbatches."""
    inside = outside = 0
    for computation in re.split(r"\n(?=\S)", program):
        count = len(re.findall(r" all-reduce(?:-start)?\(", computation))
        if computation.startswith("ENTRY"):
            outside += count
        else:
            inside += count
    return inside, outside


@pytest.mark.long
def test_microbatches_send_nothing():
    inside, outside = in_loops(lowered("float32", 2).compile().as_text())
    assert inside == 0 and outside > 0
    assert in_loops(lowered(None, 2).compile().as_text())[0] > 0


@pytest.mark.long
def test_devices_draw_their_own_dropout():
    """Rows that are alike on every device lose different entries: the loss is not that of one
    device's rows."""
    mesh, state, step, place = begin(8, "float32", 1, dropout=0.5)
    row = np.tile(np.arange(16, dtype=np.int32), (16, 1))
    row[1::2] += 7
    batch = {"tokens": row, "targets": (row + 1) % 32}
    with jax.set_mesh(mesh):
        _, metrics = step(state, place(batch))
    mesh, state, step, place = begin(1, None, 1, dropout=0.5)
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 0)
    loss, weight = next_token_loss()(state.params, {name: x[:2] for name, x in batch.items()}, key)
    assert float(metrics["loss"]) != pytest.approx(float(loss / weight), rel=1e-4)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(mesh=MeshConfig(fsdp=2)), "with the axis mesh.data only, but mesh=MeshConfig.data=None, fsdp=2"),
    (dict(mesh=MeshConfig(tensor=2)), "tensor=2, .*; leave it out")])
def test_other_layouts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ExperimentConfig(optim=OptimConfig(gradient_dtype="bfloat16"), **changes)


def test_types():
    with pytest.raises(ValueError, match="gradient_dtype='bf16' is not one of float32, bfloat16"):
        OptimConfig(gradient_dtype="bf16")
