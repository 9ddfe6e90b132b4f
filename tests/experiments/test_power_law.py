"""The fit of a power law against laws that are known, and its confidence band."""

import numpy as np
import pytest

from experiments import power_law

SIZES = np.array([1e4, 3e4, 1e5, 3e5, 1e6])


def test_a_law_without_noise_is_found():
    law = power_law.PowerLaw(floor=1.2, scale=5e4, exponent=0.35)
    np.testing.assert_allclose(law(SIZES), 1.2 + (5e4 / SIZES) ** 0.35)
    found = power_law.fit(SIZES, law(SIZES))
    assert (found.floor, found.scale, found.exponent) == pytest.approx((1.2, 5e4, 0.35), rel=1e-6)


def test_the_floor_is_never_negative():
    found = power_law.fit(SIZES, 6 - 0.3 * np.log(SIZES))
    assert found.floor >= 0 and np.abs(found(SIZES) - (6 - 0.3 * np.log(SIZES))).max() < 0.2


def test_the_band_covers_the_law_about_as_often_as_it_says():
    law, covered = power_law.PowerLaw(1.2, 5e4, 0.35), []
    for trial in range(30):
        noise = np.random.default_rng(trial).normal(0, 0.02, (5, 8))
        laws = power_law.bootstrap(SIZES, law(SIZES)[:, None] + noise, draws=60, seed=trial)
        low, high = power_law.band(laws, np.array([1e5]))
        covered.append(bool(low[0] <= law(np.array([1e5]))[0] <= high[0]))
        assert high[0] - low[0] < 0.06
    assert 0.65 <= np.mean(covered) <= 1.0


def test_what_cannot_be_fitted():
    with pytest.raises(ValueError, match="at least 4 different sizes"):
        power_law.fit(SIZES[:3], np.ones(3))
    with pytest.raises(ValueError, match="do not fall with the sizes"):
        power_law.fit(SIZES, SIZES)
    with pytest.raises(ValueError, match="at least 3 seeds"):
        power_law.bootstrap(SIZES, np.ones((5, 2)))
