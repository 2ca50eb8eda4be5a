"""Truth in the plane against closed recursions, lines side by side, dense matrices, differences, and simulated paths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import ctrl
from ctrl import zoo
from ctrl.exact import chain, plane, plane_optimum, quadrature
from ctrl.exact.lattice import Lattice
from ctrl.exact.plane_optimum import Envelope, PlaneOptimum
from ctrl.laws import Gaussian, GaussianMixture
from ctrl.policy import AffinePolicy, BasisPolicy, CallablePolicy, Monomials
from ctrl.problem import Problem
from ctrl.reward import BumpReward, CallableReward
from ctrl.schedule import VE, VP, TimeGrid

SIGMA = [[0.5, 0.2], [0.2, 0.4]]
TURNED = GaussianMixture([0.4, 0.6], [[-0.8, 0.3], [0.7, -0.2]], [[[0.3, 0.12], [0.12, 0.2]], [[0.25, -0.1], [-0.1, 0.4]]])


def swirl(problem, theta=(0.3, -0.2), exploration=None):
    """A departure that no product of lines, and no affine map, has."""
    def action(t, x, th):
        return problem.score(t, x) + np.stack([th[0] * np.sin(x[:, 1]), th[1] * np.cos(x[:, 0] + x[:, 1])], axis=1)

    return CallablePolicy(action, theta, exploration=exploration, dim=2)


def turned(eta=1.0, **changes):
    return Problem(VP(0.1, 10.0), TURNED, BumpReward([-0.7, 0.4], 0.6), kl_weight=0.3, eta=eta, **changes)


def everything():
    """A problem in which nothing is switched off, and its policy."""
    problem = turned(0.7, discount=0.4, entropy_weight=0.05, start="exact")
    return problem, swirl(problem, exploration=SIGMA)


def departing(problem):
    return BasisPolicy(problem, Monomials(0, problem.horizon), W=-0.2 * np.eye(2)[None], w=np.full((1, 2), 0.2))


def states_of(mean, cov, count=50):
    z = np.random.default_rng(0).normal(size=(count, 2)) * 1.5
    return mean + z @ np.linalg.cholesky(cov).T


# ---- against the affine-Gaussian chain -------------------------------------------------------------------------------


@pytest.mark.parametrize(("eta", "exploration"), [(1.0, None), (1.0, SIGMA), (0.7, None), (1.5, SIGMA), (0.0, None)])
def test_against_the_chain(eta, exploration):
    """Every part of a Truth, to rounding, where recursions know it."""
    problem = replace(zoo.gaussian_pull_2d(eta), discount=0.3, entropy_weight=0.1 if exploration else 0.0, start="exact" if eta == 0.7 else "prior")
    grid, policy = problem.grid(25), BasisPolicy.scaled(problem, 0.9, [0.1, -0.2], exploration=exploration)
    truth, known = plane.evaluate(problem, policy, grid), chain.evaluate(problem, policy, grid)
    for name in ("objective", "expected_reward", "penalty", "mean_penalty"):
        assert getattr(truth, name) == pytest.approx(getattr(known, name), abs=1e-12)
    np.testing.assert_allclose(truth.terminal.mean, known.terminal.mean, atol=1e-12)
    np.testing.assert_allclose(truth.terminal.cov, known.terminal.cov, atol=1e-12)
    np.testing.assert_allclose(truth.gradient.theta, known.gradient.theta, atol=1e-11)
    assert truth.terminal_kl == pytest.approx(known.terminal_kl, abs=1e-10)
    if eta > 0:
        density = np.exp(Gaussian(known.terminal.mean, known.terminal.cov).log_density(truth.terminal.points.reshape(-1, 2)))
        assert np.max(np.abs(truth.terminal.density.ravel() - density)) < 1e-10
    assert truth.method == "plane" and known.terminal_kl > 0.05


@pytest.mark.parametrize(("eta", "exploration"), [(1.0, None), (0.7, SIGMA), (0.0, None)])
def test_value_against_the_chain(eta, exploration):
    problem = replace(zoo.gaussian_pull_2d(eta), discount=0.3)
    grid, policy = problem.grid(25), BasisPolicy.scaled(problem, 0.9, [0.1, -0.2], exploration=exploration)
    V, W = plane.value(problem, policy, grid), chain.value(problem, policy, grid)
    means, covs = chain.LinearChain(problem, policy, grid).moments
    for i in (0, 12, 24, 25):
        x = states_of(means[i], covs[i])
        np.testing.assert_allclose(V(i, x), W(i, x), atol=1e-10)
        np.testing.assert_allclose(V.gradient(i, x), W.gradient(i, x), atol=1e-8)
        if i < 25:
            a = policy.mean(grid, i, x) + 0.3
            np.testing.assert_allclose(V.action_value(i, x, a), W.action_value(i, x, a), atol=1e-10)


def test_affine_policies_have_gradients_by_step():
    """dJ/dK (N, 2, 2) and dJ/dk (N, 2), and a lattice for each step of an uneven grid."""
    problem, grid = zoo.gaussian_pull_2d(0.7), TimeGrid(np.linspace(0, 1, 13) ** 1.3)
    pre = problem.pretrained(grid)
    policy = AffinePolicy(0.9 * pre.K, pre.k + 0.1, SIGMA)
    got, known = plane.evaluate(problem, policy, grid).gradient, chain.evaluate(problem, policy, grid).gradient
    np.testing.assert_allclose(got.K, known.K, atol=1e-11)
    np.testing.assert_allclose(got.k, known.k, atol=1e-11)


# ---- against lines side by side --------------------------------------------------------------------------------------


FIRST = Problem(VP(0.1, 10.0), GaussianMixture([0.3, 0.7], [[-1.2], [0.8]], [[[0.09]], [[0.16]]]), BumpReward([-1.0], 0.5), 0.2)
SECOND = Problem(VP(0.1, 10.0), GaussianMixture([0.6, 0.4], [[-0.5], [0.9]], [[[0.2]], [[0.1]]]), BumpReward([0.8], 0.4), 0.2)


def side_by_side(**changes):
    """Two lines as one plane: law a product, reward a sum, a policy that keeps them apart; with the lines and their policies."""
    a, b = FIRST.data, SECOND.data
    data = GaussianMixture(np.outer(a.weights, b.weights).ravel(), [[p, q] for p in a.means[:, 0] for q in b.means[:, 0]],
                           [np.diag([p, q]) for p in a.covs[:, 0, 0] for q in b.covs[:, 0, 0]])
    lines = [replace(problem, **changes) for problem in (FIRST, SECOND)]
    reward = CallableReward(lambda x: FIRST.reward.value(x[:, :1]) + SECOND.reward.value(x[:, 1:]))
    problem = replace(lines[0], data=data, reward=reward)

    def policy(problem, theta, exploration):
        return CallablePolicy(lambda t, x, th: problem.score(t, x) + th * np.cos(x), theta, exploration=exploration, dim=problem.dim)

    sampled = changes.get("entropy_weight", 0) > 0
    alone = [policy(line, th, [[v]] if sampled else None) for line, th, v in zip(lines, (-0.15, 0.2), (0.5, 0.3), strict=True)]
    return problem, policy(problem, [-0.15, 0.2], np.diag([0.5, 0.3]) if sampled else None), lines, alone


@pytest.mark.parametrize("changes", [{}, {"eta": 0.6, "discount": 0.3, "entropy_weight": 0.1, "start": "exact"}], ids=["plain", "everything"])
def test_products_of_lines(changes):
    """Independent coordinates: J, KLs, V and Q add up, gradients and grad V stack, densities multiply; 1-D quadrature knows each."""
    problem, policy, lines, alone = side_by_side(**changes)
    grid = problem.grid(12)
    truth = plane.evaluate(problem, policy, grid)
    known = [quadrature.evaluate(line, each, grid) for line, each in zip(lines, alone, strict=True)]
    for name in ("objective", "expected_reward", "penalty", "mean_penalty"):
        assert getattr(truth, name) == pytest.approx(sum(getattr(t, name) for t in known), abs=1e-10)
    assert truth.terminal_kl == pytest.approx(sum(t.terminal_kl for t in known), abs=1e-9)
    np.testing.assert_allclose(truth.gradient.theta, [t.gradient.theta[0] for t in known], atol=1e-10)
    np.testing.assert_allclose(truth.terminal.mean, [t.terminal.mean[0] for t in known], atol=1e-10)
    np.testing.assert_allclose(truth.terminal.cov, np.diag([t.terminal.cov[0, 0] for t in known]), atol=1e-10)
    V, alone_V = plane.value(problem, policy, grid), [quadrature.value(line, each, grid) for line, each in zip(lines, alone, strict=True)]
    x = np.random.default_rng(1).uniform(-1.5, 1.5, size=(40, 2))
    columns = [x[:, :1], x[:, 1:]]
    for i in (0, 6, 10, 11):
        np.testing.assert_allclose(V(i, x), sum(v(i, y) for v, y in zip(alone_V, columns, strict=True)), atol=1e-10)
        np.testing.assert_allclose(V.gradient(i, x), np.hstack([v.gradient(i, y) for v, y in zip(alone_V, columns, strict=True)]), atol=1e-8)
        Q = sum(v.action_value(i, y, 0.7 * y) for v, y in zip(alone_V, columns, strict=True))
        np.testing.assert_allclose(V.action_value(i, x, 0.7 * x), Q, atol=1e-10)


# ---- against the specification ---------------------------------------------------------------------------------------


def dense(problem, policy, grid, half=8.2, n=47):
    """The specification: full matrices between all nodes of one fixed lattice, nothing windowed, nothing chosen."""
    c, lam, steps = problem.coefficients(grid), problem.kl_weight, grid.steps
    line = np.linspace(-half, half, n)
    x = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
    area, cov = (line[1] - line[0]) ** 2, policy.exploration_cov(grid)
    p, V, gradient = [np.exp(problem.start_law.log_density(x))], problem.reward.value(x), 0.0
    kernels, gaps, running = [], [], []
    for i in range(steps):
        mu, sigma = policy.mean(grid, i, x), np.zeros((2, 2)) if cov is None else cov[i]
        gaps.append(mu - problem.score(grid.times[i], x))
        R = problem.eta**2 * c.g2[i] * c.dt[i] * np.eye(2) + c.h[i] ** 2 * c.dt[i] ** 2 * sigma
        y = x[None] - (x + c.dt[i] * (-c.f[i] * x + c.h[i] * mu))[:, None]
        K = np.exp(-0.5 * np.einsum("nma,ab,nmb->nm", y, np.linalg.inv(R), y)) / (2 * np.pi * np.sqrt(np.linalg.det(R))) * area
        kernels.append((K, y @ np.linalg.inv(R)))
        p.append(p[-1] @ K)
        entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * sigma)[1] if problem.entropy_weight else 0.0
        running.append(problem.entropy_weight * c.dt[i] * entropy - lam * c.kappa[i] * c.dt[i] * (np.sum(gaps[-1] ** 2, axis=1) + np.trace(sigma)))
    reward = area * p[-1] @ V
    for i in reversed(range(steps)):
        (K, stein), decay = kernels[i], np.exp(-problem.discount * c.dt[i])
        u = c.h[i] * decay * np.einsum("nm,nma,m->na", K, stein, V) - 2 * lam * c.kappa[i] * gaps[i]
        gradient += c.discount[i] * c.dt[i] * area * np.einsum("n,na,nap->p", p[i], u, policy.jacobian_theta(grid, i, x))
        V = decay * K @ V + running[i]
    return {"x": x, "V": V, "J": area * p[0] @ V, "reward": reward, "gradient": gradient, "mass": area * p[-1].sum(),
            "mean": area * p[-1] @ x, "penalty": sum(c.kappa[i] * c.dt[i] * area * p[i] @ np.sum(g**2, axis=1) for i, g in enumerate(gaps))}


def test_everything_against_dense_matrices():
    """Sampled actions with a turned covariance, a turned mixture, a swirling policy, discount, entropy, an uneven grid."""
    problem, policy = everything()
    grid = TimeGrid(np.array([0.0, 0.1, 0.22, 0.33]))  # early: steps so noisy that few nodes are enough
    truth, spec = plane.evaluate(problem, policy, grid), dense(problem, policy, grid)
    assert spec["mass"] == pytest.approx(1, abs=1e-9)
    for name, got in (("J", truth.objective), ("reward", truth.expected_reward), ("penalty", truth.mean_penalty)):
        assert got == pytest.approx(spec[name], abs=1e-9)
    np.testing.assert_allclose(truth.gradient.theta, spec["gradient"], atol=1e-9)
    np.testing.assert_allclose(truth.terminal.mean, spec["mean"], atol=1e-9)
    near = np.max(np.abs(spec["x"]), axis=1) < 2
    np.testing.assert_allclose(plane.value(problem, policy, grid)(0, spec["x"][near]), spec["V"][near], atol=1e-9)


def test_gradient_against_differences():
    """The adjoint against Richardson's differences of J, both parameters; and forms that people write instead miss it."""
    problem, policy = everything()
    grid = problem.grid(12)
    gradient = plane.evaluate(problem, policy, grid).gradient.theta

    def J(j, h):
        return plane.evaluate(problem, policy.with_theta(policy.theta + h * np.eye(2)[j]), grid).objective

    for j in (0, 1):
        d = [(J(j, h) - J(j, -h)) / (2 * h) for h in (0.04, 0.02)]
        assert gradient[j] == pytest.approx((4 * d[1] - d[0]) / 3, abs=2e-7)
    assert np.all(np.abs(gradient) > 1e-2)
    charged = plane.evaluate(replace(problem, kl_weight=0.0), policy, grid).gradient.theta      # planted: the penalty's part forgotten
    assert np.max(np.abs(charged - gradient)) > 1e-3


