"""The settings of cross-layer transcoders."""

from __future__ import annotations

import dataclasses

from transformer_jax.config.sparse_autoencoder import FeatureSettings, check_powers_of_two
from transformer_jax.settings import check_choice, require


@dataclasses.dataclass(frozen=True)
class CrossLayerTranscoderConfig(FeatureSettings):
    """The settings of a cross-layer transcoder: a feature of layer l reads the input of the
    feed-forward layer l, and writes to the outputs of the feed-forward layers l to L - 1.

    The settings of ``FeatureSettings`` belong to it too; ``num_features`` and ``k`` are those of
    each layer.

    Source: Ameisen et al. (2025), "Circuit Tracing".

    Attributes:
      family: ``cross_layer_transcoder``.
      num_layers: The number of layers of the language model.
      site: The site to read in every layer, without the number of the layer.
      target: The site to compute in every layer.
      scales: For each layer a power of two, by which the activation that is read is multiplied.
        ``()`` means 1 for all. ``tj.features.fit_cross_layer_config`` chooses them.
      target_scales: The same for the activations to compute, so that every layer counts alike.
    """

    family: str = "cross_layer_transcoder"
    num_layers: int = 12
    site: str = "mlp_input"
    target: str = "mlp_output"
    scales: tuple[float, ...] = ()
    target_scales: tuple[float, ...] = ()

    # It computes other activations than it reads.
    is_transcoder = True

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "family", ("cross_layer_transcoder",))
        require(self.activation != "gated", "activation='gated' is not available for a cross-layer transcoder; choose "
                "relu, topk, batch_topk or jumprelu")
        for name in ("scales", "target_scales"):
            values = tuple(map(float, getattr(self, name)))
            object.__setattr__(self, name, values)
            require(len(values) in (0, self.num_layers), f"{name} has {len(values)} numbers; expected one for each of "
                    f"the {self.num_layers} layers, or none")
            check_powers_of_two(name, values)

    @property
    def inputs(self) -> dict[str, int]:
        """The names of the activations to read, layer by layer, with their numbers of values."""
        return {f"layers.{layer}.{self.site}": self.input_dim for layer in range(self.num_layers)}

    @property
    def outputs(self) -> dict[str, int]:
        """The names of the activations to compute, layer by layer, with their numbers of values."""
        return {f"layers.{layer}.{self.target}": self.out_dim for layer in range(self.num_layers)}
