"""The settings that keep the best learning rate when the width and the depth of a model change."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from transformer_jax.config.ranges import check_fields
from transformer_jax.settings import require

if TYPE_CHECKING:
    from transformer_jax.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class MupConfig:
    """The maximal update parametrization (muP, Yang et al., 2022): one learning rate for all widths.

    A model of the base width is trained as it is without these settings. For a model that is m times
    as wide, the initial weights of the hidden matrices are divided by sqrt(m), their updates and the
    logits by m, and the attention scores are scaled with 1 / head_dim in place of 1 /
    sqrt(head_dim). A change of the weights then changes every activation by an amount that does not
    depend on the width, so that ``optim.peak_lr`` and ``init_std`` that are best at the base width
    are best at all widths.

    With ``base_layers``, the same holds for the depth (CompleteP, Dey et al., 2025): for l times as
    many layers, what each layer adds to the residual stream is divided by l.

    Attributes:
      base_dim: The ``model_dim`` at which the learning rate was chosen. ``mlp_dim`` and the product
        of ``num_heads`` and ``head_dim`` must grow with ``model_dim``.
      base_head_dim: The ``head_dim`` at that width. ``None``: that of this model, for models that
        grow in their number of heads.
      base_layers: The number of layers at which the learning rate was chosen. ``None``: the depth
        changes nothing.
    """

    base_dim: int = 64
    base_head_dim: int | None = None
    base_layers: int | None = None

    def __post_init__(self):
        check_fields(self)

    def check(self, config: ModelConfig) -> None:
        """Checks that a model can have these settings.

        Args:
          config: The config of the model.

        Raises:
          ValueError: If the model has a part whose learning rate is not defined.
        """
        require(config.family == "decoder" and config.moe is None and config.latent is None,
                "mup is for family='decoder' without experts and latent attention, not "
                f"family={config.family!r}, moe={config.moe}, latent={config.latent}")
        require(config.norm_position == "pre" and config.init_std is not None and config.attention_scale is None,
                f"mup needs norm_position='pre', a number as init_std and attention_scale=None, not norm_position="
                f"{config.norm_position!r}, init_std={config.init_std}, attention_scale={config.attention_scale}")
        require(not config.scale_embeddings and not config.scale_logits,
                "mup scales the logits itself; leave scale_embeddings and scale_logits out")

    def width(self, config: ModelConfig) -> float:
        """Computes how many times as wide a model is as the base.

        Args:
          config: The config of the model.

        Returns:
          The ratio m.
        """
        return config.model_dim / self.base_dim

    def output_scale(self, config: ModelConfig) -> float:
        """Computes the part of the factors of a matrix that comes from the depth.

        Args:
          config: The config of the model.

        Returns:
          The factor of the initial weights, and of the updates, of the matrices that write into the
          residual stream.
        """
        return 1.0 if self.base_layers is None else self.base_layers / config.num_layers

    def attention_scale(self, config: ModelConfig) -> float:
        """Computes the factor of the attention scores.

        Args:
          config: The config of the model.

        Returns:
          The factor; 1 / sqrt(head_dim) at the base width.
        """
        base = config.head_dim if self.base_head_dim is None else self.base_head_dim
        return math.sqrt(base) / config.head_dim

    def rate(self, config: ModelConfig, axes: tuple[str | None, ...]) -> float:
        """Computes the factor of the updates of a parameter of a linear map.

        Args:
          config: The config of the model.
          axes: The logical names of the axes of the parameter: two for a kernel, one for a bias.

        Returns:
          The factor of its learning rate; weight decay does not have it.
        """
        rate = 1.0 / self.width(config) if len(axes) == 2 else 1.0
        return rate * self.output_scale(config) if axes[-1] == "embed" else rate
