"""The Gibbs theorem holds on small cases, catches what it plants, and fails when a formula is broken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.mathtext import MathTextParser
from scipy.optimize import minimize

from ctrl import OU, VE, VP, BumpReward, Gaussian, Problem, QuadraticReward, SubVP, exact, zoo
from ctrl.exact.chain import LinearChain
from ctrl.policy import AffinePolicy
from ctrl.theorems import gibbs_exploration
from ctrl.theorems.gibbs_exploration import GibbsExploration, action_values, behaviour, continuous, fall, gibbs, improved, regularised
from ctrl.theorems.value import Solved, random_states
from ctrl.theorems.verdict import Case

THEOREM = GibbsExploration()


def reference(eta=1.0, steps=40, **changes):
    return regularised(Case("gaussian", replace(zoo.gaussian_pull_2d(), **changes), quick=True, seed=0, steps=steps), eta)


@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.mixture_bump_1d])
def test_every_verdict_holds(make):
    rows = list(THEOREM.checks(Case(make.__name__, make(), quick=True, seed=0)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert {row.check for row in rows} == {"exact", "monte_carlo", "limit", "planted", "skipped"}
    planted = [row.reason for row in rows if row.check == "planted"]
    for what in ("covariance γ λ g²", "2 missing", "that of eta = 1", "entropy as a cost", "entropy without D", "entropy counted in r and in q"):
        assert any(what in reason for reason in planted), what
    assert not any("underpowered" in row.reason for row in rows)


def test_the_gaussian_is_the_maximiser_by_brute_force():
    """E_a Q + gamma D H over all means and Cholesky factors of a Gaussian, climbed from the policy's own."""
    case = reference(0.5, steps=10)
    i, x, gamma = 6, random_states(case, 6)[:1], case.problem.entropy_weight
    value = exact.value(case.problem, case.exploring, case.grid)
    nodes = np.sqrt(2) * np.concatenate([np.eye(2), -np.eye(2)])

    def loss(theta):
        factor = np.array([[theta[2], 0.0], [theta[3], theta[4]]])
        a = theta[:2] + nodes @ factor.T
        Q = np.mean(value.action_value(i, np.tile(x, (4, 1)), a))
        return -Q / case.grid.dt[i] - gamma * (1 + np.log(2 * np.pi) + np.log(abs(theta[2] * theta[4])))

    best = minimize(loss, np.array([0.0, 0.0, 0.6, 0.1, 0.6]), method="BFGS", options={"gtol": 1e-9}).x
    star = improved(case.problem, case.exploring, case.grid)
    factor = np.array([[best[2], 0.0], [best[3], best[4]]])
    np.testing.assert_allclose(best[:2], star.mean(case.grid, i, x)[0], atol=1e-5)
    np.testing.assert_allclose(factor @ factor.T, star.exploration[i], atol=1e-5)


@pytest.mark.parametrize("dim", [1, 2])
def test_gibbs_density_is_its_gaussian(dim):
    """Where Q is quadratic the quadrature's density has the closed form's mean and covariance."""
    line = Problem(VP(0.1, 10.0), Gaussian([0.5], [[0.4]]), QuadraticReward([[1.0]], [1.0]), kl_weight=0.5)
    case = reference() if dim == 2 else regularised(Case("line", line, quick=True, seed=0), 1.0)
    i, value = 20, exact.value(case.problem, case.exploring, case.grid)
    x = random_states(case, i)
    found, star = gibbs(case, value, i, x), improved(case.problem, case.exploring, case.grid)
    np.testing.assert_allclose(found.mass.sum(axis=0), 1, rtol=1e-13)
    np.testing.assert_allclose(found.mean, star.mean(case.grid, i, x), rtol=1e-10)
    np.testing.assert_allclose(found.cov, np.broadcast_to(star.exploration[i], found.cov.shape), rtol=1e-9, atol=1e-12)
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * star.exploration[i])[1]
    at_mean = value.action_value(i, x, star.mean(case.grid, i, x)) / (case.problem.entropy_weight * case.grid.dt[i])
    np.testing.assert_allclose(found.value, at_mean - 0.5 * dim + entropy, rtol=1e-10)  # E Q = Q(mean) - d/2 in units of gamma D


def test_continuous_formula_falls_at_second_order():
    """The policy is O(D) from the optimum, where J is flat: halving D divides the fall by 4, not by 2."""
    for eta in (1.0, 0.5, 0.0):
        falls = [fall(reference(eta).problem, reference(eta, steps=n).grid) for n in (160, 320, 640)]
        assert falls[0] > falls[1] > falls[2] > 0
        np.testing.assert_allclose([falls[0] / falls[1], falls[1] / falls[2]], 4, atol=0.1)


