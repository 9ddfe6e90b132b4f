"""Checkpoints that are written in the background, verified when read, and restored onto any mesh.

Each step has one directory, which is named by the number of the step:

    200/state/...        the arrays, which orbax writes, each under its path in the state, such as
                         "params/embedding/kernel"
    200/metadata.json    data of the caller about the step: config, data position, metrics
    200/files/NAME       other files that belong to the step, such as the tokenizer
    200/manifest.json    bytes and SHA-256 of every file above; dtype and shape of every array
    200/manifest.sha256  SHA-256 of the manifest, in the format of ``sha256sum --check``

A step is written into ``200.writing``, flushed to disk, and renamed at the end. Before it is
deleted, it is renamed to ``200.deleting``. An earlier save of the same step is ``200.replaced``
until the new save has its name. If a process is killed at any moment, readers therefore see only
complete steps, and the next writer removes the rest.
"""

import asyncio
import concurrent.futures
import json
import operator
import os
import pathlib
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from transformer_jax.json_files import read_json
from transformer_jax.training.arrays import keep_orbax_quiet, missing_arrays, plainly_named, read_arrays
from transformer_jax.training.leaves import describe, is_key, named_leaves
from transformer_jax.training.manifest import (
    STORE,
    CheckpointError,
    Contents,
    Manifest,
    check_fits,
    flush,
    reason,
    seal,
    verified_manifest,
)

_BARRIER_TIMEOUT_MS = 20 * 60 * 1000


class Restored(NamedTuple):
    """A restored step: its number, the state, the metadata, the files by name, and the manifest."""

    step: int
    state: Any
    metadata: dict[str, Any]
    files: dict[str, bytes]
    manifest: Manifest


