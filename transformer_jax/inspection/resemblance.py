"""Similarity of representations: of layers, of models, and of checkpoints of one run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jax import Array
from jaxtyping import Float

Features = Float[Array | np.ndarray, "N D"]


def cka(first_ND: Features, second_NE: Features) -> float:
    """Computes the linear centered kernel alignment of two representations of the same examples.

    It does not change if either is rotated, scaled or shifted.

    Source: Kornblith et al. (2019), equation 3 with a linear kernel.

    Args:
      first_ND: features ``[N, D]``.
      second_NE: features of the same examples, ``[N, E]``.

    Returns:
      A number from 0 to 1.

    Raises:
      ValueError: if the numbers of examples differ, or if all examples have equal features.
    """
    x, y = _centered(first_ND, second_NE)
    # |X^T Y| = |Y^T X| needs D x E products; the other two norms are of symmetric matrices.
    return float((np.square(x.T @ y).sum()) / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def procrustes(first_ND: Features, second_NE: Features) -> float:
    """Computes how well one representation becomes the other by a rotation and a scaling.

    It is 1 minus half of the squared Procrustes distance of the representations, which are centered
    and scaled to norm 1: the sum of the singular values of ``X^T Y``.

    Source: Ding et al. (2021), section 2.

    Args:
      first_ND: features ``[N, D]``.
      second_NE: features of the same examples, ``[N, E]``.

    Returns:
      A number from 0 to 1.

    Raises:
      ValueError: if the numbers of examples differ, or if all examples have equal features.
    """
    x, y = _centered(first_ND, second_NE)
    return float(np.linalg.svd(x.T @ y, compute_uv=False).sum() / (np.linalg.norm(x) * np.linalg.norm(y)))


def layer_similarity(first_LND: Float[Array | np.ndarray, "L N D"], second_MND: Float[Array | np.ndarray, "M N E"],
                     measure: Callable[[Features, Features], float] = cka) -> Float[np.ndarray, "L M"]:
    """Compares each layer of one model, or checkpoint, with each layer of another.

    Args:
      first_LND: the representations of N examples in L layers.
      second_MND: those of the same examples in M layers.
      measure: ``cka``, ``procrustes``, or another function of two representations.

    Returns:
      The similarities, ``[L, M]``.
    """
    return np.array([[measure(first_ND, second_ND) for second_ND in np.asarray(second_MND)]
                     for first_ND in np.asarray(first_LND)])


def _centered(first_ND: Features, second_NE: Features) -> tuple[np.ndarray, np.ndarray]:
    """Returns both in float64 without their means; raises ValueError if they do not fit."""
    x, y = np.asarray(first_ND, np.float64), np.asarray(second_NE, np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"the representations have shapes {x.shape} and {y.shape}; expected [N, D] and [N, E] of the "
                         "same N examples")
    x, y = x - x.mean(0), y - y.mean(0)
    if not x.any() or not y.any():
        raise ValueError("all examples have equal features in one of the representations: a similarity needs at least "
                         "two different examples")
    return x, y
