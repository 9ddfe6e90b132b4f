"""Tensors of 4-bit numbers in the format MXFP4, in which gpt-oss is published.

A block is 32 numbers in 16 bytes, the low half of each byte first, with one exponent. A number has
a sign, two bits of exponent and one of mantissa (Rouhani et al., 2023, "Microscaling data formats
for deep learning"). transformers stores the blocks of each row ``[E, F, D / 32, 16]``, and loads
them as the transposed matrices ``[E, D, F]``.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from transformer_jax.interop.tensors import Tensor, TensorFiles

_BLOCKS, _SCALES = "_blocks", "_scales"
_POSITIVE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_NUMBERS = np.array([*_POSITIVE, *(-number for number in _POSITIVE)], np.float32)
_BIAS = 127  # of the exponents


@dataclasses.dataclass(frozen=True)
class Mxfp4Tensor:
    """The matrices of experts, whose numbers are converted to bfloat16 when they are read.

    Attributes:
      blocks: the blocks of numbers, bytes ``[E, F, D / 32, 16]``.
      scales: the exponent of each block, bytes ``[E, F, D / 32]``.
      name: the name of the tensor that they stand for.
    """

    blocks: Tensor
    scales: Tensor
    name: str
    dtype = "BF16"

    @property
    def path(self) -> pathlib.Path:
        """The file that has the blocks."""
        return self.blocks.path

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the converted tensor ``[E, D, F]``."""
        experts, rows, groups, size = self.blocks.shape
        return experts, groups * size * 2, rows

    def values(self) -> _Values:
        """Returns an object that converts what it is indexed with."""
        return _Values(self)


class _Values:
    """The values of a tensor, which are converted when they are read."""

    def __init__(self, tensor: Mxfp4Tensor):
        self.blocks, self.scales = tensor.blocks.values(), tensor.scales.values()

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns the values at slices of the axes; an ellipsis stands for all values."""
        experts, columns, rows = (slice(None),) * 3 if index is Ellipsis else index
        packed = np.asarray(self.blocks[experts, rows])
        exponents = np.asarray(self.scales[experts, rows]).astype(np.int32)[..., None] - _BIAS
        numbers = np.stack([_NUMBERS[packed & 15], _NUMBERS[packed >> 4]], axis=-1)
        numbers = np.ldexp(numbers.reshape(*packed.shape[:-1], -1), exponents)
        return numbers.reshape(*packed.shape[:2], -1).swapaxes(1, 2)[:, columns]


def with_converted(files: TensorFiles) -> TensorFiles:
    """Replaces each pair of blocks and scales by the tensor that they stand for.

    Args:
      files: the tensors of a model.

    Returns:
      The tensors; the same ones if none are in this format.

    Raises:
      ValueError: if blocks lack their scales, or if their shapes do not belong together.
    """
    tensors = dict(files.tensors)
    for name in [name for name in tensors if name.endswith(_BLOCKS)]:
        whole, blocks = name.removesuffix(_BLOCKS), tensors.pop(name)
        scales = tensors.pop(whole + _SCALES, None)
        shapes = blocks.shape, getattr(scales, "shape", None)
        if scales is None or len(blocks.shape) != 4 or shapes != ((*scales.shape, 16), scales.shape) or (
                {blocks.dtype, scales.dtype} != {"U8"}):
            raise ValueError(f"{name} is {list(blocks.shape)} and {whole + _SCALES} is "
                             f"{shapes[1] and list(shapes[1])}; expected bytes [E, F, D / 32, 16] and [E, F, D / 32]")
        tensors[whole] = Mxfp4Tensor(blocks, scales, whole)
    return TensorFiles(tensors)
