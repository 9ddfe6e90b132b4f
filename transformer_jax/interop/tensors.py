"""Tensors in safetensors files: read slice by slice into arrays on devices, written shard by
shard."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, Self

import numpy as np

from transformer_jax.interop.mapping import Weight

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_READ_BYTES = 1 << 20
_SHARD_BYTES = 5 * 10**9

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """The tensors of a directory, which stay on disk until they are asked for.

    Attributes:
      places: of every tensor, by the name that the family's table gives it: the file, and its name
        there.
      shapes: likewise.
      dtypes: likewise, as safetensors calls them.
    """

    places: dict[str, tuple[pathlib.Path, str]]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @classmethod
    def open(cls, directory: pathlib.Path, renamed: Callable[[str], str]) -> Self:
        """Reads the names and shapes of a directory's tensors.

        Raises:
          ValueError: for a directory without safetensors files, or a file that is none.
        """
        places, shapes, dtypes = {}, {}, {}
        for path in _files(directory):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (a file is no dict)
                    view, known = file.get_slice(name), renamed(name)
                    places[known], shapes[known] = (path, name), tuple(view.get_shape())
                    dtypes[known] = view.get_dtype()
        return cls(places, shapes, dtypes)

    def read(self, weight: Weight, shape: tuple[int, ...], dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of one of our parameters.

        Args:
          weight: where its values stand.
          shape: of the whole parameter.
          dtype: to cast to.
          index: the slice, one ``slice`` an axis.

        Returns:
          The only array made of its size; tensors are read in blocks of rows of a megabyte.
        """
        bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        result = np.empty([stop - start for start, stop in bounds], dtype)
        layers = range(*bounds[0]) if weight.stacked else (0,)
        inside = bounds[1:] if weight.stacked else bounds
        offset = weight.part[0] * shape[-1]
        inside = [*inside[:-1], (inside[-1][0] + offset, inside[-1][1] + offset)]
        inside = [(0, 1), *inside] if weight.is_row else inside
        # Opened anew for each parameter: what was read of a mapped file counts as memory in use
        # until it is closed.
        with contextlib.ExitStack() as stack:
            opened: dict[pathlib.Path, Any] = {}
            for place, layer in enumerate(layers):
                path, name = self.places[weight.their_name(layer)]
                if path not in opened:
                    opened[path] = stack.enter_context(_opened(path))
                target = result[place] if weight.stacked else result
                target = target[None] if weight.is_row else target
                _read_into(target.T if weight.transposed else target, opened[path].get_slice(name),
                           inside[::-1] if weight.transposed else inside)
        return result

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors of one shape hold the same values, compared in blocks of rows."""
        shape = self.shapes[name]
        rows = max(1, _READ_BYTES // (4 * max(math.prod(shape[1:]), 1)))
        with _opened(self.places[name][0]) as a, _opened(self.places[other][0]) as b:
            left, right = a.get_slice(self.places[name][1]), b.get_slice(self.places[other][1])
            parts = (slice(first, min(first + rows, shape[0])) for first in range(0, shape[0], rows))
            return all(np.array_equal(left[part], right[part]) for part in parts)


def _read_into(target: np.ndarray, view: Any, bounds: list[tuple[int, int]]) -> None:
    (start, stop), *others = bounds
    width = math.prod(end - begin for begin, end in others)
    rows = max(1, _READ_BYTES // (4 * max(width, 1)))
    for first in range(start, stop, rows):
        last = min(first + rows, stop)
        target[first - start:last - start] = view[(slice(first, last), *(slice(*pair) for pair in others))]


def _opened(path: pathlib.Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    if (directory / _INDEX).is_file():
        names = sorted(set(json.loads((directory / _INDEX).read_text())["weight_map"].values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ValueError(f"{directory / _INDEX} names files that are not there: {', '.join(missing)}")
        return [directory / name for name in names]
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern))
    if pickled:
        raise ValueError(
            f"{directory} has its weights in {', '.join(pickled)} only, which is pickle: reading it runs any code that "
            "its author put there. Convert it where that does no harm, with transformers: "
            "model.save_pretrained(DIRECTORY, safe_serialization=True), and load that directory")
    raise ValueError(f"{directory} has neither {_SINGLE} nor {_INDEX}")


def write(directory: pathlib.Path, tensors: Iterable[tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]],
          ) -> None:
    """Writes tensors to one file, or to several of at most 5 GB and an index; one file is in memory
    at a time.

    Args:
      directory: where to.
      tensors: name, shape, type, and a function that makes the values.
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
    names = [_SINGLE] if len(shards) == 1 else [f"model-{number:05}-of-{len(shards):05}.safetensors"
                                                for number in range(1, len(shards) + 1)]
    from safetensors.numpy import save_file

    for stale in (*directory.glob("model*.safetensors"), directory / _INDEX):
        with contextlib.suppress(FileNotFoundError):
            stale.unlink()
    for file_name, shard in zip(names, shards, strict=True):
        # transformers refuses files that do not say whose layout they have.
        save_file({name: np.ascontiguousarray(make()) for name, make in shard.items()}, directory / file_name,
                  metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        (directory / _INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map},
                                                   indent=2))
