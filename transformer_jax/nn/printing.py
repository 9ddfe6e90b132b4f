"""Prints a module as a tree with the shape, type and logical axes of each parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from transformer_jax.config import ModelSettings


class Printed:
    """A base class of modules that are printed as a tree.

    In a notebook, ``treescope.register_as_default()`` shows a tree that can be unfolded instead.
    """

    def __repr__(self) -> str:
        """Returns the tree as text."""
        return "\n".join([_title(self), *_lines(self, "  ")])

    __str__ = __repr__


def _title(module: Any) -> str:
    """Describes a module: its type, its number of parameters, and the config's changed fields."""
    count = sum(getattr(leaf, "size", 0) for leaf in jax.tree.leaves(module))
    config, changed = getattr(module, "config", None), ""
    if isinstance(config, ModelSettings):
        usual = dataclasses.asdict(type(config)()) | config.derived()
        changed = "".join(f", {name}={value!r}" for name, value in dataclasses.asdict(config).items()
                          if value != usual[name])
    return f"{type(module).__name__}: {count:,} parameters{changed}"


def _lines(module: Any, indent: str) -> Iterator[str]:
    """Yields a line for each part of a module, and for the parts of parts."""
    parts = dict(enumerate(module)) if isinstance(module, nnx.List) else vars(module)
    for name, part in parts.items():
        if isinstance(part, nnx.Variable):
            yield f"{indent}{name:<{max(1, 34 - len(indent))}} {_of_parameter(part)}"
        elif isinstance(part, (nnx.Module, nnx.List)):
            num_layers = getattr(part, "num_layers", None)
            yield f"{indent}{name}: {type(part).__name__}" + ("" if num_layers is None else f", {num_layers} layers")
            yield from _lines(part, indent + "  ")


def _of_parameter(parameter: nnx.Variable) -> str:
    """Describes a parameter: its type, shape and logical axes."""
    axes = ", ".join(str(axis or "-") for axis in getattr(parameter, "axes", ()))
    leaves = jax.tree.leaves(parameter)
    if len(leaves) != 1 or not hasattr(leaves[0], "shape"):  # it is masked out, or holds a sharding instead of an array
        return f"{', '.join(map(str, leaves)) or 'nothing'}  ({axes})"
    return f"{leaves[0].dtype} {list(leaves[0].shape)}  ({axes})"
