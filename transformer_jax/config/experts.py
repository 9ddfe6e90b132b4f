"""The settings of a mixture of experts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from transformer_jax.config.choices import GATED
from transformer_jax.config.ranges import check_fields
from transformer_jax.settings import check_choice, require

if TYPE_CHECKING:
    from transformer_jax.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """A mixture of experts, which takes the place of the feed-forward layer.

    All layers have experts, except for the first ``dense_layers`` and those whose
    ``LayerKind.use_experts`` is false.

    A linear map, the router, gives each expert a probability for each token. The experts with the
    highest probabilities process the token, and their outputs are added with these probabilities as
    weights (Shazeer et al., 2017). Every token reaches all of its experts: none is dropped. Experts
    have the activation of the model, and biases if its feed-forward layers have them.

    Attributes:
      num_experts: Number of experts that tokens are routed to.
      experts_per_token: Number of experts that process each token.
      mlp_dim: Width of an expert. ``None``: ``mlp_dim`` of the model.
      shared_experts: Number of further experts that process every token, as in DeepSeek. They are
        stored as one feed-forward layer of their joint width.
      scores: How the router's logits become probabilities: ``softmax`` over all experts, or
        ``sigmoid`` of each (DeepSeek-V3).
      normalize_weights: Whether the weights of the chosen experts are divided by their sum. With
        ``softmax`` this is equal to a softmax over the chosen experts alone.
      weight_scale: A factor of the weights of the chosen experts.
      use_choice_bias: Whether a bias for each expert is added to the probabilities while the
        experts are chosen, but not to their weights (DeepSeek-V3). Gradients do not change it.
      groups: Number of groups of equal size that the experts are divided into (DeepSeek-V3).
      groups_per_token: Number of groups from which the experts of a token are chosen.
      experts_per_group_score: The score of a group is the sum of so many of its highest
        probabilities, with the bias added: 2 in DeepSeek-V3, 1 in DeepSeek-V2.
      dense_layers: Number of first layers whose feed-forward layer is dense, with the ``mlp_dim``
        of the model (DeepSeek).
      balance_loss: Weight of the loss that balances the load of the experts (Fedus et al., 2021).
      z_loss: Weight of the loss that keeps the router's logits small (Zoph et al., 2022).
    """

    num_experts: int = 8
    experts_per_token: int = 2
    mlp_dim: int | None = None
    shared_experts: int = 0
    scores: str = "softmax"
    normalize_weights: bool = True
    weight_scale: float = 1.0
    use_choice_bias: bool = False
    groups: int = 1
    groups_per_token: int = 1
    experts_per_group_score: int = 2
    dense_layers: int = 0
    balance_loss: float = 0.01
    z_loss: float = 0.001

    def __post_init__(self):
        check_fields(self)
        check_choice(self, "scores", ("softmax", "sigmoid"))
        require(self.groups_per_token <= self.groups and self.num_experts % self.groups == 0,
                f"moe.groups={self.groups} must divide moe.num_experts={self.num_experts}, and be at least "
                f"moe.groups_per_token={self.groups_per_token}")
        require(self.groups == 1 or self.num_experts // self.groups >= self.experts_per_group_score,
                f"moe.groups={self.groups} leaves {self.num_experts // self.groups} experts in each group, but "
                f"moe.experts_per_group_score={self.experts_per_group_score} of them give its score; use fewer groups")
        available = self.num_experts // self.groups * self.groups_per_token
        require(self.experts_per_token <= available,
                f"moe.experts_per_token={self.experts_per_token} is more than the {available} experts that a token can "
                "choose from")

    def check(self, config: ModelConfig) -> None:
        """Checks that a model can have this mixture.

        Args:
          config: The config of the model.

        Raises:
          ValueError: If experts cannot be combined with another setting of the model.
        """
        require(config.family in ("decoder", "reward"),
                f"moe is for family='decoder' and 'reward', not {config.family!r}, whose losses do not balance experts")
        patterned = not all(kind.use_experts for kind in config.layer_pattern)
        require(not (patterned and self.dense_layers),
                f"moe.dense_layers={self.dense_layers} and a LayerKind with use_experts=False both say which layers "
                "are dense; use one of them")
        require(len(self.layers(config)) > 0,
                f"no layer has experts: moe.dense_layers={self.dense_layers} must be below num_layers="
                f"{config.num_layers}, and the layer_pattern must have a kind with use_experts=True")

    def layers(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the layers that have experts.

        Args:
          config: The config of the model.

        Returns:
          Their indices, in ascending order.
        """
        pattern = config.layer_pattern
        return tuple(layer for layer in range(self.dense_layers, config.num_layers)
                     if not pattern or pattern[layer % len(pattern)].use_experts)

    def width(self, config: ModelConfig) -> int:
        """Returns the width of an expert.

        Args:
          config: The config of the model.

        Returns:
          The number of its neurons.
        """
        return config.mlp_dim if self.mlp_dim is None else self.mlp_dim

    @staticmethod
    def has_bias(config: ModelConfig) -> bool:
        """Finds out whether the router and the experts of a model have biases.

        Args:
          config: The config of the model.

        Returns:
          True if its feed-forward layers have biases.
        """
        return config.use_bias if config.use_mlp_bias is None else config.use_mlp_bias

    def num_idle(self, config: ModelConfig) -> int:
        """Counts the parameters of a model that do not process a token.

        Args:
          config: The config of the model.

        Returns:
          The number of parameters in the experts that a token does not choose, in all layers that
          have experts.
        """
        D, F, idle = config.model_dim, self.width(config), self.num_experts - self.experts_per_token
        maps_to_neurons = 2 if config.activation in GATED else 1
        biases = maps_to_neurons * F + D if self.has_bias(config) else 0
        return len(self.layers(config)) * idle * ((maps_to_neurons + 1) * D * F + biases)
