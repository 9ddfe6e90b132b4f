"""Checkpoints: saved values are restored bit for bit, and a damaged checkpoint is never
restored."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from transformer_jax.training import arrays, checkpoint, manifest
from transformer_jax.training.checkpoint import CheckpointError, Checkpoints
from transformer_jax.training.leaves import tree_digest


class Net(nnx.Module):
    def __init__(self, key):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=nnx.Rngs(key)), nnx.Linear(4, 2, rngs=nnx.Rngs(key))])
        self.dropout_key = nnx.Variable(jax.random.fold_in(key, 1))
        self.norm = None
        self.name = "net"

    def __call__(self, x):
        return self.layers[1](jax.nn.relu(self.layers[0](x)))


def make_state(seed=0, width=4):
    key = jax.random.key(seed)
    params = {
        "kernel": jax.random.normal(key, (3, width)),
        "blocks": [{"bias": jnp.full(width, -0.0, jnp.bfloat16)}, {"bias": jnp.ones(width, jnp.float16)}],
        "absent": None,
    }
    return {
        "params": params,
        "opt_state": optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params),
        "integers": (jnp.int8(-7), jnp.uint32(2**32 - 1), jnp.arange(3, dtype=jnp.int4), jnp.array([True, False])),
        "not_finite": jnp.array([jnp.nan, -jnp.inf]),
        "net": Net(key),
        "step": jnp.int32(seed),
        "key": key,
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), (2, 3)),
    }


def save(checkpoints, step, state, **kwargs):
    checkpoints.save(step, state, **({"metadata": {}} | kwargs))
    checkpoints.wait()


def abstract(state):
    return jax.eval_shape(lambda: state)


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def files_in(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.fixture
def saved(tmp_path):
    """A directory with steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "run")
    for step in (1, 2):
        save(checkpoints, step, make_state(step), metadata={"step": step}, files={"tokenizer.model": b"\0abc\xff"})
    checkpoints.close()
    return tmp_path / "run"


# Round trip


def test_state_metadata_and_files_come_back_bit_for_bit(tmp_path):
    state = make_state()
    metadata = {"config": {"num_layers": 2, "lr": 3e-4}, "position": [1, 2**60], "text": "café", "none": None}
    files = {"tokenizer.model": bytes(range(256)), "empty": b""}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, state, metadata=metadata, files=files)
    restored = checkpoints.restore(abstract(state))  # waits for the save by itself

    assert restored.step == 10
    assert restored.metadata == metadata
    assert restored.files == files
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(restored.state), strict=True):
        assert after.dtype == before.dtype and after.shape == before.shape
        assert not after.committed
        if jax.dtypes.issubdtype(before.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(after) == jax.random.key_impl(before)
            before, after = jax.random.key_data(before), jax.random.key_data(after)
        assert np.asarray(after).tobytes() == np.asarray(before).tobytes()
    assert not any(leaf.committed for leaf in jax.tree.leaves(checkpoints.restore(state).state))  # arrays as template
    x = jnp.ones((5, 3))
    np.testing.assert_array_equal(restored.state["net"](x), state["net"](x))


def test_names_in_the_store_are_paths_and_know_no_class(saved):
    arrays = json.loads((saved / "2" / "manifest.json").read_text())["arrays"]
    assert arrays["params/blocks/0/bias"] == "bfloat16[4]"
    assert arrays["net/layers/1/kernel/value"] == "float32[4, 2]"
    assert arrays["keys"] == "key<rbg>[2, 3]"

    class Layer(NamedTuple):
        kernel: dict

    class Renamed(NamedTuple):
        layers: dict

    kernel = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    wanted = {"net": Renamed({0: Layer(None), 1: Layer({"value": kernel})})}
    with pytest.raises(CheckpointError) as raised:  # everything but kernel 1, which another class asks for by its path
        Checkpoints(saved, read_only=True).restore(wanted)
    assert "net/layers/0/kernel/value" in str(raised.value) and "net/layers/1/kernel" not in str(raised.value)


def test_a_module_is_restored_with_all_its_weights(tmp_path):
    net = Net(jax.random.key(3))
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 0, net)
    restored = checkpoints.restore(nnx.eval_shape(lambda: Net(jax.random.key(0)))).state
    assert isinstance(restored, Net) and restored.name == "net" and restored.norm is None
    assert tree_digest(restored) == tree_digest(net)


