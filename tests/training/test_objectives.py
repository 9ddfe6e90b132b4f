"""R-Drop against NumPy in float64."""

import numpy as np

from transformer_jax.training.objectives import symmetric_divergence


def test_symmetric_divergence_is_the_mean_of_both_kullback_leibler_divergences():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4, 7))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    expected = 0.5 * ((p * np.log(p / q)).sum(-1) + (q * np.log(q / p)).sum(-1))
    np.testing.assert_allclose(symmetric_divergence(a, b), expected, rtol=1e-4)
    np.testing.assert_allclose(symmetric_divergence(a, a), 0.0, atol=1e-6)
