"""Freed memory is kept on Linux, unless the user turns it off; flags are added to XLA's and never
replace others; the compilation cache is private, and damaged entries are removed."""

import os
import pathlib
import subprocess
import sys
import time
import zlib

import jax
import pytest

from transformer_jax import runtime
from transformer_jax.runtime import XLA_FLAGS, keep_freed_memory, use_compilation_cache, use_xla_flags

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


def test_xla_flags_are_added_only_where_the_user_set_none(monkeypatch):
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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where the compilation cache of programs is; what JAX is told comes back at the end."""
    before = {name: getattr(jax.config, name) for name in (
        "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "transformer_jax" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)


def mode(path):
    return path.stat().st_mode & 0o777


def in_use():
    return jax.config.jax_compilation_cache_dir


def test_the_compilation_cache_is_made_private(cache):
    use_compilation_cache()
    assert in_use() == str(cache) and mode(cache) == mode(cache.parent) == 0o700


def test_a_cache_that_others_could_write_to_is_emptied(cache):
    cache.mkdir(parents=True)
    (cache / "jit_f-1-cache").write_bytes(zlib.compress(b"somebody else's program"))
    cache.chmod(0o777)
    use_compilation_cache()
    assert in_use() == str(cache) and mode(cache) == 0o700 and list(cache.glob("*-cache")) == []


@pytest.mark.parametrize("part", ["transformer_jax", "transformer_jax/compiled"])
def test_a_link_in_the_place_of_the_cache_is_not_followed(cache, tmp_path, part, caplog):
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o755)
    (tmp_path / part).parent.mkdir(exist_ok=True)
    (tmp_path / part).symlink_to(theirs)
    use_compilation_cache()
    assert in_use() is None and mode(theirs) == 0o755 and list(theirs.iterdir()) == []
    assert f"{tmp_path / part} is a link, but must be a real directory; remove it" in caplog.text


def test_a_directory_of_somebody_else_is_no_cache(cache, monkeypatch, caplog):
    cache.mkdir(parents=True, mode=0o755)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    use_compilation_cache()
    assert in_use() is None and mode(cache) == 0o755
    assert f"{cache.parent} belongs to another user; remove it, or set XDG_CACHE_HOME" in caplog.text


def test_a_cache_that_cannot_be_made_or_has_no_place(cache, monkeypatch, caplog, tmp_path):
    (tmp_path / "transformer_jax").write_text("a file")
    use_compilation_cache()
    assert ("there is no compilation cache, so each start compiles all programs again: "
            f"{tmp_path}/transformer_jax") in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    monkeypatch.setattr(pathlib.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    use_compilation_cache()
    assert in_use() is None and caplog.text.rstrip().endswith("compiles all programs again: no home directory")


def test_entries_that_are_not_whole_are_removed_and_the_others_read_once(cache, monkeypatch):
    use_compilation_cache()
    whole = zlib.compress(os.urandom(3 << 20))
    entries = {"jit_a": whole, "jit_b": whole[:-1], "jit_c": b"", "jit_d": whole[:-1] + bytes([whole[-1] ^ 1]),
               "jit_e": b"\0" * 100}
    for name, content in entries.items():
        (cache / f"{name}-1-cache").write_bytes(content)
    (cache / "jit_f-1-cache").symlink_to(cache / "jit_a-1-cache")
    (cache / "other").write_text("not an entry")
    use_compilation_cache()
    assert sorted(path.name for path in cache.iterdir()) == [".checked", "jit_a-1-cache", "other"]
    reads = []
    monkeypatch.setattr(runtime, "_is_whole", lambda path: bool(reads.append(path.name)) or True)
    use_compilation_cache()
    assert reads == []
    (cache / "jit_g-1-cache").write_bytes(whole)
    use_compilation_cache()
    assert reads == ["jit_g-1-cache"]
    os.utime(cache / ".checked", ns=(time.time_ns() + 10**15,) * 2)  # a clock that was set back
    use_compilation_cache()
    assert len(reads) == 3


def test_a_cut_entry_is_compiled_and_stored_again(cache):
    """JAX itself does not do this: it warns at each start, and neither reads nor replaces the
    entry."""
    from jax.experimental.compilation_cache import compilation_cache

    def start():
        compilation_cache.reset_cache()
        use_compilation_cache()
        jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
        (entry,) = cache.glob("jit__lambda*-cache")
        return entry

    try:
        content = start().read_bytes()
        start().write_bytes(content[: len(content) // 2])
        assert len(start().read_bytes()) > len(content) // 2
    finally:
        compilation_cache.reset_cache()
