"""The affine-Gaussian chain: against the published digits, a plain recursion written from theory.md, and identities."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ctrl
from ctrl import OU, VE, VP, AffinePolicy, BasisPolicy, Gaussian, Problem, QuadraticReward, SubVP, TimeGrid
from ctrl.exact import chain

STEP = 1e-30


# The specification: theory.md, section 1, line by line. Complex arguments pass through, so that its derivatives are exact too.

def plain(problem, K, k, grid, Sigma=None, kappa_factor=1.0):
    """(J, E r, penalty, mean, covariance) of X_N by a NumPy loop; kappa_factor plants a wrong KL rate."""
    s, d, eta = problem.schedule, problem.dim, problem.eta
    T, rho, lam = s.horizon, problem.discount, problem.kl_weight
    if problem.start == "exact":
        m, P = s.alpha(T) * problem.data.mean, s.alpha(T) ** 2 * problem.data.cov + s.v(T) * np.eye(d)
    else:
        m, P = np.zeros(d), np.eye(d) * (s.v(T) if isinstance(s, VE) else 1.0)
    running, penalty = 0.0, 0.0
    for i, (t, D) in enumerate(zip(grid.times[:-1], np.diff(grid.times), strict=True)):
        tau = T - t
        f, g2, alpha, v = s.f(tau), s.g2(tau), s.alpha(tau), s.v(tau)
        h = (1 + eta**2) / 2 * g2
        kappa = kappa_factor * (h**2 / (2 * eta**2 * g2) if eta > 0 else g2 / 2)
        precision = np.linalg.inv(alpha**2 * problem.data.cov + v * np.eye(d))
        dK, dk = K[i] + precision, k[i] - precision @ (alpha * problem.data.mean)
        Sig = np.zeros((d, d)) if Sigma is None else Sigma[i]
        gap = dK @ m + dk
        squared = np.trace(dK @ P @ dK.T) + gap @ gap + np.trace(Sig)
        penalty += kappa * D * squared
        running -= np.exp(-rho * t) * lam * kappa * D * squared
        if problem.entropy_weight:
            nats = 0.5 * np.log(np.linalg.det(2 * np.pi * np.e * Sig))
            running += np.exp(-rho * t) * problem.entropy_weight * D * nats
        A = np.eye(d) * (1 - D * f) + D * h * K[i]
        m, P = A @ m + D * h * k[i], A @ P @ A.T + eta**2 * g2 * D * np.eye(d) + h**2 * D**2 * Sig
    Q, c, b = problem.reward.matrix, problem.reward.center, problem.reward.linear
    reward = -0.5 * (np.trace(Q @ P) + (m - c) @ Q @ (m - c)) + b @ m
    return np.exp(-rho * grid.times[-1]) * reward + running, reward, penalty, m, P


def plain_gradient(problem, policy, grid):
    """dJ/dtheta by complex steps through the plain recursion, for any policy whose parts are affine in theta."""
    base = policy.parts(grid)
    Sigma = policy.exploration_cov(grid)
    out = np.empty(policy.theta.size)
    for j in range(out.size):
        unit = np.zeros(out.size)
        unit[j] = 1.0
        up = policy.with_theta(policy.theta + unit).parts(grid)
        K, k = base.K + 1j * STEP * (up.K - base.K), base.k + 1j * STEP * (up.k - base.k)
        out[j] = plain(problem, K, k, grid, Sigma)[0].imag / STEP
    return out


def spd(rng, d, low=0.2):
    a = rng.normal(size=(d, d))
    return a @ a.T / d + low * np.eye(d)


@st.composite
def cases(draw, eta=None, sampled=None):
    """A problem, an affine policy near the pre-trained one, and a grid: any schedule, start, discount, entropy, steps."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    d, steps = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    T = draw(st.sampled_from([1.0, 0.5, 2.0]))
    schedule = draw(st.sampled_from([VP(0.1, 4.0, T), SubVP(0.2, 3.0, T), OU(1.3, T), VE(0.3, 2.0, T)]))
    sampled = draw(st.booleans()) if sampled is None else sampled
    problem = Problem(
        schedule, Gaussian(rng.normal(size=d), spd(rng, d)), QuadraticReward(spd(rng, d), rng.normal(size=d), rng.normal(size=d)),
        kl_weight=draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])), eta=draw(st.sampled_from([0.0, 0.5, 1.0, 1.5])) if eta is None else eta,
        start=draw(st.sampled_from(["prior", "exact"])), entropy_weight=draw(st.sampled_from([0.0, 0.2])) if sampled else 0.0,
        discount=draw(st.sampled_from([0.0, 0.4])))
    times = np.cumsum(np.concatenate([[0.0], rng.uniform(0.5, 1.5, steps)]))
    grid = TimeGrid(times / times[-1] * T * draw(st.sampled_from([1.0, 0.9])))
    pre = problem.pretrained(grid)
    Sigma = np.stack([spd(rng, d) for _ in range(steps)]) if sampled else None
    policy = AffinePolicy(pre.K * 0.8 + 0.2 * rng.normal(size=pre.K.shape), pre.k + 0.3 * rng.normal(size=pre.k.shape), Sigma)
    return problem, policy, grid, rng


