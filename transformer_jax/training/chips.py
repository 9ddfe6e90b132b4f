"""The accelerators that plans are made for: memory, peak rate, bandwidth."""

from __future__ import annotations

import dataclasses
import os

from transformer_jax.settings import require

_GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as XLA counts them.

    Attributes:
      name: what people call it.
      memory: bytes of its fast memory, as sold.
      peak_flops: dense bfloat16 products, FLOP/s, without sparsity; ``None``: not known.
      bandwidth: of that memory, bytes/s; ``None``: not known.
    """

    name: str
    memory: float
    peak_flops: float | None
    bandwidth: float | None


# The vendors' data sheets: cloud.google.com/tpu/docs (v5e, v6e), and NVIDIA's of the H100 SXM and
# the H200 SXM.
CHIPS = {chip.name: chip for chip in (
    Chip("v5e", 16 * _GB, 197e12, 819e9),
    Chip("v6e", 32 * _GB, 918e12, 1640e9),
    Chip("h100", 80 * _GB, 989e12, 3350e9),
    Chip("h200", 141 * _GB, 989e12, 4800e9),
)}


def get_chip(name: str) -> Chip:
    """A chip by name; ``"cpu"`` is this machine's memory, whose rates nobody publishes.

    Raises:
      ValueError: for a name that is not known.
    """
    if name == "cpu":
        return Chip("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None, None)
    require(name in CHIPS, f"device={name!r} is not one of {', '.join([*CHIPS, 'cpu'])}")
    return CHIPS[name]
