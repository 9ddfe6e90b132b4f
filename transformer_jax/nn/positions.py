"""Position encodings and their registry.

Three places use an encoding: ``transformer_jax.nn.Embeddings`` adds it to the embeddings,
``transformer_jax.nn.Attention`` rotates queries and keys by it, and
``transformer_jax.nn.AttentionContext.of`` makes the bias of the scores.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from transformer_jax.config import ModelConfig
from transformer_jax.config.choices import allow_choice
from transformer_jax.nn.layers import parameter, table
from transformer_jax.ops.attention import Bias
from transformer_jax.ops.positions import LinearBias, RelativeBias, alibi_slopes, sinusoidal
from transformer_jax.ops.rotations import Rotation, rotary_angles
from transformer_jax.sharding import embedding_lookup


@dataclasses.dataclass(frozen=True)
class Places:
    """The positions of queries and keys in self-attention, for ``PositionEncoding.bias``.

    Attributes:
      positions_BT: The position of each query in its text ``[B, T]``.
      key_positions_BS: The position of each key, or of each slot of the cache, in its text
        ``[B, S]``.
      query_start: The index of the first query among the keys; ``None`` is 0.
      are_in_order: Whether the difference of two tokens' positions equals the difference of their
        indices among the keys. It is false if the caller gave the positions, and in a tree of
        continuations.
    """

    positions_BT: jax.Array
    key_positions_BS: jax.Array
    query_start: jax.Array | int | None
    are_in_order: bool

    @property
    def positions(self) -> tuple[jax.Array, jax.Array] | None:
        """The positions of queries and keys for ``transformer_jax.ops.OffsetBias``, or ``None`` if
        the indices among the keys give the distances."""
        return None if self.are_in_order else (self.positions_BT, self.key_positions_BS)


class PositionEncoding:
    """The base class of position encodings, which does nothing.

    A subclass overrides the methods that it needs: ``embed`` to add something to the embeddings,
    ``rotate`` (and ``rotation``) to change queries and keys, ``bias`` to add something to the
    scores. ``embedding_weights`` and ``attention_weights`` make the weights of a learned encoding.
    The weights may be one ``nnx.Param``, an ``nnx.Module`` or any pytree of these, and each
    parameter names its logical axes. See docs/extending/positions.md.

    Attributes:
      name: The name of the encoding in ``config.positions``.
    """

    name = ""

    def embedding_weights(self, config: ModelConfig, *, key: jax.Array) -> Any:
        """Makes the weights of ``embed``. An encoder and its decoder each have their own.

        Args:
          config: The model's config.
          key: The PRNG key of the initial values.

        Returns:
          The weights, or ``None``.
        """
        del config, key

    def embed(self, config: ModelConfig, weights: Any,
              positions_BT: Int[Array, "#B T"]) -> Float[Array, "*batch D"] | None:
        """Computes what is added to the embeddings.

        Args:
          config: The model's config.
          weights: The result of ``embedding_weights``.
          positions_BT: The positions of the tokens ``[B, T]``.

        Returns:
          ``[B, T, D]``; ``None`` adds nothing.
        """
        del config, weights, positions_BT

    def attention_weights(self, config: ModelConfig, *, key: jax.Array, is_causal: bool) -> Any:
        """Makes the weights of ``rotation`` and ``bias``, which the layers of a stack share.

        Args:
          config: The model's config.
          key: The PRNG key of the initial values.
          is_causal: Whether the self-attention of the stack is causal.

        Returns:
          The weights, or ``None``.
        """
        del config, key, is_causal

    def rotation(self, config: ModelConfig, weights: Any, positions_BT: Int[Array, "#B T"]) -> Any:
        """Computes, once for all layers, what ``rotate`` needs.

        Args:
          config: The model's config.
          weights: The result of ``attention_weights``.
          positions_BT: The positions of the queries ``[B, T]``.

        Returns:
          A pytree, or ``None`` to rotate nothing.
        """
        del config, weights, positions_BT

    def rotate(self, q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"],
               rotation: Any) -> tuple[jax.Array, jax.Array]:
        """Changes the queries and keys of a layer. A cache stores the changed keys.

        Args:
          q_BTNH: Queries ``[B, T, N, H]``.
          k_BTKH: Keys ``[B, T, K, H]``.
          rotation: The result of ``rotation``.

        Returns:
          The changed queries and keys.
        """
        del rotation
        return q_BTNH, k_BTKH

    def bias(self, config: ModelConfig, weights: Any, places: Places) -> Bias:
        """Makes the bias of the attention scores.

        Args:
          config: The model's config.
          weights: The result of ``attention_weights``.
          places: The positions of queries and keys.

        Returns:
          A ``transformer_jax.ops.PositionBias``, an array ``[B or 1, N, T, S]``, or ``None``.
        """
        del config, weights, places

    @property
    def has_bias(self) -> bool:
        """Whether it adds to the scores. If so, a cache stores the position of every key."""
        return type(self).bias is not PositionEncoding.bias

    def num_positions(self, config: ModelConfig) -> int | None:
        """Returns how many positions the encoding supports, counted from 0.

        Later positions raise an error if their values are known. ``jax.jit`` clamps them.

        Args:
          config: The model's config.

        Returns:
          The number of positions; ``None`` is no limit.
        """
        del config

    def num_looked_up(self, config: ModelConfig) -> int:
        """Counts the weights that are added to embeddings and multiplied with nothing.

        Args:
          config: The model's config.

        Returns:
          The number of weights in ``embedding_weights`` of one encoder or decoder.
        """
        shapes = jax.eval_shape(lambda key: self.embedding_weights(config, key=key), jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))


class Learned(PositionEncoding):
    """A learned vector for each position, see ``ModelConfig.position_offset``."""

    name = "learned"

    def embedding_weights(self, config: ModelConfig, *, key: jax.Array) -> nnx.Param:
        return table(config, key, config.max_len + config.position_offset, None)

    def num_positions(self, config: ModelConfig) -> int:
        return config.max_len

    def embed(self, config: ModelConfig, weights: nnx.Param, positions_BT: Int[Array, "#B T"]) -> jax.Array:
        return embedding_lookup(weights[...], positions_BT + config.position_offset, weights.axes)


class Sinusoidal(PositionEncoding):
    """The sinusoidal embeddings of Vaswani et al. (2017), or a variant of ``ops.sinusoidal``."""

    def __init__(self, name: str, **variant: bool):
        self.name, self.variant = name, variant

    def embed(self, config: ModelConfig, weights: Any, positions_BT: Int[Array, "#B T"]) -> jax.Array:
        del weights
        return sinusoidal(positions_BT + config.position_offset, config.model_dim, **self.variant)


class Rotary(PositionEncoding):
    """The rotary position embedding (RoPE) of Su et al. (2021)."""

    name = "rope"

    def rotation(self, config: ModelConfig, weights: Any, positions_BT: Int[Array, "#B T"]) -> Rotation:
        del weights
        layout, head_dim = config.rope_layout, cast(int, config.head_dim)
        cos, sin = rotary_angles(positions_BT, layout.dim or head_dim, config.rope_base, config.rope_scaling)
        return Rotation(cos, sin, layout.pairs == "interleaved")

    def rotate(self, q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"],
               rotation: Rotation) -> tuple[jax.Array, jax.Array]:
        return rotation(q_BTNH), rotation(k_BTKH)


class Alibi(PositionEncoding):
    """The linear bias (ALiBi) of Press et al. (2021)."""

    name = "alibi"

    def bias(self, config: ModelConfig, weights: Any, places: Places) -> LinearBias:
        del weights
        return LinearBias(alibi_slopes(config.num_heads), places.query_start, places.positions)


class RelativePositions(nnx.Module):
    """The table ``[buckets, N]`` of ``positions="relative"``, which the layers of a stack share."""

    def __init__(self, config: ModelConfig, *, key: jax.Array, is_causal: bool):
        self.is_causal = is_causal
        std = 1 / math.sqrt(config.model_dim) if config.init_std is None else config.init_std
        table_RN = std * jax.random.normal(key, (config.relative_buckets, config.num_heads))
        self.table = parameter(table_RN.astype(config.param_dtype), (None, None))


class Relative(PositionEncoding):
    """The learned bias of T5 (Raffel et al., 2020)."""

    name = "relative"

    def attention_weights(self, config: ModelConfig, *, key: jax.Array, is_causal: bool) -> RelativePositions:
        return RelativePositions(config, key=key, is_causal=is_causal)

    def bias(self, config: ModelConfig, weights: RelativePositions, places: Places) -> RelativeBias:
        return RelativeBias(weights.table[...], config.relative_max_distance, weights.is_causal, places.query_start,
                            places.positions)


class NoPositions(PositionEncoding):
    """No position encoding."""

    name = "none"


BUILT_IN: dict[str, PositionEncoding] = {encoding.name: encoding for encoding in (
    Learned(), Sinusoidal("sinusoidal"), Sinusoidal("sinusoidal_halves", halves=True),
    Sinusoidal("sinusoidal_fairseq", halves=True, closed=True), Rotary(), Alibi(), Relative(), NoPositions())}
ENCODINGS: dict[str, PositionEncoding] = {}


def register_positions(encoding: type[PositionEncoding]) -> type[PositionEncoding]:
    """Registers a position encoding, so that ``config.positions`` can name it.

    Use it as a class decorator. Registering another encoding with the same name replaces the first.
    Programs that are already compiled do not change.

    Args:
      encoding: A subclass of ``PositionEncoding`` that has a ``name``.

    Returns:
      The same class.

    Raises:
      ValueError: The class has no name, or the name of a built-in encoding.
    """
    if not encoding.name:
        raise ValueError(f"{encoding.__name__} has no name: set name = \"...\" in the class")
    if encoding.name in BUILT_IN:
        raise ValueError(f"{encoding.name!r} is a built-in encoding of positions; choose another name")
    ENCODINGS[encoding.name] = encoding()
    allow_choice("positions", encoding.name)
    return encoding


def position_encoding(config: ModelConfig) -> PositionEncoding:
    """Returns the encoding that ``config.positions`` names."""
    return BUILT_IN.get(config.positions) or ENCODINGS[config.positions]
