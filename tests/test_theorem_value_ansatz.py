"""The value's skeleton: every verdict holds, closed forms are the chain's limit, learning is least squares, and a broken formula fails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ctrl import Gaussian, GaussianMixture, LinearReward, Problem, QuadraticReward, zoo
from ctrl.exact.chain import LinearChain, QuadraticValue
from ctrl.reward import CallableReward
from ctrl.schedule import OU, VE, VP, SubVP
from ctrl.theorems.value import Solved, ahead
from ctrl.theorems.value_ansatz import COSINE, PLAIN, SIGNAL, WRONG_DENOISERS, Batch, Class, ValueAnsatz, World, bayes_mean, data_nodes, denoised
from ctrl.theorems.value_ansatz import generated, in_closed_form, posterior, posterior_cov
from ctrl.theorems.verdict import Case
from ctrl.verify import _rows

THEOREM = ValueAnsatz()


def small(**changes) -> Case:
    return Case("gaussian", replace(zoo.gaussian_pull_2d(), **changes), quick=True, seed=0)


def world(case: Case, steps: int = 6) -> World:
    return World(Solved(replace(case, steps=steps), case.policy, "mean actions"))


@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.mixture_bump_1d])
def test_every_verdict_holds(make):
    rows = list(THEOREM.checks(Case(make.__name__, make(), quick=True, seed=0)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert {row.check for row in rows} == {"exact", "monte_carlo", "limit", "planted", "skipped"}
    planted = [row.reason for row in rows if row.check == "planted"]
    wanted = ["x0_hat without 1/alpha", "v for sqrt v in noise form", "c_skip at the wrong end", "Jensen", "a plain network learns V as fast"]
    if make is zoo.gaussian_pull_2d:
        wanted += ["posterior covariance for Cov_eta", "Tweedie's x0_hat for E_eta"]
    else:
        wanted += ["the posterior law for that of X_T given X_t"]
    for what in wanted:
        assert any(what in reason for reason in planted), what
    assert not any("underpowered" in row.reason for row in rows)


def test_an_open_problem_is_checked_where_it_can_be():
    rows = list(THEOREM.checks(Case("digits_plane", zoo.digits_plane(), quick=True, seed=0)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert sum(row.check == "exact" for row in rows) >= 4 and sum(row.check == "planted" for row in rows) >= 5


@pytest.mark.parametrize("problem", [zoo.gaussian_pull_2d(), zoo.mixture_bump_1d(), zoo.digits_plane()], ids=["gaussian", "mixture", "plane"])
def test_posterior_means_agree(problem):
    """Bayes, quadrature of the data law, and Tweedie's formula: three ways to E[X_0 | X_tau]."""
    for t in (0.1, 0.6):
        x = np.array([[0.3, -0.8], [-1.2, 0.5]])[:, : problem.dim]
        expected = posterior(problem, t, x, lambda y: y)
        np.testing.assert_allclose(bayes_mean(problem, t, x), expected, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(denoised(problem, t, x), expected, rtol=1e-9, atol=1e-10)
        for _, wrong in WRONG_DENOISERS:
            assert np.abs(wrong(problem, t, x) - expected).max() > 1e-2


def test_data_nodes_carry_the_data_law():
    for problem in (zoo.mixture_bump_1d(), zoo.digits_plane()):
        y, w = data_nodes(problem)
        np.testing.assert_allclose([w.sum(), *(w @ y)], [1, *problem.data.mean], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose((w[:, None] * y).T @ y - np.outer(w @ y, w @ y), problem.data.cov, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", [VP(0.1, 10.0), OU(4.0), SubVP(0.1, 8.0), VE(0.5, 3.0)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
def test_generated_law_is_the_chains_limit(schedule, eta):
    """Mean map, offset and covariance of X_T given X_{T/2}: Richardson's extrapolation of the chain's own, to O(D^3)."""
    problem = replace(zoo.gaussian_pull_2d(), schedule=schedule, eta=eta)

    def of_chain(steps: int) -> np.ndarray:
        grid = problem.grid(steps)
        *_, (M, b, S) = ahead(LinearChain(problem, problem.pretrained(grid), grid), steps // 2)
        return np.concatenate([M.ravel(), b, S.ravel()])

    coarse, middle, fine = (of_chain(n) for n in (100, 200, 400))
    M, b, S = generated(problem, 0.5)
    np.testing.assert_allclose((8 * fine - 6 * middle + coarse) / 3, np.concatenate([M.ravel(), b, S.ravel()]), atol=3e-5)


def test_generated_law_at_the_named_etas():
    """Tweedie's mean and the posterior covariance at eta = 1, a point at eta = 0, marginals kept at every eta."""
    problem, x = zoo.gaussian_pull_2d(), np.array([[0.4, -1.0]])
    M, b, S = generated(problem, 0.3)
    np.testing.assert_allclose(x @ M.T + b, denoised(problem, 0.3, x), rtol=1e-12)
    np.testing.assert_allclose(S, posterior_cov(problem, 0.3), rtol=1e-12)
    np.testing.assert_allclose(generated(replace(problem, eta=0.0), 0.3)[2], 0, atol=1e-15)
    for eta in (0.0, 0.5, 2.0):
        M, b, S = generated(replace(problem, eta=eta), 0.3)
        marginal = problem.marginal(0.3)
        np.testing.assert_allclose(M @ marginal.cov @ M.T + S, problem.data.cov, rtol=1e-12)
        np.testing.assert_allclose(M @ marginal.mean + b, problem.data.mean, rtol=1e-12)
    assert in_closed_form(problem, 1.0, x) == pytest.approx(problem.reward.value(x), rel=1e-12)


def test_skeletons_end_in_the_reward():
    problem = zoo.gaussian_pull_2d()
    for skeleton in (COSINE, SIGNAL):
        np.testing.assert_allclose(skeleton.weights(problem, 1.0), (1, 0), atol=1e-12)
    np.testing.assert_allclose(COSINE.weights(problem, 0.0), (0, 1), atol=1e-12)
    alpha, v = problem.schedule.alpha(0.4), problem.schedule.v(0.4)
    np.testing.assert_allclose(SIGNAL.weights(problem, 0.6)[0], alpha**2 / (alpha**2 + v))


@pytest.mark.parametrize("degree", [0, 1, 2])
@pytest.mark.parametrize("skeleton", [COSINE, PLAIN], ids=lambda s: s.name)
def test_learning_is_least_squares(skeleton, degree):
    """Coefficients and errors from quadratic forms against dense designs: numpy's lstsq on all paths and steps, V on all nodes."""
    where, family = world(small()), Class(skeleton, degree)
    problem, grid, d = where.case.problem, where.case.grid, 2
    batch = Batch.simulated(where, "test", 2, 100)

    def rows(t, x):
        s, out = problem.schedule.tau(t), skeleton.weights(problem, t)[1]
        q = np.concatenate([np.ones((len(x), 1)), x, x[:, [0]] * x, x[:, [1]] ** 2], axis=1)[:, : (1, 3, 6)[degree]]
        return out * np.concatenate([q, s * q, s**2 * q], axis=1)

    A = np.concatenate([np.sqrt(dt) * rows(t, x) for t, dt, x in zip(grid.times[:-1], grid.dt, batch.states[1].swapaxes(0, 1), strict=True)])
    rest = batch.returns[1] - np.stack([skeleton.known(problem, t, batch.states[1, :, i]) for i, t in enumerate(grid.times[:-1])], axis=1)
    c = np.linalg.lstsq(A, (np.sqrt(grid.dt) * rest).T.ravel(), rcond=None)[0]
    off, size = 0.0, 0.0
    for t, dt, x, w, V in where.visits:
        off += dt * w @ (skeleton.known(problem, t, x) + rows(t, x) @ c - V) ** 2
        size += dt * w @ (V - w @ V) ** 2
    assert x.shape[1] == d
    np.testing.assert_allclose(batch.learned(family, 100)[1], off / size, rtol=1e-8)
    assert where.floor(family) ** 2 <= batch.learned(family, 100).min()
    np.testing.assert_allclose(batch.slopes(family, c).reshape(2, 100, -1)[1].mean(axis=0), 0, atol=1e-10)


def test_the_projection_is_stationary():
    where = world(small())
    form = where.normal(Class(COSINE, 1))
    move = np.random.default_rng(0).normal(size=form.best.shape)
    up, down = (form.at(form.best + h * move) for h in (1e-3, -1e-3))
    assert min(up, down) > form.at(form.best) and abs(up - down) < 1e-9 * (up + down - 2 * form.at(form.best)) / 1e-3


@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.gaussian_8d, zoo.mixture_bump_1d, zoo.digits_line])
def test_the_skeleton_lowers_what_no_number_of_paths_removes(make):
    where = world(Case(make.__name__, make(), quick=True, seed=0), steps=20)
    for degree in (0, 1, 2):
        for skeleton in (COSINE, SIGNAL):
            assert where.floor(Class(skeleton, degree)) < 0.98 * where.floor(Class(PLAIN, degree)), (degree, skeleton.name)


def test_a_broken_v_fails(monkeypatch):
    true = VP.v
    monkeypatch.setattr(VP, "v", lambda self, tau: 1.001 * true(self, tau))
    problem = zoo.gaussian_pull_2d()
    x = np.array([[0.3, 0.2]])
    assert np.abs(denoised(problem, 0.5, x) - bayes_mean(problem, 0.5, x)).max() < 1e-10  # one v in both: the posterior of another noising
    failed = [row.reason for row in THEOREM._gap(small(kl_weight=0.11)) if row.check == "exact" and not row.holds]
    assert failed and all("against" in reason for reason in failed)


def test_a_broken_score_fails(monkeypatch):
    true = Problem.score
    monkeypatch.setattr(Problem, "score", lambda self, t, x: true(self, t, x) * (1 + 1e-6))
    rows = list(THEOREM._denoised(Case("mixture", zoo.mixture_bump_1d(), quick=True, seed=0)))
    assert [row.holds for row in rows if row.check == "exact"] == [False, False]


def test_a_broken_value_fails(monkeypatch):
    true = QuadraticValue.__call__
    monkeypatch.setattr(QuadraticValue, "__call__", lambda self, i, x: true(self, i, x) + 1e-6)
    assert not any(row.holds for row in THEOREM._chain(small()))


@pytest.mark.parametrize("problem", [
    replace(zoo.gaussian_pull_2d(), kl_weight=0.0), replace(zoo.gaussian_pull_2d(), entropy_weight=0.2, discount=0.5),
    replace(zoo.gaussian_pull_2d(), reward=LinearReward([0.0, 0.0]), kl_weight=0.0), replace(zoo.gaussian_pull_2d(), eta=0.0),
    replace(zoo.gaussian_pull_2d(), schedule=OU(4.0), start="exact"), replace(zoo.mixture_bump_1d(), schedule=SubVP(0.1, 10.0), kl_weight=0.0),
    replace(zoo.gaussian_pull_2d(), schedule=VE(0.5, 3.0)), replace(zoo.mixture_bump_1d(), schedule=VE(0.5, 3.0), start="exact"),
    replace(zoo.gaussian_pull_2d(), reward=LinearReward([1.0, -0.5])), replace(zoo.mixture_bump_1d(), eta=0.0),
    Problem(OU(3.0), Gaussian([0.5], [[0.4]]), QuadraticReward([[1.0]], [1.0]), 0.3),
    Problem(OU(3.0), Gaussian([0.5], [[0.4]]), CallableReward(lambda x: np.sin(x[:, 0])), 0.3),
    Problem(OU(3.0), GaussianMixture([0.5, 0.5], [[0.5] * 3, [-0.5] * 3], [np.eye(3), 0.4 * np.eye(3)]), LinearReward([1.0, 0, 0]), 0.3)],
    ids=lambda problem: f"{type(problem.schedule).__name__}-{type(problem.reward).__name__}")
def test_a_users_problem_is_judged_or_skipped(problem):
    rows = list(_rows(THEOREM, Case("mine", problem, quick=True, seed=3, own=True)))
    assert [row.reason for row in rows if row.holds is False] == []
    assert rows


def test_figure_draws():
    figure = THEOREM.figure(small())
    assert len(figure.axes) == 4 and all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
