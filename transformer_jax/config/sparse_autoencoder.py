"""The settings of sparse autoencoders and transcoders, and of all models of features."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from transformer_jax.config.families import ModelSettings
from transformer_jax.config.ranges import check_fields
from transformer_jax.settings import check_choice, require

ACTIVATIONS = ("relu", "topk", "batch_topk", "jumprelu", "gated")


@dataclasses.dataclass(frozen=True)
class FeatureSettings(ModelSettings):
    """The settings that sparse autoencoders, transcoders and cross-layer transcoders share.

    Attributes:
      vocab_size: 1, because the model reads activations and no tokens.
      max_len: 1, because each activation is read by itself.
      input_dim: The number of values of the activation to read.
      output_dim: The number of values of the activation to compute. ``None`` means ``input_dim``.
      num_features: The number of features.
      activation: ``relu`` with an L1 penalty (Bricken et al., 2023), ``topk`` (Gao et al., 2024),
        ``batch_topk`` (Bussmann et al., 2024), ``jumprelu`` with an L0 penalty or ``gated`` with an
        L1 penalty (Rajamanoharan et al., 2024).
      k: The number of active features of each token, for ``topk``; on average, for
        ``batch_topk``.
      sparsity: The weight of the penalty of ``relu``, ``jumprelu`` and ``gated``, beside the squared
        error summed over the values of the activation.
      bandwidth: The width of the window in which the threshold of ``jumprelu`` gets a gradient.
      first_threshold: The threshold of ``jumprelu`` before training.
      dead_after: A feature is dead if it was not active for this number of tokens.
      revival: The weight of the auxiliary loss, in which dead features learn to explain the error
        (Gao et al., 2024, appendix A.2). 0 only counts dead features.
    """

    vocab_size: int | None = 1
    max_len: int = 1
    num_layers: int = 1
    input_dim: int = 768
    output_dim: int | None = None
    num_features: int = 8192
    activation: str = "topk"
    k: int = 32
    sparsity: float = 1.0
    bandwidth: float = 0.05
    first_threshold: float = 0.01
    dead_after: int = 1_000_000
    revival: float = 1 / 32

    def __post_init__(self):
        check_fields(self)
        check_choice(self, "activation", ACTIVATIONS)
        require("topk" not in self.activation or self.k <= self.num_features,
                f"k={self.k} is more than num_features={self.num_features}")

    @property
    def out_dim(self) -> int:
        """The number of values of the activation to compute."""
        return self.input_dim if self.output_dim is None else self.output_dim


@dataclasses.dataclass(frozen=True)
class SparseAutoencoderConfig(FeatureSettings):
    """The settings of a sparse autoencoder, which writes an activation as a sum of few features, or
    of a transcoder, which computes the output of a feed-forward layer from its input.

    The settings of ``FeatureSettings`` belong to it too.

    Attributes:
      family: ``sparse_autoencoder``.
      num_layers: 1.
      site: The name of the activation to read, such as ``"layers.3.mlp_output"``.
      target: The name of the activation to compute. ``None`` means ``site``; with another name the
        model is a transcoder.
      scale: A power of two, by which activations are multiplied before they are read, so that their
        length is about the root of ``input_dim``. ``tj.features.fit_config`` chooses it.
      target_scale: The same for the activation to compute. ``None`` means ``scale``.
      subtract_bias: Whether the bias of the decoder is subtracted from the activation that is
        read; only for autoencoders.
    """

    family: str = "sparse_autoencoder"
    site: str = ""
    target: str | None = None
    scale: float = 1.0
    target_scale: float | None = None
    subtract_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "family", ("sparse_autoencoder",))
        check_powers_of_two("scale", [self.scale])
        check_powers_of_two("target_scale", [self.out_scale])
        require(self.is_transcoder or self.out_scale == self.scale,
                f"target_scale={self.target_scale} is only for transcoders; leave it out")
        require(not (self.subtract_bias and self.is_transcoder), "subtract_bias=True is only for autoencoders, whose "
                "input and output are the same activation; set subtract_bias=False for a transcoder")

    @property
    def is_transcoder(self) -> bool:
        """True if the model computes another activation than the one that it reads."""
        return self.target not in (None, self.site) or self.out_dim != self.input_dim

    @property
    def out_scale(self) -> float:
        """The factor of the activation to compute."""
        return self.scale if self.target_scale is None else self.target_scale

    @property
    def targets(self) -> str:
        """The name of the activation to compute."""
        return self.site if self.target is None else self.target

    @property
    def inputs(self) -> dict[str, int]:
        """The name of the activation to read, with its number of values."""
        return {self.site: self.input_dim}

    @property
    def outputs(self) -> dict[str, int]:
        """The name of the activation to compute, with its number of values."""
        return {self.targets: self.out_dim}


def check_powers_of_two(name: str, values: Sequence[float]) -> None:
    """Checks factors by which activations are multiplied, so that nothing is rounded.

    Args:
      name: The name of the setting.
      values: The factors.

    Raises:
      ValueError: If one of them is not a power of two.
    """
    for value in values:
        require(math.frexp(value)[0] == 0.5, f"{name}={value} is not a power of two, such as 0.25 or 4")
