"""Evaluate the mean loss of a model over batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import jax
import numpy as np

from transformer_jax.training.step import Batch, LossFn, make_eval_step

Batches = Callable[[], Iterable[Mapping[str, np.ndarray]]]


def mean_loss(loss_fn: LossFn, batches: Batches,
              max_batches: int | None = None) -> Callable[[Any], dict[str, float]]:
    """Makes a function that computes the mean loss of a model.

    Args:
      loss_fn: a function ``(model, batch, key) -> (sum of losses, sum of weights)``. It may return
        a dict of further sums as a third item.
      batches: a function that returns the batches; it is called for every evaluation.
      max_batches: use only this many of the first batches; ``None`` uses all.

    Returns:
      A function that takes a model and returns a dict: ``validation_loss``, and ``validation_X``
      for every further sum X, each divided by the sum of the weights.
    """
    eval_step = make_eval_step(loss_fn)
    return lambda model: _means(eval_step, model, batches, max_batches)


def mean_losses(loss_fn: LossFn, batches: Mapping[str, Batches], shares: Mapping[str, float],
                max_batches: int | None = None) -> Callable[[Any], dict[str, float]]:
    """Makes a function that computes the mean loss of a model on several corpora.

    Args:
      loss_fn: a function as in ``mean_loss``.
      batches: for each corpus, by its name, a function that returns its batches.
      shares: the share of each corpus in the training data, by its name; their sum is 1.
      max_batches: use only this many of the first batches of each corpus; ``None`` uses all.

    Returns:
      A function that takes a model and returns a dict: the means of ``mean_loss``, weighted by the
      shares, and then those of each corpus, such as ``validation_loss_novels``.
    """
    eval_step = make_eval_step(loss_fn)

    def evaluate(model: Any) -> dict[str, float]:
        means = {name: _means(eval_step, model, batches[name], max_batches) for name in shares}
        names = next(iter(means.values()))
        weighted = {name: sum(share * means[corpus][name] for corpus, share in shares.items()) for name in names}
        return weighted | {f"{name}_{corpus}": value for corpus, found in means.items()
                           for name, value in found.items()}

    return evaluate


def _means(eval_step: Callable[..., Any], model: Any, batches: Batches, max_batches: int | None) -> dict[str, float]:
    """Returns the sums of the losses divided by the sum of the weights, by name."""
    sums = [jax.device_get(eval_step(model, cast(Batch, batch)))
            for batch in itertools.islice(batches(), max_batches)]
    total, weight, *others = jax.tree.map(lambda *parts: sum(map(float, parts)), *sums)
    return {f"validation_{name}": value / weight for name, value in {"loss": total, **dict(*others)}.items()}
