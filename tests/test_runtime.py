"""Keeping freed memory: done on Linux, refused on request; flags of XLA: added, never put in place
of others."""

import os
import subprocess
import sys

import pytest

from transformer_jax.runtime import XLA_FLAGS, keep_freed_memory, use_xla_flags

# Allocates and frees 64 MiB ten times and prints how many pages were faulted in.
FAULTS = """
import ctypes, resource, sys
from transformer_jax.runtime import XLA_FLAGS, keep_freed_memory, use_xla_flags
kept = keep_freed_memory()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    block = libc.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment):
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, check=True, capture_output=True, text=True)
    kept, count = done.stdout.split()
    return kept, int(count)


def test_the_environment_switches_it_off(monkeypatch):
    monkeypatch.setenv("TRANSFORMER_JAX_KEEP_MEMORY", "0")
    assert keep_freed_memory() is False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is on Linux only")
def test_freed_memory_is_used_again():
    kept, with_it = faults()
    off, without = faults(TRANSFORMER_JAX_KEEP_MEMORY="0")
    assert (kept, off) == ("True", "False")
    assert with_it < without / 4  # one first touch of the pages instead of ten


def test_flags_of_xla_are_added_only_where_nothing_is_said(monkeypatch):
    first, *others = XLA_FLAGS["gpu"]
    monkeypatch.setenv("XLA_FLAGS", f"{first}=false --xla_gpu_autotune_level=2")
    added = use_xla_flags("gpu")
    assert list(added) == others
    assert os.environ["XLA_FLAGS"].split() == [
        f"{first}=false", "--xla_gpu_autotune_level=2", *(f"{name}={XLA_FLAGS['gpu'][name]}" for name in others)]
    assert use_xla_flags("gpu") == {}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    monkeypatch.setenv("TRANSFORMER_JAX_XLA_FLAGS", "0")
    assert use_xla_flags("tpu") == {} and os.environ["LIBTPU_INIT_ARGS"] == ""
    with pytest.raises(ValueError, match="gpu, tpu, not for 'cpu'"):
        use_xla_flags("cpu")


def test_xla_knows_the_flags_for_gpus():
    """It ends a process for a flag that it does not know, on any platform."""
    program = ("import transformer_jax.runtime as runtime; runtime.use_xla_flags('gpu')\n"
               "import jax; print(jax.numpy.ones(3).sum())")
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
                          capture_output=True, text=True)
    assert done.stdout == "3.0\n", done.stderr
