"""The loop with a small test model: exact resume in one process, metrics, best checkpoints, meshes,
ten bad steps."""

import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer_jax.config import (
    CheckpointConfig,
    EvalConfig,
    ExperimentConfig,
    MeshConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
)
from transformer_jax.data import Windows, make_batches
from transformer_jax.settings import from_dict
from transformer_jax.sharding import make_mesh
from transformer_jax.training import signals
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.errors import Interrupted, NotFiniteError
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.metrics import read_metrics
from transformer_jax.training.session import run_training

V, D, STEPS, EPOCH = 11, 8, 23, 7  # batches in an epoch: so that stops fall in the middle of one
CONFIG = ExperimentConfig(
    steps=STEPS, batch_size=8, log_every=4, model=ModelConfig(vocab_size=V, max_len=4, num_layers=1, num_heads=1,
                                                              model_dim=D),
    optim=OptimConfig(peak_lr=0.05, warmup_steps=3, accumulation=2), checkpoint=CheckpointConfig(every=5, keep=2),
    eval=EvalConfig(every=6), sample=SampleConfig(every=4, growing=True, at_start=True))


def make_params(key):
    embed_key, out_key = jax.random.split(key)
    return {"embed": nnx.Param(0.5 * jax.random.normal(embed_key, (V, D)), axes=("vocab", "embed")),
            "out": nnx.Param(0.5 * jax.random.normal(out_key, (D, V)), axes=("embed", "vocab"))}


def loss_fn(params, batch, key):
    """A bigram model with dropout."""
    x_BTD = params["embed"][...][batch["tokens"]]
    if key is not None:
        x_BTD = x_BTD * jax.random.bernoulli(key, 0.8, x_BTD.shape) / 0.8
    log_p = jax.nn.log_softmax(x_BTD @ params["out"][...])
    losses = -jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)
    return losses.sum(), jnp.float32(losses.size)


class Batches:
    """Batches that call a function at a given step, such as one that sends a signal."""

    def __init__(self, config, at=None, call=None):
        tokens = np.random.default_rng(0).integers(V, size=EPOCH * config.batch_size * 4 + 1, dtype=np.uint16)
        self._batches = make_batches(Windows(tokens, 4), batch_size=config.batch_size, seed=config.seed)
        self._count, self._at, self._call = 0, at, call
        self.get_state, self.set_state = self._batches.get_state, self._batches.set_state

    def __iter__(self):
        return self

    def __next__(self):
        if self._count == self._at:
            self._call()
        self._count += 1
        return next(self._batches)


def run(workdir, config=CONFIG, mesh=None, loss_fn=loss_fn, evaluate=None, hooks=(), **interruption):
    """Trains; validation is the mean of the weights, which anything that changes them changes."""
    samples = []
    state = run_training(
        config, workdir, make_params=make_params, loss_fn=loss_fn, batches=Batches(config, **interruption),
        mesh=make_mesh(config.mesh, jax.devices()[:1]) if mesh is None else mesh, files={"name": b"content"},
        evaluate=evaluate or (lambda params: {"validation_loss": float(jnp.abs(params["out"][...]).mean())}),
        show=lambda params, step: samples.append(step), hooks=hooks)
    return state, samples


def deterministic(workdir):
    """The logged lines without what depends on the clock."""
    timed = ("tokens_per_second", "model_flops_per_second")
    return [{name: value for name, value in line.items() if name not in timed}
            for line in read_metrics(workdir / "metrics.jsonl")]


def metadata(workdir):
    return Checkpoints(workdir / "checkpoints", read_only=True).restore({}).metadata


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    state, samples = run(workdir)
    return workdir, state, samples


def test_an_uninterrupted_run(whole, capfd):
    workdir, state, samples = whole
    lines = deterministic(workdir)
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, 12, 16, 20, 23]
    assert [line["step"] for line in lines if "validation_loss" in line] == [6, 12, 18, 23]
    assert samples == [0, 4, 8, 16, 23]  # before the first step, growing, and the last
    assert Checkpoints(workdir / "checkpoints", read_only=True).steps() == [20, 23]
    assert int(state.step) == STEPS
    first = next(line for line in lines if "loss" in line)
    assert set(first) == {"step", "loss", "grad_norm", "skipped", "learning_rate"}
    assert lines[-2]["loss"] < first["loss"]


