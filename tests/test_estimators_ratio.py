"""Likelihood ratios: what PPO, DDPO and reward-weighted regression are the gradient of, exactly, and how far that is from grad J."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

import ctrl
from ctrl.estimators import DDPO, Bias, ClippedRatio, RewardWeighted, Score, runs
from ctrl.noise import ArrayNoise
from ctrl.testing import assert_mean, assert_unbiased, setups


def gradient(problem, policy, grid):
    return ctrl.exact.evaluate(problem, policy, grid).gradient.theta


def relative(measured, expected):
    return float(np.linalg.norm(measured - expected) / np.linalg.norm(expected))


# ------------------------------------------------------------------------------------------- clipped ratios


@given(setups(max_patterns=2**10))
def test_clipped_ratio_at_theta_old_is_unbiased(setup):
    """With and without clipping, whatever the baseline: every ratio is 1."""
    for form in (ClippedRatio(), ClippedRatio(clip=None), ClippedRatio(baseline=None), ClippedRatio(theta_old=setup.policy.theta, clip=0.01)):
        assert_unbiased(form, *setup)


def surrogate_gradient(problem, policy, old, grid, noise):
    r"""sum_i E_old[ (d mu_i)'( h_i D_i E grad V^old_{i+1}(X'_{i+1}) - 2 lambda kappa_i D_i (mu_i - s_i) ) ], X' one step of theta: section 8."""
    value, c, out = ctrl.exact.value(problem, old, grid), problem.coefficients(grid), 0.0
    (run,) = runs(problem, old, grid, noise)
    for i, x in enumerate(run.left):
        mu = policy.mean(grid, i, x)
        ahead = x + c.dt[i] * (-c.f[i] * x + c.h[i] * mu)  # grad V is affine: its mean is its value there
        u = c.h[i] * value.gradient(i + 1, ahead) - 2 * problem.kl_weight * c.kappa[i] * (mu - problem.score(float(grid.times[i]), x))
        samples = np.zeros((len(x), policy.theta.size))
        policy.add_vjp(samples, grid, i, x, c.dt[i] * u)
        out = out + noise.weights @ samples
    return out


class PathRatio(ClippedRatio):
    """Planted: the ratio of the whole path at every step."""

    def _weighted(self, run, advantages):
        rho = np.exp(run.log_ratio.sum(axis=1, keepdims=True))
        return (rho * advantages)[:, :, None] * run.score_noise + run.kl_term


class MeanOverDimensions(ClippedRatio):
    """Planted: log-densities averaged over two (absent) dimensions, so that the ratio is a root."""

    def _weighted(self, run, advantages):
        return (np.exp(run.log_ratio / 2) * advantages)[:, :, None] * run.score_noise / 2 + run.kl_term


def test_the_ratio_is_the_surrogates_gradient_and_clipping_comes_on_top(bench):
    """By 30 Gauss-Hermite nodes a variable; the clipped mean by 60 and 80, as it has kinks."""
    problem, policy, grid = bench(dim=1, steps=2)
    old, nodes = policy.with_theta(policy.theta + np.array([0.15, -0.4])), ctrl.Noise.gauss_hermite(problem, policy, grid, nodes=30)
    expected = surrogate_gradient(problem, policy, old, grid, nodes)
    unclipped = ClippedRatio(theta_old=old.theta, clip=None)
    for form in (unclipped, ClippedRatio(baseline=None, theta_old=old.theta, clip=None), ClippedRatio(baseline=0.7, theta_old=old.theta, clip=None)):
        assert relative(form(problem, policy, grid, nodes).mean, expected) <= 1e-9
    target = gradient(problem, policy, grid)
    assert relative(expected, target) > 0.05 and unclipped.claim.bias is Bias.PRESENT
    for wrong in (PathRatio, MeanOverDimensions):
        assert relative(wrong(baseline=None, theta_old=old.theta)(problem, policy, grid, nodes).mean, expected) > 0.02
    clipped = [ClippedRatio(theta_old=old.theta)(problem, policy, grid, ctrl.Noise.gauss_hermite(problem, policy, grid, n)).mean for n in (60, 80)]
    kinks = np.linalg.norm(clipped[0] - clipped[1])
    assert np.linalg.norm(clipped[1] - expected) > max(0.05 * np.linalg.norm(target), 5 * kinks)


def test_bias_of_the_ratio_is_first_order_in_the_distance(bench):
    """|mean - grad J(theta)| ~ |theta - theta_old|: zero at theta_old, halved with the distance."""
    problem, policy, grid = bench(dim=1, steps=2)
    noise, target = ctrl.Noise.gauss_hermite(problem, policy, grid, nodes=20), gradient(problem, policy, grid)
    forms = [ClippedRatio(theta_old=policy.theta + step, clip=None) for step in (0.04, 0.02, 0.01)]
    bias = [relative(form(problem, policy, grid, noise).mean, target) for form in forms]
    assert np.all(np.abs(np.log2(bias[:-1]) - np.log2(bias[1:]) - 1) < 0.1) and bias[-1] > 1e-4


