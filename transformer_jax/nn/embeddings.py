"""Token and position embeddings, and the unembedding, which may share the token embeddings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from transformer_jax.config import ModelConfig
from transformer_jax.nn.layers import Linear, Norm, dropout, parameter, table
from transformer_jax.nn.positions import position_encoding
from transformer_jax.nn.quantised import QuantisedLinear
from transformer_jax.ops.linear import float32_logits, soft_cap
from transformer_jax.sharding import as_rows, embedding_lookup, gather_weight


class TargetEmbeddings(nnx.Module):
    """The parts of the embeddings that the decoder of an encoder-decoder does not share.

    They are the weights of positions that are added to the embeddings, and a normalization layer,
    if the config has them.
    """

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        self.position = nnx.data(position_encoding(config).embedding_weights(config, key=key))
        self.norm = Norm(config.model_dim, config) if config.use_embedding_norm else None


class Embeddings(nnx.Module):
    """Token embeddings with optional positions and token types, and the unembedding to logits.

    Attributes:
      decoding_DV: The transposed unembedding, in the form for decoding, or a quantised linear map;
        ``None`` in a model that is not in this form.
    """

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        token_key, position_key, output_key = jax.random.split(key, 3)
        vocab_size = cast(int, config.vocab_size)  # models check that it is set
        E, D = config.embedding_dim, config.model_dim
        self.projection = (Linear(E, D, (None, "embed"), config, key=jax.random.fold_in(key, 4), has_bias=True)
                           if E != D else None)
        # All tables have the width of the embeddings.
        config = config if E == D else dataclasses.replace(config, model_dim=E)
        self.config = config
        self.token = table(config, token_key, vocab_size, "vocab")
        self.position = nnx.data(position_encoding(config).embedding_weights(config, key=position_key))
        self.output = None if config.tie_embeddings else table(config, output_key, vocab_size, "vocab")
        self.decoding_DV: Any = nnx.data(None)
        self.output_bias = (parameter(jnp.zeros(vocab_size, config.param_dtype), ("vocab",))
                            if config.use_output_bias else None)
        type_key = jax.random.fold_in(key, 3)
        self.token_type = (table(config, type_key, config.num_token_types, None) if config.num_token_types else None)
        self.norm = Norm(config.model_dim, config) if config.use_embedding_norm else None

    def __call__(self, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "#B T"],
                 token_types_BT: Int[Array, "#B T"] | None = None, *,
                 target: TargetEmbeddings | None = None, key: jax.Array | None = None,
                 embeddings_BTD: Float[Array, "B T D"] | None = None) -> Float[Array, "B T D"]:
        """Computes the embeddings of tokens.

        Args:
          tokens_BT: Token ids ``[B, T]``.
          positions_BT: The positions of the tokens ``[B, T]``.
          token_types_BT: Token type ids ``[B, T]``; ``None`` means 0 for each token.
          target: The decoder's own positions and normalization, for an encoder-decoder.
          key: The PRNG key of dropout. ``None`` switches dropout off.
          embeddings_BTD: Vectors to use instead of the rows of the token table, of their width.

        Returns:
          Embeddings ``[B, T, D]`` in the config's compute type.
        """
        own = self if target is None else target
        x_BTD = embeddings_BTD
        if x_BTD is None:
            x_BTD = embedding_lookup(self.token[...], tokens_BT, self.token.axes)
        x_BTD = jnp.asarray(x_BTD, self.config.dtype)
        if self.config.scale_embeddings:
            x_BTD = x_BTD * math.sqrt(self.config.model_dim)
        added_BTD = position_encoding(self.config).embed(self.config, own.position, positions_BT)
        if added_BTD is not None:
            x_BTD = x_BTD + added_BTD.astype(x_BTD.dtype)
        if self.token_type is not None:
            types_BT = jnp.zeros_like(tokens_BT) if token_types_BT is None else token_types_BT
            x_BTD = x_BTD + embedding_lookup(self.token_type[...], types_BT, self.token_type.axes).astype(x_BTD.dtype)
        if own.norm is not None:
            x_BTD = own.norm(x_BTD)
        x_BTD = dropout(x_BTD, self.config.dropout, key)
        return x_BTD if self.projection is None else self.projection(x_BTD)

    @property
    def unembedding_VD(self) -> jax.Array:
        """The output matrix ``[V, D]``, which is the token embeddings if they are tied."""
        return (self.token if self.output is None else self.output)[...]

    def unembed(self, hidden_BTD: Float[Array, "*tokens D"]) -> Float[Array, "*tokens V"]:
        """Computes logits.

        Args:
          hidden_BTD: The final hidden states ``[B, T, D]``.

        Returns:
          Logits, float32 ``[B, T, V]``.
        """
        rows_MD = as_rows(self.read(hidden_BTD))
        if isinstance(self.decoding_DV, QuantisedLinear):
            logits_MV = self.decoding_DV(rows_MD).astype(jnp.float32)
        elif self.decoding_DV is not None:
            logits_MV = jnp.dot(rows_MD, self.decoding_DV[...].astype(rows_MD.dtype), precision=self.config.precision,
                                preferred_element_type=jnp.float32)
        else:
            unembedding_VD = gather_weight(self.unembedding_VD.astype(rows_MD.dtype), self.token.axes)
            logits_MV = float32_logits(rows_MD, unembedding_VD, self.config.precision)
        if self.output_bias is not None:
            logits_MV = logits_MV + self.output_bias[...].astype(jnp.float32)
        if (cap := self.config.limits.logits) is not None:
            logits_MV = soft_cap(logits_MV, cap)
        return logits_MV.reshape(*hidden_BTD.shape[:-1], -1)

    def for_decoding(self) -> Self:
        """Transposes the unembedding: XLA:CPU multiplies a few rows with ``[D, V]`` faster than with
        ``[V, D]``.

        Returns:
          A copy of the module that computes the same function.
        """
        embeddings = jax.tree.map(lambda leaf: leaf, self)
        embeddings.decoding_DV = parameter(self.unembedding_VD.T, ("embed", "vocab"))
        return embeddings

    def read(self, hidden_BTD: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """Scales the hidden states for the unembedding, if the config has ``scale_logits`` or
        ``mup``.

        Args:
          hidden_BTD: The final hidden states ``[B, T, D]``.

        Returns:
          What is multiplied with ``unembedding_VD``, ``[B, T, D]``.
        """
        if self.config.mup is not None:
            return hidden_BTD / self.config.mup.width(self.config)
        return hidden_BTD / math.sqrt(self.config.model_dim) if self.config.scale_logits else hidden_BTD
