"""Read the metadata of a GGUF file, and its tensors row by row from the mapped file."""

from __future__ import annotations

import dataclasses
import math
import mmap
import pathlib
import struct
from typing import Any

import numpy as np

from transformer_jax.interop.gguf_blocks import FORMATS, OTHER_FORMATS, BlockFormat
from transformer_jax.interop.setting import shown

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_AXES, _MOST_NESTED = 4, 8


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor in a GGUF file.

    Attributes:
      path: the file.
      name: its name in the file.
      shape: its shape; the last axis is that of the blocks.
      format: the format of its numbers.
      offset: its first byte in the file.
      order: for each row of the tensor that the family's table describes, the row in the file;
        ``None`` if the rows have the same order.
    """

    path: pathlib.Path
    name: str
    shape: tuple[int, ...]
    format: BlockFormat
    offset: int
    order: np.ndarray | None = dataclasses.field(default=None, compare=False)

    @property
    def dtype(self) -> str:
        """The dtype of the converted numbers, in safetensors' notation."""
        return self.format.dtype

    @property
    def num_bytes(self) -> int:
        """How many bytes of the file the tensor takes."""
        return math.prod(self.shape) // self.format.size * self.format.num_bytes

    def values(self) -> _Values:
        """Returns an object that converts the rows and columns with which it is indexed."""
        return _Values(self)


class _Values:
    """The values of a tensor, whose rows are converted when they are read."""

    def __init__(self, tensor: GgufTensor):
        self.tensor, form = tensor, tensor.format
        row_bytes = tensor.shape[-1] // form.size * form.num_bytes
        # A vector is read as one row.
        num_rows = math.prod(tensor.shape[:-1])
        self.rows = np.memmap(tensor.path, np.uint8, "r", tensor.offset, (num_rows, row_bytes))

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns the values at slices of the axes; an ellipsis stands for all values."""
        tensor, (*first, last) = self.tensor, self._slices(index)
        if not first:
            values = self._converted(self.rows)[0]
            return (values if tensor.order is None else values[tensor.order])[last]
        rows, = first  # check_tensors refuses a tensor of more axes than the family's table has
        return self._converted(self.rows[rows if tensor.order is None else tensor.order[rows]])[:, last]

    def _slices(self, index: Any) -> list[slice]:
        """Returns one slice for each axis."""
        given = [] if index is Ellipsis else list(index) if isinstance(index, tuple) else [index]
        return given + [slice(None)] * (len(self.tensor.shape) - len(given))

    def _converted(self, rows: np.ndarray) -> np.ndarray:
        """Converts rows of blocks to rows of numbers."""
        form = self.tensor.format
        return form.read(rows.reshape(-1, form.num_bytes)).reshape(len(rows), -1)


class _Reader:
    """Reads numbers and strings one after another, and never beyond the end of the file."""

    def __init__(self, path: pathlib.Path, data: mmap.mmap):
        self.path, self.data, self.place = path, data, 0

    def bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.place:
            raise ValueError(f"{self.path} is not a complete GGUF file: it ends at byte {len(self.data)}, inside its "
                             "header")
        self.place += count
        return self.data[self.place - count:self.place]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"{self.path} has metadata of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            code = _NUMBERS[inner]
            return list(struct.unpack(f"<{count}{code}", self.bytes(count * struct.calcsize(f"<{code}"))))
        if count > len(self.data) - self.place:
            raise ValueError(f"{self.path} is not a complete GGUF file: a list of {count} strings exceeds it")
        if depth == _MOST_NESTED:
            raise ValueError(f"{self.path} has metadata with lists nested more than {_MOST_NESTED} deep")
        return [self.value(inner, depth + 1) for _ in range(count)]


def read_gguf(path: pathlib.Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """Reads the metadata of a GGUF file, and finds its tensors.

    Args:
      path: the file.

    Returns:
      The metadata by name, and the tensors.

    Raises:
      ValueError: if the file is damaged, or if it has tensors in a format that cannot be read.
    """
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise ValueError(f"{path} is not a GGUF file: it does not begin with {_MAGIC.decode()!r}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(path, data)
            reader.bytes(4)
            version = reader.number("I")
            if version not in _VERSIONS:
                raise ValueError(f"{path} has version {version} of GGUF; expected one of "
                                 f"{', '.join(map(str, _VERSIONS))}")
            num_tensors, num_entries = reader.number("Q"), reader.number("Q")
            metadata = {}
            for _ in range(num_entries):
                name = reader.string()
                if name in metadata:
                    raise ValueError(f"{path} has the metadata {shown(name)} twice")
                metadata[name] = reader.value(reader.number("I"))
            found = [_tensor_entry(reader) for _ in range(num_tensors)]
            alignment = metadata.get("general.alignment", 32)
            if not isinstance(alignment, int) or alignment < 1:
                raise ValueError(f"{path} has general.alignment={shown(alignment)}; expected a whole number")
            start, size = -(-reader.place // alignment) * alignment, len(data)
    return metadata, _checked(path, found, start, size)


def _tensor_entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Reads the name, shape, format and offset of a tensor."""
    name, num_axes = reader.string(), reader.number("I")
    if num_axes > _MOST_AXES:
        raise ValueError(f"{reader.path}: the tensor {shown(name)} has {num_axes} axes; expected at most {_MOST_AXES}")
    sizes = [reader.number("Q") for _ in range(num_axes)]
    return name, tuple(reversed(sizes)), reader.number("I"), reader.number("Q")


def _checked(path: pathlib.Path, found: list[tuple[str, tuple[int, ...], int, int]], start: int,
             size: int) -> list[GgufTensor]:
    """Returns the tensors, after checking that their formats are known and that the file has all
    their bytes."""
    unknown = sorted({OTHER_FORMATS.get(kind, f"number {kind}") for _, _, kind, _ in found if kind not in FORMATS})
    if unknown:
        raise ValueError(f"{path} has tensors in the formats {', '.join(unknown)}, which cannot be read; expected "
                         f"{', '.join(form.name for form in FORMATS.values())}. Convert the file with llama.cpp: "
                         "llama-quantize --allow-requantize IN.gguf OUT.gguf Q8_0")
    tensors = [GgufTensor(path, name, shape, FORMATS[kind], start + offset) for name, shape, kind, offset in found]
    for tensor in tensors:
        if not tensor.shape or 0 in tensor.shape or tensor.shape[-1] % tensor.format.size:
            raise ValueError(f"{path}: the tensor {shown(tensor.name)} has the shape {list(tensor.shape)}; expected "
                             f"rows of whole blocks of {tensor.format.size} numbers ({tensor.format.name})")
        if tensor.offset + tensor.num_bytes > size:
            raise ValueError(f"{path} is not a complete GGUF file: the tensor {shown(tensor.name)} ends at byte "
                             f"{tensor.offset + tensor.num_bytes}, but the file has {size}")
    return tensors
