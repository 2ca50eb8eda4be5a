"""What depends on the grid: every verdict holds, the defects add up, planted policies are what they say, a broken clock is seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ctrl import Gaussian, LinearReward, Problem, exact, zoo
from ctrl.evidence import fitted_order
from ctrl.exact.limit import LimitValue
from ctrl.policy import BasisPolicy
from ctrl.reward import CallableReward
from ctrl.schedule import OU, VE, SubVP
from ctrl.theorems.step_size import GEOMETRIC, INDEXED, PARABOLIC, QUADRATIC, TRAINED, UNIFORM, Indexed, StepSize, Study, counted, facts
from ctrl.theorems.step_size import fraction, moving, slope, step_defects
from ctrl.theorems.verdict import Case
from ctrl.verify import _rows

THEOREM = StepSize()


def small(**changes) -> Case:
    return Case("gaussian", replace(zoo.gaussian_pull_2d(), **changes), quick=True, seed=0)


@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.mixture_bump_1d])
def test_every_verdict_holds(make):
    rows = list(THEOREM.checks(Case(make.__name__, make(), quick=True, seed=0)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert {row.check for row in rows} >= {"exact", "monte_carlo", "limit", "planted"}
    planted = [row.reason for row in rows if row.check == "planted"]
    for what in (*(what for what, *_ in INDEXED), "KL where the sum lacks D, made right", "KL where the variance lacks D, made right",
                 "sum lacks D, between", "variance lacks D, between"):
        assert any(what in reason for reason in planted), what
    assert not any("underpowered" in row.reason for row in rows)
    assert all(row.reason for row in rows if row.check == "skipped")


def test_reference_numbers():
    """Section 17: J and KL on a hundred steps, and J of the continuous-time policy."""
    case = small()
    measured = facts(exact.evaluate(case.problem, case.policy, UNIFORM.grid(case.problem, 100)))
    np.testing.assert_allclose(measured, [-2.6947972678526515, 0.1762947512058871], rtol=1e-12)
    np.testing.assert_allclose(exact.limit.evaluate(case.problem, case.policy).objective, -2.676588976153, rtol=1e-12)


@pytest.mark.parametrize("family", [UNIFORM, QUADRATIC, PARABOLIC, GEOMETRIC], ids=lambda f: f.name)
def test_grids_end_at_the_horizon(family):
    problem = replace(zoo.gaussian_pull_2d(), schedule=OU(3.0, horizon=0.7))
    for steps in (1, 7, 1000):
        grid = family.grid(problem, steps)
        assert grid.steps == steps and grid.times[-1] == 0.7


@pytest.mark.parametrize("changes", [{"discount": 0.6}, {"eta": 0.0, "kl_weight": 2.0}, {"eta": 0.5, "start": "exact"}])
def test_defects_add_up_to_the_error(changes):
    case = small(**changes)
    policy, value = moving(case.problem), exact.limit.value(case.problem, moving(case.problem))
    value = exact.limit.value(case.problem, policy)
    J = exact.limit.evaluate(case.problem, policy).objective
    for family in (UNIFORM, QUADRATIC, GEOMETRIC):
        grid = family.grid(case.problem, 9)
        error = exact.evaluate(case.problem, policy, grid).objective - J
        assert abs(error) > 1e-3
        np.testing.assert_allclose(step_defects(case.problem, policy, grid, value).sum(), error, rtol=1e-8)


def test_one_defect_is_of_second_order():
    """Local order 2: N defects of O(1/N^2) make a global order of 1."""
    study = Study(small())
    value, steps = exact.limit.value(study.problem, study.policy), np.array([40, 80, 160, 320])
    middle = [step_defects(study.problem, study.policy, study.problem.grid(int(n)), value)[n // 2] for n in steps]
    assert abs(fitted_order(1 / steps, np.array(middle)).slope - 2) < 0.01


def test_romberg_is_the_limit():
    """The extrapolation that stands for a limit on the line, on a linear chain where the limit is known."""
    study = Study(Case("gaussian", zoo.gaussian_pull_2d(), quick=False, seed=0))
    np.testing.assert_allclose(study.extrapolated(facts), study.limit, rtol=1e-6)
    np.testing.assert_allclose(study.extrapolated(slope), study.gradient, rtol=1e-5)


@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.mixture_bump_1d])
def test_planted_policies_are_right_on_the_grid_of_training_and_nowhere_else(make):
    problem = make()
    policy, trained = moving(problem), UNIFORM.grid(problem, TRAINED)
    right = facts(exact.evaluate(problem, policy, trained))
    for clock in (counted, fraction):
        for table in (True, False):
            wrong = Indexed(policy, clock, table)
            np.testing.assert_allclose(facts(exact.evaluate(problem, wrong, trained)), right, rtol=1e-10)
    for _, clock, table, family in INDEXED:
        grid = family.grid(problem, 2 * TRAINED)
        gap = facts(exact.evaluate(problem, Indexed(policy, clock, table), grid)) - facts(exact.evaluate(problem, policy, grid))
        assert np.abs(gap).max() > 1e-2


def test_planted_policies_have_their_derivatives():
    problem = zoo.mixture_bump_1d()
    wrong, grid, x = Indexed(moving(problem), fraction, True), QUADRATIC.grid(problem, 12), np.array([[0.3], [-1.1]])
    h = 1e-6
    numeric = (wrong.mean(grid, 7, x + h) - wrong.mean(grid, 7, x - h)) / (2 * h)
    np.testing.assert_allclose(wrong.jacobian_x(grid, 7, x)[:, :, 0], numeric, rtol=1e-6)
    for j, unit in enumerate(np.eye(wrong.theta.size)):
        numeric = (wrong.with_theta(wrong.theta + h * unit).mean(grid, 7, x) - wrong.with_theta(wrong.theta - h * unit).mean(grid, 7, x)) / (2 * h)
        np.testing.assert_allclose(wrong.jacobian_theta(grid, 7, x)[:, :, j], numeric, atol=1e-8)
    parts = wrong.parts(grid)
    assert parts.laws is not None
    np.testing.assert_allclose(x @ parts.K[7].T + parts.k[7] + parts.laws[7].score(x), wrong.mean(grid, 7, x), rtol=1e-12)


def test_a_continuous_value_that_drifts_fails_and_says_so(monkeypatch):
    true = LimitValue.__call__
    monkeypatch.setattr(LimitValue, "__call__", lambda self, t, x: true(self, t, x) + 1e-6 * (1 - t))
    rows = list(THEOREM._defects(Study(small())))
    assert rows and not any(row.holds for row in rows) and "against" in rows[0].reason


def test_a_clock_that_counts_steps_fails(monkeypatch):
    """BasisPolicy itself reading the step index: its action, its J and its KL depend on the grid."""
    parts, mean = BasisPolicy.parts, BasisPolicy.mean
    monkeypatch.setattr(BasisPolicy, "mean", lambda self, grid, i, x: Indexed(self, fraction, False).mean(grid, i, x))
    assert next(row.holds for row in THEOREM._action(small()) if row.check == "exact") is False
    monkeypatch.setattr(BasisPolicy, "mean", mean)
    monkeypatch.setattr(BasisPolicy, "parts", lambda self, grid: Indexed(self, fraction, False).parts(grid))
    case = small()
    failed = [row.reason for row in (*THEOREM._orders(Study(case)), *THEOREM._transfer(Study(case))) if row.holds is False]
    assert any("quadratic grids" in reason for reason in failed) and any("one theta" in reason for reason in failed)
    assert not any("uniform grids" in reason for reason in failed)
    monkeypatch.setattr(BasisPolicy, "parts", parts)


@pytest.mark.parametrize("problem", [
    replace(zoo.gaussian_pull_2d(), kl_weight=0.0), replace(zoo.gaussian_pull_2d(), entropy_weight=0.2, discount=0.5),
    replace(zoo.gaussian_pull_2d(), reward=LinearReward([0.0, 0.0]), kl_weight=0.0), replace(zoo.gaussian_pull_2d(), eta=0.0),
    replace(zoo.gaussian_pull_2d(), schedule=OU(4.0), start="exact"), replace(zoo.mixture_bump_1d(), schedule=SubVP(0.1, 10.0), kl_weight=0.0),
    replace(zoo.gaussian_pull_2d(), schedule=VE(0.5, 3.0)), replace(zoo.mixture_bump_1d(), schedule=VE(0.5, 3.0)),
    Problem(OU(3.0), Gaussian([0.5], [[0.4]]), CallableReward(lambda x: np.sin(x[:, 0])), 0.3)],
    ids=lambda problem: f"{type(problem.schedule).__name__}-{type(problem.reward).__name__}")
def test_a_users_problem_is_judged_or_skipped(problem):
    rows = list(_rows(THEOREM, Case("mine", problem, quick=True, seed=3, own=True)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert rows


def test_figure_draws():
    figure = THEOREM.figure(small())
    assert len(figure.axes) == 3 and all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
