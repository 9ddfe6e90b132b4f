"""ELMo: a language model in each direction, whose states are contextual vectors of the tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from transformer_jax.baselines.recurrent import check_no_sites, make_layers
from transformer_jax.config.recurrent import RecurrentConfig
from transformer_jax.models.inputs import check_config, check_token_array, check_values, tokens_of
from transformer_jax.models.output import Output
from transformer_jax.nn.embeddings import Embeddings
from transformer_jax.nn.layers import dropout
from transformer_jax.nn.printing import Printed
from transformer_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ElmoTrace:
    """The vectors of each token.

    Attributes:
      layers: the embedding twice, and for each layer the states of both directions next to each
        other; one array ``[B, T, 2 D]`` each.
      backward: the states of the last layer that reads from the end, after dropout ``[B, T, D]``.
    """

    layers: tuple[jax.Array, ...]
    backward: jax.Array

    def parts(self) -> dict[str, Any]:
        """Returns an empty dictionary, because there is no attention."""
        return {}

    @property
    def residual(self) -> jax.Array:
        """The vectors of all layers, ``[L + 1, B, T, 2 D]``."""
        return jnp.stack(self.layers)


class Elmo(Printed, nnx.Module):
    """A bidirectional language model (Peters et al., 2018): a pytree of weights, called as a pure
    function. The two directions share the embeddings and the unembedding.

    ``tj.embed`` returns the vectors of a layer. In the paper, tokens are words that are read
    character by character; here they are the pieces or the characters of the tokenizer.

    Attributes:
      reads_sources: False: there is no source text.
      predicts_next: True: the logits are those of the next token, from the forward direction.
      prediction_head: ``None``: the unembedding reads the states of the last layer.
    """

    reads_sources = False
    predicts_next = True
    prediction_head = None

    def __init__(self, config: RecurrentConfig, *, key: jax.Array):
        """Creates a model with random weights.

        Args:
          config: the shape of the model; ``vocab_size`` must be set.
          key: PRNG key.

        Raises:
          ValueError: if the config is for another family or has no ``vocab_size``.
        """
        check_config(config, "elmo", key)
        embedding_key, forward_key, backward_key = jax.random.split(key, 3)
        self.config = config
        self.embeddings = Embeddings(config.embedding_config, key=embedding_key)
        self.forward = make_layers(config, key=forward_key)
        self.backward = make_layers(config, key=backward_key)

    def __call__(self, tokens_BT: Int[Array, "B T"] | None = None, *,
                 segment_ids_BT: Shaped[Array, "B T"] | None = None, key: jax.Array | None = None,
                 intervene: Any = None, embeddings_BTD: Float[Array, "B T D"] | None = None) -> Output:
        """Reads the tokens in both directions.

        Args:
          tokens_BT: token ids.
          segment_ids_BT: the document of a packed row that each token belongs to, 0 for padding.
            ``None`` means one document.
          key: PRNG key for dropout. ``None`` switches dropout off.
          intervene: must be ``None``: a recurrent network has no intervention sites.
          embeddings_BTD: embeddings to use in place of token ids.

        Returns:
          The output: logits and hidden states are those of the forward direction, and the trace is
          an ``ElmoTrace``.

        Raises:
          ValueError: if the tokens are not integers ``[B, T]`` of the vocabulary.
        """
        check_no_sites(intervene)
        tokens_BT = tokens_of(tokens_BT, embeddings_BTD, self.embeddings.config)
        check_token_array(tokens_BT, tokens_BT.shape[1], "the model")
        check_values(self.embeddings.config, tokens_BT)
        ids_BT = jnp.ones_like(tokens_BT) if segment_ids_BT is None else jnp.asarray(segment_ids_BT).astype(jnp.int32)
        x_BTD = constrain(self.embeddings(tokens_BT, tokens_BT, embeddings_BTD=embeddings_BTD), "batch", None, None)
        directions = []
        for number, (layers, reverse) in enumerate(((self.forward, False), (self.backward, True))):
            state_BTD, states = x_BTD, [x_BTD]
            for index, layer in enumerate(layers):
                layer_key = None if key is None else jax.random.fold_in(key, 2 * index + number)
                (state_BTD, *_), _ = layer(dropout(state_BTD, self.config.dropout, layer_key), ids_BT, reverse=reverse)
                states.append(state_BTD)
            last_key = None if key is None else jax.random.fold_in(key, 2 * len(layers) + number)
            directions.append((states, dropout(state_BTD, self.config.dropout, last_key)))
        (ahead, hidden_BTD), (back, backward_BTD) = directions
        vectors = tuple(jnp.concatenate(pair, axis=-1) for pair in zip(ahead, back, strict=True))
        trace = cast(Any, ElmoTrace(vectors, backward_BTD))
        return Output(logits=self.unembed(hidden_BTD), hidden=hidden_BTD, trace=trace, cache=None)

    def stacks(self) -> dict[str, Any]:
        """Returns an empty dictionary, because the model has no attention layers.

        Returns:
          The empty dictionary.
        """
        return {}

    def unembed(self, hidden_BTD: Float[Array, "*tokens D"]) -> Float[Array, "*tokens V"]:
        """Computes the logits of states of the last layer, of either direction.

        Args:
          hidden_BTD: the states ``[..., D]``.

        Returns:
          Logits, float32 ``[..., V]``.
        """
        return self.embeddings.unembed(hidden_BTD)
