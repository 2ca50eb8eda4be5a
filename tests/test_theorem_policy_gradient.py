"""The policy-gradient theorem on small cases: all holds, every planted error is caught, a broken formula makes it fail."""

import dataclasses

import numpy as np
import pytest

import ctrl
from ctrl import zoo
from ctrl.estimators import ScoreFunction
from ctrl.theorems.policy_gradient import PolicyGradient, Spline, differentiated
from ctrl.theorems.verdict import Case


def small(problem: ctrl.Problem, name: str = "small") -> Case:
    return Case(name, problem, quick=True, seed=0, steps=20)


def test_all_verdicts_hold():
    rows = list(PolicyGradient().checks(small(zoo.gaussian_pull_2d(), "gaussian_pull_2d")))
    assert [row.reason for row in rows if row.holds is False or "underpowered" in row.reason] == []
    assert {row.check for row in rows} == {"exact", "monte_carlo", "limit", "planted", "skipped"}
    assert sum(row.check == "planted" for row in rows) >= 28


def test_all_verdicts_hold_in_the_plane():
    """On a brief chain, whose gradient lattices know; no estimator is compared with another alone."""
    rows = list(PolicyGradient().checks(small(zoo.digits_plane(), "digits_plane")))
    assert [row.reason for row in rows if row.holds is False or "underpowered" in row.reason] == []
    assert sum("= grad J" in row.reason for row in rows) == 16
    assert sum(row.check == "planted" for row in rows) == 25


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_richardson_difference_is_the_exact_gradient(eta):
    case = small(zoo.gaussian_pull_2d(eta))
    np.testing.assert_allclose(differentiated(case), case.truth.gradient.theta, rtol=1e-9)
    wrong = dataclasses.replace(case, problem=dataclasses.replace(case.problem, kl_weight=0.51))
    assert np.max(np.abs(differentiated(wrong) - case.truth.gradient.theta)) > 1e-3


def test_tabulated_value_is_the_value():
    case = dataclasses.replace(small(zoo.mixture_bump_1d()), steps=5)
    spline = Spline.of(case.value, np.full(6, -2.0), np.full(6, 2.0))
    x = np.linspace(-1.9, 1.9, 41)[:, None]
    for i in range(6):
        np.testing.assert_allclose(spline(i, x), case.value(i, x), atol=1e-7)
        np.testing.assert_allclose(spline.gradient(i, x), case.value.gradient(i, x), atol=1e-4)


def test_a_broken_estimator_makes_the_theorem_fail(monkeypatch):
    """The explicit KL gradient taken away from the library's own score function."""
    right = ScoreFunction._weighted
    monkeypatch.setattr(ScoreFunction, "_weighted", lambda self, run, returns: right(self, run, returns) - (
        0 if self.sampled_kl else run.kl_term))
    rows = list(PolicyGradient().checks(small(zoo.gaussian_pull_2d(), "broken")))
    failed = [row for row in rows if row.holds is False and row.check == "exact"]
    assert failed and all("score function" in row.reason or "reward-to-go" in row.reason for row in failed)
    assert all("measured" in row.reason for row in failed)
