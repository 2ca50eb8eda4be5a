"""Policies: Jacobians by complex step, parts equal to means, adjoints equal to pullbacks, theta there and back."""

from __future__ import annotations

import numpy as np
import pytest

from ctrl import (
    VP,
    AffinePolicy,
    BasisPolicy,
    CallablePolicy,
    Gaussian,
    GaussianMixture,
    LinearReward,
    MixturePolicy,
    Problem,
    TimeGrid,
)
from ctrl.policy import Basis, Monomials, TimeBins

STEP = 1e-30
GRID = TimeGrid([0.0, 0.1, 0.4, 0.45, 0.9])


def spd(rng, d, size=()):
    a = rng.normal(size=(*size, d, d))
    return a @ np.swapaxes(a, -1, -2) / d + 0.3 * np.eye(d)


def problems(d):
    rng = np.random.default_rng(d)
    gaussian = Gaussian(rng.normal(size=d), spd(rng, d))
    mixture = GaussianMixture([0.3, 0.7], rng.normal(size=(2, d)), spd(rng, d, (2,)))
    return [Problem(VP(0.1, 8.0), law, LinearReward(np.ones(d)), 0.5) for law in (gaussian, mixture)]


def policies(d):
    rng = np.random.default_rng(50 + d)
    g, m = problems(d)
    W, w = rng.normal(size=(3, d, d)), rng.normal(size=(3, d))

    def action(t, x, theta):
        return np.tanh(x * theta[:d]) + t * theta[d:]

    return [
        AffinePolicy(rng.normal(size=(4, d, d)), rng.normal(size=(4, d))),
        BasisPolicy(g, Monomials(2), W, w), BasisPolicy(m, TimeBins(3), W, w), BasisPolicy.shift(m, w[0]),
        BasisPolicy.scaled(g, 0.8, w[1]), MixturePolicy(m.schedule, m.data), CallablePolicy(action, rng.normal(size=2 * d), dim=d)]


def plain_mean(policy, t, i, x, theta):
    """mu(t, x; theta), complex arguments allowed, from the definitions of theory.md section 1."""
    d = x.shape[1]
    if isinstance(policy, AffinePolicy):
        n = 4 * d * d
        return x @ theta[:n].reshape(4, d, d)[i].T + theta[n:].reshape(4, d)[i]
    if isinstance(policy, CallablePolicy):
        return policy.action(t, x, theta)
    if isinstance(policy, MixturePolicy):
        s = policy.schedule
        alpha, v, law = s.alpha(s.horizon - t), s.v(s.horizon - t), policy.law
        y = x[:, None, :] - alpha * theta.reshape(law.means.shape)
        cov = alpha**2 * law.covs + v * np.eye(d)
        q = np.einsum("nki,kij,nkj->nk", y, np.linalg.inv(cov), y)
        weight = law.weights * np.exp(-0.5 * q) / np.sqrt(np.linalg.det(cov))
        scores = -np.einsum("kij,nkj->nki", np.linalg.inv(cov), y)
        return np.einsum("nk,nki->ni", weight / weight.sum(axis=1, keepdims=True), scores)
    score = policy.problem.score(t, x)
    if theta.size == d:
        return score + theta
    if theta.size == 1 + d:
        K, k = policy.problem.affine_score(t)
        return theta[0] * x @ K.T + k + theta[1:]
    phi = policy.basis.functions(t)
    W, w = theta[: 3 * d * d].reshape(3, d, d), theta[3 * d * d :].reshape(3, d)
    return score + x @ np.einsum("b,bij->ij", phi, W).T + phi @ w