def test_the_same_config_twice_is_the_same_to_the_bit(whole, tmp_path):
    workdir, state, _ = whole
    again, _ = run(tmp_path)
    assert tree_digest(again) == tree_digest(state)
    assert deterministic(tmp_path) == deterministic(workdir)
    other, _ = run(tmp_path / "other", CONFIG.replace(seed=1))
    assert tree_digest(other.params) != tree_digest(state.params)


@pytest.mark.parametrize(("signum", "stop"), [(signal.SIGINT, 1), (signal.SIGTERM, 6), (signal.SIGINT, 10),
                                              (signal.SIGTERM, 13)])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(whole, tmp_path, signum, stop):
    workdir, state, _ = whole
    with pytest.raises(Interrupted, match=rf"{signum.name}: saved step {stop}$") as stopped:
        run(tmp_path, at=stop - 1, call=lambda: os.kill(os.getpid(), signum))
    assert stopped.value.signum == signum and stopped.value.step == stop
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps()[-1] == stop
    resumed, _ = run(tmp_path)
    assert tree_digest(resumed) == tree_digest(state)
    assert deterministic(tmp_path) == deterministic(workdir)
    assert metadata(tmp_path) == metadata(workdir)


@pytest.mark.long
@pytest.mark.parametrize("stop", [3, 5, 12, 22])
def test_a_crash_loses_only_the_steps_since_the_last_checkpoint(whole, tmp_path, stop):
    class Crash(Exception):
        pass

    def crash():
        raise Crash

    workdir, state, _ = whole
    with pytest.raises(Crash):
        run(tmp_path, at=stop, call=crash)
    saved = Checkpoints(tmp_path / "checkpoints", read_only=True).steps()
    assert (saved[-1] if saved else 0) == stop // 5 * 5
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 22, "lo')  # as the power fails
    resumed, _ = run(tmp_path)
    assert tree_digest(resumed) == tree_digest(state)
    assert deterministic(tmp_path) == deterministic(workdir)


def watch(loop):
    if loop.is_due(loop.config.metrics.attention_every):
        loop.log({"self_attention/entropy": np.asarray(loop.model["out"][...]).reshape(2, -1)})


@pytest.mark.long
def test_watching_changes_nothing_and_resumes(whole, tmp_path):
    workdir, state, _ = whole
    config = CONFIG.replace(metrics=MetricsConfig(attention_every=7))
    watched, _ = run(tmp_path / "whole", config, hooks=[watch])
    assert tree_digest(watched) == tree_digest(state)
    lines = deterministic(tmp_path / "whole")
    entropies = {line["step"]: line["self_attention/entropy"] for line in lines if "self_attention/entropy" in line}
    assert list(entropies) == [7, 14, 21, STEPS]
    np.testing.assert_allclose(entropies[STEPS], np.asarray(state.params["out"][...]).reshape(2, -1), atol=6e-7)
    assert [line for line in lines if "self_attention/entropy" not in line] == deterministic(workdir)
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", config, hooks=[watch], at=15, call=lambda: os.kill(os.getpid(), signal.SIGTERM))
    resumed, _ = run(tmp_path / "stopped", config, hooks=[watch])
    assert tree_digest(resumed) == tree_digest(state)
    assert deterministic(tmp_path / "stopped") == lines
    run(tmp_path / "never", hooks=[watch])
    assert deterministic(tmp_path / "never") == deterministic(workdir)


