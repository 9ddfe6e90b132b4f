"""Compares the arrays of each call with the jaxtyping annotations of the function that was called.

The tests install ``install`` before they import the library. The arguments and the result are
compared after the call, so that a function can still refuse wrong arguments with its own error.
"""

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jaxtyping
import numpy as np


class ShapeError(AssertionError):
    """An array does not have the shape or the type that the annotation promises."""


def install(package: str, without: tuple[str, ...] = ()) -> None:
    """Checks the functions and methods of all modules of a package that are imported from now on.

    Args:
      package: The name of the package.
      without: Names of modules that are left out.
    """
    sys.meta_path.insert(0, _Finder(package, without))


def checked(function: Callable) -> Callable:
    """Wraps a function so that each call compares its arrays with the annotations.

    Args:
      function: A function with annotations.

    Returns:
      The function that checks. It raises ``ShapeError``.
    """
    signature = inspect.signature(function)
    if not any("Array" in str(annotation) for annotation in function.__annotations__.values()):
        return function
    hints: dict[str, Any] = {}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if not hints:
            hints.update({name: _evaluated(annotation, function) for name, annotation
                          in function.__annotations__.items()})
        values = signature.bind(*args, **kwargs).arguments | {"return": result}
        with jaxtyping.jaxtyped("context"):
            for name, hint in hints.items():
                if name in values and not _matches(values[name], hint):
                    shapes = jax.tree.map(jax.typeof, {name: values.get(name) for name in hints if name in values
                                                       and _is_array(values[name])})
                    raise ShapeError(f"{function.__module__}.{function.__qualname__}: {name} is annotated as {hint}, "
                                     f"but it is {jax.tree.map(jax.typeof, values[name])}, among {shapes}")
        return result

    return call


def _evaluated(annotation: Any, function: Callable) -> Any:
    """Evaluates an annotation; one with names that only type checkers know is left out."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, function.__globals__)
    except (NameError, AttributeError, TypeError):
        return Any


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def _matches(value: Any, hint: Any) -> bool:
    """Returns whether the arrays of a value fit a hint. What is no array fits each hint."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        arrays = [argument for argument in arguments if _is_shaped(argument)]
        return not _is_array(value) or len(arrays) < len(arguments) - (type(None) in arguments) or any(
            _matches(value, argument) for argument in arrays)
    if typing.get_origin(hint) is tuple and isinstance(value, tuple) and len(value) == len(arguments):
        return all(map(_matches, value, arguments))
    if not _is_shaped(hint) or not _is_array(value):
        return True
    return isinstance(value, hint.dtype[type(value) if isinstance(value, np.ndarray) else jax.Array, hint.dim_str])


def _is_shaped(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of a package, with a loader that wraps their functions."""

    def __init__(self, package: str, without: tuple[str, ...]):
        self._package, self._without = package, without

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(f"{self._package}.") or name in self._without:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module, and wraps its functions and methods before another module imports them."""

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        for owner, name, function in _functions(module):
            setattr(owner, name, function)


def _functions(module: types.ModuleType) -> Iterator[tuple[Any, str, Any]]:
    """Yields the owner, the name and the checked form of each function that a module defines."""
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    for owner in [module, *(value for value in own if inspect.isclass(value))]:
        for name, value in list(vars(owner).items()):
            if name == "__init__":  # JAX makes pytrees with leaves that are no arrays of these shapes
                continue
            if inspect.isfunction(value) and value.__module__ == module.__name__:
                yield owner, name, checked(value)
            elif isinstance(value, classmethod | staticmethod) and inspect.isclass(owner):
                yield owner, name, type(value)(checked(value.__func__))
