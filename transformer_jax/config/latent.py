"""The settings of multi-head latent attention."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, cast

from transformer_jax.config.ranges import check_fields
from transformer_jax.settings import require

if TYPE_CHECKING:
    from transformer_jax.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, DeepSeek-AI, 2024).

    The keys and values of all heads are linear maps of one short vector for each token, the latent.
    The last ``rope_layout.dim`` channels of each head are rotated, and all heads share these
    channels of the key. A cache stores only the latent and the shared channels.

    Attributes:
      dim: Width of the latent of keys and values.
      query_dim: Width of the latent from which queries are computed. ``None``: queries are computed
        from the input of the layer.
      value_dim: Width of the values of a head. ``None``: that of the channels of a head that are
        not rotated.
      norm_epsilon: The value that the norms of the latents add to the variance.
    """

    dim: int = 512
    query_dim: int | None = None
    value_dim: int | None = None
    norm_epsilon: float = 1e-6

    def __post_init__(self):
        check_fields(self)

    def check(self, config: ModelConfig) -> None:
        """Checks that a model can have latent attention.

        Args:
          config: The config of the model.

        Raises:
          ValueError: If it cannot be combined with another setting of the model.
        """
        require(config.family in ("decoder", "reward"),
                f"latent is for family='decoder' and 'reward', not {config.family!r}")
        require(config.positions == "rope" and config.rope_layout.dim is not None,
                "latent needs positions='rope' and the width of the rotated key that all heads share, rope_layout.dim; "
                f"got positions={config.positions!r} and rope_layout.dim={config.rope_layout.dim}")
        require(all(kind.use_rope for kind in config.layer_pattern),
                "latent needs rotary positions in every layer; the layer_pattern has a LayerKind with use_rope=False")
        require(config.num_kv_heads == config.num_heads,
                f"latent gives every head its own keys: num_kv_heads={config.num_kv_heads} must be num_heads="
                f"{config.num_heads}")
        require(not config.use_qk_norm and config.limits.projections is None,
                "latent cannot be combined with use_qk_norm or limits.projections")

    def value_width(self, config: ModelConfig) -> int:
        """Returns the width of the values of a head.

        Args:
          config: The config of the model.

        Returns:
          The number of channels.
        """
        return self.plain_width(config) if self.value_dim is None else self.value_dim

    def plain_width(self, config: ModelConfig) -> int:
        """Returns the width of the part of a head's queries and keys that is not rotated.

        Args:
          config: The config of the model.

        Returns:
          The number of channels.
        """
        return cast(int, config.head_dim) - cast(int, config.rope_layout.dim)

    def cached_width(self, config: ModelConfig) -> int:
        """Returns the number of values that a cache stores for each token in a layer.

        Args:
          config: The config of the model.

        Returns:
          The width of the latent and of the rotated key that all heads share.
        """
        return self.dim + cast(int, config.rope_layout.dim)