def test_grad_value_against_differences():
    problem, policy = everything()
    grid = problem.grid(12)
    V, x = plane.value(problem, policy, grid), np.array([[-0.8, 0.1], [0.4, 0.6], [1.3, -0.9]])
    for i in (0, 6, 11):
        for j in (0, 1):
            d = [(V(i, x + h * np.eye(2)[j]) - V(i, x - h * np.eye(2)[j])) / (2 * h) for h in (0.02, 0.01)]
            np.testing.assert_allclose(V.gradient(i, x)[:, j], (4 * d[1] - d[0]) / 3, atol=1e-7)


# ---- the order of the error ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: turned(0.7), zoo.digits_plane], ids=["turned", "digits_plane"])
def test_error_falls_spectrally(make):
    """log error falls at least like resolution^2, not like log resolution; what is chosen by default is good to 1e-8."""
    problem = make()
    policy, grid = departing(problem), problem.grid(20)

    def numbers(resolution):
        truth = plane.evaluate(problem, policy, grid, resolution=resolution)
        return np.array([truth.objective, truth.mean_penalty, *truth.terminal.mean, *truth.gradient.theta])

    best = numbers(1.8)
    error = {r: np.max(np.abs(numbers(r) - best)) / np.max(np.abs(best)) for r in (0.5, 0.6, 0.7, 0.8, 0.9, None)}
    fixed = np.array([0.5, 0.6, 0.7, 0.8, 0.9])
    rate = -np.polyfit(fixed**2, np.log([error[r] for r in fixed]), 1)[0]
    assert rate > 12                                            # 2 pi^2 = 19.7 for a linear chain; order 2 would give about 5
    assert error[None] < 1e-8 < error[0.8] < 1e-4


