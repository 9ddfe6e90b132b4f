"""Metrics of sparse autoencoders and transcoders."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.data.evaluation import fixed_batches
from transformer_jax.features.objective import FeatureModel
from transformer_jax.features.sources import ActivationSource, check_source
from transformer_jax.features.splicing import site_and_layer, spliced
from transformer_jax.inspection.interventions import patch
from transformer_jax.inspection.reading_activations import ActivationReader
from transformer_jax.models.output import Output


@dataclasses.dataclass(frozen=True)
class FeatureMetrics:
    """What ``measure`` finds.

    Attributes:
      explained_variance: 1 minus the squared error, divided by the squared distance of the
        activations from their mean, both summed over all rows and values.
      squared_error: The squared error, summed over the values and averaged over the rows.
      l0: The mean number of active features of a row; of a cross-layer transcoder, those of all
        layers together.
      dead: The share of features that are never active.
      density: For each feature, the share of the rows for which it is active, ``[F]``; for a
        cross-layer transcoder ``[L, F]``.
      by_target: The explained variance of each activation that the model computes, by name.
    """

    explained_variance: float
    squared_error: float
    l0: float
    dead: float
    density: np.ndarray
    by_target: dict[str, float]

    def numbers(self) -> dict[str, float]:
        """Selects the metrics that are one number.

        Returns:
          The metrics by name.
        """
        return {name: getattr(self, name) for name in ("explained_variance", "squared_error", "l0", "dead")}


def measure(model: FeatureModel, activations: ActivationSource, *, batch_size: int = 4096,
            max_batches: int | None = None) -> FeatureMetrics:
    """Measures how well few features explain activations.

    Args:
      model: The autoencoder, transcoder or cross-layer transcoder.
      activations: The activations.
      batch_size: Rows of a batch.
      max_batches: Read only this many of the first batches; ``None`` reads all.

    Returns:
      The metrics.

    Raises:
      ValueError: If the activations do not fit the model.
    """
    config = model.config
    check_source(config, activations.dims)

    def read(rows: range) -> dict[str, np.ndarray]:
        found = activations[np.arange(rows.start, rows.stop)]
        return {name: found[name] for name in config.inputs | config.outputs} | {
            "weight": np.ones(len(rows), np.float32)}

    batches = itertools.islice(fixed_batches(len(activations), batch_size, read), max_batches)
    sums = [jax.device_get(_sums(model, batch)) for batch in batches]
    count, error_E, square_E, total_E, active_F = (np.sum([np.asarray(part[place], np.float64) for part in sums], 0)
                                                   for place in range(5))
    variance_E = square_E - np.square(total_E) / count
    by_target = {name: _explained(error, variance) for name, error, variance in zip(
        config.outputs, np.atleast_2d(error_E), np.atleast_2d(variance_E), strict=True)}
    return FeatureMetrics(explained_variance=_explained(error_E, variance_E),
                          squared_error=float(error_E.sum() / count), l0=float(active_F.sum() / count),
                          dead=float((active_F == 0).mean()), density=active_F / count, by_target=by_target)


def _explained(error_E: np.ndarray, variance_E: np.ndarray) -> float:
    """Returns the share of the variance that is explained."""
    return float(1 - error_E.sum() / max(variance_E.sum(), 1e-30))


@jax.jit
def _sums(model: FeatureModel, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    """Returns the number of rows and the sums from which the metrics are computed, for each value
    and each feature."""
    weight_B = batch["weight"]
    x_BD, y_BE = model.read(batch)
    features_BF = model.encode(x_BD)
    error_BE = jnp.square(model.decode(features_BF) - y_BE)
    return (weight_B.sum(), *(weight_B @ each for each in (error_BE, jnp.square(y_BE), y_BE, features_BF > 0)))


@dataclasses.dataclass(frozen=True)
class LossRecovered:
    """The loss of a language model, with and without a reconstruction in the place of an
    activation.

    Attributes:
      original: The loss of the model, in nats per token.
      spliced: The loss with the reconstruction.
      zeroed: The loss with zeros.
    """

    original: float
    spliced: float
    zeroed: float

    @property
    def share(self) -> float:
        """The share of the loss between zeros and the original that the reconstruction
        recovers."""
        return (self.zeroed - self.spliced) / (self.zeroed - self.original)


def loss_recovered(bundle: Any, model: FeatureModel, texts: Iterable[Any], *, tokenizer: Any = None,
                   batch_size: int = 16) -> LossRecovered:
    """Measures how much worse a language model predicts with a reconstruction in the place of an
    activation.

    Args:
      bundle: The language model: the result of ``tj.load``, or a model that predicts next tokens.
      model: An autoencoder, transcoder or cross-layer transcoder of this language model.
      texts: Texts, as for ``tj.inspection.collect``.
      tokenizer: The tokenizer; by default that of the bundle.
      batch_size: Rows of a batch.

    Returns:
      The three losses and the share that is recovered.

    Raises:
      ValueError: If the language model does not predict next tokens, or there are no texts.
    """
    names = list(model.config.outputs)
    reader = ActivationReader.make(bundle, texts, names, tokenizer=tokenizer, batch_size=batch_size,
                                   dtype="float32", mesh=None)
    if not reader.model.predicts_next and not reader.model.reads_sources:
        raise ValueError("loss_recovered needs a model that predicts next tokens, but this is an encoder; measure "
                         "with tj.features.measure")
    places = [site_and_layer(name, reader.model) for name in names]
    zeros = patch(places[0][0], [layer for _, layer in places], 0.0)
    with_model = spliced(reader.model, [model])
    edits = ((reader.model, None), with_model, (reader.model, zeros))
    sums = [[_loss(language_model, *reader.arrays(rows), edit) for language_model, edit in edits]
            for rows in reader.rows()]
    if not sums:
        raise ValueError("there are no texts; pass at least one")
    totals = np.asarray(sums, np.float64).sum(0)
    return LossRecovered(*(float(total / count) for total, count in totals))


@jax.jit
def _loss(language_model: Any, arrays: Sequence[jax.Array], options: dict[str, jax.Array],
          edit: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the losses of all next tokens, and their number."""
    ids_BT, segments_BT = arrays[-1], list(options.values())[-1]
    logits_BTV = cast(Output, language_model(*arrays, **options, intervene=edit)).logits[:, :-1]
    logprobs_BTV = jax.nn.log_softmax(logits_BTV)
    losses_BT = -jnp.take_along_axis(logprobs_BTV, ids_BT[:, 1:, None], -1)[..., 0]
    weights_BT = (segments_BT[:, 1:] != 0).astype(jnp.float32)
    return (losses_BT * weights_BT).sum(), weights_BT.sum()
