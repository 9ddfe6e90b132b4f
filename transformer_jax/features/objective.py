"""The losses of sparse autoencoders, and what a training step changes beside the gradient.

A cross-layer transcoder has the same losses. Its arrays have an axis of layers before the others:
``[L, B, D]`` in the place of ``[B, D]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.features.autoencoder import SparseAutoencoder, keep_largest
from transformer_jax.features.cross_layer import CrossLayerTranscoder
from transformer_jax.sharding import num_shards
from transformer_jax.training.step import Batch, Sums

FeatureModel = SparseAutoencoder | CrossLayerTranscoder

_THRESHOLD_DECAY = 0.99  # of the running mean of the smallest active feature of a batch


class _Coded(NamedTuple):
    """A batch of B activations, coded by features.

    Attributes:
      output_BE: The reconstruction, in the units of the weights.
      penalty: What the loss adds to the squared error, summed over the batch.
      active_F: The number of activations for which each feature is active.
      threshold: The smallest active feature, for ``batch_topk``; 0 for the others.
    """

    output_BE: jax.Array
    penalty: jax.Array | float
    active_F: jax.Array
    threshold: jax.Array | float = 0.0


def objective(model: FeatureModel, batch: Batch, key: jax.Array | None = None) -> Sums:
    """Computes the training loss of a batch.

    Args:
      model: The autoencoder or transcoder.
      batch: The activations ``[B, D]`` that ``config.inputs`` names, and those ``[B, E]`` that
        ``config.outputs`` names.
      key: Not used.

    Returns:
      The sum of losses; the number of activations; and the sums from which ``after_update`` makes
      the metrics.
    """
    del key
    x_BD, y_BE = model.read(batch)
    x_BD, y_BE = model.scaled(x_BD), model.scaled_target(y_BE)
    coded = _CODES[model.config.activation](model, x_BD, y_BE)
    error_BE = y_BE - coded.output_BE
    error = jnp.square(error_BE).sum()
    loss = error + coded.penalty
    if model.config.revival:
        loss += model.config.revival * _revival(model, x_BD, jax.lax.stop_gradient(error_BE))
    weight = jnp.asarray(x_BD.shape[-2], jnp.float32)
    variance = jnp.square(y_BE - y_BE.mean(-2, keepdims=True)).sum()
    return loss, weight, jax.lax.stop_gradient({
        "squared_error": error, "variance": variance, "l0": coded.active_F.sum(), "active_F": coded.active_F,
        "threshold": coded.threshold * weight})


def after_update(model: FeatureModel, means: Mapping[str, jax.Array],
                 weight: jax.Array) -> tuple[FeatureModel, dict[str, jax.Array]]:
    """Changes the weights that have no gradient, and makes the metrics of a step.

    The rows of the decoder get the length 1 again, the tokens since each feature was active are
    counted, and the threshold of ``batch_topk`` follows the smallest active features.

    Args:
      model: The model after the update of the optimizer.
      means: The sums of ``objective``, divided by the number of activations.
      weight: The number of activations.

    Returns:
      The model; and ``explained_variance``, ``l0`` (the mean number of active features) and
      ``dead`` (the share of dead features).
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    model.normalize()
    silent_F = jnp.where(means["active_F"] > 0, 0.0, model.silent[...] + weight)
    model.silent.set_value(jnp.minimum(silent_F, model.config.dead_after))
    if model.config.activation == "batch_topk":
        threshold = cast(nnx.Param, model.threshold)
        old, new = threshold[...], means["threshold"]
        threshold.set_value(jnp.where(old == 0.0, new, _THRESHOLD_DECAY * old + (1 - _THRESHOLD_DECAY) * new))
    return model, {"explained_variance": 1 - means["squared_error"] / jnp.maximum(means["variance"], 1e-30),
                   "l0": means["l0"], "dead": model.is_dead.mean()}


def _relu(model: FeatureModel, x_BD: jax.Array, y_BE: jax.Array) -> _Coded:
    """Features with an L1 penalty."""
    features_BF = jax.nn.relu(model.pre_activations(x_BD))
    return _Coded(model.reconstruct(features_BF), model.config.sparsity * features_BF.sum(), (features_BF > 0).sum(-2))


def _top_k(model: FeatureModel, x_BD: jax.Array, y_BE: jax.Array) -> _Coded:
    """The k largest features of each activation."""
    if not _gathers_rows(model):
        features_BF = keep_largest(model.pre_activations(x_BD), model.config.k)
        return _Coded(model.reconstruct(features_BF), 0.0, (features_BF > 0).sum(-2))
    pre_BF = jax.lax.stop_gradient(model.pre_activations(x_BD))
    values_BK, places_BK = jax.lax.top_k(pre_BF, model.config.k)
    active_F = jnp.zeros(model.config.num_features).at[places_BK].add(values_BK > 0)
    return _Coded(_chosen(model, x_BD, places_BK, jax.nn.relu) + model.decoder_bias[...], 0.0, active_F)


