"""The mapping from our parameters to the names and layouts of tensors in Hugging Face files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from transformer_jax.config import ModelConfig
from transformer_jax.models.functional import Model

_BLOCKS, _DENSE_BLOCKS = "stack.blocks.", "stack.dense_blocks."


@dataclasses.dataclass(frozen=True)
class Weight:
    """One of our parameters, and the tensor that holds its values in the files.

    Attributes:
      ours: the path of our parameter, such as ``"stack.blocks.mlp.up.kernel"``.
      theirs: the name of the tensor in the file. It contains ``{layer}`` if our parameter has a
        leading layer axis and the file has one tensor for each layer, and ``{expert}`` too if an
        axis of experts follows and the file has one tensor for each expert.
      transposed: True if the tensor is ``[out, in]`` and our parameter is ``[in, out]``.
      part: ``(index, count)``: our parameter is the part with this index, if the tensor is split
        into ``count`` equal parts along our last axis.
      groups: the number of groups that the tensor consists of, if each of them has all ``count``
        parts; ``None``: one group for each head, which ``Family.rows`` fills in.
      widths: the sizes of the parts of a group, if they may differ, or a function that computes
        them from our config, whose result ``Family.rows`` fills in.
      is_interleaved: True if the parts lie side by side: entry i of our last axis is the entry i
        times ``count`` plus ``index`` of the tensor.
      also: other names under which a file may store the same values, such as those of a tied table.
      fallback: the name of the tensor that holds the values in files that lack ``theirs``. A file
        may have both, with different values; then only ``theirs`` is read.
      is_row: True if the tensor has an additional leading axis of size 1.
      requires: the path of another parameter that the model must also have for the row to apply. If
        several rows describe one parameter, the first row that applies is used.
      default: the value of every entry if a file lacks the tensor; ``None`` if the file must have
        the tensor.
      layers: the layer in the file of each index on our axis of layers, if these differ.
      first_layer: the first layer for which the file has a tensor. The model does not use our
        parameter in the layers before it, where every entry gets the value ``default``.
    """

    ours: str
    theirs: str
    transposed: bool = False
    part: tuple[int, int] = (0, 1)
    groups: int | None = 1
    widths: tuple[int, ...] | Callable[[ModelConfig], tuple[int, ...]] | None = None
    is_interleaved: bool = False
    also: tuple[str, ...] = ()
    fallback: str | None = None
    is_row: bool = False
    requires: str | None = None
    default: float | None = None
    layers: tuple[int, ...] = ()
    first_layer: int = 0

    def their_name(self, index: tuple[int, ...]) -> str:
        """Returns the name of a tensor in the file.

        Args:
          index: the layer and the expert of the tensor, for a row with one tensor for each; see
            ``tensor_axes``.

        Returns:
          The name.
        """
        if self.layers and index:
            index = (self.layers[index[0]], *index[1:])
        return self.theirs.format(**dict(zip(("layer", "expert"), index, strict=False)))

    def their_names(self, shape: tuple[int, ...]) -> dict[tuple[int, ...], str]:
        """Returns the names of all tensors that hold our parameter.

        Args:
          shape: the shape of our parameter.

        Returns:
          The name for each index of the first ``tensor_axes`` axes; the index of a row without
          these axes is ``()``.
        """
        return {index: self.their_name(index) for index in np.ndindex(*shape[:self.tensor_axes])
                if not index or index[0] >= self.first_layer}

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Computes the shape of each tensor in the file.

        Args:
          shape: the shape of our parameter.

        Returns:
          The shape of the tensor, without the axes of layers and experts.
        """
        *first, last = shape[self.tensor_axes:]
        own = last // (self.groups or 1)
        theirs = (*first, (self.groups or 1) * sum(self._sizes(own)))
        theirs = theirs[::-1] if self.transposed else theirs
        return (1, *theirs) if self.is_row else theirs

    def places(self, size: int, start: int, stop: int) -> Iterator[tuple[int, int, slice]]:
        """Finds where the file has a range of our last axis.

        Args:
          size: the size of our last axis.
          start: the first index of the range.
          stop: the index after the range.

        Yields:
          Ranges that lie together in the file: the first index, the index after it, and the slice
          of the axis of the tensor.
        """
        if self.is_interleaved:
            part, count = self.part
            yield start, stop, slice(start * count + part, (stop - 1) * count + part + 1, count)
            return
        own = size // (self.groups or 1)
        sizes = self._sizes(own)
        for group in range(start // own, -(-stop // own)):
            first = max(start, group * own)
            last, offset = min(stop, (group + 1) * own), group * (sum(sizes) - own) + sum(sizes[:self.part[0]])
            yield first, last, slice(first + offset, last + offset)

    def _sizes(self, own: int) -> tuple[int, ...]:
        """Returns the sizes of the parts of a group, of which ours has the size ``own``."""
        return self.widths if isinstance(self.widths, tuple) else (own,) * self.part[1]

    def joined(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Joins the parts of one tensor of the file.

        Args:
          parts: the values of our parameters in the order of their parts, each with our last axis
            first if ``transposed``.

        Returns:
          The tensor.
        """
        if len(parts) == 1:
            return parts[0]
        axis = 0 if self.transposed else parts[0].ndim - 1
        if self.is_interleaved:
            return np.stack(parts, axis + 1).reshape(*parts[0].shape[:axis], -1, *parts[0].shape[axis + 1:])
        groups = [np.split(part, self.groups or 1, axis) for part in parts]
        return np.concatenate([part for group in zip(*groups, strict=True) for part in group], axis)

    @property
    def stacked(self) -> bool:
        """True if the file has one tensor for each layer."""
        return "{layer}" in self.theirs

    @property
    def tensor_axes(self) -> int:
        """The number of our first axes for whose every index the file has a tensor of its own."""
        return self.stacked + ("{expert}" in self.theirs)


def linear(ours: str, theirs: str) -> tuple[Weight, Weight]:
    """Makes the rows for a linear layer of PyTorch, whose weight is ``[out, in]``.

    Args:
      ours: the path of our linear layer.
      theirs: the name of the layer in the file.

    Returns:
      The rows of the weight and of the bias.
    """
    return (Weight(f"{ours}.kernel", f"{theirs}.weight", transposed=True), Weight(f"{ours}.bias", f"{theirs}.bias"))


def norm(ours: str, theirs: str) -> tuple[Weight, Weight]:
    """Makes the rows for a norm.

    Args:
      ours: the path of our norm.
      theirs: the name of the norm in the file.

    Returns:
      The rows of the scale and of the bias; the code skips the second for a norm without a bias.
    """
    return Weight(f"{ours}.scale", f"{theirs}.weight"), Weight(f"{ours}.bias", f"{theirs}.bias")


def with_groups(weights: tuple[Weight, ...], model: Model) -> tuple[Weight, ...]:
    """Makes the rows of a model whose layers differ in the structure of their weights.

    Args:
      weights: the table, as for a model whose layers are alike.
      model: the model, or its shapes.

    Returns:
      The table, with one row for each group of layers, see ``transformer_jax.nn.stack.Stack``.
    """
    stack = model.stacks().get("self") if hasattr(model, "stacks") else None
    if stack is None or not stack.is_mixed:
        return weights

    def rows(weight: Weight) -> list[Weight]:
        if not weight.ours.startswith(_BLOCKS):
            return [weight]
        return [dataclasses.replace(
            weight, ours=weight.ours.replace(_BLOCKS, prefix, 1), layers=layers,
            requires=weight.requires and weight.requires.replace(_BLOCKS, prefix, 1))
            for prefix, layers in zip((_DENSE_BLOCKS, _BLOCKS), stack.layers_of_groups, strict=True)]

    return tuple(row for weight in weights for row in rows(weight))


def parameters(model: Model) -> dict[str, nnx.Variable]:
    """Returns the parameters of a model, or of its shapes, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_parameter)
    return {path_name(path): leaf for path, leaf in leaves}


def map_parameters(function: Callable[[str, nnx.Variable], Any], model: Model) -> Model:
    """Applies a function to the path and value of every parameter of a model."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_name(path), leaf), model,
                                            is_leaf=_is_parameter)


def path_name(path: tuple) -> str:
    """Converts a path of JAX to a string such as ``"stack.blocks.mlp.up.kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_parameter(node: Any) -> bool:
    """Returns True for a variable of Flax NNX."""
    return isinstance(node, nnx.Variable)


def describe(items: Iterable[str], most: int = 40) -> str:
    """Formats items as a sorted list for a message, with at most ``most`` of them. Names that cannot
    be printed, which only a damaged file has, are shown in quotation marks."""
    items = [item if item.isprintable() else repr(item) for item in sorted(items)]
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
