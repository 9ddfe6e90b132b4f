"""The fit of a power law to losses of models of several sizes, with a confidence band."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

_EXPONENTS = np.linspace(0.02, 2.0, 397)


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """The loss of a model of N parameters: ``floor + (scale / N) ** exponent``.

    Attributes:
      floor: the loss that no size falls below, in nats.
      scale: the number of parameters at which the loss is one nat above the floor.
      exponent: how fast the loss falls.
    """

    floor: float
    scale: float
    exponent: float

    def __call__(self, sizes: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
        """Returns the loss of each size."""
        return self.floor + (self.scale / np.asarray(sizes, np.float64)) ** self.exponent


def fit(sizes: Float[np.ndarray, " S"], losses: Float[np.ndarray, " S"]) -> PowerLaw:
    """Fits a power law by least squares.

    For each exponent, the best floor and the best factor are a linear least-squares problem; the
    exponent is searched on a grid of 0.005.

    Args:
      sizes: the numbers of parameters.
      losses: the loss of each size, in nats.

    Returns:
      The law with the smallest sum of squared errors whose factor and floor are not negative.

    Raises:
      ValueError: if there are fewer than 4 sizes, or the losses do not fall with the size.
    """
    sizes, losses = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    if len(set(sizes.tolist())) < 4 or sizes.shape != losses.shape:
        raise ValueError(f"got sizes {sizes.shape} and losses {losses.shape}; a law of three numbers needs at least 4 "
                         "different sizes, with a loss for each")
    smallest = sizes.min()
    x_ES = (smallest / sizes) ** _EXPONENTS[:, None]
    centered_ES = x_ES - x_ES.mean(1, keepdims=True)
    factor_E = (centered_ES @ losses) / np.square(centered_ES).sum(1)
    floor_E = losses.mean() - factor_E * x_ES.mean(1)
    # A loss cannot be negative; where the best floor is, the best law has the floor 0.
    factor_E = np.where(floor_E < 0, x_ES @ losses / np.square(x_ES).sum(1), factor_E)
    floor_E = np.maximum(floor_E, 0.0)
    error_E = np.square(floor_E[:, None] + factor_E[:, None] * x_ES - losses).sum(1)
    error_E = np.where(factor_E > 0, error_E, np.inf)
    best = int(error_E.argmin())
    if not np.isfinite(error_E[best]):
        raise ValueError(f"the losses {losses.tolist()} do not fall with the sizes {sizes.tolist()}")
    exponent = float(_EXPONENTS[best])
    return PowerLaw(float(floor_E[best]), float(smallest * factor_E[best] ** (1 / exponent)), exponent)


def bootstrap(sizes: Float[np.ndarray, " S"], losses: Float[np.ndarray, "S seeds"], *, draws: int = 1000,
              seed: int = 0) -> list[PowerLaw]:
    """Fits the law again and again to seeds that are drawn with replacement (Efron, 1979).

    Args:
      sizes: the numbers of parameters.
      losses: the loss of each size and seed, in nats.
      draws: the number of fits.
      seed: the seed of the draws.

    Returns:
      The laws. A draw whose losses do not fall with the size is left out.

    Raises:
      ValueError: if there are fewer than 3 seeds, from which a band would mean nothing.
    """
    losses = np.asarray(losses, np.float64)
    if losses.ndim != 2 or losses.shape[1] < 3:
        raise ValueError(f"got losses of shape {losses.shape}; expected [sizes, seeds] with at least 3 seeds")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        drawn = rng.integers(0, losses.shape[1], losses.shape)
        try:
            found.append(fit(sizes, np.take_along_axis(losses, drawn, 1).mean(1)))
        except ValueError:
            continue
    return found


def band(laws: list[PowerLaw], sizes: Float[np.ndarray, " S"],
         level: float = 0.9) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Returns the band of losses that contains the central share of the laws.

    Args:
      laws: the laws of ``bootstrap``.
      sizes: the numbers of parameters at which to compute the band.
      level: the share of the laws.

    Returns:
      The lowest and the highest loss at each size.
    """
    losses = np.stack([law(sizes) for law in laws])
    low, high = np.quantile(losses, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
