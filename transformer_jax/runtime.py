"""Settings of the process itself that programs make before they train.

Several processes train one model together when each is started with the same command and

    JAX_COORDINATOR_ADDRESS host:port of the first process, the same for all; it uses this port and
    the next JAX_NUM_PROCESSES how many there are JAX_PROCESS_ID which this one is, from 0

in its environment; on TPU pods, under SLURM and Open MPI, ``JAX_COORDINATOR_ADDRESS=auto`` finds
all three.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
import threading
import time
from typing import NoReturn

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets the process keep the memory it frees, for the next step to use again (Linux with glibc).

    XLA:CPU allocates the buffers of every step anew. By default glibc hands such large blocks back
    to the kernel, which clears every page of them again at the next step: a quarter of the time of
    a training step. Threads that allocate at once then wait for each other, so it is not for
    programs that search with several threads. Call it before the first large computation. The
    environment variable ``TRANSFORMER_JAX_KEEP_MEMORY=0`` switches it off.

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


_JOIN_SECONDS = 120
_LOST = ("another process of this run has ended or cannot be reached; its own output says why. The same command, for "
         "all processes, resumes from the last checkpoint")
_peers: list[socket.socket] = []
_ending = threading.Lock()


def join_processes() -> bool:
    """Joins the other processes of a run, if the environment names them; before anything else that
    asks for a device.

    Returns:
      Whether it did.

    Raises:
      ValueError: for an environment that names some of it only, or a run that cannot be joined.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        return False
    import jax

    try:
        if address == "auto":
            del os.environ["JAX_COORDINATOR_ADDRESS"]  # else jax takes it for a host
            jax.distributed.initialize()
            return True
        host, _, port = address.rpartition(":")
        try:
            port, count, index = int(port), int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"it must be HOST:PORT, or auto on a cluster, and the numbers JAX_NUM_PROCESSES and "
                             f"JAX_PROCESS_ID must be set beside it ({error})") from None
        jax.distributed.initialize(address, count, index)
        _watch(host, port + 1, count, index)
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot join the other processes by JAX_COORDINATOR_ADDRESS={address}: {reason}") from error
    return True


def leave_processes() -> None:
    """Says goodbye: a process that ends without it ends the others."""
    for peer in _peers:
        with contextlib.suppress(OSError):  # gone already
            peer.sendall(b".")


def end_without_others(reason: str = "") -> NoReturn:
    """Ends the process at once, with one line: leaving in order would wait for the one that is
    lost."""
    _ending.acquire()  # the first to come here speaks
    print(f"\nerror: {_LOST} {reason}".rstrip(), file=sys.stderr, flush=True)  # below a progress bar
    os._exit(2)


def _watch(host: str, port: int, count: int, index: int) -> None:
    """Ends this process as soon as the connection to another breaks: JAX itself would notice only
    by its silence."""
    if index == 0:
        with socket.create_server(("", port), backlog=count) as server:
            server.settimeout(_JOIN_SECONDS)
            _peers.extend(server.accept()[0] for _ in range(count - 1))
    else:
        deadline = time.monotonic() + _JOIN_SECONDS
        while not _peers:
            try:
                _peers.append(socket.create_connection((host, port), timeout=_JOIN_SECONDS))
            except ConnectionRefusedError:  # the first has not come so far
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def until_goodbye(peer: socket.socket) -> None:
        try:
            if peer.recv(1):
                return
        except OSError:
            pass
        end_without_others()

    for peer in _peers:
        peer.settimeout(None)
        threading.Thread(target=until_goodbye, args=(peer,), daemon=True).start()


# Flags of XLA that help on accelerators; each program that wants them asks for them, by
# use_xla_flags.
XLA_FLAGS: dict[str, dict[str, str]] = {
    "gpu": {
        # Sends while it multiplies: of several GPUs, what they exchange.
        "--xla_gpu_enable_latency_hiding_scheduler": "true",
        # Tries Triton's matrix products beside cuBLAS's, and takes the faster.
        "--xla_gpu_triton_gemm_any": "true",
    },
    "tpu": {
        # The gathering of weights and the sum of gradients run beside products.
        "--xla_tpu_enable_async_collective_fusion": "true",
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "--xla_tpu_overlap_compute_collective_tc": "true",
    },
}
_VARIABLES = {"gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}


def use_xla_flags(platform: str) -> dict[str, str]:
    """Adds the flags of :data:`XLA_FLAGS` to the environment; before anything else that asks for a
    device.

    No program of the house does so unasked. A flag that the variable (``XLA_FLAGS``, on TPUs
    ``LIBTPU_INIT_ARGS``) already names stays as it is there, and ``TRANSFORMER_JAX_XLA_FLAGS=0``
    leaves all of them out.

    Args:
      platform: ``"gpu"`` or ``"tpu"``.

    Returns:
      What was added, to be shown or logged.

    Raises:
      ValueError: for another platform.
    """
    if platform not in XLA_FLAGS:
        raise ValueError(f"there are flags for {', '.join(XLA_FLAGS)}, not for {platform!r}")
    if os.environ.get("TRANSFORMER_JAX_XLA_FLAGS") == "0":
        return {}
    variable = _VARIABLES[platform]
    given = os.environ.get(variable, "").split()
    named = {flag.partition("=")[0] for flag in given}
    added = {name: value for name, value in XLA_FLAGS[platform].items() if name not in named}
    os.environ[variable] = " ".join([*given, *(f"{name}={value}" for name, value in added.items())])
    return added
