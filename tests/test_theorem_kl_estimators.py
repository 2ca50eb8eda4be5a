"""k1, k2, k3 on small cases: all verdicts hold, every planted error is caught, closed moments are those of paths, broken formulas fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import ctrl
from ctrl import exact, zoo
from ctrl.estimators import Run, Score, runs
from ctrl.evidence import mean_test
from ctrl.exact.chain import LinearChain
from ctrl.noise import Noise
from ctrl.policy import AffinePolicy
from ctrl.rollout import simulate
from ctrl.schedule import Schedule
from ctrl.theorems.kl_estimators import Bare, KLEstimators, LatticeMoments, LogRatio, States, k3, lattices, step_by_step
from ctrl.theorems.verdict import Case

THEOREM = KLEstimators()
PLANTED = ("k2 sold as unbiased", "k3 with the sign of the log-ratio exchanged", "paths of P_pre: the reverse KL", "k1 without D in the variance",
           "k1 without D in the sum", "k1 as a loss", "k2 of each step", "k3 of each step", "analytic KL of each step", "k3 of the whole path")


def small(problem: ctrl.Problem, steps: int = 40) -> Case:
    return Case("small", problem, quick=True, seed=0, steps=steps)


@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.mixture_bump_1d])
def test_every_verdict_holds(make):
    rows = list(THEOREM.checks(Case(make.__name__, make(), quick=True, seed=0)))
    assert [row.reason for row in rows if row.holds is False or "underpowered" in row.reason] == []
    assert {row.check for row in rows} == {"exact", "monte_carlo", "limit", "planted", "skipped"}
    planted = [row.reason for row in rows if row.check == "planted"]
    for what in PLANTED:
        assert any(what in reason for reason in planted), what
    averaged = [row.check for row in rows if "averaged over dimensions" in row.reason]
    assert set(averaged) == ({"planted"} if make is zoo.gaussian_pull_2d else {"skipped"})
    assert all(row.reason for row in rows if row.check == "skipped")


def test_an_open_problem_is_checked_where_it_can_be():
    rows = list(THEOREM.checks(Case("digits_plane", zoo.digits_plane(), quick=True, seed=0)))
    assert [row.reason for row in rows if row.holds is False or "underpowered" in row.reason] == []
    assert {row.check for row in rows} == {"exact", "monte_carlo", "planted", "skipped"}


@pytest.mark.parametrize("changes", [
    {"schedule": ctrl.VE(0.1, 5.0)}, {"schedule": ctrl.SubVP(0.1, 10.0)}, {"schedule": ctrl.OU(3.0), "start": "exact"}, {"eta": 1.5},
    {"eta": 0.0, "kl_weight": 0.0, "discount": 0.7, "entropy_weight": 0.3}])
def test_a_users_problem_holds_or_says_what_it_skips(changes):
    rows = list(THEOREM.checks(replace(small(replace(zoo.gaussian_pull_2d(), **changes)), own=True)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert sum(row.check == "planted" for row in rows) > 20


def test_reference_path_kl():
    """theory.md, section 17: the path KL of K = 0.9 K_pre, k = k_pre + 0.1 at N = 100, from joint laws alone."""
    case = small(zoo.gaussian_pull_2d(), steps=100)
    pre = case.problem.pretrained(case.grid)
    ratio = LogRatio.of(case, AffinePolicy(0.9 * pre.K, pre.k + 0.1), pre)
    np.testing.assert_allclose(ratio.means[[0, 2]], 0.1762947512058871, rtol=1e-11)
    half = small(zoo.gaussian_pull_2d(0.5), steps=100)
    np.testing.assert_allclose(LogRatio.of(half, AffinePolicy(0.9 * pre.K, pre.k + 0.1), pre).means[0], 0.2786219129802991, rtol=1e-11)


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.5])
def test_closed_moments_against_paths(eta):
    """Means, variances and the exchanged sign of the quadratic form against simulated log-weights; psi' by differences."""
    at = Bare.of(small(zoo.gaussian_pull_2d(eta)), nats=0.05)
    k1 = simulate(at.case.problem, at.policy, at.case.grid, at.case.noise("test", 100_000)).log_weight
    estimates = (k1, 0.5 * k1**2, k3(k1))
    for samples, mean, variance in zip(estimates, at.ratio.means, at.ratio.variances, strict=True):
        assert mean_test(samples, mean).holds
        assert mean_test((samples - mean) ** 2, variance).holds
    assert mean_test(k3(-k1), at.ratio.flipped).holds
    assert not mean_test(0.5 * k1**2, at.kl).holds
    for t in (0.0, 1.0, -0.7):
        slope = (at.ratio.psi(t + 1e-5) - at.ratio.psi(t - 1e-5)) / 2e-5
        np.testing.assert_allclose(at.ratio.tilted_mean(t), -slope, rtol=1e-8, atol=1e-10)
    assert at.ratio.psi(1e3) == np.inf