pytestmark = pytest.mark.filterwarnings("ignore:unstable grid")


# Section 17

REFERENCE = dict(
    J=-2.6947972678526515, reward=-2.606649892249708, path_kl=0.1762947512058871, terminal_kl=0.10291396146596798,
    mean=(1.3050316014667165, -0.4223357700407094), optimum=-1.3921577814829753, optimum_kl=0.771217765188002)


def reference(eta=1.0, exploration=None):
    problem = ctrl.zoo.gaussian_pull_2d(eta=eta)
    return problem, BasisPolicy.scaled(problem, 0.9, [0.1, 0.1], exploration=exploration), problem.grid(100)


def test_reference_numbers():
    problem, policy, grid = reference()
    truth = ctrl.exact.evaluate(problem, policy, grid)
    exact = dict(rel=1e-9, abs=0)
    assert truth.method == "chain"
    assert truth.objective == pytest.approx(REFERENCE["J"], **exact)
    assert truth.expected_reward == pytest.approx(REFERENCE["reward"], **exact)
    assert truth.path_kl == truth.penalty == pytest.approx(REFERENCE["path_kl"], **exact)
    assert truth.terminal_kl == pytest.approx(REFERENCE["terminal_kl"], **exact)
    np.testing.assert_allclose(truth.gradient.theta, [5.467255574706948, -3.017229320141546, -0.2482680655707115], rtol=1e-9)
    np.testing.assert_allclose(truth.terminal.mean, REFERENCE["mean"], rtol=1e-9)
    np.testing.assert_allclose(
        truth.terminal.cov, [[0.7548518950111748, 0.2515155489059918], [0.2515155489059918, 0.37757857165218756]], rtol=1e-9)
    sampled = ctrl.exact.evaluate(problem, policy.with_exploration(np.eye(2)), grid)
    assert sampled.objective == pytest.approx(-5.263941511451915, **exact)
    best = ctrl.exact.optimum(problem, grid)
    assert best.objective == pytest.approx(REFERENCE["optimum"], **exact)
    assert best.path_kl == pytest.approx(REFERENCE["optimum_kl"], **exact)
    np.testing.assert_allclose(best.truth.terminal.mean, [0.30771176545862816, -0.40248808617690457], rtol=1e-9)
    # The same policy as one affine map per step.
    pre = problem.pretrained(grid)
    table = ctrl.exact.evaluate(problem, AffinePolicy(0.9 * pre.K, pre.k + 0.1), grid)
    assert table.objective == pytest.approx(truth.objective, rel=1e-13)
    np.testing.assert_allclose(table.gradient.k.sum(axis=0), truth.gradient.theta[1:], rtol=1e-12)
    assert np.sum(table.gradient.K * pre.K) == pytest.approx(truth.gradient.theta[0], rel=1e-12)


