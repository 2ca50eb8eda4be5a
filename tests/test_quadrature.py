"""1-D quadrature against reference numbers, an independent dense solver, closed recursions and finite differences."""

from dataclasses import replace

import numba
import numpy as np
import pytest
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq
from scipy.special import ndtr

import ctrl
from ctrl.exact import quadrature
from ctrl.laws import Gaussian, GaussianMixture
from ctrl.policy import AffinePolicy, BasisPolicy, CallablePolicy, MixturePolicy, Monomials
from ctrl.problem import Problem
from ctrl.reward import BumpReward, CallableReward, LinearReward, QuadraticReward
from ctrl.schedule import VE, VP, TimeGrid

MIXTURE = GaussianMixture([0.3, 0.7], [[-1.2], [0.8]], [[[0.09]], [[0.16]]])


def bump(eta=1.0, **kwargs):
    return Problem(VP(0.1, 10.0), MIXTURE, BumpReward([-1.0], 0.5), kl_weight=0.2, eta=eta, **kwargs)


def cosine(problem, theta=-0.15, exploration=None):
    return CallablePolicy(lambda t, x, th: problem.score(t, x) + th * np.cos(x), theta, exploration=exploration, dim=1)


def richardson(function, step=0.02):
    """Derivative at 0 of an even-error central difference, three levels: O(step^6)."""
    d = [(function(h) - function(-h)) / (2 * h) for h in (step, step / 2, step / 4)]
    a, b = (4 * d[1] - d[0]) / 3, (4 * d[2] - d[1]) / 3
    return (16 * b - a) / 15


def dense(problem, policy, grid, half=12.0, n=801):
    """The specification: full matrices on one fixed lattice, nothing banded, nothing chosen."""
    c, gamma, lam = problem.coefficients(grid), problem.entropy_weight, problem.kl_weight
    x = np.linspace(-half, half, n)
    dx = 2 * half / (n - 1)
    steps = grid.steps
    cov = policy.exploration_cov(grid)
    sigma = np.zeros(steps) if cov is None else cov[:, 0, 0]
    kernels, gaps, entropy = [], [], np.zeros(steps)
    for i in range(steps):
        mu = policy.mean(grid, i, x[:, None])[:, 0]
        gaps.append(mu - problem.score(grid.times[i], x[:, None])[:, 0])
        m = x + c.dt[i] * (-c.f[i] * x + c.h[i] * mu)
        var = problem.eta**2 * c.g2[i] * c.dt[i] + c.h[i] ** 2 * c.dt[i] ** 2 * sigma[i]
        kernels.append((m, np.sqrt(var), np.exp(-0.5 * (x[None] - m[:, None]) ** 2 / var) / np.sqrt(2 * np.pi * var) * dx))
        entropy[i] = 0.5 * np.log(2 * np.pi * np.e * sigma[i]) if gamma else 0.0
    p = [np.exp(problem.start_law.log_density(x[:, None]))]
    for _, _, k in kernels:
        p.append(p[-1] @ k)
    V, EdV = [problem.reward.value(x[:, None])], []
    for i in reversed(range(steps)):
        m, s, k = kernels[i]
        decay = np.exp(-problem.discount * c.dt[i])
        EdV.append((k * (x[None] - m[:, None]) / s**2) @ V[-1])
        V.append(decay * k @ V[-1] - lam * c.kappa[i] * c.dt[i] * (gaps[i] ** 2 + sigma[i]) + gamma * c.dt[i] * entropy[i])
    V, EdV = V[::-1], EdV[::-1]
    gradient = np.zeros(policy.theta.size)
    for i in range(steps):
        decay = np.exp(-problem.discount * c.dt[i])
        u = c.h[i] * decay * EdV[i] - 2 * lam * c.kappa[i] * gaps[i]
        jac = policy.jacobian_theta(grid, i, x[:, None])[:, 0]
        gradient += c.discount[i] * c.dt[i] * dx * np.einsum("n,n,np->p", p[i], u, jac)
    return {"x": x, "p": p, "V": V, "J": dx * p[0] @ V[0], "reward": dx * p[-1] @ V[-1], "gradient": gradient, "dx": dx,
            "penalty": sum(c.kappa[i] * c.dt[i] * dx * p[i] @ gaps[i] ** 2 for i in range(steps))}