class Checkpoints:
    """A directory of checkpoints, for at most one writer at a time and any number of readers.

    Args:
      directory: the directory. A writer creates it, tests that it can write there, and removes what
        a killed writer left behind. A reader changes nothing.
      keep: how many steps to keep. After a step is saved, the oldest steps before it are deleted.
      read_only: True for a reader.

    Raises:
      CheckpointError: if the directory cannot be written to.
      ValueError: if ``keep`` is below 1.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3, read_only: bool = False):
        if keep < 1:
            raise ValueError(f"keep is {keep}; it must be at least 1")
        import orbax.checkpoint as ocp  # slow to import

        self.directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._read_only = read_only
        # Weights hardly compress: zstd made files 8 % smaller, and writing six times slower.
        self._handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        self._writer = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future | None = None
        if not read_only and jax.process_index() == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.directory).close()
                self._sweep()
            except OSError as error:
                raise CheckpointError(f"cannot write checkpoints to {self.directory}: {reason(error)}") from error
        keep_orbax_quiet()

    def steps(self) -> list[int]:
        """Lists the complete steps. An empty directory is not a step, because no save leaves one.

        Returns:
          The numbers of the steps, ascending.
        """
        if not self.directory.is_dir():
            return []
        found = ((path, re.fullmatch(r"(0|[1-9]\d*)(\.replaced)?", path.name)) for path in self.directory.iterdir())
        return sorted({int(match[1]) for path, match in found if match and any(path.glob("*"))})

    def save(self, step: int, state: Any, *, metadata: Mapping[str, Any], files: Mapping[str, bytes] | None = None):
        """Saves one step in the background, and replaces an earlier save of the same step.

        Waits for the previous save and raises its error, if it failed. Then returns as soon as the
        arrays are copied to host memory, so that the next training step may donate the state.

        Args:
          step: the number of the step, 0 or more.
          state: a pytree of ``jax.Array``, which may contain typed PRNG keys.
          metadata: a dict that can be written as JSON.
          files: contents by file name.

        Raises:
          CheckpointError: if something cannot be stored, or the previous save failed.
        """
        if self._read_only:
            raise CheckpointError(f"cannot save: {self.directory} was opened with read_only=True")
        self.wait()
        step = operator.index(step)
        if step < 0:
            raise CheckpointError(f"step is {step}; it must be 0 or more")
        try:
            contents = {"metadata.json": json.dumps(metadata, indent=1).encode()}
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the metadata cannot be written as JSON: {error}") from error
        for name, content in (files or {}).items():
            if name != pathlib.PurePath(name).name:
                raise CheckpointError(f"the file name {name!r} must not contain a directory")
            contents[f"files/{name}"] = content
        leaves = named_leaves(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise CheckpointError(f"{name} is a {type(leaf).__name__}; a checkpoint stores jax.Array leaves only")
        manifest: Contents = {
            "step": step,
            "arrays": {name: describe(leaf) for name, leaf in leaves.items()},
            "key_impls": {name: str(jax.random.key_impl(leaf)) for name, leaf in leaves.items() if is_key(leaf)},
        }
        arrays = {name: jax.random.key_data(leaf) if is_key(leaf) else leaf for name, leaf in leaves.items()}
        copied = threading.Event()
        self._pending = self._writer.submit(self._write, manifest, arrays, contents, copied)
        copied.wait()

    def wait(self):
        """Waits until the save in progress, if there is one, is complete.

        Raises:
          CheckpointError: if the save failed.
        """
        if self._pending is not None:
            error = self._pending.exception()
            self._pending = None
            if error is not None:
                raise error

    def close(self):
        """Waits for the save in progress like ``wait``, and ends the background thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._handler.close()

    def restore(self, abstract_state: Any, *, step: int | None = None) -> Restored:
        """Verifies a step against its manifest, and reads the requested state.

        Args:
          abstract_state: a pytree of ``jax.ShapeDtypeStruct`` or arrays. A leaf with a sharding is
            read directly onto its mesh; others become uncommitted arrays on the default device. A
            dict may leave out top-level keys, which are then not read: ``{"params": ...}`` for
            inference, ``{}`` for only the metadata and files.
          step: the step to read. ``None`` reads the newest undamaged one, and warns about others.

        Returns:
          The step, with the state in the structure of ``abstract_state``.

        Raises:
          CheckpointError: if there is no such step, it is damaged, or its arrays differ from
            ``abstract_state`` in path, shape or dtype.
        """
        self.wait()
        steps = self.steps()
        if not steps or step not in (None, *steps):
            raise CheckpointError(f"{self.directory} holds steps {steps}, not {'any' if step is None else step}")
        damage = []
        for candidate in reversed(steps) if step is None else [step]:
            try:
                manifest = verified_manifest(self._path(candidate))
            except CheckpointError as error:
                damage.append(str(error))
            else:
                break
        else:
            raise CheckpointError("; ".join(damage))
        if damage:
            warnings.warn(f"{'; '.join(damage)}; using step {candidate} instead", stacklevel=2)
        path = self._path(candidate)
        restored = Restored(
            step=candidate, state={}, metadata=read_json(path / "metadata.json", dict[str, Any]), manifest=manifest,
            files={name[6:]: (path / name).read_bytes() for name in manifest["files"] if name.startswith("files/")})
        return restored._replace(state=self.read(restored, abstract_state))

    def read(self, restored: Restored, abstract_state: Any) -> Any:
        """Reads another state from a step that ``restore`` has verified, without verifying it again.

        Args:
          restored: what ``restore`` returned for the step, such as ``restore({})``.
          abstract_state: as for ``restore``.

        Returns:
          The state in the structure of ``abstract_state``.

        Raises:
          CheckpointError: if the arrays differ from ``abstract_state``, or cannot be read.
        """
        path, leaves = self._path(restored.step), named_leaves(abstract_state)
        stored = restored.manifest["arrays"]
        if isinstance(abstract_state, dict):
            prefixes = tuple(f"{key}/" for key in abstract_state)
            stored = {name: stored[name] for name in stored if f"{name}/".startswith(prefixes)}
        check_fits(path, stored, {name: describe(leaf) for name, leaf in leaves.items()})
        if not leaves:
            return abstract_state

        arrays = read_arrays(self._handler, path / "state", leaves)
        impls = restored.manifest["key_impls"]
        state = [jax.random.wrap_key_data(arrays[name], impl=impls[name]) if name in impls else arrays[name]
                 for name in leaves]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), state)

    def _write(self, manifest: Contents, arrays: dict, contents: dict[str, bytes], copied: threading.Event):
        import orbax.checkpoint as ocp
        from etils import epath

        step = manifest["step"]
        writing = self.directory / f"{step}.writing"
        barrier = ocp.multihost.get_barrier_sync_fn()

        async def copy_to_host(state: pathlib.Path) -> Iterable[Any]:
            commits = await self._handler.async_save(epath.Path(state), args=ocp.args.PyTreeSave(arrays))
            copied.set()
            return commits or ()

        try:
            with plainly_named(self.directory) as plain:
                state = plain / writing.name / "state"
                if jax.process_index() == 0:
                    self._sweep()
                    state.mkdir(parents=True)
                    (writing / "files").mkdir()
                barrier(key=f"{writing}: created", timeout_ms=_BARRIER_TIMEOUT_MS)
                for commit in asyncio.run(copy_to_host(state)):
                    commit.result()
                barrier(key=f"{writing}: arrays written", timeout_ms=_BARRIER_TIMEOUT_MS)
                if jax.process_index() == 0:
                    self._handler.finalize(epath.Path(state))
                    lost = missing_arrays(state, arrays)
                    if lost:
                        raise CheckpointError(f"{len(lost)} of {len(arrays)} arrays were not written: {lost[0]} ...")
            if jax.process_index() == 0:
                for name, content in contents.items():
                    (writing / name).write_bytes(content)
                seal(writing, manifest, [*contents, STORE])
                self._publish(step, writing)
            barrier(key=f"{writing}: published", timeout_ms=_BARRIER_TIMEOUT_MS)
        except Exception as error:  # a storage layer may raise anything; the loop needs one clear line
            shutil.rmtree(writing, ignore_errors=True)
            raise CheckpointError(f"cannot save step {step} in {self.directory}: {reason(error)}") from error
        finally:
            copied.set()

    def _publish(self, step: int, writing: pathlib.Path):
        if (self.directory / str(step)).exists():
            (self.directory / str(step)).rename(self.directory / f"{step}.replaced")
        writing.rename(self.directory / str(step))
        flush(self.directory)
        # Later steps exist if the run went back to an earlier step; those are not deleted.
        for old in [other for other in self.steps() if other <= step][: -self._keep]:
            (self.directory / str(old)).rename(self.directory / f"{old}.deleting")
        self._sweep()

    def _sweep(self):
        for path in self.directory.glob("*.replaced"):
            if re.fullmatch(r"\d+", path.stem):
                # If no step has this number, a writer was killed before it renamed the new save.
                path.rename(path.with_suffix(".deleting" if path.with_suffix("").exists() else ""))
        for path in self.directory.iterdir():
            if re.fullmatch(r"\d+\.(writing|deleting)", path.name):
                shutil.rmtree(path)

    def _path(self, step: int) -> pathlib.Path:
        path = self.directory / str(step)
        return path if path.exists() else path.with_suffix(".replaced")
