"""The value theorem holds on small cases, catches what it plants, and fails when a formula is broken."""

from __future__ import annotations

import numpy as np
import pytest

from ctrl import zoo
from ctrl.exact.chain import LinearChain, QuadraticValue
from ctrl.theorems.value import ValueMartingale, ahead, cubature, law_nodes, rule, solved
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


@pytest.mark.parametrize("make", [zoo.digits_plane, zoo.double_well_2d])
def test_truth_in_the_plane(make):
    rows = list(THEOREM.checks(Case(make.__name__, make(), quick=True, seed=0)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert [sum(row.check == check for row in rows) for check in ("exact", "monte_carlo", "planted", "skipped")] == [4, 3, 7, 1]
    at = solved(Case(make.__name__, make(), quick=True, seed=1, steps=6).at(0.7, discount=0.5))[0]
    assert [row.reason for row in THEOREM._identities(at) if not row.holds] == []


def test_an_open_problem_is_checked_where_it_can_be(mixture_in_space):
    rows = list(THEOREM.checks(Case("mixture in space", mixture_in_space, quick=True, seed=0)))
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


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_cubature_is_exact_to_degree_five(d):
    z, w = cubature(d)
    assert len(z) == 2 * d**2 + 1
    rng = np.random.default_rng(d)
    for _ in range(20):  # E of a product of four linear forms: Isserlis
        a = rng.normal(size=(5, d))
        g = a @ a.T
        np.testing.assert_allclose(w @ np.prod(z @ a[:4].T, axis=1), g[0, 1] * g[2, 3] + g[0, 2] * g[1, 3] + g[0, 3] * g[1, 2], atol=1e-11 * d**2)
        np.testing.assert_allclose(w @ np.prod(z @ a.T, axis=1), 0, atol=1e-11 * d**3)
        np.testing.assert_allclose([w.sum(), *(w @ z)], [1, *np.zeros(d)], atol=1e-13)
        np.testing.assert_allclose(w @ np.prod(z @ a[:2].T, axis=1), g[0, 1], atol=1e-12 * d)


def test_laws_ahead_are_those_of_a_chain_started_there():
    """Mixing the law of X_N given X_i over the law of X_i gives the law of X_N."""
    case = Case("gaussian", zoo.gaussian_pull_2d(), quick=True, seed=0, steps=7)
    chain = LinearChain(case.problem, case.policy, case.grid)
    m, P = chain.moments
    for i in (0, 3, 7):
        M, b, S = list(ahead(chain, i))[-1]
        np.testing.assert_allclose(M @ m[i] + b, m[-1], rtol=1e-12)
        np.testing.assert_allclose(M @ P[i] @ M.T + S, P[-1], rtol=1e-12)
        assert len(list(ahead(chain, i))) == 8 - i


@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.mixture_bump_1d])
def test_nodes_carry_the_law(make):
    case = Case(make.__name__, make(), quick=True, seed=0, steps=12)
    x, w = law_nodes(case, case.truth.terminal)
    np.testing.assert_allclose(w @ case.problem.reward.value(x), case.truth.expected_reward, rtol=1e-9)
    np.testing.assert_allclose((w[:, None] * x).T @ x, case.truth.terminal.cov + np.outer(w @ x, w @ x), rtol=1e-8)


def test_figure_draws():
    figure = THEOREM.figure(Case("gaussian_pull_2d", zoo.gaussian_pull_2d(), quick=True, seed=0))
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