def test_part_of_the_state_is_read_without_the_rest(tmp_path):
    import tensorstore

    def bytes_read():
        metrics = [metric for name in ("/tensorstore/kvstore/file/bytes_read", "/tensorstore/file/mmap_bytes")
                   for metric in tensorstore.experimental_collect_matching_metrics(name)]
        return sum(value["value"] for metric in metrics for value in metric["values"])

    state = {"params": {"w": jnp.ones(100)}, "opt_state": jax.random.normal(jax.random.key(0), (4, 250_000))}
    save(Checkpoints(tmp_path), 1, state, files={"tokenizer.model": b"abc"})
    reader = Checkpoints(tmp_path, read_only=True)
    before = bytes_read()
    restored = reader.restore({"params": abstract(state["params"])})
    partial = bytes_read() - before
    np.testing.assert_array_equal(restored.state["params"]["w"], state["params"]["w"])
    assert restored.state.keys() == {"params"}
    assert 0 < partial < 100_000
    reader.restore(abstract(state))
    assert bytes_read() - before - partial > 3_000_000

    empty = reader.restore({})
    assert empty.state == {} and empty.files == {"tokenizer.model": b"abc"}


# Asynchronous writing


def test_the_state_may_be_donated_and_overwritten_right_after_save(tmp_path):
    @jax.jit
    def fill(value):
        return [jnp.full((256, 1024), value, jnp.float32) for _ in range(8)]

    train_step = jax.jit(lambda arrays: [array + 1 for array in arrays], donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=20)
    state = fill(0)
    for step in range(10):
        checkpoints.save(step, state, metadata={})
        for _ in range(5):
            state = train_step(state)
    checkpoints.wait()
    for step in range(10):
        restored = checkpoints.restore(abstract(state), step=step).state
        for array in restored:
            np.testing.assert_array_equal(array, 5 * step)


def test_save_returns_before_the_step_is_written(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    go_on = checkpoint.threading.Event()
    seal = checkpoint.seal
    monkeypatch.setattr(checkpoint, "seal", lambda *args: (go_on.wait(), seal(*args)))
    checkpoints.save(1, make_state(), metadata={})
    assert checkpoints.steps() == []
    assert Checkpoints(tmp_path, read_only=True).steps() == []
    go_on.set()
    checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_a_failed_write_surfaces_at_the_next_call_and_the_next_save_works(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, make_state())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "seal", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        checkpoints.save(2, make_state(), metadata={})
        with pytest.raises(CheckpointError, match=rf"cannot save step 2 in {tmp_path}: Input/output error"):
            checkpoints.save(3, make_state(), metadata={})
    assert names_in(tmp_path) == ["1"]
    checkpoints.wait()  # raised once only
    save(checkpoints, 3, make_state())
    assert checkpoints.steps() == [1, 3]


# Keeping


def test_the_newest_steps_are_kept_and_rewinding_deletes_nothing_newer(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (9, 100, 200, 1000):
        save(checkpoints, step, make_state(step))
    assert checkpoints.steps() == [200, 1000]
    save(checkpoints, 150, make_state(150))
    assert checkpoints.steps() == [150, 200, 1000]
    save(checkpoints, 200, make_state(7))  # the same step again: replaced
    assert checkpoints.steps() == [150, 200, 1000]
    restored = checkpoints.restore(abstract(make_state()), step=200)
    assert tree_digest(restored.state) == tree_digest(make_state(7))
    assert names_in(tmp_path) == ["1000", "150", "200"]


# Killed writers

KILLED_WRITER = """
import os, pathlib, shutil, signal, sys
import jax.numpy as jnp
from transformer_jax.training import checkpoint, manifest

directory, moment = sys.argv[1:]
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
def state(step): return {"w": jnp.full((300, 1000), step, jnp.float32), "step": jnp.int32(step)}
checkpoints = checkpoint.Checkpoints(directory, keep=1)
def save(step): checkpoints.save(step, state(step), metadata={"step": step}); checkpoints.wait()

if moment == "any":
    for step in range(1, 10**9):
        save(step)
        print(step, flush=True)
save(1)
seal, rename, rmtree = checkpoint.seal, pathlib.Path.rename, shutil.rmtree
if moment == "copied":
    run = checkpoint.asyncio.run
    checkpoint.asyncio.run = lambda coroutine: (run(coroutine), die())
elif moment == "written":
    checkpoints._handler.finalize = die
elif moment == "unsealed":
    checkpoint.seal = die
elif moment == "half sealed":
    manifest.checksum_line = die
elif moment == "sealed":
    checkpoint.seal = lambda *args: (seal(*args), die())
elif moment == "published":
    pathlib.Path.rename = lambda *args: (rename(*args), die())
elif moment == "retired":
    checkpoint.shutil.rmtree = lambda path, **kwargs: die() if str(path).endswith("deleting") else rmtree(path)
elif moment == "replaced":
    pathlib.Path.rename = lambda *args: (rename(*args), die() if str(args[1]).endswith("replaced") else None)
    save(1)
elif moment == "half deleted":
    checkpoint.shutil.rmtree = lambda path, **kwargs: (rmtree(path / "state"), die())
save(2)
"""
STEPS_LEFT = {
    "copied": [1],
    "written": [1],
    "unsealed": [1],
    "half sealed": [1],
    "sealed": [1],
    "published": [1, 2],
    "retired": [2],
    "half deleted": [2],
    "replaced": [1],
}


def start_writer(directory, moment):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(checkpoint.__file__).parents[2])}
    command = [sys.executable, "-c", KILLED_WRITER, str(directory), moment]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def check_what_a_killed_writer_left(directory):
    """Every reported step is complete. A reader does not touch incomplete files, and the next
    writer removes them."""
    names = names_in(directory)
    reader = Checkpoints(directory, read_only=True)
    for step in reader.steps():
        w = jax.ShapeDtypeStruct((300, 1000), jnp.float32)
        restored = reader.restore({"w": w}, step=step)
        np.testing.assert_array_equal(restored.state["w"], step)
        assert restored.metadata == {"step": step}
    assert names_in(directory) == names
    steps = reader.steps()
    writer = Checkpoints(directory, keep=5)
    assert names_in(directory) == sorted(str(step) for step in steps)
    save(writer, 77, {"w": jnp.zeros(3)})
    assert writer.steps() == [*steps, 77]


