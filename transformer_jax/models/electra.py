"""ELECTRA: a small encoder that restores masked tokens, and an encoder that finds its mistakes."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Int

from transformer_jax.config.electra import ElectraConfig
from transformer_jax.models.classifier import Classifier
from transformer_jax.models.encoder import Encoder
from transformer_jax.models.inputs import check_config
from transformer_jax.models.output import Output
from transformer_jax.nn.embeddings import Embeddings
from transformer_jax.nn.printing import Printed
from transformer_jax.nn.stack import Stack

# The parts of the embeddings that the two models share. Each has its own linear map after them.
_SHARED = ("token", "position", "token_type", "norm")


class Electra(Printed, nnx.Module):
    """The two models of ELECTRA, which share their embeddings.

    Source: Clark et al. (2020). A call runs the discriminator.

    Attributes:
      generator: the encoder that predicts masked tokens; it holds the shared embeddings.
      body: the discriminator without the embeddings that it shares; ``discriminator`` completes it.
      reads_sources: False: the model takes one text, see ``transformer_jax.Decoder``.
      predicts_next: False: the model finds replaced tokens and cannot generate.
    """

    reads_sources = False
    predicts_next = False

    def __init__(self, config: ElectraConfig, *, key: jax.Array):
        """Creates a model with random weights.

        Args:
          config: the shape of the model; ``vocab_size`` must be set.
          key: PRNG key, such as ``jax.random.key(0)``.

        Raises:
          ValueError: if the config is for another family or has no ``vocab_size``.
        """
        check_config(config, "electra", key)
        generator_key, discriminator_key = jax.random.split(key)
        self.config = config
        self.generator = Encoder(config.generator, key=generator_key)
        self.body = Classifier(config.discriminator, key=discriminator_key)
        self._share(self.body.trunk.embeddings, None)

    def __call__(self, tokens_BT: Int[Array, "B T"], **options: Any) -> Output:
        """Computes for each token how probable it is that it was replaced.

        Args:
          tokens_BT: token ids, one text a row.
          **options: further arguments of a call of ``transformer_jax.Classifier``.

        Returns:
          The output of the discriminator. ``logits`` is float32 ``[B, T, 1]``: the log odds that a
          token was replaced.

        Raises:
          ValueError: if the tokens are not integers ``[B, T]``, or if there are more than
            ``config.max_len``.
        """
        return self.discriminator(tokens_BT, **options)

    @property
    def discriminator(self) -> Classifier:
        """The discriminator with the shared embeddings, as a classifier of tokens. It can be
        exported, and its trunk is the encoder to fine-tune."""
        discriminator = jax.tree.map(lambda leaf: leaf, self.body)
        self._share(discriminator.trunk.embeddings, self.generator.embeddings)
        return discriminator

    @staticmethod
    def _share(embeddings: Embeddings, source: Embeddings | None) -> None:
        """Replaces the shared parts of embeddings by those of ``source``, or by nothing."""
        for name in _SHARED:
            setattr(embeddings, name, None if source is None else getattr(source, name))

    def stacks(self) -> dict[str, Stack]:
        """Returns the discriminator's stack of layers for each kind of attention.

        Returns:
          A dictionary from the kind of attention, here only ``"self"``, to its stack.
        """
        return self.body.stacks()
