"""The settings of the two encoders of ELECTRA."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from transformer_jax.config.classifier import ClassifierConfig
from transformer_jax.config.model import ModelConfig
from transformer_jax.settings import require

REPLACED = "replaced"


@dataclasses.dataclass(frozen=True)
class ElectraConfig(ModelConfig):
    """The shape of ELECTRA (Clark et al., 2020): a generator that restores masked tokens, and a
    discriminator that finds the tokens that the generator restored wrongly.

    The settings of ``ModelConfig`` describe the discriminator. The generator has the same settings,
    but narrower layers. The two share their embeddings.

    Attributes:
      family: ``electra``.
      generator_width: The width of the layers of the generator, as a fraction of the width of the
        layers of the discriminator: of ``model_dim``, ``mlp_dim`` and ``num_heads``. The paper
        recommends 1/4 to 1/2.
      discriminator_weight: The weight of the loss of the discriminator, beside that of the
        generator.
    """

    family: str = "electra"
    generator_width: float = 0.25
    discriminator_weight: float = 50.0

    def __post_init__(self):
        super().__post_init__()
        require(self.family == "electra", f"family={self.family!r} needs a ModelConfig, not an ElectraConfig")
        require(self.tie_embeddings, "tie_embeddings=False is not for ELECTRA, whose generator predicts tokens with "
                "the embeddings that both models share")
        for field in ("model_dim", "mlp_dim", "num_heads", "num_kv_heads"):
            size = getattr(self, field) * self.generator_width
            require(size >= 1 and math.isclose(size, round(size)),
                    f"generator_width={self.generator_width} of {field}={getattr(self, field)} is {size:g}; expected a "
                    "whole number")

    @property
    def discriminator(self) -> ModelConfig:
        """The config of the discriminator, which classifies each token."""
        return self._encoder(family="encoder_token_classifier",
                             classifier=ClassifierConfig((REPLACED,), activation="gelu"))

    @property
    def generator(self) -> ModelConfig:
        """The config of the generator, which predicts masked tokens."""
        sizes = {field: round(getattr(self, field) * self.generator_width)
                 for field in ("model_dim", "mlp_dim", "num_heads", "num_kv_heads")}
        return self._encoder(family="encoder", **sizes)

    def _encoder(self, **changes: Any) -> ModelConfig:
        """Returns the config of one of the two encoders."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(ModelConfig)}
        return ModelConfig(**fields | changes)