@pytest.mark.long
def test_a_writer_killed_at_a_chosen_moment_leaves_whole_steps(tmp_path):
    writers = {moment: start_writer(tmp_path / moment, moment) for moment in STEPS_LEFT}
    for moment, writer in writers.items():
        writer.communicate(timeout=120)
        assert writer.returncode == -signal.SIGKILL, moment
        assert Checkpoints(tmp_path / moment, read_only=True).steps() == STEPS_LEFT[moment], moment
        check_what_a_killed_writer_left(tmp_path / moment)


@pytest.mark.long
def test_a_writer_killed_at_any_moment_leaves_whole_steps(tmp_path):
    random = np.random.default_rng(0)
    writers = [start_writer(tmp_path / str(i), "any") for i in range(4)]
    for i, writer in enumerate(writers):
        for _ in range(3):
            confirmed = int(writer.stdout.readline())
        time.sleep(random.uniform(0, 0.2))
        writer.kill()
        confirmed = int([confirmed, *writer.communicate()[0].split()][-1])
        steps = Checkpoints(tmp_path / str(i), read_only=True).steps()
        assert steps and steps[-1] >= confirmed
        check_what_a_killed_writer_left(tmp_path / str(i))


# Names of directories

ODD_NAMES = ["a\\b", "[ab]", "\\", "a\\..\\b", "\\\\host\\c", "gs:", "\udcff", "a b", "new\nline", "100%", "a%2Fb",
             "#1", "ü, 日本", "~", "*", "a?b", "{x}", "$HOME", "1.writing", "-rf", "x" * 200]


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_a_directory_may_have_any_name(tmp_path, name):
    state = {"w": jnp.arange(300.0), "key": jax.random.key(1)}
    checkpoints = Checkpoints(tmp_path / "linked" / name)
    (tmp_path / "linked").rename(tmp_path / "real")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    save(checkpoints, 1, state, files={"note": b"x"})
    restored = Checkpoints(f"{tmp_path}/linked/{name}/", read_only=True).restore(abstract(state))
    assert tree_digest(restored.state) == tree_digest(state) and restored.files == {"note": b"x"}
    assert names_in(tmp_path) == ["linked", "real"] and os.listdir(tmp_path / "real") == [name]


