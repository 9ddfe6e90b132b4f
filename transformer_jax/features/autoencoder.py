"""The sparse autoencoder: an activation becomes a sum of few features out of many."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from transformer_jax.config.sparse_autoencoder import SparseAutoencoderConfig
from transformer_jax.ops.linear import float32_logits, linear
from transformer_jax.sharding import constrain, gather_weight

_ENCODER_AXES = ("mlp", "embed")


class SparseAutoencoder(nnx.Module):
    """A sparse autoencoder, or a transcoder if ``config.target`` is another activation.

    The features of an activation x are ``act(encoder (scale x - decoder_bias) + encoder_bias)``,
    and the model computes ``(features decoder + decoder_bias) / target_scale`` from them.

    Attributes:
      config: The settings.
      encoder: ``[F, D]``. Each row is the direction that a feature reads.
      encoder_bias: ``[F]``; for ``gated`` features that of the gate.
      decoder: ``[F, E]``. Each row is the direction that a feature writes; training keeps its
        length at 1.
      decoder_bias: ``[E]``.
      threshold: For ``jumprelu`` ``[F]``, and for ``batch_topk`` one number: features that are not
        larger count as zero. ``None`` for the others.
      magnitude_scale: ``[F]``, for ``gated`` the logarithm of the factor from gate to magnitude.
      magnitude_bias: ``[F]``, for ``gated`` the bias of the magnitude.
      silent: ``[F]``. The number of tokens of training since each feature was last active, at most
        ``config.dead_after``.
    """

    gathers_rows = True  # see transformer_jax.features.objective

    def __init__(self, config: SparseAutoencoderConfig, *, key: jax.Array):
        """Creates the model: random directions of length 1, read and written alike.

        Args:
          config: The settings.
          key: PRNG key.
        """
        decoder_key, encoder_key = jax.random.split(key)
        F, D, E = config.num_features, config.input_dim, config.out_dim
        decoder_FE = of_length_1(jax.random.normal(decoder_key, (F, E)))
        encoder_FD = decoder_FE if D == E else of_length_1(jax.random.normal(encoder_key, (F, D)))
        if config.activation not in ("topk", "batch_topk"):  # about half of all features are active at first
            encoder_FD = encoder_FD * min(1.0, 2 * D / F)
        self.config = config
        self.encoder = nnx.Param(encoder_FD, axes=_ENCODER_AXES)
        self.encoder_bias = nnx.Param(jnp.zeros(F), axes=("mlp",))
        self.decoder = nnx.Param(decoder_FE, axes=("mlp", "embed"))
        self.decoder_bias = nnx.Param(jnp.zeros(E), axes=("embed",))
        is_gated = config.activation == "gated"
        self.threshold = {"jumprelu": nnx.Param(jnp.full(F, config.first_threshold), axes=("mlp",)),
                          "batch_topk": nnx.Param(jnp.zeros(()), axes=())}.get(config.activation)
        self.magnitude_scale = nnx.Param(jnp.zeros(F), axes=("mlp",)) if is_gated else None
        self.magnitude_bias = nnx.Param(jnp.zeros(F), axes=("mlp",)) if is_gated else None
        self.silent = nnx.Param(jnp.zeros(F), axes=("mlp",))

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N E"]:
        """Returns the reconstruction of an activation, or what a transcoder computes from it."""
        return self.decode(self.encode(x))

    def encode(self, x: Float[Array, "*N D"]) -> Float[Array, "*N F"]:
        """Computes the features of activations.

        Args:
          x: Activations.

        Returns:
          The features, float32; most are zero.
        """
        pre = self.pre_activations(self.scaled(x))
        activation = self.config.activation
        if activation == "topk":
            return keep_largest(pre, self.config.k)
        if activation == "gated":
            return jnp.where(pre > 0, jax.nn.relu(self.magnitudes(pre)), 0.0)
        if self.threshold is None:
            return jax.nn.relu(pre)
        return jnp.where(pre > self.threshold[...], jax.nn.relu(pre), 0.0)

    def decode(self, features: Float[Array, "*N F"]) -> Float[Array, "*N E"]:
        """Computes activations from features.

        Args:
          features: The features.

        Returns:
          The activations, float32.
        """
        return self.reconstruct(features) / self.config.out_scale

    def read(self, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Reads the activations of a batch.

        Args:
          batch: Activations ``[B, dim]`` by name.

        Returns:
          The activation to read ``[B, D]`` and the one to compute ``[B, E]``, float32.
        """
        x, y = (jnp.asarray(batch[name], jnp.float32) for name in (self.config.site, self.config.targets))
        return x, y

    def scaled(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Brings activations to the units of the weights.

        Args:
          x: Activations.

        Returns:
          The activations times ``config.scale``, float32.
        """
        return jnp.asarray(x, jnp.float32) * self.config.scale

    def scaled_target(self, y: Float[Array, "*N E"]) -> Float[Array, "*N E"]:
        """Brings activations to compute to the units of the weights.

        Args:
          y: Activations.

        Returns:
          The activations times ``config.target_scale``.
        """
        return y * self.config.out_scale

    def pre_activations(self, x: Float[Array, "*N D"]) -> Float[Array, "*N F"]:
        """Computes what the activation function reads (for ``gated`` features, the gate).

        Args:
          x: Activations, as ``scaled`` returns them.

        Returns:
          One number for each feature.
        """
        x = self.centered(x)
        encoder_FD = gather_weight(self.encoder[...], _ENCODER_AXES)
        rows = float32_logits(x.reshape(-1, x.shape[-1]), encoder_FD)
        pre = rows.reshape(*x.shape[:-1], -1) + self.encoder_bias[...]
        return constrain(pre, "batch", "mlp") if pre.ndim == 2 else pre

    def centered(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Subtracts the bias of the decoder, if the config says so.

        Args:
          x: Activations, as ``scaled`` returns them.

        Returns:
          What the encoder reads.
        """
        return x - self.decoder_bias[...] if self.config.subtract_bias else x

    def magnitudes(self, pre: Float[Array, "*N F"]) -> Float[Array, "*N F"]:
        """Computes the magnitudes of ``gated`` features, before their ReLU.

        Args:
          pre: What ``pre_activations`` returns.

        Returns:
          One number for each feature.
        """
        assert self.magnitude_scale is not None and self.magnitude_bias is not None
        return (pre - self.encoder_bias[...]) * jnp.exp(self.magnitude_scale[...]) + self.magnitude_bias[...]

    def reconstruct(self, features: Float[Array, "*N F"]) -> Float[Array, "*N E"]:
        """Computes activations from features, in the units of the weights.

        Args:
          features: The features.

        Returns:
          The activations times ``config.target_scale``.
        """
        return self.write(features) + self.decoder_bias[...]

    def write(self, features: Float[Array, "*N F"]) -> Float[Array, "*N E"]:
        """Adds up what features write, without the bias.

        Args:
          features: The features.

        Returns:
          The sums in the units of the weights.
        """
        decoder_FE = gather_weight(self.decoder[...], ("mlp", "embed"))
        rows = linear(features.reshape(-1, features.shape[-1]), decoder_FE)
        return rows.reshape(*features.shape[:-1], -1)

    def normalize(self) -> None:
        """Gives the rows of the decoder the length 1 again."""
        self.decoder.set_value(of_length_1(self.decoder[...]))

    @property
    def is_dead(self) -> Float[Array, " F"]:
        """True for each feature that was not active for ``config.dead_after`` tokens of
        training."""
        return self.silent[...] >= self.config.dead_after


def keep_largest(pre: Float[Array, "*N F"], k: int) -> Float[Array, "*N F"]:
    """Keeps the k largest positive entries of each row.

    Args:
      pre: Numbers.
      k: How many to keep.

    Returns:
      The same numbers with zeros in the other places.
    """
    values, places = jax.lax.top_k(pre, k)
    rows = jnp.indices(places.shape, sparse=True)[:-1]
    return jnp.zeros_like(pre).at[(*rows, places)].set(jax.nn.relu(values))


def of_length_1(rows: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """Divides each row by its length.

    Args:
      rows: The rows.

    Returns:
      Rows of length 1; a row of zeros stays zero.
    """
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-8)
