"""The advantage theorem holds on small cases, catches what it plants, and fails when a formula is broken."""

from __future__ import annotations

import numpy as np
import pytest

from ctrl import exact, zoo
from ctrl.theorems import advantage
from ctrl.theorems.advantage import AdvantageRate
from ctrl.theorems.value import solved
from ctrl.theorems.verdict import Case

THEOREM = AdvantageRate()


@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.mixture_bump_1d])
def test_every_verdict_holds(make):
    rows = list(THEOREM.checks(Case(make.__name__, make(), quick=True, seed=0)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert {row.check for row in rows} >= {"exact", "monte_carlo", "limit", "planted", "skipped"}
    planted = [row.reason for row in rows if row.check == "planted"]
    for what in ("Q for q", "collapses", "g² for h", "not centred", "factor 1 - 1/2", "sign of tr Σ"):
        assert any(what in reason for reason in planted), what


@pytest.mark.parametrize("changes", [{"discount": 0.7}, {"entropy_weight": 0.3}, {"discount": 0.5, "entropy_weight": 0.2}])
@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.mixture_bump_1d])
def test_exact_twins_with_discount_and_entropy(make, changes):
    for eta in (1.0, 0.5):
        at = solved(Case(make.__name__, make(), quick=True, seed=1, steps=24).at(eta, **changes))[-1]
        rows = [*THEOREM._centred(at), *THEOREM._stein(at)]
        assert [row.reason for row in rows if row.holds is False] == []


def test_limit_with_discount_and_entropy():
    at = solved(Case("gaussian", zoo.gaussian_pull_2d(), quick=True, seed=1).at(0.5, discount=0.4, entropy_weight=0.2))[-1]
    assert [row.reason for row in THEOREM._limits(at) if not row.holds] == []


@pytest.mark.parametrize("make", [zoo.digits_plane, zoo.double_well_2d])
def test_truth_in_the_plane(make):
    rows = list(THEOREM.checks(Case(make.__name__, make(), quick=True, seed=0)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert [sum(row.check == check for row in rows) for check in ("exact", "monte_carlo", "planted", "skipped")] == [4, 2, 7, 2]


def test_actions_in_the_plane_stay_where_v_is_known(monkeypatch):
    """eta = 1, as a full run has it: long steps take actions far. Planted: actions at the full distance leave the room, with an error."""
    at = solved(Case("digits_plane", zoo.digits_plane(), quick=False, seed=0).brief.at(1.0))[-1]
    assert [row.reason for row in THEOREM._centred(at) if row.holds is False] == []
    monkeypatch.setattr(advantage, "NUDGE", 10.0)
    with pytest.raises(ValueError, match="x: expected states near"):
        list(THEOREM._centred(at))


def test_the_last_step_of_an_open_problem(mixture_in_space):
    rows = list(THEOREM.checks(Case("mixture in space", mixture_in_space, quick=True, seed=0)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert {row.check for row in rows} == {"exact", "planted", "skipped"}


def test_a_broken_rate_fails_and_says_so(monkeypatch):
    true = exact.Advantage.__call__
    monkeypatch.setattr(exact.Advantage, "__call__", lambda self, i, x, a: true(self, i, x, a) + 1e-6 * np.sum(a * a, axis=1))
    at = solved(Case("gaussian", zoo.gaussian_pull_2d(), quick=True, seed=0, steps=10))[-1]
    failed = [row for row in THEOREM._centred(at) if not row.holds]
    assert len(failed) == 1
    assert "E_π q = 0" in failed[0].reason and "measured" in failed[0].reason and "against" in failed[0].reason


def test_figure_draws():
    figure = THEOREM.figure(Case("gaussian_pull_2d", zoo.gaussian_pull_2d(), quick=True, seed=0))
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
