"""Reads whole files, and adds the name of the file to errors of writing it."""

import contextlib
import os
import pathlib
import stat
from collections.abc import Iterator


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
    path = pathlib.Path(path)
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a named pipe" if stat.S_ISFIFO(mode) else "no plain file"
        raise ValueError(f"{path} is {kind}; expected a file")
    return path.read_bytes()


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
