"""Token and position embeddings, and the unembedding tied to them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ModelConfig
from transformer_jax.nn.layers import Norm, dropout, parameter
from transformer_jax.ops.positions import sinusoidal
from transformer_jax.sharding import constrain


class Embeddings(nnx.Module):
    """Token embeddings, plus positions and token types where the config has them."""

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        token_key, position_key, output_key = jax.random.split(key, 3)
        self.config = config
        by_width = config.scale_embeddings or config.init_std is None
        std = 1 / math.sqrt(config.model_dim) if by_width else config.init_std

        def table(key: jax.Array, rows: int, axis: str | None) -> nnx.Param:
            values = std * jax.random.normal(key, (rows, config.model_dim))
            return parameter(values.astype(config.param_dtype), (axis, "embed"))

        self.token = table(token_key, config.vocab_size, "vocab")
        self.position = table(position_key, config.max_len, None) if config.positions == "learned" else None
        self.output = None if config.tie_embeddings else table(output_key, config.vocab_size, "vocab")
        type_key = jax.random.fold_in(key, 3)
        self.token_type = table(type_key, config.num_token_types, None) if config.num_token_types else None
        self.norm = Norm(config.model_dim, config) if config.use_embedding_norm else None

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, token_types_BT: jax.Array | None = None, *,
                 key: jax.Array | None = None) -> jax.Array:
        """Embeddings ``[B, T, D]`` in the config's compute type; a key switches dropout on."""
        # Under FSDP every device gathers the rows of the table, as it does any weight; left to itself the compiler
        # gathers the embeddings of the whole batch.
        x_BTD = constrain(self.token[...], "vocab", None)[tokens_BT].astype(self.config.dtype)
        if self.config.scale_embeddings:
            x_BTD = x_BTD * math.sqrt(self.config.model_dim)
        if self.position is not None:
            x_BTD = x_BTD + self.position[...][positions_BT].astype(x_BTD.dtype)
        elif self.config.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoidal(positions_BT, self.config.model_dim).astype(x_BTD.dtype)
        if self.token_type is not None:
            types_BT = jnp.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
            x_BTD = x_BTD + self.token_type[...][types_BT].astype(x_BTD.dtype)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return dropout(x_BTD, self.config.dropout, key)

    @property
    def unembedding_VD(self) -> jax.Array:
        """The output matrix: the token embeddings themselves when tied."""
        return (self.token if self.output is None else self.output)[...]

    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits, float32 ``[B, T, V]``."""
        rows_MD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        logits_MV = jax.lax.dot_general(rows_MD, self.unembedding_VD.astype(rows_MD.dtype), (((1,), (1,)), ((), ())),
                                        preferred_element_type=jnp.float32)
        return logits_MV.reshape(*hidden_BTD.shape[:-1], -1)