def test_an_infinite_variance_is_said():
    """A slope 1.6 times the pre-trained one is so far away that k3 has no variance, and psi(2) says so."""
    case = small(zoo.gaussian_pull_2d())
    pre = case.problem.pretrained(case.grid)
    far = LogRatio.of(case, AffinePolicy(1.6 * pre.K, pre.k), pre)
    assert far.psi(2) == np.inf and far.variances[2] == np.inf and np.isfinite(far.variances[0])
    np.testing.assert_allclose(far.psi(1), 1.0, rtol=1e-10)


@pytest.mark.parametrize("tilt", [0.0, 1.0, -1.0])
def test_lattice_against_paths(tilt):
    """Every moment that the lattice carries against weighted means of simulated paths."""
    at = Bare.of(small(zoo.mixture_bump_1d(0.7))).on(6)
    run = next(runs(at.case.problem, at.policy, at.case.grid, at.case.noise("lattice", 60_000)))
    k1, score = run.k1.sum(axis=1), Score().samples(run)
    weight = np.exp(-tilt * k1)
    moments = LatticeMoments.of(at.case, at.policy, at.pre, tilt)
    samples = np.column_stack([weight, weight * k1, weight * k1**2 / 2, weight[:, None] * score, (weight * k1)[:, None] * score])
    expected = np.concatenate([[moments.weight, moments.k1, moments.k2], moments.score, moments.product])
    assert mean_test(samples, expected).holds
    assert not mean_test(samples, 1.05 * expected + 0.02).holds


def test_lattices_refuse_what_they_cannot_resolve():
    at = Bare.of(small(zoo.mixture_bump_1d(0.02)))
    with pytest.raises(ValueError, match=r"grid: expected steps whose noise 2001 points resolve"):
        lattices(at.on(8).case, at.pre)


@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.mixture_bump_1d])
def test_visits_are_the_law_of_the_chain(make):
    """Mean, second moment and E|a - s|^2 of sampled actions against the exact solvers."""
    case = small(make(), steps=12)
    states = States.of(case, case.policy)
    mean = states.mean(lambda i, x: x)
    np.testing.assert_allclose(states.mean(lambda i, x: np.ones(len(x))), 1.0, rtol=1e-9)
    shorter = exact.evaluate(case.problem, case.policy, ctrl.TimeGrid(case.grid.times[:8]))
    np.testing.assert_allclose(mean[7], shorter.terminal.mean, atol=1e-8)
    second = states.mean(lambda i, x: x[:, :, None] * x[:, None, :])[7]
    np.testing.assert_allclose(second - np.outer(mean[7], mean[7]), shorter.terminal.cov, atol=1e-7)
    c = case.problem.coefficients(case.grid)
    visits = States.of(case, case.exploring).acting(case, case.exploring)

    def squared(i, x, a):
        return np.sum((a - case.problem.score(float(case.grid.times[i]), x)) ** 2, axis=1)

    penalty = (c.kappa * c.dt) @ visits.mean(squared)
    np.testing.assert_allclose(penalty, exact.evaluate(case.problem, case.exploring, case.grid).penalty, rtol=1e-8)