def test_log_ratio_is_the_ratio_of_densities(bench):
    """From the states alone."""
    problem, policy, grid = bench(sampled=False)
    old, c = policy.with_theta(policy.theta + 0.2), problem.coefficients(grid)
    (run,) = runs(problem, policy, grid, ctrl.Noise(1, 50), sampler=old)
    for i in range(grid.steps):
        x, y = run.states[:, i], run.states[:, i + 1]
        far = [np.sum((y - x - c.dt[i] * (-c.f[i] * x + c.h[i] * p.mean(grid, i, x))) ** 2, axis=1) / c.noise[i] ** 2 for p in (policy, old)]
        np.testing.assert_allclose(run.log_ratio[:, i], 0.5 * (far[1] - far[0]), rtol=0, atol=1e-11)


def test_clips_are_positive():
    for make in (ClippedRatio, DDPO):
        with pytest.raises(ValueError, match="clip"):
            make(clip=0.0)


# ------------------------------------------------------------------------------------------- DDPO as published


def reward_gradient(problem, policy, grid):
    return gradient(replace(problem, kl_weight=0.0), policy, grid)


def test_ddpo_is_the_reward_gradient_over_d_std_in_large_batches(bench):
    """Two dimensions, moments of the rule itself (4 nodes: r^2 has degree 4); no multiple of it is grad J."""
    setup = bench(steps=2)
    noise = ctrl.Noise.gauss_hermite(*setup, nodes=4)
    paths = ctrl.simulate(*setup, noise)
    std = math.sqrt(noise.weights @ paths.reward**2 - (noise.weights @ paths.reward) ** 2)
    measured, target = DDPO()(*setup, noise).mean, gradient(*setup)
    assert relative(measured, reward_gradient(*setup) / (2 * std)) <= 1e-7  # + 1e-8 in the std
    assert relative(2 * std * measured, target) > 0.1
    along = measured * (measured @ target) / (measured @ measured)
    assert relative(along, target) > 0.05
    assert DDPO().claim.bias is Bias.PRESENT


def own_std(n):
    """E of the population std of n standard normals."""
    return math.sqrt(2 / n) * math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2))


def straight(bench):
    """Reward and score of the path are jointly Gaussian: a linear reward, a constant shift."""
    problem, _, grid = bench(steps=2)
    problem = replace(problem, reward=ctrl.LinearReward([1.0, -0.7]))
    return problem, ctrl.BasisPolicy.shift(problem, [0.2, -0.1]), grid


@pytest.mark.parametrize("n", [2, 4, 8])
def test_ddpo_in_batches_of_n_shrinks_by_the_mean_std(bench, n):
    """c_n = .564, .798, .903; one at infinity, 1 - 3/(4n) on the way; the limit itself is rejected for small batches."""
    problem, policy, grid = straight(bench)
    b = problem.reward.linear
    std = math.sqrt(b @ ctrl.exact.evaluate(problem, policy, grid).terminal.cov @ b)
    limit = reward_gradient(problem, policy, grid) / (2 * std)
    estimate = DDPO(batch=n, clip=None)(problem, policy, grid, ctrl.Noise(11, 2**17))
    assert estimate.count == 2**17 // n
    assert_mean(estimate, own_std(n) * limit, resolves=0.04 * np.linalg.norm(limit))
    with pytest.raises(AssertionError, match="mean"):
        assert_mean(estimate, limit, resolves=0.04 * np.linalg.norm(limit))


def test_mean_std_is_first_order_in_the_batch():
    gaps = np.array([1 - own_std(n) for n in (10, 20, 40, 80)])
    np.testing.assert_allclose(gaps * [10, 20, 40, 80], 0.75, atol=0.05)


def test_ddpo_in_one_batch_is_ddpo_in_batches_of_all(bench):
    problem, policy, grid = straight(bench)
    noise = ctrl.Noise(2, 64)
    np.testing.assert_allclose(DDPO()(problem, policy, grid, noise).mean, DDPO(batch=64)(problem, policy, grid, noise).mean, rtol=1e-9)
    for bad in (ctrl.Noise(2, 63), ctrl.Noise.signs(problem, policy, grid)):
        with pytest.raises(ValueError, match="batches of 4"):
            DDPO(batch=4)(problem, policy, grid, bad)


# ------------------------------------------------------------------------------------------- reward-weighted regression


def tilted_direction(problem, policy, grid, nodes=40):
    """-d/dtheta KL(P* || P_theta) = d/dtheta E*[log p_theta] by central differences; E* by weights e^{r/lambda} on pre-trained paths."""
    noise, c = ctrl.Noise.gauss_hermite(problem, policy, grid, nodes=nodes), problem.coefficients(grid)
    paths = ctrl.simulate(problem, problem.pretrained(grid), grid, noise, trajectory=True)
    weights = noise.weights * np.exp(paths.reward / problem.kl_weight)
    weights /= weights.sum()

    def likelihood(theta):
        at, total = policy.with_theta(theta), 0.0
        for i in range(grid.steps):
            x, y = paths.states[:, i], paths.states[:, i + 1]
            mean = x + c.dt[i] * (-c.f[i] * x + c.h[i] * at.mean(grid, i, x))
            total -= 0.5 * weights @ np.sum((y - mean) ** 2, axis=1) / c.noise[i] ** 2
        return total

    return np.array([likelihood(policy.theta + e) - likelihood(policy.theta - e) for e in 0.1 * np.eye(policy.theta.size)]) / 0.2