def test_continuous_rounds_can_lower_J_and_gibbs_rounds_cannot():
    case = reference(steps=160)
    J = {}
    for make in (improved, continuous):
        policy, values = case.exploring, []
        for _ in range(6):
            policy = make(case.problem, policy, case.grid)
            values.append(exact.evaluate(case.problem, policy, case.grid).objective)
        J[make] = np.diff(values)
    assert J[improved].min() > -1e-14
    assert J[continuous].min() < -1e-5


@pytest.mark.parametrize("changes", [{"discount": 0.4, "entropy_weight": 0.3, "start": "exact"}, {"schedule": VE(0.5, 3.0), "eta": 0.0},
                                     {"schedule": SubVP(0.1, 10.0)}, {"schedule": OU(1.0), "kl_weight": 1.0}])
def test_users_problems(changes):
    rows = list(THEOREM.checks(Case("own", replace(zoo.gaussian_pull_2d(), **changes), quick=True, seed=2, own=True)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert sum(row.check == "exact" for row in rows) > 15


@pytest.mark.parametrize(("changes", "reason"), [
    ({"kl_weight": 0.0}, "λ = 0"), ({"reward": QuadraticReward(-3 * np.eye(2), np.zeros(2))}, "no maximiser"),
    ({"reward": QuadraticReward(np.zeros((2, 2)), np.zeros(2))}, "not visible on this problem")])
def test_users_problems_without_a_maximiser_or_a_reward(changes, reason):
    rows = list(THEOREM.checks(Case("own", replace(zoo.gaussian_pull_2d(), **changes), quick=True, seed=2, own=True)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert any(reason in row.reason for row in rows if row.check == "skipped")


def test_the_last_step_of_an_open_problem():
    open_problem = Problem(VP(0.1, 10.0), Gaussian([0.5, 0.0, 0.0], 0.4 * np.eye(3)), BumpReward([1.0, 0.0, 0.0], 0.5), kl_weight=0.3)
    assert {row.check for row in THEOREM.checks(Case("three", open_problem, quick=True, seed=0, own=True))} == {"skipped"}
    case = regularised(Case("plane", zoo.digits_plane(), quick=True, seed=0), 1.0)
    rows = list(THEOREM._last_step(case))
    assert [row.reason for row in rows if row.holds is False] == []
    assert {row.check for row in rows} == {"exact", "planted", "monte_carlo", "skipped"}


def test_action_values_by_spline():
    """Along paths on the line a spline stands in for Q: to 1e-8 of the exact one."""
    from ctrl.estimators import runs

    case = regularised(Case("line", zoo.mixture_bump_1d(), quick=True, seed=0), 1.0)
    value, collector = Solved(case, case.exploring, "").value, behaviour(case.problem, case.grid)
    run = next(runs(case.problem, collector, case.grid, case.noise("spline", 2000)))
    by_spline = action_values(run, value)
    for i in (0, 20, 39):
        np.testing.assert_allclose(by_spline[:, i], value.action_value(i, run.states[:, i], run.actions[:, i]), atol=1e-8)


def test_a_broken_covariance_fails_and_says_so(monkeypatch):
    def doubled(problem, policy, grid):
        star = improved(problem, policy, grid)
        return AffinePolicy(star.K, star.k, 2 * star.exploration)

    monkeypatch.setattr(gibbs_exploration, "improved", doubled)
    at = Solved(reference(), reference().exploring, "sampled actions")
    row = next(iter(THEOREM._gibbs_law(at)))
    assert row.check == "exact" and not row.holds and "measured" in row.reason
    failed = [row.reason for row in THEOREM._iteration(at, exact.optimum(at.case.problem, at.case.grid)) if not row.holds]
    assert any("policy iteration" in reason for reason in failed)


def test_a_value_without_entropy_fails(monkeypatch):
    monkeypatch.setattr(LinearChain, "entropy_rate", property(lambda self: np.zeros(self.grid.steps)))
    at = Solved(reference(), reference().exploring, "sampled actions")
    assert [row.holds for row in THEOREM._conditions(at) if row.check == "exact"] == [False]


def test_formulas_can_be_typeset():
    for formula in THEOREM.formulas:
        MathTextParser("agg").parse(f"${formula}$")


def test_figure_draws():
    figure = THEOREM.figure(Case("gaussian_pull_2d", zoo.gaussian_pull_2d(), quick=True, seed=0))
    assert len(figure.axes) == 4 and all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