# ---- values and advantages -------------------------------------------------------------------------------------------


def test_value_is_the_mean_action_value():
    """Sampled actions: E_a Q_i = V_i, also where an action given leaves far less noise than the policy does."""
    xi, weight = np.polynomial.hermite_e.hermegauss(40)
    z = np.stack(np.meshgrid(xi, xi, indexing="ij"), axis=-1).reshape(-1, 2)
    weight = np.outer(weight, weight).ravel() / weight.sum() ** 2
    for eta, sigma in ((0.7, np.array(SIGMA)), (0.25, 10.0 * np.array(SIGMA))):
        problem = turned(eta, discount=0.3)
        policy, grid = swirl(problem, exploration=sigma), problem.grid(8)
        V, x = plane.value(problem, policy, grid), np.array([[-0.8, 0.2], [0.3, -0.4]])
        for i in (6,):
            a = (policy.mean(grid, i, x)[:, None] + z @ np.linalg.cholesky(sigma).T).reshape(-1, 2)
            Q = V.action_value(i, np.repeat(x, len(z), axis=0), a).reshape(2, -1) @ weight
            np.testing.assert_allclose(Q, V(i, x), atol=1e-8)
        assert np.max(np.abs(V.action_value(6, x, policy.mean(grid, 6, x)) - V(6, x))) > 1e-3


