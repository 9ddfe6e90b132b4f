"""Settings of the head of a model that classifies texts or tokens."""

from __future__ import annotations

import dataclasses
from typing import Self

from transformer_jax.config.ranges import check_fields
from transformer_jax.settings import check_choice, require

# The families of classifiers: the model that reads the text, and what gets a label.
CLASSIFIERS = ("encoder_classifier", "decoder_classifier", "encoder_token_classifier", "decoder_token_classifier")


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """The head of a classifier. Models of other families have none.

    Attributes:
      labels: The names of the classes, in the order of the logits. A training run takes them from
        its data.
      pooling: The hidden state that stands for a text: that of its ``first`` or ``last`` token, or
        the ``mean`` over all tokens. ``None`` means ``first`` for an encoder, and ``last`` for a
        decoder. For a classifier of tokens it must be ``None``.
      activation: The activation of a hidden layer between the pooled state and the logits: ``tanh``
        (as in BERT), ``gelu``, ``gelu_tanh``, ``relu``, ``silu``, or ``none`` for no such layer.
        ``None`` means ``tanh`` for an encoder that classifies texts, and ``none`` otherwise.
      use_norm: Whether a norm follows this activation. The hidden layer is then the one that an
        encoder has before it predicts tokens, as in ModernBERT: it has biases only if the model has.
      dropout: The dropout rate before the logits. ``None`` means the dropout rate of the model.
    """

    labels: tuple[str, ...] = ()
    pooling: str | None = None
    activation: str | None = None
    use_norm: bool = False
    dropout: float | None = None

    def __post_init__(self):
        check_fields(self)
        object.__setattr__(self, "labels", tuple(self.labels))
        if self.pooling is not None:
            check_choice(self, "pooling", ("first", "last", "mean"))
        if self.activation is not None:
            check_choice(self, "activation", ("none", "tanh", "gelu", "gelu_tanh", "relu", "silu"))
        require(all(isinstance(label, str) and label for label in self.labels),
                f"classifier.labels={self.labels!r} must be names that are not empty")
        require(len(set(self.labels)) == len(self.labels), f"classifier.labels={self.labels!r} has a name twice")

    def of_family(self, family: str) -> Self:
        """Checks that a model of a family can have this head, and fills in the defaults.

        Args:
          family: The family of the model.

        Returns:
          The complete settings. For a model without such a head these settings unchanged.

        Raises:
          ValueError: If the labels are missing, or the pooling is for another family.
        """
        if family not in CLASSIFIERS:
            require(not self.labels, f"classifier.labels={self.labels!r} is for the families {', '.join(CLASSIFIERS)}, "
                    f"not {family!r}")
            return self
        require(bool(self.labels), f"family={family!r} needs classifier.labels, the names of its classes")
        is_encoder, of_tokens = family.startswith("encoder"), "token" in family
        require(not of_tokens or self.pooling is None,
                f"classifier.pooling={self.pooling!r} is for classifiers of texts, not {family!r}")
        pooling = None if of_tokens else self.pooling or ("first" if is_encoder else "last")
        activation = self.activation or ("tanh" if is_encoder and not of_tokens else "none")
        require(not self.use_norm or activation != "none",
                "classifier.use_norm=True needs a hidden layer; set classifier.activation, for example to gelu")
        return dataclasses.replace(self, pooling=pooling, activation=activation)
