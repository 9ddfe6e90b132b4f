"""Attention kernels of one's own: what they are, and their registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from transformer_jax.config.model import allow_choice


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A way to compute attention, for :func:`transformer_jax.ops.attend`.

    Attributes:
      name: what ``implementation`` and ``config.attention_implementation`` call it.
      why_not: ``why_not(q_BTNH, k_BSKH, mask, *, bias, dropout, precision)`` returns why the kernel
        cannot take a call, in words, or ``None`` where it can. ``mask`` is an ``AttentionMask`` or
        ``None``; ``bias`` an array, a structure with ``materialize``, or ``None``. ``"auto"``
        passes over a kernel that gives a reason; an explicit choice of it raises the reason.
      attend: ``attend(q_BTNH, k_BSKH, v_BSKH, mask, *, bias, scale, dropout, key, precision)``
        returns ``[B, T, N, H]`` in the type of the values; a query that may attend to nothing gives
        zeros.
    """

    name: str
    why_not: Callable[..., str | None]
    attend: Callable[..., jax.Array]


KERNELS: dict[str, Kernel] = {}
BUILT_IN = ("auto", "xla", "chunked", "cudnn", "splash")


def register_kernel(kernel: Kernel) -> Kernel:
    """Makes a kernel known by its name; ``"auto"`` asks registered kernels first, in the order of
    registration.

    Registering a kernel of the same name again replaces it. Programs that are compiled already do
    not change.

    Raises:
      ValueError: for the name of a built-in implementation.
    """
    if kernel.name in BUILT_IN:
        raise ValueError(f"{kernel.name!r} is a built-in implementation of attention; choose another name")
    KERNELS[kernel.name] = kernel
    allow_choice("attention_implementation", kernel.name)
    return kernel
