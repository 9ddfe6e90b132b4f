"""The data that a task prepares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from transformer_jax.data.windows import BatchSource

Transform = Callable[[Mapping[str, np.ndarray], np.random.Generator], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class TaskData:
    """Tokenized examples, ready for training and evaluation.

    Attributes:
      train: The training examples. If the batches depend on the current weights, an iterator of
        batches instead.
      contents: Digests that change when the data changes. A resumed run compares them with its
        record to check that it still has the same data.
      summary: A short description of the data for the terminal.
      held_out: Held-out examples in the same form as ``train``, for the metrics of attention.
        ``None`` if there are none.
      evaluation_batches: A function that takes a batch size and returns the held-out batches, all
        of the same shape. ``None`` if no examples are held out.
      transform: A function that is applied to every training batch, with a generator of random
        numbers.
      shown: Any value that ``Task.show`` needs.
      corpora: For a mixture of corpora, the data of each corpus by its name; ``train`` is then a
        ``Mixture``. Every corpus is evaluated separately.
      follow: A function for batches that depend on the current weights; see
        ``transformer_jax.training.hooks.Follow``.
    """

    train: BatchSource | Iterator[Mapping[str, Any]]
    contents: list[str]
    summary: str
    held_out: BatchSource | None = None
    evaluation_batches: Callable[[int], Iterable[Mapping[str, np.ndarray]]] | None = None
    transform: Transform | None = None
    shown: Any = None
    corpora: Mapping[str, TaskData] | None = None
    follow: Callable[[Any, dict[str, jax.Array] | None], Mapping[str, float]] | None = None
