"""Classifiers of texts and of tokens: an encoder or a decoder with a head that outputs the logits of
labels."""

from __future__ import annotations

from typing import Any, Self, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from transformer_jax.config import ClassifierConfig, ModelConfig
from transformer_jax.config.classifier import CLASSIFIERS
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.encoder import Encoder
from transformer_jax.models.inputs import check_config
from transformer_jax.models.output import Output
from transformer_jax.nn.layers import Linear, Norm, dropout
from transformer_jax.nn.mlp import ACTIVATIONS
from transformer_jax.nn.printing import Printed
from transformer_jax.nn.sites import Intervene
from transformer_jax.nn.stack import Stack

_ACTIVATIONS = ACTIVATIONS | {"tanh": jnp.tanh}


class ClassificationHead(nnx.Module):
    """The logits of labels: an optional hidden layer with an activation and perhaps a norm, and a
    linear map.

    The linear map has no bias if it classifies texts on a decoder, as in transformers.
    """

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        hidden_key, output_key = jax.random.split(key)
        head, D = config.classifier, config.model_dim
        self.activation = head.activation
        self.rate = config.dropout if head.dropout is None else head.dropout
        self.hidden = None if head.activation == "none" else Linear(D, D, ("embed", None), config, key=hidden_key,
                                                                    has_bias=None if head.use_norm else True)
        self.norm = Norm(D, config) if head.use_norm else None
        self.output = Linear(D, len(head.labels), ("embed", None), config, key=output_key,
                             has_bias=config.family != "decoder_classifier")

    def __call__(self, hidden: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Applies the head to hidden states ``[..., D]`` and returns logits, float32
        ``[..., labels]``. A key switches dropout on."""
        if self.hidden is not None:
            hidden = _ACTIVATIONS[cast(str, self.activation)](self.hidden(hidden))
        if self.norm is not None:
            hidden = self.norm(hidden)
        return self.output(dropout(hidden, self.rate, key)).astype(jnp.float32)


class Classifier(Printed, nnx.Module):
    """An encoder or a decoder with a classification head, which gives a label to each text or to
    each token.

    Source: Devlin et al. (2019), section 4; Radford et al. (2018), section 3.2.

    Attributes:
      trunk: the encoder, which has no head of its own, or the decoder. Pass it to functions that
        look inside a model.
      reads_sources: False: the model takes one text, see ``transformer_jax.Decoder``.
      predicts_next: False: the model classifies texts and cannot generate.
    """

    reads_sources = False
    predicts_next = False

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        """Creates a model with random weights; ``Classifier.of`` starts from a trained model
        instead.

        Args:
          config: the shape of the model; ``family`` must be a family of classifiers, and
            ``vocab_size`` must be set.
          key: PRNG key, such as ``jax.random.key(0)``.

        Raises:
          ValueError: if the config is for another family or has no ``vocab_size``.
        """
        family = getattr(config, "family", None)
        check_config(config, family if family in CLASSIFIERS else CLASSIFIERS[0], key)
        trunk_key, head_key = jax.random.split(key)
        self.config = config
        inner = config.replace(family=config.family.partition("_")[0], classifier=ClassifierConfig(),
                               tie_embeddings=True, use_output_bias=False)
        self.trunk: Encoder | Decoder = (Encoder(inner, key=trunk_key, has_head=False) if inner.family == "encoder"
                                         else Decoder(inner, key=trunk_key))
        self.head = ClassificationHead(config, key=head_key)

    @classmethod
    def of(cls, trained: Encoder | Decoder, classifier: ClassifierConfig, *, of_tokens: bool = False,
           key: jax.Array) -> Self:
        """Creates a classifier from a trained encoder or decoder and a new head.

        Args:
          trained: the trained model. Its own prediction head, and an unembedding that is not its
            token embeddings, are left out.
          classifier: the labels and the settings of the head.
          of_tokens: True to classify each token instead of each text.
          key: PRNG key for the weights of the head.

        Returns:
          The classifier; its trunk shares the arrays of the trained model.
        """
        family = f"{trained.config.family}_{'token_' * of_tokens}classifier"
        model = cls(trained.config.replace(family=family, classifier=classifier, tie_embeddings=True,
                                           use_output_bias=False, use_value_head=False), key=key)
        for name in ("embeddings", "stack", "final_norm"):
            setattr(model.trunk, name, jax.tree.map(lambda x: x, getattr(trained, name)))
        model.trunk.embeddings.output = model.trunk.embeddings.output_bias = None
        return model

    def __call__(self, tokens_BT: Int[Array, "B T"] | None = None, *,
                 segment_ids_BT: Shaped[Array, "B T"] | None = None, token_types_BT: Int[Array, "#B T"] | None = None,
                 positions_BT: Int[Array, "#B T"] | None = None, key: jax.Array | None = None,
                 intervene: Intervene | None = None, embeddings_BTD: Float[Array, "B T D"] | None = None) -> Output:
        """Returns the logits of the labels.

        Args:
          tokens_BT: token ids, one text a row.
          segment_ids_BT: 1 for tokens and 0 for padding, which may be on either side. ``None``
            means that there is no padding.
          token_types_BT: the type of each token, for an encoder with token types.
          positions_BT: positions to use instead of those counted from the first token.
          key: PRNG key for dropout. ``None`` switches dropout off.
          intervene: ``intervene(site, layer, value) -> value``, see
            ``transformer_jax.Decoder.__call__``. With it you can find out what a label depends on.
          embeddings_BTD: embeddings to use in place of token ids, see
            ``transformer_jax.Decoder.__call__``.

        Returns:
          The output. ``logits`` is float32 ``[B, labels]``, or ``[B, T, labels]`` for a classifier
          of tokens; ``hidden`` and ``trace`` are those of the trunk.

        Raises:
          ValueError: if the tokens are not integers ``[B, T]``, or if there are more than
            ``config.max_len``.
        """
        trunk_key, head_key = (None, None) if key is None else jax.random.split(key)
        types: dict[str, Any] = {} if token_types_BT is None else {"token_types_BT": token_types_BT}
        out = self.trunk(tokens_BT, segment_ids_BT=segment_ids_BT, positions_BT=positions_BT, key=trunk_key,
                         intervene=intervene, embeddings_BTD=embeddings_BTD, **types)
        logits = self.head(self.pooled(out.hidden, segment_ids_BT), head_key)
        return Output(logits=logits, hidden=out.hidden, trace=out.trace, cache=None)

    def pooled(self, hidden_BTD: Float[Array, "B T D"],
               segment_ids_BT: Shaped[Array, "B T"] | None = None) -> Float[Array, "B *T D"]:
        """Selects or averages the hidden states that the head reads.

        Args:
          hidden_BTD: the hidden states of the trunk.
          segment_ids_BT: 1 for tokens and 0 for padding. ``None`` means that there is no padding.

        Returns:
          ``[B, D]``, or ``[B, T, D]`` for a classifier of tokens.
        """
        pooling = self.config.classifier.pooling
        return hidden_BTD if pooling is None else pool(hidden_BTD, pooling, segment_ids_BT)

    def stacks(self) -> dict[str, Stack]:
        """Returns the trunk's stack of layers for each kind of attention.

        Returns:
          A dictionary from the kind of attention, here only ``"self"``, to its stack.
        """
        return self.trunk.stacks()


def pool(hidden_BTD: Float[Array, "B T D"], pooling: str,
         segment_ids_BT: Shaped[Array, "B T"] | None = None) -> Float[Array, "B D"]:
    """Makes one vector of the hidden states of each row.

    Args:
      hidden_BTD: hidden states.
      pooling: ``"first"`` or ``"last"`` for the hidden state of one token, or ``"mean"``.
      segment_ids_BT: 1 for tokens and 0 for padding, which may be on either side. ``None`` means
        that there is no padding.

    Returns:
      ``[B, D]``. The mean is computed in float32.
    """
    B, T, _ = hidden_BTD.shape
    is_token_BT = jnp.ones((B, T), bool) if segment_ids_BT is None else segment_ids_BT != 0
    if pooling == "mean":
        weights_BT = is_token_BT / jnp.maximum(is_token_BT.sum(1, keepdims=True), 1)
        return jnp.einsum("BT,BTD->BD", weights_BT, hidden_BTD.astype(jnp.float32)).astype(hidden_BTD.dtype)
    index_B = is_token_BT.argmax(1) if pooling == "first" else T - 1 - is_token_BT[:, ::-1].argmax(1)
    return jnp.take_along_axis(hidden_BTD, index_B[:, None, None], axis=1)[:, 0]
