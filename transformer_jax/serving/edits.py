"""Changes to the model's computation for single requests of a batch: steering vectors and ablated
heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from transformer_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True, eq=False)
class TextEdits:
    """What is changed while the model reads and writes one text.

    Attributes:
      steering_LD: what is added to the residual stream that enters each layer.
      is_ablated_LN: True for heads whose output is replaced by zero.
    """

    steering_LD: Float[np.ndarray, "L D"]
    is_ablated_LN: Bool[np.ndarray, "L N"]

    @classmethod
    def none(cls, config: ModelConfig) -> TextEdits:
        """Returns edits that change nothing."""
        return cls(np.zeros((config.num_layers, config.model_dim), np.float32),
                   np.zeros((config.num_layers, config.num_heads), bool))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowEdits:
    """An intervention that changes each row of a batch in its own way; other rows keep their values
    exactly.

    Attributes:
      steering_LBD: what is added to the residual stream of each row.
      is_ablated_LBN: True for heads whose output is replaced by zero.
      is_edited_B: True for rows that are changed.
    """

    steering_LBD: Float[Array, "L B D"]
    is_ablated_LBN: Bool[Array, "L B N"]
    is_edited_B: Bool[Array, " B"]

    def __call__(self, site: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
        """Returns the changed value, as interventions do."""
        if site == "residual":
            changed = (value + self.steering_LBD[layer][:, None]).astype(value.dtype)
            return jnp.where(self.is_edited_B[:, None, None], changed, value)
        if site == "head_output":
            return jnp.where(self.is_ablated_LBN[layer][:, None, :, None], 0, value).astype(value.dtype)
        return value


def row_edits(edits: Sequence[TextEdits | None], config: ModelConfig) -> RowEdits | None:
    """Joins the edits of the rows of a batch.

    Args:
      edits: those of each row, or ``None``.
      config: the model's config.

    Returns:
      The intervention; ``None`` if no row is changed.
    """
    if all(each is None for each in edits):
        return None
    none = TextEdits.none(config)
    rows = [none if each is None else each for each in edits]
    return RowEdits(jnp.asarray(np.stack([row.steering_LD for row in rows], axis=1)),
                    jnp.asarray(np.stack([row.is_ablated_LN for row in rows], axis=1)),
                    jnp.asarray([each is not None for each in edits]))