def test_step_by_step_against_nodes():
    """E sum |u|^4/8 and E sum (e^{|u|^2} - 1 - |u|^2) of a linear chain against a tensor Gauss-Hermite rule over its states."""
    at = Bare.of(small(zoo.gaussian_pull_2d(0.5), steps=5))
    z, w = np.polynomial.hermite_e.hermegauss(24)
    nodes, weights = np.stack(np.meshgrid(z, z), axis=-1).reshape(-1, 2), np.outer(w, w).ravel() / w.sum() ** 2
    bias = noise = 0.0
    m, P = LinearChain(at.case.problem, at.policy, at.case.grid).moments
    for i in range(5):
        square = np.sum(at.u(i, m[i] + nodes @ np.linalg.cholesky(P[i]).T) ** 2, axis=1)
        bias, noise = bias + weights @ square**2 / 8, noise + weights @ (np.expm1(square) - square)
    np.testing.assert_allclose(step_by_step(at), (bias, noise), rtol=1e-8)


def test_a_broken_log_ratio_makes_the_theorem_fail(monkeypatch):
    """k1 without its square term, as the library's estimators read it: sign patterns and the mean along paths object."""
    right = Run.k1.func
    monkeypatch.setattr(Run, "k1", property(lambda self: right(self) - 0.5 * np.sum((np.sqrt(
        2 * self.coefficients.kappa * self.coefficients.dt)[:, None] * self.departure) ** 2, axis=2)))
    rows = list(THEOREM.checks(small(zoo.gaussian_pull_2d())))
    failed = [row for row in rows if row.holds is False and row.check in ("exact", "monte_carlo")]
    assert {row.check for row in failed} == {"exact", "monte_carlo"}
    assert all("measured" in row.reason for row in failed)


def test_a_broken_rate_makes_the_theorem_fail(monkeypatch):
    """kappa without its eta dependence: transition densities and joint laws do not use it, and object at eta = 1/2."""
    right = Schedule.rates

    def broken(self, t, eta):
        f, g2, h, _ = right(self, t, eta)
        return f, g2, h, 0.5 * g2

    monkeypatch.setattr(Schedule, "rates", broken)
    for make in (zoo.gaussian_pull_2d, zoo.mixture_bump_1d):
        at = Bare.of(small(make(0.5)))
        failed = [row.reason for row in (*THEOREM._one_step(at), *THEOREM._values(at if at.case.linear else at.on(8))) if row.holds is False]
        assert any("two transition densities" in reason for reason in failed) and any("path KL, by" in reason for reason in failed)


def test_score_has_mean_zero_and_k1_times_it_the_gradient_at_every_degree():
    """Four-node Gauss-Hermite in the place of signs: the same expectations, so that two nodes were enough."""
    at = Bare.of(small(zoo.gaussian_pull_2d(0.5))).on(2)
    means = []
    for noise in (Noise.signs(at.case.problem, at.policy, at.case.grid), Noise.gauss_hermite(at.case.problem, at.policy, at.case.grid, 4)):
        run = next(runs(at.case.problem, at.policy, at.case.grid, noise))
        means.append(noise.weights @ (run.k1.sum(axis=1)[:, None] * Score().samples(run)))
    np.testing.assert_allclose(means[0], means[1], rtol=1e-10)
    np.testing.assert_allclose(means[0], at.slope, rtol=1e-10)


def test_figure_draws():
    figure = THEOREM.figure(small(zoo.gaussian_pull_2d()))
    assert len(figure.axes) == 3 and all(ax.get_xlabel() for ax in figure.axes)
    assert all(ax.get_ylabel() for ax in figure.axes[:2])
