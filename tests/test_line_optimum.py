"""The optimum on the line: against the LQ recursion, a dense search, an independent solver of its policy, and itself at kinks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ctrl
from ctrl import exact, zoo
from ctrl.exact import quadrature
from ctrl.exact.line import line_chain
from ctrl.exact.line_optimum import LineOptimum, LinePolicy
from ctrl.exact.panels import ORDER, fit
from ctrl.testing import assert_mean

VP = ctrl.VP(0.1, 10.0)
GAUSSIAN = ctrl.Problem(VP, ctrl.Gaussian([0.5], [[0.4]]), ctrl.QuadraticReward([[1.2]], [-0.7], [0.3]), kl_weight=0.4)
MIXTURE = zoo.mixture_bump_1d()
OSCILLATING = replace(MIXTURE, reward=ctrl.CallableReward(lambda x: np.cos(6 * x[:, 0])))


def dense(problem, grid, points=1201, finer=4):
    """The specification: V on one lattice, E V by a full matrix, the supremum over a finer lattice by a parabola through the best."""
    c, chain = problem.coefficients(grid), line_chain(problem, problem.pretrained(grid), grid)
    low, high = (f(e) for f, e in zip((np.min, np.max), chain.edges(9.0), strict=True))
    x = np.linspace(low - 3, high + 3, points)
    dx, y = x[1] - x[0], np.linspace(x[0], x[-1], finer * (points - 1) + 1)
    V = problem.reward.value(x[:, None])
    for i in reversed(range(grid.steps)):
        W = np.empty_like(y)
        for block in np.array_split(np.arange(y.size), 40):
            if c.noise[i] == 0:
                W[block] = np.interp(y[block], x, V)
                continue
            kernel = np.exp(-0.5 * ((x - y[block, None]) / c.noise[i]) ** 2)
            W[block] = kernel @ V / kernel.sum(axis=1)
        z = x + c.dt[i] * (-c.f[i] * x + c.h[i] * problem.score(float(grid.times[i]), x[:, None])[:, 0])
        price, new = problem.kl_weight * c.kappa[i] / (c.h[i] ** 2 * c.dt[i]), np.empty_like(x)
        for block in np.array_split(np.arange(x.size), 40):
            F = np.exp(-problem.discount * c.dt[i]) * W - price * (y - z[block, None]) ** 2
            best, rows = np.clip(F.argmax(axis=1), 1, y.size - 2), np.arange(len(block))
            left, middle, right = F[rows, best - 1], F[rows, best], F[rows, best + 1]
            new[block] = middle + (right - left) ** 2 / np.maximum(8 * (2 * middle - left - right), 1e-300)
        V = new
    return dx * np.exp(problem.start_law.log_density(x[:, None])) @ V


def test_reference_numbers():
    best = quadrature.optimum(MIXTURE, MIXTURE.grid(50))
    assert best.objective == pytest.approx(0.621976, abs=5e-7)
    assert best.objective == pytest.approx(best.expected_reward - 0.2 * best.path_kl, abs=1e-13)  # KL* = (E* r - J*)/lambda
    doob = quadrature.doob(MIXTURE, MIXTURE.grid(50))
    assert doob.objective == pytest.approx(0.6404251027, abs=5e-11)
    assert doob.objective - best.objective > 0.018  # planted: the Doob value is not the chain's J*


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([0.0, 0.5, 1.0, 1.5]), st.sampled_from(["prior", "exact"]), st.floats(0.0, 1.0), st.floats(0.1, 2.0),
       st.floats(-0.3, 2.0), st.integers(1, 30))
def test_equals_the_linear_quadratic_optimum(eta, start, discount, kl_weight, curvature, steps):
    reward = ctrl.QuadraticReward([[kl_weight * curvature]], [-0.7], [0.3])
    problem = replace(GAUSSIAN, eta=eta, start=start, discount=discount, kl_weight=kl_weight, reward=reward)
    grid = problem.grid(max(steps, 12 if eta > 1 else 8))
    best, true = quadrature.optimum(problem, grid), exact.chain.optimum(problem, grid)
    for name in ("objective", "penalty"):
        assert getattr(best, name) == pytest.approx(getattr(true, name), rel=1e-10, abs=1e-11)
    assert best.expected_reward == pytest.approx(true.truth.expected_reward, rel=1e-10, abs=1e-11)
    x = np.linspace(-2, 2, 9)[:, None]
    for i in (0, grid.steps - 1):
        assert np.max(np.abs(best.policy.mean(grid, i, x) - true.policy.mean(grid, i, x))) < 1e-9
        assert np.max(np.abs(best.policy.jacobian_x(grid, i, x) - true.policy.jacobian_x(grid, i, x))) < 1e-7


@pytest.mark.parametrize("make", [zoo.mixture_bump_1d, zoo.digits_line])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_policy_attains_the_optimum(make, eta):
    """By the independent solver: J, E r and penalty of the policy, a zero gradient along its feedback, and less for any other."""
    problem = make(eta=eta)
    grid = problem.grid(40 if eta > 0 else 10)
    best = quadrature.optimum(problem, grid)
    for name in ("objective", "expected_reward", "penalty"):
        assert getattr(best.truth, name) == pytest.approx(getattr(best, name), rel=1e-10)
    assert abs(best.truth.gradient.theta[0]) < 1e-9 * best.penalty
    for factor in (0.0, 0.9, 1.1):
        assert quadrature.evaluate(problem, best.policy.with_theta([factor]), grid).objective < best.objective - 1e-5
    if eta > 0:
        near = best.policy.with_theta([1.001])  # planted: an optimum a little off is not stationary
        assert abs(quadrature.evaluate(problem, near, grid).gradient.theta[0]) > 1e-5 * best.penalty


@pytest.mark.parametrize(("problem", "steps", "close"), [
    (MIXTURE, 6, 1e-8), (replace(MIXTURE, kl_weight=0.02), 5, 1e-8), (replace(OSCILLATING, kl_weight=0.05), 6, 1e-6),
    (replace(OSCILLATING, eta=0.5, discount=0.5), 8, 2e-5),
    (replace(MIXTURE, reward=ctrl.CallableReward(lambda x: -np.abs(x[:, 0]), lambda x: -np.sign(x))), 6, 2e-4),
    (replace(MIXTURE, eta=0.0, kl_weight=0.05), 4, 2e-4)])
def test_against_a_dense_search(problem, steps, close):
    """As near as the search is fine: spectrally where V is smooth where the chain lives, to its spacing squared, 5e-4, at kinks."""
    best = quadrature.optimum(problem, problem.grid(steps))
    assert best.objective == pytest.approx(dense(problem, problem.grid(steps)), abs=close)


@pytest.mark.parametrize("problem", [replace(MIXTURE, eta=0.0), replace(OSCILLATING, eta=0.0), replace(MIXTURE, eta=0.5, kl_weight=0.02)])
def test_kinks_are_kept_to_rounding(problem):
    """A double well with a hard optimum: V* is continuous, both actions are worth the same, and J of the jumping policy is J*."""
    grid = problem.grid(20)
    best = quadrature.optimum(problem, grid)
    assert best.kinks.sum() > 10
    assert best.truth.objective == pytest.approx(best.objective, rel=1e-12)
    jumps = 0
    for i in range(grid.steps):
        edges, values = best.value.backward.stages[0][i].edges, best.policy.feedback[i]
        left, right = (values(edges[1:-1] + side * 1e-9)[0] for side in (-1, 1))
        for at in np.flatnonzero(np.abs(left - right) > 1e-3):
            x = np.full((2, 1), edges[at + 1])
            low, high = best.value.backward.low, best.value.backward.high
            score = problem.score(float(grid.times[i]), x)
            a = score + np.array([[left[at]], [right[at]]])
            y = line_chain(problem, problem.pretrained(grid), grid).moved(i, x[:, 0], a[:, 0])
            if low[i] < x[0, 0] < high[i] and np.all((low[i + 1] < y) & (y < high[i + 1])):
                two = best.value.action_value(i, x, a)
                assert abs(two[0] - two[1]) < 1e-6 * (1 + np.abs(two[0]))  # 1e-9 away from the kink
                assert best.value(i, x - 1e-12)[0] == pytest.approx(best.value(i, x + 1e-12)[0], abs=1e-9)
                jumps += 1
    assert jumps > 5


def test_stationarity_and_values():
    """2 lambda kappa (a* - s) = h E V*'(X_{i+1}); the eta = 1 form is wrong elsewhere; E V*_0 = J*; V*, V*' and Q* agree."""
    for eta in (1.0, 0.5):
        problem = replace(MIXTURE, eta=eta)
        grid = problem.grid(30)
        best, c = quadrature.optimum(problem, grid), problem.coefficients(grid)
        own = quadrature.value(problem, best.policy, grid)
        xi, weight = np.polynomial.hermite_e.hermegauss(60)
        x = np.linspace(-1.5, 1.5, 7)[:, None]
        for i in (0, 11, 29):
            a, s = best.policy.mean(grid, i, x), problem.score(float(grid.times[i]), x)
            y = (x + c.dt[i] * (-c.f[i] * x + c.h[i] * a) + c.noise[i] * xi).reshape(-1, 1)
            pull = (best.value.gradient(i + 1, y).reshape(7, -1) @ (weight / weight.sum()))[:, None]
            np.testing.assert_allclose(2 * problem.kl_weight * c.kappa[i] * (a - s), c.h[i] * pull, rtol=0, atol=1e-8)
            assert eta == 1 or np.max(np.abs(pull / problem.kl_weight - (a - s))) > 0.1 * np.max(np.abs(a - s))
            assert np.max(np.abs(own(i, x) - best.value(i, x))) < 1e-12
            assert np.max(np.abs(own.gradient(i, x) - best.value.gradient(i, x))) < 1e-9
            assert np.max(np.abs(best.value.action_value(i, x, a) - best.value(i, x))) < 1e-12
            for step in (-0.1, 0.1):
                assert np.all(best.value.action_value(i, x, a + step) < best.value(i, x))
        np.testing.assert_array_equal(best.value(30, x), problem.reward.value(x))


def test_envelope():
    """dJ*/dlambda = -KL* and dE*[r]/dKL* = lambda, at six differences."""
    def at(h):
        best = quadrature.optimum(replace(MIXTURE, kl_weight=0.2 + h), MIXTURE.grid(12))
        return np.array([best.objective, best.expected_reward, best.path_kl])

    e = 0.004
    slopes = np.array([-1, 9, -45, 45, -9, 1]) @ np.array([at(k * e) for k in (-3, -2, -1, 1, 2, 3)]) / (60 * e)
    assert slopes[0] == pytest.approx(-at(0.0)[2], rel=1e-7)
    assert slopes[1] / slopes[2] == pytest.approx(0.2, rel=1e-7)


def test_the_policy_runs_wherever_policies_run():
    grid = MIXTURE.grid(20)
    best = exact.optimum(MIXTURE, grid)
    paths = ctrl.simulate(MIXTURE, best.policy, grid, ctrl.Noise(seed=3, paths=20_000))
    assert_mean(paths.reward - 0.2 * paths.log_weight, best.objective, resolves=0.02)  # its noise is small at the optimum
    assert_mean(paths.penalty, best.path_kl, resolves=0.1)
    assert best.policy.theta.shape == (1,) and best.policy.jacobian_theta(grid, 3, np.zeros((4, 1))).shape == (4, 1, 1)
    value = ctrl.exact.value(MIXTURE, best.policy, grid)
    gradient = ctrl.estimators.ValueGradient(value)(MIXTURE, best.policy, grid, ctrl.Noise(seed=4, paths=2_000))
    assert abs(gradient.mean[0]) < 6 * gradient.standard_error[0]
    with pytest.raises(ValueError, match=r"^grid: expected the grid of the optimum \(20 steps\)"):
        best.policy.mean(MIXTURE.grid(21), 0, np.zeros((1, 1)))


def test_the_room_grows_with_the_pull():
    """A linear reward that moves the chain twenty deviations: still the LQ optimum; one without bound is refused."""
    pulled = replace(GAUSSIAN, reward=ctrl.LinearReward([6.0]))
    grid = pulled.grid(25)
    assert quadrature.optimum(pulled, grid).objective == pytest.approx(exact.chain.optimum(pulled, grid).objective, rel=1e-12)
    with pytest.raises(ValueError, match="^kl_weight: expected a weight large enough to bound the objective"):
        quadrature.optimum(replace(GAUSSIAN, reward=ctrl.QuadraticReward([[-5.0]], [-0.7])), grid)


def test_dispatch():
    grid = GAUSSIAN.grid(10)
    assert isinstance(exact.optimum(GAUSSIAN, grid), exact.chain.Optimum)
    assert isinstance(exact.optimum(MIXTURE, grid), LineOptimum) and isinstance(exact.optimum(MIXTURE, grid).policy, LinePolicy)
    space = replace(MIXTURE, data=ctrl.GaussianMixture([0.5, 0.5], [[0.0] * 3, [1.0] * 3], [np.eye(3)] * 2), reward=ctrl.BumpReward([0.0] * 3, 0.5))
    with pytest.raises(ValueError, match="^problem: expected Gaussian data and a quadratic reward, or at most 2 dimensions"):
        exact.optimum(space, space.grid(10))


def test_refusals():
    grid = MIXTURE.grid(10)
    with pytest.raises(ValueError, match="^kl_weight: expected a positive weight"):
        exact.optimum(replace(MIXTURE, kl_weight=0.0), grid)
    with pytest.raises(ValueError, match="^entropy_weight: expected 0 for the optimum of mean actions"):
        exact.optimum(replace(MIXTURE, entropy_weight=0.1), grid)
    with pytest.raises(ValueError, match="^eta: expected eta > 0 for a path KL"):
        _ = quadrature.optimum(replace(MIXTURE, eta=0.0), grid).path_kl
    best = quadrature.optimum(MIXTURE, grid)
    with pytest.raises(ValueError, match="^x: expected states in .* at step 3, got 40"):
        best.value(3, np.array([[0.0], [40.0]]))
    with pytest.raises(ValueError, match=r"^i: expected a step in 0 \.\.\. 9, got 10"):
        best.value.action_value(10, np.zeros((1, 1)), np.zeros((1, 1)))
    rough = np.random.default_rng(0).normal(size=4096)
    with pytest.warns(RuntimeWarning, match="^reward: not smooth on [0-9]+ points"):
        quadrature.optimum(replace(MIXTURE, reward=ctrl.CallableReward(
            lambda x: rough[np.floor(1e4 * x[:, 0]).astype(int) % 4096], lambda x: 0 * x)), MIXTURE.grid(1))


def test_panels_hold_functions_to_rounding():
    """Values, slopes, integrals and normal expectations of a function with a narrow feature and, at a panel's end, a kink."""
    def function(x):
        value = np.exp(-0.5 * ((x - 0.3) / 0.01) ** 2) + np.abs(x)
        return np.stack([value, np.abs(value)])

    known = fit(function, np.array([-2.0, 0.0, 2.0]), 0.2, 1, "function")
    x = np.linspace(-2, 2, 997)
    assert np.max(np.abs(known(x)[0] - function(x)[0])) < 1e-12
    slope = np.sign(x) - (x - 0.3) / 1e-4 * np.exp(-0.5 * ((x - 0.3) / 0.01) ** 2)
    assert np.max(np.abs(known.derivative(x)[0] - slope)[x != 0]) < 1e-8
    assert known.weights @ known.flat(0) == pytest.approx(4 + 0.01 * np.sqrt(2 * np.pi), rel=1e-14)
    assert np.all(np.diff(known.nodes) > 0) and known.nodes.size % ORDER == 0
    plain, moment = known.expect(np.array([0.2]), 0.15)
    xi = np.linspace(-9, 9, 400_001)
    normal = np.exp(-0.5 * xi**2)
    values = function(0.2 + 0.15 * xi)[0] * normal / normal.sum()
    assert plain[0, 0] == pytest.approx(values.sum(), abs=1e-9) and moment[0, 0] == pytest.approx(values @ xi, abs=1e-9)