UNEVEN = TimeGrid(np.linspace(0, 1, 16) ** 1.2)


def everything():
    """A problem in which nothing is switched off, and its policy."""
    problem = bump(0.7, discount=0.4, entropy_weight=0.05, start="exact")
    return problem, cosine(problem, 0.3, exploration=[[0.5]])


def test_reference_numbers():
    problem = bump()
    truth = quadrature.evaluate(problem, cosine(problem), problem.grid(50))
    assert truth.objective == pytest.approx(0.307163121294876, abs=5e-15)
    assert truth.expected_reward == pytest.approx(0.313565390632928, abs=5e-15)
    assert truth.path_kl == pytest.approx(0.032011346690260, abs=5e-15)
    assert truth.gradient.theta == pytest.approx(-0.32719181299024, abs=5e-14)
    assert truth.method == "quadrature"
    assert 0 < truth.terminal_kl < truth.path_kl
    problem = bump(0.5)
    truth = quadrature.evaluate(problem, cosine(problem), problem.grid(50))
    assert truth.objective == pytest.approx(0.330762294765, abs=5e-13)
    assert truth.path_kl == pytest.approx(0.050243, abs=5e-7)


def test_points_do_not_matter():
    """Twice the default number of points changes nothing: the error is spectral."""
    problem = bump(0.7)
    policy, grid = cosine(problem), problem.grid(20)
    one, two = (quadrature.evaluate(problem, policy, grid, points=n) for n in (1001, 2001))
    for name in ("objective", "expected_reward", "penalty", "terminal_kl"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), abs=2e-14)
    assert one.gradient.theta == pytest.approx(two.gradient.theta, abs=1e-13)


@pytest.mark.parametrize("grid", [TimeGrid.uniform(20, 1.0), UNEVEN])
def test_everything_against_dense_matrices(grid):
    problem, policy = everything()
    truth, spec = quadrature.evaluate(problem, policy, grid), dense(problem, policy, grid)
    assert truth.objective == pytest.approx(spec["J"], abs=1e-12)
    assert truth.expected_reward == pytest.approx(spec["reward"], abs=1e-12)
    assert truth.mean_penalty == pytest.approx(spec["penalty"], abs=1e-12)
    assert truth.gradient.theta == pytest.approx(spec["gradient"], abs=1e-12)
    c = problem.coefficients(grid)
    assert truth.penalty - truth.mean_penalty == pytest.approx(0.5 * (c.kappa @ c.dt), rel=1e-13)
    mean = spec["dx"] * spec["p"][-1] @ spec["x"]
    assert truth.terminal.mean[0] == pytest.approx(mean, abs=1e-12)
    assert truth.terminal.cov[0, 0] == pytest.approx(spec["dx"] * spec["p"][-1] @ (spec["x"] - mean) ** 2, abs=1e-12)
    dx = truth.terminal.points[1] - truth.terminal.points[0]
    assert dx * truth.terminal.density.sum() == pytest.approx(1, abs=1e-12)


def test_terminal_kl_against_dense_matrices():
    grid = UNEVEN
    full, sampled = everything()
    for problem, policy in ((replace(full, entropy_weight=0.0), sampled), (bump(0.5), cosine(bump(0.5), 0.8))):
        p = dense(problem, policy, grid)
        q = dense(problem, problem.pretrained(grid), grid)["p"][-1]
        keep = p["p"][-1] > 1e-25
        kl = p["dx"] * np.sum(p["p"][-1][keep] * np.log(p["p"][-1][keep] / q[keep]))
        assert quadrature.evaluate(problem, policy, grid).terminal_kl == pytest.approx(kl, abs=1e-11)
    pre = quadrature.evaluate(problem, problem.pretrained(grid), grid)
    assert pre.terminal_kl == pytest.approx(0, abs=1e-13)


