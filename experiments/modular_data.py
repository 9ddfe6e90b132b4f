"""The additions modulo a prime of ``experiments.modular_addition``, and the frequencies of vectors
that belong to numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

PRIME = 59
EQUALS = PRIME  # the token after the two numbers, at which the model answers


class Additions:
    """All pairs of numbers with their sums modulo ``PRIME``, a part of which is for training.

    Attributes:
      train: rows of the training pairs: two numbers, ``EQUALS``, and the answer ``[B, 4]``.
      held_out: the rows of all other pairs.
    """

    def __init__(self, seed: int, share: float, *, is_random: bool = False):
        """Draws the training pairs.

        Args:
          seed: the seed.
          share: the share of the pairs to train on.
          is_random: whether random answers take the place of the sums, so that there is nothing to
            learn but the single pairs.
        """
        rng = np.random.default_rng((4321, seed))
        first, second = np.divmod(rng.permutation(PRIME**2), PRIME)
        answers = rng.integers(0, PRIME, PRIME**2) if is_random else (first + second) % PRIME
        rows = np.stack([first, second, np.full(PRIME**2, EQUALS), answers], axis=1).astype(np.int32)
        self.train, self.held_out = np.split(rows, [int(share * PRIME**2)])

    def draw(self, rng: np.random.Generator, num_rows: int) -> dict[str, np.ndarray]:
        """Draws a batch of training pairs, in which only the answer is predicted."""
        rows = self.train[rng.choice(len(self.train), num_rows, replace=False)]
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:],
                "weights": np.tile(np.float32([0, 0, 1]), (num_rows, 1))}


class Waves:
    """The discrete Fourier transform over the numbers from 0 to ``PRIME`` - 1, in real form.

    Frequency k, from 1 to (``PRIME`` - 1) / 2, is the span of cos(2 pi k n / p) and sin(2 pi k n /
    p), as functions of the number n. These planes, together with the constants, are orthogonal to
    each other and span all functions.
    """

    frequencies = tuple(range(1, (PRIME - 1) // 2 + 1))

    def __init__(self):
        """Computes the basis."""
        angles_KP = 2 * np.pi * np.outer(self.frequencies, np.arange(PRIME)) / PRIME
        self._basis_K2P = np.sqrt(2 / PRIME) * np.stack([np.cos(angles_KP), np.sin(angles_KP)], axis=1)

    def shares(self, vectors_PD: Float[np.ndarray, "P D"]) -> Float[np.ndarray, " K"]:
        """Computes which share of the squared norm of vectors each frequency has.

        Args:
          vectors_PD: a vector for each number. Their mean is not counted.

        Returns:
          The shares, which sum to one.
        """
        powers_K = np.square(self._basis_K2P @ vectors_PD).sum((1, 2))
        return powers_K / powers_K.sum()

    def part(self, vectors_PD: Float[np.ndarray, "P D"], chosen: Sequence[int] | Int[np.ndarray, " chosen"],
             turned_by: float = 0.0) -> Float[np.ndarray, "P D"]:
        """Computes the part of vectors that has some frequencies.

        Args:
          vectors_PD: a vector for each number.
          chosen: the frequencies.
          turned_by: by how much the phases move: the result at number n is then that of number n +
            ``turned_by``.

        Returns:
          The part of each vector. The parts of all frequencies and the mean vector sum to the
          vectors.
        """
        basis_KP2 = self._basis_K2P[np.asarray(chosen, int) - 1]
        angles_K = 2 * np.pi * np.asarray(chosen, int) * turned_by / PRIME
        cosines, sines = np.cos(angles_K)[:, None], np.sin(angles_K)[:, None]
        turned_K2P = np.stack([basis_KP2[:, 0] * cosines - basis_KP2[:, 1] * sines,
                               basis_KP2[:, 1] * cosines + basis_KP2[:, 0] * sines], axis=1)
        return np.einsum("kcp,kcd->pd", turned_K2P, basis_KP2 @ vectors_PD)
