"""Token and position embeddings, and the unembedding tied to them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ModelConfig
from transformer_jax.nn.layers import parameter
from transformer_jax.ops.positions import sinusoidal


class Embeddings(nnx.Module):
    """Token embeddings, plus positions where the config adds them."""

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        token_key, position_key, output_key = jax.random.split(key, 3)
        self.config = config

        def table(key: jax.Array, rows: int, axis: str | None) -> nnx.Param:
            values = config.init_std * jax.random.normal(key, (rows, config.model_dim))
            return parameter(values.astype(config.param_dtype), (axis, "embed"))

        self.token = table(token_key, config.vocab_size, "vocab")
        self.position = table(position_key, config.max_len, None) if config.positions == "learned" else None
        self.output = None if config.tie_embeddings else table(output_key, config.vocab_size, "vocab")

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Embeddings ``[B, T, D]`` in the config's compute type."""
        x_BTD = self.token[...][tokens_BT].astype(self.config.dtype)
        if self.position is not None:
            x_BTD = x_BTD + self.position[...][positions_BT].astype(x_BTD.dtype)
        elif self.config.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoidal(positions_BT, self.config.model_dim).astype(x_BTD.dtype)
        return x_BTD

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
