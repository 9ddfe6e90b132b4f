"""Adapters on disk, apart from the model that they belong to."""

import contextlib

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import LoraConfig
from transformer_jax.nn.lora import make_adapters, merge_adapters
from transformer_jax.training.adapters import load_adapters, save_adapters
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.leaves import tree_digest

CONFIG = tj.ModelConfig(vocab_size=16, max_len=8, num_layers=2, num_heads=2, model_dim=8)
LORA = LoraConfig(rank=2, alpha=3.0, weights="query|up", whole="final_norm")


@pytest.fixture(scope="module")
def base():
    return tj.Decoder(CONFIG, key=jax.random.key(0))


@pytest.fixture(scope="module")
def adapters(base):
    made = make_adapters(base, LORA, key=jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), made)


def test_adapters_alone_go_to_disk_and_come_back(base, adapters, tmp_path):
    save_adapters(tmp_path, adapters, LORA, base, step=7)
    loaded = load_adapters(tmp_path, base)
    assert tree_digest(loaded) == tree_digest(adapters)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)  # scale and dropout are there too
    assert tree_digest(merge_adapters(base, loaded)) == tree_digest(merge_adapters(base, adapters))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(adapters))
    stored = Checkpoints(tmp_path / "checkpoints", read_only=True).restore({"params": adapters})
    assert stored.step == 7 and set(stored.files) == {"base.sha256"}
    assert num_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(stored.state["params"]))
    assert num_bytes < 0.5 * sum(leaf.nbytes for leaf in jax.tree.leaves(base))


def test_adapters_belong_to_one_model(base, adapters, tmp_path):
    save_adapters(tmp_path, adapters, LORA, base)
    with pytest.raises(ValueError, match="belong to a model with other weights"):
        load_adapters(tmp_path, tj.Decoder(CONFIG, key=jax.random.key(9)))
    with pytest.raises(ValueError, match="belong to a model with other weights"):
        load_adapters(tmp_path, jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-6), base))


def test_loading_adapters_from_another_directory_raises(base, adapters, tmp_path):
    with pytest.raises(ValueError, match="holds steps"):
        load_adapters(tmp_path / "nowhere", base)
    tj.save(tmp_path / "whole", tj.Bundle(model=base, tokenizer=None, config=CONFIG))
    with pytest.raises(ValueError, match="contains a whole model and no adapters"):
        load_adapters(tmp_path / "whole", base)
    save_adapters(tmp_path / "later", adapters, LORA, base, step=5)
    with pytest.raises(ValueError, match="already contains step 5, which is later than step 4"):
        save_adapters(tmp_path / "later", adapters, LORA, base, step=4)


def test_a_run_of_adapters_is_loaded_merged(base, adapters, tmp_path):
    """As `fit` leaves it: the base beside checkpoints of adapters, and a config with a rank."""
    from transformer_jax.settings import to_dict

    tj.save(tmp_path / "base", tj.Bundle(model=base, tokenizer=None, config=CONFIG))
    experiment = tj.ExperimentConfig(model=CONFIG, lora=LORA)
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", keep=3)) as checkpoints:
        for step, scale in ((1, 0.0), (2, 1.0)):
            checkpoints.save(step, {"params": jax.tree.map(lambda x, scale=scale: x * scale, adapters)},
                             metadata={"config": to_dict(experiment)},
                             files={"base.sha256": tree_digest(base).encode()})
    bundle = tj.load(tmp_path)
    assert bundle.step == 2 and tree_digest(bundle.model) == tree_digest(merge_adapters(base, adapters))
    assert tree_digest(load_adapters(tmp_path, tj.load(tmp_path / "base").model)) == tree_digest(adapters)
    # The mean is that of models: A and B of two checkpoints do not average to their product's mean.
    one, two, mean = (jax.tree.leaves(tj.load(tmp_path, **which).model)
                      for which in (dict(step=1), dict(step=2), dict(average=2)))
    for a, b, c in zip(one, two, mean, strict=True):
        np.testing.assert_allclose(c, (a + b) / 2, rtol=1e-6, atol=1e-7)
