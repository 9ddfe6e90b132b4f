"""Named experiments, one file each: the command, the time it takes and the number to expect."""

from __future__ import annotations

import importlib
import pathlib

from transformer_jax.config import ExperimentConfig
from transformer_jax.settings import nearest


def names() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in pathlib.Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def get(name: str) -> ExperimentConfig:
    """The config of a named experiment.

    Raises:
      ValueError: for a name that there is none of.
    """
    if name not in names():
        raise ValueError(f"there is no recipe {name!r}{nearest(name, names())}; recipes: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}").get_config()


def __getattr__(name: str):
    if not name.startswith("_") and name in names():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{nearest(name, [*__all__, *names()])}")


def __dir__() -> list[str]:
    return [*__all__, *names()]


__all__ = ["get", "names"]
