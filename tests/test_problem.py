"""Problems: the contract by example, start laws, the clock's edges, unstable grids, and inputs that are refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest

import ctrl


def make():
    return ctrl.Problem(
        schedule=ctrl.VP(beta_min=0.1, beta_max=10.0, horizon=1.0),
        data=ctrl.Gaussian(mean=[1.0, -0.5], cov=[[0.6, 0.2], [0.2, 0.3]]),
        reward=ctrl.QuadraticReward(matrix=[[1.0, 0.0], [0.0, 0.5]], center=[-0.5, 1.0]),
        kl_weight=0.5, eta=1.0)


def test_contract_example():
    """Every name, shape and relation that users' scripts rely on, in the order of the design's example."""
    problem = make()
    x, t = np.random.default_rng(0).normal(size=(7, 2)), 0.3
    assert problem.score(t, x).shape == (7, 2)
    grid = problem.grid(steps=100)
    assert grid.steps == 100 and ctrl.TimeGrid(grid.times).steps == 100
    pre = problem.pretrained(grid)
    assert isinstance(pre, ctrl.AffinePolicy) and pre.K.shape == (100, 2, 2) and pre.k.shape == (100, 2)
    policy = ctrl.AffinePolicy(K=0.9 * pre.K, k=pre.k + 0.1)
    assert policy.exploration is None and policy.theta.shape == (600,)
    np.testing.assert_array_equal(policy.theta, np.concatenate([policy.K.ravel(), policy.k.ravel()]))
    np.testing.assert_array_equal(policy.with_theta(2 * policy.theta).k, 2 * policy.k)

    truth = ctrl.exact.evaluate(problem, policy, grid)
    assert truth.objective == pytest.approx(-2.6947972678526515, rel=1e-12)
    assert truth.objective == pytest.approx(truth.expected_reward - 0.5 * truth.penalty, rel=1e-12)
    assert 0 < truth.terminal_kl < truth.path_kl == truth.penalty
    assert truth.terminal.mean.shape == (2,) and truth.terminal.cov.shape == (2, 2)
    assert truth.gradient.theta.shape == (600,) and truth.gradient.K.shape == (100, 2, 2) and truth.gradient.k.shape == (100, 2)
    assert truth.method == "chain"
    best = ctrl.exact.optimum(problem, grid)
    assert best.objective > truth.objective and best.path_kl > 0 and isinstance(best.policy, ctrl.AffinePolicy)
    V = ctrl.exact.value(problem, policy, grid)
    assert V(3, x).shape == (7,) and V.gradient(3, x).shape == (7, 2)
    q = ctrl.exact.advantage(problem, policy, grid)
    assert q(3, x, x).shape == (7,)
    for method in (ctrl.exact.chain, ctrl.exact.quadrature, ctrl.exact.limit):
        assert callable(method.evaluate) and callable(method.value)
    assert callable(ctrl.exact.chain.optimum) and callable(ctrl.exact.limit.optimum)
    assert callable(ctrl.exact.quadrature.doob)

    basis = ctrl.BasisPolicy.shift(problem, theta=[0.1, 0.1])
    np.testing.assert_allclose(basis.mean(grid, 30, x), problem.score(grid.times[30], x) + 0.1)
    scaled = ctrl.BasisPolicy.scaled(problem, scale=0.9, shift=[0.1, 0.1])
    assert ctrl.exact.evaluate(problem, scaled, grid).objective == pytest.approx(truth.objective, rel=1e-12)
    limit = ctrl.exact.limit.evaluate(problem, scaled)
    assert limit.objective == pytest.approx(-2.676588976153, rel=1e-9)
    general = ctrl.BasisPolicy(problem, lambda t: np.array([1.0, t]), np.zeros((2, 2, 2)), np.zeros((2, 2)))
    assert general.theta.shape == (12,)
    by_function = ctrl.CallablePolicy(lambda t, x, theta: x * theta, [0.5, 0.6])
    assert by_function.jacobian_theta(grid, 0, x).shape == (7, 2, 2) and by_function.jacobian_x(grid, 0, x).shape == (7, 2, 2)
    by_value = ctrl.CallableReward(lambda x: x[:, 0] ** 2)
    assert by_value.value(x).shape == (7,) and by_value.gradient(x).shape == (7, 2)

    noise = ctrl.Noise(seed=0, paths=4000)
    assert noise.paths == 4000 and noise.weights is None
    assert noise.start(2).shape == (4000, 2)
    assert noise.steps(100, 2).shape == noise.actions(100, 2).shape == (4000, 100, 2)
    short = problem.grid(steps=3)
    patterns = ctrl.Noise.signs(problem, basis, short)
    assert patterns.paths == 2**8
    np.testing.assert_allclose(ctrl.Noise.gauss_hermite(problem, basis, problem.grid(1), nodes=4).weights.sum(), 1)
    paths = ctrl.simulate(problem, policy, grid, noise)
    assert paths.terminal.shape == (4000, 2) and paths.reward.shape == paths.penalty.shape == paths.log_weight.shape == (4000,)

    grad = ctrl.estimators.ScoreFunction(baseline=None)(problem, basis, short, patterns)
    expected = ctrl.exact.evaluate(problem, basis, short).gradient.theta
    assert np.linalg.norm(grad.mean - expected) < 1e-10 * np.linalg.norm(expected)
    assert grad.covariance.shape == (2, 2) and np.all(grad.standard_error == 0) and grad.samples.shape == (2**8, 2)
    value = ctrl.exact.value(problem, basis, short)
    for estimator in (ctrl.estimators.RewardToGo(), ctrl.estimators.TemporalDifference(value), ctrl.estimators.ValueGradient(value),
                      ctrl.estimators.Pathwise(), ctrl.estimators.FiniteDifference()):
        mean = estimator(problem, basis, short, patterns).mean
        assert np.linalg.norm(mean - expected) < 1e-8 * np.linalg.norm(expected)
    again = ctrl.Gradient.from_samples(grad.samples)
    np.testing.assert_allclose(again.mean, grad.mean, rtol=1e-12)
    ctrl.testing.assert_unbiased(ctrl.estimators.RewardToGo(), problem, basis, problem.grid(steps=3))
    for factory in (ctrl.zoo.gaussian_pull_2d, ctrl.zoo.mixture_bump_1d, lambda: ctrl.zoo.digits_line(digit=3)):
        assert isinstance(factory(), ctrl.Problem)


def test_the_contract_s_refusals():
    problem = replace(make(), eta=0.0)
    grid = problem.grid(4)
    pre = problem.pretrained(grid)
    with pytest.raises(ValueError, match="^eta: expected eta > 0"):
        _ = ctrl.exact.evaluate(problem, pre, grid).path_kl
    paths = ctrl.simulate(problem, pre, grid, ctrl.Noise(seed=0, paths=8))
    with pytest.raises(ValueError, match="eta"):
        _ = paths.log_weight
    with pytest.raises(ValueError, match="eta"):
        ctrl.estimators.ScoreFunction()(problem, pre, grid, ctrl.Noise(seed=0, paths=8))


@pytest.mark.parametrize("schedule", [ctrl.VP(0.1, 5.0), ctrl.SubVP(0.1, 5.0), ctrl.OU(1.0), ctrl.VE(0.1, 3.0)], ids=repr)
def test_start_laws(schedule):
    problem = replace(make(), schedule=schedule)
    prior = problem.start_law
    np.testing.assert_array_equal(prior.mean, 0)
    np.testing.assert_allclose(prior.cov, np.eye(2) * (3.0**2 - 0.1**2 if isinstance(schedule, ctrl.VE) else 1.0), rtol=1e-12)
    exact, alpha = replace(problem, start="exact").start_law, schedule.alpha(1.0)
    np.testing.assert_allclose(exact.mean, alpha * problem.data.mean, rtol=1e-13)
    np.testing.assert_allclose(exact.cov, alpha**2 * problem.data.cov + schedule.v(1.0) * np.eye(2), rtol=1e-13)
    mixed = ctrl.zoo.mixture_bump_1d()
    assert isinstance(replace(mixed, start="exact").start_law, ctrl.GaussianMixture) and isinstance(mixed.start_law, ctrl.Gaussian)


def test_the_pretrained_policy_is_the_score():
    for problem in (make(), ctrl.zoo.mixture_bump_1d(), ctrl.zoo.digits_plane()):
        grid = ctrl.TimeGrid([0.0, 0.2, 0.9, 1.0])
        x = np.random.default_rng(1).normal(size=(6, problem.dim))
        pre = problem.pretrained(grid)
        for i in range(3):
            np.testing.assert_allclose(pre.mean(grid, i, x), problem.score(grid.times[i], x), rtol=1e-12, atol=1e-13)
        assert problem.pretrained(grid) is pre
        law = problem.marginal(1.0)          # t = T is data; planted: the clock the wrong way round
        np.testing.assert_array_equal(law.cov, problem.data.cov)
        assert np.max(np.abs(problem.marginal(0.0).cov - problem.data.cov)) > 1e-3


def test_affine_score():
    problem, x = make(), np.random.default_rng(2).normal(size=(4, 2))
    K, k = problem.affine_score(0.4)
    np.testing.assert_allclose(x @ K.T + k, problem.score(0.4, x), rtol=1e-12)
    with pytest.raises(ValueError, match="^problem: expected Gaussian data"):
        ctrl.zoo.mixture_bump_1d().affine_score(0.4)


def stability(problem, policy, grid):
    """min over steps and directions of 1 - D f + D h K for an affine policy, from the definitions."""
    s, out = problem.schedule, []
    for i, (t, D) in enumerate(zip(grid.times[:-1], np.diff(grid.times), strict=True)):
        tau = s.horizon - t
        h = (1 + problem.eta**2) / 2 * s.g2(tau)
        out.append(np.min(np.linalg.eigvals(np.eye(problem.dim) * (1 - D * s.f(tau)) + D * h * policy.parts(grid).K[i]).real))
    return min(out)


def test_unstable_grid_warns():
    problem = make()
    coarse, fine = problem.grid(100), problem.grid(200)
    steep = ctrl.AffinePolicy(60 * problem.pretrained(coarse).K, problem.pretrained(coarse).k)
    factor = stability(problem, steep, coarse)
    assert factor < -1 and problem.stability_factor(steep, coarse) == pytest.approx(factor, rel=1e-10)
    for call in (ctrl.exact.evaluate, ctrl.exact.value):
        with pytest.warns(RuntimeWarning, match=f"unstable grid: a step multiplies some direction by {factor:.3g} "):
            call(problem, steep, coarse)
    with warnings.catch_warnings():          # no false alarm on a stable grid, nor where only the cheap bound is crossed
        warnings.simplefilter("error")
        ctrl.exact.evaluate(problem, problem.pretrained(fine), fine)
        rotation = np.array([[0.0, 1.0], [-1.0, 0.0]])
        turning = ctrl.AffinePolicy(problem.pretrained(fine).K + 30 * rotation, problem.pretrained(fine).k)
        assert problem.stability_factor(turning, fine) > -1
        problem.check_policy(turning, fine)


def test_unstable_mixture_grid_warns():
    problem = ctrl.zoo.mixture_bump_1d()
    sharp = replace(problem, data=ctrl.GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [[[1e-3]], [[1e-3]]]))
    assert problem.stability_factor(problem.pretrained(problem.grid(50)), problem.grid(50)) > -1
    grid = sharp.grid(2)
    with pytest.warns(RuntimeWarning, match="unstable grid"):
        sharp.check_policy(sharp.pretrained(grid), grid)
    with pytest.warns(RuntimeWarning, match="unstable grid"):    # nothing is known of a callable: the pre-trained policy stands in
        sharp.check_policy(ctrl.CallablePolicy(lambda t, x, theta: x, [1.0], dim=1), grid)


P = make()
BAD = [
    ("schedule", lambda: replace(P, schedule="vp")),
    ("data", lambda: replace(P, data=np.zeros(2))),
    ("reward", lambda: replace(P, reward=lambda x: x)),
    ("reward", lambda: replace(P, reward=ctrl.LinearReward([1.0]))),
    ("kl_weight", lambda: replace(P, kl_weight=-0.1)),
    ("kl_weight", lambda: replace(P, kl_weight=np.nan)),
    ("eta", lambda: replace(P, eta=-1.0)),
    ("eta", lambda: replace(P, eta="one")),
    ("eta", lambda: replace(P, eta=np.inf)),
    ("eta", lambda: replace(P, eta=1j)),
    ("entropy_weight", lambda: replace(P, entropy_weight=-1.0)),
    ("discount", lambda: replace(P, discount=-1.0)),
    ("start", lambda: replace(P, start="noise")),
    ("steps", lambda: P.grid(0)),
    ("steps", lambda: P.grid(2.5)),
    ("x", lambda: P.score(0.1, [0.0, 0.0])),
    ("x", lambda: P.score(0.1, [[0.0, 0.0, 0.0]])),
    ("t", lambda: P.score(-0.1, [[0.0, 0.0]])),
    ("t", lambda: P.score(1.1, [[0.0, 0.0]])),
    ("t", lambda: P.score(np.nan, [[0.0, 0.0]])),
    ("grid", lambda: P.coefficients([0.0, 1.0])),
    ("grid", lambda: P.coefficients(ctrl.TimeGrid([0.0, 1.1]))),
    ("policy", lambda: P.check_policy(None, P.grid(3))),
    ("policy", lambda: P.check_policy(ctrl.AffinePolicy(np.zeros((3, 1, 1)), np.zeros((3, 1))), P.grid(3))),
    ("policy", lambda: P.check_policy(ctrl.CallablePolicy(lambda t, x, th: x, [1.0], dim=3), P.grid(3))),
    ("grid", lambda: P.check_policy(P.pretrained(P.grid(4)), P.grid(3))),
    ("entropy_weight", lambda: replace(P, entropy_weight=0.1).check_policy(P.pretrained(P.grid(4)), P.grid(4))),
]


@pytest.mark.parametrize(("name", "call"), BAD, ids=range(len(BAD)))
def test_bad_inputs_are_named_in_one_line(name, call):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{name}: expected") and ", got " in message and "\n" not in message
