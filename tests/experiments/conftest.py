"""Programs run as a user runs them: in this process (quick), or in one of their own (signals, exit status, caches)."""

import dataclasses
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import pytest
from absl import app, flags
from jax.experimental.compilation_cache import compilation_cache

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a program ended."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error; everything else on stderr is a progress bar or nothing."""
        assert self.status == 2, self
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and self.err.endswith(f"{lines[0]}\n") and "Traceback" not in self.err, self.err
        return lines[0]


@pytest.fixture
def program(monkeypatch, capfd):
    """``program("train", "--workdir=x", ...)`` runs ``python -m experiments.train`` here."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # the tests' own is set below

    def run(name: str, *arguments: object) -> Ended:
        app.define_help_flags()
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfd.readouterr()
        try:
            runpy.run_module(f"experiments.{name}", run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            for flag in list(flags.FLAGS):  # those of the program, which is "the main module"
                if flags.FLAGS.find_module_defining_flag(flag) == name or flag.split(".")[0] == "config":
                    delattr(flags.FLAGS, flag)
        return Ended(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Programs compile the same things again and again; here they read them."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """``start("train", ...)`` starts the program in a process of its own, with one device and a private home."""
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu",
                                "XLA_FLAGS": "--xla_backend_optimization_level=0"}  # compiles three times as fast
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def run(name: str, *arguments: object, **variables: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", f"experiments.{name}", *map(str, arguments)], cwd=REPOSITORY,
                                env=environment | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    run.home = home
    return run
