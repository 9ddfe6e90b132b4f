"""Read tensors from mapped safetensors files slice by slice, and write tensors file by file."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import struct
from collections.abc import Callable, Iterable
from typing import Any, Protocol, Self

import ml_dtypes
import numpy as np

from transformer_jax.files import save_tensors
from transformer_jax.interop.mapping import Weight
from transformer_jax.interop.weight_files import INDEX, SINGLE
from transformer_jax.training.arrays import aligned_empty

_READ_BYTES = 1 << 20
# The blocks in which a tensor is transposed must be small: 11 GB/s instead of 4 on one core.
_TRANSPOSED_BYTES = 1 << 17
_SHARD_BYTES = 5 * 10**9

# The dtype that a tensor is loaded as. JAX has no float64 by default, so F64 becomes float32.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float32"}


# How a file stores the values of each of these types.
_STORED = {"F32": np.dtype("<f4"), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("<f2"), "F64": np.dtype("<f8"),
           "U8": np.dtype(np.uint8)}


class Tensor(Protocol):
    """A tensor in a file."""

    @property
    def path(self) -> pathlib.Path:
        """The file."""
        ...

    @property
    def name(self) -> str:
        """Its name in the file."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> str:
        """Its dtype in safetensors' notation."""
        ...

    def values(self) -> Any:
        """Returns an object that reads the values when it is indexed with slices. It maps the file
        until it is deleted."""
        ...


@dataclasses.dataclass(frozen=True)
class _SafeTensor:
    """A tensor in a safetensors file, which begins at the byte ``offset`` of the file."""

    path: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def values(self) -> np.ndarray:
        """Returns the values as a mapped array."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, _STORED[self.dtype])
        return np.memmap(self.path, _STORED[self.dtype], "r", self.offset, self.shape)


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """Tensors in files, which stay on disk until they are read.

    Attributes:
      tensors: every tensor, by its name in the family's table.
    """

    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, tensors: Iterable[Tensor], renamed: Callable[[str], str]) -> Self:
        """Gives every tensor its name in the family's table.

        Raises:
          ValueError: if two tensors have the same name in the table.
        """
        known: dict[str, Tensor] = {}
        for tensor in tensors:
            twin = known.setdefault(renamed(tensor.name), tensor)
            if twin is not tensor:
                raise ValueError(f"{tensor.name} in {tensor.path} and {twin.name} in {twin.path} are both the tensor "
                                 f"{renamed(tensor.name)}; expected one")
        return cls(known)

    @classmethod
    def open(cls, paths: Iterable[pathlib.Path], renamed: Callable[[str], str]) -> Self:
        """Reads the names, shapes and dtypes of the tensors in safetensors files.

        Raises:
          ValueError: if a file is not a complete safetensors file, or if two tensors have the same
            name in the table.
        """
        return cls.of((tensor for path in paths for tensor in _safe_tensors(path)), renamed)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors, by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtypes of the tensors in safetensors' notation, by name."""
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    def read(self, weight: Weight, shape: tuple[int, ...], dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a slice of one of our parameters.

        Args:
          weight: the row of the table for this parameter.
          shape: the shape of the whole parameter.
          dtype: the dtype of the result.
          index: one ``slice`` for each axis.

        Returns:
          The slice, aligned so that JAX need not copy it again on a CPU. The function makes no other
          array of this size: it copies the tensors from the mapped file in blocks of rows.
        """
        bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        result = aligned_empty([stop - start for start, stop in bounds], dtype)
        own, inside = bounds[:weight.tensor_axes], bounds[weight.tensor_axes:]
        parts = list(weight.places(shape[-1], *inside[-1]))
        for place in np.ndindex(*(stop - start for start, stop in own)):
            index_there = tuple(start + offset for (start, _), offset in zip(own, place, strict=True))
            if weight.first_layer > 0 and index_there[0] < weight.first_layer:
                result[place] = weight.default
                continue
            # Each tensor is mapped only while it is read, because the pages that were read from a
            # mapped file count as used memory.
            values = self.tensors[weight.their_name(index_there)].values()
            for first, last, theirs in parts:
                target = result[place][..., first - inside[-1][0]:last - inside[-1][0]]
                target = target[None] if weight.is_row else target
                there = [*(slice(*pair) for pair in inside[:-1]), theirs]
                there = [slice(0, 1), *there] if weight.is_row else there
                if weight.transposed:
                    _read_into(target.T, values, there[::-1], _TRANSPOSED_BYTES)
                else:
                    _read_into(target, values, there, _READ_BYTES)
        return result

    def give_name(self, name: str, other: str) -> None:
        """Makes a tensor available under another name too."""
        self.tensors[other] = self.tensors[name]

    def whole(self, name: str) -> np.ndarray:
        """Returns all values of a tensor."""
        return np.asarray(self.tensors[name].values()[...])

    def equal(self, name: str, other: str) -> bool:
        """Returns True if two tensors of the same shape have equal values; compares blocks of
        rows."""
        shape = self.tensors[name].shape
        rows = max(1, _READ_BYTES // (4 * max(math.prod(shape[1:]), 1)))
        left, right = self.tensors[name].values(), self.tensors[other].values()
        parts = (slice(first, min(first + rows, shape[0])) for first in range(0, shape[0], rows))
        return all(np.array_equal(left[part], right[part]) for part in parts)


def _read_into(target: np.ndarray, values: Any, there: list[slice], block_bytes: int) -> None:
    """Reads the slices of a tensor into ``target``, in blocks of rows."""
    rows, *others = there
    width = math.prod(part.stop - part.start for part in others)
    start, step = rows.start, rows.step or 1
    size = max(1, block_bytes // (4 * max(width, 1)))
    for first in range(0, len(target), size):
        last = min(first + size, len(target))
        target[first:last] = values[(slice(start + first * step, start + (last - 1) * step + 1, step), *others)]


def _safe_tensors(path: pathlib.Path) -> list[_SafeTensor]:
    """Returns the tensors of a safetensors file; raises ValueError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (a file is not a dict)
            shapes = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        with path.open("rb") as file:
            size, = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    return [_SafeTensor(path, name, shape, dtype, 8 + size + header[name]["data_offsets"][0])
            for name, (shape, dtype) in shapes.items()]


def write(directory: pathlib.Path, tensors: Iterable[tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]],
          ) -> None:
    """Writes tensors to one file, or to several files of at most 5 GB and an index. The function
    holds the tensors of one file in memory at a time.

    Args:
      directory: the directory to write to.
      tensors: for each tensor its name, shape, dtype, and a function that makes its values.
    """
    shards: list[dict[str, Callable[[], np.ndarray]]] = [{}]
    size = total = 0
    for name, shape, dtype, make in tensors:
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if size and size + num_bytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = make
        size += num_bytes
        total += num_bytes
    names = [SINGLE] if len(shards) == 1 else [f"model-{number:05}-of-{len(shards):05}.safetensors"
                                               for number in range(1, len(shards) + 1)]
    for stale in (directory / SINGLE, directory / INDEX, *directory.glob("model-?????-of-?????.safetensors")):
        stale.unlink(missing_ok=True)
    for file_name, shard in zip(names, shards, strict=True):
        # transformers does not load files without this metadata.
        content = {name: np.ascontiguousarray(make()) for name, make in shard.items()}
        save_tensors(directory / file_name, content, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map},
                                                  indent=2))