def test_value_against_dense_recursion():
    problem, policy = everything()
    spec, V = dense(problem, policy, UNEVEN), quadrature.value(problem, policy, UNEVEN)
    for i in (0, 7, 14, 15):
        p = spec["p"][i] * spec["dx"]
        mean = p @ spec["x"]
        sd = np.sqrt(p @ (spec["x"] - mean) ** 2)
        keep = np.abs(spec["x"] - mean) < 6 * sd
        assert np.max(np.abs(V(i, spec["x"][keep, None]) - spec["V"][i][keep])) < 1e-11
    # the start's average of V_0 is J, and a policy's own V differs from the pre-trained one's
    start = np.exp(problem.start_law.log_density(spec["x"][:, None])) * spec["dx"]
    inside = start > 1e-17
    truth = quadrature.evaluate(problem, policy, UNEVEN)
    assert start[inside] @ V(0, spec["x"][inside, None]) == pytest.approx(truth.objective, abs=1e-12)
    other = quadrature.value(problem, problem.pretrained(UNEVEN).with_exploration([[0.5]]), UNEVEN)
    assert abs(start[inside] @ other(0, spec["x"][inside, None]) - truth.objective) > 1e-3


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_value_gradient_is_derivative(eta):
    problem = bump(eta, discount=0.4)
    policy = cosine(problem, 0.3)
    V = quadrature.value(problem, policy, UNEVEN)
    x = np.linspace(-2, 2, 9)[:, None]
    for i in (0, 7, 14, 15):
        slope = richardson(lambda h, i=i: V(i, x + h), step=0.01 if eta else 1e-3)
        assert np.max(np.abs(V.gradient(i, x)[:, 0] - slope)) < 2e-9


@pytest.mark.parametrize("exploration", [None, [[0.5]]])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_gradient_is_derivative_of_objective(eta, exploration):
    problem = bump(eta, discount=0.3)
    policies = [BasisPolicy(problem, Monomials(1), np.full((2, 1, 1), 0.1), np.full((2, 1), -0.2), exploration),
                MixturePolicy(problem.schedule, GaussianMixture([0.3, 0.7], [[-1.0], [0.5]], MIXTURE.covs), exploration)]
    for policy in policies:
        gradient = quadrature.evaluate(problem, policy, UNEVEN).gradient.theta
        direction = np.cos(np.arange(policy.theta.size) + 1.0)

        def J(h, policy=policy, direction=direction):
            return quadrature.evaluate(problem, policy.with_theta(policy.theta + h * direction), UNEVEN).objective

        slope = richardson(J)
        assert gradient @ direction == pytest.approx(slope, abs=1e-9)
        assert abs(slope) > 1e-2


def gaussian_problem(eta, **kwargs):
    return Problem(VP(0.1, 10.0), Gaussian([1.0], [[0.3]]), QuadraticReward([[1.0]], [-0.5], [0.3]), 0.5, eta=eta, **kwargs)


def linear_chain(problem, K, k, grid, sigma=0.0):
    """Scalar recursions: J, E r, penalty of the mean, mean and variance of X_N."""
    c, lam = problem.coefficients(grid), problem.kl_weight
    m, P = float(problem.start_law.mean[0]), float(problem.start_law.cov[0, 0])
    J = penalty = 0.0
    for i in range(grid.steps):
        Kp, kp = (float(a.ravel()[0]) for a in problem.affine_score(grid.times[i]))
        gap2 = ((K[i] - Kp) * m + k[i] - kp) ** 2 + (K[i] - Kp) ** 2 * P
        penalty += c.kappa[i] * c.dt[i] * gap2
        J -= np.exp(-problem.discount * grid.times[i]) * lam * c.kappa[i] * c.dt[i] * (gap2 + sigma)
        A = 1 + c.dt[i] * (-c.f[i] + c.h[i] * K[i])
        m, P = A * m + c.dt[i] * c.h[i] * k[i], A**2 * P + problem.eta**2 * c.g2[i] * c.dt[i] + c.h[i]**2 * c.dt[i]**2 * sigma
    reward = -0.5 * ((m + 0.5) ** 2 + P) + 0.3 * m
    return J + np.exp(-problem.discount * grid.times[-1]) * reward, reward, penalty, m, P


