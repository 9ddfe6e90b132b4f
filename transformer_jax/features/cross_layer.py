"""The cross-layer transcoder: features that write to the outputs of several feed-forward layers."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from transformer_jax.config.cross_layer_transcoder import CrossLayerTranscoderConfig
from transformer_jax.config.sparse_autoencoder import SparseAutoencoderConfig
from transformer_jax.features.autoencoder import SparseAutoencoder, keep_largest, of_length_1
from transformer_jax.ops.linear import float32_logits, linear
from transformer_jax.sharding import constrain, gather_weight

_ENCODER_AXES, _DECODER_AXES = ("layers", "mlp", "embed"), ("mlp", None, "embed")


class CrossLayerTranscoder(nnx.Module):
    """A cross-layer transcoder (Ameisen et al., 2025).

    The features of layer l are ``act(encoder[l] (scales[l] x_l) + encoder_bias[l])``. The output of
    the feed-forward layer t is computed as ``(sum of features_l decoder[l][:, t - l] over l <= t +
    decoder_bias[t]) / target_scales[t]``.

    Attributes:
      config: The settings.
      encoder: ``[L, F, D]``. Each row is the direction that a feature reads.
      encoder_bias: ``[L, F]``.
      decoder: For each layer l ``[F, L - l, E]``: the direction that each feature of the layer
        writes to the layers l to L - 1. Training keeps the length of these directions together
        at 1.
      decoder_bias: ``[L, E]``.
      threshold: For ``jumprelu`` ``[L, F]``, and for ``batch_topk`` one number: features that are
        not larger count as zero. ``None`` for the others.
      silent: ``[L, F]``. The number of tokens of training since each feature was last active, at
        most ``config.dead_after``.
    """

    gathers_rows = False  # see transformer_jax.features.objective

    def __init__(self, config: CrossLayerTranscoderConfig, *, key: jax.Array):
        """Creates the model. Each feature reads a random direction of length 1, and at first writes
        the same to every layer.

        Args:
          config: The settings.
          key: The PRNG key of the directions.
        """
        encoder_key, decoder_key = jax.random.split(key)
        L, F, D, E = config.num_layers, config.num_features, config.input_dim, config.out_dim
        encoder_LFD = of_length_1(jax.random.normal(encoder_key, (L, F, D)))
        written_LFE = encoder_LFD if D == E else of_length_1(jax.random.normal(decoder_key, (L, F, E)))
        if config.activation not in ("topk", "batch_topk"):  # about half of all features are active at first
            encoder_LFD = encoder_LFD * min(1.0, 2 * D / F)
        self.config = config
        self.encoder = nnx.Param(encoder_LFD, axes=_ENCODER_AXES)
        self.encoder_bias = nnx.Param(jnp.zeros((L, F)), axes=("layers", "mlp"))
        self.decoder = nnx.List([nnx.Param(_of_length_1_together(jnp.repeat(written_LFE[layer, :, None], L - layer, 1)),
                                           axes=_DECODER_AXES) for layer in range(L)])
        self.decoder_bias = nnx.Param(jnp.zeros((L, E)), axes=("layers", "embed"))
        self.threshold = {"jumprelu": nnx.Param(jnp.full((L, F), config.first_threshold), axes=("layers", "mlp")),
                          "batch_topk": nnx.Param(jnp.zeros(()), axes=())}.get(config.activation)
        self.silent = nnx.Param(jnp.zeros((L, F)), axes=("layers", "mlp"))

    def __call__(self, x: Float[Array, "L *N D"]) -> Float[Array, "L *N E"]:
        """Computes the outputs of all feed-forward layers from their inputs."""
        return self.decode(self.encode(x))

    def encode(self, x: Float[Array, "L *N D"]) -> Float[Array, "L *N F"]:
        """Computes the features of all layers.

        Args:
          x: The inputs of the feed-forward layers, as ``trace["mlp_input"]`` has them.

        Returns:
          The features, float32; most are zero.
        """
        rows = x.reshape(len(x), -1, x.shape[-1])
        features = jnp.stack([self.encode_layer(layer, rows_BD) for layer, rows_BD in enumerate(rows)])
        return features.reshape(*x.shape[:-1], -1)

    def decode(self, features: Float[Array, "L *N F"]) -> Float[Array, "L *N E"]:
        """Computes the outputs of all feed-forward layers from features.

        Args:
          features: The features of all layers.

        Returns:
          The outputs, float32.
        """
        rows = self.reconstruct(features.reshape(len(features), -1, features.shape[-1]))
        return (rows / _column(self.config.target_scales, 3)).reshape(*features.shape[:-1], -1)

    def read(self, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Reads the activations of a batch.

        Args:
          batch: Activations ``[B, dim]`` by name.

        Returns:
          The activations to read ``[L, B, D]`` and those to compute ``[L, B, E]``, float32.
        """
        x, y = (jnp.stack([jnp.asarray(batch[name], jnp.float32) for name in names])
                for names in (self.config.inputs, self.config.outputs))
        return x, y

    def scaled(self, x_LBD: Float[Array, "L B D"]) -> Float[Array, "L B D"]:
        """Brings activations to read to the units of the weights.

        Args:
          x_LBD: Activations.

        Returns:
          The activations times ``config.scales``.
        """
        return x_LBD * _column(self.config.scales, 3)

    def scaled_target(self, y_LBE: Float[Array, "L B E"]) -> Float[Array, "L B E"]:
        """Brings activations to compute to the units of the weights.

        Args:
          y_LBE: Activations.

        Returns:
          The activations times ``config.target_scales``.
        """
        return y_LBE * _column(self.config.target_scales, 3)

    def pre_activations(self, x_LBD: Float[Array, "L B D"]) -> Float[Array, "L B F"]:
        """Computes what the activation function reads.

        Args:
          x_LBD: Activations in the units of the weights.

        Returns:
          One number for each feature.
        """
        encoder_LFD = gather_weight(self.encoder[...], _ENCODER_AXES)
        pre_LBF = jnp.einsum("lbd,lfd->lbf", x_LBD, encoder_LFD, preferred_element_type=jnp.float32)
        return constrain(pre_LBF + self.encoder_bias[...][:, None], None, "batch", "mlp")

    def encode_layer(self, layer: int, x_BD: Float[Array, "B D"]) -> Float[Array, "B F"]:
        """Computes the features of one layer.

        Args:
          layer: The number of the layer.
          x_BD: The inputs of its feed-forward layer.

        Returns:
          The features, float32.
        """
        scale = self.config.scales[layer] if self.config.scales else 1.0
        encoder_FD = gather_weight(self.encoder[...][layer], _ENCODER_AXES[1:])
        pre_BF = float32_logits(jnp.asarray(x_BD, jnp.float32) * scale, encoder_FD) + self.encoder_bias[...][layer]
        threshold = None if self.threshold is None else self.threshold[...]
        return self._active(pre_BF, threshold if threshold is None or not threshold.ndim else threshold[layer])

    def _active(self, pre: jax.Array, threshold: jax.Array | None) -> jax.Array:
        """Applies the activation function."""
        if self.config.activation == "topk":
            return keep_largest(pre, self.config.k)
        return jax.nn.relu(pre) if threshold is None else jnp.where(pre > threshold, jax.nn.relu(pre), 0.0)

    def write(self, features_LBF: Float[Array, "L B F"]) -> Float[Array, "L B E"]:
        """Adds up what features write to every layer, without the bias.

        Args:
          features_LBF: The features.

        Returns:
          The sums in the units of the weights.
        """
        written = [self.write_from(layer, features_BF) for layer, features_BF in enumerate(features_LBF)]
        return jnp.stack([sum((written[source][:, target - source] for source in range(target)), written[target][:, 0])
                          for target in range(len(written))])

    def write_from(self, layer: int, features_BF: Float[Array, "B F"]) -> Float[Array, "B K E"]:
        """Computes what the features of one layer write to this layer and the K - 1 layers after
        it, in the units of the weights.

        Args:
          layer: The number of the layer.
          features_BF: The features of the layer.

        Returns:
          One row for each layer that is written to.
        """
        decoder_FKE = gather_weight(self.decoder[layer][...], _DECODER_AXES)
        return linear(features_BF, decoder_FKE.reshape(len(decoder_FKE), -1)).reshape(
            len(features_BF), *decoder_FKE.shape[1:])

    def reconstruct(self, features_LBF: Float[Array, "L B F"]) -> Float[Array, "L B E"]:
        """Computes the outputs of all layers from features, in the units of the weights.

        Args:
          features_LBF: The features.

        Returns:
          The outputs.
        """
        return self.write(features_LBF) + self.decoder_bias[...][:, None]

    def normalize(self) -> None:
        """Gives what each feature writes to all layers together the length 1 again."""
        for decoder in self.decoder:
            decoder.set_value(_of_length_1_together(decoder[...]))

    def of_layer(self, layer: int) -> SparseAutoencoder:
        """Makes a transcoder with the features of one layer, for functions that look at features,
        such as ``tj.features.examine``.

        Args:
          layer: The number of the layer.

        Returns:
          A transcoder in units of scale 1. It writes the sum of what the features write to all
          layers, which is their direct effect on the residual stream.

        Raises:
          ValueError: If there is no such layer.
        """
        config = self.config
        if not 0 <= layer < config.num_layers:
            raise ValueError(f"layer={layer} is not from 0 to {config.num_layers - 1}")
        settings = {name: getattr(config, name) for name in (
            "input_dim", "num_features", "activation", "k", "sparsity", "bandwidth", "first_threshold", "dead_after")}
        made = SparseAutoencoder(SparseAutoencoderConfig(
            **settings, output_dim=config.out_dim, site=f"layers.{layer}.{config.site}",
            target=f"layers.{layer}.{config.target}", subtract_bias=False), key=jax.random.key(0))
        scales = jnp.asarray(config.target_scales or (1.0,) * config.num_layers)[layer:, None]
        made.encoder.set_value(self.encoder[...][layer] * (config.scales[layer] if config.scales else 1.0))
        made.encoder_bias.set_value(self.encoder_bias[...][layer])
        made.decoder.set_value((self.decoder[layer][...] / scales).sum(1))
        made.decoder_bias.set_value(jnp.zeros(config.out_dim))
        made.silent.set_value(self.silent[...][layer])
        if self.threshold is not None and made.threshold is not None:
            made.threshold.set_value(self.threshold[...] if self.threshold.ndim == 0 else self.threshold[...][layer])
        return made

    @property
    def is_dead(self) -> Float[Array, "L F"]:
        """True for each feature that was not active for ``config.dead_after`` tokens of
        training."""
        return self.silent[...] >= self.config.dead_after


