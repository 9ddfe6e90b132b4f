"""The manifest of a checkpoint: a list of everything in a step, with which a reader detects missing
or changed files."""

import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import TypedDict

from transformer_jax.json_files import parse_json

# The file in which tensorstore looks up all other files that hold arrays.
STORE = "state/manifest.ocdbt"


class CheckpointError(ValueError):
    """A checkpoint cannot be written, is damaged, or does not fit the state asked for."""


class FileRecord(TypedDict):
    """The entry of one file in the manifest: its size in bytes and its SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


class Contents(TypedDict):
    """The contents of a step, except for the list of its files.

    Attributes:
      step: the number of the step.
      arrays: dtype and shape of each array, such as ``float32[2, 3]``, by its path in the state.
      key_impls: the PRNG implementation of each array that holds PRNG keys, by its path.
    """

    step: int
    arrays: dict[str, str]
    key_impls: dict[str, str]


class Manifest(Contents):
    """The whole manifest.

    Attributes:
      files: size and digest of each file, by its path relative to the directory of the step.
    """

    files: dict[str, FileRecord]


class DoesNotFitError(CheckpointError):
    """A checkpoint is undamaged, but its arrays differ from those that the caller expects."""


def seal(directory: pathlib.Path, contents: Contents, required: Iterable[str]):
    """Writes the manifest of all files in a directory, and flushes everything to disk.

    Args:
      directory: the directory of the step.
      contents: the contents of the manifest, except for the list of files.
      required: the files that must exist, as paths relative to the directory.

    Raises:
      CheckpointError: if a required file does not exist.
    """
    files: dict[str, FileRecord] = {}
    for path in sorted(directory.rglob("*")):
        flush(path)
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    for name in required:
        if name not in files:
            raise CheckpointError(f"{name} was not written")
    content = json.dumps(contents | {"files": files}, indent=1).encode()
    (directory / "manifest.json").write_bytes(content)
    (directory / "manifest.sha256").write_bytes(checksum_line(content))
    for path in (directory / "manifest.json", directory / "manifest.sha256", directory):
        flush(path)


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file; a named pipe in its place, which would be waited for without end, is empty."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read(path: pathlib.Path) -> bytes:
    """Reads a small file of a step."""
    with open(path, "rb", opener=_open_at_once) as file:
        return file.read()


def verified_manifest(directory: pathlib.Path) -> Manifest:
    """Reads the manifest of a step, and compares every file of the step with it.

    Args:
      directory: the directory of the step.

    Returns:
      The manifest.

    Raises:
      CheckpointError: if a file is missing or has changed, or the manifest itself is damaged.
    """
    path = directory / "manifest.json"
    try:
        content = _read(path)
        path = directory / "manifest.sha256"
        if _read(path) != checksum_line(content):
            raise CheckpointError(f"{directory} is damaged: manifest.json does not match manifest.sha256")
        manifest = parse_json(content, directory / "manifest.json", Manifest)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing takes most of the time
            check = functools.partial(_check_file, directory)
            list(threads.map(check, manifest["files"], manifest["files"].values()))
    except OSError as error:
        raise _unreadable(directory, path.name, error) from error
    except CheckpointError:
        raise
    except ValueError as error:  # the digest is right, but the content is not a manifest
        raise CheckpointError(f"{directory} is damaged: {error}") from error
    required = ["metadata.json", *([STORE] if manifest["arrays"] else [])]
    unlisted = [name for name in required if name not in manifest["files"]]
    if unlisted:
        raise CheckpointError(f"{directory} is damaged: it was sealed without {' and '.join(unlisted)}")
    return manifest


def check_fits(directory: pathlib.Path, stored: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compares the stored arrays with those that the caller expects.

    Args:
      directory: the directory of the step, for the error.
      stored: dtype and shape of each stored array, by its path in the state.
      expected: the same of each expected array.

    Raises:
      DoesNotFitError: if they differ.
    """
    differing = [name for name in sorted({*stored, *expected}) if stored.get(name) != expected.get(name)]
    if differing:
        shown = "; ".join(f"{name}: stored {stored.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
                          for name in differing[:5])
        more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise DoesNotFitError(f"{directory} does not fit the requested state: {shown}{more}")


def _check_file(directory: pathlib.Path, name: str, recorded: FileRecord) -> None:
    """Raises CheckpointError if a file of a step differs from its entry in the manifest."""
    if not _is_below(name):
        raise CheckpointError(f"{directory} is damaged: manifest.json names a file outside of it, {name!r}")
    try:
        with open(directory / name, "rb", opener=_open_at_once) as file:
            size = os.fstat(file.fileno()).st_size
            if size != recorded["bytes"]:
                raise CheckpointError(f"{directory} is damaged: {name} has {size} bytes, not {recorded['bytes']}")
            if hashlib.file_digest(file, "sha256").hexdigest() != recorded["sha256"]:
                raise CheckpointError(f"{directory} is damaged: the content of {name} has changed")
    except OSError as error:
        raise _unreadable(directory, name, error) from error


def _unreadable(directory: pathlib.Path, name: str, error: OSError) -> CheckpointError:
    """Makes the error for a file of a step that cannot be read."""
    return CheckpointError(f"{directory} is damaged: cannot read {name}: {reason(error)}")


def _is_below(name: str) -> bool:
    """Returns True if a name in a manifest is a path below the directory of the step."""
    path = pathlib.PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name and path.name != ""


def checksum_line(content: bytes) -> bytes:
    """Returns the only line of ``manifest.sha256``, for a manifest with this content."""
    return f"{hashlib.sha256(content).hexdigest()}  manifest.json\n".encode()


def flush(path: pathlib.Path):
    """Waits until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: Exception) -> str:
    """Returns the cause of an error in one line."""
    code = re.search(r"os_error_code='(\d+)'", str(error))  # in this form, tensorstore reports an OSError
    text = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__