@pytest.mark.parametrize("sigma", [0.0, 0.8])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
def test_gaussian_recursions(eta, sigma):
    problem = gaussian_problem(eta, discount=0.2)
    grid = problem.grid(24)
    pre = problem.pretrained(grid)
    policy = AffinePolicy(0.9 * pre.K, pre.k + 0.1, None if sigma == 0 else [[sigma]])
    truth = quadrature.evaluate(problem, policy, grid)
    J, reward, penalty, m, P = linear_chain(problem, policy.K[:, 0, 0], policy.k[:, 0], grid, sigma)
    assert truth.objective == pytest.approx(J, abs=1e-11)
    assert truth.expected_reward == pytest.approx(reward, abs=1e-11)
    assert truth.mean_penalty == pytest.approx(penalty, abs=1e-12)
    assert (truth.terminal.mean[0], truth.terminal.cov[0, 0]) == pytest.approx((m, P), abs=1e-12)
    *_, m0, P0 = linear_chain(problem, pre.K[:, 0, 0], pre.k[:, 0], grid)
    assert truth.terminal_kl == pytest.approx(Gaussian([m], [[P]]).kl(Gaussian([m0], [[P0]])), abs=1e-11)
    density = np.exp(Gaussian([m], [[P]]).log_density(truth.terminal.points[:, None]))
    assert np.max(np.abs(truth.terminal.density - density)) < 1e-11
    # J is a polynomial of low degree in one K or k, so that Richardson's difference is exact to rounding
    for name, i in (("K", 0), ("K", 20), ("k", 3), ("k", 23)):
        def moved(h, name=name, i=i):
            K, k = policy.K[:, 0, 0].copy(), policy.k[:, 0].copy()
            (K if name == "K" else k)[i] += h
            return linear_chain(problem, K, k, grid, sigma)[0]

        assert getattr(truth.gradient, name)[i].item() == pytest.approx(richardson(moved, 0.1), abs=2e-11)


def test_gradient_rejects_planted_formulas():
    """Forms that people write instead; each must miss the gradient by far more than the quadrature does."""
    problem = bump(0.5)
    grid, policy = problem.grid(20), cosine(bump(0.5))
    truth, spec, c = quadrature.evaluate(problem, policy, grid), dense(problem, policy, grid), problem.coefficients(grid)
    V, x = quadrature.value(problem, policy, grid), spec["x"]

    def form(push, charge, next_value=True):
        total = 0.0
        for i in range(grid.steps):
            p, keep = spec["p"][i] * spec["dx"], np.abs(spec["x"]) < 6
            y, jac = x[keep, None], np.cos(x[keep])
            gap = (policy.mean(grid, i, y) - problem.score(grid.times[i], y))[:, 0]
            s = c.noise[i]
            if next_value:
                m = y[:, 0] * (1 - c.dt[i] * c.f[i]) + c.dt[i] * c.h[i] * policy.mean(grid, i, y)[:, 0]
                xi, w = np.polynomial.hermite_e.hermegauss(40)
                following = np.interp((m[:, None] + s * xi).ravel(), x, spec["V"][i + 1]).reshape(len(m), -1)
                grad = following @ (w * xi / w.sum()) / s
            else:
                grad = V.gradient(i, y)[:, 0]
            total += c.dt[i] * p[keep] @ (jac * (push[i] * grad - charge * 2 * problem.kl_weight * c.kappa[i] * gap))
        return total

    exact = truth.gradient.theta[0]
    assert form(c.h, 1) == pytest.approx(exact, abs=1e-4)  # linear interpolation of V: a different route, 1e-4
    for planted in (form(c.g2, 1), form(c.h, 0), form(c.h, 0.5), form(c.h, -1), form(c.h, 1, next_value=False)):
        assert abs(planted - exact) > 3e-3