@pytest.mark.parametrize(("eta", "J", "reward", "penalty", "best", "best_penalty"), [
    (0.0, -2.823259551466983, -2.7333752736297385, 0.17976855567448918, -1.100048620006444, 0.8429070760798381),
    (0.5, -2.8366143241382904, -2.697303367648141, 0.2786219129802991, -1.4452359772048147, 0.7210747560599836),
    (1.5, -2.6312761781467864, -2.528596061481667, 0.20536023333023848, -1.3920514250665799, 0.775785820968252)])
def test_reference_numbers_at_every_eta(eta, J, reward, penalty, best, best_penalty):
    problem, policy, grid = reference(eta)
    truth, top = ctrl.exact.evaluate(problem, policy, grid), ctrl.exact.optimum(problem, grid)
    found = [truth.objective, truth.expected_reward, truth.penalty, top.objective, top.penalty]
    np.testing.assert_allclose(found, [J, reward, penalty, best, best_penalty], rtol=1e-9)
    # Planted: the eta = 1 rate g^2/2 kept at other etas (at eta = 0 that is the definition).
    wrong = plain(problem, *policy.parts(grid)[:2], grid, kappa_factor=4 * eta**2 / (1 + eta**2) ** 2 if eta else 2.0)[2]
    assert abs(wrong / penalty - 1) > 0.1


# Identities on random problems

@given(cases())
def test_evaluate_is_the_plain_recursion(case):
    problem, policy, grid, _ = case
    truth = ctrl.exact.evaluate(problem, policy, grid)
    J, reward, penalty, m, P = plain(problem, policy.K, policy.k, grid, policy.exploration)
    assert truth.objective == pytest.approx(J, rel=1e-11, abs=1e-11)
    assert truth.expected_reward == pytest.approx(reward, rel=1e-11, abs=1e-11)
    assert truth.penalty == pytest.approx(penalty, rel=1e-11)
    np.testing.assert_allclose(truth.terminal.mean, m, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(truth.terminal.cov, P, rtol=1e-11, atol=1e-12)
    if problem.kl_weight > 0:
        assert plain(problem, policy.K, policy.k, grid, policy.exploration, 1.01)[0] != pytest.approx(truth.objective, rel=1e-9)


@given(cases())
def test_gradient_is_a_complex_step(case):
    problem, policy, grid, _ = case
    expected = plain_gradient(problem, policy, grid)
    gradient = ctrl.exact.evaluate(problem, policy, grid).gradient
    size = np.linalg.norm(expected)
    assert np.linalg.norm(gradient.theta - expected) < 1e-11 * size
    np.testing.assert_array_equal(gradient.theta, np.concatenate([gradient.K.ravel(), gradient.k.ravel()]))
    if policy.dim > 1:                       # planted: dJ/dK transposed
        planted = np.concatenate([gradient.K.transpose(0, 2, 1).ravel(), gradient.k.ravel()])
        assert np.linalg.norm(planted - expected) > 1e-6 * size


@pytest.mark.parametrize("d", [4, 5, 8, 11])
def test_wide_chains_are_the_plain_recursion(d):
    """The compiled products take four rows at a time: whole fours, and what is left over."""
    rng = np.random.default_rng(d)
    problem = Problem(VP(0.1, 6.0), Gaussian(rng.normal(size=d), spd(rng, d)), QuadraticReward(spd(rng, d), rng.normal(size=d)), 0.5,
                      entropy_weight=0.1, discount=0.3)
    grid = problem.grid(25)
    pre, Sigma = problem.pretrained(grid), np.stack([spd(rng, d) for _ in range(25)])
    policy = AffinePolicy(0.8 * pre.K + 0.05 * rng.normal(size=pre.K.shape), pre.k + 0.1, Sigma)
    truth = ctrl.exact.evaluate(problem, policy, grid)
    J, reward, penalty, m, P = plain(problem, policy.K, policy.k, grid, Sigma)
    np.testing.assert_allclose([truth.objective, truth.expected_reward, truth.penalty], [J, reward, penalty], rtol=1e-12)
    np.testing.assert_allclose(truth.terminal.mean, m, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(truth.terminal.cov, P, rtol=1e-12, atol=1e-13)
    K, k = rng.normal(size=pre.K.shape), rng.normal(size=pre.k.shape)
    slope = plain(problem, policy.K + 1j * STEP * K, policy.k + 1j * STEP * k, grid, Sigma)[0].imag / STEP
    assert truth.gradient.theta @ np.concatenate([K.ravel(), k.ravel()]) == pytest.approx(slope, rel=1e-11)
    transposed = np.concatenate([K.transpose(0, 2, 1).ravel(), k.ravel()])
    assert truth.gradient.theta @ transposed != pytest.approx(slope, rel=1e-3)              # planted


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 1.0]))
def test_gradient_in_continuous_time_parameters(seed, eta):
    rng = np.random.default_rng(seed)
    problem = replace(ctrl.zoo.gaussian_pull_2d(eta=eta), discount=0.3)
    grid = TimeGrid(np.array([0.0, 0.05, 0.2, 0.35, 0.6, 1.0]))
    W, w = 0.3 * rng.normal(size=(3, 2, 2)), rng.normal(size=(3, 2))
    for policy in (BasisPolicy(problem, ctrl.policy.Monomials(2), W, w), BasisPolicy.shift(problem, w[0], exploration=np.eye(2)),
                   BasisPolicy.scaled(problem, 0.8, w[1])):
        expected = plain_gradient(problem, policy, grid)
        gradient = ctrl.exact.evaluate(problem, policy, grid).gradient
        assert np.linalg.norm(gradient.theta - expected) < 1e-11 * np.linalg.norm(expected)
        assert gradient.K is None and gradient.k is None


