"""The manifest of a checkpoint: what belongs to a step, by which a reader knows that it is
whole."""

import hashlib
import json
import os
import pathlib
import re


class CheckpointError(ValueError):
    """A checkpoint cannot be written, is damaged, or does not fit the state asked for."""


def seal(directory: pathlib.Path, manifest: dict):
    """Writes the manifest of everything in the directory, and flushes all of it to disk."""
    files = {}
    for path in sorted(directory.rglob("*")):
        flush(path)
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    content = json.dumps(manifest | {"files": files}, indent=1).encode()
    (directory / "manifest.json").write_bytes(content)
    (directory / "manifest.sha256").write_bytes(checksum_line(content))
    for path in (directory / "manifest.json", directory / "manifest.sha256", directory):
        flush(path)


def verified_manifest(directory: pathlib.Path) -> dict:
    """Returns the manifest after comparing every file of the step with it."""
    try:
        path = directory / "manifest.json"
        content = path.read_bytes()
        path = directory / "manifest.sha256"
        if path.read_bytes() != checksum_line(content):
            raise CheckpointError(f"{directory} is damaged: manifest.json does not match manifest.sha256")
        manifest = json.loads(content)
        for name, recorded in manifest["files"].items():
            path = directory / name
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != recorded["bytes"]:
                    raise CheckpointError(f"{directory} is damaged: {name} has {size} bytes, not {recorded['bytes']}")
                if hashlib.file_digest(file, "sha256").hexdigest() != recorded["sha256"]:
                    raise CheckpointError(f"{directory} is damaged: the content of {name} has changed")
    except OSError as error:
        name = path.relative_to(directory)
        raise CheckpointError(f"{directory} is damaged: cannot read {name}: {reason(error)}") from error
    return manifest


def checksum_line(content: bytes) -> bytes:
    """The line of ``manifest.sha256``."""
    return f"{hashlib.sha256(content).hexdigest()}  manifest.json\n".encode()


def flush(path: pathlib.Path):
    """Waits until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: Exception) -> str:
    """Returns the cause in one line."""
    code = re.search(r"os_error_code='(\d+)'", str(error))  # how tensorstore reports an OSError
    text = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__
