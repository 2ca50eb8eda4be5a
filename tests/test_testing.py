"""The tools for other people's tests: they accept what is right, reject what is wrong, refuse what they cannot tell."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import binom, chi2, norm
from scipy.stats import t as student

import ctrl
from ctrl import testing
from ctrl.estimators import FiniteDifference, Pathwise, RewardToGo, ScoreFunction, ValueGradient
from ctrl.evidence import estimate_test, fitted_order, fitted_power, mean_test
from ctrl.testing import assert_mean, assert_unbiased

# ------------------------------------------------------------------------------------------- stated error rates

RATE_OF_RATES = 1e-6


def normals(rows, columns, seed=0):
    """(rows, columns) independent standard normals, a pure function of the seed."""
    return ctrl.Noise(seed, rows).steps(columns, 1)[:, :, 0]


def plausible(count, trials, rate):
    """Whether `count` events in `trials` agree with a probability `rate`; false alarm 1e-6."""
    return binom.cdf(count, trials, rate) >= RATE_OF_RATES / 2 and binom.sf(count - 1, trials, rate) >= RATE_OF_RATES / 2


def alarms(samples, expected, **rates):
    return sum(not mean_test(row, expected, **rates).holds for row in samples)


def miss_probability(shift, threshold, freedom):
    """P(|Z + shift| <= threshold S), freedom S^2 chi-square: what a test of the mean lets pass, by quadrature over S."""
    def at(v):
        reach = threshold * np.sqrt(v / freedom)
        return chi2.pdf(v, freedom) * (norm.cdf(reach - shift) - norm.cdf(-reach - shift))
    low, high = chi2.ppf(1e-12, freedom), chi2.isf(1e-12, freedom)
    return quad(at, low, high, points=[freedom], limit=200)[0]


@pytest.mark.parametrize("n, looser", [(30, 1.1), (100, 1.05), (400, 1.02)])
@pytest.mark.parametrize("rate", [0.05, 0.01])
def test_error_rates_are_as_stated(n, looser, rate):
    """4000 tests of n samples: false alarms at the stated rate, misses as computed, within a factor `looser` of the stated.

    The binomial tests have a false alarm of 1e-6 each; they see a rate of 1 % that is off by a factor of 2.
    """
    samples = normals(4000, n)
    assert plausible(alarms(samples, 0.0, false_alarm=rate), 4000, rate)
    one = mean_test(samples[0], 0.0, false_alarm=rate, miss=rate)
    shift = one.resolves / one.standard_error
    missed = 4000 - alarms(samples + shift / np.sqrt(n), 0.0, false_alarm=rate, miss=rate)
    exact = miss_probability(shift, one.threshold, n - 1)
    assert plausible(missed, 4000, exact)
    assert rate / looser <= exact <= rate * looser


@pytest.mark.parametrize("n, looser", [(30, 1.1), (100, 1.05), (10_000, 1.01)])
def test_default_rates_are_as_stated(n, looser):
    """1e-6 and 1e-3, too rare to count, from the statistic's law."""
    one = mean_test(normals(1, n)[0], 0.0)
    shift = one.resolves / one.standard_error
    assert abs(2 * student.sf(one.threshold, n - 1) / 1e-6 - 1) < 1e-6
    assert 1e-3 / looser <= miss_probability(shift, one.threshold, n - 1) <= 1e-3 * looser


def test_coordinates_share_the_false_alarm():
    """Five independent coordinates: 1 - (1 - rate/5)^5 of the tests ring."""
    samples, rate = normals(4000, 250, seed=1).reshape(4000, 50, 5), 0.05
    assert plausible(alarms(samples, np.zeros(5), false_alarm=rate), 4000, 1 - (1 - rate / 5) ** 5)


def test_planted_thresholds_are_rejected():
    """A one-sided quantile, normal quantiles at n = 5, and no sharing among coordinates: other rates than stated."""
    samples, rate = normals(4000, 5), 0.05
    means, errors = samples.mean(axis=1), samples.std(axis=1, ddof=1) / np.sqrt(5)
    normal = sum(not estimate_test(m, s, 0.0, false_alarm=rate).holds for m, s in zip(means, errors, strict=True))
    assert not plausible(normal, 4000, rate)
    assert not plausible(int(np.sum(np.abs(means) > -student.ppf(rate, 4) * errors)), 4000, rate)
    five = normals(4000, 250, seed=1).reshape(4000, 50, 5)
    alone = sum(any(not mean_test(row[:, j], 0.0, false_alarm=rate).holds for j in range(5)) for row in five[:1000])
    assert not plausible(alone, 1000, rate)


