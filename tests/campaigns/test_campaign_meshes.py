"""Random meshes of eight simulated devices: a checkpoint of one mesh is restored onto another bit
for bit, and the model computes the same."""

import shutil

import campaign
import jax
import numpy as np
from random_configs import draw, is_exact

import transformer_jax as tj
from transformer_jax.config import MeshConfig
from transformer_jax.models.functional import make_model
from transformer_jax.sharding import make_mesh, shardings
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.leaves import tree_digest

pytestmark = campaign.MARKS

NUM_MODELS = 4


def random_mesh(rng):
    """A mesh of 1, 2, 4 or 8 of the devices, or one that does not multiply out (ValueError)."""
    count = int(rng.choice([1, 2, 4, 8, 8]))
    sizes, left = {}, count
    for axis in rng.permutation(["data", "fsdp", "tensor", "sequence", "expert"])[:3]:
        factors = [size for size in (1, 2, 4, 8) if left % size == 0]
        sizes[str(axis)] = int(rng.choice(factors))
        left //= sizes[str(axis)]
    if rng.random() < 0.1:
        sizes[str(rng.choice(list(sizes)))] = int(rng.choice([0, 3, 16, -1]))
        make_mesh(MeshConfig(**sizes), jax.devices()[:count])
        raise AssertionError(f"a mesh of {sizes} was made of {count} devices")
    sizes["data"] = sizes.get("data", 1) * left
    return make_mesh(MeshConfig(**sizes), jax.devices()[:count])


def made_of(config, seed):
    return jax.jit(lambda key: make_model(config, key=key))(jax.random.key(seed))


def test_checkpoints_move_between_meshes(tmp_path):
    made = {}

    def model_of(number):
        if number not in made:
            rng = np.random.default_rng([campaign.SEED, number])
            while number not in made:
                try:
                    family = str(rng.choice(["decoder", "decoder", "encoder", "encoder_decoder"]))
                    made[number] = made_of(draw(rng, family).replace(attention_implementation="auto"), number)
                except (ValueError, TypeError, AssertionError):  # an invalid config
                    continue
        return made[number]

    def case(rng):
        model = model_of(int(rng.integers(NUM_MODELS)))
        digest = tree_digest(model)
        start, end = random_mesh(rng), random_mesh(rng)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        checkpoints = Checkpoints(tmp_path / "run")
        placed = jax.device_put(model, shardings(model, start))
        checkpoints.save(1, {"params": placed}, metadata={})
        checkpoints.close()
        wanted = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), model,
                              shardings(model, end))
        found = Checkpoints(tmp_path / "run", read_only=True).restore({"params": wanted}).state["params"]
        assert tree_digest(found) == digest
        for leaf, place in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)
        if rng.random() < 0.3:
            computes_the_same(model, found, end)
        return True

    campaign.run_cases("meshes", case)


def computes_the_same(model, placed, mesh):
    count = 2 if model.config.family == "encoder_decoder" else 1
    tokens = [np.random.default_rng(number).integers(model.config.vocab_size, size=(8, 16)) for number in range(count)]
    expected = tj.forward(model, *tokens)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda model, tokens: model(*tokens).logits)(placed, tokens)
    if is_exact(model.config):
        np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-4)
    assert np.isfinite(found).all()
