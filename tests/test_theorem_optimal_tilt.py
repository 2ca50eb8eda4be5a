"""The optimum and its tilt hold on small cases, catch what they plant, and fail when a formula is broken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import ctrl
from ctrl import exact, zoo
from ctrl.exact import line_optimum, tilt
from ctrl.exact.divergence import DivergenceTilt
from ctrl.exact.linear_doob import Exponent, LinearDoob
from ctrl.theorems.optimal_tilt import FEW, OptimalTilt, Optima, doob_terminal, node_moments
from ctrl.theorems.verdict import Case

THEOREM = OptimalTilt()


def case_of(make, **changes):
    return Case(make.__name__, replace(make(), **changes), quick=True, seed=0)


def failed(rows):
    return [row for row in rows if row.holds is False]


@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.mixture_bump_1d])
def test_every_verdict_holds(make):
    rows = list(THEOREM.checks(case_of(make)))
    assert [row.reason for row in failed(rows)] == []
    assert {row.check for row in rows} == {"exact", "monte_carlo", "limit", "planted", "skipped"}
    planted = [row.reason for row in rows if row.check == "planted"]
    expected = ["λ and 1/λ exchanged", "the formula of eta = 1", "r(x0_hat)", "E_pre[r | x]", "Doob value as the chain's J*", "short noising"]
    for what in expected + (["quoted as bias"] if make is zoo.gaussian_pull_2d else []):
        assert any(what in reason for reason in planted), what
    assert all(row.resolution < 1 for row in rows if row.check == "planted")
    assert all(row.reason for row in rows if row.check == "skipped")


def test_the_tilt_of_a_chain_in_the_plane():
    rows = list(THEOREM.checks(case_of(zoo.digits_plane)))
    assert failed(rows) == [] and {row.check for row in rows} == {"exact", "monte_carlo", "limit", "planted", "skipped"}
    assert sum("paths of the pre-trained chain" in row.reason for row in rows) == 1


def test_both_optima_of_a_chain_in_the_plane():
    """A full run's part: J*, its path KL, and optimal paths; the Doob value in its place is seen."""
    rows = list(THEOREM._in_the_plane(replace(case_of(zoo.digits_plane), quick=False).brief))
    assert failed(rows) == []
    assert [row.check for row in rows] == ["monte_carlo", "planted", "exact", "exact", "planted", "exact", "planted", "monte_carlo", "planted"]


def test_an_open_problem_is_checked_where_it_can_be(mixture_in_space):
    rows = list(THEOREM.checks(Case("mixture in space", mixture_in_space, quick=True, seed=0)))
    assert failed(rows) == [] and {row.check for row in rows} == {"exact", "limit", "planted", "skipped"}


def test_reference_numbers():
    """theory.md, sections 9 and 17: both optima of both chains, and the biases at the reference noising."""
    pull, bump = Optima(replace(case_of(zoo.gaussian_pull_2d), steps=100)), Optima(replace(case_of(zoo.mixture_bump_1d), steps=50))
    assert pull.best.objective == pytest.approx(-1.3921577814829753, rel=1e-12) and pull.best.path_kl == pytest.approx(0.771217765188002, rel=1e-12)
    assert pull.doob.objective == pytest.approx(-1.390575, abs=5e-7)
    assert bump.best.objective == pytest.approx(0.621976, abs=5e-7) and bump.doob.objective == pytest.approx(0.6404251027, abs=5e-11)
    assert tilt.initial_bias(replace(pull.case.problem, start="exact")).kl == pytest.approx(2.473e-6, abs=5e-10)


@pytest.mark.parametrize("what", ["optimum", "exponent", "bridge", "level", "divergence"])
def test_a_broken_formula_fails(monkeypatch, what):
    """Each solver, a little off, is told apart from the others."""
    make = zoo.mixture_bump_1d if what in ("optimum", "level") else zoo.gaussian_pull_2d
    if what == "optimum":  # the penalty's weight, 1e-4 off
        true = line_optimum._Backward.rate
        monkeypatch.setattr(line_optimum._Backward, "rate", property(lambda self: true.fget(self) * 1.0001))
    elif what == "exponent":  # the volume of a step, without its half
        true = Exponent.before
        monkeypatch.setattr(Exponent, "before", lambda self, A, c, R: true(self, A, c, R)._replace(z=true(self, A, c, R).z + 1e-4))
    elif what == "bridge":  # a wider law of X_T given X_t
        true = tilt.Bridge.of

        def wide(problem, t=0.0):
            bridge = true(problem, t)
            return replace(bridge, Gamma=1.001 * bridge.Gamma)

        monkeypatch.setattr(tilt.Bridge, "of", wide)
    elif what == "level":  # a Doob value of another lambda
        true = exact.quadrature.Doob.log_phi
        monkeypatch.setattr(exact.quadrature.Doob, "log_phi", lambda self, i, x: 1.0001 * true(self, i, x))
    else:
        from ctrl.exact import divergence
        true = divergence.divergence_tilt
        monkeypatch.setattr("ctrl.theorems.optimal_tilt.divergence_tilt", lambda *a, **k: off(true(*a, **k)))
    rows = failed(THEOREM.checks(case_of(make)))
    assert rows and all("measured" in row.reason or row.check in ("limit", "planted") for row in rows)


def off(found: DivergenceTilt) -> DivergenceTilt:
    ratio = found.ratio * (1 + 1e-3 * np.cos(np.arange(len(found.ratio))))
    return replace(found, ratio=ratio / (found.masses @ ratio))


def test_dense_kernels_keep_mass_and_know_the_start():
    at = Optima(replace(case_of(zoo.mixture_bump_1d), steps=FEW))
    points, masses = doob_terminal(at.doob)
    np.testing.assert_allclose(masses.sum(axis=1), 1, atol=1e-12)
    free = tilt.reversal_optimum(at.case.problem)
    assert node_moments(points, masses[0])[0] == pytest.approx(free.masses @ free.points, abs=0.1)  # FEW steps, not the limit
    assert not isinstance(at.doob, LinearDoob) and at.few is at


@pytest.mark.parametrize("changes", [{"kl_weight": 0.0}, {"discount": 0.4, "entropy_weight": 0.2}, {"kl_weight": 1.0}, {"start": "exact"},
                                     {"schedule": ctrl.VE(0.05, 3.0)}, {"reward": ctrl.CallableReward(lambda x: np.full(len(x), 0.7), np.zeros_like)},
                                     {"reward": ctrl.CallableReward(lambda x: (x[:, 0] > 0.1) * 1.0, np.zeros_like)}])
def test_users_problems_skip_what_does_not_apply(changes):
    case = replace(case_of(zoo.mixture_bump_1d, **changes), own=True)
    rows = list(THEOREM.checks(case))
    assert failed(rows) == [] and all(row.reason for row in rows)
    if changes.get("kl_weight") == 1.0:
        assert any("invisible at λ = 1" in row.reason for row in rows) and not any("planted: λ and 1/λ" in row.reason for row in rows)


def test_figure_draws():
    figure = THEOREM.figure(case_of(zoo.gaussian_pull_2d))
    assert len(figure.axes) == 4 and all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