def test_advantage_is_centred_and_first_order():
    problem = turned(1.3)
    policy, x = swirl(problem, exploration=SIGMA), np.array([[-0.8, 0.2], [0.3, -0.4], [1.0, 0.5]])
    gaps, steps = [], (12, 18, 24, 36)
    for n in steps:
        grid, i = problem.grid(n), n // 2
        V, q = plane.value(problem, policy, grid), plane.advantage(problem, policy, grid)
        a = policy.mean(grid, i, x) + np.array([0.7, -0.4])
        gaps.append(np.max(np.abs((V.action_value(i, x, a) - V(i, x)) / grid.dt[i] - q(i, x, a))))
    assert -1.2 < np.polyfit(np.log(steps), np.log(gaps), 1)[0] < -0.8


def test_objective_is_the_mean_value():
    problem = turned()
    grid, policy = problem.grid(20), swirl(problem)
    xi, weight = np.polynomial.hermite_e.hermegauss(60)
    z = np.stack(np.meshgrid(xi, xi, indexing="ij"), axis=-1).reshape(-1, 2)
    keep = np.max(np.abs(z), axis=1) < 6
    mass = (np.outer(weight, weight).ravel() / weight.sum() ** 2)[keep]
    J = mass @ plane.value(problem, policy, grid)(0, z[keep])
    assert plane.evaluate(problem, policy, grid).objective == pytest.approx(J, abs=1e-7)


# ---- against simulated paths -----------------------------------------------------------------------------------------


def test_digits_plane_against_simulated_paths():
    """Reward, penalty, terminal mean and gradient of 200,000 simulated chains; another digit's reward is told apart."""
    problem = zoo.digits_plane()
    grid, policy, noise = problem.grid(20), departing(problem), ctrl.Noise(seed=11, paths=200_000)
    truth, paths = ctrl.exact.evaluate(problem, policy, grid), ctrl.simulate(problem, policy, grid, noise)
    assert truth.method == "plane"
    samples = np.column_stack([paths.penalty, paths.terminal])
    ctrl.testing.assert_mean(samples, np.array([truth.penalty, *truth.terminal.mean]), resolves=0.02)
    ctrl.testing.assert_mean(paths.reward, truth.expected_reward, resolves=0.25)
    gradient = ctrl.estimators.Pathwise()(problem, policy, grid, noise)
    ctrl.testing.assert_mean(gradient, truth.gradient.theta, resolves=0.5)
    with pytest.raises(AssertionError):
        other = ctrl.exact.evaluate(zoo.digits_plane(digit=4), policy, grid)
        ctrl.testing.assert_mean(paths.reward, other.expected_reward, resolves=0.25)


# ---- Doob ------------------------------------------------------------------------------------------------------------


def test_action_value_at_the_last_step():
    """V_N = r is known itself: a given action leaves less noise than the lattice of a sampled policy resolves (once 2e-6 off)."""
    problem = zoo.double_well_2d(0.5)
    grid, x = problem.grid(8), np.array([[0.4, -0.3], [-1.0, 0.2], [1.5, 0.7]])
    policy, c = departing(problem).with_exploration([[0.5, 0.1], [0.1, 0.5]]), problem.coefficients(grid)
    a = policy.mean(grid, 7, x) + 1.0
    z = np.linspace(-7, 7, 71)
    nodes, weight = np.stack(np.meshgrid(z, z, indexing="ij"), axis=-1).reshape(-1, 1, 2), np.exp(-0.5 * z**2)
    y = x + c.dt[7] * (-c.f[7] * x + c.h[7] * a) + c.noise[7] * nodes
    r = problem.reward.value(y.reshape(-1, 2)).reshape(-1, 3)
    cost = problem.kl_weight * c.kappa[7] * c.dt[7] * np.sum((a - problem.score(grid.times[7], x)) ** 2, axis=1)
    expected = np.outer(weight, weight).ravel() @ r / weight.sum() ** 2 - cost
    np.testing.assert_allclose(plane.value(problem, policy, grid).action_value(7, x, a), expected, rtol=1e-9)


