"""Estimators made of others: one random step, the natural gradient, and their planted twins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ctrl
from ctrl.estimators import (
    AdjointMatching,
    LogVariance,
    NaturalGradient,
    OneRandomStep,
    Pathwise,
    RewardToGo,
    Score,
    ScoreFunction,
    TemporalDifference,
    ValueGradient,
    fisher,
)
from ctrl.testing import assert_mean, assert_unbiased, setups


def gradient(problem, policy, grid):
    return ctrl.exact.evaluate(problem, policy, grid).gradient.theta


# ------------------------------------------------------------------------------------------- one random step


@given(setups(max_patterns=2**9), st.lists(st.integers(1, 9), min_size=5, max_size=5))
def test_one_random_step_is_unbiased_for_any_probabilities(setup, odds):
    """The step is one more variable of the rule; also around estimators that couple paths."""
    p, value = np.array(odds[: setup.grid.steps]) / sum(odds[: setup.grid.steps]), ctrl.exact.value(*setup)
    for form in (ScoreFunction(), RewardToGo(), LogVariance(), TemporalDifference(value), ValueGradient(value), Pathwise()):
        assert_unbiased(OneRandomStep(form), *setup)
        assert_unbiased(OneRandomStep(form, p), *setup)


class WithoutItsProbability(OneRandomStep):
    """Planted: as if all probabilities were 1/N."""

    def cotangents(self, run):
        u, p = super().cotangents(run), self._odds(run.grid)
        return u * run.grid.steps * p[:, None]


class OfTheWholeSum(OneRandomStep):
    """Planted: the term of the step times nothing."""

    def cotangents(self, run):
        return super().cotangents(run) * self._odds(run.grid)[:, None]


@pytest.mark.parametrize("wrong", [WithoutItsProbability, OfTheWholeSum])
def test_planted_probabilities_are_rejected(bench, wrong):
    with pytest.raises(AssertionError, match="biased"):
        assert_unbiased(wrong(Pathwise(), [0.5, 0.2, 0.3]), *bench(), tolerance=1e-2)


def test_one_random_step_of_a_biased_form_has_its_mean(bench):
    setup = bench()
    signs = ctrl.Noise.signs(*setup)
    inner, outer = (form(*setup, signs) for form in (AdjointMatching(), OneRandomStep(AdjointMatching(), [0.5, 0.2, 0.3])))
    np.testing.assert_allclose(outer.mean, inner.mean, rtol=1e-11)
    assert np.trace(outer.covariance) > np.trace(inner.covariance)
    assert OneRandomStep(AdjointMatching()).claim == AdjointMatching().claim


def test_one_random_step_on_random_paths(bench):
    """Steps drawn by the noise itself: the mean is grad J, and slices draw the same steps."""
    setup, noise = bench(), ctrl.Noise(21, 60_000)
    target = gradient(*setup)
    assert_mean(OneRandomStep(Pathwise(), [0.2, 0.3, 0.5])(*setup, noise), target, resolves=0.2 * np.linalg.norm(target))
    p = np.array([0.2, 0.3, 0.5])
    np.testing.assert_array_equal(noise.choice(p)[500:900], noise[500:900].choice(p))


def test_one_random_step_says_what_it_expects(bench):
    for odds in ([0.5, 0.5], [0.5, 0.5, 0.1], [1.0, 0.0, 0.0]):
        with pytest.raises(ValueError, match="probabilities"):
            OneRandomStep(Pathwise(), odds)(*bench(), ctrl.Noise(0, 8))
    with pytest.raises(ValueError, match="other way round"):
        OneRandomStep(NaturalGradient(Pathwise(), np.eye(6)))


# ------------------------------------------------------------------------------------------- Fisher, natural gradient


@given(setups(max_patterns=2**6))
def test_fisher_is_the_covariance_of_the_score(setup):
    """Its mean and covariance by 3 nodes (degree 4 in a variable), against the sum over steps."""
    F, score = fisher(*setup, ctrl.Noise.signs(*setup)), Score()(*setup, ctrl.Noise.gauss_hermite(*setup, nodes=3))
    scale = np.max(np.abs(F))
    assert np.max(np.abs(score.mean)) <= 1e-10 * np.sqrt(scale)
    assert np.max(np.abs(score.covariance - F)) <= 1e-9 * scale
    assert np.max(np.abs(score.covariance - F / 2)) > 0.1 * scale  # planted: the missing 2


def test_fisher_by_the_cross_rule(bench):
    """Any number of steps; the same as by the theorem's exact laws."""
    from ctrl import zoo
    from ctrl.theorems import performance_difference
    from ctrl.theorems.verdict import Case

    case = Case("reference", zoo.gaussian_pull_2d(0.7), quick=True, seed=0, steps=40)
    expected = performance_difference.fisher(performance_difference.walked(case)[0])
    setup = case.problem, case.policy, case.grid
    np.testing.assert_allclose(fisher(*setup, ctrl.Noise.cross(*setup)), expected, rtol=1e-10)
    with pytest.raises(ValueError, match="eta"):
        fisher(*bench(eta=0.0), ctrl.Noise(0, 8))


@pytest.mark.parametrize("discount", [0.0, 0.4])
def test_natural_gradient_is_unbiased_for_its_own_target(bench, away, discount):
    setup = bench(discount=discount)
    F, signs = fisher(*setup, ctrl.Noise.cross(*setup)), ctrl.Noise.signs(*setup)
    target = np.linalg.solve(F, gradient(*setup))
    for form in (RewardToGo(), LogVariance(), OneRandomStep(Pathwise()), TemporalDifference(ctrl.exact.value(*setup))):
        assert away(NaturalGradient(form, F), *setup, signs, target) <= 1e-9
        assert away(NaturalGradient(form, F / 2), *setup, signs, target) > 0.9  # planted: the missing 2
        assert away(NaturalGradient(form, np.diag(np.diag(F))), *setup, signs, target) > 0.1  # planted: the diagonal alone
    assert NaturalGradient(RewardToGo(), F).claim.of == "F^-1 grad J"
    with pytest.raises(ValueError, match="fisher"):
        NaturalGradient(RewardToGo(), -F)


def test_natural_gradient_does_not_depend_on_the_parameters(bench):
    """theta = A phi: the step in theta is the same, where the plain gradient's is not."""
    problem, policy, grid = bench()
    A = np.eye(6) + 0.3 * np.triu(np.ones((6, 6)))
    noise = ctrl.Noise.cross(problem, policy, grid)
    F, g = fisher(problem, policy, grid, noise), Pathwise()(problem, policy, grid, noise).mean
    natural, other = np.linalg.solve(F, g), A @ np.linalg.solve(A.T @ F @ A, A.T @ g)
    np.testing.assert_allclose(other, natural, rtol=1e-9)
    assert np.linalg.norm(A @ A.T @ g - g) > 0.3 * np.linalg.norm(g)
