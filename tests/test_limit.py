"""The continuous limit against reference numbers, its own equations, finite differences and the chain's order."""

from dataclasses import replace

import numpy as np
import pytest

from ctrl.exact import limit
from ctrl.laws import Gaussian, GaussianMixture
from ctrl.policy import BasisPolicy, CallablePolicy, Monomials, TimeBins
from ctrl.problem import Problem
from ctrl.reward import BumpReward, LinearReward, QuadraticReward
from ctrl.schedule import OU, VE, VP, SubVP

DATA = Gaussian([1.0, -0.5], [[0.6, 0.2], [0.2, 0.3]])
REWARD = QuadraticReward([[1.0, 0.0], [0.0, 0.5]], [-0.5, 1.0])
PAIRS = [(0.0, VP(0.1, 10.0)), (0.5, SubVP(0.1, 10.0)), (0.0, SubVP(0.1, 10.0)), (0.5, OU(2.0)), (1.0, VE(0.05, 5.0))]


def pull(eta=1.0, schedule=PAIRS[0][1], **kwargs):
    return Problem(schedule, DATA, REWARD, kl_weight=0.5, eta=eta, **kwargs)


def scaled(problem):
    return BasisPolicy.scaled(problem, 0.9, [0.1, 0.1])


def skewed(problem, exploration=None):
    """A policy with nothing symmetric about it."""
    W = np.array([[[0.1, -0.2], [0.3, 0.05]], [[-0.1, 0.2], [0.0, -0.3]]])
    return BasisPolicy(problem, Monomials(1), W, np.array([[0.2, -0.1], [0.3, 0.4]]), exploration)


def richardson(function, step=0.02):
    """Derivative at 0 of an even-error central difference, three levels: O(step^6)."""
    d = [(function(h) - function(-h)) / (2 * h) for h in (step, step / 2, step / 4)]
    a, b = (4 * d[1] - d[0]) / 3, (4 * d[2] - d[1]) / 3
    return (16 * b - a) / 15


def chain(problem, policy, steps):
    """The plain recursion of the chain: J, penalty of the mean, m, P."""
    grid, lam = problem.grid(steps), problem.kl_weight
    m, P = problem.start_law.mean, problem.start_law.cov
    J = penalty = 0.0
    spread = 0.0 if policy.exploration is None else np.trace(policy.exploration)
    for t, D in zip(grid.times[:-1], grid.dt, strict=True):
        f, g2, h, kappa = problem.schedule.rates(t, problem.eta)
        (K, k), (Kp, kp) = policy.affine_at(t), problem.affine_score(t)
        gap2 = np.sum(((K - Kp) @ m + k - kp) ** 2) + np.trace((K - Kp) @ P @ (K - Kp).T)
        penalty += kappa * D * gap2
        J -= np.exp(-problem.discount * t) * lam * kappa * D * (gap2 + spread)
        A = np.eye(2) + D * (h * K - f * np.eye(2))
        m, P = A @ m + D * h * k, A @ P @ A.T + problem.eta**2 * g2 * D * np.eye(2)
        if policy.exploration is not None:
            P = P + (h * D) ** 2 * policy.exploration
    q = problem.reward.quadratic(2)
    reward = -0.5 * (m @ q.matrix @ m + np.trace(q.matrix @ P)) + q.vector @ m + q.constant
    return J + np.exp(-problem.discount * problem.horizon) * reward, penalty, m, P


def test_reference_numbers():
    problem = pull()
    assert chain(problem, scaled(problem), 100)[0] == pytest.approx(-2.6947972678526515, abs=1e-13)
    assert limit.evaluate(problem, scaled(problem)).objective == pytest.approx(-2.676588976153, abs=6e-13)
    best = limit.optimum(problem)
    assert best.objective == pytest.approx(-1.387113300443, abs=6e-13)
    assert best.path_kl == pytest.approx(0.765750677206, abs=6e-13)
    assert limit.evaluate(problem, scaled(problem)).method == "limit"