def test_doob():
    """Against a Gaussian integral, and lines side by side."""
    pull = zoo.gaussian_pull_2d()
    grid, lam = pull.grid(15), pull.kl_weight
    A, c = chain.LinearChain(pull, pull.pretrained(grid), grid).maps
    map_, shift, cov = np.eye(2), np.zeros(2), np.zeros((2, 2))
    for Ai, ci, noise in zip(A, c, pull.coefficients(grid).noise, strict=True):
        map_, shift, cov = Ai @ map_, Ai @ shift + ci, Ai @ cov @ Ai.T + noise**2 * np.eye(2)
    bend = np.linalg.inv(lam * np.linalg.inv(pull.reward.matrix) + cov)     # log phi_0 = log E e^{r/lambda}, X_N | x ~ N(map x + shift, cov)
    centre = shift - pull.reward.center
    log_phi = -0.5 * (np.linalg.slogdet(np.eye(2) + cov @ pull.reward.matrix / lam)[1] + centre @ bend @ centre + np.trace(map_.T @ bend @ map_))
    assert plane.doob(pull, grid).objective == pytest.approx(lam * log_phi, abs=1e-8)
    problem, _, lines, _ = side_by_side()
    grid = problem.grid(12)
    doob, known = plane.doob(problem, grid), [quadrature.doob(line, grid) for line in lines]
    for name in ("objective", "path_kl", "expected_reward"):
        assert getattr(doob, name) == pytest.approx(sum(getattr(d, name) for d in known), rel=1e-7)
    x = np.random.default_rng(2).uniform(-1.5, 1.5, size=(20, 2))
    for i in (0, 11, 12):
        np.testing.assert_allclose(doob.log_phi(i, x), known[0].log_phi(i, x[:, :1]) + known[1].log_phi(i, x[:, 1:]), atol=1e-6)
    pre = plane.evaluate(problem, problem.pretrained(grid), grid)
    assert doob.objective > pre.expected_reward + 0.1               # Jensen


# ---- the optimum -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eta", "discount"), [(1.0, 0.0), (0.7, 0.3)])
def test_optimum_against_the_chain(eta, discount):
    """J*, its parts, the policy, V*, grad V* and Q* of the affine-Gaussian optimum, to rounding."""
    problem = replace(zoo.gaussian_pull_2d(eta), discount=discount)
    grid = problem.grid(12)
    best, known = plane.optimum(problem, grid), chain.optimum(problem, grid)
    assert best.objective == pytest.approx(known.objective, abs=1e-12)
    assert best.expected_reward == pytest.approx(known.truth.expected_reward, abs=1e-11)
    assert best.path_kl == pytest.approx(known.path_kl, abs=1e-11)
    assert best.ties.shape == (12,) and not np.any(best.ties)
    V, means, covs = chain.value(problem, known.policy, grid), *chain.LinearChain(problem, known.policy, grid).moments
    for i in (0, 6, 11, 12):
        x = states_of(means[i], covs[i])
        np.testing.assert_allclose(best.value(i, x), V(i, x), atol=1e-10)
        np.testing.assert_allclose(best.value.gradient(i, x), V.gradient(i, x), atol=1e-8)
        if i < 12:
            a = known.policy.mean(grid, i, x)
            np.testing.assert_allclose(best.policy.mean(grid, i, x), a, atol=1e-9)
            np.testing.assert_allclose(best.policy.jacobian_x(grid, i, x), known.policy.jacobian_x(grid, i, x), atol=1e-8)
            np.testing.assert_allclose(best.value.action_value(i, x, a + 0.2), V.action_value(i, x, a + 0.2), atol=1e-10)


def test_optimum_of_products_of_lines():
    """Mixtures whose coordinates are independent: J* is the sum of the lines' optima, which panels know to rounding."""
    problem, _, lines, _ = side_by_side()
    grid = problem.grid(12)
    best, known = plane.optimum(problem, grid), [quadrature.optimum(line, grid) for line in lines]
    assert best.objective == pytest.approx(sum(k.objective for k in known), abs=1e-6)
    assert best.expected_reward == pytest.approx(sum(k.expected_reward for k in known), abs=1e-4)
    assert best.penalty == pytest.approx(sum(k.penalty for k in known), abs=2e-4)
    x = np.random.default_rng(4).uniform(-1.2, 1.2, size=(30, 2))
    for i in (0, 6, 10):
        np.testing.assert_allclose(best.value(i, x), sum(k.value(i, y) for k, y in zip(known, (x[:, :1], x[:, 1:]), strict=True)), atol=2e-5)
    shares = [k.policy.mean(grid, 0, y) for k, y in zip(known, (x[:, :1], x[:, 1:]), strict=True)]
    np.testing.assert_allclose(best.policy.mean(grid, 0, x), np.hstack(shares), atol=1e-4)


def test_policy_attains_the_optimum():
    """Run by `evaluate`, the policy earns J*; its multiple is stationary at 1; pre-trained, halved and shifted it earns less."""
    problem = turned(0.8)
    grid = problem.grid(14)
    best = plane.optimum(problem, grid)
    truth = best.truth
    assert truth.method == "plane" and truth.objective == pytest.approx(best.objective, abs=1e-7)
    assert truth.expected_reward == pytest.approx(best.expected_reward, abs=1e-5)
    assert truth.path_kl == pytest.approx(best.path_kl, abs=1e-5)
    assert truth.gradient.theta == pytest.approx(0, abs=1e-5)
    for theta in (0.0, 0.5, 1.3):
        assert plane.evaluate(problem, best.policy.with_theta([theta]), grid).objective < best.objective - 1e-3
    shifted = ctrl.CallablePolicy(lambda t, x, th: best.policy.mean(grid, int(np.argmin(np.abs(grid.times - t))), x) + th, [0.1], dim=2)
    assert plane.evaluate(problem, shifted, grid).objective < best.objective - 1e-4
    assert best.objective < plane.doob(problem, grid).objective              # fewer controls, less value