def test_gradient_is_a_finite_difference_of_order_six():
    problem, policy, grid = reference()
    theta, e = policy.theta, 5e-3
    gradient = ctrl.exact.evaluate(problem, policy, grid).gradient.theta
    for j in range(3):
        unit = np.eye(3)[j]
        J = [ctrl.exact.evaluate(problem, policy.with_theta(theta + s * e * unit), grid).objective for s in (-3, -2, -1, 1, 2, 3)]
        assert np.dot([-1, 9, -45, 45, -9, 1], J) / (60 * e) == pytest.approx(gradient[j], rel=1e-8)


def path_law(problem, policy, grid):
    """The joint Gaussian law of (X_0, ..., X_N), written out as one big vector."""
    c, parts, start, d = problem.coefficients(grid), policy.parts(grid), problem.start_law, problem.dim
    m, P = start.mean, start.cov
    for i in range(grid.steps):
        A = (1 - c.dt[i] * c.f[i]) * np.eye(d) + c.dt[i] * c.h[i] * parts.K[i]
        last, across = P[-d:, -d:], A @ P[-d:, :]
        P = np.block([[P, across.T], [across, A @ last @ A.T + c.noise[i] ** 2 * np.eye(d)]])
        m = np.concatenate([m, A @ m[-d:] + c.dt[i] * c.h[i] * parts.k[i]])
    return Gaussian(m, (P + P.T) / 2)


