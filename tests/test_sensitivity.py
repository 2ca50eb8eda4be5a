"""How small a planted error the checks still see: the stated resolution, confirmed by repetition with fresh noise."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import ndtr
from scipy.stats import binom

import ctrl
from ctrl.estimators import Analytic, KLForm, RewardToGo, ScoreFunction, runs
from ctrl.evidence import MISS, estimate_test, mean_test, separation
from ctrl.exact.chain import LinearChain
from ctrl.noise import Noise
from ctrl.theorems.path_kl import PathKL, wrong_rates
from ctrl.theorems.policy_gradient import Distorted, PolicyGradient, pattern_steps
from ctrl.theorems.verdict import Case, Verdict

REPEATS = 400
BINOMIAL = 1e-6  # chance that a count of a right library falls outside what is allowed
KL, GRADIENT = PathKL(), PolicyGradient()


def case(steps, eta=0.5):
    return Case("gaussian_pull_2d", ctrl.zoo.gaussian_pull_2d(eta=eta), quick=True, seed=3, steps=steps)


SHORT = case(5)


def blend(right, wrong, share):
    return (1 - share) * right + share * wrong


@pytest.mark.parametrize("what", [what for what, _, invisible in wrong_rates(case(40)) if not invisible])
def test_exact_errors_are_caught_from_their_resolution_on(what):
    """No chance in it: a hundredth above the resolution every error is caught, a hundredth below it none."""
    at = case(40)
    squared, c = LinearChain(at.problem, at.policy, at.grid).mean_departure, at.problem.coefficients(at.grid)
    weight = next(weight for name, weight, _ in wrong_rates(at) if name == what)
    row = KL.planted(at, weight @ squared, at.truth.path_kl, 1e-9, what)
    assert row.holds and row.resolution < 1e-7
    for factor, holds in ((1.01, False), (0.99, True)):
        claimed = blend(c.kappa * c.dt, weight, factor * row.resolution) @ squared
        assert KL.exact(at, claimed, at.truth.path_kl, 1e-9, what).holds is holds


def test_an_exact_error_of_an_estimator_is_caught_from_its_resolution_on():
    """KL as a per-step loss on detached states, 2.4 % of the gradient: sign patterns see 4e-9 of it."""
    at = case(6)
    assert at.steps == pattern_steps(at)
    truth, noise = at.truth.gradient.theta, Noise.signs(at.problem, at.policy, at.grid)
    size = np.linalg.norm(truth)
    right, wrong = (estimator(at.problem, at.policy, at.grid, noise).mean / size for estimator in (RewardToGo(), KLForm(None, Analytic())))
    row = GRADIENT.planted(at, wrong, truth / size, 1e-10, "detached")
    assert row.holds and row.resolution < 1e-7
    for factor, holds in ((1.01, False), (0.99, True)):
        assert GRADIENT.exact(at, blend(right, wrong, factor * row.resolution), truth / size, 1e-10, "detached").holds is holds


def path_kl_samples(what, paths):
    """Per path the right and the wrong claim of a path KL, each (REPEATS, paths), and the exact one."""
    at = case(10)
    c, rates = at.problem.coefficients(at.grid), {name: weight for name, weight, _ in wrong_rates(at)}
    squared = np.concatenate([np.sum(run.departure**2, axis=2) for run in
                              runs(at.problem, at.policy, at.grid, at.noise("repeated KL", REPEATS * paths))])
    return *((squared @ weight).reshape(REPEATS, paths) for weight in (c.kappa * c.dt, rates[what])), at.truth.path_kl


def gradient_samples(right, wrong, paths, paired):
    """Per path the derivative along theta_0 by two estimators; against the exact one, or beside the score function."""
    batches = []
    for run in runs(SHORT.problem, SHORT.policy, SHORT.grid, SHORT.noise("repeated gradient", REPEATS * paths)):
        base = ScoreFunction().samples(run)[:, 0] if paired else 0.0
        batches.append([estimator.samples(run)[:, 0] - base for estimator in (right, wrong)])
    samples = np.concatenate(batches, axis=1).reshape(2, REPEATS, paths)
    return samples[0], samples[1], 0.0 if paired else SHORT.truth.gradient.theta[0]


PLANTED = {
    "path KL, mean over dimensions": lambda: path_kl_samples("mean over dimensions", 1000),
    "path KL, time step missing in the sum: ten times the noise": lambda: path_kl_samples("time step missing in the sum", 1000),
    "path KL, time step missing in the variance: a tenth of the noise": lambda: path_kl_samples("time step missing in the variance", 1000),
    "gradient, mean over steps, against the exact one": lambda: gradient_samples(
        RewardToGo(), Distorted(noise_factor=lambda run: run.score_noise / run.grid.steps), 4000, paired=False),
    "gradient, reward folding, beside the score function": lambda: gradient_samples(RewardToGo(), KLForm(Analytic(), None), 1000, paired=True)}


def pooled(samples, expected):
    """The test of one repetition with the mean and deviation of all: its row's numbers without their own noise."""
    return estimate_test(samples.mean(), samples.std(ddof=1) / math.sqrt(samples.shape[1]), expected, freedom=samples.shape[1] - 1)


