"""Baselines and the log-variance: least variance, coupled paths, and gradients of what they are called after."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

import ctrl
from ctrl.estimators import Bias, LogVariance, RewardToGo, Score, ScoreFunction, best_constant
from ctrl.noise import ArrayNoise
from ctrl.testing import assert_unbiased, setups

# ------------------------------------------------------------------------------------------- the best constant


@settings(max_examples=8)
@given(setups(dim=1, max_steps=3))
def test_best_constant_is_the_vertex_of_the_variance(setup):
    """Exact second moments by 4 nodes: tr Cov(F - b S) is a parabola of curvature E S'S whose vertex is b; the plain mean return is not."""
    noise = ctrl.Noise.gauss_hermite(*setup, nodes=4)
    square = np.trace(Score()(*setup, noise).covariance)
    for form in (ScoreFunction, RewardToGo):
        b = best_constant(*setup, noise, form())
        trace = {step: float(np.trace(form(b + step)(*setup, noise).covariance)) for step in (-0.5, 0.0, 0.5)}
        for step in (-0.5, 0.5):
            assert abs(trace[step] - trace[0.0] - step**2 * square) <= 1e-9 * max(trace.values())
        assert_unbiased(form(b), *setup)


def test_planted_mean_return_is_not_the_best_constant(bench):
    setup = bench(dim=1)
    noise = ctrl.Noise.gauss_hermite(*setup, nodes=4)
    best, mean = best_constant(*setup, noise), ctrl.exact.evaluate(*setup).objective
    traces = [np.trace(ScoreFunction(b)(*setup, noise).covariance) for b in (best, mean, 0.0)]
    assert abs(best - mean) > 0.3 and traces[0] < 0.995 * traces[1] < traces[2]


def test_best_constant_of_another_batch_comes_close(bench):
    setup = bench(dim=1)
    exact, found = (best_constant(*setup, noise) for noise in (ctrl.Noise.gauss_hermite(*setup, nodes=4), ctrl.Noise(5, 40_000)))
    assert abs(found / exact - 1) < 0.05


# ------------------------------------------------------------------------------------------- log-variance


@given(setups(max_patterns=2**10))
def test_log_variance_is_unbiased_on_policy(setup):
    """In large batches (the other path integrated out)."""
    assert_unbiased(LogVariance(), *setup)


def pairs(problem, policy, grid):
    """All batches of two paths made of sign patterns, with equal weights."""
    rule = ctrl.Noise.signs(problem, policy, grid)
    start, steps = rule.start(problem.dim), rule.steps(grid.steps, problem.dim)
    return [ArrayNoise(start[[a, b]], steps[[a, b]]) for a in range(rule.paths) for b in range(rule.paths)]


class OwnMean(LogVariance):
    """Planted: the variance over n, not n - 1."""

    def prepared(self, batch, noise):
        return replace(super().prepared(batch, noise), factor=1.0)


def test_log_variance_on_products_of_two_paths(bench):
    setup = bench(dim=1, steps=2)
    expected = ctrl.exact.evaluate(*setup).gradient.theta
    means = {form: np.mean([form()(*setup, pair).mean for pair in pairs(*setup)], axis=0) for form in (LogVariance, OwnMean)}
    assert np.linalg.norm(means[LogVariance] - expected) <= 1e-10 * np.linalg.norm(expected)
    np.testing.assert_allclose(means[OwnMean], 0.5 * expected, rtol=1e-10)


def log_density(problem, policy, grid, states):
    """log p(X_1 ... X_N | X_0) of the chain, from its states alone, (n,)."""
    c, out = problem.coefficients(grid), 0.0
    for i in range(grid.steps):
        x, y = states[:, i], states[:, i + 1]
        mean = x + c.dt[i] * (-c.f[i] * x + c.h[i] * policy.mean(grid, i, x))
        out = out - 0.5 * np.sum((y - mean) ** 2, axis=1) / c.noise[i] ** 2
    return out


@pytest.mark.parametrize("moved", [None, 0.3], ids=["on policy", "paths of theta_old"])
@pytest.mark.parametrize("eta", [0.7, 1.0])
def test_log_variance_is_a_gradient_of_the_sample_variance(bench, eta, moved):
    """On fixed paths: -lambda times central differences of 1/2 Var_n(r/lambda - log p_theta/p_pre), densities from the states alone."""
    problem, policy, grid = bench(eta=eta)
    old = policy if moved is None else policy.with_theta(policy.theta + moved)
    noise = ctrl.Noise(3, 64)
    paths = ctrl.simulate(problem, old, grid, noise, trajectory=True)
    base = paths.reward / problem.kl_weight + log_density(problem, problem.pretrained(grid), grid, paths.states)

    def half_variance(theta):
        return 0.5 * np.var(base - log_density(problem, policy.with_theta(theta), grid, paths.states), ddof=1)

    steps = 1e-3 * np.eye(policy.theta.size)
    slope = np.array([8 * (half_variance(policy.theta + s) - half_variance(policy.theta - s))
                      - half_variance(policy.theta + 2 * s) + half_variance(policy.theta - 2 * s) for s in steps]) / 12e-3
    measured = LogVariance(None if moved is None else old.theta)(problem, policy, grid, noise).mean
    np.testing.assert_allclose(measured, -problem.kl_weight * slope, rtol=0, atol=1e-7 * np.linalg.norm(measured))


def test_log_variance_away_from_theta_old_is_another_gradient(bench, away):
    problem, policy, grid = bench(dim=1, steps=2)
    noise = ctrl.Noise.gauss_hermite(problem, policy, grid, nodes=8)
    form = LogVariance(policy.theta + 0.3)
    assert form.claim.bias is Bias.PRESENT and away(form, problem, policy, grid, noise) > 0.05


def test_log_variance_needs_a_price_and_independent_paths(bench):
    with pytest.raises(ValueError, match="kl_weight"):
        LogVariance()(*bench(kl_weight=0.0), ctrl.Noise(0, 8))
    with pytest.raises(ValueError, match="independent paths"):
        LogVariance()(*bench(), ctrl.Noise(0, 8, antithetic=True))
