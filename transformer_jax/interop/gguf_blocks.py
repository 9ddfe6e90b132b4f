"""The formats in which a GGUF file stores numbers, and their conversion to float32.

A quantised row consists of blocks. Each block has one or several scales, and a few bits for each
number. The formats are those of ggml (https://github.com/ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """Returns the float16 number at byte ``start`` of each block, as float32 ``[n, 1]``."""
    return np.ascontiguousarray(blocks[:, start:start + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray, group: int) -> np.ndarray:
    """Unpacks 4-bit numbers: of each group of bytes, first all low halves, then all high halves."""
    groups = packed.reshape(len(packed), -1, group)
    return np.concatenate([groups & 15, groups >> 4], axis=2).reshape(len(packed), -1)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    """Reads blocks of a scale and 32 numbers of 8 bits."""
    return _half(blocks, 0) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    """Reads blocks of a scale and 32 numbers of 4 bits."""
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16).astype(np.float32) - 8)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """Reads blocks of 256 numbers of 4 bits, in 8 parts with a scale and an offset of 6 bits each."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1).astype(np.float32)
    offsets = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1).astype(np.float32)
    numbers = _nibbles(blocks[:, 16:], 32).reshape(-1, 8, 32).astype(np.float32)
    values = (_half(blocks, 0) * scales)[..., None] * numbers - (_half(blocks, 2) * offsets)[..., None]
    return values.reshape(len(blocks), -1)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """Reads blocks of 256 numbers of 6 bits, in 16 parts with a scale of 8 bits each."""
    low = _nibbles(blocks[:, :128], 64)
    pairs = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    numbers = (low | (pairs.reshape(len(blocks), -1) << 4)).astype(np.float32) - 32
    scales = _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return (scales[..., None] * numbers.reshape(-1, 16, 16)).reshape(len(blocks), -1)


def _plain(dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that reads single numbers of a dtype."""
    return lambda blocks: np.ascontiguousarray(blocks).view(dtype)


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """A format of numbers in a GGUF file.

    Attributes:
      name: its name.
      size: how many numbers a block has.
      num_bytes: how many bytes a block has.
      read: converts blocks, uint8 ``[n, num_bytes]``, to numbers ``[n, size]``.
      dtype: the dtype of the numbers, in safetensors' notation.
    """

    name: str
    size: int
    num_bytes: int
    read: Callable[[np.ndarray], np.ndarray]
    dtype: str = "F32"


FORMATS = {
    0: BlockFormat("F32", 1, 4, _plain(np.dtype("<f4"))),
    1: BlockFormat("F16", 1, 2, _plain(np.dtype("<f2")), "F16"),
    2: BlockFormat("Q4_0", 32, 18, _q4_0),
    8: BlockFormat("Q8_0", 32, 34, _q8_0),
    12: BlockFormat("Q4_K", 256, 144, _q4_k),
    14: BlockFormat("Q6_K", 256, 210, _q6_k),
    30: BlockFormat("BF16", 1, 2, _plain(np.dtype(ml_dtypes.bfloat16)), "BF16"),
}
# Formats that are known but cannot be read, for the error message.
OTHER_FORMATS = {3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS",
                 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"}
