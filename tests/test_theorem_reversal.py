"""The reversal theorem on small cases: every verdict holds, other schedules too, and broken formulas make it fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ctrl import BumpReward, GaussianMixture, Problem, exact, zoo
from ctrl.evidence import fitted_order
from ctrl.schedule import OU, VE, VP, Schedule, SubVP
from ctrl.theorems import reversal
from ctrl.theorems.reversal import Reversal
from ctrl.theorems.verdict import Case

SCHEDULES = [VP(0.1, 10.0), SubVP(0.1, 10.0), OU(4.0), VE(0.5, 3.0)]


def small(schedule: Schedule | None = None, linear: bool = True) -> Case:
    problem = zoo.gaussian_pull_2d() if linear else zoo.mixture_bump_1d()
    return Case("small", problem if schedule is None else replace(problem, schedule=schedule), quick=True, seed=3)


def open_problem() -> Problem:
    """A mixture in the plane: no exact law of its chain."""
    law = GaussianMixture([0.4, 0.6], [[-1.0, 0.5], [0.8, 0.0]], [[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.4]]])
    return Problem(VP(0.1, 10.0), law, BumpReward([-1.0, 0.0], 0.5), kl_weight=0.5)


@pytest.mark.parametrize("linear", [True, False])
def test_every_verdict_holds(linear: bool) -> None:
    rows = list(Reversal().checks(small(linear=linear)))
    assert [row.reason for row in rows if row.holds is False] == []
    kinds = [row.check for row in rows]
    assert {"exact", "monte_carlo", "limit", "planted", "skipped"} <= set(kinds) and kinds.count("planted") >= 5


def test_open_problem_keeps_its_identities_and_says_what_it_skips() -> None:
    rows = list(Reversal().checks(Case("open", open_problem(), quick=True, seed=3)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert {row.check for row in rows} == {"exact", "planted", "skipped"}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_identities_and_planted_errors_on_every_schedule(schedule: Schedule) -> None:
    theorem = Reversal()
    for linear in (True, False):
        case = small(schedule, linear)
        rows = [*theorem._pointwise(case), *theorem._chain(case), *theorem._sampled(case)]
        assert [row.reason for row in rows if row.holds is False] == []
        assert any("sign of f" in row.reason and row.holds for row in rows) == (not isinstance(schedule, VE))


@pytest.mark.parametrize("schedule", SCHEDULES[1:3], ids=lambda s: type(s).__name__)
def test_order_on_sub_vp_and_ou(schedule: Schedule) -> None:
    rows = list(Reversal()._orders(small(schedule)))
    assert len(rows) == 4 and all(row.holds for row in rows), [row.reason for row in rows]


@pytest.mark.parametrize("eta", reversal.ETAS)
def test_ve_order_on_geometric_grids(eta: float) -> None:
    """Uniform grids are pre-asymptotic for VE; steps of equal ratio in sigma show order 1."""
    schedule = VE(0.1, 5.0)
    problem = replace(small(schedule).problem, eta=eta, start="exact")
    steps = np.array([160, 320, 640, 1280])
    error = np.array([reversal.law_error(problem, schedule.geometric_grid(int(n), sigma_first=1e-4)) for n in steps])
    assert abs(fitted_order(1 / steps, error).slope - 1) < 0.1, error


@pytest.mark.parametrize("linear", [True, False])
def test_log_density_rate_is_a_derivative(linear: bool) -> None:
    problem = small(linear=linear).problem
    x, t, e = np.linspace(-1.5, 1.5, 8).reshape(-1, problem.dim), 0.4, 1e-5
    central = (problem.marginal(t + e).log_density(x) - problem.marginal(t - e).log_density(x)) / (2 * e)
    np.testing.assert_allclose(reversal.log_density_rate(problem, t, x), central, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("eta", [0.0, 1.5])
def test_prior_bias_has_its_slope(schedule: Schedule, eta: float) -> None:
    problem = replace(small(schedule).problem, eta=eta)
    np.testing.assert_allclose(reversal.measured_bias(problem), reversal.prior_bias(problem), rtol=1e-7, atol=1e-11)


def test_prior_bias_does_not_vanish_with_the_step() -> None:
    problem = replace(small().problem, eta=0.0)
    grid = problem.grid(2000)
    end = exact.evaluate(problem, problem.pretrained(grid), grid).terminal.mean - problem.data.mean
    assert np.linalg.norm(end) > 0.5 * np.linalg.norm(reversal.prior_bias(problem)) > 0.01


def test_a_wrong_alpha_is_seen_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Fokker-Planck residual takes the marginals as given; the rates in time do not."""
    monkeypatch.setattr(VP, "alpha", lambda self, tau: float(np.exp(-0.49 * self.integral(tau))))
    rows = [row for row in Reversal()._pointwise(small(VP(0.2, 9.0))) if row.check == "exact"]
    assert [row.holds for row in rows] == [False, True, True, True, True]


def test_a_wrong_gain_makes_the_theorem_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """h = g^2 in the schedule: right at eta = 1, wrong elsewhere, and the verdict says by how much."""
    right = Schedule.rates

    def wrong(self: Schedule, t: float, eta: float) -> tuple[float, float, float, float]:
        f, g2, _, kappa = right(self, t, eta)
        return f, g2, g2, kappa

    monkeypatch.setattr(Schedule, "rates", wrong)
    rows = [row for row in Reversal()._pointwise(small(VP(0.2, 9.0))) if row.check == "exact" and "Fokker-Planck" in row.reason]
    assert [row.holds for row in rows] == [False, False, True, False]
    assert "measured" in rows[0].reason and "against 0" in rows[0].reason


def test_a_wrong_score_makes_chain_and_limit_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The right-point score is still of order 1: the exact twin of the chain sees it, the orders do not."""
    case = small(VP(0.2, 9.0))
    monkeypatch.setattr(Problem, "pretrained", reversal.right_point)
    limit = list(Reversal()._orders(case))
    assert all(row.holds for row in limit)
    problem = replace(case.problem, start="exact")
    grid = reversal.short_grid(problem, 2)
    wrong = exact.chain.LinearChain(problem, reversal.right_point(problem, grid), grid).moments[1][-1]
    monkeypatch.undo()
    right = exact.chain.LinearChain(problem, problem.pretrained(grid), grid).moments[1][-1]
    row = Reversal().exact(case, wrong, right, 1e-12, "covariance of X_N")
    assert row.holds is False and "measured" in row.reason and "against" in row.reason


def test_figure_draws() -> None:
    figure = Reversal().figure(small())
    assert len(figure.axes) == 3 and all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