@pytest.mark.parametrize(("eta", "schedule"), PAIRS, ids=lambda value: getattr(type(value), "__name__", None))
def test_start_value_is_objective_and_exact_start_reverses(eta, schedule):
    """The forward moments and the backward value are different equations with one answer."""
    problem = pull(eta, schedule, discount=0.3)
    policy = skewed(problem)
    truth, (S, w, z), law = limit.evaluate(problem, policy), limit.value(problem, policy).coefficients(0.0), problem.start_law
    start = -0.5 * (law.mean @ S @ law.mean + np.trace(S @ law.cov)) + w @ law.mean + z
    assert truth.objective == pytest.approx(start, rel=1e-11)
    # section 2: with the exact score and the exact start, X_T has the data's law for every eta
    exact = replace(problem, start="exact")
    terminal = limit.evaluate(exact, BasisPolicy.shift(exact, [0.0, 0.0])).terminal
    assert np.max(np.abs(terminal.mean - DATA.mean)) < 1e-10
    assert np.max(np.abs(terminal.cov - DATA.cov)) < 1e-10


def test_sampled_actions_cost_and_nothing_else():
    problem = pull(0.5, discount=0.3, entropy_weight=0.1)
    Sigma = np.array([[0.5, 0.1], [0.1, 0.2]])
    sampled, mean = limit.evaluate(problem, skewed(problem, Sigma)), limit.evaluate(pull(0.5, discount=0.3), skewed(problem))
    assert np.max(np.abs(sampled.terminal.cov - mean.terminal.cov)) < 1e-13
    assert sampled.path_kl == pytest.approx(mean.path_kl, rel=1e-12)
    t, weight = np.polynomial.legendre.leggauss(30)
    t, weight = (t + 1) / 2, weight / 2
    kappa = np.array([problem.schedule.rates(s, 0.5)[3] for s in t])
    assert sampled.penalty - mean.penalty == pytest.approx(0.7 * weight @ kappa, rel=1e-11)
    entropy = 0.5 * np.log(np.linalg.det(2 * np.pi * np.e * Sigma))
    extra = weight @ (np.exp(-0.3 * t) * (0.1 * entropy - 0.5 * 0.7 * kappa))
    assert sampled.objective - mean.objective == pytest.approx(extra, rel=1e-11)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_chain_converges_at_order_one(eta):
    problem = pull(eta, discount=0.3)
    policy = skewed(problem, np.eye(2) * 0.3)
    truth, steps = limit.evaluate(problem, policy), np.array([400, 800, 1600])
    errors = np.array([chain(problem, policy, int(n))[0] for n in steps]) - truth.objective
    slopes = np.diff(np.log(np.abs(errors))) / np.log(2)
    assert np.all(np.abs(slopes + 1) < 0.02)
    a, b = 2 * errors[1] - errors[0], 2 * errors[2] - errors[1]
    assert abs((4 * b - a) / 3) < 2e-7  # two terms of the expansion removed: the same limit


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_value_solves_its_equation(eta):
    """dV/dt + b.grad V + eta^2 g^2/2 lap V - lambda kappa (|mu - s|^2 + tr Sigma) + gamma H = rho V at scattered points."""
    problem = pull(eta, discount=0.3, entropy_weight=0.1)
    Sigma = np.array([[0.5, 0.1], [0.1, 0.2]])
    policy = skewed(problem, Sigma)
    V, lam = limit.value(problem, policy), problem.kl_weight
    x = np.array([[0.3, -1.0], [1.5, 0.2], [-2.0, 1.0]])
    assert np.max(np.abs(V(1.0, x) - REWARD.value(x))) < 1e-13
    entropy = 0.1 * 0.5 * np.log(np.linalg.det(2 * np.pi * np.e * Sigma))
    for t in (0.1, 0.45, 0.9):
        f, g2, h, kappa = problem.schedule.rates(t, eta)
        K, k = policy.affine_at(t)
        mu, gap = x @ K.T + k, x @ K.T + k - problem.score(t, x)
        slope, lap = richardson(lambda e, t=t: V(t + e, x), 0.01), -np.trace(V.coefficients(t)[0])
        drift = np.sum((-f * x + h * mu) * V.gradient(t, x), axis=1)

        def residual(sign, rate, h=h, slope=slope, lap=lap, drift=drift, gap=gap, g2=g2, t=t):
            cost = lam * rate * (np.sum(gap**2, axis=1) + 0.7)
            return np.max(np.abs(slope + drift + 0.5 * eta**2 * g2 * lap + sign * cost + entropy - 0.3 * V(t, x)))

        assert residual(-1, kappa) < 2e-8
        assert residual(+1, kappa) > 1e-2  # cost added
        assert residual(-1, 0.8 * kappa) > 1e-3
        step = np.stack([richardson(lambda e, j=j, t=t: V(t, x + e * np.eye(2)[j]), 0.1) for j in range(2)], axis=1)
        assert np.max(np.abs(V.gradient(t, x) - step)) < 1e-10


