"""Files that a long step appends to, so that it can continue where it was stopped."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from transformer_jax.files import naming, partial_path


class Appended:
    """A file with the suffix ``.partial`` that grows until its step is finished, and is then
    renamed.

    Attributes:
      path: The name of the finished file.
      partial: The name of the file until then.
    """

    def __init__(self, path: Path):
        self.path, self.partial = path, partial_path(path)

    @property
    def is_finished(self) -> bool:
        """Whether the step has finished."""
        return self.path.exists()

    @contextlib.contextmanager
    def appending(self, num_bytes: int) -> Iterator[BinaryIO]:
        """Opens the file to append to it. If the block ends without an exception, the step is
        finished.

        Args:
          num_bytes: How much of an earlier start is whole. The rest is removed.

        Yields:
          The file.
        """
        with naming(self.partial), open(self.partial, "ab") as stream:
            stream.truncate(num_bytes)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        self.partial.replace(self.path)

    def whole_lines(self) -> tuple[int, int]:
        """Counts the lines that an earlier start wrote.

        Returns:
          The number of whole lines, and their length in bytes.
        """
        num_lines = num_bytes = 0
        if self.partial.exists():
            with self.partial.open("rb") as stream:
                for line in stream:
                    if line.endswith(b"\n"):
                        num_lines, num_bytes = num_lines + 1, num_bytes + len(line)
        return num_lines, num_bytes


class Records(Appended):
    """A file of records of one size, one for each document.

    Args:
      path: The name of the finished file.
      dtype: The fields of a record.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        super().__init__(path)
        self.dtype = dtype

    def read(self) -> np.ndarray:
        """Reads the whole records of this step, finished or not.

        Returns:
          The memory-mapped records [number of documents].
        """
        path = self.path if self.is_finished else self.partial
        size = path.stat().st_size if path.exists() else 0
        if size < self.dtype.itemsize:
            return np.empty(0, self.dtype)
        return np.memmap(path, self.dtype, mode="r", shape=(size // self.dtype.itemsize,))
