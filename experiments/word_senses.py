"""How well the vectors of one word in several sentences separate its senses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import transformer_jax as tj


def senses(vectors: Any, labels: Sequence[int]) -> dict[str, float]:
    """Measures how well vectors of one word in sentences separate its senses.

    Args:
      vectors: one vector for each sentence ``[sentences, D]``.
      labels: the sense of the word in each sentence.

    Returns:
      ``within`` and ``between``: the mean cosines of pairs of sentences of the same sense and of
      different senses; ``nearest``: the fraction of sentences whose most similar other sentence has
      the same sense. Equal vectors tell nothing, so equal similarities count as the fraction of
      them that has the same sense.
    """
    cosines = np.asarray(tj.similarity(vectors, vectors), np.float64)
    same = np.equal.outer(labels, labels)
    others = ~np.eye(len(labels), dtype=bool)
    nearest = [same[row][others[row] & (cosines[row] >= cosines[row][others[row]].max() - 1e-5)].mean()
               for row in range(len(labels))]
    return {"within": float(cosines[same & others].mean()), "between": float(cosines[~same].mean()),
            "nearest": float(np.mean(nearest))}