@given(cases(sampled=False), st.sampled_from([0.5, 1.0, 1.5]))
def test_path_kl_is_the_kl_of_the_joint_laws(case, eta):
    """Girsanov on the chain: the left-point sum is the divergence of two (N + 1) d dimensional Gaussians, at every eta."""
    problem, policy, grid, _ = case
    problem = replace(problem, eta=eta)
    truth = ctrl.exact.evaluate(problem, policy, grid)
    joint = path_law(problem, policy, grid).kl(path_law(problem, problem.pretrained(grid), grid))
    assert truth.path_kl == pytest.approx(joint, rel=1e-7, abs=1e-9)
    assert 0 <= truth.terminal_kl <= truth.path_kl * (1 + 1e-9)
    reverse = path_law(problem, problem.pretrained(grid), grid).kl(path_law(problem, policy, grid))
    assert grid.steps == 1 or abs(reverse / joint - 1) > 1e-6        # planted: reverse KL (one step is symmetric: equal noise)
    if eta != 1:                                                                             # planted: g^2/2 at other etas
        assert abs(truth.path_kl * 4 * eta**2 / (1 + eta**2) ** 2 / joint - 1) > 0.1


def test_action_cost_is_not_path_kl():
    problem, policy, grid = reference()
    sampled = ctrl.exact.evaluate(problem, policy.with_exploration(np.eye(2)), grid)
    c = problem.coefficients(grid)
    assert sampled.penalty - sampled.path_kl == pytest.approx(2 * np.sum(c.kappa * c.dt), rel=1e-12)


# The value function

def signs(d):
    return np.array(np.meshgrid(*[[-1.0, 1.0]] * d)).reshape(d, -1).T


def one_step_value(problem, policy, grid, value, i, x, *, kappa=1.0, sign=1.0, at=None):
    """E[ e^{-rho D} V_{i+1}(X_{i+1}) + running | X_i = x ] over all sign patterns of action and step noise (V is quadratic)."""
    d, s = problem.dim, problem.schedule
    tau, D, eta = s.horizon - grid.times[i], grid.times[i + 1] - grid.times[i], problem.eta
    f, g2 = s.f(tau), s.g2(tau)
    h = (1 + eta**2) / 2 * g2
    rate = kappa * (h**2 / (2 * eta**2 * g2) if eta else g2 / 2)
    z = signs(2 * d)
    mu = policy.mean(grid, i, x)[:, None, :]
    factor = policy.exploration_factor(grid)
    a = mu + (0 if factor is None else z[:, :d] @ factor[i].T)
    a = np.broadcast_to(a, (len(x), len(z), d))
    score = problem.score(float(grid.times[i]), x)[:, None, :]
    y = x[:, None, :] + (-f * x[:, None, :] + h * a) * D + eta * np.sqrt(g2 * D) * z[:, d:]
    later = value(i + 1, y.reshape(-1, d)).reshape(len(x), -1)
    cost = problem.kl_weight * rate * D * np.sum((a - score) ** 2, axis=2)
    gain = 0.0
    if problem.entropy_weight:
        gain = problem.entropy_weight * D * 0.5 * np.log(np.linalg.det(2 * np.pi * np.e * policy.exploration_cov(grid)[i]))
    return np.mean(np.exp(-problem.discount * D) * later - sign * cost, axis=1) + gain


@given(cases())
def test_value_is_a_martingale(case):
    problem, policy, grid, rng = case
    value = ctrl.exact.value(problem, policy, grid)
    x = rng.normal(size=(5, problem.dim))
    np.testing.assert_allclose(value(grid.steps, x), problem.reward.value(x), rtol=1e-12)
    for i in range(grid.steps):
        here = value(i, x)
        scale = 1e-10 * (1 + np.max(np.abs(here)))
        np.testing.assert_allclose(one_step_value(problem, policy, grid, value, i, x), here, rtol=0, atol=scale)
        if problem.kl_weight > 0:            # planted: a KL rate 1 % off; cost added
            for planted in (dict(kappa=1.01), dict(sign=-1.0)):
                assert np.max(np.abs(one_step_value(problem, policy, grid, value, i, x, **planted) - here)) > 10 * scale
        z = x.astype(complex)
        z[:, 0] += 1j * STEP
        np.testing.assert_allclose(value.gradient(i, x)[:, 0], value(i, z).imag / STEP, rtol=1e-9, atol=1e-10)