def test_advantage_is_the_first_order_limit():
    problem = bump(0.7)
    policy = cosine(problem, 0.3, exploration=[[0.5]])
    x = np.linspace(-1.5, 1.5, 7)[:, None]
    xi, weight = np.polynomial.hermite_e.hermegauss(60)
    weight = weight / weight.sum()
    gaps = []
    for steps in (16, 32, 64, 128):
        grid = problem.grid(steps)
        V, q, i = quadrature.value(problem, policy, grid), quadrature.advantage(problem, policy, grid), steps // 2
        mu, sd = policy.mean(grid, i, x), np.sqrt(0.5)
        if steps == 16:  # centred, and V is the mean of Q over sampled actions
            actions = (mu + sd * xi).reshape(-1, 1)
            states = np.repeat(x, len(xi), axis=0)
            assert np.max(np.abs(q(i, states, actions).reshape(7, -1) @ weight)) < 1e-12
            assert np.max(np.abs(V.action_value(i, states, actions).reshape(7, -1) @ weight - V(i, x))) < 1e-12
        a = mu + 0.7
        gaps.append(np.max(np.abs((V.action_value(i, x, a) - V(i, x)) / grid.dt[i] - q(i, x, a))))
    slope = np.polyfit(np.log([16, 32, 64, 128]), np.log(gaps), 1)[0]
    assert -1.2 < slope < -0.8


@pytest.mark.parametrize("eta", [0.0, 0.02, 1.0])
def test_value_is_the_mean_action_value(eta):
    """Sampled actions: E_a Q_i = V_i exactly, also where the noise left under an action is none or below the lattice."""
    problem = bump(eta, discount=0.3)
    policy, grid = cosine(problem, 0.3, exploration=[[30.0]]), problem.grid(8)
    V = quadrature.value(problem, policy, grid)
    xi = np.linspace(-8, 8, 321)
    weight = np.exp(-0.5 * xi**2) / np.exp(-0.5 * xi**2).sum()
    for i in (3, 6, 7):
        x = np.array([[-0.8], [0.1], [0.6]])
        actions = (policy.mean(grid, i, x) + np.sqrt(30.0) * xi).reshape(-1, 1)
        states = np.repeat(x, len(xi), axis=0)
        Q, exact = V.action_value(i, states, actions).reshape(3, -1) @ weight, V(i, x)
        assert np.max(np.abs(Q / exact - 1)) < 1e-12
        if eta == 1.0:  # an action leaves less noise than the policy does
            assert np.max(np.abs(V.action_value(i, x, policy.mean(grid, i, x)) / exact - 1)) > 1e-2


def test_transport_terminal_kl_of_a_shifted_end():
    """eta = 0, mixture: a shift in the last step only moves the pre-trained terminal law q by delta, so that

        KL = E_q[ log q(X) - log q(X + delta) ]  (p(y) = q(y - delta)).
    """
    problem = replace(bump(0.0), data=GaussianMixture([0.4, 0.6], [[-0.5], [0.6]], [[[0.16]], [[0.25]]]))
    grid = problem.grid(30)
    last = float(grid.times[-2])
    policy = CallablePolicy(lambda t, x, th: problem.score(t, x) + (th if t == last else 0.0) + 0 * x, [10.0], dim=1)
    c = problem.coefficients(grid)
    delta = 10.0 * c.dt[-1] * c.h[-1]

    def flow(z):
        """G and its slope, by the chain's definition."""
        slope = np.ones_like(z)
        for i, t in enumerate(grid.times[:-1]):
            slope *= 1 + c.dt[i] * (-c.f[i] + c.h[i] * problem.marginal(t).score_jacobian(z[:, None])[:, 0, 0])
            z = z + c.dt[i] * (-c.f[i] * z + c.h[i] * problem.score(t, z[:, None])[:, 0])
        return z, slope

    z = np.linspace(-8.5, 8.5, 1501)
    p0 = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    y, slope = flow(z)
    low, high = np.full_like(z, -20), np.full_like(z, 20)
    for _ in range(58):  # G^{-1}(y + delta), all steps at once, by bisection
        middle = 0.5 * (low + high)
        above = flow(middle)[0] > y + delta
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    kl = p0 @ (-0.5 * z**2 - np.log(slope) + 0.5 * low**2 + np.log(flow(low)[1]))
    truth = quadrature.evaluate(problem, policy, grid)
    assert truth.terminal.mean[0] == pytest.approx(p0 @ y + delta, abs=1e-12)
    assert truth.terminal_kl == pytest.approx(kl, abs=1e-11)
    assert truth.terminal_kl > 1e-3
    pre = quadrature.evaluate(problem, problem.pretrained(grid), grid)
    assert pre.terminal_kl == pytest.approx(0, abs=1e-13)


