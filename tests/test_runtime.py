"""Keeping freed memory: done on Linux, refused on request."""

import subprocess
import sys

import pytest

from transformer_jax.runtime import keep_freed_memory

# Allocates and frees 64 MiB ten times and prints how many pages were faulted in.
FAULTS = """
import ctypes, resource, sys
from transformer_jax.runtime import keep_freed_memory
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