@given(cases())
def test_objective_is_the_expected_first_value(case):
    problem, policy, grid, _ = case
    value, start = ctrl.exact.value(problem, policy, grid), problem.start_law
    x = start.mean + signs(problem.dim) @ np.linalg.cholesky(start.cov).T
    truth = ctrl.exact.evaluate(problem, policy, grid)
    J = np.mean(value(0, x))
    assert pytest.approx(truth.objective, rel=1e-10, abs=1e-10) == J
    if grid.steps > 1 and problem.kl_weight > 0:             # planted: the value of the next step at the start law
        assert np.mean(value(1, x)) != pytest.approx(J, rel=1e-9)


def test_the_value_of_another_policy_is_no_martingale():
    problem, policy, grid = reference()
    other = ctrl.exact.value(problem, problem.pretrained(grid), grid)
    x = np.ones((1, 2))
    assert abs(one_step_value(problem, policy, grid, other, 50, x) - other(50, x))[0] > 1e-3


# The advantage rate

def q_gap(problem, policy, steps, t, x, a, q=None):
    """max |(Q - V)/D - q| at generation time t on a uniform grid."""
    grid = problem.grid(steps)
    i = round(t * steps)
    value, rate = ctrl.exact.value(problem, policy, grid), ctrl.exact.advantage(problem, policy, grid)
    quotient = (value.action_value(i, x, a) - value(i, x)) / grid.dt[i]
    return np.max(np.abs(quotient - (rate if q is None else q(grid, value))(i, x, a)))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("exploration", [None, [[0.7, 0.2], [0.2, 0.4]]])
def test_advantage_is_centred_and_first_order(eta, exploration):
    problem, policy, grid = reference(eta, exploration)
    rng = np.random.default_rng(0)
    x, a = rng.normal(size=(6, 2)), rng.normal(size=(6, 2))
    q = ctrl.exact.advantage(problem, policy, grid)
    value = ctrl.exact.value(problem, policy, grid)
    z = signs(2)
    for i in (0, 40, 99):                    # centred: q and Q are quadratic in a, so sign patterns integrate them exactly
        mu, V = policy.mean(grid, i, x), value(i, x)
        if exploration is None:
            np.testing.assert_array_equal(q(i, x, mu), 0)
            np.testing.assert_allclose(value.action_value(i, x, mu), V, rtol=1e-11)
            continue
        actions = [mu + policy.exploration_factor(grid)[i] @ node for node in z]
        rates = np.array([q(i, x, b) for b in actions])
        np.testing.assert_allclose(rates.mean(axis=0), 0, atol=1e-12 * np.max(np.abs(rates)))
        Q = np.array([value.action_value(i, x, b) for b in actions])
        np.testing.assert_allclose(Q.mean(axis=0), V, rtol=1e-11)
        c, spread = problem.coefficients(grid), np.trace(np.array(exploration))
        planted = rates.mean(axis=0) - 2 * problem.kl_weight * c.kappa[i] * spread               # the sign of tr Sigma
        assert np.min(np.abs(planted)) > 1e-3
    gaps = [q_gap(problem, policy, n, 0.5, x, a) for n in (400, 800, 1600)]
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.05) and gaps[1] / gaps[2] == pytest.approx(2, abs=0.03)

    def with_gain(grid, value):              # planted: g^2 for h
        rate = ctrl.exact.advantage(problem, policy, grid)
        c = problem.coefficients(grid)

        def wrong(i, x, a):
            push = np.sum((a - policy.mean(grid, i, x)) * value.gradient(i, x), axis=1)
            return rate(i, x, a) + (c.g2[i] - c.h[i]) * push
        return wrong

    if eta != 1:
        assert q_gap(problem, policy, 1600, 0.5, x, a, with_gain) > 20 * gaps[2]


