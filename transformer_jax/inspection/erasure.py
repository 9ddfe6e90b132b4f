"""Concept erasure: the smallest linear change after which no linear probe finds a concept."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Shaped

from transformer_jax.inspection.interventions import Edit, Layers, checked_layers
from transformer_jax.inspection.parts import kind_of


@dataclasses.dataclass(frozen=True)
class Eraser:
    """A map ``x -> x - (x - mean) @ removed`` that erases a concept.

    Attributes:
      mean: the mean of the features, float64 ``[D]``.
      removed: the matrix of what is removed, float64 ``[D, D]``.
    """

    mean: Float[np.ndarray, " D"]
    removed: Float[np.ndarray, "D D"]

    def __call__(self, features: Float[Array | np.ndarray, "*N D"]) -> Float[Array | np.ndarray, "*N D"]:
        """Erases the concept.

        Args:
          features: features ``[..., D]``.

        Returns:
          The features without the concept, of the same shape.
        """
        return features - (features - self.mean) @ self.removed


def leace(features_ND: Float[Array | np.ndarray, "N D"], concept_N: Shaped[np.ndarray, "N ..."]) -> Eraser:
    """Finds the smallest change of features after which no linear function of them predicts a
    concept (LEACE).

    After the change, the covariance of the features with the concept is zero. Of all affine maps
    with this property, the result has the smallest mean squared change.

    Source: Belrose et al. (2023), theorem 4.3. It is computed in float64 in closed form.

    Args:
      features_ND: the activations of N examples.
      concept_N: a label for each example, of any type; or numbers ``[N, C]``.

    Returns:
      The map.

    Raises:
      ValueError: if the numbers of examples differ.
    """
    x_ND, concept = np.asarray(features_ND, np.float64), np.asarray(concept_N)
    if x_ND.ndim != 2 or not concept.ndim or len(concept) != len(x_ND):
        raise ValueError(f"features have shape {x_ND.shape} and the concept {concept.shape}; expected [N, D] and [N] "
                         "or [N, C]")
    z_NC = (concept[:, None] == np.unique(concept)).astype(np.float64) if concept.ndim == 1 else concept.astype(float)
    mean_D = x_ND.mean(0)
    x_ND, z_NC = x_ND - mean_D, z_NC - z_NC.mean(0)
    values, vectors = np.linalg.eigh(x_ND.T @ x_ND / len(x_ND))
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps
    root = np.sqrt(values[kept])
    whiten, unwhiten = ((vectors[:, kept] * scale) @ vectors[:, kept].T for scale in (1 / root, root))
    left, sizes, _ = np.linalg.svd(whiten @ (x_ND.T @ z_NC / len(x_ND)), full_matrices=False)
    basis = left[:, sizes > 1e-10 * max(float(sizes.max()), 1e-300)] if sizes.max() > 1e-12 else left[:, :0]
    return Eraser(mean_D, (unwhiten @ basis @ basis.T @ whiten).T)


def erase(layer: Layers, eraser: Eraser, *, site: str = "residual") -> Edit:
    """Erases a concept from a site of the forward pass.

    Args:
      layer: one layer or several, counted from 0.
      eraser: the result of ``leace`` for the values of this site, ``[N, D]``.
      site: the site.

    Returns:
      The intervention.

    Raises:
      ValueError: if the site does not exist.
    """
    kind_of(site)
    return Edit(site, _erase, checked_layers(layer), {"mean": jnp.asarray(eraser.mean, jnp.float32),
                                                      "removed": jnp.asarray(eraser.removed, jnp.float32)})


def _erase(value: jax.Array, mean: jax.Array, removed: jax.Array) -> jax.Array:
    """Applies the map of an eraser."""
    return value - (value - mean) @ removed
