"""The theorem of the deterministic sampler holds on small cases, catches what it plants, and fails when a formula is broken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.mathtext import MathTextParser

from ctrl import OU, VE, BasisPolicy, Gaussian, QuadraticReward, SubVP, exact, zoo
from ctrl.estimators import Pathwise, ScoreFunction
from ctrl.theorems import deterministic_sampler
from ctrl.theorems.deterministic_sampler import (DEPLOYED, DeterministicSampler, closed_gap, deployed, kl_step, refused, reward_gap, reward_gap_limit,
                                                 score_gap, tilted_reward, under)
from ctrl.theorems.verdict import Case

THEOREM = DeterministicSampler()


def reference(steps=40, **changes):
    return Case("gaussian", replace(zoo.gaussian_pull_2d(), **changes), quick=True, seed=0, steps=steps)


@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.mixture_bump_1d])
def test_every_verdict_holds(make):
    rows = list(THEOREM.checks(Case(make.__name__, make(), quick=True, seed=0)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert {row.check for row in rows} >= {"exact", "monte_carlo", "limit", "planted"}
    planted = [row.reason for row in rows if row.check == "planted"]
    for what in ("Girsanov weight", "h = g²", "g² for h in the gradient", "g² for h in the rate", "whose noise moved nothing"):
        assert any(what in reason for reason in planted), what
    assert any("without its Fisher term" in reason for reason in planted) or make is zoo.mixture_bump_1d  # there in the full run
    assert not any("underpowered" in row.reason for row in rows)


def test_the_table_of_one_action_under_four_etas():
    """theory.md, section 17: E r of one mu, N = 100."""
    case = reference(steps=100)
    expected = {0.0: -2.7333752736297385, 0.5: -2.697303367648141, 1.0: -2.606649892249708, 1.5: -2.528596061481667}
    for eta in DEPLOYED:
        np.testing.assert_allclose(exact.evaluate(case.at(eta).problem, case.policy, case.grid).expected_reward, expected[eta], rtol=1e-12)
        np.testing.assert_allclose(closed_gap(case, eta, case.policy, case.grid), expected[eta] - expected[0.0], atol=1e-12)
    J = deployed(case, case.grid)
    np.testing.assert_allclose(np.diag(J), [-1.100048620006444, -1.4452359772048147, -1.3921577814829753, -1.3920514250665799], rtol=1e-12)


@pytest.mark.parametrize("start", ["prior", "exact"])
@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.gaussian_8d])
def test_gap_step_by_step(make, start):
    for steps in (16, 33):
        case = Case("gap", replace(make(), start=start, discount=0.3), quick=True, seed=0, steps=steps)
        for eta in DEPLOYED[1:]:
            gap = reward_gap(case, eta, case.policy, case.grid)
            np.testing.assert_allclose(closed_gap(case, eta, case.policy, case.grid), gap, rtol=1e-10)


def test_gap_vanishes_only_for_the_score_of_its_own_laws():
    """In the limit the pre-trained action from p_T has no gap, and another action keeps one."""
    case = reference(start="exact")
    own = BasisPolicy.shift(case.problem, [0.0, 0.0])
    run, still = (exact.limit.evaluate(under(case, eta).problem, own).expected_reward for eta in (1.5, 0.0))
    assert abs(run - still) < 1e-9 < 0.1 < abs(reward_gap_limit(case, 1.5))
    grids = [case.problem.grid(n) for n in (1000, 2000)]
    coarse, fine = (score_gap(case, 1.5, case.problem.pretrained(grid), grid) for grid in grids)
    np.testing.assert_allclose(coarse / fine, 2, atol=0.02)  # nothing but O(D)
    assert abs(fine) < 0.03 * abs(score_gap(case, 1.5, case.policy, grids[1]))


def test_optimum_of_eta_one_is_the_tilts_score():
    problem = zoo.gaussian_pull_2d()
    r, data = problem.reward.quadratic(2), problem.data
    precision = data.precision + r.matrix / problem.kl_weight
    tilt = Gaussian(np.linalg.solve(precision, data.precision @ data.mean + r.vector / problem.kl_weight), np.linalg.inv(precision))
    best = exact.limit.optimum(problem).policy
    for t in (0.2, 0.7):
        tau = problem.schedule.tau(t)
        law = tilt.noised(problem.schedule.alpha(tau), problem.schedule.v(tau))
        K, k = best.affine_at(t)
        np.testing.assert_allclose(K, -law.precision, atol=1e-10)
        np.testing.assert_allclose(k, law.precision @ law.mean, atol=1e-10)
    x = tilt.mean + np.sqrt(2) * np.concatenate([np.eye(2), -np.eye(2)]) @ np.linalg.cholesky(tilt.cov).T
    np.testing.assert_allclose(tilted_reward(problem), problem.reward.value(x).mean(), rtol=1e-12)


def test_optimum_of_eta_one_under_other_etas():
    rows = list(THEOREM._faithful(replace(reference(), quick=False)))
    assert len(rows) == 2 and all(row.holds for row in rows)
    assert [row.expected for row in rows] == [1.0, 1.25]


def test_rate_of_the_marginal_kl_on_the_line():
    for eta in (0.0, 1.0):
        problem = zoo.mixture_bump_1d(eta)
        case = Case("line", problem, quick=True, seed=0).at(eta)
        (coarse, push, fisher), (fine, finer_push, finer_fisher) = (kl_step(case.problem, case.policy, n) for n in (48, 96))
        assert abs(2 * (fine - finer_push + finer_fisher) - (coarse - push + fisher)) < 2e-2 * abs(fine)
        assert (fisher == 0) == (eta == 0)
        if eta > 0:
            assert abs(fine - finer_push) > 0.5 * finer_fisher  # without its Fisher term the rate is another


def test_the_rate_without_its_fisher_term_is_caught_on_the_line():
    rows = list(THEOREM._rates_on_the_line(Case("line", zoo.mixture_bump_1d(), quick=False, seed=0).at(1.0)))
    assert all(row.holds for row in rows)
    assert any("without its Fisher term" in row.reason for row in rows if row.check == "planted")


def test_an_open_problem_keeps_its_adjoint():
    rows = list(THEOREM.checks(Case("digits_plane", zoo.digits_plane(), quick=True, seed=0)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert any("path by path" in row.reason for row in rows if row.check == "exact")
    assert all(row.reason for row in rows if row.check == "skipped")


@pytest.mark.parametrize(("make", "changes"), [
    (zoo.gaussian_pull_2d, {"kl_weight": 0.0, "discount": 0.7}), (zoo.gaussian_pull_2d, {"entropy_weight": 0.3, "eta": 0.0}),
    (zoo.gaussian_pull_2d, {"schedule": VE(0.5, 3.0), "start": "exact"}), (zoo.gaussian_pull_2d, {"schedule": SubVP(0.1, 10.0)}),
    (zoo.gaussian_pull_2d, {"reward": QuadraticReward(np.zeros((2, 2)), np.zeros(2))}),
    (zoo.mixture_bump_1d, {"discount": 0.5, "entropy_weight": 0.1, "eta": 0.0}), (zoo.mixture_bump_1d, {"schedule": OU(4.0), "kl_weight": 0.0})])
def test_users_problems(make, changes):
    rows = list(THEOREM.checks(Case("own", replace(make(), **changes), quick=True, seed=2, own=True)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert sum(row.check == "exact" for row in rows) >= 5


def test_a_form_that_does_not_refuse_is_named(monkeypatch):
    monkeypatch.setattr(ScoreFunction, "__call__", lambda self, problem, policy, grid, noise: None)
    row = next(iter(THEOREM._refusals(under(reference(), 0.0))))
    assert not row.holds and "not from score function" in row.reason
    assert not refused(lambda: int("no number"))  # another ValueError is no refusal


def test_a_broken_adjoint_fails_and_says_so(monkeypatch):
    true = Pathwise.cotangents
    monkeypatch.setattr(Pathwise, "cotangents", lambda self, run: true(self, run) * 1.0001)
    rows = [row for row in THEOREM._gradient(under(reference(), 0.0)) if row.check == "exact"]
    assert [row.holds for row in rows] == [False, True]
    assert "pathwise" in rows[0].reason and "measured" in rows[0].reason


def test_a_broken_gap_fails(monkeypatch):
    monkeypatch.setattr(deterministic_sampler, "closed_gap", lambda case, eta, policy, grid: 1.01 * closed_gap(case, eta, policy, grid))
    assert any("step by step" in row.reason for row in THEOREM._gaps(reference()) if row.holds is False)


def test_formulas_can_be_typeset():
    for formula in THEOREM.formulas:
        MathTextParser("agg").parse(f"${formula}$")


def test_figure_draws():
    figure = THEOREM.figure(Case("gaussian_pull_2d", zoo.gaussian_pull_2d(), quick=True, seed=0))
    assert len(figure.axes) == 4 and all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
