"""Eight simulated devices hold the parameters in parts, and train as one device does."""

import contextlib
import functools
import logging
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import transformer_jax as tj
from tests.long_cases import mostly_long
from transformer_jax.config import MeshConfig, OptimConfig
from transformer_jax.sharding import AXES, batch_sharding, data_share, make_mesh, partition_spec, shardings
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import abstract_state, init_state
from transformer_jax.training.step import make_train_step

CONFIG = tj.ModelConfig(vocab_size=32, max_len=16, num_layers=2, num_heads=4, model_dim=32, num_kv_heads=2)
STEPS = 20
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2), "sequence": (1, 2, 1, 4), "long": (1, 1, 2, 4)}


def optimizer():
    return make_optimizer(OptimConfig(peak_lr=3e-3, warmup_steps=5), STEPS)


def fresh(mesh=None):
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles in a fraction of the default's time
    return init_state(lambda key: tj.Decoder(CONFIG, key=key), optimizer(), key, mesh)


def batches():
    """Texts that count up in steps of one to three: soon learnt."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        row = (rng.integers(32, size=(8, 1)) + rng.integers(1, 4, size=(8, 1)) * np.arange(17)) % 32
        yield {"tokens": row[:, :-1].astype(np.int32), "targets": row[:, 1:].astype(np.int32)}


class Compiled(logging.Handler):
    """Counts how often the training step is compiled."""

    def __init__(self):
        super().__init__()
        self.times = 0

    def emit(self, record):
        self.times += record.getMessage().startswith("Compiling jit(train_step)")


@functools.cache
def trained(name=None):
    """The shardings before and after, the losses, and how often the step was compiled."""
    mesh = None if name is None else mesh_of(name)
    compiled, logger = Compiled(), logging.getLogger("jax")
    logger.addHandler(compiled)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh), jax.log_compiles():
        state, step = fresh(mesh), make_train_step(next_token_loss(), optimizer())
        before = jax.tree.map(lambda leaf: leaf.sharding, state)
        losses = []
        for batch in batches():
            state, metrics = step(state, batch if mesh is None else jax.device_put(batch, batch_sharding(mesh)))
            losses.append(float(metrics["loss"]))
    logger.removeHandler(compiled)
    return before, jax.tree.map(lambda leaf: leaf.sharding, state), np.array(losses), compiled.times


def mesh_of(name):
    return make_mesh(MeshConfig(*MESHES[name]))


def test_training_on_one_device_learns():
    losses = trained()[2]
    assert losses[0] > 3.4 and losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", mostly_long(MESHES, "data", "all"))
def test_losses_equal_those_of_one_device(name):
    np.testing.assert_allclose(trained(name)[2], trained()[2], rtol=1e-5)


@pytest.mark.parametrize("name", mostly_long(MESHES, "data", "all"))
def test_parameters_and_moments_are_sharded(name):
    mesh, (before, _, _, _) = mesh_of(name), trained(name)
    blocks = {
        "query": P(None, "fsdp", "tensor"), "key": P(None, "fsdp", "tensor"), "output": P(None, "tensor", "fsdp")}
    moments = [leaf for leaf in jax.tree.leaves(before.opt_state, is_leaf=lambda x: isinstance(x, tj.Decoder))
               if isinstance(leaf, tj.Decoder)]
    assert len(moments) == 2
    for model in (before.params, *moments):
        assert model.embeddings.token.get_value().spec == P("tensor", "fsdp")
        assert model.embeddings.position.get_value().spec == P(None, "fsdp")
        assert model.stack.blocks.mlp.up.kernel.get_value().spec == P(None, "fsdp", "tensor")
        assert model.stack.blocks.mlp.up.bias.get_value().spec == P(None, "tensor")
        assert model.stack.blocks.mlp.down.kernel.get_value().spec == P(None, "tensor", "fsdp")
        assert model.stack.blocks.mlp_norm.scale.get_value().spec == P(None, None)
        for projection, spec in blocks.items():
            assert getattr(model.stack.blocks.attention, projection).kernel.get_value().spec == spec
    up = before.params.stack.blocks.mlp.up.kernel.get_value()
    assert up.shard_shape((2, 32, 128)) == (2, 32 // mesh.shape["fsdp"], 128 // mesh.shape["tensor"])
    assert len(up.device_set) == 8


@pytest.mark.parametrize("name", mostly_long(MESHES, "data", "all"))
def test_training_keeps_the_shardings_and_compiles_once(name):
    # Without a constraint on the new state the compiler spreads the norms' scales, and step 2
    # compiles anew.
    before, after, _, compiled = trained(name)
    shapes = abstract_state(lambda key: tj.Decoder(CONFIG, key=key), optimizer())
    same = jax.tree.map(lambda a, b, leaf: a.is_equivalent_to(b, leaf.ndim), before, after, shapes)
    assert all(jax.tree.leaves(same)), [path for path, ok in jax.tree_util.tree_leaves_with_path(same) if not ok]
    assert compiled == 1


def test_each_device_holds_its_part_only():
    state = fresh(mesh_of("fsdp"))
    for leaf in jax.tree.leaves(state.params):
        parts = [shard.data.size for shard in leaf.addressable_shards]
        assert sum(parts) == leaf.size * (1 if leaf.sharding.spec.count("fsdp") else 8)
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.params))
    assert held < 0.2 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_the_initial_weights_do_not_depend_on_the_mesh():
    alone, spread = fresh(), fresh(mesh_of("all"))
    for a, b in zip(jax.tree.leaves(alone.params), jax.tree.leaves(spread.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_dimensions_that_do_not_divide_are_replicated():
    model = jax.eval_shape(lambda key: tj.Decoder(CONFIG.replace(vocab_size=33), key=key), jax.random.key(0))
    specs = shardings(model, mesh_of("all"))
    assert specs.embeddings.token.get_value().spec == P(None, "fsdp")


def test_meshes():
    assert make_mesh().axis_names == ("data", "fsdp", "expert", "sequence", "tensor")
    assert make_mesh().devices.shape == (8, 1, 1, 1, 1)
    assert make_mesh(MeshConfig(fsdp=2, tensor=2)).devices.shape == (2, 2, 1, 1, 2)
    assert make_mesh(MeshConfig(tensor=2), jax.devices()[:2]).devices.shape == (1, 1, 1, 1, 2)
    assert make_mesh(MeshConfig(sequence=4)).devices.shape == (2, 1, 1, 4, 1)
    assert make_mesh(MeshConfig(expert=4)).devices.shape == (2, 1, 4, 1, 1)
    for wrong in (MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(data=2, fsdp=2)):
        with pytest.raises(ValueError, match=rf"fsdp={wrong.fsdp} .* does not multiply out to the 8 devices"):
            make_mesh(wrong)


def test_a_batch_is_divided_over_data_and_fsdp():
    sharding = batch_sharding(mesh_of("all"))
    assert partition_spec("batch") == P(("data", "fsdp", "expert"))
    assert partition_spec("vocab", None) == P("tensor", None)
    assert sharding.shard_shape((8, 16)) == (2, 16)
    rows = jax.device_put(jnp.arange(8), sharding)
    assert sorted({tuple(shard.data.tolist()) for shard in rows.addressable_shards}) == [(0, 1), (2, 3), (4, 5), (6, 7)]


class Elsewhere:
    """A stand-in for a device of a process and a slice that do not exist here."""

    platform, device_kind = "tpu", "TPU v5 lite"

    def __init__(self, id, process_index, slice_index):
        self.id, self.process_index, self.slice_index = id, process_index, slice_index
        self.coords, self.core_on_chip = (id % 2, id // 2 % 2, 0), 0

    def __repr__(self):
        return f"Elsewhere({self.id})"


def test_slices_of_tpus_are_divided_along_data():
    devices = [Elsewhere(index, index // 4, index // 4) for index in range(8)]
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices)
    assert mesh.devices.shape == (2, 2, 1, 1, 2)
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match=r"mesh data=1 is not a multiple of the 2 slices"):
        make_mesh(MeshConfig(fsdp=8), devices)


@pytest.mark.parametrize(("shape", "shares"), [
    ((2, 1, 1, 1, 1), [0, 1]), ((1, 4, 1, 1, 2), [0, 0, 1, 1, 2, 2, 3, 3]), ((2, 1, 1, 2, 1), [0, 0, 1, 1]),
    ((2, 2, 1, 2, 1), [0, 1, 2, 3]), ((1, 2, 2, 2, 1), [0, 1, 2, 3]), ((1, 1, 1, 4, 2), [0, 0, 0, 0])])
def test_processes_that_hold_the_same_rows_read_the_same_share(shape, shares, monkeypatch):
    """Devices in order of their processes, one or two to a process."""
    size, count = math.prod(shape), len(shares)
    devices = [Elsewhere(index, index * count // size, 0) for index in range(size)]
    mesh = types.SimpleNamespace(shape=dict(zip(AXES, shape, strict=True)), devices=np.reshape(devices, shape))
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert data_share(mesh) == (share, max(shares) + 1)


def test_rows_of_a_process_that_are_not_in_one_piece_are_refused(monkeypatch):
    devices = [Elsewhere(index, index % 2, 0) for index in range(4)]
    mesh = types.SimpleNamespace(shape=dict(zip(AXES, (4, 1, 1, 1, 1), strict=True)),
                                 devices=np.reshape(devices, (4, 1, 1, 1, 1)))
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(ValueError, match="rows of a batch that are not consecutive"):
        data_share(mesh)


@pytest.mark.long
def test_checkpoints_restore_onto_any_layout(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        state = fresh(mesh_of("sequence"))
        checkpoints.save(0, state, metadata={})
        for name in ("all", "long", None):
            mesh = None if name is None else mesh_of(name)
            wanted = abstract_state(lambda key: tj.Decoder(CONFIG, key=key), optimizer(), mesh)
            restored = checkpoints.restore(jax.tree.map(
                lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, like.dtype, sharding=leaf.sharding), wanted, state))
            for a, b, like in zip(*map(jax.tree.leaves, (state.params, restored.state.params, wanted.params)),
                                  strict=True):
                np.testing.assert_array_equal(a, b)
                assert name is None or b.sharding == like.sharding
