"""Token and position embeddings, and the unembedding tied to them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ModelConfig
from transformer_jax.nn.layers import Norm, dropout, parameter
from transformer_jax.ops.linear import float32_logits
from transformer_jax.ops.positions import sinusoidal
from transformer_jax.sharding import as_rows, gathered, look_up


def _table(config: ModelConfig, key: jax.Array, rows: int, axis: str | None) -> nnx.Param:
    by_width = config.scale_embeddings or config.init_std is None
    std = 1 / math.sqrt(config.model_dim) if by_width else config.init_std
    values = std * jax.random.normal(key, (rows, config.model_dim))
    return parameter(values.astype(config.param_dtype), (axis, "embed"))


def _position_table(config: ModelConfig, key: jax.Array) -> nnx.Param | None:
    if config.positions != "learned":
        return None
    return _table(config, key, config.max_len + config.position_offset, None)


class TargetEmbeddings(nnx.Module):
    """What an encoder-decoder has of its own for targets: learned positions and a norm, where the
    config has them."""

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        self.position = _position_table(config, key)
        self.norm = Norm(config.model_dim, config) if config.use_embedding_norm else None


class Embeddings(nnx.Module):
    """Token embeddings, plus positions and token types where the config has them; and the way back
    to logits."""

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        token_key, position_key, output_key = jax.random.split(key, 3)
        self.config = config
        self.token = _table(config, token_key, config.vocab_size, "vocab")
        self.position = _position_table(config, position_key)
        self.output = None if config.tie_embeddings else _table(config, output_key, config.vocab_size, "vocab")
        self.output_bias = (parameter(jnp.zeros(config.vocab_size, config.param_dtype), ("vocab",))
                            if config.use_output_bias else None)
        type_key = jax.random.fold_in(key, 3)
        self.token_type = (_table(config, type_key, config.num_token_types, None) if config.num_token_types else None)
        self.norm = Norm(config.model_dim, config) if config.use_embedding_norm else None

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, token_types_BT: jax.Array | None = None, *,
                 target: TargetEmbeddings | None = None, key: jax.Array | None = None) -> jax.Array:
        """Embeddings ``[B, T, D]`` in the config's compute type, with positions and norm of
        ``target`` if given.

        A key switches dropout on.
        """
        own = self if target is None else target
        x_BTD = look_up(self.token[...], tokens_BT, self.token.axes).astype(self.config.dtype)
        if self.config.scale_embeddings:
            x_BTD = x_BTD * math.sqrt(self.config.model_dim)
        if own.position is not None:
            rows_BT = positions_BT + self.config.position_offset
            x_BTD = x_BTD + look_up(own.position[...], rows_BT, own.position.axes).astype(x_BTD.dtype)
        elif self.config.positions.startswith("sinusoidal"):
            halves = self.config.positions == "sinusoidal_halves"
            x_BTD = x_BTD + sinusoidal(positions_BT, self.config.model_dim, halves=halves).astype(x_BTD.dtype)
        if self.token_type is not None:
            types_BT = jnp.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
            x_BTD = x_BTD + look_up(self.token_type[...], types_BT, self.token_type.axes).astype(x_BTD.dtype)
        if own.norm is not None:
            x_BTD = own.norm(x_BTD)
        return dropout(x_BTD, self.config.dropout, key)

    @property
    def unembedding_VD(self) -> jax.Array:
        """The output matrix: the token embeddings themselves when tied."""
        return (self.token if self.output is None else self.output)[...]

    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits, float32 ``[B, T, V]``."""
        rows_MD = as_rows(self.read(hidden_BTD))
        unembedding_VD = gathered(self.unembedding_VD.astype(rows_MD.dtype), self.token.axes)
        logits_MV = float32_logits(rows_MD, unembedding_VD, self.config.precision)
        if self.output_bias is not None:
            logits_MV = logits_MV + self.output_bias[...].astype(jnp.float32)
        return logits_MV.reshape(*hidden_BTD.shape[:-1], -1)

    def read(self, hidden_BTD: jax.Array) -> jax.Array:
        """The hidden states as the unembedding reads them."""
        return hidden_BTD / math.sqrt(self.config.model_dim) if self.config.scale_logits else hidden_BTD