def test_stopping_twice_and_before_the_first_step(whole, tmp_path):
    _, state, _ = whole
    for done, stop in ((0, 2), (2, 3)):
        with pytest.raises(Interrupted):
            run(tmp_path, at=stop - done - 1, call=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert tree_digest(run(tmp_path)[0]) == tree_digest(state)


def test_the_usual_signal_handlers_come_back(whole, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    try:
        _check_signal_handlers(tmp_path, monkeypatch)
    finally:
        signal.signal(signal.SIGINT, before)


def _check_signal_handlers(tmp_path, monkeypatch):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        run(tmp_path, at=0, call=lambda: os.kill(os.getpid(), signal.SIGINT))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    # Signals in quick succession count as one, so that the state is saved.
    with pytest.raises(Interrupted, match="SIGINT: saved step 1"):
        run(tmp_path / "twice", at=0, call=twice)
    monkeypatch.setattr(signals, "SECONDS_OF_ONE_SIGNAL", -1.0)  # the second one comes later
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "later", at=0, call=lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_finished_run_is_left_as_it_is(whole):
    workdir, state, _ = whole
    before = deterministic(workdir)
    again, samples = run(workdir)
    assert tree_digest(again) == tree_digest(state) and samples == [] and deterministic(workdir) == before


def test_a_damaged_step_is_saved_again(whole, tmp_path):
    workdir, state, _ = whole
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / str(STEPS) / "manifest.json").write_text("{}")
    (tmp_path / "run" / "checkpoints" / "99").mkdir()  # an empty directory is no step
    with pytest.warns(UserWarning, match="23 is damaged: .*; using step 20 instead"):
        again, _ = run(tmp_path / "run")
    assert tree_digest(again) == tree_digest(state)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    assert checkpoints.steps() == [20, STEPS] and checkpoints.restore({}, step=STEPS).step == STEPS


def test_the_best_survives_a_resume(tmp_path):
    """Validation losses 3, 1, 2, 4: the best is the second, also when the stop comes after it."""
    losses = {6: 3.0, 12: 1.0, 18: 2.0, 23: 4.0}
    step = iter(losses)

    def evaluate(params):
        return {"validation_loss": losses[next(step)]}

    with pytest.raises(Interrupted):
        run(tmp_path, at=14, call=lambda: os.kill(os.getpid(), signal.SIGTERM), evaluate=evaluate)
    best = Checkpoints(tmp_path / "best", read_only=True)
    assert best.steps() == [12]
    run(tmp_path, evaluate=evaluate)
    assert best.steps() == [12]
    restored = Checkpoints(tmp_path / "checkpoints", read_only=True).restore({})
    assert restored.metadata["best_loss"] == 1.0 and restored.files == {"name": b"content"}


def test_ten_updates_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    def diverges(params, batch, key):
        loss, weight = loss_fn(params, batch, key)
        return jnp.where(jnp.abs(params["out"][...]).mean() > limit, jnp.nan, 1.0) * loss, weight

    limit = 0.0
    with pytest.raises(NotFiniteError, match=r"step 10: 10 updates in a row .* Lower optim.peak_lr"):
        run(tmp_path, loss_fn=diverges)
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == []
    # The same command ends with the same result.
    with pytest.raises(NotFiniteError, match=r"updates in a row"):
        run(tmp_path, loss_fn=diverges)


def test_nine_bad_steps_do_not_end_it(tmp_path):
    digests = []

    def evaluate(params):
        digests.append(tree_digest(params))
        return {"validation_loss": 1.0}

    def poisoned(params, batch, key):
        loss, weight = loss_fn(params, batch, key)
        return jnp.where(jnp.isnan(batch["poison"]).any(), jnp.nan, 1.0) * loss, weight

    class Poisoned(Batches):
        def __next__(self):
            batch = super().__next__()
            bad = 2 < self._count <= 11
            return batch | {"poison": np.full((8, 1), np.nan if bad else 1.0, np.float32)}

    config = CONFIG.replace(eval=EvalConfig(every=1), steps=13)
    state = run_training(config, tmp_path, make_params=make_params, loss_fn=poisoned, batches=Poisoned(config),
                         mesh=make_mesh(devices=jax.devices()[:1]), evaluate=evaluate)
    assert int(state.skipped) == 9 and int(state.skipped_in_a_row) == 0 and int(state.step) == 13
    assert len(set(digests[1:11])) == 1 and len(set(digests)) == 4
    assert [line["skipped"] for line in deterministic(tmp_path) if "loss" in line] == [2, 6, 9, 9]


@pytest.mark.long
def test_saved_on_eight_devices_resumed_on_fewer(tmp_path):
    """The first 9 steps on a mesh of 2 x 2 x 2, the rest on 1, 2 and 4 devices: the losses go
    on."""
    config = CONFIG.replace(log_every=1, mesh=MeshConfig(data=2, fsdp=2, tensor=2),
                            model=CONFIG.model, optim=OptimConfig(peak_lr=0.05, warmup_steps=3))
    eight = make_mesh(config.mesh)
    whole, _ = run(tmp_path / "whole", config, mesh=eight)
    assert len(whole.params["embed"][...].sharding.device_set) == 8
    assert not whole.params["embed"][...].sharding.is_fully_replicated
    losses = {line["step"]: line["loss"] for line in deterministic(tmp_path / "whole") if "loss" in line}
    assert list(losses) == list(range(1, STEPS + 1))
    for name, mesh_config, num_devices in (("one", MeshConfig(), 1), ("two", MeshConfig(fsdp=2), 2),
                                           ("four", MeshConfig(fsdp=2, tensor=2), 4), ("eight", config.mesh, 8)):
        workdir = tmp_path / name
        with pytest.raises(Interrupted):
            run(workdir, config, mesh=eight, at=8, call=lambda: os.kill(os.getpid(), signal.SIGTERM))
        state, _ = run(workdir, config, mesh=make_mesh(mesh_config, jax.devices()[:num_devices]))
        assert len(state.params["embed"][...].sharding.device_set) == num_devices
        resumed = {line["step"]: line["loss"] for line in deterministic(workdir) if "loss" in line}
        assert list(resumed) == list(losses)
        np.testing.assert_allclose(list(resumed.values()), list(losses.values()), rtol=1e-5)
    assert tree_digest(state) == tree_digest(whole)


def test_metadata_tells_the_config_and_the_position(whole):
    assert set(metadata(whole[0])) == {"config", "data", "best_loss"}
    assert from_dict(ExperimentConfig, metadata(whole[0])["config"]) == CONFIG


def test_without_a_workdir_a_signal_ends_the_run_with_what_was_learned(whole):
    state, samples = run(None, at=5, call=lambda: os.kill(os.getpid(), signal.SIGINT))
    assert int(state.step) == 6 and samples == [0, 4]
    assert tree_digest(run(None)[0]) == tree_digest(whole[1])


def test_custom_hooks_and_loggers_are_called():
    class Memory:
        def __init__(self):
            self.lines, self.closed = [], False

        def write(self, step, values):
            self.lines.append((step, dict(values)))

        def close(self):
            self.closed = True

    class Hook:
        started = None

        def start(self, loop):
            self.started = loop.step

        def __call__(self, loop):
            loop.log({"twice": 2.0 * loop.step})

    hook, memory = Hook(), Memory()
    run_training(CONFIG.replace(steps=5), make_params=make_params, loss_fn=loss_fn, batches=Batches(CONFIG),
                 mesh=make_mesh(devices=jax.devices()[:1]), hooks=[hook], loggers=[memory])
    assert hook.started == 0 and memory.closed
    assert [(step, values["twice"]) for step, values in memory.lines if "twice" in values] == [
        (step, 2.0 * step) for step in range(1, 6)]
    assert [step for step, values in memory.lines if "loss" in values] == [4, 5]


def test_batches_without_a_position_cannot_be_resumed(tmp_path):
    def endless():
        while True:
            yield next(source)

    source = Batches(CONFIG)
    common = dict(make_params=make_params, loss_fn=loss_fn, mesh=make_mesh(devices=jax.devices()[:1]))
    run_training(CONFIG.replace(steps=2), tmp_path, batches=endless(), **common)
    with pytest.raises(ValueError, match="an iterator without get_state and set_state"):
        run_training(CONFIG, tmp_path, batches=endless(), **common)
