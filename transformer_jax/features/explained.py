"""The feed-forward layers of a text, as features and what the features do not explain."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.features import cross_layer
from transformer_jax.features.autoencoder import SparseAutoencoder
from transformer_jax.features.cross_layer import CrossLayerTranscoder
from transformer_jax.features.splicing import in_own_units, site_and_layer
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.output import Trace
from transformer_jax.settings import require

Transcoders = Sequence[SparseAutoencoder] | CrossLayerTranscoder


@dataclasses.dataclass(frozen=True)
class FeatureWeights:
    """The weights of the features of one layer.

    Attributes:
      encoder_FD: What the features read.
      encoder_bias_F: What is added to that.
      decoder_FKD: What they write to the outputs of this feed-forward layer and the K - 1 layers
        after it.
      bias_D: What is added to the output of this layer.
    """

    encoder_FD: np.ndarray
    encoder_bias_F: np.ndarray
    decoder_FKD: np.ndarray
    bias_D: np.ndarray


@dataclasses.dataclass(frozen=True)
class ExplainedLayer:
    """A feed-forward layer of one text.

    Attributes:
      weights: The weights of its features.
      features_TF: The values of the features.
      error_TD: What features do not explain of the output of the layer.
    """

    weights: FeatureWeights
    features_TF: np.ndarray
    error_TD: np.ndarray


def feature_weights(model: Decoder, transcoders: Transcoders) -> list[FeatureWeights]:
    """Returns the weights of the features of every layer; a layer without a transcoder has none.

    Args:
      model: The decoder.
      transcoders: Transcoders of its feed-forward layers, at most one a layer, or one cross-layer
        transcoder.

    Returns:
      The weights in float64.

    Raises:
      ValueError: If a transcoder does not fit the model.
    """
    L, D = model.config.num_layers, model.config.model_dim
    if isinstance(transcoders, CrossLayerTranscoder):
        config = transcoders.config
        require((config.site, config.target, config.num_layers, config.input_dim) == ("mlp_input", "mlp_output", L, D),
                f"a cross-layer transcoder from {config.site!r} to {config.target!r} of {config.num_layers} layers of "
                f"{config.input_dim} values cannot be used; expected one from 'mlp_input' to 'mlp_output' of {L} "
                f"layers of {D} values")
        made = cross_layer.in_own_units(transcoders)
        return [_float64(made.encoder[...][layer], made.encoder_bias[...][layer], made.decoder[layer][...],
                         made.decoder_bias[...][layer]) for layer in range(L)]
    found = [FeatureWeights(np.zeros((0, D)), np.zeros(0), np.zeros((0, 1, D)), np.zeros(D)) for _ in range(L)]
    for layer, made in _by_layer(model, transcoders).items():
        found[layer] = _float64(made.encoder[...], made.encoder_bias[...], made.decoder[...][:, None],
                                made.decoder_bias[...])
    return found


def explained_layers(model: Decoder, transcoders: Transcoders, trace: Trace) -> list[ExplainedLayer]:
    """Splits the outputs of all feed-forward layers of a text into features and errors.

    Args:
      model: The decoder.
      transcoders: See ``feature_weights``.
      trace: The trace of the text, a batch of one row.

    Returns:
      The layers.

    Raises:
      ValueError: If a transcoder does not fit the model.
    """
    weights = feature_weights(model, transcoders)
    x_LTD, y_LTD = (trace[site][:, 0] for site in ("mlp_input", "mlp_output"))
    if isinstance(transcoders, CrossLayerTranscoder):
        features: dict[int, np.ndarray] = dict(enumerate(np.asarray(transcoders.encode(x_LTD), np.float64)))
    else:
        features = {layer: np.asarray(made.encode(x_LTD[layer]), np.float64)
                    for layer, made in _by_layer(model, transcoders).items()}
    none_TF = np.zeros((x_LTD.shape[1], 0))
    return with_errors(weights, [features.get(layer, none_TF) for layer in range(len(weights))],
                       np.asarray(y_LTD, np.float64))


def with_errors(weights: list[FeatureWeights], features: list[np.ndarray],
                outputs_LTD: np.ndarray) -> list[ExplainedLayer]:
    """Computes what features do not explain.

    Args:
      weights: The weights of the features of every layer.
      features: The values ``[T, F]`` of the features of every layer. Those that are zero here
        become a part of the errors.
      outputs_LTD: The outputs of the feed-forward layers.

    Returns:
      The layers.
    """
    errors_LTD = outputs_LTD - np.stack([each.bias_D for each in weights])[:, None]
    for layer, (each, features_TF) in enumerate(zip(weights, features, strict=True)):
        written_KTD = np.einsum("tf,fkd->ktd", features_TF, each.decoder_FKD)
        errors_LTD[layer:layer + len(written_KTD)] -= written_KTD
    return [ExplainedLayer(*parts) for parts in zip(weights, features, errors_LTD, strict=True)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeldOutputs:
    """An intervention that sets the outputs of some feed-forward layers.

    Attributes:
      outputs_LTD: The outputs.
      is_held_L: True for the layers whose outputs are set.
    """

    outputs_LTD: jax.Array
    is_held_L: jax.Array

    def __call__(self, site: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
        """Returns the output to set in these layers, else the value itself."""
        if site != "mlp_output":
            return value
        return jnp.where(self.is_held_L[layer], self.outputs_LTD[layer], value).astype(value.dtype)


def _by_layer(model: Decoder, transcoders: Sequence[SparseAutoencoder]) -> dict[int, SparseAutoencoder]:
    """Returns the transcoders without scales by their layers."""
    by_layer: dict[int, SparseAutoencoder] = {}
    for each in transcoders:
        layer = site_and_layer(each.config.site, model)[1]
        require((each.config.site, each.config.targets) == (f"layers.{layer}.mlp_input", f"layers.{layer}.mlp_output")
                and each.config.activation != "gated" and layer not in by_layer,
                f"a model with activation={each.config.activation!r} from {each.config.site!r} to "
                f"{each.config.targets!r} cannot be used; pass one transcoder for each feed-forward layer, not gated")
        by_layer[layer] = in_own_units(each)
    return by_layer


def _float64(*arrays: jax.Array) -> FeatureWeights:
    """Makes the weights from arrays."""
    return FeatureWeights(*(np.asarray(each, np.float64) for each in arrays))
