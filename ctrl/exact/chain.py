r"""Truth for the affine-Gaussian Euler-Maruyama chain: closed recursions, no sampling (theory.md, sections 1, 4-7, 9).

Gaussian data make the score affine; with an affine policy the chain is linear-Gaussian,

    X_{i+1} = A_i X_i + c_i + R_i^{1/2} xi,    A = (1 - D f) I + D h K,   c = D h k,   R = eta^2 g^2 D I (+ h^2 D^2 Sigma),

and with a quadratic reward every value is V_i(x) = -1/2 x'S_i x + w_i'x + z_i. Exact to rounding at every step size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba import njit

from ctrl import check
from ctrl.check import Array
from ctrl.elementary import quadratic_form
from ctrl.exact.truth import Advantage, ExactGradient, Terminal, Truth, Value
from ctrl.laws import LOG_2PI, Gaussian
from ctrl.policy import AffinePolicy, Policy
from ctrl.problem import Problem
from ctrl.reward import Quadratic
from ctrl.schedule import TimeGrid


def applies(problem: Problem, policy: Policy, grid: TimeGrid) -> bool:
    """True for Gaussian data, a policy affine in x and a reward that is at most quadratic."""
    parts = policy.parts(grid)
    affine = parts is not None and parts.laws is None
    return isinstance(problem.data, Gaussian) and affine and problem.reward.quadratic(problem.dim) is not None


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def _add_product(a: Array, b: Array, out: Array) -> None:
    """out += a b, four rows of b at a time; for few coordinates a call of BLAS costs more than the product."""
    whole = a.shape[1] - a.shape[1] % 4
    for i in range(a.shape[0]):
        for j in range(0, whole, 4):
            a0, a1, a2, a3 = a[i, j], a[i, j + 1], a[i, j + 2], a[i, j + 3]
            for k in range(b.shape[1]):
                out[i, k] += a0 * b[j, k] + a1 * b[j + 1, k] + a2 * b[j + 2, k] + a3 * b[j + 3, k]
        for j in range(whole, a.shape[1]):
            for k in range(b.shape[1]):
                out[i, k] += a[i, j] * b[j, k]


@njit(cache=True, error_model="numpy")
def _transpose(a: Array, out: Array) -> None:
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            out[j, i] = a[i, j]


@njit(cache=True, error_model="numpy")
def _forward(A: Array, m: Array, P: Array) -> None:
    """m_{i+1} += m_i A_i' (rows, (N + 1, 1, d)) and P_{i+1} += A_i P_i A_i', in place, from what X_0 and the steps bring."""
    AP, A_t = np.empty(A.shape[1:]), np.empty(A.shape[1:])
    for i in range(A.shape[0]):
        _transpose(A[i], A_t)
        AP[:] = 0.0
        _add_product(m[i], A_t, m[i + 1])
        _add_product(A[i], P[i], AP)
        _add_product(AP, A_t, P[i + 1])


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def _mean_squares(B: Array, b: Array, m: Array, P: Array, out: Array) -> None:
    """out_i += E |B_i X + b_i|^2 = tr(B_i P_i B_i') + |B_i m_i + b_i|^2 for X of mean m_i and covariance P_i."""
    BP = np.empty(B.shape[1:])
    for i in range(B.shape[0]):
        BP[:] = 0.0
        _add_product(B[i], P[i], BP)
        for j in range(B.shape[1]):
            mean = b[i, j]
            for k in range(B.shape[2]):
                mean += B[i, j, k] * m[i, k]
                out[i] += BP[j, k] * B[i, j, k]
            out[i] += mean * mean


@njit(cache=True, error_model="numpy")
def _backward(decay: Array, A: Array, c: Array, push: Array, dK: Array, dk: Array, S: Array, w: Array) -> None:
    r"""S_i = e^{-rho D} A'S_{i+1}A + push dK'dK and w_i' = e^{-rho D} (w_{i+1} - S_{i+1}c)'A - push dk'dK; rows (N, 1, d), S_N and w_N given."""
    SA, across, pull = np.empty(A.shape[1:]), np.empty(A.shape[1:]), np.empty(w.shape[1:])
    for i in range(A.shape[0] - 1, -1, -1):
        SA[:] = 0.0
        _add_product(S[i + 1], A[i], SA)
        _transpose(A[i], across)
        across *= decay[i]
        S[i] = 0.0
        _add_product(across, SA, S[i])
        _transpose(dK[i], across)
        across *= push[i]
        _add_product(across, dK[i], S[i])
        pull[:] = 0.0
        _add_product(c[i], S[i + 1], pull)
        for k in range(w.shape[2]):
            pull[0, k] = decay[i] * (w[i + 1, 0, k] - pull[0, k])
        w[i] = 0.0
        _add_product(pull, A[i], w[i])
        for k in range(w.shape[2]):
            pull[0, k] = -push[i] * dk[i, 0, k]
        _add_product(pull, dK[i], w[i])


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def _gradients(gain: Array, A: Array, pull: Array, dK: Array, m: Array, P: Array, S: Array, u: Array, out: Array) -> None:
    """u_i += U_i m_i and out_i += U_i P_i + u_i m_i' with U_i = -gain_i S_{i+1} A_i - pull_i dK_i: E u_i and E u_i X_i'."""
    U = np.empty(A.shape[1:])
    for i in range(A.shape[0]):
        U[:] = 0.0
        _add_product(S[i + 1], A[i], U)
        for j in range(A.shape[1]):
            for k in range(A.shape[2]):
                U[j, k] = -gain[i] * U[j, k] - pull[i] * dK[i, j, k]
                u[i, j] += U[j, k] * m[i, k]
            for k in range(A.shape[2]):
                out[i, j, k] += u[i, j] * m[i, k]
        _add_product(U, P[i], out[i])


def entropy(cov: Array) -> Array:
    """Entropy of N(., cov) in nats, 1/2 log det(2 pi e cov), (..., d, d) -> (...)."""
    return 0.5 * (cov.shape[-1] * (1 + LOG_2PI) + np.linalg.slogdet(cov)[1])


@dataclass(frozen=True, eq=False)
class LinearChain:
    """The chain of a problem, a policy and a grid as arrays over steps; moments and values are computed on first use."""

    problem: Problem
    policy: Policy
    grid: TimeGrid

    def __post_init__(self) -> None:
        if not applies(self.problem, self.policy, self.grid):
            raise ValueError("problem: expected Gaussian data, a policy affine in x and a quadratic reward for the exact chain, got "
                             f"{type(self.problem.data).__name__}, {type(self.policy).__name__}, {type(self.problem.reward).__name__}")

    @cached_property
    def maps(self) -> tuple[Array, Array]:
        """A (N, d, d) and c (N, d)."""
        co, parts = self.problem.coefficients(self.grid), self.policy.parts(self.grid)
        assert parts is not None
        gain = co.dt * co.h
        return _plus_diagonal(gain[:, None, None] * parts.K, 1 - co.dt * co.f), gain[:, None] * parts.k

    @property
    def step_cov(self) -> Array:
        """R_i, (N, d, d)."""
        return self._add_step_cov(np.zeros((self.grid.steps, self.problem.dim, self.problem.dim)))

    def _add_step_cov(self, out: Array) -> Array:
        """out (N, d, d) += R_i."""
        co, cov = self.problem.coefficients(self.grid), self.policy.exploration_cov(self.grid)
        if cov is not None:
            out += ((co.h * co.dt) ** 2)[:, None, None] * cov
        return _plus_diagonal(out, co.noise**2)

    @cached_property
    def departure(self) -> tuple[Array, Array]:
        """(K - K_pre, k - k_pre): mu - s = dK x + dk."""
        parts, pre = self.policy.parts(self.grid), self.problem.pretrained(self.grid).parts(self.grid)
        assert parts is not None and pre is not None
        return parts.K - pre.K, parts.k - pre.k

    @cached_property
    def running_cost(self) -> Array:
        """lambda kappa D, (N,)."""
        co = self.problem.coefficients(self.grid)
        return self.problem.kl_weight * co.kappa * co.dt

    @cached_property
    def decay(self) -> Array:
        """e^{-rho D}, (N,)."""
        return np.exp(-self.problem.discount * self.grid.dt)

    @cached_property
    def moments(self) -> tuple[Array, Array]:
        """Means (N + 1, d) and covariances (N + 1, d, d) of X_0 ... X_N."""
        (A, c), start = self.maps, self.problem.start_law
        m, P = np.concatenate([start.mean[None], c]), np.zeros((len(A) + 1, *start.cov.shape))
        P[0] = start.cov
        self._add_step_cov(P[1:])
        _forward(A, m[:, None], P)
        return m, P

    @cached_property
    def spread(self) -> Array:
        """tr Sigma_i of sampled actions, (N,); zero for mean actions."""
        cov = self.policy.exploration_cov(self.grid)
        return np.zeros(self.grid.steps) if cov is None else np.trace(cov, axis1=1, axis2=2)

    @cached_property
    def entropy_rate(self) -> Array:
        """gamma H(pi_i), (N,)."""
        cov = self.policy.exploration_cov(self.grid)
        weight = self.problem.entropy_weight
        return np.zeros(self.grid.steps) if weight == 0 or cov is None else weight * entropy(cov)

    @cached_property
    def mean_departure(self) -> Array:
        """E |mu_i - s_i|^2 under the chain, (N,)."""
        (dK, dk), (m, P) = self.departure, self.moments
        out = np.zeros(self.grid.steps)
        _mean_squares(dK, dk, m, P, out)
        return out

    @cached_property
    def value_slopes(self) -> tuple[Array, Array]:
        """S (N + 1, d, d), w (N + 1, d) of the current-valued grad V_i(x) = w_i - S_i x."""
        (A, c), (dK, dk), r = self.maps, self.departure, _reward(self.problem)
        S, w = np.empty((len(A) + 1, *r.matrix.shape)), np.empty((len(A) + 1, len(r.vector)))
        S[-1], w[-1] = r.matrix, r.vector
        _backward(self.decay, A, c[:, None], 2 * self.running_cost, dK, dk[:, None], S, w[:, None])
        return S, w

    @cached_property
    def values(self) -> tuple[Array, Array, Array]:
        """S (N + 1, d, d), w (N + 1, d), z (N + 1,) of the current-valued V_i(x) = -1/2 x'S x + w'x + z."""
        (S, w), (_, c), (_, dk) = self.value_slopes, self.maps, self.departure
        lift = np.sum(c * (w[1:] - 0.5 * _times(S[1:], c)), axis=1) - 0.5 * np.einsum("kij,kij->k", S[1:], self.step_cov)
        running = self.entropy_rate * self.grid.dt - self.running_cost * (np.sum(dk**2, axis=1) + self.spread)
        z = np.append(self.decay * lift + running, _reward(self.problem).constant)
        for i in reversed(range(self.grid.steps)):
            z[i] += self.decay[i] * z[i + 1]
        return S, w, z

    def gradient(self) -> ExactGradient:
        r"""dJ/dK_i = E[ u_i X_i' ], dJ/dk_i = E u_i, with u_i = D_i ( h_i E grad V_{i+1}(X_{i+1}) - 2 lambda kappa_i (mu_i - s_i) ), discounted."""
        co, (A, c), (dK, dk), (m, P), (S, w) = (
            self.problem.coefficients(self.grid), self.maps, self.departure, self.moments, self.value_slopes)
        gain, pull = co.discount * co.dt * co.h * self.decay, 2 * co.discount * self.running_cost
        u, dJdK = gain[:, None] * (w[1:] - _times(S[1:], c)) - pull[:, None] * dk, np.zeros_like(A)
        _gradients(gain, A, pull, dK, m, P, S, u, dJdK)
        affine = isinstance(self.policy, AffinePolicy)
        return ExactGradient(self.policy.pullback(self.grid, dJdK, u), dJdK if affine else None, u if affine else None)


def _plus_diagonal(matrices: Array, added: Array) -> Array:
    """(N, d, d) with added_i I added to every matrix, in place."""
    np.einsum("kii->ki", matrices)[:] += added[:, None]
    return matrices


def _times(matrices: Array, vectors: Array) -> Array:
    """(N, d, d), (N, d) -> (N, d)."""
    return np.einsum("kij,kj->ki", matrices, vectors)


def _reward(problem: Problem) -> Quadratic:
    r = problem.reward.quadratic(problem.dim)
    assert r is not None
    return r


def evaluate(problem: Problem, policy: Policy, grid: TimeGrid) -> Truth:
    r"""Objective, its parts, the terminal law and the gradient of the affine-Gaussian chain, exact to rounding.

        m_{i+1} = A m + c,  P_{i+1} = A P A' + R,   E|mu - s|^2 = tr(dK P dK') + |dK m + dk|^2,   J = E r - lambda sum kappa D E|a - s|^2

    Time O(N d^3), memory O(N d^2).  Any eta, mean or sampled actions, discount, entropy weight.
    Source: theory.md, sections 1, 4 and 7.   Checked: tests/test_chain.py::test_reference_numbers
    """
    problem.check_policy(policy, grid)
    chain = LinearChain(problem, policy, grid)
    co, (m, P), r = problem.coefficients(grid), chain.moments, _reward(problem)
    rate = co.kappa * co.dt
    reward = -0.5 * float(np.sum(r.matrix * P[-1]) + m[-1] @ r.matrix @ m[-1]) + float(r.vector @ m[-1]) + r.constant
    squared = chain.mean_departure + chain.spread
    running = co.discount @ (chain.entropy_rate * co.dt - problem.kl_weight * rate * squared)

    def terminal_kl() -> float:
        m_pre, P_pre = LinearChain(problem, problem.pretrained(grid), grid).moments
        return Gaussian(m[-1], P[-1]).kl(Gaussian(m_pre[-1], P_pre[-1]))

    return Truth(
        problem=problem, objective=co.final_discount * reward + float(running), expected_reward=reward,
        penalty=float(rate @ squared), mean_penalty=float(rate @ chain.mean_departure), terminal=Terminal(m[-1], P[-1]),
        method="chain", compute_terminal_kl=terminal_kl, compute_gradient=chain.gradient)


@dataclass(frozen=True, eq=False)
class QuadraticValue(Value):
    """V_i(x) = -1/2 x'S_i x + w_i'x + z_i of an affine-Gaussian chain."""

    chain: LinearChain

    def _at(self, i: int, x: Array, last: int) -> Array:
        """The states, after checking the step: 0 <= i <= last."""
        if check.integer("i", i, at_least=0) > last:
            raise ValueError(f"i: expected a step in 0 ... {last}, got {i}")
        return check.points("x", x, self.chain.problem.dim)

    @property
    def quadratic(self) -> tuple[Array, Array, Array]:
        """S (N + 1, d, d), w (N + 1, d), z (N + 1,): what one-pass estimators ask of a value."""
        return self.chain.values

    def __call__(self, i: int, x: Array) -> Array:
        x = self._at(i, x, self.chain.grid.steps)
        S, w, z = (v[i] for v in self.chain.values)
        return -0.5 * quadratic_form(x, S) + x @ w + z

    def gradient(self, i: int, x: Array) -> Array:
        x = self._at(i, x, self.chain.grid.steps)
        S, w, _ = self.chain.values
        return w[i] - x @ S[i]

    def action_value(self, i: int, x: Array, a: Array) -> Array:
        problem, grid = self.chain.problem, self.chain.grid
        x, a = self._at(i, x, grid.steps - 1), check.points("a", a, problem.dim)
        co = problem.coefficients(grid)
        mean = x + (-co.f[i] * x + co.h[i] * a) * co.dt[i]
        cost = problem.kl_weight * co.kappa[i] * co.dt[i] * np.sum((a - problem.score(float(grid.times[i]), x)) ** 2, axis=1)
        later = self(i + 1, mean) - 0.5 * co.noise[i] ** 2 * np.trace(self.chain.values[0][i + 1])
        return np.exp(-problem.discount * co.dt[i]) * later - cost


def value(problem: Problem, policy: Policy, grid: TimeGrid) -> QuadraticValue:
    r"""The value function by backward recursion, V_i(x) = -1/2 x'S_i x + w_i'x + z_i.

        S_i = A'S_{i+1}A + 2 lambda kappa D dK'dK,   w_i = A'(w_{i+1} - S_{i+1}c) - 2 lambda kappa D dK'dk      (times e^{-rho D})

    V(i, x) : (n, d) -> (n,); V.gradient(i, x) : (n, d); V.action_value(i, x, a) : (n,).
    Source: theory.md, section 5.   Checked: tests/test_chain.py::test_value_is_a_martingale
    """
    problem.check_policy(policy, grid)
    return QuadraticValue(LinearChain(problem, policy, grid))


def advantage(problem: Problem, policy: Policy, grid: TimeGrid) -> Advantage:
    """The advantage rate q(i, x, a) with the chain's exact grad V (see Advantage).

    Source: theory.md, section 6.   Checked: tests/test_chain.py::test_advantage_is_centred_and_first_order
    """
    return Advantage(problem, policy, grid, value(problem, policy, grid))


@dataclass(frozen=True, eq=False)
class Optimum:
    """The mean-shift optimum: its policy and the truth of running it."""

    policy: AffinePolicy
    truth: Truth

    @property
    def objective(self) -> float:
        return self.truth.objective

    @property
    def penalty(self) -> float:
        return self.truth.penalty

    @property
    def path_kl(self) -> float:
        return self.truth.path_kl


def optimum(problem: Problem, grid: TimeGrid) -> Optimum:
    r"""The mean-shift optimum J* of the chain by the LQ backward recursion (stationarity of theory.md, section 9 (i)).

        2 lambda kappa (a* - s)(x) = h E[ grad V*_{i+1}(X_{i+1}) | X_i = x ],
        a* = M^{-1} [ 2 lambda kappa s + h (w - S (1 - D f) x) ],      M = 2 lambda kappa I + h^2 D S

    With entropy_weight gamma > 0 actions are sampled with the optimal covariance gamma M^{-1} (section 10).
    Assumes Gaussian data, a quadratic reward, kl_weight > 0; ValueError where M is not positive (unbounded objective).
    Source: theory.md, section 9.   Checked: tests/test_chain.py::test_optimum_is_stationary_and_best
    """
    check.instance("problem", problem, Problem, "a ctrl.Problem")
    pre = problem.pretrained(grid)
    if not isinstance(pre, AffinePolicy) or problem.reward.quadratic(problem.dim) is None:
        raise ValueError("problem: expected Gaussian data and a quadratic reward for the exact optimum, got "
                         f"{type(problem.data).__name__} and {type(problem.reward).__name__}")
    if problem.kl_weight == 0:
        raise ValueError("kl_weight: expected a positive weight (the optimum is unbounded without a penalty), got 0")
    co, d = problem.coefficients(grid), problem.dim
    S, w, _ = _reward(problem)
    K, k, Sigma = np.empty_like(pre.K), np.empty_like(pre.k), np.empty_like(pre.K)
    gamma = np.exp(-problem.discount * co.dt)
    for i in reversed(range(grid.steps)):
        pull, keep = 2 * problem.kl_weight * co.kappa[i], 1 - co.dt[i] * co.f[i]
        M = pull * np.eye(d) + gamma[i] * co.h[i] ** 2 * co.dt[i] * S
        if (smallest := float(np.min(np.linalg.eigvalsh(M)))) <= 0:
            raise ValueError(f"kl_weight: expected a weight large enough to bound the objective, got {problem.kl_weight:g} "
                             f"(curvature {smallest:.3g} at step {i})")
        K[i] = np.linalg.solve(M, pull * pre.K[i] - gamma[i] * co.h[i] * keep * S)
        k[i] = np.linalg.solve(M, pull * pre.k[i] + gamma[i] * co.h[i] * w)
        Sigma[i] = problem.entropy_weight * np.linalg.inv(M)
        A, c = keep * np.eye(d) + co.dt[i] * co.h[i] * K[i], co.dt[i] * co.h[i] * k[i]
        dK, dk, cost = K[i] - pre.K[i], k[i] - pre.k[i], pull * co.dt[i]
        w = gamma[i] * (A.T @ (w - S @ c)) - cost * (dK.T @ dk)
        S = gamma[i] * (A.T @ S @ A) + cost * (dK.T @ dK)
        S = (S + S.T) / 2
    policy = AffinePolicy(K, k, Sigma if problem.entropy_weight > 0 else None)
    return Optimum(policy, evaluate(problem, policy, grid))

