"""Updates that would make the weights non-finite are skipped, no checkpoint is saved meanwhile, and
the run reports this."""

import contextlib
import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transformer_jax as tj
from transformer_jax.config import CheckpointConfig, EvalConfig, OptimConfig, SampleConfig
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.errors import Interrupted, NotFiniteError
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_train_step

ONE = tj.sharding.make_mesh(devices=jax.devices()[:1])
TEXTS = ["the cat sat on the mat and saw the dogs"] * 30
CONFIG = tj.ExperimentConfig(
    steps=16, batch_size=8, log_every=1, model=tj.ModelConfig(max_len=8, num_layers=1, num_heads=1, model_dim=8),
    optim=OptimConfig(name="sgd", peak_lr=0.1, warmup_steps=0, schedule="constant", weight_decay=0.0),
    checkpoint=CheckpointConfig(every=1, keep=2), eval=EvalConfig(every=4, batch_size=8),
    sample=SampleConfig(every=0))


def finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def params():
    return {"w": jnp.asarray([1.0, -2.0])}


def loss_fn(params, batch, key=None):
    return (params["w"] ** 2).sum(), jnp.float32(1)


@pytest.mark.parametrize("optimizer", [
    optax.sgd(float("nan")), optax.sgd(1e38), optax.adamw(1e38), optax.sgd(-1e38), optax.sgd(1e19),
    optax.adamw(1e-3, weight_decay=float("nan")),
], ids=["nan", "huge", "huge_adamw", "other_way", "overflow_of_the_square", "nan_decay"])
def test_a_non_finite_update_from_a_finite_gradient_is_skipped(optimizer):
    state = init_state(lambda key: params(), optimizer, jax.random.key(0))
    opt_state = jax.tree.map(np.asarray, state.opt_state)
    state, metrics = make_train_step(loss_fn, optimizer)(state, {"x": jnp.zeros(1)})
    assert np.isfinite(metrics["grad_norm"]) and np.isfinite(metrics["loss"])
    assert int(state.skipped) == int(metrics["skipped_in_a_row"]) == 1
    np.testing.assert_array_equal(state.params["w"], params()["w"])
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, opt_state)


def test_large_finite_weights_of_a_narrow_dtype_are_accepted():
    """The square of 1,000 is more than float16 holds."""
    optimizer = optax.sgd(1e-3)
    state = init_state(lambda key: {"w": jnp.full((4,), 1000.0, jnp.float16)}, optimizer, jax.random.key(0))
    state, _ = make_train_step(lambda params, batch, key: (params["w"].sum(), jnp.float16(1)), optimizer)(
        state, {"x": jnp.zeros(1)})
    assert int(state.skipped) == 0


def ruining(step, factor):
    """An optimizer whose updates are multiplied from a step on; both are in its state, so that all
    tests compile one program."""
    def update(grads, state, params=None):
        count, step, factor = state
        scale = -0.1 * jnp.where(count >= step, factor, 1.0)
        return jax.tree.map(lambda g: g * scale, grads), (count + 1, step, factor)

    start = (jnp.zeros((), jnp.int32), jnp.int32(step), jnp.float32(factor))
    return optax.GradientTransformation(lambda params: start, update)


def train(workdir, optimizer=None, **changes):
    return tj.train(CONFIG, TEXTS, workdir=workdir, optimizer=optimizer, mesh=ONE, **changes)


def steps(workdir, name="checkpoints"):
    return Checkpoints(workdir / name, read_only=True).steps()


ADVICE = ("the same command continues from there; add --change (in Python change=True) to use other settings of "
          "optim. Lower optim.peak_lr, lengthen optim.warmup_steps, or look at the data: a token id outside the "
          "vocabulary has no embedding, which gives NaN")