@pytest.mark.parametrize(("eta", "make"), [
    (0.0, lambda problem: scaled(problem).with_exploration(np.eye(2))),
    (0.5, lambda problem: skewed(problem, np.eye(2))),
    (1.0, lambda problem: BasisPolicy(problem, TimeBins(3), np.full((3, 2, 2), 0.1), np.full((3, 2), -0.2), np.eye(2)))])
def test_gradient_is_derivative_of_objective(eta, make):
    problem = pull(eta, discount=0.3, entropy_weight=0.1)
    policy = make(problem)
    gradient = limit.evaluate(problem, policy).gradient.theta
    direction = np.cos(np.arange(policy.theta.size) + 1.0)
    slope = richardson(lambda h: limit.evaluate(problem, policy.with_theta(policy.theta + h * direction)).objective)
    assert gradient @ direction == pytest.approx(slope, abs=2e-9)
    assert abs(slope) > 1e-2


@pytest.mark.parametrize(("eta", "schedule"), PAIRS, ids=lambda value: getattr(type(value), "__name__", None))
def test_optimum_is_stationary(eta, schedule):
    problem = pull(eta, schedule, discount=0.2)
    best = limit.optimum(problem)
    truth = limit.evaluate(problem, best.policy)
    assert truth.objective == pytest.approx(best.objective, rel=1e-11)  # Riccati against the moments under its policy
    assert truth.mean_penalty == best.penalty
    assert abs(truth.gradient.theta[0]) < 1e-11
    for theta in (0.9, 1.1):
        assert limit.evaluate(problem, best.policy.with_theta([theta])).objective < best.objective - 1e-5
    assert limit.evaluate(problem, skewed(problem)).objective < best.objective
    # a* = s + h/(2 lambda kappa) grad V of its own value; at eta = 1 the factor is 1/lambda, and at eta != 1 it is not
    V, t, x = limit.value(problem, best.policy), 0.4, np.array([[0.3, -1.0], [1.5, 0.2]])
    _, _, h, kappa = problem.schedule.rates(t, eta)
    K, k = best.policy.affine_at(t)
    feedback = x @ K.T + k - problem.score(t, x)
    assert np.max(np.abs(feedback - h / (2 * 0.5 * kappa) * V.gradient(t, x))) < 1e-10
    if eta != 1:
        assert np.max(np.abs(feedback - V.gradient(t, x) / 0.5)) > 1e-3


def test_optimum_is_the_tilt_when_memoryless():
    """Section 9: with a long noising X_T of the optimum has the tilted law, precision C^-1 + Q/lambda; with a short one not."""
    precision = DATA.precision + REWARD.matrix / 0.5
    tilt = Gaussian(np.linalg.solve(precision, DATA.precision @ DATA.mean + REWARD.matrix @ REWARD.center / 0.5),
                    np.linalg.inv(precision))
    for beta_max, bias in ((10.0, 2.473e-6), (4.0, 1.206e-3), (2.0, 1.339e-2), (1.0, 6.314e-2)):
        problem = pull(1.0, VP(0.1, beta_max), start="exact")
        terminal = limit.evaluate(problem, limit.optimum(problem).policy).terminal
        assert Gaussian(terminal.mean, terminal.cov).kl(tilt) == pytest.approx(bias, rel=5e-4)