def test_a_step_is_sealed_only_with_all_its_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "plainly_named", contextlib.nullcontext)  # so that they are written elsewhere
    for name in ("a\\b", "[ab]"):
        checkpoints = Checkpoints(tmp_path / name)
        place = re.escape(str(tmp_path / name))
        with pytest.raises(CheckpointError, match=f"^cannot save step 1 in {place}: 23 of 23 arrays were not written"):
            save(checkpoints, 1, make_state())
        assert checkpoints.steps() == []
    with pytest.raises(CheckpointError, match="files/tokenizer.model was not written"):
        manifest.seal(tmp_path, {"step": 1, "arrays": {}, "key_impls": {}}, ["files/tokenizer.model"])


def sealed_again(directory, change):
    """Changes the manifest of a step as somebody who knows how it is checked."""
    content = json.loads((directory / "manifest.json").read_text())
    change(content)
    changed = json.dumps(content).encode()
    (directory / "manifest.json").write_bytes(changed)
    (directory / "manifest.sha256").write_bytes(manifest.checksum_line(changed))


def test_a_manifest_names_no_file_outside(saved, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"1234")
    record = {"bytes": 4, "sha256": hashlib.sha256(b"1234").hexdigest()}
    for name in (str(secret), "../../../secret", "files/../../../../secret", "", "files/a\0b"):
        sealed_again(saved / "2", lambda content, name=name: content.update(files={name: record}))
        with pytest.raises(CheckpointError, match="run/2 is damaged: manifest.json names a file outside of it"):
            Checkpoints(saved, read_only=True).restore({}, step=2)


def test_a_step_that_was_sealed_without_its_arrays_is_damaged(saved):
    reader = Checkpoints(saved, read_only=True)
    for change, message in (
        (lambda content: content["files"].pop("state/manifest.ocdbt"), "it was sealed without state/manifest.ocdbt"),
        (lambda content: content["files"].pop("metadata.json"), "it was sealed without metadata.json and state/"),
        (lambda content: content["files"].update(a=3), ".*manifest.json: files.a is 3; expected a JSON object"),
        (lambda content: content.pop("arrays"), ".*manifest.json has no 'arrays'; found the keys"),
    ):
        sealed_again(saved / "2", change)
        with pytest.raises(CheckpointError, match=f"run/2 is damaged: {message}"):
            reader.restore({}, step=2)
    with pytest.warns(UserWarning, match="run/2 is damaged: .*; using step 1 instead"):
        assert reader.restore({}).step == 1


