"""Encoders and encoder-decoders on eight simulated devices train as on one device, also with
dropout."""

import contextlib
import dataclasses
import functools
import logging

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_sharding import STEPS, Compiled, mesh_of, optimizer

import transformer_jax as tj
from transformer_jax.config import LossConfig
from transformer_jax.models.functional import make_model
from transformer_jax.sharding import batch_sharding, shardings
from transformer_jax.training.objectives import masked_token_loss, translation_loss
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_train_step

SHAPE = dict(vocab_size=32, max_len=16, num_layers=2, num_heads=4, model_dim=32, norm_position="post", dropout=0.1)
CONFIGS = {
    "encoder": tj.ModelConfig(family="encoder", num_token_types=2, use_embedding_norm=True, activation="gelu", **SHAPE),
    "encoder_decoder": tj.ModelConfig(family="encoder_decoder", positions="sinusoidal", activation="relu",
                                      scale_embeddings=True, init_std=None, num_kv_heads=2, **SHAPE),
}
pytestmark = pytest.mark.long  # each case compiles a training step for 8 devices
# On "all" the data, the weights and the heads are divided, for both; by the data or the weights
# alone for one each.
CASES = [("encoder", "data"), ("encoder", "all"), ("encoder_decoder", "fsdp"), ("encoder_decoder", "all")]
LOSSES = {"encoder": masked_token_loss(), "encoder_decoder": translation_loss(LossConfig(label_smoothing=0.1))}


def batches(family):
    """Texts of a quarter of the tokens, which is soon learnt, some padded: to restore, or to say
    backwards."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        rows_BT = 1 + (rng.integers(8, size=(8, 1)) + rng.integers(1, 4, size=(8, 1)) * np.arange(16)) % 8
        rows_BT = rows_BT.astype(np.int32)
        segment_ids_BT = (np.arange(16) < rng.integers(10, 17, size=(8, 1))).astype(np.int32)
        if family == "encoder":
            positions_BP = np.sort(rng.permuted(np.tile(np.arange(10), (8, 1)), axis=1)[:, :3]).astype(np.int32)
            targets_BP = np.take_along_axis(rows_BT, positions_BP, axis=1)
            tokens_BT = rows_BT.copy()
            np.put_along_axis(tokens_BT, positions_BP, 0, axis=1)
            weights_BP = (np.arange(3) < rng.integers(1, 4, size=(8, 1))).astype(np.float32)
            yield {"tokens": tokens_BT, "segment_ids": segment_ids_BT, "masked_positions": positions_BP,
                   "masked_targets": targets_BP, "masked_weights": weights_BP}
        else:
            backwards_BT = rows_BT[:, ::-1]
            target_ids_BT = np.ones((8, 15), np.int32)
            yield {"source": rows_BT, "source_segment_ids": segment_ids_BT, "tokens": backwards_BT[:, :-1],
                   "targets": backwards_BT[:, 1:], "segment_ids": target_ids_BT,
                   "weights": (np.arange(15) < rng.integers(8, 16, size=(8, 1))).astype(np.float32)}


def fresh(family, mesh=None, **changes):
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles in a fraction of the default's time
    config = CONFIGS[family].replace(**changes)
    state = init_state(lambda key: make_model(config, key=key), optimizer(), key, mesh)
    # For dropout the default: what it draws does not depend on how the result is divided among
    # devices.
    return dataclasses.replace(state, key=jax.device_put(jax.random.key(0), state.key.sharding))


@functools.cache
def trained(family, name=None, **changes):
    """The shardings before and after, the losses, and how often the step was compiled."""
    mesh = None if name is None else mesh_of(name)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh), counted_compiles() as compiled:
        state, step = fresh(family, mesh, **changes), make_train_step(LOSSES[family], optimizer())
        before = jax.tree.map(lambda leaf: leaf.sharding, state)
        losses = []
        for batch in batches(family):
            state, metrics = step(state, batch if mesh is None else jax.device_put(batch, batch_sharding(mesh)))
            losses.append(float(metrics["loss"]))
    same = jax.tree.map(lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim), state, before)
    return before, all(jax.tree.leaves(same)), np.array(losses), compiled.times


@contextlib.contextmanager
def counted_compiles():
    compiled, logger = Compiled(), logging.getLogger("jax")
    logger.addHandler(compiled)
    try:
        with jax.log_compiles():
            yield compiled
    finally:
        logger.removeHandler(compiled)


@pytest.mark.parametrize("family", CONFIGS)
def test_training_on_one_device_learns(family):
    losses = trained(family)[2]
    assert np.isfinite(losses).all() and losses[-5:].mean() < losses[:5].mean() - 0.1


@pytest.mark.parametrize(("family", "name"), CASES)
def test_losses_equal_those_of_one_device(family, name):
    np.testing.assert_allclose(trained(family, name)[2], trained(family)[2], rtol=1e-5)


def test_sharding_over_sequence_gives_the_same_losses():
    """The 16 tokens of a source are sharded; the 15 of a target cannot be. Dropout of attention
    weights differs on each device, so it is off."""
    sharded, alone = (trained("encoder_decoder", name, attention_dropout=0.0)[2] for name in ("sequence", None))
    np.testing.assert_allclose(sharded, alone, rtol=1e-5)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_parameters_are_sharded_stay_so_and_compile_once(family, name):
    before, same, _, compiled = trained(family, name)
    assert same and compiled == 1
    model = before.params
    assert model.embeddings.token.get_value().spec == P("tensor", "fsdp")
    into, out_of, whole = P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp"), P(None, None)
    if family == "encoder":
        stacks = [model.stack]
        assert model.embeddings.token_type.get_value().spec == P(None, "fsdp")
        assert model.head.transform.kernel.get_value().spec == P("fsdp", None)
        assert model.head.bias.get_value().spec == P("tensor")
    else:
        stacks = [model.encoder, model.decoder]
    for stack in stacks:
        blocks = stack.blocks
        for attention in (blocks.attention, blocks.cross_attention or blocks.attention):
            for projection in (attention.query, attention.key, attention.value):
                assert projection.kernel.get_value().spec == into
            assert attention.output.kernel.get_value().spec == out_of
        assert blocks.mlp.up.kernel.get_value().spec == into
        assert blocks.mlp.down.kernel.get_value().spec == out_of
        assert blocks.mlp_norm.scale.get_value().spec == whole
    assert len(model.embeddings.token.get_value().device_set) == 8


@pytest.mark.parametrize("family", CONFIGS)
def test_each_device_holds_its_part_only(family):
    params = fresh(family, mesh_of("fsdp")).params
    for leaf in jax.tree.leaves(params):
        parts = [shard.data.size for shard in leaf.addressable_shards]
        assert sum(parts) == leaf.size * (1 if "fsdp" in leaf.sharding.spec else 8)
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(params))
    assert held < 0.2 * sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_vocabulary_that_does_not_divide_is_replicated():
    config = CONFIGS["encoder"].replace(vocab_size=33)
    shapes = jax.eval_shape(lambda key: make_model(config, key=key), jax.random.key(0))
    assert shardings(shapes, mesh_of("all")).head.bias.get_value().spec == P(None)