def in_own_units(model: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """Returns the same model with the scales in its weights. Scales are powers of two, so the
    numbers that it computes are the same.

    Args:
      model: A cross-layer transcoder.

    Returns:
      The model without scales.
    """
    config = model.config
    folded = CrossLayerTranscoder(config.replace(scales=(), target_scales=()), key=jax.random.key(0))
    folded = jax.tree.unflatten(jax.tree.structure(folded), jax.tree.leaves(model))
    folded.encoder.set_value(model.encoder[...] * _column(config.scales, 3))
    scales_LE = _column(config.target_scales, 2)
    for layer, decoder in enumerate(model.decoder):
        folded.decoder[layer].set_value(decoder[...] / (scales_LE[layer:] if config.target_scales else 1.0))
    folded.decoder_bias.set_value(model.decoder_bias[...] / scales_LE)
    return folded


def _column(scales: tuple[float, ...], ndim: int) -> jax.Array:
    """Returns the scales of all layers for arrays ``[L, ...]``; 1 if there are none."""
    return jnp.asarray(scales or (1.0,), jnp.float32).reshape(-1, *[1] * (ndim - 1))


def _of_length_1_together(written_FKE: jax.Array) -> jax.Array:
    """Divides what each feature writes by the length of all its directions together."""
    return of_length_1(written_FKE.reshape(len(written_FKE), -1)).reshape(written_FKE.shape)
