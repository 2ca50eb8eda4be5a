"""The yardstick against the exact tilt of Gaussian data, and its error bars against repetition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2, norm

import ctrl
from ctrl.torch.yardstick import average, ideal_frontier, yardstick

MEAN, SD, SLOPE, KL_WEIGHT = 0.4, 0.8, 0.8, 0.7
EVEN = norm.ppf((np.arange(400_000) + 0.5) / 400_000)  # midpoints of equal probability, in the place of normals


def exact(kl_weight):
    """r = SLOPE x, x ~ N(MEAN, SD^2): the tilt is N(MEAN + SLOPE SD^2/lambda, SD^2)."""
    spread = (SLOPE * SD) ** 2
    return SLOPE * MEAN + spread / (2 * kl_weight), SLOPE * MEAN + spread / kl_weight, spread / (2 * kl_weight**2)


def test_yardstick_is_the_exact_tilt():
    r = SLOPE * (MEAN + SD * EVEN)
    found = yardstick(r, KL_WEIGHT)
    assert np.allclose((found.objective, found.reward, found.kl), exact(KL_WEIGHT), rtol=2e-4)
    assert found.ess / len(r) == pytest.approx(np.exp(-((SLOPE * SD / KL_WEIGHT) ** 2)), rel=2e-2)
    assert found.mean(r) == pytest.approx(found.reward, abs=1e-12)
    inverted = yardstick(r, 1 / KL_WEIGHT)  # planted: lambda and 1/lambda exchanged
    assert not np.allclose((inverted.objective, inverted.reward, inverted.kl), exact(KL_WEIGHT), rtol=2e-2)


def test_frontier_has_slope_lambda():
    """dE*[r]/dKL* = lambda and dJ*/dlambda = -KL* (envelope), on one set of samples, up to the step in lambda."""
    r = SLOPE * (MEAN + SD * EVEN)
    low, high = ideal_frontier(r, [0.999 * KL_WEIGHT, 1.001 * KL_WEIGHT])
    assert (low.reward - high.reward) / (low.kl - high.kl) == pytest.approx(KL_WEIGHT, rel=1e-5)
    assert (high.objective - low.objective) / (high.kl_weight - low.kl_weight) == pytest.approx(-yardstick(r, KL_WEIGHT).kl, rel=1e-5)


def test_average_over_contexts():
    """Each context's own optimum, then the mean; one of all samples together would also choose the context."""
    near, far = SLOPE * (MEAN + SD * EVEN), SLOPE * (MEAN + 2 + SD * EVEN)
    parts = [yardstick(r, KL_WEIGHT) for r in (near, far)]
    found, r = average(parts), np.stack([near, far], axis=1).ravel()
    objective, reward, kl = exact(KL_WEIGHT)
    assert np.allclose((found.objective, found.reward, found.kl), (objective + SLOPE, reward + SLOPE, kl), rtol=2e-4)
    assert found.mean(r) == pytest.approx(found.reward) and found.ess == parts[0].ess
    assert found.objective_error == pytest.approx(parts[0].objective_error / 2**0.5, rel=1e-6)
    assert yardstick(r, KL_WEIGHT).objective > found.objective + 0.1
    assert average(parts[:1]) is parts[0]
    with pytest.raises(ValueError, match="parts: expected as many samples of each context, got 400000, 3"):
        average([parts[0], yardstick(near[:3], KL_WEIGHT)])


def test_standard_errors_are_those_of_repetition():
    """400 repetitions of 2,000 samples: (n - 1) s^2 / s.e.^2 is chi-square up to a few per cent of its mean; false alarms 1e-6."""
    rows = [yardstick(SLOPE * (MEAN + SD * ctrl.Noise(seed, 2_000).start(1)[:, 0]), KL_WEIGHT) for seed in range(400)]
    low, high = chi2.ppf([0.5e-6, 1 - 0.5e-6], len(rows) - 1) / (len(rows) - 1)
    for name in ("objective", "reward", "kl"):
        spread = np.var([getattr(row, name) for row in rows], ddof=1)
        claimed = np.mean([getattr(row, f"{name}_error") ** 2 for row in rows])
        assert 0.9 * low < spread / claimed < 1.1 * high, name
        assert not 0.9 * low < spread / (4 * claimed) < 1.1 * high, name  # planted: twice the standard error


def test_refusals():
    with pytest.raises(ValueError, match="kl_weight: expected a finite number > 0, got 0"):
        yardstick([1.0, 2.0], 0)
    with pytest.raises(ValueError, match="rewards: expected at least 2 samples, got 1"):
        yardstick([1.0], 1)
    with pytest.raises(ValueError, match="rewards: expected finite numbers"):
        yardstick([1.0, np.inf], 1)
    with pytest.raises(ValueError, match=r"values: expected shape \(2,\)"):
        yardstick([1.0, 2.0], 1).mean([1.0])