def test_stationarity():
    """2 lambda kappa (a* - s) = h E[grad V*_{i+1}(X_{i+1}) | x], by Gauss-Hermite on V*'s own gradient; the planted g^2 for h misses it."""
    problem = turned(0.7)
    grid, i = problem.grid(14), 8
    best, c = plane.optimum(problem, grid), problem.coefficients(grid)
    x = np.array([[-0.6, 0.3], [0.5, -0.1], [0.1, 0.8]])
    a = best.policy.mean(grid, i, x)
    xi, weight = np.polynomial.hermite_e.hermegauss(20)
    noise = c.noise[i] * np.stack(np.meshgrid(xi, xi, indexing="ij"), axis=-1).reshape(-1, 2)
    y = x + c.dt[i] * (-c.f[i] * x + c.h[i] * a)
    slopes = best.value.gradient(i + 1, (y[:, None] + noise).reshape(-1, 2)).reshape(3, -1, 2)
    expected = np.einsum("k,nka->na", np.outer(weight, weight).ravel() / weight.sum() ** 2, slopes)
    gap = a - problem.score(grid.times[i], x)
    np.testing.assert_allclose(2 * problem.kl_weight * c.kappa[i] * gap, c.h[i] * expected, atol=1e-5)
    assert np.max(np.abs(2 * problem.kl_weight * c.kappa[i] * gap - c.g2[i] * expected)) > 1e-2


def test_the_supremum_is_global():
    """Two wells and little noise: the best mean beats every point of a dense grid, where the climb from z itself gets stuck."""
    frame = 0.2 * np.eye(2)
    lattice = Lattice(frame, np.array([-20.0, -20.0]), np.array([0.8, 0.8]), (51, 51))

    def well(x, centre, height):
        return height * np.exp(-np.sum((x - centre) ** 2, axis=1) / 0.5)

    x = lattice.nodes()
    values = well(x, np.array([-1.0, 0.2]), 1.0) + well(x, np.array([1.1, -0.3]), 1.6) - 0.02 * np.sum(x**2, axis=1)
    envelope = Envelope(lattice, values.reshape(51, 51), 1.0, c=2.5)
    z = np.random.default_rng(5).uniform(-1.5, 1.5, size=(40, 2))
    y, height, _ = envelope.best(z)
    dense = np.stack(np.meshgrid(np.linspace(-2, 2, 161), np.linspace(-2, 2, 161), indexing="ij"), axis=-1).reshape(-1, 2)
    W = envelope.smoothed(dense)
    brute = np.array([np.max(W - np.sum((dense - at) ** 2, axis=1) / (2 * envelope.c)) for at in z])
    assert np.all(height >= brute - 1e-12) and np.max(height - brute) < 5e-3
    np.testing.assert_allclose(envelope.at(y, z).slope, 0, atol=1e-8)
    assert np.all(np.linalg.eigvalsh(envelope.at(y, z).bend) > 0)
    stuck = envelope._ascend(z, z)[1]                                        # planted: a local search
    assert np.all(stuck <= height + 1e-12) and np.max(height - stuck) > 0.1
    # ties: on a segment from well to well the choice among several maxima is seen
    line = np.array([-1.0, 0.2]) + np.linspace(0, 1, 400)[:, None] * np.array([2.1, -0.5])
    assert np.any(envelope.best(line)[2])


def test_double_well_is_hard():
    """The numbers of `zoo.double_well_2d`: a local climb from the pre-trained model goes the wrong way, the optimum changes wells."""
    problem = zoo.double_well_2d()
    grid, (a, b) = problem.grid(40), problem.data.means
    best = ctrl.exact.optimum(problem, grid)
    assert isinstance(best, PlaneOptimum)

    def share(truth):
        x, p = truth.terminal.points.reshape(-1, 2), truth.terminal.density.ravel()
        return float(p[(x - (a + b) / 2) @ (b - a) > 0].sum() / p.sum())

    pre = ctrl.exact.evaluate(problem, problem.pretrained(grid), grid)
    assert (pre.objective, share(pre)) == pytest.approx((-3.45992, 0.119), abs=1e-3)
    assert best.objective == pytest.approx(-1.513726, abs=2e-6)
    assert best.truth.objective == pytest.approx(best.objective, abs=1e-5) and share(best.truth) == pytest.approx(0.999, abs=5e-4)
    assert best.path_kl == pytest.approx(3.2320, abs=1e-3)
    # constant shifts: two local maxima, a ridge between them, and the climb from no shift leads away from the better well
    shifts = {}
    for name, theta, J, at in (("local", [-0.3873, -0.2778], -3.31991, 0.020), ("far", [0.9498, 0.5912], -2.85578, 0.836)):
        shifts[name] = ctrl.exact.evaluate(problem, ctrl.BasisPolicy.shift(problem, theta), grid)
        assert np.max(np.abs(shifts[name].gradient.theta)) < 2e-3
        assert (shifts[name].objective, share(shifts[name])) == pytest.approx((J, at), abs=1e-3)
    start = ctrl.exact.evaluate(problem, ctrl.BasisPolicy.shift(problem, [0.0, 0.0]), grid).gradient.theta
    assert start @ (b - a) < -0.1 and start @ np.array([-0.3873, -0.2778]) > 0.1
    assert np.any(best.ties)


