"""What reads a model's hidden states: tokens again, or one number."""

from __future__ import annotations

from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ModelConfig
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.inputs import check_config
from transformer_jax.nn.embeddings import Embeddings
from transformer_jax.nn.layers import Linear, Norm, ScalarHead, parameter
from transformer_jax.ops.linear import gelu


class MaskedTokenHead(nnx.Module):
    """BERT's masked language modelling head: a transform, then the unembedding with a bias of its
    own."""

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        self.transform = Linear(config.model_dim, config.model_dim, ("embed", None), config, key=key)
        self.norm = Norm(config.model_dim, config)
        self.bias = parameter(jnp.zeros(config.vocab_size, config.param_dtype), ("vocab",))

    def __call__(self, hidden_BTD: jax.Array, embeddings: Embeddings) -> jax.Array:
        """Logits, float32 ``[..., V]``."""
        return embeddings.unembed(self.transformed(hidden_BTD)) + self.bias[...].astype(jnp.float32)

    def transformed(self, hidden_BTD: jax.Array) -> jax.Array:
        """What the unembedding reads ``[..., D]``."""
        return self.norm(gelu(self.transform(hidden_BTD)))


class RewardModel(nnx.Module):
    """A decoder that ends in one number: how good the text is.

    Scores of two texts differ by the log odds that one is preferred (Bradley and Terry, 1952).
    Rewards are scores less the ``mean`` and over the standard deviation ``std`` of a reference set.

    Source: Ziegler et al. (2019), Stiennon et al. (2020), Ouyang et al. (2022).

    Attributes:
      reads_sources: see :class:`transformer_jax.Decoder`; so is ``predicts_next``.
    """

    reads_sources = False
    predicts_next = False

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        """Random weights; see :meth:`of` for those of a trained decoder.

        Args:
          config: the shape; ``family`` must be ``"reward"`` and ``vocab_size`` set.
          key: PRNG key, such as ``jax.random.key(0)``.
        """
        check_config(config, "reward")
        trunk_key, head_key = jax.random.split(key)
        self.config = config
        self.trunk = Decoder(config.replace(family="decoder"), key=trunk_key)
        self.head = ScalarHead(config, key=head_key)
        self.mean = parameter(jnp.zeros(()), ())
        self.std = parameter(jnp.ones(()), ())

    @classmethod
    def of(cls, decoder: Decoder, *, key: jax.Array) -> Self:
        """A reward model that begins as a trained decoder, with a new head."""
        model = cls(decoder.config.replace(family="reward"), key=key)
        model.trunk = jax.tree.map(lambda x: x, decoder)
        return model

    def __call__(self, tokens_BT: jax.Array, *, segment_ids_BT: jax.Array | None = None,
                 key: jax.Array | None = None) -> jax.Array:
        """The score of each row, read at its last real token.

        Args:
          tokens_BT: token ids, one text a row.
          segment_ids_BT: 1 for tokens and 0 for padding, which may be on either side. ``None``: no
            padding.
          key: switches dropout on.

        Returns:
          float32 ``[B]``.
        """
        hidden_BTD = self.trunk(tokens_BT, segment_ids_BT=segment_ids_BT, key=key).hidden
        if segment_ids_BT is None:
            return self.head(hidden_BTD[:, -1])
        places_BT = jnp.where(segment_ids_BT != 0, jnp.arange(tokens_BT.shape[1]), 0)
        return self.head(jnp.take_along_axis(hidden_BTD, places_BT.max(1)[:, None, None], axis=1)[:, 0])

    def rewards(self, tokens_BT: jax.Array, *, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        """Scores with mean 0 and standard deviation 1 over the reference set; arguments as in a
        call."""
        return (self(tokens_BT, segment_ids_BT=segment_ids_BT) - self.mean[...]) / self.std[...]