class NotAnchored(RewardWeighted):
    """Planted: the weight e^{r/lambda + k1}, a sign exchanged."""

    def logits(self, run):
        return run.reward / run.problem.kl_weight + run.k1.sum(axis=1)


def test_reward_weighted_direction_is_that_of_the_tilted_law(bench):
    """log p is quadratic in theta, so that differences are exact; whoever draws the paths, where anchored."""
    setup = problem, policy, _ = bench(dim=1, steps=2, kl_weight=0.8)
    noise, expected = ctrl.Noise.gauss_hermite(*setup, nodes=40), tilted_direction(*setup)
    for form in (RewardWeighted(), RewardWeighted(theta_old=policy.theta + np.array([-0.1, 0.2]))):
        assert relative(form(*setup, noise).mean, expected) <= 1e-8
    for wrong in (RewardWeighted(anchored=False), NotAnchored()):
        assert relative(wrong(*setup, noise).mean, expected) > 0.05
    target = gradient(*setup)
    assert relative(problem.kl_weight * expected, target) > 0.2
    along = expected * (expected @ target) / (expected @ expected)
    assert relative(along, target) > 0.02


def test_reward_weighted_regression_tends_to_the_gradient_where_all_weights_are_alike(bench):
    """lambda times it -> grad J for small r/lambda - k1: at the pre-trained policy, the bias is of order 1/lambda."""
    bias = []
    for kl_weight in (20.0, 40.0, 80.0):
        problem, policy, grid = bench(dim=1, steps=2, kl_weight=kl_weight)
        policy = policy.with_theta(np.zeros(2))
        noise = ctrl.Noise.gauss_hermite(problem, policy, grid, nodes=20)
        bias.append(relative(kl_weight * RewardWeighted()(problem, policy, grid, noise).mean, gradient(problem, policy, grid)))
    assert np.all(np.abs(np.log2(bias[:-1]) - np.log2(bias[1:]) - 1) < 0.1)


def test_own_normalisation_of_pairs_is_biased(bench):
    """Batches of two, all pairs of nodes: off the tilted direction by more than a tenth."""
    setup = bench(dim=1, steps=1, kl_weight=0.8)
    rule = ctrl.Noise.gauss_hermite(*setup, nodes=6)
    start, steps, w = rule.start(1), rule.steps(1, 1), rule.weights
    mean = sum(w[a] * w[b] * RewardWeighted()(*setup, ArrayNoise(start[[a, b]], steps[[a, b]])).mean for a, b in np.ndindex(w.size, w.size))
    assert relative(mean, tilted_direction(*setup)) > 0.1


def test_reward_weighted_needs_a_price(bench):
    with pytest.raises(ValueError, match="kl_weight"):
        RewardWeighted()(*bench(kl_weight=0.0), ctrl.Noise(0, 8))


# ------------------------------------------------------------------------------------------- with torch


@pytest.mark.parametrize("eta", [0.7, 1.0])
def test_definitions_are_those_of_the_torch_objectives(bench, eta):
    """The same paths and the same means: clipped ratio at theta_old, truncated pathwise, Adjoint Matching, reward-weighted regression."""
    pytest.importorskip("torch")
    from ctrl import torch as ct
    from ctrl.estimators import AdjointMatching, Pathwise

    setup, noise = bench(eta=eta, discount=0.3), ctrl.Noise(3, 64)
    pairs = [(ClippedRatio(), ct.ClippedRatio()), (ClippedRatio(baseline=None), ct.ClippedRatio(baseline=None)),
             (Pathwise(last=2), ct.Pathwise(last=2)), (AdjointMatching(), ct.AdjointMatching()),
             (RewardWeighted(), ct.RewardWeighted()), (RewardWeighted(anchored=False), ct.RewardWeighted(anchored=False))]
    for ours, theirs in pairs:
        measured = ct.estimator(theirs)(*setup, noise)
        assert relative(measured.mean, ours(*setup, noise).mean) <= 1e-10, type(ours).__name__
    assert relative(ct.estimator(ct.Pathwise(last=1))(*setup, noise).mean, Pathwise(last=2)(*setup, noise).mean) > 0.05


def test_scores_have_mean_zero_and_ratios_mean_one(bench):
    setup = bench(dim=1, steps=2)
    noise = ctrl.Noise.gauss_hermite(*setup, nodes=30)
    assert np.linalg.norm(Score()(*setup, noise).mean) <= 1e-12
    (run,) = runs(*setup, noise, sampler=setup[1].with_theta(setup[1].theta - 0.3))
    np.testing.assert_allclose(noise.weights @ np.exp(run.log_ratio), 1.0, rtol=1e-11)