def complex_jacobian(f, z):
    out = []
    for j in range(z.shape[-1]):
        moved = z.astype(complex)
        moved[..., j] += 1j * STEP
        out.append(np.imag(f(moved)) / STEP)
    return np.stack(out, axis=-1)


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("kind", range(7))
def test_jacobians_are_complex_steps(kind, d):
    policy, x = policies(d)[kind], np.random.default_rng(7).normal(size=(15, d))
    u = np.random.default_rng(8).normal(size=x.shape)
    for i in range(GRID.steps):
        t = float(GRID.times[i])
        np.testing.assert_allclose(policy.mean(GRID, i, x), plain_mean(policy, t, i, x, policy.theta), rtol=1e-11, atol=1e-12)
        by_x = complex_jacobian(lambda z: plain_mean(policy, t, i, z, policy.theta), x)
        by_theta = complex_jacobian(lambda z: plain_mean(policy, t, i, x, z), policy.theta)
        np.testing.assert_allclose(policy.jacobian_x(GRID, i, x), by_x, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(policy.jacobian_theta(GRID, i, x), by_theta, rtol=1e-10, atol=1e-11)
        out = np.ones((15, policy.theta.size))
        policy.add_vjp(out, GRID, i, x, u)
        np.testing.assert_allclose(out, 1 + np.einsum("ndp,nd->np", by_theta, u), rtol=1e-10, atol=1e-10)
        if kind == 0 and d > 1:              # planted: the transposed Jacobian
            assert np.max(np.abs(policy.jacobian_x(GRID, i, x).transpose(0, 2, 1) - by_x)) > 1e-2


@pytest.mark.parametrize("d", [1, 2])
def test_given_jacobians_are_used(d):
    rng = np.random.default_rng(d)
    theta, x = rng.normal(size=d), rng.normal(size=(6, d))
    policy = CallablePolicy(lambda t, x, th: x * th, theta, lambda t, x, th: x[:, :, None] * np.eye(d),
                            lambda t, x, th: np.broadcast_to(np.diag(th), (len(x), d, d)))
    auto = CallablePolicy(lambda t, x, th: x * th, theta)
    np.testing.assert_allclose(policy.jacobian_theta(GRID, 1, x), auto.jacobian_theta(GRID, 1, x), rtol=1e-14)
    np.testing.assert_allclose(policy.jacobian_x(GRID, 1, x), auto.jacobian_x(GRID, 1, x), rtol=1e-14)


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("kind", range(7))
def test_theta_there_and_back(kind, d):
    policy, x = policies(d)[kind], np.ones((2, d))
    assert policy.dim == d and policy.theta.shape == (policy.theta.size,)
    same = policy.with_theta(policy.theta)
    np.testing.assert_array_equal(same.mean(GRID, 2, x), policy.mean(GRID, 2, x))
    other = policy.with_theta(policy.theta + 0.1)
    np.testing.assert_allclose(other.theta, policy.theta + 0.1)
    assert np.max(np.abs(other.mean(GRID, 2, x) - policy.mean(GRID, 2, x))) > 1e-4
    explores = policy.with_exploration(2 * np.eye(d))
    assert policy.exploration is None and policy.exploration_cov(GRID) is None and policy.exploration_factor(GRID) is None
    np.testing.assert_allclose(explores.exploration_cov(GRID), np.broadcast_to(2 * np.eye(d), (4, d, d)))
    np.testing.assert_allclose(explores.exploration_factor(GRID)[0], np.sqrt(2) * np.eye(d))
    assert explores.with_theta(policy.theta + 0.1).exploration is not None
    assert explores.with_exploration(None).exploration is None


@pytest.mark.parametrize("kind", range(6))
def test_parts_are_the_mean(kind):
    policy, x = policies(2)[kind], np.random.default_rng(3).normal(size=(9, 2))
    K, k, laws = policy.parts(GRID)
    for i in range(4):
        mean = x @ K[i].T + k[i] + (0 if laws is None else laws[i].score(x))
        np.testing.assert_allclose(mean, policy.mean(GRID, i, x), rtol=1e-12, atol=1e-13)
    assert policies(2)[6].parts(GRID) is None


@pytest.mark.parametrize("kind", [0, 1, 3, 4])
def test_pullback_is_the_adjoint_of_parts(kind):
    """<pullback(U, u), e> = <(U, u), d parts . e> for every direction e: parts are affine in theta."""
    policy, rng = policies(2)[kind], np.random.default_rng(4)
    U, u, e = rng.normal(size=(4, 2, 2)), rng.normal(size=(4, 2)), rng.normal(size=policy.theta.size)
    up, here = policy.with_theta(policy.theta + e).parts(GRID), policy.parts(GRID)
    forward = np.sum(U * (up.K - here.K)) + np.sum(u * (up.k - here.k))
    assert policy.pullback(GRID, U, u) @ e == pytest.approx(forward, rel=1e-12)
    assert policy.pullback(GRID, U.transpose(0, 2, 1), u) @ e != pytest.approx(forward, rel=1e-6) or kind in (3, 4)   # planted
    with pytest.raises(ValueError, match="policy: expected"):
        policies(2)[5].pullback(GRID, U, u)


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_a_basis_on_a_grid_is_the_basis_at_every_step(kind):
    """The stacked forms against the loops of their base class, which ask one time after another."""
    policy, rng = policies(2)[kind], np.random.default_rng(5)
    basis, K, k = policy.basis, rng.normal(size=(4, 2, 2)), rng.normal(size=(4, 2))
    for found, expected in zip(basis.on(GRID, policy.theta), Basis.on(basis, GRID, policy.theta), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(basis.pullback(GRID, K, k), Basis.pullback(basis, GRID, K, k), rtol=1e-13)
    assert np.max(np.abs(basis.pullback(GRID, K[::-1], k[::-1]) - Basis.pullback(basis, GRID, K, k))) > 1e-3 or kind == 3    # planted


def test_one_grid_asks_for_its_time_functions_once():
    times, problem = [], policies(2)[1].problem

    def functions(t):
        times.append(t)
        return np.array([1.0, t])

    policy = BasisPolicy(problem, functions, np.zeros((2, 2, 2)), np.zeros((2, 2)))
    for step in range(3):
        moved = policy.with_theta(policy.theta + step)
        moved.pullback(GRID, moved.parts(GRID).K, moved.parts(GRID).k)
    assert times.count(GRID.times[2]) == 1
    policy.parts(TimeGrid(GRID.times[:4]))
    assert times.count(GRID.times[2]) == 2


def test_one_theta_runs_on_any_grid():
    policy = policies(2)[1]
    x, fine = np.ones((1, 2)), TimeGrid(np.linspace(0, 1, 11))
    np.testing.assert_array_equal(policy.mean(fine, 4, x), policy.mean(GRID, 2, x))           # both at t = 0.4


def test_at_the_data_s_own_means_the_mixture_policy_is_the_score():
    problem = problems(2)[1]
    x = np.random.default_rng(1).normal(size=(5, 2))
    np.testing.assert_array_equal(MixturePolicy(problem.schedule, problem.data).mean(GRID, 1, x), problem.score(0.1, x))


G, M = problems(2)
A = AffinePolicy(np.zeros((4, 2, 2)), np.zeros((4, 2)))
X = np.ones((3, 2))
I2 = np.eye(2)
BAD = [
    ("K", lambda: AffinePolicy(np.zeros((3, 2, 2)), np.zeros((4, 2)))),
    ("K", lambda: AffinePolicy(np.full((4, 2, 2), np.nan), np.zeros((4, 2)))),
    ("k", lambda: AffinePolicy(np.zeros((4, 2, 2)), np.zeros(2))),
    ("exploration", lambda: AffinePolicy(A.K, A.k, np.eye(3))),
    ("exploration", lambda: AffinePolicy(A.K, A.k, -I2)),
    ("exploration", lambda: AffinePolicy(A.K, A.k, np.ones((2, 2)))),
    ("exploration", lambda: A.with_exploration(1.0)),
    ("exploration", lambda: BasisPolicy.shift(G, [0, 0], exploration=0.5)),
    ("exploration", lambda: BasisPolicy.shift(G, [0, 0], exploration=[[1.0, 0.5], [0.0, 1.0]])),
    ("exploration", lambda: MixturePolicy(M.schedule, M.data, -I2)),
    ("exploration", lambda: CallablePolicy(lambda t, x, th: x, [1.0], exploration=0.5)),
    ("exploration", lambda: CallablePolicy(lambda t, x, th: x, [1.0], exploration=-I2)),
    ("grid", lambda: A.mean(G.grid(5), 0, X)),
    ("grid", lambda: A.parts(G.grid(5))),
    ("theta", lambda: A.with_theta([1.0])),
    ("theta", lambda: A.with_theta(np.full(A.theta.size, np.inf))),
    ("theta", lambda: BasisPolicy.shift(G, [1.0])),
    ("theta", lambda: BasisPolicy.shift(G, [1.0, np.nan])),
    ("theta", lambda: BasisPolicy.shift(G, [1.0, 1.0]).with_theta([1.0])),
    ("theta", lambda: BasisPolicy.of(G, BasisPolicy.shift(G, [1, 1]).basis, np.ones(5))),
    ("theta", lambda: MixturePolicy(M.schedule, M.data).with_theta([1.0])),
    ("theta", lambda: CallablePolicy(lambda t, x, th: x, [np.nan])),
    ("scale", lambda: BasisPolicy.scaled(G, "much", [0, 0])),
    ("shift", lambda: BasisPolicy.scaled(G, 1.0, [0.0])),
    ("problem", lambda: BasisPolicy.scaled(M, 1.0, [0.0, 0.0])),
    ("functions", lambda: BasisPolicy(G, 3.0, np.zeros((1, 2, 2)), np.zeros((1, 2)))),
    ("functions", lambda: BasisPolicy(G, Monomials(2), np.zeros((1, 2, 2)), np.zeros((1, 2)))),
    ("functions", lambda: BasisPolicy(G, lambda t: [np.nan], np.zeros((1, 2, 2)), np.zeros((1, 2)))),
    ("W", lambda: BasisPolicy(G, Monomials(0), np.zeros((2, 2)), np.zeros((1, 2)))),
    ("w", lambda: BasisPolicy(G, Monomials(0), np.zeros((1, 2, 2)), np.zeros((1, 3)))),
    ("degree", lambda: Monomials(-1)),
    ("bins", lambda: TimeBins(0)),
    ("law", lambda: MixturePolicy(G.schedule, G.data)),
    ("action", lambda: CallablePolicy(1.0, [1.0])),
    ("jacobian_x", lambda: CallablePolicy(lambda t, x, th: x, [1.0], jacobian_x=2.0)),
    ("action", lambda: CallablePolicy(lambda t, x, th: x[:, 0], [1.0]).mean(GRID, 0, X)),
    ("action", lambda: CallablePolicy(lambda t, x, th: x * np.nan, [1.0]).mean(GRID, 0, X)),
    ("action", lambda: CallablePolicy(lambda t, x, th: abs(x), [1.0]).jacobian_x(GRID, 0, X)),
    ("jacobian_theta", lambda: CallablePolicy(lambda t, x, th: x, [1.0], lambda t, x, th: x).jacobian_theta(GRID, 0, X)),
    ("jacobian_x", lambda: CallablePolicy(lambda t, x, th: x, [1.0], jacobian_x=lambda t, x, th: x).jacobian_x(GRID, 0, X)),
    ("dim", lambda: CallablePolicy(lambda t, x, th: x, [1.0]).dim),
]


@pytest.mark.parametrize(("name", "make"), BAD, ids=range(len(BAD)))
def test_bad_inputs_are_named_in_one_line(name, make):
    with pytest.raises(ValueError) as caught:
        make()
    message = str(caught.value)
    assert message.startswith(f"{name}: expected") and ", got " in message and "\n" not in message