def test_an_error_of_tensorstore_becomes_one_line(saved, monkeypatch):
    reader = Checkpoints(saved, read_only=True)
    error = ValueError("NOT_FOUND: Error opening \"zarr\" driver\n  [source locations]")
    monkeypatch.setattr(arrays, "_read_uncommitted", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(CheckpointError, match=r"^cannot read the arrays in .*/run/2/state: NOT_FOUND: .*locations\]$"):
        reader.restore(abstract(make_state()))


# Damage


def damages(content):
    """Yields damaged versions of a file's content; None is a deleted file."""
    yield None
    yield content + b"\0"
    if content:
        yield content[:-1]
        for position in (0, len(content) // 2, len(content) - 1):
            yield content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


@pytest.mark.long
def test_every_damaged_file_is_named_and_the_step_before_is_used(saved):
    reader = Checkpoints(saved, read_only=True)
    wanted = abstract(make_state())
    paths = files_in(saved / "2")
    assert len(paths) > 8
    for path in paths:
        content = path.read_bytes()
        for damaged in damages(content):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.warns(UserWarning, match="using step 1 instead") as warned:
                restored = reader.restore(wanted)
            (message,) = {str(warning.message) for warning in warned}
            assert str(saved / "2") in message and str(path.relative_to(saved / "2")) in message
            assert "\n" not in message
            assert restored.step == 1 and restored.metadata == {"step": 1}
            assert tree_digest(restored.state) == tree_digest(make_state(1))
            with pytest.raises(CheckpointError, match="is damaged") as raised:
                reader.restore(wanted, step=2)
            assert str(path.relative_to(saved / "2")) in str(raised.value)
        path.write_bytes(content)
    assert reader.restore(wanted).step == 2


def test_nothing_is_deserialised_before_everything_is_verified(saved, monkeypatch):
    (saved / "2" / "files" / "tokenizer.model").write_bytes(b"x")
    reader = Checkpoints(saved, read_only=True)
    monkeypatch.setattr(checkpoint, "read_arrays", lambda *_: pytest.fail("read from a damaged step"))
    with pytest.raises(CheckpointError, match=r"files/tokenizer.model has 1 bytes, not 5"):
        reader.restore(abstract(make_state()), step=2)


def test_restoring_without_an_undamaged_step_is_an_error(saved, tmp_path):
    for step in "12":
        (saved / step / "metadata.json").unlink()
    reader = Checkpoints(saved, read_only=True)
    with pytest.raises(CheckpointError, match=r"run/2 is damaged: cannot read metadata.json.*run/1 is damaged"):
        reader.restore({})
    with pytest.raises(CheckpointError, match=r"holds steps \[1, 2\], not 7"):
        reader.restore({}, step=7)
    with pytest.raises(CheckpointError, match="holds steps"):
        Checkpoints(tmp_path / "nowhere", read_only=True).restore({})
    assert not (tmp_path / "nowhere").exists()


# Mismatch


def test_up_to_five_differing_leaves_are_listed(saved):
    reader = Checkpoints(saved, read_only=True)
    wide = abstract(make_state(width=5))
    with pytest.raises(CheckpointError) as raised:
        reader.restore(wide)
    message = str(raised.value)
    assert "params/kernel" not in message and message.endswith("; and 4 more")
    assert "opt_state/1/0/mu/blocks/0/bias: stored bfloat16[4], expected bfloat16[5]" in message
    assert message.count("expected") == 5

    state = abstract(make_state())
    for change, expected in {
        "dtype": ({"step": jax.ShapeDtypeStruct((), jnp.float32)}, "step: stored int32[], expected float32[]"),
        "key": ({"key": abstract(jax.random.key(0, impl="rbg"))}, "key: stored key<fry>[], expected key<rbg>[]"),
        "missing": ({"params": {}}, "params/kernel: stored float32[3, 4], expected nothing"),
        "added": ({"ema": {"w": state["step"]}}, "ema/w: stored nothing, expected int32[]"),
    }.values():
        with pytest.raises(CheckpointError) as raised:
            reader.restore(state | change)
        assert expected in str(raised.value)


def test_only_a_dict_may_leave_out_a_part(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, (jnp.zeros(2), jnp.zeros(3)))
    with pytest.raises(CheckpointError, match=r"1: stored float32\[3\], expected nothing"):
        checkpoints.restore((jax.ShapeDtypeStruct((2,), jnp.float32),))


# Another mesh


def on_mesh(num_devices, spec):
    return NamedSharding(Mesh(np.array(jax.devices()[:num_devices]), ("data",)), spec)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
def test_saved_on_8_devices_restored_on_1_2_and_4(tmp_path):
    values = {"rows": np.arange(64.0, dtype=np.float32).reshape(16, 4), "all": np.arange(8, dtype=np.int32)}
    specs = {"rows": P("data"), "all": P(), "key": P()}
    key = jax.random.key(5)
    state = {name: jax.device_put(value, on_mesh(8, specs[name])) for name, value in (values | {"key": key}).items()}
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, state)
    for num_devices in (1, 2, 4, 8):
        wanted = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=on_mesh(num_devices, specs[name]))
            for name, array in state.items()
        }
        restored = checkpoints.restore(wanted).state
        for name, value in values.items():
            assert restored[name].sharding == wanted[name].sharding
            np.testing.assert_array_equal(restored[name], value)
        assert {shard.data.shape for shard in restored["rows"].addressable_shards} == {(16 // num_devices, 4)}
        assert restored["key"].sharding.device_set == wanted["key"].sharding.device_set
        assert tree_digest(restored["key"]) == tree_digest(key)
    restored = checkpoints.restore(abstract(values) | {"key": abstract(key)}).state
    assert len(restored["rows"].devices()) == 1 and tree_digest(restored) == tree_digest(state)


# What cannot be written


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(CheckpointError, match=rf"cannot write checkpoints to {tmp_path}/file/run: Not a directory"):
        Checkpoints(tmp_path / "file" / "run")


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of 2 MiB. Skips the test if this machine does not allow it."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_read_only_file_system(small_disk):
    directory = small_disk / "run"
    state = make_state()
    save(Checkpoints(directory), 1, state)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=f"cannot write checkpoints to {directory}: Read-only file system"):
        Checkpoints(directory)
    restored = Checkpoints(directory, read_only=True).restore(abstract(state)).state
    assert tree_digest(restored) == tree_digest(state)


def test_a_full_disk_is_one_clear_line_and_loses_nothing(small_disk, caplog):
    directory = small_disk / "run"
    checkpoints = Checkpoints(directory)
    state = make_state()
    save(checkpoints, 1, state)
    checkpoints.save(2, jax.random.normal(jax.random.key(0), (1024, 1024)), metadata={})
    with pytest.raises(CheckpointError) as raised:
        checkpoints.wait()
    assert str(raised.value) == f"cannot save step 2 in {directory}: No space left on device"
    assert caplog.text == ""
    assert names_in(directory) == ["1"]
    save(checkpoints, 3, state)
    assert tree_digest(checkpoints.restore(abstract(state), step=1).state) == tree_digest(state)
    assert checkpoints.steps() == [1, 3]


def test_a_full_disk_prints_no_stack_trace(small_disk, monkeypatch):
    """Orbax closes its loop when the first array fails, and tensorstore still has to tell it of the
    others."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(str(unraisable.exc_value)))
    arrays = {str(i): jax.random.normal(jax.random.key(i), (20_000,)) for i in range(60)}
    with contextlib.closing(Checkpoints(small_disk / "run")) as checkpoints:
        for step in range(4):
            checkpoints.save(step, arrays, metadata={})
            with pytest.raises(CheckpointError, match="No space left on device"):
                checkpoints.wait()
    assert printed == []
    sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError("another")))  # every other message is still printed
    assert printed == ["another"]


@pytest.mark.parametrize("function", ["seal", "flush"])
def test_a_disk_that_fills_up_late(tmp_path, monkeypatch, function):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, make_state())
    monkeypatch.setattr({"seal": checkpoint, "flush": manifest}[function], function, full)
    checkpoints.save(2, make_state(), metadata={})
    with pytest.raises(CheckpointError, match=f"cannot save step 2 in {tmp_path}: No space left on device"):
        checkpoints.wait()
    assert names_in(tmp_path) == ["1"]


def test_values_that_cannot_be_stored_are_refused_before_anything_is_written(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    good = {"state": {"w": jnp.zeros(2)}, "metadata": {}}
    for change, message in (
        ({"metadata": {"w": jnp.zeros(2)}}, "metadata cannot be written as JSON"),
        ({"files": {"../escape": b""}}, r"'\.\./escape' must not contain a directory"),
        ({"state": {"w": np.zeros(2)}}, "w is a ndarray; a checkpoint stores jax.Array leaves only"),
        ({"state": {"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)}}, "two leaves of the state have the same path"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoints.save(1, **(good | change))
    with pytest.raises(CheckpointError, match="step is -1"):
        checkpoints.save(-1, **good)
    with pytest.raises(CheckpointError, match="Cannot save arrays with zero size"):
        save(checkpoints, 1, {"w": jnp.zeros((0, 3))})
    with pytest.raises(CheckpointError, match="read_only=True"):
        Checkpoints(tmp_path, read_only=True).save(1, **good)
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
    assert names_in(tmp_path) == []


def test_no_pickle(tmp_path, monkeypatch):
    for function in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(pickle, function, lambda *_, **__: pytest.fail("pickle was used"))
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, make_state())
    assert checkpoints.restore(abstract(make_state())).step == 1


# Digest


def test_the_digest_sees_every_bit_path_shape_and_dtype():
    state = {"a": jnp.zeros(4), "b": (jnp.int32(1), jax.random.key(0)), "c": None}
    same = {"b": [np.int32(1), jax.random.key(0)], "a": np.zeros(4, np.float32)}
    assert tree_digest(state) == tree_digest(same)
    changed = [
        {"a": jnp.zeros(4).at[3].set(1e-45)},
        {"a": -jnp.zeros(4)},
        {"a": jnp.zeros((2, 2))},
        {"a": jnp.zeros(4, jnp.int32)},
        {"a": jnp.zeros(8, jnp.bfloat16)},
        {"b": (jnp.int32(1), jax.random.key(1))},
        {"b": (jnp.int32(1), jax.random.key_data(jax.random.key(0)))},
        {"b": (jnp.int32(2), jax.random.key(0))},
        {"d": jnp.zeros(1)},
    ]
    digests = [tree_digest(state | change) for change in changed]
    assert len({tree_digest(state), tree_digest({"A": state["a"], "b": state["b"]}), *digests}) == len(changed) + 2
    assert len(tree_digest(state)) == 64