# ------------------------------------------------------------------------------------------- assert_mean


def test_assert_mean_refuses_underpowered():
    """The refusal names a number of samples that is enough: with it the test runs."""
    samples = normals(1, 200_000)[0]
    with pytest.raises(ValueError, match="would do") as refused:
        assert_mean(samples[:1000], 0.0, resolves=0.05)
    enough = int(re.search(r"about (\d+) would do", str(refused.value)).group(1))
    assert 20_000 < enough < 32_000
    assert assert_mean(samples[: int(1.1 * enough)], 0.0, resolves=0.05).holds
    with pytest.raises(ValueError, match="would do"):
        assert_mean(samples[: int(0.9 * enough)], 0.0, resolves=0.05)


def test_assert_mean_rejects_what_it_resolves():
    samples = normals(1, 40_000)[0]
    with pytest.raises(AssertionError, match=r"\|z\| = "):
        assert_mean(samples + 0.05, 0.0, resolves=0.05)
    with pytest.raises(AssertionError):
        assert_mean(np.stack([samples, samples + 0.05], axis=1), np.zeros(2), resolves=0.05)


def test_assert_mean_without_spread():
    """A constant leaves no room for chance."""
    assert assert_mean(np.full(10, 0.25), 0.25, resolves=1e-9).holds
    with pytest.raises(AssertionError):
        assert_mean(np.full(10, 0.25), 0.25 + 1e-9, resolves=1e-9)


def test_batches_are_means_of_consecutive_samples():
    samples = np.exp(normals(1, 20_000)[0])
    result = assert_mean(samples, np.exp(0.5), resolves=0.2, batches=200)
    means = samples.reshape(200, 100).mean(axis=1)
    assert abs(result.standard_error - means.std(ddof=1) / np.sqrt(200)) < 1e-12
    assert abs(result.mean - samples.mean()) < 1e-12
    assert abs(result.threshold + student.ppf(5e-7, 199)) < 1e-9


def test_assert_mean_takes_a_gradient():
    problem, policy, grid = bench()
    expected = ctrl.exact.evaluate(problem, policy, grid).gradient.theta
    gradient = Pathwise()(problem, policy, grid, ctrl.Noise(2, 20_000, antithetic=True))
    assert assert_mean(gradient, expected, resolves=0.3).holds
    with pytest.raises(AssertionError):
        assert_mean(gradient, expected + 0.3, resolves=0.3)
    exact = Pathwise()(problem, policy, grid, ctrl.Noise.signs(problem, policy, grid))
    with pytest.raises(ValueError, match="assert_unbiased"):
        assert_mean(exact, expected, resolves=0.1)


@pytest.mark.parametrize("bad, name", [
    (dict(samples=np.array([1.0, np.nan])), "samples"), (dict(samples=np.ones(1)), "samples"),
    (dict(resolves=0.0), "resolves"), (dict(false_alarm=0.0), "false_alarm"), (dict(miss=0.7), "miss"),
    (dict(batches=3), "batches"), (dict(batches=1), "batches")])
def test_assert_mean_names_the_argument(bad, name):
    arguments = dict(samples=np.linspace(-1, 1, 100), expected=0.0, resolves=10.0) | bad
    with pytest.raises(ValueError, match=name):
        assert_mean(**arguments)


# ------------------------------------------------------------------------------------------- fitted orders


@pytest.mark.parametrize("order", [0.5, 1, 2])
def test_fitted_order(order):
    """D^p (1 + D/3) with 1 % of noise: the slope within 4 standard errors, and not p + 1/2."""
    dt = 0.1 * 0.5 ** np.arange(8)
    fit = fitted_order(dt, 3 * dt**order * (1 + dt / 3) * np.exp(0.01 * normals(1, 8)[0]))
    assert abs(fit.slope - order) <= 4 * fit.standard_error
    assert abs(fit.slope - (order + 0.5)) > 4 * fit.standard_error and fit.standard_error < 0.05


def test_fitted_order_ignores_signs_and_the_next_order():
    dt = 0.1 * 0.5 ** np.arange(6)
    assert abs(fitted_order(dt, -(dt**2)).slope - 2) < 1e-10
    assert abs(fitted_order(dt, dt * np.exp(7 * dt)).slope - 1) < 1e-10


# ------------------------------------------------------------------------------------------- assert_unbiased


def bench(**changes):
    problem = replace(ctrl.zoo.gaussian_pull_2d(eta=0.7), **changes)
    policy = ctrl.BasisPolicy.scaled(problem, 0.8, [0.1, 0.2])
    return problem, policy, ctrl.TimeGrid([0.0, 0.1, 0.2])


