"""Variants by their noise: antithetic pairs and randomised quasi-Monte Carlo, with standard errors over their independent units."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

import ctrl
from ctrl.estimators import DDPO, LeaveOneOut, LogVariance, Pathwise, RewardToGo, ScoreFunction, contract, runs
from ctrl.noise import ArrayNoise
from ctrl.testing import assert_mean


def gradient(problem, policy, grid):
    return ctrl.exact.evaluate(problem, policy, grid).gradient.theta


# ------------------------------------------------------------------------------------------- antithetic pairs


@pytest.mark.parametrize("estimator", [ScoreFunction(), RewardToGo(sampled_kl=True), Pathwise()], ids=lambda e: type(e).__name__)
def test_pairs_have_the_mean_of_paths(bench, estimator):
    """Over all sign patterns with their mirror images beside them: the pair's mean is grad J, as an identity."""
    setup = problem, _, grid = bench(steps=2)
    rule = ctrl.Noise.signs(*setup)
    start, steps = (np.repeat(z, 2, axis=0) for z in (rule.start(problem.dim), rule.steps(grid.steps, problem.dim)))
    start[1::2] *= -1
    steps[1::2] *= -1
    found = estimator(*setup, ArrayNoise(start, steps, group=2))
    assert found.count == rule.paths and np.linalg.norm(found.mean - gradient(*setup)) <= 1e-10 * np.linalg.norm(found.mean)
    start[1::2] += 0.5  # planted: partners that are not mirror images
    assert np.linalg.norm(estimator(*setup, ArrayNoise(start, steps, group=2)).mean - gradient(*setup)) > 1e-2 * np.linalg.norm(found.mean)


def test_antithetic_pathwise_gradient_of_a_shift_has_no_spread(bench):
    """Odd in the noise around its mean: every pair is the exact gradient; single paths are not."""
    problem, _, grid = bench()
    policy = ctrl.BasisPolicy.shift(problem, [0.2, -0.1])
    pairs, paths = (Pathwise()(problem, policy, grid, ctrl.Noise(4, 1000, antithetic=antithetic)) for antithetic in (True, False))
    target = gradient(problem, policy, grid)
    assert np.max(np.abs(pairs.samples - target)) <= 1e-12 * np.linalg.norm(target) and np.max(np.abs(paths.samples - target)) > 0.5


# ------------------------------------------------------------------------------------------- scrambled Sobol points


@lru_cache
def spreads(points, replicates=32):
    """(means (2, p), standard errors (2, p) of Sobol replicates, of as many independent paths, target) of the reward-to-go and pathwise forms."""
    problem = ctrl.zoo.gaussian_pull_2d(0.7)
    policy, grid = ctrl.BasisPolicy.scaled(problem, 0.9, [0.1, 0.1]), problem.grid(4)
    sobol, plain = ctrl.Noise.sobol(problem, policy, grid, seed=3, points=points, replicates=replicates), ctrl.Noise(7, points * replicates)
    found = [[form(problem, policy, grid, noise) for form in (RewardToGo(), Pathwise())] for noise in (sobol, plain)]
    assert all(g.count == replicates for g in found[0])
    return found, gradient(problem, policy, grid)


def test_sobol_means_are_unbiased_with_errors_over_replicates():
    """Student's law at 31 degrees of freedom; the error stated as if paths were independent is wrong by a factor (planted)."""
    (sobol, plain), target = spreads(2**10)
    for estimate in sobol:
        assert_mean(estimate, target, resolves=0.1 * np.linalg.norm(target))
    single = np.sqrt(np.diag(plain[1].covariance) / plain[1].count)
    assert np.max(sobol[1].standard_error / single) < 0.15 and np.max(sobol[0].standard_error / plain[0].standard_error) < 0.7


def test_sobol_errors_fall_faster_than_independent_ones():
    """From 2^6 to 2^12 points the pathwise error falls by more than 2^4.5 (independent paths: 2^3)."""
    few, many = (spreads(points)[0][0][1].standard_error for points in (2**6, 2**12))
    assert np.all(few / many > 2**4.5)


def test_sobol_replicates_survive_chunks_and_streams(bench, monkeypatch):
    """A replicate longer than a chunk is averaged as one; moments without samples are the same."""
    setup = bench()
    noise = ctrl.Noise.sobol(*setup, seed=1, points=64, replicates=4)
    whole = [form(*setup, noise) for form in (Pathwise(), RewardToGo())]
    with monkeypatch.context() as patch:
        patch.setattr(contract, "SAMPLES_LIMIT", 0)
        patch.setattr(contract, "CHUNK_BYTES", 2000)
        assert max(len(run.states) for run in runs(*setup, noise)) < 64
        streamed = [form(*setup, noise) for form in (Pathwise(), RewardToGo())]
    for a, b in zip(whole, streamed, strict=True):
        assert a.count == b.count == 4 and b.samples is None
        np.testing.assert_allclose(b.mean, a.mean, rtol=1e-11)
        np.testing.assert_allclose(b.covariance, a.covariance, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("form", [ScoreFunction(LeaveOneOut()), LogVariance(), DDPO()], ids=lambda e: type(e).__name__)
def test_coupled_paths_refuse_replicates(bench, form):
    with pytest.raises(ValueError, match="independent paths"):
        form(*bench(), ctrl.Noise.sobol(*bench(), seed=0, points=16))
