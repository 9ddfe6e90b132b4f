"""Activations on disk: shards in the format safetensors, with an index that has their digests."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

import ml_dtypes
import numpy as np

from transformer_jax.data.windows import make_batches
from transformer_jax.files import check_file, naming, partial_path, save_tensors
from transformer_jax.inspection.reading_activations import PLACES
from transformer_jax.json_files import parse_json, read_json
from transformer_jax.settings import checked_path, shown

INDEX = "index.json"
_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "I32": np.dtype(np.int32)}


class Shard(TypedDict):
    """The part of the index that describes one shard.

    Attributes:
      file: The name of the file.
      rows: The number of tokens.
      batches: The number of batches of the model.
      sha256: The digest of the file.
    """

    file: str
    rows: int
    batches: int
    sha256: str


class Index(TypedDict):
    """The content of the index.

    Attributes:
      dims: The number of values of each site for one token.
      dtype: The type of the values.
      reader: The digest of the model and of the settings.
      texts: The digest of the token ids of all batches in the shards.
      finished: True if the shards hold the whole corpus.
      shards: The shards.
    """

    dims: dict[str, int]
    dtype: str
    reader: str
    texts: str
    finished: bool
    shards: list[Shard]


class Activations:
    """Activations of a corpus on disk, one row for each token.

    ``activations[indices]`` reads the rows with these numbers, ``[len(indices), dim]`` for each
    site. The arrays ``tokens``, ``texts`` and ``positions`` say which token each row belongs to:
    its id, the number of its text, and its place in that text. ``tj.train`` and ``make_batches``
    take the object as their examples.

    Args:
      directory: The directory that ``collect`` wrote.

    Raises:
      ValueError: If the directory has no complete collection, its index does not list all shards,
        or a shard has another size than the index says.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.directory = checked_path("directory", directory)
        if not (self.directory / INDEX).is_file():
            raise ValueError(f"{self.directory} has no {INDEX}; write one with tj.inspection.collect(bundle, texts, "
                             "sites, directory)")
        self.index = read_index(self.directory)
        if not self.index["finished"]:
            raise ValueError(f"the collection in {self.directory} was stopped before its end; call collect again with "
                             "the same arguments to finish it")
        listed = [shard["file"] for shard in self.index["shards"]]
        stored = sorted(path.name for path in self.directory.glob("shard-*.safetensors"))
        if listed != stored:
            raise ValueError(f"{self.directory / INDEX} lists the files {shown(listed)}, but the directory has "
                             f"{shown(stored)}; delete the directory and collect again")
        self._shards = [_mapped(self.directory, shard, self.index) for shard in self.index["shards"]]
        self._starts = np.cumsum([0, *(shard["rows"] for shard in self.index["shards"])])

    @property
    def dims(self) -> Mapping[str, int]:
        """The number of values of each site for one token."""
        return self.index["dims"]

    @property
    def contents(self) -> list[str]:
        """The digests of the shards, which change when the activations change."""
        return [shard["sha256"] for shard in self.index["shards"]]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, indices_B: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the rows with the given numbers, by name: each site ``[B, dim]``, and ``tokens``,
        ``texts`` and ``positions`` ``[B]``.

        Raises:
          IndexError: If a number is out of range.
        """
        indices_B = np.asarray(indices_B)
        if indices_B.size and not 0 <= indices_B.min() <= indices_B.max() < len(self):
            raise IndexError(f"rows {indices_B.min()} to {indices_B.max()} are not all from 0 to {len(self) - 1}")
        shards_B = np.searchsorted(self._starts, indices_B, side="right") - 1
        result: dict[str, np.ndarray] = {}
        for number in np.unique(shards_B):
            chosen = shards_B == number
            local = indices_B[chosen] - self._starts[number]
            for name, values in self._shards[number].items():
                if name not in result:
                    result[name] = np.empty((*indices_B.shape, *values.shape[1:]), values.dtype)
                result[name][chosen] = values[local]
        return result

    def batches(self, batch_size: int, *, seed: int = 0, num_epochs: int | None = None) -> Iterator[Any]:
        """Returns an iterator over shuffled batches, whose position ``get_state`` and ``set_state``
        save and restore.

        Args:
          batch_size: Rows of a batch.
          seed: Determines the order of every epoch.
          num_epochs: The number of epochs; ``None`` repeats without end.

        Returns:
          An iterator of grain over dicts, as ``activations[indices]`` returns them.

        Raises:
          ValueError: If there are too few rows for a batch.
        """
        return make_batches(self, batch_size=batch_size, seed=seed, num_epochs=num_epochs)

    def verify(self) -> None:
        """Reads all shards and compares their digests with the index.

        Raises:
          ValueError: If a shard has changed since it was written.
        """
        for shard in self.index["shards"]:
            check_digest(self.directory, shard)

    def __repr__(self) -> str:
        return f"Activations({str(self.directory)!r}, {len(self):,} tokens, {dict(self.dims)})"


def need_safetensors(reason: str) -> None:
    """Checks that safetensors is installed.

    Args:
      reason: What needs it.

    Raises:
      ImportError: If it is not installed.
    """
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{reason}, which needs: pip install "transformer_jax[hf]"') from error


def check_digest(directory: pathlib.Path, shard: Shard) -> None:
    """Checks that a shard has not changed since it was written.

    Args:
      directory: The directory of the shard.
      shard: The entry of the index.

    Raises:
      ValueError: If the file is missing or has changed.
    """
    path = directory / shard["file"]
    if not path.is_file() or file_digest(path) != shard["sha256"]:
        raise ValueError(f"{path} is missing or has changed since it was written; delete {directory} and collect again")


def file_digest(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_shard(directory: pathlib.Path, number: int, parts: list[dict[str, np.ndarray]]) -> Shard:
    """Writes batches of activations as one shard, which appears complete or not at all.

    Args:
      directory: The directory of the shards.
      number: The number of the shard.
      parts: The batches, as ``ActivationReader.read`` yields them.

    Returns:
      The entry of the index.
    """
    path = directory / f"shard-{number:05d}.safetensors"
    partial = partial_path(path)
    save_tensors(partial, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    partial.replace(path)
    return Shard(file=path.name, rows=sum(len(part[PLACES[0]]) for part in parts), batches=len(parts),
                 sha256=file_digest(path))


def read_index(directory: pathlib.Path) -> Index:
    """Reads the index.

    Args:
      directory: The directory of the shards.

    Returns:
      The content.

    Raises:
      ValueError: If it is damaged, or names a file outside of the directory.
    """
    path = directory / INDEX
    index = read_json(path, Index)
    for shard in index["shards"]:
        if pathlib.PurePath(shard["file"]).name != shard["file"]:
            raise ValueError(f"{path} names the file {shard['file']!r}; expected a name inside its directory")
        if min(shard["rows"], shard["batches"]) < 1:
            raise ValueError(f"{path} has a shard of {shard['rows']} rows and {shard['batches']} batches; expected at "
                             "least 1; delete the directory and collect again")
    return index


def write_index(directory: pathlib.Path, index: Index) -> None:
    """Writes the index, which replaces an older one at once.

    Args:
      directory: The directory of the shards.
      index: The content.
    """
    partial = partial_path(directory / INDEX)
    with naming(partial), partial.open("w", encoding="utf-8") as stream:
        json.dump(index, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(directory / INDEX)


def _mapped(directory: pathlib.Path, shard: Shard, index: Index) -> dict[str, np.ndarray]:
    """Maps the arrays of a shard into memory, so that rows are read when they are used.

    Raises:
      ValueError: If the file is missing or damaged, or has other arrays than the index says.
    """
    path, rows = directory / shard["file"], shard["rows"]
    try:
        expected = {name: ((rows, dim), np.dtype(index["dtype"])) for name, dim in index["dims"].items()}
        expected |= {name: ((rows,), np.dtype(np.int32)) for name in PLACES}
        check_file(path)
        with path.open("rb") as stream:
            size, length = os.fstat(stream.fileno()).st_size, int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(length) if length < size else b"", path, dict[str, dict[str, Any]])
        header.pop("__metadata__", None)
        found: dict[str, np.ndarray] = {
            name: np.memmap(path, _DTYPES[entry["dtype"]], "r", 8 + length + entry["data_offsets"][0],
                            tuple(entry["shape"])) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read as a shard of activations ({type(error).__name__}: {error}); delete "
                         "the directory and collect again") from error
    if {name: (values.shape, values.dtype) for name, values in found.items()} != expected:
        raise ValueError(f"{path} has other arrays than {INDEX} says; delete the directory and collect again")
    return found
