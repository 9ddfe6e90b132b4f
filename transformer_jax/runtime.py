"""Settings of the process: memory, the compilation cache, several processes, and XLA's flags.

Programs make these settings before they use a device. To train one model with several processes,
start each with the same command and with these environment variables:

    JAX_COORDINATOR_ADDRESS  host:port of the first process, the same for all processes; the first
                             process uses this port and the next one
    JAX_NUM_PROCESSES        the number of processes
    JAX_PROCESS_ID           the index of this process, from 0

On TPU pods, with SLURM and with Open MPI, ``JAX_COORDINATOR_ADDRESS=auto`` finds all three.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import pathlib
import shutil
import socket
import sys
import threading
import time
import zlib
from typing import NoReturn

from absl import logging

# Constants of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Makes the process keep the memory that it frees, for the next step (Linux with glibc).

    XLA:CPU allocates new buffers in every step. By default glibc returns such large blocks to the
    kernel, which must clear every page again in the next step; this takes a quarter of the time of
    a training step. With this setting, threads that allocate memory wait for each other, so do not
    use it in programs that allocate in several threads. Call it before the first large computation.
    The environment variable ``TRANSFORMER_JAX_KEEP_MEMORY=0`` switches it off.

    Returns:
      Whether the setting was made.
    """
    if os.environ.get("TRANSFORMER_JAX_KEEP_MEMORY") == "0" or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library, such as musl
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))  # -1 means never
    return all([mallopt(name, value) == 1 for name, value in settings])


def use_compilation_cache() -> None:
    """Stores compiled programs in a private directory, so that the next start need not compile.

    Anyone who can write to the directory can run code as this user. It must therefore be a real
    directory, not a link, that only this user can access. If it cannot be made, a warning says why,
    and there is no cache. Entries that a killed program left incomplete are removed, because JAX
    would neither read nor replace them. ``JAX_COMPILATION_CACHE_DIR`` names another directory,
    which is used without these checks; an empty value switches the cache off.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
        try:
            base = base if base.is_absolute() else pathlib.Path.home() / ".cache"
            directory = base / "transformer_jax" / "compiled"
            _make_private(directory.parent)
            if _make_private(directory):
                _remove_unreadable(directory)
            else:  # other users may have written programs into it
                shutil.rmtree(directory)
                directory.mkdir(mode=0o700)
        except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
            reason = str(error)
            if isinstance(error, OSError) and error.filename:
                reason = f"{error.filename}: {error.strerror}"
            logging.warning("there is no compilation cache, so each start compiles all programs again: %s", reason)
            return
        jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _make_private(directory: pathlib.Path) -> bool:
    """Makes a directory that only this user can access, or removes other users' permissions.

    Returns:
      False if other users could write to it before.

    Raises:
      OSError: The directory belongs to another user, or is a link.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    # The checks and the change use the open directory, because others could replace its name.
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if not directory.is_symlink():
            raise
        raise OSError(f"{directory} is a link, but must be a real directory; remove it") from error
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            raise OSError(f"{directory} belongs to another user; remove it, or set XDG_CACHE_HOME")
        if status.st_mode & 0o077:
            os.fchmod(descriptor, 0o700)
        return not status.st_mode & 0o022
    finally:
        os.close(descriptor)


def _remove_unreadable(directory: pathlib.Path) -> None:
    """Removes incomplete entries of a compilation cache.

    Entries that did not change after the last check are not read again.
    """
    mark = directory / ".checked"
    now = time.time_ns()
    last = mark.stat().st_mtime_ns if mark.is_file() else 0
    for path in directory.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            is_new = path.lstat().st_ctime_ns >= last or last > now  # last > now: the clock was set back
            if path.is_symlink() or (is_new and not _is_whole(path)):
                path.unlink()
    mark.touch()
    os.utime(mark, ns=(now, now))


def _is_whole(path: pathlib.Path) -> bool:
    """Whether an entry can be decompressed. Without a package for zstd, its entries are trusted."""
    content = path.read_bytes()
    if not content.startswith(b"\x28\xb5\x2f\xfd"):
        decompressor, problem = zlib.decompressobj(), zlib.error
    elif importlib.util.find_spec("compression"):  # Python 3.14
        zstd = importlib.import_module("compression.zstd")
        decompressor, problem = zstd.ZstdDecompressor(), zstd.ZstdError
    elif importlib.util.find_spec("zstandard"):
        zstd = importlib.import_module("zstandard")
        decompressor, problem = zstd.ZstdDecompressor().decompressobj(), zstd.ZstdError
    else:
        return True
    try:
        for start in range(0, len(content), 1 << 20):
            decompressor.decompress(content[start:start + (1 << 20)])
    except (problem, EOFError):  # EOFError: there is data after the end
        return False
    return decompressor.eof


