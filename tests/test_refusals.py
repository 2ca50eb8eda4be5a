"""What is refused, and how: wrong kinds of things, quadrature rules made for another chain, code that fools the complex step."""

import dataclasses

import numpy as np
import pytest

import ctrl
from ctrl import zoo
from ctrl.estimators import FiniteDifference, LeaveOneOut, Pathwise, RewardToGo, ScoreFunction
from ctrl.exact.chain import value
from ctrl.theorems.path_kl import mismatched_eta_kl
from ctrl.theorems.verdict import Case

problem = zoo.gaussian_pull_2d()
grid = problem.grid(3)
policy = ctrl.BasisPolicy.shift(problem, [0.1, 0.1])
noise = ctrl.Noise(seed=0, paths=8)
V = value(problem, policy, grid)
X = np.array([[0.3, -0.7], [-0.3, 0.7]])


@pytest.mark.parametrize(("name", "call"), [
    ("noise", lambda: ctrl.simulate(problem, policy, grid, 5)),
    ("noise", lambda: Pathwise()(problem, policy, grid, 0)),
    ("problem", lambda: ctrl.simulate("problem", policy, grid, noise)),
    ("problem", lambda: ctrl.exact.evaluate(None, policy, grid)),
    ("problem", lambda: ScoreFunction()("problem", policy, grid, noise)),
    ("policy", lambda: ctrl.exact.evaluate(problem, 3, grid)),
    ("grid", lambda: ctrl.exact.optimum(problem, 100)),
    ("grid", lambda: problem.pretrained(100)),
    ("grid", lambda: Pathwise()(problem, policy, 5, noise)),
    ("dtype", lambda: ctrl.simulate(problem, policy, grid, noise, dtype="foo")),
    ("baseline", lambda: ScoreFunction(baseline=LeaveOneOut)),
    ("baseline", lambda: RewardToGo(baseline=lambda i, x: np.full(len(x), np.nan))(problem, policy, grid, noise)),
    ("baseline", lambda: RewardToGo(baseline=lambda i, x: np.zeros((len(x), 1)))(problem, policy, grid, noise)),
    ("epsilon", lambda: FiniteDifference("0.1")),
    ("i", lambda: V(-1, X)), ("i", lambda: V(4, X)), ("x", lambda: V(0, np.ones(2))), ("i", lambda: V.action_value(3, X, X)),
    ("i", lambda: ctrl.exact.advantage(problem, policy, grid)(3, X, X)),
    ("weights", lambda: ctrl.Gradient.from_samples(np.ones((2, 1)), weights=[np.nan, 1.0])),
    ("samples", lambda: ctrl.Gradient.from_samples([["a"]])),
    ("nodes", lambda: ctrl.Noise.gauss_hermite(problem, policy, problem.grid(1), nodes=400)),
    ("schedule", lambda: ctrl.MixturePolicy("x", ctrl.GaussianMixture([1.0], [[0.0]], [[[1.0]]]))),
    ("beta_min", lambda: ctrl.VP("0.1", 2.0)),
    ("k", lambda: ctrl.AffinePolicy(np.zeros((0, 2, 2)), np.zeros((0, 2)))),
    ("reward", lambda: ctrl.CallableReward(lambda x: x[:, 0] + 1j).value(X)),
    ("reward", lambda: ctrl.CallableReward(lambda x: {}["absent"]).value(X)),
    ("thing", lambda: ctrl.save(np.zeros(2), "/tmp/never.json")),
])
def test_one_line_names_the_argument(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*(got|but)") as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("other", [
    (problem, policy.with_exploration(np.eye(2)), grid), (problem, policy, problem.grid(4)), (zoo.mixture_bump_1d(), None, grid)])
def test_a_quadrature_rule_for_another_chain_is_refused(other):
    """Zeros in the place of the noise that is lacking would pass for an exact expectation."""
    rule = ctrl.Noise.signs(problem, policy, grid)
    at, chosen, steps = other
    with pytest.raises(ValueError, match="noise: expected a quadrature rule made for this problem"):
        ctrl.simulate(at, chosen or at.pretrained(steps), steps, rule)
    still = ctrl.Noise.signs(dataclasses.replace(problem, eta=0.0), policy, grid)
    with pytest.raises(ValueError, match="noise: expected a quadrature rule"):
        ctrl.simulate(problem, policy, grid, still)


@pytest.mark.parametrize("function", [
    lambda x: x[:, 0] - np.abs(x[:, 1]), lambda x: (x * np.conj(x)).sum(axis=1), lambda x: x[:, 0] - np.linalg.norm(x - 1, axis=1)])
def test_code_that_fools_the_complex_step_is_refused(function):
    with pytest.raises(ValueError, match="reward: expected analytic code"):
        ctrl.CallableReward(function).gradient(X)


def test_parts_without_theta_are_no_error():
    """A parameter that does nothing before t = 1/2 has a zero derivative there, and real output for complex theta."""
    p = ctrl.CallablePolicy(lambda t, x, theta: -x + (theta * x if t > 0.5 else 0.0), [0.5])
    assert np.array_equal(p.jacobian_theta(grid, 0, X), np.zeros((2, 2, 1)))
    np.testing.assert_allclose(p.jacobian_theta(grid, 2, X)[:, :, 0], X)


def test_an_action_that_writes_into_its_argument_harms_nothing():
    def writes(t, x, theta):
        x *= 2
        return -x

    kept = ctrl.CallablePolicy(lambda t, x, theta: -2 * x, [0.0])
    a, b = (ctrl.simulate(problem, p, grid, noise).terminal for p in (ctrl.CallablePolicy(writes, [0.0]), kept))
    np.testing.assert_array_equal(a, b)


def test_single_precision_does_not_depend_on_keeping_trajectories():
    short, long = (ctrl.simulate(problem, policy, grid, noise, dtype=np.float32, trajectory=kept) for kept in (False, True))
    np.testing.assert_array_equal(short.terminal, long.terminal)
    np.testing.assert_array_equal(short.log_weight, long.log_weight)


def test_without_a_mismatch_the_planted_eta_is_no_error():
    """The control of the planted error: factor 1 is the right KL."""
    case = Case("control", problem, quick=True, seed=0, steps=12)
    np.testing.assert_allclose(mismatched_eta_kl(case, 1.0), case.truth.path_kl, rtol=1e-10)
