"""Settings of the process itself that programs make before they train."""

from __future__ import annotations

import ctypes
import os
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets the process keep the memory it frees, for the next step to use again (Linux with glibc).

    XLA:CPU allocates the buffers of every step anew. By default glibc hands such large blocks back to the kernel, which
    clears every page of them again at the next step: a quarter of the time of a training step. Threads that allocate at
    once then wait for each other, so it is not for programs that search with several threads. Call it before the
    first large computation. The environment variable ``TRANSFORMER_JAX_KEEP_MEMORY=0`` switches it off.

    Returns:
      Whether it was done.
    """
    if os.environ.get("TRANSFORMER_JAX_KEEP_MEMORY") == "0" or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library, such as musl
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))  # -1: never
    return all([mallopt(name, value) == 1 for name, value in settings])
