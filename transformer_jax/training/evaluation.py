"""The mean loss of a model over batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from transformer_jax.training.step import LossFn, make_eval_step


def mean_loss(loss_fn: LossFn, batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
              max_batches: int | None = None) -> Callable[[Any], dict[str, float]]:
    """A function from a model to its mean loss over all batches, or the first ones.

    Args:
      loss_fn: ``(model, batch, key) -> (sum of losses, sum of weights)``, and maybe a dict of
        further sums.
      batches: makes the batches anew for every evaluation.
      max_batches: how many of them to take; ``None``: all.

    Returns:
      A function that returns ``validation_loss``, and ``validation_X`` for every further sum X.
    """
    eval_step = make_eval_step(loss_fn)

    def evaluate(model: Any) -> dict[str, float]:
        sums = [jax.device_get(eval_step(model, batch)) for batch in itertools.islice(batches(), max_batches)]
        total, weight, *others = jax.tree.map(lambda *parts: sum(map(float, parts)), *sums)
        return {f"validation_{name}": value / weight for name, value in {"loss": total, **dict(*others)}.items()}

    return evaluate
