"""Where our parameters stand in the files of others: names and layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx

from transformer_jax.models.functional import Model


@dataclasses.dataclass(frozen=True)
class Weight:
    """One of our parameters, and where its values stand in their files.

    Attributes:
      ours: path of the parameter, such as ``"stack.blocks.mlp.up.kernel"``.
      theirs: name of their tensor; with ``{layer}`` where ours has a leading layer axis and they
        have a tensor a layer.
      transposed: whether theirs is ``[out, in]`` where ours is ``[in, out]``.
      part: ``(index, count)``: ours is this one of ``count`` equal parts of theirs, along our last
        axis.
      also: names under which a file may hold the same values once more, as that of a tied table.
      is_row: whether theirs has an axis of size 1 before those of ours.
      beside: path of a parameter that a model must have too for the row to apply; of several rows
        for a parameter, the first that applies counts.
    """

    ours: str
    theirs: str
    transposed: bool = False
    part: tuple[int, int] = (0, 1)
    also: tuple[str, ...] = ()
    is_row: bool = False
    beside: str | None = None

    def their_name(self, layer: int) -> str:
        """The name of a layer's tensor."""
        return self.theirs.format(layer=layer)

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each of their tensors, given that of our parameter."""
        *first, last = shape[1:] if self.stacked else shape
        theirs = (*first, last * self.part[1])
        theirs = theirs[::-1] if self.transposed else theirs
        return (1, *theirs) if self.is_row else theirs

    @property
    def stacked(self) -> bool:
        """Whether they have a tensor a layer."""
        return "{layer}" in self.theirs


def linear(ours: str, theirs: str) -> tuple[Weight, Weight]:
    """A linear map of torch, whose weight is ``[out, in]``, and its bias."""
    return (Weight(f"{ours}.kernel", f"{theirs}.weight", transposed=True), Weight(f"{ours}.bias", f"{theirs}.bias"))


def norm(ours: str, theirs: str) -> tuple[Weight, Weight]:
    """A norm's scale, and its bias where it has one."""
    return Weight(f"{ours}.scale", f"{theirs}.weight"), Weight(f"{ours}.bias", f"{theirs}.bias")


def parameters(model: Model) -> dict[str, nnx.Variable]:
    """The parameters of a model (or of its shapes) by path."""
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_parameter)
    return {path_name(path): leaf for path, leaf in leaves}


def map_parameters(function: Callable[[str, nnx.Variable], Any], model: Model) -> Model:
    """The model with the function applied to the path and value of every parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_name(path), leaf), model,
                                            is_leaf=_is_parameter)


def path_name(path: tuple) -> str:
    """Such as ``"stack.blocks.mlp.up.kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_parameter(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def describe(items: Iterable[str], most: int = 40) -> str:
    """A list to show, of so many items at most."""
    items = sorted(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
