"""The exploration theorem on small cases: every verdict holds, other schedules too, and broken formulas make it fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ctrl import VP, BumpReward, GaussianMixture, Noise, Problem, zoo
from ctrl.check import Array
from ctrl.policy import BasisPolicy, Policy
from ctrl.rollout import simulate
from ctrl.schedule import OU, VE, Schedule, SubVP, TimeGrid
from ctrl.theorems import exploration
from ctrl.theorems.exploration import Exploration
from ctrl.theorems.reversal import short_grid
from ctrl.theorems.verdict import Case

SCHEDULES = [SubVP(0.1, 10.0), OU(4.0), VE(0.5, 3.0)]


def small(schedule: Schedule | None = None, linear: bool = True) -> Case:
    problem = zoo.gaussian_pull_2d() if linear else zoo.mixture_bump_1d()
    return Case("small", problem if schedule is None else replace(problem, schedule=schedule), quick=True, seed=5)


def open_problem() -> Problem:
    """A mixture in the plane: no exact law of its chain."""
    law = GaussianMixture([0.4, 0.6], [[-1.0, 0.5], [0.8, 0.0]], [[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.4]]])
    return Problem(VP(0.1, 10.0), law, BumpReward([-1.0, 0.0], 0.5), kl_weight=0.5)


@pytest.mark.parametrize("linear", [True, False])
def test_every_verdict_holds(linear: bool) -> None:
    rows = list(Exploration().checks(small(linear=linear)))
    assert [row.reason for row in rows if row.holds is False] == []
    kinds = [row.check for row in rows]
    assert {"exact", "monte_carlo", "limit", "planted"} <= set(kinds) and kinds.count("planted") >= 3


def test_open_problem_keeps_the_conditional_identity() -> None:
    rows = list(Exploration().checks(Case("open", open_problem(), quick=True, seed=5)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert {row.check for row in rows} == {"monte_carlo", "planted", "skipped"}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_every_verdict_holds_on_every_schedule(schedule: Schedule) -> None:
    case = small(schedule)
    rows = list(Exploration().checks(case))
    assert [row.reason for row in rows if row.holds is False] == []
    assert sum(row.check == "planted" for row in rows) >= 8


def test_conditional_charge_has_mean_zero_without_sampling() -> None:
    """The Monte Carlo identity of open problems, over all sign patterns: zero to rounding."""
    from ctrl.estimators import runs

    case = small()
    grid = short_grid(case.problem, 2)
    noise = Noise.signs(case.problem, case.exploring, grid)
    extra = np.concatenate([exploration.conditional_cost(run) for run in runs(case.problem, case.exploring, grid, noise)])
    assert abs(noise.weights @ extra) < 1e-12 < np.abs(extra).max()


def test_gap_is_the_same_noise_not_only_the_same_law() -> None:
    """Independent noise for the two chains leaves a gap of order one: the theorem couples them."""
    case = small()
    problem, grid = case.problem, case.grid
    s = simulate(problem, case.exploring, grid, case.noise("a", 5000))
    other = simulate(problem, case.policy, grid, case.noise("b", 5000))
    assert exploration.squared_gap(s, other).mean() > 10 * exploration.Gaps.of(problem, case.exploring, grid).square


def test_sampling_with_a_wrong_covariance_makes_the_theorem_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator reads Sigma/D where the exact chain reads Sigma: the row says what was measured against what."""

    def factor(self: Policy, grid: TimeGrid) -> Array | None:
        cov = self.exploration_cov(grid)
        return None if cov is None else np.linalg.cholesky(cov / grid.dt[:, None, None])

    monkeypatch.setattr(BasisPolicy, "exploration_factor", factor)
    rows = [row for row in Exploration()._signs(small()) if row.check == "exact"]
    assert rows and not any(row.holds for row in rows)
    assert all("measured" in row.reason and "against" in row.reason for row in rows)


def test_a_charge_without_trace_makes_the_theorem_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exploration, "action_cost", lambda policy, problem, grid: 0.0)
    case = small(linear=False)
    truth = exploration.exact.evaluate(case.problem, case.exploring, case.grid)
    rows = [row for row in Exploration()._charge(case, truth) if row.check == "exact"]
    assert not any(row.holds for row in rows) and "against 0" in rows[0].reason


def test_figure_draws() -> None:
    figure = Exploration().figure(small())
    assert len(figure.axes) == 3 and all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
