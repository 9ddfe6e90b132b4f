"""Reads whole files, and adds the name of the file to errors of writing it."""

import contextlib
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping
from typing import Any


def read_file(path: str | pathlib.Path) -> bytes:
    """Reads a file that is a plain file.

    Reading a named pipe in its place would wait forever.

    Args:
      path: The path of the file.

    Returns:
      Its bytes.

    Raises:
      OSError: The file does not exist, or cannot be read.
      ValueError: The path names something else, such as a directory.
    """
    check_file(path)
    return pathlib.Path(path).read_bytes()


def check_file(path: str | pathlib.Path) -> None:
    """Checks that a path names a plain file, before it is opened.

    Args:
      path: The path of the file.

    Raises:
      OSError: The file does not exist.
      ValueError: The path names something else, such as a directory.
    """
    if kind := _other_kind(pathlib.Path(path)):
        raise ValueError(f"{path} is {kind}; expected a file")


@contextlib.contextmanager
def locked_directory(path: pathlib.Path, kind: str = "directory", *, holds_lock: bool = True) -> Iterator[None]:
    """Locks a directory, so that two programs cannot overwrite each other's files. Creates the
    directory if it does not exist.

    Args:
      path: The path of the directory.
      kind: What error messages call it.
      holds_lock: False creates the directory without locking it, because another process of this
        program holds the lock.

    Raises:
      ValueError: Another program has locked the directory, or it cannot be made.
    """
    import fcntl  # which only Unix has

    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"the {kind} {path} cannot be made, because it, or a part of its path, is a file; use "
                         f"another {kind}") from None
    if (lock := path / ".lock").exists() and not lock.is_file():
        raise ValueError(f"{lock} is not a file, so {path} cannot be locked; delete it, or use another {kind}")
    with (path / ".lock").open("w") as lock:
        if holds_lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another run is using {path}; wait until it ends, or use another {kind}") from None
        yield


def partial_path(path: str | pathlib.Path) -> pathlib.Path:
    """Returns the name that a file has until it is complete: that of the file and ``.partial``.

    Args:
      path: The path of the complete file.

    Returns:
      The path of the incomplete file.

    Raises:
      ValueError: The path names something else than a file. Writing to a named pipe, for example,
        would wait forever.
    """
    partial = pathlib.Path(f"{os.fspath(path)}.partial")
    if partial.exists() and (kind := _other_kind(partial)):
        raise ValueError(f"{partial} is {kind}, but a file of this name is written; delete it")
    return partial


def _other_kind(path: pathlib.Path) -> str | None:
    """Names what a path is that is no plain file; ``None`` for a plain file."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return None
    return "a directory" if stat.S_ISDIR(mode) else "a named pipe" if stat.S_ISFIFO(mode) else "no plain file"


def save_tensors(path: str | pathlib.Path, tensors: Mapping[str, Any],
                 metadata: dict[str, str] | None = None) -> None:
    """Writes arrays to a file in the format safetensors.

    Args:
      path: The path of the file.
      tensors: The NumPy arrays by name.
      metadata: The metadata of the file.

    Raises:
      OSError: The file cannot be written.
      ValueError: The same, in the words of safetensors, such as for a full disk.
      ImportError: safetensors is not installed.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        with naming(path):
            save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error


@contextlib.contextmanager
def naming(path: str | pathlib.Path) -> Iterator[None]:
    """Adds the name of the file to an OSError that lacks it.

    Python does not name the file in the error of a full disk, for example.

    Args:
      path: The file that is written inside the ``with`` block.

    Yields:
      Nothing.

    Raises:
      OSError: The original error, with the name of the file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
