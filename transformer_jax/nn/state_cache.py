"""The decoding cache of a model whose state has a constant size, such as a recurrent network."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateCache:
    """The state of a model after the tokens that it has read. It does not grow with the text.

    Decoding also records the segment id of each token, as ``KVCache`` does: the rules of sampling
    read which tokens of a row are padding.

    Attributes:
      state: A pytree of arrays ``[B, ...]``: what the model knows of the tokens so far.
      segment_ids_BS: The segment id of each slot; 0 for an empty slot or padding.
      length: The number of slots in use, an integer scalar.
    """

    state: Any
    segment_ids_BS: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, state: Any, batch_size: int, capacity: int) -> Self:
        """Makes a cache before the first token.

        Args:
          state: The state before the first token.
          batch_size: The number of rows, B.
          capacity: The number of tokens that each row has room for, S.

        Returns:
          The cache.
        """
        return cls(state, jnp.zeros((batch_size, capacity), jnp.int32), jnp.zeros((), jnp.int32))

    @property
    def capacity(self) -> int:
        """The number of slots of each row."""
        return self.segment_ids_BS.shape[1]

    @property
    def last_segment_B(self) -> jax.Array:
        """The segment id of the last token of each row; 0 if there is no token yet."""
        slots_S = jnp.arange(1, self.capacity + 1)
        last_B = jnp.where(self.segment_ids_BS != 0, slots_S, 0).max(1)
        found_B1 = jnp.take_along_axis(self.segment_ids_BS, jnp.maximum(last_B - 1, 0)[:, None], axis=1)
        return jnp.where(last_B > 0, found_B1[:, 0], 0)

    def append(self, state: Any, segment_ids_BT: Shaped[Array, "B T"]) -> Self:
        """Stores the state after new tokens.

        Args:
          state: The state after the tokens.
          segment_ids_BT: The segment ids of the tokens ``[B, T]``; 0 for padding.

        Returns:
          The changed cache.
        """
        written_BS = jax.lax.dynamic_update_slice_in_dim(
            self.segment_ids_BS, segment_ids_BT.astype(jnp.int32), self.length, axis=1)
        return dataclasses.replace(self, state=state, segment_ids_BS=written_BS,
                                   length=self.length + segment_ids_BT.shape[1])
