"""What reads a model's hidden states."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ModelConfig
from transformer_jax.nn.embeddings import Embeddings
from transformer_jax.nn.layers import Linear, Norm, parameter
from transformer_jax.ops.linear import gelu


class MaskedTokenHead(nnx.Module):
    """BERT's masked language modelling head: a transform, then the unembedding with a bias of its own."""

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        self.transform = Linear(config.model_dim, config.model_dim, ("embed", None), config, key=key)
        self.norm = Norm(config.model_dim, config)
        self.bias = parameter(jnp.zeros(config.vocab_size, config.param_dtype), ("vocab",))

    def __call__(self, hidden_BTD: jax.Array, embeddings: Embeddings) -> jax.Array:
        """Logits, float32 ``[..., V]``."""
        return embeddings.unembed(self.norm(gelu(self.transform(hidden_BTD)))) + self.bias[...].astype(jnp.float32)