def test_a_jump_is_too_sharp_to_resolve(monkeypatch):
    """A reward with an edge: Doob's transform and the optimum say so, and what to change, before they take minutes."""
    problem = replace(turned(), reward=CallableReward(lambda x: 1.0 * (x[:, 0] > 0.1), np.zeros_like))
    grid = problem.grid(8)
    monkeypatch.setattr(plane, "MOST_VISITS", 5e7)
    with pytest.raises(ValueError, match=r"^reward: expected e\^\(r / kl_weight\) smooth enough .*raise kl_weight, smooth the reward"):
        plane.doob(problem, grid)
    monkeypatch.setattr(plane_optimum, "MOST_VISITS", 5e7)
    expected = pytest.raises(ValueError, match=r"^reward: expected one that 5e\+07 visits of nodes resolve in step 7.*smooth the reward")
    with pytest.warns(RuntimeWarning, match="^reward: not smooth on"), expected:
        plane.optimum(problem, grid)


def test_a_coarse_optimum_says_so(monkeypatch):
    """Without refinement what half of the nodes miss is told."""
    problem = turned()
    monkeypatch.setattr(plane_optimum, "ROUNDS", 1)
    monkeypatch.setattr(plane_optimum, "LOUD", 1e-7)
    with pytest.warns(RuntimeWarning, match=r"^reward: the optimal value is not smooth at step \d+; J\* is off by up to"):
        plane.optimum(problem, problem.grid(8))


def test_optimum_refusals():
    problem = turned()
    grid = problem.grid(5)
    with pytest.raises(ValueError, match="eta: expected eta > 0"):
        plane.optimum(turned(0.0), grid)
    with pytest.raises(ValueError, match="kl_weight: expected a positive weight"):
        plane.optimum(replace(problem, kl_weight=0.0), grid)
    with pytest.raises(ValueError, match="entropy_weight: expected 0 for the optimum of mean actions in the plane"):
        plane.optimum(replace(problem, entropy_weight=0.1), grid)
    with pytest.raises(ValueError, match="problem: expected dimension 2"):
        plane.optimum(zoo.mixture_bump_1d(), grid)
    best = plane.optimum(problem, grid, resolution=1.0)
    with pytest.raises(ValueError, match=r"grid: expected the grid of the optimum \(5 steps\)"):
        best.policy.mean(problem.grid(6), 0, np.zeros((1, 2)))
    with pytest.raises(ValueError, match="x: expected states on the lattice of step 2"):
        best.value(2, np.array([[50.0, 0.0]]))
    with pytest.raises(ValueError, match="theta: expected shape"):
        best.policy.with_theta([1.0, 2.0])


# ---- no noise --------------------------------------------------------------------------------------------------------


def test_transport_of_lines_side_by_side():
    """eta = 0, mixtures: density, terminal KL, values and gradients add up to those of 1-D transport."""
    problem, policy, lines, alone = side_by_side(eta=0.0, discount=0.3)
    grid = problem.grid(16)
    truth = plane.evaluate(problem, policy, grid)
    known = [quadrature.evaluate(line, each, grid) for line, each in zip(lines, alone, strict=True)]
    for name in ("objective", "expected_reward", "penalty"):
        assert getattr(truth, name) == pytest.approx(sum(getattr(t, name) for t in known), abs=1e-7)
    assert truth.terminal_kl == pytest.approx(sum(t.terminal_kl for t in known), abs=1e-7)
    np.testing.assert_allclose(truth.gradient.theta, [t.gradient.theta[0] for t in known], atol=1e-6)
    V = plane.value(problem, policy, grid)
    x = np.random.default_rng(3).normal(size=(20, 2))
    alone_V = [quadrature.value(line, each, grid) for line, each in zip(lines, alone, strict=True)]
    np.testing.assert_allclose(V(4, x), alone_V[0](4, x[:, :1]) + alone_V[1](4, x[:, 1:]), atol=1e-12)
    np.testing.assert_allclose(V.gradient(4, x), np.hstack([alone_V[0].gradient(4, x[:, :1]), alone_V[1].gradient(4, x[:, 1:])]), atol=1e-11)
    a = 0.5 * x
    Q = alone_V[0].action_value(4, x[:, :1], a[:, :1]) + alone_V[1].action_value(4, x[:, 1:], a[:, 1:])
    np.testing.assert_allclose(V.action_value(4, x, a), Q, atol=1e-12)
    pre = plane.evaluate(problem, problem.pretrained(grid), grid)
    assert pre.terminal_kl == pytest.approx(0, abs=1e-10)


# ---- the edges of the method -----------------------------------------------------------------------------------------


