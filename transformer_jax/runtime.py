"""Settings of the process itself that programs make before they train.

Several processes train one model together when each is started with the same command and

    JAX_COORDINATOR_ADDRESS   host:port of the first process, the same for all
    JAX_NUM_PROCESSES         how many there are
    JAX_PROCESS_ID            which this one is, from 0

in its environment; on TPU pods, under SLURM and Open MPI, ``JAX_COORDINATOR_ADDRESS=auto`` finds all three.
"""

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


# How long a process waits for one that does not answer before it takes it for dead.
_HEARTBEAT_SECONDS = 30


def join_processes() -> bool:
    """Joins the other processes of a run, if the environment names them; before anything else that asks for a device.

    Returns:
      Whether it did.

    Raises:
      ValueError: for an environment that names some of it only, or a run that cannot be joined.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        return False
    import jax

    if address == "auto":
        del os.environ["JAX_COORDINATOR_ADDRESS"]  # else jax takes it for a host
        settings = {}
    else:
        try:
            settings = {"coordinator_address": address, "num_processes": int(os.environ["JAX_NUM_PROCESSES"]),
                        "process_id": int(os.environ["JAX_PROCESS_ID"])}
        except (KeyError, ValueError) as error:
            raise ValueError(f"JAX_COORDINATOR_ADDRESS={address} needs the numbers JAX_NUM_PROCESSES and "
                             f"JAX_PROCESS_ID beside it ({error}); or set it to auto on a cluster") from None
    try:
        jax.distributed.initialize(**settings, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
                                   shutdown_timeout_seconds=_HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot join the other processes at {address}: {reason}") from error
    return True