_JOIN_SECONDS = 120
_CONNECTION_LOST = ("another process of this run has ended or cannot be reached; its own output says why. Start all "
                    "processes again with the same command: the run resumes from the last checkpoint")
_peers: list[socket.socket] = []
_ending = threading.Lock()


def join_processes() -> bool:
    """Joins the other processes of a run, if environment variables name them.

    Call it before anything else that uses a device.

    Returns:
      Whether there are other processes.

    Raises:
      ValueError: An environment variable is missing or wrong, or the processes cannot be joined.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        return False
    import jax

    try:
        if address == "auto":
            del os.environ["JAX_COORDINATOR_ADDRESS"]  # otherwise JAX reads it as a host
            jax.distributed.initialize()
            return True
        host, _, port = address.rpartition(":")
        try:
            port, count, index = int(port), int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"it must be HOST:PORT, or auto on a cluster, and the numbers JAX_NUM_PROCESSES and "
                             f"JAX_PROCESS_ID must be set as well ({error})") from None
        jax.distributed.initialize(address, count, index)
        _watch(host, port + 1, count, index)
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"cannot join the other processes by JAX_COORDINATOR_ADDRESS={address}: {reason}") from error
    return True


def leave_processes() -> None:
    """Tells the other processes that this one ends in order. Otherwise they would end too."""
    for peer in _peers:
        with contextlib.suppress(OSError):  # it has ended already
            peer.sendall(b".")


def end_without_others(reason: str = "") -> NoReturn:
    """Ends the process at once with one line of error. An ordinary exit would wait for the process
    that is lost.

    Args:
      reason: What to add to the error message.
    """
    _ending.acquire()  # only the first thread prints the message
    print(f"\nerror: {_CONNECTION_LOST} {reason}".rstrip(), file=sys.stderr, flush=True)  # starts below a progress bar
    os._exit(2)


def _watch(host: str, port: int, count: int, index: int) -> None:
    """Ends this process when the connection to another breaks. JAX would notice much later."""
    if index == 0:
        with socket.create_server(("", port), backlog=count) as server:
            server.settimeout(_JOIN_SECONDS)
            _peers.extend(server.accept()[0] for _ in range(count - 1))
    else:
        deadline = time.monotonic() + _JOIN_SECONDS
        while not _peers:
            try:
                _peers.append(socket.create_connection((host, port), timeout=_JOIN_SECONDS))
            except ConnectionRefusedError:  # the first process does not listen yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def watch_peer(peer: socket.socket) -> None:
        try:
            if peer.recv(1):
                return
        except OSError:
            pass
        end_without_others()

    for peer in _peers:
        peer.settimeout(None)
        threading.Thread(target=watch_peer, args=(peer,), daemon=True).start()


# XLA's flags that make programs faster on accelerators. Programs set them with use_xla_flags.
XLA_FLAGS: dict[str, dict[str, str]] = {
    "gpu": {
        # Communication between GPUs overlaps with computation.
        "--xla_gpu_enable_latency_hiding_scheduler": "true",
        # XLA compares Triton's and cuBLAS's matrix products and uses the faster one.
        "--xla_gpu_triton_gemm_any": "true",
    },
    "tpu": {
        # Gathering weights and summing gradients overlap with matrix products.
        "--xla_tpu_enable_async_collective_fusion": "true",
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "--xla_tpu_overlap_compute_collective_tc": "true",
    },
}
_VARIABLES = {"gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}


def use_xla_flags(platform: str) -> dict[str, str]:
    """Adds the flags of ``XLA_FLAGS`` to the environment.

    Call it before anything else that uses a device. The library never calls it by itself. A flag
    that is already in the environment variable (``XLA_FLAGS``, or ``LIBTPU_INIT_ARGS`` on TPUs) is
    not changed. ``TRANSFORMER_JAX_XLA_FLAGS=0`` switches all flags off.

    Args:
      platform: ``"gpu"`` or ``"tpu"``.

    Returns:
      The flags that were added, with their values.

    Raises:
      ValueError: The platform is another one.
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
