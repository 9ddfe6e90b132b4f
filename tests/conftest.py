"""Eight simulated CPU devices for every test, warnings that are errors, and where the corpora are."""

import os
import pathlib

# Nearly all the time of the tests is compiling: compile quickly, not well.
os.environ["XLA_FLAGS"] = (f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
                           "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

# Functions of these modules check, in the tests alone, that arrays have the shapes and types of their signatures.
CHECKED = tuple(f"transformer_jax.inspection.{module}" for module in ("lens", "maps", "mixing", "space"))
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for kind in ("gpu", "tpu"):
        if jax.default_backend() != kind:
            for item in items:
                if kind in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=f"needs a {kind.upper()}; this is {jax.default_backend()}"))


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Each compiled program holds maps of memory, of which a process may have 65,530; the suite needs more."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def corpora() -> pathlib.Path:
    """The folder of real corpora: the variable TRANSFORMER_JAX_DATA, or ../shared/data beside the project."""
    beside = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("TRANSFORMER_JAX_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no corpora at {folder}; set TRANSFORMER_JAX_DATA")
    return folder
