"""Read the arrays of a checkpoint with orbax and tensorstore, and work around limits of these two
libraries."""

import contextlib
import logging
import math
import mmap
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from transformer_jax.training.manifest import CheckpointError, reason

_PLAIN = re.compile(r"[\w/. +,=@-]+")


@contextlib.contextmanager
def plainly_named(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Provides a path to a directory that has no characters which orbax and tensorstore misread.

    Tensorstore reads a backslash as a slash, and orbax finds its files with a glob pattern, in
    which brackets have a special meaning. In a directory whose name contains such characters,
    arrays would be written to another place or not at all. Therefore this function makes a symbolic
    link to such a directory, in the directory of temporary files.

    Args:
      directory: the directory.

    Yields:
      The directory itself if its name is plain, else the link, which is deleted afterwards.

    Raises:
      CheckpointError: if a link cannot help, because the run has several processes or the directory
        of temporary files has such a name too.
    """
    if _PLAIN.fullmatch(str(directory)):
        yield directory
        return
    odd = "".join(sorted(set(_PLAIN.sub("", str(directory)))))
    if jax.process_count() > 1:
        raise CheckpointError(f"several processes cannot save checkpoints in {directory}, because its name contains "
                              f"{odd!r}; rename it")
    with tempfile.TemporaryDirectory(prefix="transformer-jax-") as place:
        if not _PLAIN.fullmatch(place):
            raise CheckpointError(f"the names of {directory} and of the directory of temporary files, {place}, both "
                                  "contain special characters; set TMPDIR to a directory whose name has only letters, "
                                  "digits and the characters _/. +,=@-")
        link = pathlib.Path(place) / "checkpoints"
        link.symlink_to(directory, target_is_directory=True)
        yield link


def missing_arrays(directory: pathlib.Path, names: Iterable[str]) -> list[str]:
    """Returns the names, sorted, that have no array in a directory with a plain name."""
    import tensorstore

    base = {"driver": "file", "path": f"{directory}/"}
    stored = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    return sorted(name for name in names if f"{name}/.zarray".encode() not in set(stored))


def read_arrays(handler: Any, directory: pathlib.Path, leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads arrays from a directory of any name.

    Args:
      handler: an ``orbax.checkpoint.PyTreeCheckpointHandler``.
      directory: a directory that the handler wrote.
      leaves: the names of the arrays to read. Each value is a ``jax.ShapeDtypeStruct`` or an array
        with the expected shape and dtype. If it has a sharding, orbax reads the array directly onto
        the devices of its mesh.

    Returns:
      The arrays by their names. Those without a sharding are uncommitted arrays on the default
      device.

    Raises:
      CheckpointError: if the arrays cannot be read.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    sharded = {name: leaf for name, leaf in leaves.items()
               if getattr(leaf, "sharding", None) is not None and getattr(leaf, "committed", True)}
    with plainly_named(directory) as plain:
        try:
            arrays = _read_uncommitted(plain, leaves.keys() - sharded.keys())
            if sharded:
                arguments = {name: ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=leaf.sharding)
                             for name, leaf in sharded.items()}
                arrays |= handler.restore(epath.Path(plain), args=ocp.args.PyTreeRestore(
                    item=sharded, restore_args=arguments, partial_restore=True))
        except (ValueError, OSError) as error:
            raise CheckpointError(f"cannot read the arrays in {directory}: {reason(error)}") from error
    return arrays


def _read_uncommitted(directory: pathlib.Path, names: Iterable[str]) -> dict[str, jax.Array]:
    """Reads arrays onto the default device with tensorstore alone.

    Orbax would read each array into memory that JAX must copy. Here the files are mapped, and each
    value is copied once. docs/decisions/2026-11-29_fast_decoding.md has the times.
    """
    import tensorstore

    context = tensorstore.Context({"file_io_mode": {"mode": "memmap"}})
    files = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}}
    opening = {name: tensorstore.open({"driver": "zarr", "kvstore": {**files, "path": f"{name}/"}}, context=context,
                                      open=True, read=True) for name in names}
    arrays, reads = {}, []
    for name, store in opening.items():
        stored = store.result()
        arrays[name] = aligned_empty(stored.shape, stored.dtype.numpy_dtype)
        reads.append(tensorstore.array(arrays[name]).write(stored))
    for read in reads:
        read.result()
    return {name: jax.device_put(array) for name, array in arrays.items()}


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Makes an array whose memory JAX can use on a CPU without a copy.

    NumPy's own memory is not aligned enough. It also asks for huge pages, which takes seconds if
    the memory of the machine is fragmented.

    Args:
      shape: the shape of the array.
      dtype: its dtype.

    Returns:
      The array. Its values are zero.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), np.uint8)
    return memory[:num_bytes].view(dtype).reshape(shape)


def keep_orbax_quiet() -> None:
    """Hides the stack traces that orbax prints when a write fails; the error is still raised.

    There are two sources of stack traces. Each thread of orbax logs its own. Also, orbax writes the
    arrays of a step as tasks of one event loop. If one task fails, for example because the disk is
    full, orbax raises the error and closes the loop. Tensorstore then cannot report to the loop
    that the other tasks are done, and Python prints this as an exception that no code can catch.
    """
    logging.getLogger("absl").addFilter(_not_from_an_orbax_thread)
    previous_hook = sys.unraisablehook
    if getattr(previous_hook, "__name__", None) == _report.__name__:
        return

    def report(unraisable: Any) -> None:
        _report(unraisable, previous_hook)

    report.__name__ = _report.__name__
    sys.unraisablehook = report


def _report(unraisable: Any, previous_hook: Any) -> None:
    """Passes an uncaught exception to the previous hook, unless it is about a closed loop."""
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        previous_hook(unraisable)


def _not_from_an_orbax_thread(record: logging.LogRecord) -> bool:
    """Returns False for the errors that the threads of orbax log."""
    return "/orbax/checkpoint/_src/futures/" not in record.pathname or record.levelno < logging.ERROR
