"""Branches of a run end with the same bits if nothing changes, and measurements of checkpoints are
made once."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.training.leaves import tree_digest

TEXTS = ["".join(pair) for pair in itertools.product("abcdefgh", ["xyz ", "zyx ", "uvw "])] * 8
CONFIG = tj.ExperimentConfig(
    steps=8, batch_size=4, log_every=4, model=tj.ModelConfig(max_len=8, num_layers=2, num_heads=2, model_dim=8,
                                                            dropout=0.1),
    checkpoint=tj.config.CheckpointConfig(every=3, keep=10), eval=tj.config.EvalConfig(every=100),
    optim=tj.config.OptimConfig(peak_lr=1e-2, warmup_steps=0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "original"
    return workdir, tj.train(CONFIG, TEXTS, workdir=workdir, mesh=one_device())


def one_device():
    return tj.sharding.make_mesh(devices=jax.devices()[:1])


def branch(run, name, *, step, **changes):
    workdir, _ = run
    config, to = CONFIG.replace(**changes) if changes else None, workdir.with_name(name)
    return to, tj.runs.branch(workdir, to, step=step, config=config, data=TEXTS, mesh=one_device())


@pytest.mark.parametrize("step", [3, pytest.param(5, marks=pytest.mark.long), pytest.param(0, marks=pytest.mark.long)])
def test_a_branch_without_a_change_ends_with_the_same_bits(run, step):
    to, bundle = branch(run, f"same_{step}", step=step)
    assert tree_digest(bundle.model) == tree_digest(run[1].model) == tree_digest(tj.load(to).model)
    record = json.loads((to / "run.json").read_text())
    assert record["branch"]["step"] == step
    _, again = branch(run, to.name, step=step)
    assert tree_digest(again.model) == tree_digest(bundle.model)


def test_one_thing_changes_from_the_step_on(run):
    whole = tree_digest(run[1].model)
    to, other_order = branch(run, "order", step=6, seed=1)
    assert tree_digest(other_order.model) != whole
    assert tree_digest(tj.load(to, step=6).model) == tree_digest(tj.load(run[0], step=6).model)
    changes = json.loads((to / "run.json").read_text())["changes"]
    assert changes == [{"after_step": 6, "changed": ["seed: 0 -> 1"]}]


@pytest.mark.long
def test_the_weight_decay_of_one_layer_changes_this_layer_first(run):
    optim = dataclasses.replace(CONFIG.optim, layer_weight_decay=(0.1, 5.0))
    before = tj.load(run[0], step=6).model
    same_optim = dataclasses.replace(CONFIG.optim, layer_weight_decay=(0.1, 0.1))
    transform = [tj.training.make_optimizer(each, 8) for each in (CONFIG.optim, same_optim, optim)]
    grads = jax.tree.map(lambda p: 0.01 * p, before)
    updates = [jax.tree.map(np.asarray, each.update(grads, each.init(before), before)[0]) for each in transform]
    kernel = [each.stack.blocks.mlp.up.kernel[...] for each in updates]
    np.testing.assert_allclose(kernel[1], kernel[0], rtol=1e-5)
    np.testing.assert_allclose(kernel[2][0], kernel[0][0], rtol=1e-5)
    weights, rate = before.stack.blocks.mlp.up.kernel[1], CONFIG.optim.peak_lr
    np.testing.assert_allclose(kernel[2][1] - kernel[0][1], -rate * 4.9 * weights, rtol=1e-3, atol=1e-7)
    _, decayed = branch(run, "decay", step=6, optim=optim)
    norms = [np.linalg.norm(model.stack.blocks.mlp.up.kernel[...], axis=(1, 2)) for model in (run[1].model,
                                                                                          decayed.model)]
    assert norms[1][1] < 0.99 * norms[0][1] and norms[1][0] > 0.995 * norms[0][0]


@pytest.mark.long
def test_a_head_that_is_ablated_while_training_gets_no_gradient(run):
    loss = dataclasses.replace(CONFIG.loss, ablated_heads=("1.0",))
    to, bundle = branch(run, "ablated", step=6, loss=loss)
    kernel = bundle.model.stack.blocks.attention.output.kernel[...]
    assert not kernel[1, :4].any() and kernel[1, 4:].any() and kernel[0].any()
    table = tj.inspection.head_ablation_table(bundle.model, np.array([[1, 2, 3, 4]]))
    assert table[1, 0] == 0 and table[1, 1] != 0
    stored = tj.load(to).model.stack.blocks.attention.output.kernel[...]
    assert stored[1, :4].any()
    with pytest.raises(ValueError, match=r"there is no head 7.0"):
        branch(run, "no_head", step=6, loss=dataclasses.replace(CONFIG.loss, ablated_heads=("7.0",)))


def test_wrong_branches(run):
    workdir, _ = run
    for wrong, message in (
            (lambda: branch(run, "wide", step=3, batch_size=8), "cannot change batch_size"),
            (lambda: branch(run, "late", step=8), "step=8"),
            (lambda: tj.runs.branch(workdir, workdir, step=3, data=TEXTS), "another run"),
            (lambda: tj.runs.branch(workdir.with_name("nothing"), workdir, step=3), "no run")):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(ValueError, match="adamw"):
        tj.config.OptimConfig(name="sgd", layer_weight_decay=(1.0,))


def test_a_measurement_of_all_checkpoints_is_made_once(run):
    measured = []

    def weights(bundle):
        measured.append(bundle.step)
        kernel = bundle.model.stack.blocks.attention.output.kernel[...]
        return {"norm": np.linalg.norm(kernel), "heads": np.square(kernel).reshape(2, 2, -1).sum(-1)}

    found = tj.runs.over_training(run[0], weights)
    assert measured == found.steps.tolist() == [3, 6, 8]
    assert found.values["norm"].shape == (3,) and found.values["heads"].shape == (3, 2, 2)
    again = tj.runs.over_training(run[0], weights, steps=[6, 8])
    assert measured == [3, 6, 8]
    np.testing.assert_array_equal(again.values["norm"], found.values["norm"][1:])
    assert found.plot().axes[0].get_xlabel() == "step" and found.plot("heads").axes[0].get_ylabel() == "heads"
    (run[0] / "measured" / "weights" / "6.npz").write_bytes(b"damaged")
    tj.runs.over_training(run[0], weights)
    assert measured == [3, 6, 8, 6]

    def weights(bundle):
        return {"norm": 1.0}

    assert tj.runs.over_training(run[0], weights).values["norm"].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="asked for"):
        tj.runs.over_training(run[0], weights, steps=[4])
    with pytest.raises(ValueError, match="was not measured"):
        found.plot("loss")
