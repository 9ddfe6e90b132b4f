"""Recurrent language models: RNN, LSTM and GRU."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from transformer_jax.baselines.cells import RecurrentLayer, State
from transformer_jax.config.recurrent import RecurrentConfig
from transformer_jax.models.inputs import check_config, check_token_array, check_values, tokens_of
from transformer_jax.models.output import Output
from transformer_jax.nn.embeddings import Embeddings
from transformer_jax.nn.layers import dropout
from transformer_jax.nn.printing import Printed
from transformer_jax.nn.state_cache import StateCache
from transformer_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentTrace:
    """The intermediate values of a recurrent network, which has no attention.

    Attributes:
      states: the embeddings, and h of each layer after each token; one array ``[B, T, D]`` each.
    """

    states: tuple[jax.Array, ...]

    def parts(self) -> dict[str, Any]:
        """Returns an empty dictionary, because there is no attention."""
        return {}

    @property
    def residual(self) -> jax.Array:
        """The embeddings and the states of all layers, ``[L + 1, B, T, D]``."""
        return jnp.stack(self.states)


class RecurrentModel(Printed, nnx.Module):
    """A recurrent language model (Mikolov et al., 2010): a pytree of weights, called as a pure
    function. It takes the place of a ``Decoder`` in training and in decoding.

    Attributes:
      reads_sources: False: there is no source text.
      predicts_next: True: the logits are those of the next token.
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
        check_config(config, "recurrent", key)
        self.config = config
        self.embeddings = Embeddings(config.embedding_config, key=key)
        self.layers = make_layers(config, key=jax.random.fold_in(key, 1))

    def __call__(self, tokens_BT: Int[Array, "B T"] | None = None, *,
                 segment_ids_BT: Shaped[Array, "B T"] | None = None, cache: StateCache | None = None,
                 key: jax.Array | None = None, intervene: Any = None,
                 embeddings_BTD: Float[Array, "B T D"] | None = None) -> Output:
        """Returns the next-token logits of every position.

        Args:
          tokens_BT: token ids.
          segment_ids_BT: the document of a packed row that each token belongs to, 0 for padding.
            The state is reset at the start of each segment. ``None`` means one segment.
          cache: the state after the tokens before these.
          key: PRNG key for dropout. ``None`` switches dropout off.
          intervene: must be ``None``: a recurrent network has no intervention sites.
          embeddings_BTD: embeddings to use in place of token ids.

        Returns:
          The output. Its trace is a ``RecurrentTrace``.

        Raises:
          ValueError: if the tokens are not integers ``[B, T]`` of the vocabulary, or if there are
            more than the cache has room for.
        """
        check_no_sites(intervene)
        tokens_BT = tokens_of(tokens_BT, embeddings_BTD, self.embeddings.config)
        check_token_array(tokens_BT, tokens_BT.shape[1] if cache is None else cache.capacity, "the cache")
        check_values(self.embeddings.config, tokens_BT)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        x_BTD = constrain(self.embeddings(tokens_BT, tokens_BT, embeddings_BTD=embeddings_BTD), "batch", None, None)
        states: list[State | None] = [None] * len(self.layers) if cache is None else list(cache.state)
        hidden_BTD, outputs, after = read_layers(
            self.layers, x_BTD, segment_ids_BT, states, cache, self.config.dropout, key)
        trace = cast(Any, RecurrentTrace((x_BTD, *outputs)))
        return Output(logits=self.unembed(hidden_BTD), hidden=hidden_BTD, trace=trace,
                      cache=None if cache is None else cast(Any, cache.append(tuple(after), segment_ids_BT)))

    def stacks(self) -> dict[str, Any]:
        """Returns an empty dictionary, because the model has no attention layers.

        Returns:
          The empty dictionary.
        """
        return {}

    def start_cache(self, batch_size: int, capacity: int) -> StateCache:
        """Creates the state before the first token.

        Args:
          batch_size: the number of rows B.
          capacity: the number of tokens that each row has room for.

        Returns:
          The cache, whose state has the same size after any number of tokens.
        """
        return StateCache.empty(tuple(layer.zeros(batch_size, self.config.dtype) for layer in self.layers), batch_size,
                                capacity)

    def step(self, tokens_BT: Int[Array, "B T"], cache: StateCache, **options: Any) -> Output:
        """Runs the model on the tokens that follow those in the cache.

        Args:
          tokens_BT: token ids.
          cache: the state after the tokens before these.
          **options: further arguments of a call of the model.

        Returns:
          The output; its ``cache`` includes the new tokens.
        """
        return self(tokens_BT, cache=cache, **options)

    def unembed(self, hidden_BTD: Float[Array, "*tokens D"]) -> Float[Array, "*tokens V"]:
        """Computes the logits of states of the last layer.

        Args:
          hidden_BTD: the states ``[..., D]``.

        Returns:
          Logits, float32 ``[..., V]``.
        """
        return self.embeddings.unembed(hidden_BTD)

    def for_decoding(self) -> RecurrentModel:
        """Returns the model itself, which has only one form.

        Returns:
          The same model.
        """
        return self


def make_layers(config: RecurrentConfig, *, key: jax.Array, upper_dim: int | None = None) -> nnx.List:
    """Makes the layers of a network.

    Args:
      config: the shape of the network.
      key: PRNG key.
      upper_dim: the width of the input of each layer but the first; ``None`` for
        ``config.model_dim``, the width of the first.

    Returns:
      ``config.num_layers`` layers.
    """
    D = config.model_dim
    return nnx.List([RecurrentLayer(config, D if layer == 0 else upper_dim or D, key=jax.random.fold_in(key, layer))
                     for layer in range(config.num_layers)])


def read_layers(layers: nnx.List, x_BTD: jax.Array, segment_ids_BT: jax.Array, states: list[Any],
                cache: StateCache | None, rate: float,
                key: jax.Array | None) -> tuple[jax.Array, list[jax.Array], list[State]]:
    """Runs layers one after another.

    Args:
      layers: the layers.
      x_BTD: the embeddings.
      segment_ids_BT: the segment of each token.
      states: the state of each layer before these tokens, or ``None``.
      cache: the cache that the states come from, or ``None``.
      rate: the dropout rate.
      key: PRNG key for dropout, or ``None``.

    Returns:
      The output of the last layer after dropout, the output of each layer, and the new states.
    """
    keys = [None] * (len(layers) + 1) if key is None else list(jax.random.split(key, len(layers) + 1))
    before_B = None if cache is None else cache.last_segment_B
    outputs, after = [], []
    for layer, state, layer_key in zip(layers, states, keys, strict=False):
        (x_BTD, *_), state = layer(dropout(x_BTD, rate, layer_key), segment_ids_BT, state, before_B)
        outputs.append(x_BTD)
        after.append(state)
    return dropout(x_BTD, rate, keys[-1]), outputs, after


def check_no_sites(intervene: Any) -> None:
    """Raises ValueError if an intervention is given, because a recurrent network has no sites."""
    if intervene is not None:
        raise ValueError("intervene was given, but a recurrent network has no intervention sites; leave it out")
