"""The value theorem holds on small cases, catches what it plants, and fails when a formula is broken."""

from __future__ import annotations

import numpy as np
import pytest

from ctrl import zoo
from ctrl.exact.chain import LinearChain, QuadraticValue
from ctrl.theorems.value import SquaredResidual, ValueMartingale, rule, solved
from ctrl.theorems.verdict import Case

THEOREM = ValueMartingale()


@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.mixture_bump_1d])
def test_every_verdict_holds(make):
    rows = list(THEOREM.checks(Case(make.__name__, make(), quick=True, seed=0)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert {row.check for row in rows} >= {"exact", "monte_carlo", "limit", "planted"}
    planted = [row.reason for row in rows if row.check == "planted"]
    for what in ("cost added", "summed from 0", "right point", "every step", "pre-trained"):
        assert any(what in reason for reason in planted), what
    assert any("squared TD" in row.reason for row in rows)
    assert all(row.reason for row in rows if row.check == "skipped")


@pytest.mark.parametrize("changes", [{"discount": 0.7}, {"entropy_weight": 0.3}, {"discount": 0.5, "entropy_weight": 0.2}])
@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.mixture_bump_1d])
def test_exact_twins_with_discount_and_entropy(make, changes):
    for eta in (1.0, 0.5, 0.0):
        for at in solved(Case(make.__name__, make(), quick=True, seed=1, steps=24).at(eta, **changes)):
            rows = list(THEOREM._identities(at))
            assert [row.reason for row in rows if not row.holds] == []
            assert len(rows) >= 3


def test_equation_with_discount_and_entropy():
    at = solved(Case("gaussian", zoo.gaussian_pull_2d(), quick=True, seed=1).at(0.5, discount=0.4, entropy_weight=0.2))[0]
    rows = list(THEOREM._limits(at))
    assert [row.reason for row in rows if not row.holds] == []


def test_an_open_problem_is_checked_where_it_can_be():
    rows = list(THEOREM.checks(Case("digits_plane", zoo.digits_plane(), quick=True, seed=0)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert [row.check for row in rows] == ["monte_carlo", "monte_carlo", "skipped"]


def test_a_broken_value_fails_and_says_so(monkeypatch):
    true = QuadraticValue.__call__
    monkeypatch.setattr(QuadraticValue, "__call__", lambda self, i, x: true(self, i, x) + 1e-6 * i)
    at = solved(Case("gaussian", zoo.gaussian_pull_2d(), quick=True, seed=0, steps=10))[0]
    failed = [row for row in THEOREM._identities(at) if not row.holds]
    assert failed
    assert all("measured" in row.reason and "against" in row.reason for row in failed)


def test_rules_integrate_what_they_claim():
    z, w = rule(Case("gaussian", zoo.gaussian_pull_2d(), quick=True, seed=0), 4)
    np.testing.assert_allclose(w @ z, 0, atol=1e-14)
    np.testing.assert_allclose(np.einsum("m,mi,mj->ij", w, z, z), np.eye(4), atol=1e-14)
    np.testing.assert_allclose(np.einsum("m,mi,mj,mk->ijk", w, z, z, z), 0, atol=1e-14)
    z, w = rule(Case("mixture", zoo.mixture_bump_1d(), quick=True, seed=0), 2)
    np.testing.assert_allclose(w @ (z[:, 0] ** 4 * z[:, 1] ** 2), 3, rtol=1e-6)


def test_squared_residual_is_a_minimum():
    """Any move of the coefficients raises the loss: the gradient of the loss, by its definition, is zero at the fit."""
    case = Case("gaussian", zoo.gaussian_pull_2d(), quick=True, seed=0, steps=6)
    fit = SquaredResidual(LinearChain(case.problem, case.policy, case.grid))

    def loss(coefficients):
        m, P = fit.chain.moments
        total = 0.0
        for i in range(case.steps):
            w, u, after, cost = fit.step(i)
            end = case.problem.reward.value(m[-1] + after @ np.linalg.cholesky(P[-1]).T)
            later = end if i + 1 == case.steps else fit.features(after) @ coefficients[i + 1]
            total += w @ (later - fit.features(u) @ coefficients[i] - cost) ** 2
        return total

    best, move = loss(fit.coefficients), np.random.default_rng(0).normal(size=fit.coefficients.shape)
    up, down = (loss(fit.coefficients + h * move) for h in (1e-3, -1e-3))
    assert min(up, down) > best
    assert abs(up - down) < 1e-9 * (up + down - 2 * best) / 1e-3


def test_figure_draws():
    figure = THEOREM.figure(Case("gaussian_pull_2d", zoo.gaussian_pull_2d(), quick=True, seed=0))
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
