"""Eight simulated CPU devices for every test, compiled programs that the tests share, and where the
corpora are."""

import contextlib
import importlib
import importlib.metadata
import itertools
import os
import pathlib
import shutil
import tempfile
import zlib

# Compiling takes nearly all the time of the tests, so XLA should compile fast, without
# optimisation. Without the fusion emitters, which write every fusion as MLIR first, XLA:CPU
# compiles three times as fast. XLA ends a process for a flag that it does not know, so they are
# used only with the releases of jaxlib that they were tried with.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

from tests import shape_checks  # noqa: E402

# Programs that one test has compiled are read by all other tests, workers and processes that tests
# start.
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
CACHE = {
    "jax_compilation_cache_dir":
        os.environ["JAX_COMPILATION_CACHE_DIR"] if IS_WORKER else tempfile.mkdtemp(prefix="transformer-jax-compiled-"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for name, value in CACHE.items():
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)


def pytest_unconfigure() -> None:
    if not IS_WORKER:
        shutil.rmtree(CACHE["jax_compilation_cache_dir"], ignore_errors=True)

shape_checks.install("transformer_jax")

from transformer_jax.config import MeshConfig  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="I/N", help="run only part I of N of the test files; I is from 0 to N - 1. "
                     "The name of a file decides to which part it belongs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if part := config.getoption("part"):
        index, _, count = part.partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise pytest.UsageError(f"--part={part} must be I/N, such as 0/4, with I from 0 to N - 1")
        belongs = [zlib.crc32(item.nodeid.partition("::")[0].encode()) % int(count) == int(index) for item in items]
        config.hook.pytest_deselected(items=list(itertools.compress(items, [not chosen for chosen in belongs])))
        items[:] = itertools.compress(items, belongs)
    # Workers take files in this order, so that no long one is left to a single worker at the end.
    items.sort(key=lambda item: item.path.parent.name not in ("experiments", "tests"))
    for kind in ("gpu", "tpu"):
        if jax.default_backend() != kind:
            for item in items:
                if kind in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=f"needs a {kind.upper()}; this is {jax.default_backend()}"))


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Each compiled program holds maps of memory, of which a process may have 65,530; the suite
    needs more."""
    yield
    jax.clear_caches()


@pytest.fixture
def one_device(monkeypatch):
    """Runs train on one device unless their mesh is set: compiling for eight costs a third more,
    and tests of other subjects do not need it."""
    training = importlib.import_module("transformer_jax.runs.training")
    make_mesh, default = training.make_mesh, MeshConfig()

    def make(config=default, devices=None):
        return make_mesh(config, jax.devices()[:1] if devices is None and config == default else devices)

    monkeypatch.setattr(training, "make_mesh", make)


@pytest.fixture(scope="session")
def corpora() -> pathlib.Path:
    """The folder of real corpora: the variable TRANSFORMER_JAX_DATA, or ../shared/data beside the
    project."""
    default_folder = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("TRANSFORMER_JAX_DATA", default_folder))
    if not folder.is_dir():
        pytest.skip(f"no corpora at {folder}; set TRANSFORMER_JAX_DATA")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A page of a headless Chromium, which the tests of a file share."""
    from tests.inspection import chromium

    program = chromium.find()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(chromium.NAMES)} is installed, and CHROMIUM is not set")
    with contextlib.closing(chromium.Page(program, tmp_path_factory.mktemp("profile"))) as page:
        yield page
