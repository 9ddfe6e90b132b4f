"""Lazy imports: public names that type checkers see as imports and Python loads on first use."""

from __future__ import annotations

import ast
import functools
import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes ``__getattr__`` and ``__dir__`` for a package that loads its public names on first use.

    The package's ``__init__.py`` imports the names under ``if TYPE_CHECKING`` and lists them in
    ``__all__``. When a name is first used, this file is parsed to find the module of the name.

    Args:
      package: The package's ``__name__``.

    Returns:
      ``__getattr__`` and ``__dir__``. For an unknown name, ``__getattr__`` raises AttributeError
      with the nearest public name.
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
        # `from package import part` imports a submodule of the package. Any other import takes a
        # value from a module.
        value = (importlib.import_module(f"{package}.{name}") if home == package
                 else getattr(importlib.import_module(home), name))
        setattr(module, name, value)
        return value

    def names() -> list[str]:
        return list(module.__all__)

    return load, names


def imports_for_type_checkers(source: str) -> dict[str, str]:
    """Finds the names that a file imports under ``if TYPE_CHECKING``.

    Args:
      source: The text of the file.

    Returns:
      A dict from each name to the module that it comes from.
    """
    return {alias.name: node.module or ""
            for block in ast.parse(source).body
            if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
            for node in block.body if isinstance(node, ast.ImportFrom)
            for alias in node.names}
