"""The interface and the registry of attention kernels that users add."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from transformer_jax.config.choices import allow_choice


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A way to compute attention, for ``transformer_jax.ops.attend``.

    Attributes:
      name: The name for the argument ``implementation`` and for
        ``config.attention_implementation``.
      why_not: ``why_not(q_BTNH, k_BSKH, mask, *, bias, dropout, precision)`` returns, as text, why
        the kernel does not support a call, or ``None`` if it does. ``mask`` is an
        ``AttentionMask`` or ``None``; ``bias`` is an array, a ``PositionBias``, or ``None``.
        ``"auto"`` skips a kernel that gives a reason. If a user chooses the kernel by its name,
        the reason is raised as an error.
      attend: ``attend(q_BTNH, k_BSKH, v_BSKH, mask, *, bias, scale, dropout, key, precision)``
        returns ``[B, T, N, H]`` in the type of the values. It must return zeros for a query that
        may attend to no key.
      can_cap: Whether the kernel caps scores. If so, ``attend`` is also called with ``cap``, where
        the caller gives one; otherwise ``"auto"`` skips the kernel for such a call.
    """

    name: str
    why_not: Callable[..., str | None]
    attend: Callable[..., jax.Array]
    can_cap: bool = False


KERNELS: dict[str, Kernel] = {}
BUILT_IN = ("auto", "xla", "chunked", "cudnn", "splash")


def register_kernel(kernel: Kernel) -> Kernel:
    """Registers an attention kernel, so that it can be chosen by its name.

    ``"auto"`` tries registered kernels first, in the order of their registration. Registering
    another kernel with the same name replaces the first. Programs that are already compiled do not
    change.

    Args:
      kernel: The kernel to register.

    Returns:
      The same kernel.

    Raises:
      ValueError: The name is that of a built-in implementation.
    """
    if kernel.name in BUILT_IN:
        raise ValueError(f"{kernel.name!r} is a built-in implementation of attention; choose another name")
    KERNELS[kernel.name] = kernel
    allow_choice("attention_implementation", kernel.name)
    return kernel