def _batch_top_k(model: FeatureModel, x_BD: jax.Array, y_BE: jax.Array) -> _Coded:
    """The largest features of a batch, k for each activation on average."""
    pre_BF = jax.nn.relu(model.pre_activations(x_BD))
    count = model.config.k * (pre_BF.size // pre_BF.shape[-1])
    threshold = _threshold(jax.lax.stop_gradient(pre_BF), count)
    features_BF = jnp.where(pre_BF >= threshold, pre_BF, 0.0)
    return _Coded(model.reconstruct(features_BF), 0.0, (features_BF > 0).sum(-2), threshold)


def _jump_relu(model: FeatureModel, x_BD: jax.Array, y_BE: jax.Array) -> _Coded:
    """Features above learned thresholds with an L0 penalty (Rajamanoharan et al., 2024b)."""
    pre_BF = model.pre_activations(x_BD)
    threshold_F = jnp.maximum(cast(jax.Array, model.threshold)[...], 0.0)[..., None, :]
    width = model.config.bandwidth
    is_active_BF = pre_BF > threshold_F
    # Terms that are zero and whose gradients are the estimates of the gradients of a step.
    near_BF = jax.lax.stop_gradient((jnp.abs(pre_BF - threshold_F) < width / 2) / width)
    moved_F = jax.lax.stop_gradient(threshold_F) - threshold_F
    features_BF = jnp.where(is_active_BF, pre_BF, 0.0) + moved_F * jax.lax.stop_gradient(threshold_F) * near_BF
    penalty = model.config.sparsity * (is_active_BF + moved_F * near_BF).sum()
    return _Coded(model.reconstruct(features_BF), penalty, is_active_BF.sum(-2))


def _gated(model: SparseAutoencoder, x_BD: jax.Array, y_BE: jax.Array) -> _Coded:
    """Features with a gate and a magnitude; the gate alone must explain the activation too
    (Rajamanoharan et al., 2024a)."""
    pre_BF = model.pre_activations(x_BD)
    features_BF = jnp.where(pre_BF > 0, jax.nn.relu(model.magnitudes(pre_BF)), 0.0)
    gates_BF = jax.nn.relu(pre_BF)
    fixed = jax.lax.stop_gradient(model)
    penalty = model.config.sparsity * gates_BF.sum() + jnp.square(y_BE - fixed.reconstruct(gates_BF)).sum()
    return _Coded(model.reconstruct(features_BF), penalty, (features_BF > 0).sum(0))


_CODES: dict[str, Callable[..., _Coded]] = {
    "relu": _relu, "topk": _top_k, "batch_topk": _batch_top_k, "jumprelu": _jump_relu, "gated": _gated}


def _revival(model: FeatureModel, x_BD: jax.Array, error_BE: jax.Array) -> jax.Array:
    """Returns the squared error that dead features leave when they explain the error of the
    others; 0 while no feature is dead."""
    count = min(max(model.config.out_dim // 2, 1), model.config.num_features)
    is_dead_F = jax.lax.stop_gradient(model.is_dead)
    num_dead = is_dead_F.sum()
    share = num_dead / (count * (is_dead_F.size // model.config.num_features))

    def explain(model: FeatureModel) -> jax.Array:
        pre_BF = jax.lax.stop_gradient(jnp.where(is_dead_F[..., None, :], model.pre_activations(x_BD), -jnp.inf))
        places_BK = jax.lax.top_k(pre_BF, count)[1]
        is_dead_BK = jnp.take_along_axis(jnp.broadcast_to(is_dead_F[..., None, :], pre_BF.shape), places_BK, -1)
        written_BE = _chosen(model, x_BD, places_BK, lambda values_BK: jnp.where(is_dead_BK, values_BK, 0.0))
        return jnp.minimum(share, 1.0) * jnp.square(written_BE - error_BE).sum()

    return jax.lax.cond(num_dead > 0, explain, lambda model: jnp.zeros(()), model)


def _gathers_rows(model: FeatureModel) -> bool:
    """Whether a training step gathers the rows of the few features that it uses. For few features
    that is far less work than products with all of them, and so is the gradient. If the features
    are sharded, dense products move less data; in a cross-layer transcoder the rows, which write to
    many layers, would need much memory."""
    return model.gathers_rows and num_shards(model.config.num_features, "mlp") == 1


def _chosen(model: FeatureModel, x_BD: jax.Array, places_BK: jax.Array, function) -> jax.Array:
    """Returns what the features at ``places_BK`` write after ``function`` of their
    pre-activations."""
    if not _gathers_rows(model):
        pre_BF = model.pre_activations(x_BD)
        values_BK = function(jnp.take_along_axis(pre_BF, places_BK, -1))
        return model.write(jnp.put_along_axis(jnp.zeros_like(pre_BF), places_BK, values_BK, -1, inplace=False))
    single = cast(SparseAutoencoder, model)
    encoder_BKD, bias_BK = single.encoder[...][places_BK], single.encoder_bias[...][places_BK]
    values_BK = function(jnp.einsum("bd,bkd->bk", single.centered(x_BD), encoder_BKD) + bias_BK)
    return jnp.einsum("bk,bke->be", values_BK, single.decoder[...][places_BK])


def _threshold(values: jax.Array, count: int) -> jax.Array:
    """Returns the largest number that at least ``count`` of the values reach. The values are not
    negative, so the order of their bits is their own; the bits are found one by one."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)

    def next_bit(index: jax.Array, found: jax.Array) -> jax.Array:
        tried = found | (1 << (30 - index))
        return jnp.where((bits >= tried).sum() >= count, tried, found)

    found = jax.lax.fori_loop(0, 31, next_bit, jnp.zeros((), jnp.int32))
    return jax.lax.bitcast_convert_type(found, jnp.float32)
