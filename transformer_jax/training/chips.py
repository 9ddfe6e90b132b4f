"""A table of accelerators with their memory size, peak rate and memory bandwidth."""

from __future__ import annotations

import dataclasses
import os

from transformer_jax.settings import require

_GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, which is one device for XLA.

    Attributes:
      name: its usual name.
      memory: size of its memory according to the vendor, in bytes.
      peak_flops: peak rate of dense bfloat16 matrix products, in FLOP/s; ``None`` if unknown.
      bandwidth: bandwidth of its memory, in bytes/s; ``None`` if unknown.
    """

    name: str
    memory: float
    peak_flops: float | None
    bandwidth: float | None


# The figures come from the vendors: cloud.google.com/tpu/docs for v5e and v6e, and the data sheets
# of NVIDIA for the H100 SXM and the H200 SXM.
CHIPS = {chip.name: chip for chip in (
    Chip("v5e", 16 * _GB, 197e12, 819e9),
    Chip("v6e", 32 * _GB, 918e12, 1640e9),
    Chip("h100", 80 * _GB, 989e12, 3350e9),
    Chip("h200", 141 * _GB, 989e12, 4800e9),
)}


def get_chip(name: str) -> Chip:
    """Returns the chip with a given name.

    Args:
      name: a name in ``CHIPS``, or ``"cpu"`` for this machine, whose memory is measured and whose
        rates are unknown.

    Returns:
      The chip.

    Raises:
      ValueError: if the name is unknown.
    """
    if name == "cpu":
        return Chip("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None, None)
    require(name in CHIPS, f"device={name!r} is not one of {', '.join([*CHIPS, 'cpu'])}")
    return CHIPS[name]
