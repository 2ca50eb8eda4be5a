"""What a number is evidence of: tests of a mean with stated error rates, and fitted orders (theory.md, section 0)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.special import ndtri, stdtrit

from ctrl import check
from ctrl.check import Array

FALSE_ALARM = 1e-6
MISS = 1e-3


@dataclass(frozen=True)
class MeanTest:
    r"""A two-sided test that a mean equals what theory says, coordinate by coordinate.

        |z_j| = |mean_j - expected_j| / se_j  <=  threshold = F^{-1}(1 - false_alarm / (2 p))

    F is Student's law at the degrees of freedom of the standard error, normal when these are not known.
    p coordinates share one false-alarm probability (Bonferroni). The numbers are those of the worst coordinate.
    resolves : the smallest error of the worst-resolved coordinate that is caught with probability 1 - miss,
        ( threshold + z_miss sqrt(1 + threshold^2 / (2 freedom)) ) max_j se_j
    Assumes that the mean of n samples is close to normal (n in the thousands, finite variance).
    Source: theory.md, section 0; TensorFlow Probability's statistical testing.
    Checked: tests/test_testing.py::test_error_rates_are_as_stated
    """

    mean: float
    expected: float
    standard_error: float
    z: float
    threshold: float
    resolves: float

    @property
    def holds(self) -> bool:
        return bool(abs(self.z) <= self.threshold)


def mean_test(samples: Array, expected: Array | float, *, false_alarm: float = FALSE_ALARM,
              miss: float = MISS) -> MeanTest:
    """Test samples (n,) or (n, p) against an expected mean, a number or (p,)."""
    x = np.asarray(samples, dtype=np.float64)
    x = x.reshape(len(x), -1)
    standard_error = x.std(axis=0, ddof=1) / np.sqrt(len(x))
    return estimate_test(x.mean(axis=0), standard_error, expected, false_alarm=false_alarm, miss=miss,
                         freedom=len(x) - 1)


def estimate_test(mean: Array, standard_error: Array, expected: Array | float, *, false_alarm: float = FALSE_ALARM,
                  miss: float = MISS, freedom: int | None = None) -> MeanTest:
    """Test an estimate (p,) with standard errors (p,) of so many degrees of freedom (None: many), as in mean_test."""
    mean, standard_error = np.atleast_1d(mean), np.atleast_1d(standard_error)
    expected = np.broadcast_to(np.asarray(expected, dtype=np.float64), mean.shape)
    gap = mean - expected
    # A zero standard error leaves no room for chance: any gap above rounding is infinitely many standard errors.
    floor = 1e-13 * np.maximum(np.abs(expected), np.abs(mean))
    z = gap / np.maximum(standard_error, np.maximum(floor, 1e-300))
    quantile = ndtri if freedom is None else partial(stdtrit, freedom)
    threshold = float(-quantile(false_alarm / (2 * mean.size)))
    worst = int(np.argmax(np.abs(z)))
    resolves = separation(threshold, freedom, miss) * float(standard_error.max())
    return MeanTest(float(mean[worst]), float(expected[worst]), float(standard_error[worst]), float(z[worst]),
                    threshold, resolves)


def separation(threshold: float, freedom: int | None = None, miss: float = MISS) -> float:
    """How many standard errors away a mean must be for a test at this threshold to see it with probability 1 - miss.

    A random standard error widens the law of the statistic around a wrong mean (noncentral t, second order).
    """
    return threshold - float(ndtri(miss)) * (1.0 if freedom is None else float(np.sqrt(1 + threshold**2 / (2 * freedom))))


@dataclass(frozen=True)
class Order:
    """A fitted order of convergence and its standard error."""

    slope: float
    standard_error: float


def fitted_order(dt: Array, error: Array) -> Order:
    r"""The slope p of  log|error| = a + p log D + b D,  by least squares: the term b D takes up the next order.

    dt, error : (m,), m >= 4.   Source: theory.md, section 0.   Checked: tests/test_testing.py::test_fitted_order
    """
    dt, error = np.asarray(dt, dtype=np.float64), np.abs(np.asarray(error, dtype=np.float64))
    design = np.stack([np.ones_like(dt), np.log(dt), dt / dt.max()], axis=1)
    solution, *_ = np.linalg.lstsq(design, np.log(error), rcond=None)
    residual = np.log(error) - design @ solution
    covariance = np.linalg.inv(design.T @ design) * float(residual @ residual) / max(len(dt) - 3, 1)
    return Order(float(solution[1]), float(np.sqrt(covariance[1, 1])))


def fitted_power(x: Array, y: Array) -> Order:
    r"""The slope p of  log y = a + p log x,  by least squares, with the standard error that the scatter about the line implies.

    x, y : (m,), m >= 3, positive.   Source: theory.md, section 0.   Checked: tests/test_testing.py::test_planted_exponents_are_found
    """
    x, y = check.array("x", x, (None,), "(m,)"), check.array("y", y, (None,), "(m,)")
    if not 3 <= len(x) == len(y):
        raise ValueError(f"x, y: expected at least 3 pairs, got {len(x)} and {len(y)}")
    if min(x.min(), y.min()) <= 0:
        raise ValueError(f"x, y: expected positive numbers, got {min(x.min(), y.min()):g}")
    u, v = np.log(x), np.log(y)
    centred = u - u.mean()
    slope = float(centred @ v / (centred @ centred))
    residual = v - v.mean() - slope * centred
    return Order(slope, float(np.sqrt(residual @ residual / (len(u) - 2) / (centred @ centred))))