@pytest.mark.parametrize("what", PLANTED)
def test_sampled_errors_are_missed_as_often_as_said(what):
    """At its resolution an error is missed once in a thousand repetitions; at half of it, as often as its z predicts.

    400 repetitions each; a right library fails one of the two counts with probability below 3e-6 (binomial tails). Samples in the
    thousands are assumed: score-function samples have skewness 5.6, and with 1000 of them misses are twenty times as frequent.
    """
    right, wrong, expected = PLANTED[what]()
    row = KL.planted_sampled(case(10), pooled(wrong, expected), what, right=pooled(right, expected))
    assert row.holds and row.resolution < 1

    def caught(share):
        return sum(not mean_test(samples, expected).holds for samples in blend(right, wrong, share))

    assert REPEATS - caught(row.resolution) <= binom.isf(BINOMIAL, REPEATS, MISS)
    half = pooled(blend(right, wrong, row.resolution / 2), expected)
    spread = (separation(half.threshold, right.shape[1] - 1) - half.threshold) / (separation(half.threshold) - half.threshold)
    power = ndtr((abs(half.z) - half.threshold) / spread)
    low, high = binom.ppf(BINOMIAL, REPEATS, power), binom.isf(BINOMIAL, REPEATS, power)
    assert low <= caught(row.resolution / 2) <= high and power < 0.5


def test_without_the_right_formulas_error_a_resolution_can_flatter():
    """A wrong formula with a tenth of the noise: its own standard error would promise what the check cannot keep."""
    right, wrong, expected = path_kl_samples("time step missing in the variance", 1000)
    row = KL.planted_sampled(case(10), pooled(wrong, expected), "planted", right=pooled(right, expected))
    flattered = replace(row, right_error=None).resolution
    missed = sum(mean_test(samples, expected).holds for samples in blend(right, wrong, flattered))
    assert flattered < 0.2 * row.resolution and missed > binom.isf(BINOMIAL, REPEATS, MISS)


def test_resolution_of_rows():
    """By hand: 1e-9 of an error of 0.5; (4.9 + 3.1) standard errors of one 40 away; None or inf where there is nothing to scale."""
    exact = Verdict("t", "p", "planted", 1.5, 1.0, 1e-9, None, True, "x")
    assert exact.resolution == pytest.approx(2e-9)
    test = mean_test(np.random.default_rng(0).normal(0.5, 1.0, 6400), 0.0)
    row = KL.planted_sampled(case(10), test, "x")
    assert row.resolution == pytest.approx(test.resolves / test.mean, rel=2e-3) and 0.15 < row.resolution < 0.25
    assert replace(row, right_error=test.standard_error).resolution == pytest.approx(row.resolution)
    assert replace(exact, measured=1.0).resolution == math.inf and replace(row, z=3.0, tolerance=4.9 * row.measured / 3).resolution > 2
    assert replace(exact, check="exact").resolution is None and replace(exact, measured=None).resolution is None
    assert replace(exact, measured=math.inf).resolution is None
