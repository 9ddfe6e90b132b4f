"""Modules that read a model's hidden states: one predicts masked tokens, one predicts a reward."""

from __future__ import annotations

from typing import Any, Self, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from transformer_jax.config import ModelConfig
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.inputs import check_config
from transformer_jax.models.output import Output, Trace
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.embeddings import Embeddings
from transformer_jax.nn.layers import Linear, Norm, ScalarHead, parameter
from transformer_jax.nn.mlp import ACTIVATIONS
from transformer_jax.nn.printing import Printed
from transformer_jax.nn.sites import Intervene
from transformer_jax.nn.stack import Stack


class MaskedTokenHead(nnx.Module):
    """BERT's masked language modelling head: a transform, then the unembedding with its own
    bias."""

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        self.activation = config.head_activation
        self.transform = Linear(config.model_dim, config.embedding_dim, ("embed", None), config, key=key)
        self.norm = Norm(config.embedding_dim, config)
        self.bias = parameter(jnp.zeros(config.vocab_size, config.param_dtype), ("vocab",))

    def __call__(self, hidden_BTD: Float[Array, "B T D"], embeddings: Embeddings) -> Float[Array, "B T V"]:
        """Returns the logits of hidden states, float32 ``[..., V]``."""
        return embeddings.unembed(self.transformed(hidden_BTD)) + self.bias[...].astype(jnp.float32)

    def transformed(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """Transforms hidden states into the input of the unembedding.

        Args:
          hidden_BTD: hidden states, ``[..., D]``.

        Returns:
          The input of the unembedding, ``[..., D]``.
        """
        return self.norm(ACTIVATIONS[self.activation](self.transform(hidden_BTD)))


class RewardModel(Printed, nnx.Module):
    """A decoder with a head that predicts one number: how good the text is.

    The difference between the scores of two texts is the log odds that the first is preferred
    (Bradley and Terry, 1952). A reward is a score minus ``mean``, divided by ``std``: the mean and
    the standard deviation of the scores of a reference set.

    Source: Ziegler et al. (2019), Stiennon et al. (2020), Ouyang et al. (2022).

    Attributes:
      trunk: the decoder. Pass it to functions that need logits, such as a logit lens.
      reads_sources: False: the model takes one text, see ``transformer_jax.Decoder``.
      predicts_next: False: the model scores texts and cannot generate.
    """

    reads_sources = False
    predicts_next = False

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        """Creates a model with random weights; ``RewardModel.of`` starts from a trained decoder
        instead.

        Args:
          config: the shape of the model; ``family`` must be ``"reward"`` and ``vocab_size`` must be
            set.
          key: PRNG key, such as ``jax.random.key(0)``.

        Raises:
          ValueError: if the config is for another family or has no ``vocab_size``.
        """
        check_config(config, "reward", key)
        trunk_key, head_key = jax.random.split(key)
        self.config = config
        self.trunk = Decoder(config.replace(family="decoder"), key=trunk_key)
        self.head = ScalarHead(config, key=head_key)
        self.mean = parameter(jnp.zeros(()), ())
        self.std = parameter(jnp.ones(()), ())

    @classmethod
    def of(cls, decoder: Decoder, *, key: jax.Array) -> Self:
        """Creates a reward model from a trained decoder and a new head.

        Args:
          decoder: the trained decoder.
          key: PRNG key for the weights of the head.

        Returns:
          The reward model; its trunk shares the decoder's arrays.
        """
        model = cls(decoder.config.replace(family="reward"), key=key)
        model.trunk = jax.tree.map(lambda x: x, decoder)
        return model

    def __call__(self, tokens_BT: Int[Array, "B T"], *, segment_ids_BT: Shaped[Array, "B T"] | None = None,
                 key: jax.Array | None = None, intervene: Intervene | None = None) -> Float[Array, " B"]:
        """Returns the score of each row, computed at its last token that is not padding.

        Args:
          tokens_BT: token ids, one text a row.
          segment_ids_BT: 1 for tokens and 0 for padding, which may be on either side. ``None``
            means that there is no padding.
          key: PRNG key for dropout. ``None`` switches dropout off.
          intervene: ``intervene(site, layer, value) -> value``, see
            ``transformer_jax.Decoder.__call__``. With it you can find out what a score depends on.

        Returns:
          Scores, float32 ``[B]``.

        Raises:
          ValueError: if the tokens are not integers ``[B, T]`` or if there are more than
            ``config.max_len``.
        """
        return self.scores_and_trace(tokens_BT, segment_ids_BT=segment_ids_BT, key=key, intervene=intervene)[0]

    def scores_and_trace(self, tokens_BT: Int[Array, "B T"], *, segment_ids_BT: Shaped[Array, "B T"] | None = None,
                         key: jax.Array | None = None,
                         intervene: Intervene | None = None) -> tuple[Float[Array, " B"], Trace]:
        """Returns the score of each row, and the trace of the decoder.

        Args:
          tokens_BT: token ids, one text a row.
          segment_ids_BT: 1 for tokens and 0 for padding. ``None`` means that there is no padding.
          key: PRNG key for dropout. ``None`` switches dropout off.
          intervene: ``intervene(site, layer, value) -> value``.

        Returns:
          Scores, float32 ``[B]``, and the trace.
        """
        out = self.trunk(tokens_BT, segment_ids_BT=segment_ids_BT, key=key, intervene=intervene)
        if segment_ids_BT is None:
            return self.head(out.hidden[:, -1]), cast(Trace, out.trace)
        indices_BT = jnp.where(segment_ids_BT != 0, jnp.arange(tokens_BT.shape[1]), 0)
        last_BD = jnp.take_along_axis(out.hidden, indices_BT.max(1)[:, None, None], axis=1)[:, 0]
        return self.head(last_BD), cast(Trace, out.trace)

    def rewards(self, tokens_BT: Int[Array, "B T"], *,
                segment_ids_BT: Shaped[Array, "B T"] | None = None) -> Float[Array, " B"]:
        """Computes normalized scores: their mean is 0 and their standard deviation 1 over the
        reference set.

        Args:
          tokens_BT: token ids, one text a row.
          segment_ids_BT: 1 for tokens and 0 for padding. ``None`` means that there is no padding.

        Returns:
          Rewards, float32 ``[B]``.
        """
        return (self(tokens_BT, segment_ids_BT=segment_ids_BT) - self.mean[...]) / self.std[...]

    def stacks(self) -> dict[str, Stack]:
        """Returns the decoder's stack of layers for each kind of attention.

        Returns:
          A dictionary from the kind of attention, here only ``"self"``, to its stack.
        """
        return self.trunk.stacks()

    def start_cache(self, batch_size: int, capacity: int, *, keeps_all: bool = False) -> KVCache:
        """Creates an empty cache for the decoder.

        Args:
          batch_size: the number of rows B.
          capacity: the number of tokens that each row has room for.
          keeps_all: see ``transformer_jax.Decoder.start_cache``.

        Returns:
          The cache.
        """
        return self.trunk.start_cache(batch_size, capacity, keeps_all=keeps_all)

    def step(self, tokens_BT: Int[Array, "B T"], cache: KVCache, **options: Any) -> Output:
        """Runs the decoder on the tokens that follow those in the cache.

        Args:
          tokens_BT: token ids.
          cache: keys and values of the tokens before these.
          **options: further arguments of a call of the decoder.

        Returns:
          The decoder's output. Pass its hidden states to ``head`` to get scores.
        """
        return self.trunk.step(tokens_BT, cache, **options)

    def unembed(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """Raises an error, because a reward model has no logits.

        Args:
          hidden_BTD: hidden states; not used.

        Returns:
          Never; the method always raises.

        Raises:
          ValueError: always.
        """
        del hidden_BTD
        raise ValueError("a reward model has no logits, because it predicts one number; use its decoder, model.trunk")

    def for_decoding(self) -> RewardModel:
        """Raises an error, because a reward model does not generate text.

        Returns:
          Never; the method always raises.

        Raises:
          ValueError: always.
        """
        raise ValueError("a reward model scores texts and cannot generate them; use its decoder, model.trunk")