def test_transport_of_a_steep_flow():
    """Narrow, distant components at eta = 0: panels find the watershed, so that J has a derivative and jumps cost nothing."""
    steep = GaussianMixture([0.5, 0.5], [[-1.2], [1.2]], [[[0.03]], [[0.03]]])
    problem = Problem(VP(0.1, 20.0), steep, BumpReward([-2.0], 0.5), 0.2, eta=0.0)
    policy, grid = cosine(problem), problem.grid(100)

    def J(h):
        return quadrature.evaluate(problem, policy.with_theta(policy.theta + h), grid).objective

    truth = quadrature.evaluate(problem, policy, grid)
    assert truth.gradient.theta[0] == pytest.approx(richardson(J, 0.005), abs=1e-9)
    # mass to the left of the watershed, by the jump and by the start law's own distribution function
    jump = replace(problem, reward=CallableReward(lambda x: (x[:, 0] < 0) * 1.0, lambda x: 0 * x))
    left = quadrature.evaluate(jump, policy, grid)
    place = brentq(lambda z: float(flow_of(problem, policy, grid, z)), -1, 1, xtol=1e-14)
    assert left.expected_reward == pytest.approx(ndtr(place), abs=1e-12)
    with pytest.warns(RuntimeWarning, match="misses what the jump adds"):
        assert left.gradient.theta[0] != 0  # the penalty's part only


def flow_of(problem, policy, grid, z):
    """X_N from X_0 = z without noise."""
    c, x = problem.coefficients(grid), np.array([[z]])
    for i in range(grid.steps):
        x = x + c.dt[i] * (-c.f[i] * x + c.h[i] * policy.mean(grid, i, x))
    return x[0, 0]


def test_doob():
    problem = bump()
    grid = problem.grid(50)
    doob = quadrature.doob(problem, grid)
    assert doob.objective == pytest.approx(0.6404251027, abs=5e-11)
    assert doob.objective > 0.621976  # the mean-shift optimum: fewer controls, less value
    # E_pre e^{r/lambda} from the start's side and from the end's
    pre = quadrature.evaluate(problem, problem.pretrained(grid), grid)
    x, dx = np.linspace(-7, 7, 1401), 0.01
    start = dx * np.exp(problem.start_law.log_density(x[:, None])) @ np.exp(doob.log_phi(0, x[:, None]))
    step = pre.terminal.points[1] - pre.terminal.points[0]
    tilt = np.exp(problem.reward.value(pre.terminal.points[:, None]) / 0.2)
    assert start == pytest.approx(step * pre.terminal.density @ tilt, rel=1e-10)
    # envelope: d objective / d lambda = -path KL
    def objective(h):
        return quadrature.doob(Problem(problem.schedule, MIXTURE, problem.reward, 0.2 + h), problem.grid(10)).objective

    assert -richardson(objective, 0.01) == pytest.approx(quadrature.doob(problem, problem.grid(10)).path_kl, abs=1e-8)
    # log E e^r is not E r (Jensen)
    assert doob.objective - pre.expected_reward > 0.1


def test_wide_and_narrow():
    """A lattice for each time: VE shrinks from 3 to the data; rewards narrower than the first lattice refine it."""
    problem = Problem(VE(0.05, 3.0), MIXTURE, BumpReward([0.8], 0.01), 0.2)
    grid = problem.schedule.geometric_grid(30)
    truth = quadrature.evaluate(problem, problem.pretrained(grid), grid)
    density = CubicSpline(truth.terminal.points, truth.terminal.density)
    xi, weight = np.polynomial.hermite_e.hermegauss(40)
    mean = density(0.8 + 0.01 * xi) @ weight * 0.01  # int p(c + w xi) e^{-xi^2/2} w dxi
    assert truth.expected_reward == pytest.approx(mean, abs=1e-10)
    assert truth.terminal.points.size > 1001


def test_linear_reward_reads_the_mean():
    problem = Problem(VP(0.1, 10.0), MIXTURE, LinearReward([2.0]), 0.2)
    truth = quadrature.evaluate(problem, cosine(problem), problem.grid(20))
    assert truth.expected_reward == pytest.approx(2 * truth.terminal.mean[0], abs=1e-13)


