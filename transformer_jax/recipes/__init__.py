"""Named experiments, one file for each.

The docstring of each file gives the command, the time that it takes and the expected result.
"""

from __future__ import annotations

import importlib
import pathlib

from transformer_jax.config import ExperimentConfig
from transformer_jax.settings import nearest


def names() -> list[str]:
    """Returns the names of all recipes.

    Returns:
      The names in alphabetical order.
    """
    return sorted(path.stem for path in pathlib.Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def get(name: str) -> ExperimentConfig:
    """Returns the config of a named experiment.

    Args:
      name: One of ``names()``.

    Returns:
      The config.

    Raises:
      ValueError: If there is no recipe with this name.
    """
    if name not in names():
        raise ValueError(f"there is no recipe {name!r}{nearest(str(name), names())}; recipes: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}").get_config()


def __getattr__(name: str):
    if not name.startswith("_") and name in names():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{nearest(name, [*__all__, *names()])}")


def __dir__() -> list[str]:
    return [*__all__, *names()]


__all__ = ["get", "names"]