@pytest.mark.long
def test_updates_that_would_ruin_the_weights_leave_them_and_the_checkpoints_as_they_are(tmp_path):
    with pytest.raises(NotFiniteError) as error:
        train(tmp_path, ruining(4, 1e30))
    assert str(error.value) == (
        "step 14: 10 updates in a row were skipped, because the new weights would not have been finite; training "
        f"stops. The last step saved in {tmp_path}/checkpoints is 4: {ADVICE}")
    assert steps(tmp_path) == [3, 4] and steps(tmp_path, "best") == [4]
    assert finite(tj.load(tmp_path).model) and np.isfinite(tj.evaluate(tj.load(tmp_path), TEXTS)["loss"])


def test_checkpoints_with_finite_but_useless_weights_are_set_aside(tmp_path):
    """These weights are saved before the fault can be seen, because only later losses show it."""
    with pytest.raises(NotFiniteError) as error:
        train(tmp_path, ruining(4, 1e18))
    assert str(error.value) == (
        "step 15: 10 updates in a row were skipped, because the loss or the gradient was not finite; training stops. "
        f"The last step saved in {tmp_path}/checkpoints is 4 (step 5, from which every update failed, was renamed to "
        f"5.not_finite): {ADVICE}")
    assert steps(tmp_path) == [4] and (tmp_path / "checkpoints" / "5.not_finite").is_dir()
    assert np.isfinite(tj.evaluate(tj.load(tmp_path), TEXTS)["loss"])


def test_a_run_shorter_than_ten_bad_updates_does_not_end_well(tmp_path):
    with pytest.raises(NotFiniteError, match=r"step 3: the last 3 updates of the run were skipped.* No step is saved"):
        train(tmp_path, ruining(0, 1e30), steps=3)
    assert steps(tmp_path) == steps(tmp_path, "best") == []
    with pytest.raises(NotFiniteError, match=r"step 1: the last update of the run was skipped"):
        train(None, ruining(0, 1e30), steps=1)


def test_a_signal_while_updates_are_skipped_saves_nothing_and_says_so(tmp_path):
    def stop(loop):
        if loop.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"SIGTERM: stopped at step 7; step 4 is the last that is saved") as end:
        train(tmp_path, ruining(4, 1e30), hooks=[stop])
    assert (end.value.step, end.value.saved) == (7, 4) and steps(tmp_path) == [3, 4]


@pytest.mark.long
def test_the_run_goes_on_with_a_lower_rate(tmp_path, capsys):
    high = CONFIG.replace(optim=dataclasses.replace(CONFIG.optim, peak_lr=1e38))
    first = dataclasses.replace(CONFIG.optim, schedule="constant")
    with pytest.raises(tj.training.Interrupted):
        train(tmp_path, hooks=[lambda loop: loop.step == 3 and os.kill(os.getpid(), signal.SIGTERM)])
    for settings, change in ((high, True), (CONFIG.replace(optim=dataclasses.replace(first, peak_lr=0.05)), True)):
        ends = pytest.raises(NotFiniteError) if settings is high else contextlib.nullcontext()
        with ends:
            tj.train(settings, TEXTS, workdir=tmp_path, mesh=ONE, change=change)
    assert "settings changed after step 3: optim.peak_lr: 1e+38 -> 0.05" in capsys.readouterr().out
    assert steps(tmp_path) == [15, 16]
    changes = json.loads((tmp_path / "run.json").read_text())["changes"]
    assert [(change["after_step"], change["changed"]) for change in changes] == [
        (3, ["optim.peak_lr: 0.1 -> 1e+38"]), (3, ["optim.peak_lr: 1e+38 -> 0.05"])]
    with pytest.raises(ValueError, match=r"another config \(optim.peak_lr.*add --change \(in Python change=True\)"):
        train(tmp_path)
    with pytest.raises(ValueError, match=r"another config \(optim.name: 'sgd' -> 'lion'\)"):
        tj.train(CONFIG.replace(optim=dataclasses.replace(CONFIG.optim, peak_lr=0.05, name="lion")), TEXTS,
                 workdir=tmp_path, mesh=ONE, change=True)