def test_action_values_collapse_onto_the_value():
    """Q for q: the spread of Q over actions vanishes with D, that of q does not."""
    problem, policy, _ = reference()
    x, a = np.zeros((2, 2)), np.array([[1.0, 0.0], [-1.0, 0.5]])

    def spreads(n):
        grid = problem.grid(n)
        Q = ctrl.exact.value(problem, policy, grid).action_value(n // 2, x, a)
        q = ctrl.exact.advantage(problem, policy, grid)(n // 2, x, a)
        return abs(Q[0] - Q[1]), abs(q[0] - q[1])

    (Q1, q1), (Q2, q2) = spreads(200), spreads(2000)
    assert pytest.approx(10, rel=0.05) == Q1 / Q2 and q1 == pytest.approx(q2, rel=0.05)


# The optimum

@given(cases())
def test_optimum_is_stationary_and_best(case):
    problem, policy, grid, rng = case
    if problem.kl_weight == 0:
        problem = replace(problem, kl_weight=0.7)
    best = ctrl.exact.optimum(problem, grid)
    scale = np.linalg.norm(ctrl.exact.evaluate(problem, policy, grid).gradient.theta)
    assert np.linalg.norm(best.truth.gradient.theta) < 1e-10 * scale
    pre = problem.pretrained(grid)
    others = [policy, AffinePolicy(pre.K, pre.k, best.policy.exploration)]
    if problem.entropy_weight == 0:
        others = [p.with_exploration(None) for p in others]
    for size in (1e-3, 0.1):
        theta = best.policy.theta + size * rng.normal(size=best.policy.theta.size)
        others.append(best.policy.with_theta(theta))
    if problem.entropy_weight > 0:
        others += [best.policy.with_exploration(s * best.policy.exploration) for s in (0.9, 1.1)]
    for other in others:
        assert ctrl.exact.evaluate(problem, other, grid).objective < best.objective
    off = best.policy.with_theta(best.policy.theta + 1e-6)   # planted: an optimum that is a little off is not stationary
    assert np.linalg.norm(ctrl.exact.evaluate(problem, off, grid).gradient.theta) > 1e-8 * scale


def test_optimum_satisfies_its_stationarity_condition():
    """2 lambda kappa (a* - s)(x) = h E[grad V*_{i+1}(X_{i+1}) | X_i = x], and the eta = 1 form is wrong elsewhere."""
    for eta in (0.5, 1.0):
        problem, _, grid = reference(eta)
        best = ctrl.exact.optimum(problem, grid).policy
        value, c, x = ctrl.exact.value(problem, best, grid), problem.coefficients(grid), np.array([[0.3, -1.0]])
        for i in (0, 50, 99):
            a, s = best.mean(grid, i, x), problem.score(float(grid.times[i]), x)
            y = x + (-c.f[i] * x + c.h[i] * a) * c.dt[i]
            pull = value.gradient(i + 1, y)  # affine in y, so its expectation is its value at the mean
            np.testing.assert_allclose(2 * problem.kl_weight * c.kappa[i] * (a - s), c.h[i] * pull, rtol=1e-9, atol=1e-12)
            planted = pull / problem.kl_weight
            assert eta == 1 or np.max(np.abs(planted - (a - s))) > 0.05 * np.max(np.abs(a - s))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_envelope(eta):
    """dJ*/dlambda = -KL*: central differences of order six; the doubled penalty is rejected."""
    problem, _, grid = reference(eta)
    e = 0.01
    J = [ctrl.exact.optimum(replace(problem, kl_weight=0.5 + s * e), grid).objective for s in (-3, -2, -1, 1, 2, 3)]
    slope = np.dot([-1, 9, -45, 45, -9, 1], J) / (60 * e)
    penalty = ctrl.exact.optimum(problem, grid).penalty
    assert slope == pytest.approx(-penalty, rel=1e-8) and slope != pytest.approx(-2 * penalty, rel=0.1)


# Refusals and cost

def test_what_the_chain_refuses():
    problem, policy, grid = reference()
    zero = ctrl.exact.evaluate(*reference(0.0))
    assert zero.penalty > 0
    with pytest.raises(ValueError, match="^eta: expected eta > 0 for a path KL"):
        _ = zero.path_kl
    with pytest.raises(ValueError, match="^eta: expected eta > 0"):
        _ = ctrl.exact.optimum(reference(0.0)[0], grid).path_kl
    with pytest.raises(ValueError, match="^kl_weight: expected a positive weight"):
        ctrl.exact.optimum(replace(problem, kl_weight=0.0), grid)
    steep = replace(problem, reward=QuadraticReward(-5 * np.eye(2), [0.0, 0.0]))
    with pytest.raises(ValueError, match="^kl_weight: expected a weight large enough"):
        ctrl.exact.optimum(steep, grid)
    bump = replace(problem, reward=ctrl.BumpReward([0.0, 0.0], 1.0))
    eight = replace(ctrl.zoo.gaussian_8d(), reward=ctrl.BumpReward(np.zeros(8), 1.0))  # in fewer dimensions there is quadrature
    for call in (lambda: chain.evaluate(bump, policy, grid), lambda: ctrl.exact.evaluate(eight, eight.pretrained(grid), grid),
                 lambda: ctrl.exact.optimum(eight, grid)):
        with pytest.raises(ValueError, match="^problem: expected Gaussian data"):
            call()
    one = ctrl.zoo.gaussian_8d()
    with pytest.raises(ValueError, match="^policy: expected dimension 8 like the problem, got 2"):
        ctrl.exact.evaluate(one, policy, grid)
    with pytest.raises(ValueError, match="^policy: expected a policy"):
        chain.value(problem, "steer", grid)
    with pytest.raises(ValueError, match="^grid: expected a TimeGrid"):
        chain.evaluate(problem, policy, np.linspace(0, 1, 5))
    with pytest.raises(ValueError, match="^grid: expected times up to the horizon 1"):
        ctrl.exact.evaluate(problem, policy, TimeGrid([0.0, 1.5]))
    with pytest.raises(ValueError, match="^grid: expected 100 steps"):
        ctrl.exact.evaluate(problem, problem.pretrained(grid), problem.grid(99))
    with pytest.raises(ValueError, match="^entropy_weight: expected a policy with exploration"):
        ctrl.exact.evaluate(replace(problem, entropy_weight=0.1), policy, grid)


@pytest.mark.parametrize(("d", "steps", "seconds"), [(2, 1000, 0.002), (8, 1000, 0.002), (64, 200, 0.3)])
def test_cost(d, steps, seconds):
    """2 ms at d = 8, N = 1000 and 0.3 s at d = 64, N = 200, four times that with the gradient; a slow machine gets three times as long.

    Processor time of the best of nine, so that a busy neighbour is not taken for a slow recursion; benchmarks/exact.py has the medians.
    """
    rng = np.random.default_rng(d)
    problem = Problem(VP(0.1, 10.0), Gaussian(rng.normal(size=d), spd(rng, d, 0.5)), QuadraticReward(np.eye(d), np.zeros(d)), 0.5)
    grid = problem.grid(steps)
    pre = problem.pretrained(grid)
    for policy in (AffinePolicy(0.9 * pre.K, pre.k + 0.1), BasisPolicy.scaled(problem, 0.9, np.full(d, 0.1))):
        def cost(verb, policy=policy):
            start = time.process_time()
            verb(ctrl.exact.evaluate(problem, policy, grid))
            return time.process_time() - start

        alone, whole = (min(cost(verb) for _ in range(9)) for verb in (lambda truth: truth.objective, lambda truth: truth.gradient))
        assert alone < 3 * seconds and whole < 3 * 4 * seconds