class Planted(RewardToGo):
    def __init__(self, change):
        super().__init__()
        object.__setattr__(self, "change", change)

    def cotangents(self, run):
        return self.change(run, super().cotangents(run))


def mean_of(change):
    """An estimator whose mean is a change of the right one's."""
    def estimator(*arguments):
        gradient = Pathwise()(*arguments)
        return replace(gradient, mean=change(gradient.mean))
    return estimator


MISTAKES = {
    "costs in the return without their explicit gradient": Planted(lambda run, u: u - run.kl_term),
    "e_i without the costs in the return": Planted(
        lambda run, u: run.reward[:, None, None] * run.score_noise + run.kl_term),
    "no KL gradient at all": Planted(lambda run, u: run.reward[:, None, None] * run.score_noise),
    "the gradient times 0.5": mean_of(lambda mean: 0.5 * mean),
    "the gradient times -1": mean_of(np.negative)}


def test_assert_unbiased_accepts_and_rejects():
    setup = bench()
    value = ctrl.exact.value(*setup)
    for right in (ScoreFunction(), RewardToGo(value), ValueGradient(value), Pathwise()):
        assert assert_unbiased(right, *setup) <= 1e-10
    for tiny in (1e-9, -1e-9):
        with pytest.raises(AssertionError, match="coordinate 1 of 3"):
            assert_unbiased(mean_of(lambda m, tiny=tiny: m + np.linalg.norm(m) * np.array([0, tiny, 0])), *setup)
    with pytest.raises(AssertionError, match="tolerance"):
        assert_unbiased(FiniteDifference(0.2), *setup)
    with pytest.raises(AssertionError, match="nan"):
        assert_unbiased(mean_of(lambda m: np.nan * m), *setup)


@pytest.mark.parametrize("name", MISTAKES)
def test_assert_unbiased_recognises_known_mistakes(name):
    with pytest.raises(AssertionError, match=re.escape(name)):
        assert_unbiased(MISTAKES[name], *bench())


def test_assert_unbiased_does_not_guess():
    """An error that is none of the known ones gets no hint."""
    with pytest.raises(AssertionError) as rejected:
        assert_unbiased(mean_of(lambda m: m + np.array([0.1, 0.2, -0.3])), *bench())
    assert "expectation of" not in str(rejected.value)


def test_assert_unbiased_refuses_where_its_premise_fails():
    problem, policy, grid = bench()
    mixture = replace(problem, data=ctrl.GaussianMixture([0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], [np.eye(2)] * 2))
    bump = replace(problem, reward=ctrl.BumpReward([0.0, 0.0], 1.0))
    cubic = ctrl.CallablePolicy(lambda t, x, theta: theta[0] * x**3, [0.1], dim=2)
    for setup, match in (((mixture, ctrl.BasisPolicy.shift(mixture, [0.1, 0.1]), grid), "Gaussian data"),
                         ((bump, policy, grid), "quadratic reward"), ((problem, cubic, grid), "affine in x"),
                         ((problem, policy, problem.grid(9)), r"2\^20.*reduce"),
                         ((problem, policy.with_exploration(np.eye(2)), problem.grid(5)), r"2\^22.*mean actions")):
        with pytest.raises(ValueError, match=match):
            assert_unbiased(Pathwise(), *setup)
    with pytest.raises(ValueError, match="mean like policy.theta"):
        assert_unbiased(mean_of(lambda m: m[:1]), problem, policy, grid)


def test_assert_unbiased_refuses_a_zero_gradient():
    problem, policy, grid = bench(reward=ctrl.LinearReward([0.0, 0.0]), kl_weight=0.0)
    with pytest.raises(ValueError, match="not zero"):
        assert_unbiased(Pathwise(), problem, policy, grid)


def test_assert_unbiased_warns_where_it_is_blind():
    """Section 16: at lambda = 0 and at mu = s no error in the KL gradient can show, and none does."""
    problem, policy, grid = bench()
    pretrained = ctrl.BasisPolicy.scaled(problem, 1.0, [0.0, 0.0])
    for setup in (bench(kl_weight=0.0), (problem, pretrained, grid)):
        with pytest.warns(RuntimeWarning, match="invisible"):
            assert_unbiased(MISTAKES["no KL gradient at all"], *setup)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_unbiased(Pathwise(), problem, policy, grid)


# ------------------------------------------------------------------------------------------- strategies


