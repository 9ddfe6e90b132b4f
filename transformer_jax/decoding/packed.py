"""A model in the form in which a call of a compiled function costs the host least.

JAX collects the arrays of all arguments in every call. In a model it has to walk through the
modules for this, which takes longer than a very small model needs for a token. A packed model has
its arrays in one tuple.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import jax

from transformer_jax.models.decoder import Decoder
from transformer_jax.models.encoder_decoder import EncoderDecoder

Generator = Decoder | EncoderDecoder


class _Structure:
    """How the arrays of a model belong together. Equal structures are one object, so that JAX
    compares them at once."""

    def __init__(self, tree: Any):
        self.tree = tree


_structure = functools.cache(_Structure)


@jax.tree_util.register_pytree_node_class
class PackedModel:
    """The arrays of a model, and their structure."""

    def __init__(self, arrays: Sequence[jax.Array], structure: _Structure):
        """Stores arrays that were collected before; see ``packed``."""
        self.arrays, self.structure = arrays, structure

    def tree_flatten(self) -> tuple[Sequence[jax.Array], _Structure]:
        """Returns the arrays and the structure, for JAX."""
        return self.arrays, self.structure

    @classmethod
    def tree_unflatten(cls, structure: _Structure, arrays: Sequence[jax.Array]) -> PackedModel:
        """Makes the packed model from what ``tree_flatten`` returns, for JAX."""
        return cls(arrays, structure)


def packed(model: Generator) -> PackedModel:
    """Packs a model.

    Args:
      model: a model in the form for decoding.

    Returns:
      The packed model. A later change of the model does not change it.
    """
    arrays, tree = jax.tree.flatten(model)
    return PackedModel(tuple(arrays), _structure(tree))


def unpacked(model: Generator | PackedModel) -> Generator:
    """Returns the model in a compiled function that may be given a packed one.

    Args:
      model: a model, packed or not.

    Returns:
      The model.
    """
    if not isinstance(model, PackedModel):
        return model
    return cast(Generator, jax.tree.unflatten(model.structure.tree, model.arrays))
