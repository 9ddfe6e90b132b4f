"""Checkpoints: written in the background, visible only when complete, verified when read, restored
onto any mesh.

One step is one directory, named by its number:

    200/state/... the arrays, by orbax, each under its path in the state ("params/embedding/kernel")
    200/metadata.json what the caller knows about the step: config, data position, metrics
    200/files/NAME other files that belong to it: the tokenizer 200/manifest.json bytes and SHA-256
    of every file above; dtype and shape of every array 200/manifest.sha256 SHA-256 of the manifest,
    in the format of `sha256sum --check`

It is written as `200.writing`, flushed to disk, and renamed last. It is deleted by way of
`200.deleting`. So a process killed at any moment leaves a whole step or one that no reader sees;
the next writer removes what it left.
"""

import asyncio
import concurrent.futures
import json
import logging
import operator
import os
import pathlib
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.training.leaves import describe, is_key, named_leaves
from transformer_jax.training.manifest import CheckpointError, flush, reason, seal, verified_manifest

_BARRIER_TIMEOUT_MS = 20 * 60 * 1000


class Restored(NamedTuple):
    """What one step holds: its number, the state, the metadata, and the files by name."""

    step: int
    state: Any
    metadata: dict[str, Any]
    files: dict[str, bytes]


class Checkpoints:
    """A directory of checkpoints, one for each saved step; at most one writer at a time, any number
    of readers.

    Args:
      directory: where the steps are. A writer creates it, proves that it can write there, and
        removes what a killed writer left behind; a reader changes nothing.
      keep: how many steps to keep. Saving a step deletes the oldest ones up to it, once it is
        complete.
      read_only: True for a reader.

    Raises:
      CheckpointError: the directory cannot be written to.
      ValueError: `keep` is below 1.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3, read_only: bool = False):
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 step must be kept")
        import orbax.checkpoint as ocp  # here, not above: it takes longer to import than a small model to load

        self.directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._read_only = read_only
        self._handler = ocp.PyTreeCheckpointHandler()
        self._writer = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future | None = None
        if not read_only and jax.process_index() == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.directory).close()
                self._sweep()
            except OSError as error:
                raise CheckpointError(f"cannot write checkpoints to {self.directory}: {reason(error)}") from error
        logging.getLogger("absl").addFilter(_not_from_an_orbax_thread)

    def steps(self) -> list[int]:
        """Returns the numbers of the complete steps, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if re.fullmatch(r"0|[1-9]\d*", path.name))

    def save(self, step: int, state: Any, *, metadata: Mapping[str, Any], files: Mapping[str, bytes] | None = None):
        """Saves one step in the background, replacing an earlier save of the same step.

        Returns once the arrays are copied to host memory, so the state may be donated to the next
        training step. Waits for the save before it, and raises what went wrong there.

        Args:
          step: training step, 0 or more.
          state: pytree of `jax.Array`, typed PRNG keys included.
          metadata: anything JSON can hold.
          files: file name -> content.

        Raises:
          CheckpointError: the state, the metadata or a name cannot be stored, or a save failed.
        """
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened with read_only=True")
        self.wait()
        step = operator.index(step)
        if step < 0:
            raise CheckpointError(f"step is {step}; it must be 0 or more")
        try:
            contents = {"metadata.json": json.dumps(metadata, indent=1).encode()}
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"metadata is not JSON: {error}") from error
        for name, content in (files or {}).items():
            if name != pathlib.PurePath(name).name:
                raise CheckpointError(f"file name {name!r} must have no directory")
            contents[f"files/{name}"] = content
        leaves = named_leaves(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise CheckpointError(f"{name} is a {type(leaf).__name__}; a checkpoint stores jax.Array leaves only")
        manifest = {
            "step": step,
            "arrays": {name: describe(leaf) for name, leaf in leaves.items()},
            "key_impls": {name: str(jax.random.key_impl(leaf)) for name, leaf in leaves.items() if is_key(leaf)},
        }
        arrays = {name: jax.random.key_data(leaf) if is_key(leaf) else leaf for name, leaf in leaves.items()}
        copied = threading.Event()
        self._pending = self._writer.submit(self._write, manifest, arrays, contents, copied)
        copied.wait()

    def wait(self):
        """Waits until the save in progress, if any, is on disk and visible.

        Raises:
          CheckpointError: it failed.
        """
        if self._pending is not None:
            error = self._pending.exception()
            self._pending = None
            if error is not None:
                raise error

    def close(self):
        """Waits like `wait`, and ends the background thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._handler.close()

    def restore(self, abstract_state: Any, *, step: int | None = None) -> Restored:
        """Verifies a step against its manifest, then reads the state asked for.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct`, or of arrays in their place. A leaf with
            a sharding is read directly onto its mesh; one without becomes an uncommitted array on
            the default device. A dict may leave out top-level keys of what was saved, and these are
            not read: `{"params": ...}` for inference, `{}` for the metadata and files alone.
          step: which step; None for the newest good one. Then a damaged step is passed over with a
            warning.

        Returns:
          The step, with the state in the structure of `abstract_state`.

        Raises:
          CheckpointError: there is no such step, or it is damaged (naming the file), or its arrays
            differ in path, shape or dtype from `abstract_state` (naming up to 5).
        """
        self.wait()
        steps = self.steps()
        if not steps or step not in (None, *steps):
            raise CheckpointError(f"{self.directory} holds steps {steps}, not {'any' if step is None else step}")
        damage = []
        for candidate in reversed(steps) if step is None else [step]:
            try:
                manifest = verified_manifest(self.directory / str(candidate))
            except CheckpointError as error:
                damage.append(str(error))
            else:
                break
        else:
            raise CheckpointError("; ".join(damage))
        if damage:
            warnings.warn(f"{'; '.join(damage)}; using step {candidate} instead", stacklevel=2)
        path = self.directory / str(candidate)
        return Restored(
            step=candidate,
            state=self._read_state(path, abstract_state, manifest),
            metadata=json.loads((path / "metadata.json").read_bytes()),
            files={name[6:]: (path / name).read_bytes() for name in manifest["files"] if name.startswith("files/")},
        )

    def _read_state(self, path: pathlib.Path, abstract_state: Any, manifest: dict) -> Any:
        import orbax.checkpoint as ocp
        from etils import epath

        leaves = named_leaves(abstract_state)
        stored = manifest["arrays"]
        if isinstance(abstract_state, dict):
            stored = {name: stored[name] for name in stored if any(_is_below(name, key) for key in abstract_state)}
        expected = {name: describe(leaf) for name, leaf in leaves.items()}
        differing = [name for name in sorted(stored | expected) if stored.get(name) != expected.get(name)]
        if differing:
            shown = "; ".join(
                f"{name}: stored {stored.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
                for name in differing[:5]
            )
            more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise CheckpointError(f"{path} does not fit the state asked for: {shown}{more}")
        if not leaves:
            return abstract_state

        def restore_args(leaf):
            if getattr(leaf, "sharding", None) is None or not getattr(leaf, "committed", True):
                return ocp.RestoreArgs(restore_type=np.ndarray)
            return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=leaf.sharding)

        arrays = self._handler.restore(
            epath.Path(path / "state"),
            args=ocp.args.PyTreeRestore(
                item=leaves,
                restore_args={name: restore_args(leaf) for name, leaf in leaves.items()},
                partial_restore=True,
            ),
        )
        impls = manifest["key_impls"]
        restored = []
        for name in leaves:
            array = jnp.asarray(arrays[name])
            restored.append(jax.random.wrap_key_data(array, impl=impls[name]) if name in impls else array)
        return jax.tree.unflatten(jax.tree.structure(abstract_state), restored)

    def _write(self, manifest: dict, arrays: dict, contents: dict[str, bytes], copied: threading.Event):
        import orbax.checkpoint as ocp
        from etils import epath

        step = manifest["step"]
        writing = self.directory / f"{step}.writing"
        barrier = ocp.multihost.get_barrier_sync_fn()

        async def copy_to_host():
            commits = await self._handler.async_save(epath.Path(writing / "state"), args=ocp.args.PyTreeSave(arrays))
            copied.set()
            return commits

        try:
            if jax.process_index() == 0:
                self._sweep()
                (writing / "state").mkdir(parents=True)
                (writing / "files").mkdir()
            barrier(key=f"{writing}: created", timeout_ms=_BARRIER_TIMEOUT_MS)
            for commit in asyncio.run(copy_to_host()):
                commit.result()
            barrier(key=f"{writing}: arrays written", timeout_ms=_BARRIER_TIMEOUT_MS)
            if jax.process_index() == 0:
                self._handler.finalize(epath.Path(writing / "state"))
                for name, content in contents.items():
                    (writing / name).write_bytes(content)
                seal(writing, manifest)
                self._publish(step, writing)
            barrier(key=f"{writing}: published", timeout_ms=_BARRIER_TIMEOUT_MS)
        except Exception as error:  # whatever a storage layer raises becomes one clear line for the training loop
            shutil.rmtree(writing, ignore_errors=True)
            raise CheckpointError(f"cannot save step {step} in {self.directory}: {reason(error)}") from error
        finally:
            copied.set()

    def _publish(self, step: int, writing: pathlib.Path):
        if step in self.steps():
            self._retire(step)
        writing.rename(self.directory / str(step))
        flush(self.directory)
        # A step after this one belongs to a run that was rewound: not older, so not this save's to
        # delete.
        for old in [other for other in self.steps() if other <= step][: -self._keep]:
            self._retire(old)
        self._sweep()

    def _retire(self, step: int):
        (self.directory / str(step)).rename(self.directory / f"{step}.deleting")

    def _sweep(self):
        for path in self.directory.iterdir():
            if re.fullmatch(r"\d+\.(writing|deleting)", path.name):
                shutil.rmtree(path)


def _is_below(name: str, key: Any) -> bool:
    return f"{name}/".startswith(f"{key}/")


def _not_from_an_orbax_thread(record: logging.LogRecord) -> bool:
    """Drops the stack traces that orbax's threads log for an error that `save` or `wait` then
    raises in one line."""
    return "/orbax/checkpoint/_src/futures/" not in record.pathname or record.levelno < logging.ERROR