def test_envelope():
    """dJ*/dlambda = -path KL*: the slope of every reward-KL frontier."""
    problem = pull(0.5)
    slope = richardson(lambda e: limit.optimum(replace(problem, kl_weight=0.5 + e)).objective)
    assert slope == pytest.approx(-limit.optimum(problem).path_kl, abs=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
def test_marginal_kl_rate(eta):
    problem = pull(eta)
    policy = skewed(problem)
    for t in (0.05, 0.5, 0.95, 1.0):
        rate = limit.marginal_kl_rate(problem, policy, t)
        assert rate.formula == pytest.approx(rate.derivative, rel=1e-9, abs=1e-11)
    # it integrates to the terminal KL; without the Fisher term it does not
    t, weight = np.polynomial.legendre.leggauss(24)
    total = sum(w / 2 * limit.marginal_kl_rate(problem, policy, (s + 1) / 2).formula for s, w in zip(t, weight, strict=True))
    assert total == pytest.approx(limit.evaluate(problem, policy).terminal_kl, abs=1e-9)


def test_marginal_kl_rate_needs_its_fisher_term():
    problem = pull(1.0)
    policy, t = skewed(problem), 0.6
    deterministic = limit.marginal_kl_rate(pull(0.0), policy, t)
    p, q = limit.evaluate(problem, policy), limit.marginal_kl_rate(problem, policy, t)
    assert p.terminal_kl > 0 and abs(deterministic.formula - q.formula) > 1e-2


def test_linear_reward_without_penalty():
    """lambda = 0 is allowed for a policy, and E b'X is linear in the mean."""
    problem = Problem(VP(0.1, 10.0), DATA, LinearReward([1.0, 2.0]), 0.0)
    truth = limit.evaluate(problem, scaled(problem))
    assert truth.objective == pytest.approx(truth.terminal.mean @ [1.0, 2.0], abs=1e-14)


def test_errors_name_their_argument():
    problem = pull()
    pre = problem.pretrained(problem.grid(10))
    with pytest.raises(ValueError, match="policy: expected a policy in continuous time .* got AffinePolicy"):
        limit.evaluate(problem, pre)
    with pytest.raises(ValueError, match="policy: expected a policy in continuous time .* got CallablePolicy"):
        limit.value(problem, CallablePolicy(lambda t, x, th: x * th, [1.0], dim=2))
    mixture = replace(problem, data=GaussianMixture([0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], np.stack([np.eye(2)] * 2)))
    with pytest.raises(ValueError, match="problem: expected Gaussian data in the limit, got GaussianMixture"):
        limit.evaluate(mixture, scaled(problem))
    with pytest.raises(ValueError, match="problem: expected a quadratic reward in the limit, got BumpReward"):
        limit.evaluate(replace(problem, reward=BumpReward([0.0, 0.0], 1.0)), scaled(problem))
    with pytest.raises(ValueError, match="kl_weight: expected a number > 0"):
        limit.optimum(replace(problem, kl_weight=0.0))
    with pytest.raises(ValueError, match="entropy_weight: expected 0"):
        limit.optimum(replace(problem, entropy_weight=0.1))
    with pytest.raises(ValueError, match="entropy_weight: expected a policy with exploration"):
        limit.evaluate(replace(problem, entropy_weight=0.1), scaled(problem))
    with pytest.raises(ValueError, match="breaks down at t = .* reward that grows"):
        limit.optimum(replace(problem, reward=QuadraticReward(-3 * np.eye(2), [0.0, 0.0])))
    with pytest.raises(ValueError, match="eta: expected eta > 0"):
        _ = limit.optimum(pull(0.0)).path_kl
    with pytest.raises(ValueError, match="t: expected a time up to the horizon 1, got 1.5"):
        limit.value(problem, scaled(problem))(1.5, np.zeros((1, 2)))
    with pytest.raises(ValueError, match="t: expected a finite number >= 0"):
        limit.marginal_kl_rate(problem, scaled(problem), -0.1)
    flat = BasisPolicy.shift(Problem(VP(), Gaussian([0.0], [[1.0]]), LinearReward([1.0]), 1.0), [0.0])
    with pytest.raises(ValueError, match="policy: expected dimension 2"):
        limit.evaluate(problem, flat)