def test_a_lattice_for_every_time():
    """VE shrinks from 3 to the data; a reward narrower than the last lattice refines it."""
    problem = Problem(VE(0.2, 3.0), TURNED, BumpReward([0.7, -0.2], 0.05), 0.2)
    grid = problem.schedule.geometric_grid(12)
    truth = plane.evaluate(problem, problem.pretrained(grid), grid)
    xi, weight = np.polynomial.hermite_e.hermegauss(12)
    solution = plane._solve(plane.plane_chain(problem, problem.pretrained(grid), grid), None)
    z = 0.7 + 0.05 * xi, -0.2 + 0.05 * xi
    y = np.stack(np.meshgrid(*z, indexing="ij"), axis=-1).reshape(-1, 2)
    # the density at any point is one more integral: int p_N(c + w xi) e^{-|xi|^2/2} w^2 dxi
    source, s = solution.source, problem.coefficients(grid).noise[-1]
    gap2 = np.array([np.sum((source.centre.reshape(-1, 2) - at) ** 2, axis=1) for at in y])
    density = np.exp(-0.5 * gap2 / s**2) @ source.mass.ravel() / (2 * np.pi * s**2)
    assert truth.expected_reward == pytest.approx(0.05**2 * density @ np.outer(weight, weight).ravel(), rel=1e-9)
    sizes = [lattice.size for lattice in solution.lattices]
    assert len(set(sizes)) > 6 and sizes[-1] > max(sizes[:-1])


def test_linear_reward_reads_the_mean():
    problem = replace(turned(), reward=ctrl.LinearReward([2.0, -1.0]))
    truth = plane.evaluate(problem, swirl(problem), problem.grid(12))
    assert truth.expected_reward == pytest.approx(truth.terminal.mean @ [2.0, -1.0], abs=1e-12)
    lattice_area = np.abs(np.linalg.det([truth.terminal.points[1, 0] - truth.terminal.points[0, 0],
                                         truth.terminal.points[0, 1] - truth.terminal.points[0, 0]]))
    assert lattice_area * truth.terminal.density.sum() == pytest.approx(1, abs=1e-12)


def test_errors_name_their_argument():
    problem = turned()
    policy, grid = swirl(problem), problem.grid(8)
    with pytest.raises(ValueError, match="problem: expected dimension 2 for the plane, got 1"):
        plane.evaluate(FIRST, FIRST.pretrained(grid), grid)
    with pytest.raises(ValueError, match="resolution: expected a finite number >= 0.25, got 0.1"):
        plane.evaluate(problem, policy, grid, resolution=0.1)
    with pytest.raises(ValueError, match="grid: expected steps that 4000000 nodes resolve"):
        fine = TimeGrid(np.concatenate([[0.0, 1e-9], np.linspace(0.1, 1, 10)]))
        plane.evaluate(problem, policy, fine)
    V = plane.value(problem, policy, grid)
    with pytest.raises(ValueError, match="x: expected states near .* got .40, 0."):
        V(3, np.array([[0.0, 0.0], [40.0, 0.0]]))
    with pytest.raises(ValueError, match=r"x: expected shape \(n, 2\)"):
        V(3, np.zeros(4))
    with pytest.raises(ValueError, match="i: expected a step in 0 ... 8, got 9"):
        V(9, np.zeros((1, 2)))
    still = turned(0.0)
    with pytest.raises(ValueError, match="eta: expected eta > 0"):
        plane.doob(still, grid)
    with pytest.raises(ValueError, match="kl_weight > 0 and discount 0"):
        plane.doob(turned(discount=0.1), grid)
    folding = CallablePolicy(lambda t, x, th: still.score(t, x) - th * np.sin(8 * x), [3.0], dim=2)
    with pytest.warns(RuntimeWarning, match="policy: the flow is too rough"):
        truth = plane.evaluate(replace(still, reward=ctrl.LinearReward([0.0, 1.0])), folding, still.grid(2))
    assert truth.terminal.density is None
    with pytest.raises(ValueError, match="grid: expected steps that keep the orientation of the plane"):
        _ = truth.terminal_kl


def test_a_jump_in_the_reward_warns():
    problem = replace(turned(), reward=CallableReward(lambda x: (x[:, 0] > 0.123) * 1.0))
    with pytest.warns(RuntimeWarning, match="reward: not smooth"):
        plane.evaluate(problem, problem.pretrained(problem.grid(4)), problem.grid(4))


def test_dispatch():
    """The chain where it applies, the plane elsewhere in 2-D, an error that says what is wanted above."""
    problem = turned()
    grid = problem.grid(6)
    assert ctrl.exact.evaluate(problem, swirl(problem), grid).method == "plane"
    assert ctrl.exact.evaluate(zoo.gaussian_pull_2d(), zoo.gaussian_pull_2d().pretrained(grid), grid).method == "chain"
    x = np.zeros((1, 2))
    value, advantage = ctrl.exact.value(problem, swirl(problem), grid), ctrl.exact.advantage(problem, swirl(problem), grid)
    np.testing.assert_allclose(value(2, x), plane.value(problem, swirl(problem), grid)(2, x))
    assert advantage(2, x, x + 1).shape == (1,)
    cube = Problem(VP(0.1, 10.0), Gaussian(np.zeros(3), np.eye(3)), BumpReward(np.zeros(3), 1.0), 0.5)
    with pytest.raises(ValueError, match="at most 2 dimensions, for exact truth; got Gaussian"):
        ctrl.exact.evaluate(cube, cube.pretrained(grid), grid)
