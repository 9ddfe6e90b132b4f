"""Public names that editors and type checkers see as imports, and that Python loads on first
use."""

from __future__ import annotations

import ast
import functools
import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes the ``__getattr__`` and ``__dir__`` of a package that imports its public names on first
    use.

    The names and their homes are written once, as imports under ``if TYPE_CHECKING`` in the
    package's own file, which this function reads when a name is first asked for. ``__all__`` lists
    the same names.

    Args:
      package: the package's ``__name__``.

    Returns:
      ``__getattr__``, which raises AttributeError with the nearest public name for an unknown one,
      and ``__dir__``.
    """
    module = sys.modules[package]

    @functools.cache
    def homes() -> dict[str, str]:
        return imports_for_type_checkers(pathlib.Path(str(module.__file__)).read_text("utf-8"))

    def load(name: str) -> Any:
        if name not in homes():
            from transformer_jax.settings import nearest

            raise AttributeError(f"module {package!r} has no attribute {name!r}{nearest(name, module.__all__)}")
        home = homes()[name]
        # `from package import part` names a part of the package, any other import a value in a
        # module.
        value = (importlib.import_module(f"{package}.{name}") if home == package
                 else getattr(importlib.import_module(home), name))
        setattr(module, name, value)
        return value

    def names() -> list[str]:
        return list(module.__all__)

    return load, names


def imports_for_type_checkers(source: str) -> dict[str, str]:
    """The names that a file imports under ``if TYPE_CHECKING``, each with the module that it comes
    from."""
    return {alias.name: node.module or ""
            for block in ast.parse(source).body
            if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
            for node in block.body if isinstance(node, ast.ImportFrom)
            for alias in node.names}