def test_threads_do_not_matter(monkeypatch):
    """Bit for bit: one thread, all threads, and the plain loops that small work takes."""
    problem, policy = everything()
    before, answers = numba.get_num_threads(), []
    for large, threads in ((np.inf, 1), (0, 1), (0, before)):
        monkeypatch.setattr(quadrature, "LARGE", large)
        numba.set_num_threads(threads)
        truth = quadrature.evaluate(problem, policy, UNEVEN)
        answers.append((truth.objective, *truth.gradient.theta, *truth.terminal.density))
    numba.set_num_threads(before)
    assert answers[0] == answers[1] == answers[2]


def test_errors_name_their_argument():
    problem = bump()
    policy, grid = cosine(problem), problem.grid(20)
    flat = Problem(VP(0.1, 10.0), Gaussian([0.0, 0.0], np.eye(2)), BumpReward([0.0, 0.0], 1.0), 0.5)
    with pytest.raises(ValueError, match="problem: expected dimension 1 for quadrature, got 2"):
        quadrature.evaluate(flat, flat.pretrained(grid), grid)
    with pytest.raises(ValueError, match="points: expected at least [0-9]+ .* got 51"):
        quadrature.evaluate(problem, policy, grid, points=51)
    with pytest.raises(ValueError, match="grid: expected steps that at most 16001 points resolve"):
        fine = TimeGrid(np.concatenate([[0.0, 1e-9], np.linspace(0.1, 1, 10)]))
        quadrature.evaluate(problem, policy, fine)
    V = quadrature.value(problem, policy, grid)
    with pytest.raises(ValueError, match="x: expected states in .* got 40"):
        V(3, np.array([[0.0], [40.0]]))
    with pytest.raises(ValueError, match="x: expected shape"):
        V(3, np.zeros(4))
    still = bump(0.0)
    with pytest.raises(ValueError, match="eta: expected eta > 0"):
        _ = quadrature.evaluate(still, cosine(still), grid).path_kl
    with pytest.raises(ValueError, match="eta: expected eta > 0"):
        quadrature.doob(still, grid)
    with pytest.raises(ValueError, match="kl_weight > 0 and discount 0"):
        quadrature.doob(bump(discount=0.1), grid)
    folding = CallablePolicy(lambda t, x, th: problem.score(t, x) - th * np.sin(8 * x), [3.0], dim=1)
    truth = quadrature.evaluate(still, folding, grid, points=1001)
    assert truth.terminal.density is None
    with pytest.raises(ValueError, match="grid: expected steps that keep the order of points"):
        _ = truth.terminal_kl


def test_a_jump_in_the_reward_warns():
    problem = Problem(VP(0.1, 10.0), MIXTURE, CallableReward(lambda x: (x[:, 0] > 0.123) * 1.0), 0.2)
    with pytest.warns(RuntimeWarning, match="reward: not smooth"):
        quadrature.evaluate(problem, problem.pretrained(problem.grid(8)), problem.grid(8))


@pytest.mark.parametrize("make", [ctrl.zoo.mixture_bump_1d, ctrl.zoo.double_well_2d], ids=lambda make: make.__name__)
def test_functions_that_change_in_place_are_asked_again(make):
    """A network in training is one object with other numbers: truths of it are those of a new object, of policy and reward alike."""
    base, at = make(), [0.0, 1.0]

    def made():
        reward = ctrl.CallableReward(lambda x: np.cos(at[1] * x[:, 0]), lambda x: -at[1] * np.sin(at[1] * x) * (np.arange(base.dim) == 0))
        return replace(base, reward=reward), ctrl.CallablePolicy(lambda t, x, theta: base.score(t, x) + at[0], [0.0], dim=base.dim)

    def truth(problem, policy):
        grid = problem.grid(3)
        return [x for p in (policy, problem.pretrained(grid)) for x in (
            ctrl.exact.evaluate(problem, p, grid).objective, float(ctrl.exact.value(problem, p, grid)(0, np.zeros((1, base.dim)))[0]))]

    kept, found, fresh = made(), [], []
    for out, which in ((found, lambda: kept), (fresh, made)):
        for at[:] in ([0.1, 1.0], [0.5, 2.0]):
            out.append(truth(*which()))
    assert found == fresh and np.abs(np.subtract(*found)).min() > 1e-3