@given(st.data(), st.integers(1, 4))
def test_small_strategies_are_valid(data, dim):
    matrix = data.draw(testing.spd_matrices(dim, 0.3, 2.0))
    assert matrix.shape == (dim, dim) and np.array_equal(matrix, matrix.T)
    assert np.linalg.eigvalsh(matrix)[0] >= 0.3 - 1e-12 and np.linalg.eigvalsh(matrix)[-1] <= 2.0 + 1e-12
    for law in (data.draw(testing.gaussians(dim)), data.draw(testing.mixtures(dim))):
        assert law.dim == dim
        assert np.linalg.cond(law.cov) < 200
    for linear in (True, False):
        reward = data.draw(testing.rewards(dim, linear))
        assert reward.gradient(np.zeros((3, dim))).shape == (3, dim)
        assert not linear or reward.quadratic(dim) is not None
    schedule = data.draw(testing.schedules())
    assert 0.5 <= schedule.horizon <= 1.5 and schedule.v(schedule.horizon) > 0


@given(st.data(), st.booleans(), st.booleans())
def test_setups_are_valid(data, linear, sampled):
    """Stable, within the patterns, kl_weight > 0, a departure from the score, one theta that runs."""
    problem, policy, grid = data.draw(testing.setups(linear=linear, sampled=sampled, etas=(0.0, *testing.ETAS), max_dim=3))
    assert problem.kl_weight > 0 and grid.times[-1] <= problem.horizon * (1 + 1e-12)
    assert problem.stability_factor(policy, grid) > -1
    assert ctrl.Noise.signs(problem, policy, grid).paths <= 3 * 2**14
    assert (policy.exploration is not None) == sampled
    x = problem.initial(ctrl.Noise(0, 5))
    for i, t in enumerate(grid.times[:-1]):
        assert np.max(np.abs(policy.mean(grid, i, x) - problem.score(t, x))) > 1e-6
    assert not linear or ctrl.exact.evaluate(problem, policy, grid).method == "chain"
    assert np.array_equal(policy.with_theta(policy.theta).theta, policy.theta)


@given(st.data())
def test_strategies_obey_their_restrictions(data):
    problem = data.draw(testing.problems(dim=2, etas=(1.4,), starts=("exact",), discounts=(0.2,)))
    assert (problem.dim, problem.eta, problem.start, problem.discount) == (2, 1.4, "exact", 0.2)
    grid = data.draw(testing.grids(problem, max_steps=2))
    assert grid.steps <= 2
    assert not isinstance(data.draw(testing.policies(problem)), ctrl.AffinePolicy)
    assert data.draw(testing.policies(problem, grid, sampled=True)).exploration is not None


def test_strategies_cover_what_they_promise():
    """Every kind of schedule, reward, policy and grid turns up."""
    seen = set()

    @given(testing.setups(linear=False))
    def look(setup):
        problem, policy, grid = setup
        seen.update({type(problem.schedule), type(problem.reward), type(problem.data), type(policy), problem.start})
        seen.add("uniform" if np.ptp(grid.dt) < 1e-12 else "uneven")
        seen.add("whole" if grid.times[-1] == problem.horizon else "part")

    look()
    assert {ctrl.VP, ctrl.SubVP, ctrl.VE, ctrl.OU, ctrl.BasisPolicy, ctrl.AffinePolicy, ctrl.MixturePolicy, ctrl.BumpReward,
            ctrl.GaussianMixture, ctrl.Gaussian, "prior", "exact", "uniform", "uneven", "whole", "part"} <= seen


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_planted_exponents_are_found(exponent):
    """Exactly without noise; with 5 % of noise within four of the standard errors that the fit states, which are the scatter's."""
    x = 2.0 ** np.arange(12)
    exact = fitted_power(x, 3 * x**exponent)
    assert exact.slope == pytest.approx(exponent, abs=1e-12) and exact.standard_error < 1e-12
    rng = np.random.default_rng(0)
    found = [fitted_power(x, 3 * x**exponent * np.exp(0.05 * rng.normal(size=x.size))) for _ in range(400)]
    slopes, errors = np.array([f.slope for f in found]), np.array([f.standard_error for f in found])
    assert abs(slopes.mean() - exponent) < 4 * slopes.std() / np.sqrt(slopes.size)
    assert errors.mean() == pytest.approx(slopes.std(), rel=0.15)
    assert abs(slopes.mean() - exponent - 0.1) > 4 * slopes.std() / np.sqrt(slopes.size)  # planted: a tenth off


@pytest.mark.parametrize(("x", "y"), [([1.0, 2.0], [1.0, 2.0]), ([1.0, 2.0, 3.0], [1.0, 2.0]), ([1.0, 2.0, 3.0], [1.0, 0.0, 2.0])])
def test_a_power_needs_positive_pairs(x, y):
    with pytest.raises(ValueError, match="x, y: expected"):
        fitted_power(np.array(x), np.array(y))
