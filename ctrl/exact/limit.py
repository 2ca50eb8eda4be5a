r"""Truth in continuous time for Gaussian data, quadratic rewards and affine policies (theory.md, sections 1-11).

    dX = (F X + c) dt + eta g dB,     F = -f I + h K(t),   c = h k(t),     X_t ~ N(m, P)

In continuous time sampled actions move the state like their mean; only their cost tr Sigma and their entropy enter J.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from ctrl import check
from ctrl.check import Array
from ctrl.elementary import quadratic_form
from ctrl.exact.truth import ExactGradient, Terminal, Truth
from ctrl.laws import Gaussian
from ctrl.policy import Basis, BasisPolicy, Policy
from ctrl.problem import Problem
from ctrl.reward import Quadratic

RTOL, ATOL = 1e-12, 1e-14
STEPS = 32  # at least: the dense output between steps is then good to 1e-11


@runtime_checkable
class ContinuousPolicy(Protocol):
    """A policy whose mean is mu(t, x) = K(t) x + k(t) at every t of [0, T]."""

    @property
    def exploration(self) -> Array | None: ...

    def affine_at(self, t: float) -> tuple[Array, Array]: ...


Solution = Callable[[float], Array]


def _integrate(rhs: Callable[[float, Array], Array], start: float, stop: float, y: Array, *, dense: bool = True) -> tuple[Array, Solution]:
    """End state and dense output of y' = rhs(t, y), in as few steps as it takes without; ValueError when the solution escapes to infinity."""
    from scipy.integrate import solve_ivp

    with np.errstate(over="ignore", invalid="ignore"):
        out = solve_ivp(rhs, (start, stop), y, method="DOP853", rtol=RTOL, atol=ATOL, dense_output=dense,
                        max_step=abs(stop - start) / STEPS if dense else np.inf)
    if not out.success or not np.all(np.isfinite(out.y[:, -1])):
        raise ValueError(f"problem: expected equations with a solution on all of [0, T], got one that breaks down at "
                         f"t = {out.t[-1]:.4g} (a reward that grows faster than the penalty holds it back)")
    return out.y[:, -1], out.sol


@dataclass(frozen=True, eq=False)
class _Flow:
    """Continuous-time coefficients of a problem under an affine policy."""

    problem: Problem
    policy: ContinuousPolicy

    @property
    def d(self) -> int:
        return self.problem.dim

    @cached_property
    def identity(self) -> Array:
        return np.eye(self.d)

    @cached_property
    def spread(self) -> float:
        """tr Sigma; 0 when actions are means."""
        return 0.0 if self.policy.exploration is None else float(np.trace(self.policy.exploration))

    @cached_property
    def entropy(self) -> float:
        """gamma H(pi) = gamma/2 log det(2 pi e Sigma)."""
        gamma, cov = self.problem.entropy_weight, self.policy.exploration
        if gamma == 0 or cov is None:
            return 0.0
        return 0.5 * gamma * float(np.linalg.slogdet(2 * np.pi * np.e * cov)[1])

    @cached_property
    def reward(self) -> Quadratic:
        quadratic = self.problem.reward.quadratic(self.d)
        if quadratic is None:
            raise ValueError("problem: expected a quadratic reward in the limit, got "
                             f"{type(self.problem.reward).__name__}")
        return quadratic

    def rates(self, t: float) -> tuple[float, float, float, float]:
        """f, noise variance rate eta^2 g^2, h, kappa."""
        f, g2, h, kappa = self.problem.schedule.rates(t, self.problem.eta)
        return f, self.problem.eta**2 * g2, h, kappa

    def drift(self, t: float) -> tuple[Array, Array, Array, Array]:
        """F, c and the policy's distance from the score, dK and dk."""
        f, _, h, _ = self.rates(t)
        (K, k), (K_pre, k_pre) = self.policy.affine_at(t), self.problem.affine_score(t)
        return h * K - f * self.identity, h * k, K - K_pre, k - k_pre

    def split(self, y: Array) -> tuple[Array, Array]:
        """(vector, symmetric matrix) from the head of a flat state."""
        d = self.d
        matrix = y[d : d + d * d].reshape(d, d)
        return y[:d], 0.5 * (matrix + matrix.T)

    @cached_property
    def forward(self) -> tuple[Array, Solution]:
        r"""m' = F m + c,  P' = F P + P F' + eta^2 g^2 I;  int kappa E|mu - s|^2 and int kappa, plain and discounted."""

        def rhs(t: float, y: Array) -> Array:
            _, noise, _, kappa = self.rates(t)
            (m, P), (F, c, dK, dk) = self.split(y), self.drift(t)
            gap, FP, decay = dK @ m + dk, F @ P, kappa * math.exp(-self.problem.discount * t)
            gap2 = float(gap @ gap + np.vdot(dK @ P, dK))
            return np.concatenate([F @ m + c, (FP + FP.T + noise * self.identity).ravel(), [kappa * gap2, kappa, decay * gap2, decay]])

        law = self.problem.start_law
        assert isinstance(law, Gaussian)
        y = np.concatenate([law.mean, law.cov.ravel(), np.zeros(4)])
        return _integrate(rhs, 0.0, self.problem.horizon, y)

    def law(self, t: float) -> Gaussian:
        """Law of X_t."""
        m, P = self.split(self.forward[1](t))
        return Gaussian(m, P)

    @cached_property
    def backward(self) -> Solution:
        r"""V = -1/2 x'Sx + w'x + z, from S(T), w(T), z(T) of the reward:

            S' = -F'S - SF + rho S - 2 lambda kappa dK'dK,     w' = -F'w + Sc + rho w + 2 lambda kappa dK'dk
            z' = -c'w + rho z + eta^2 g^2/2 tr S + lambda kappa (|dk|^2 + tr Sigma) - gamma H
        """
        rho, weight = self.problem.discount, self.problem.kl_weight

        def rhs(t: float, y: Array) -> Array:
            _, noise, _, kappa = self.rates(t)
            (w, S), z, (F, c, dK, dk) = self.split(y), y[-1], self.drift(t)
            SF, price = S @ F, weight * kappa
            S_dot = rho * S - SF - SF.T - 2 * price * dK.T @ dK
            w_dot = rho * w - F.T @ w + S @ c + 2 * price * dK.T @ dk
            z_dot = rho * z - c @ w + 0.5 * noise * np.vdot(S, self.identity) + price * (dk @ dk + self.spread) - self.entropy
            return np.concatenate([w_dot, S_dot.ravel(), [z_dot]])

        y = np.concatenate([self.reward.vector, self.reward.matrix.ravel(), [self.reward.constant]])
        return _integrate(rhs, self.problem.horizon, 0.0, y)[1]


def _checked(problem: Problem, policy: Policy) -> _Flow:
    if not isinstance(problem.data, Gaussian):
        raise ValueError(f"problem: expected Gaussian data in the limit, got {type(problem.data).__name__}")
    if not isinstance(policy, ContinuousPolicy):
        raise ValueError("policy: expected a policy in continuous time with affine_at(t), such as a BasisPolicy (an "
                         f"affine map per grid step has no limit), got {type(policy).__name__}")
    if policy.dim != problem.dim:
        raise ValueError(f"policy: expected dimension {problem.dim} like the problem, got {policy.dim}")
    if problem.entropy_weight > 0 and policy.exploration is None:
        raise ValueError("entropy_weight: expected a policy with exploration (mean actions have no entropy), got "
                         "exploration=None")
    flow = _flow(problem, policy)
    _ = flow.reward  # a reward that is not quadratic is refused here, not in the middle
    return flow


@lru_cache(maxsize=64)
def _flow(problem: Problem, policy: ContinuousPolicy) -> _Flow:
    """Cached by identity, so that a law asked for at many times is integrated once."""
    return _Flow(problem, policy)


@lru_cache(maxsize=64)
def _pretrained(problem: Problem) -> _Flow:
    return _Flow(problem, BasisPolicy.shift(problem, np.zeros(problem.dim)))


def evaluate(problem: Problem, policy: Policy) -> Truth:
    r"""Objective, its parts, the terminal law and the gradient in continuous time.

        m' = F m + c,   P' = F P + P F' + eta^2 g^2 I
        J = e^{-rho T} E r(X_T) - lambda int e^{-rho t} kappa (E|mu - s|^2 + tr Sigma) dt  (+ gamma int e^{-rho t} H dt)
        grad J = int e^{-rho t} E[ (d mu)'( h grad V - 2 lambda kappa (mu - s) ) ] dt

    terminal.mean (d,), terminal.cov (d, d) of X_T; penalty and mean_penalty in nats at eta > 0; gradient.theta (p,)
    Assumes Gaussian data, an at most quadratic reward and a policy in continuous time with affine_at(t) (a BasisPolicy;
    its basis gives the gradient). Error below 1e-11 relative (DOP853); the chain on a grid comes near it as O(D).
    Source: theory.md, sections 1, 5 and 7.   Checked: tests/test_limit.py::test_reference_numbers
    """
    flow = _checked(problem, policy)
    y = flow.forward[0]
    mean, cov = flow.split(y)
    gap, kappa, discounted_gap, discounted_kappa = y[-4:]
    r, rho, horizon = flow.reward, problem.discount, problem.horizon
    reward = float(-0.5 * (mean @ r.matrix @ mean + np.sum(r.matrix * cov)) + r.vector @ mean + r.constant)
    lived = -np.expm1(-rho * horizon) / rho if rho > 0 else horizon
    running = flow.entropy * lived - problem.kl_weight * (discounted_gap + flow.spread * discounted_kappa)
    return Truth(problem=problem, objective=float(np.exp(-rho * horizon) * reward + running), expected_reward=reward,
                 penalty=float(gap + flow.spread * kappa), mean_penalty=float(gap), terminal=Terminal(mean, cov),
                 method="limit",
                 compute_terminal_kl=lambda: Gaussian(mean, cov).kl(_pretrained(problem).law(horizon)),
                 compute_gradient=lambda: _gradient(flow))


def _gradient(flow: _Flow) -> ExactGradient:
    """int e^{-rho t} adjoint(t, E[u x'], E u) dt for u = h grad V - 2 lambda kappa (mu - s), one more adaptive ODE."""
    policy, problem = flow.policy, flow.problem
    if not isinstance(policy, BasisPolicy):
        raise ValueError(f"policy: expected a BasisPolicy for the gradient in theta, got {type(policy).__name__}")
    forward, backward = flow.forward[1], flow.backward

    def rhs(t: float, y: Array) -> Array:
        (m, P), (w, S) = flow.split(forward(t)), flow.split(backward(t))
        _, _, h, kappa = flow.rates(t)
        _, _, dK, dk = flow.drift(t)
        price = 2 * problem.kl_weight * kappa
        U, u = -h * S - price * dK, h * w - price * dk
        mean = U @ m + u
        return math.exp(-problem.discount * t) * policy.basis.adjoint(t, U @ P + np.outer(mean, m), mean)

    return ExactGradient(_integrate(rhs, 0.0, problem.horizon, np.zeros(policy.theta.size), dense=False)[0])


@dataclass(frozen=True, eq=False)
class LimitValue:
    r"""The value function in continuous time, V(t, x) = -1/2 x'S(t)x + w(t)'x + z(t).

    V(t, x) : (n, d) -> (n,)      V.gradient(t, x) : (n, d) -> (n, d)      coefficients(t) : S (d, d), w (d,), z
    Source: theory.md, section 5.   Checked: tests/test_limit.py::test_value_solves_its_equation
    """

    flow: _Flow

    def coefficients(self, t: float) -> tuple[Array, Array, float]:
        """S, w and z at generation time t in [0, T]."""
        t = check.number("t", t, at_least=0)
        if t > self.flow.problem.horizon:
            raise ValueError(f"t: expected a time up to the horizon {self.flow.problem.horizon:g}, got {t:g}")
        y = self.flow.backward(t)
        w, S = self.flow.split(y)
        return S, w, float(y[-1])

    def __call__(self, t: float, x: Array) -> Array:
        (S, w, z), x = self.coefficients(t), check.points("x", x, self.flow.d)
        return -0.5 * quadratic_form(x, S) + x @ w + z

    def gradient(self, t: float, x: Array) -> Array:
        """grad V(t, x), (n, d)."""
        (S, w, _), x = self.coefficients(t), check.points("x", x, self.flow.d)
        return w - x @ S


def value(problem: Problem, policy: Policy) -> LimitValue:
    r"""The value function of a policy in continuous time, from its linear ODEs.

        dV/dt + (F x + c).grad V + eta^2 g^2/2 lap V - lambda kappa (|mu - s|^2 + tr Sigma) + gamma H = rho V
        V(T, .) = r

    Assumes what `evaluate` assumes; E V(0, X_0) = J.
    Source: theory.md, section 5.   Checked: tests/test_limit.py::test_value_solves_its_equation
    """
    return LimitValue(_checked(problem, policy))


@dataclass(frozen=True, eq=False)
class FeedbackBasis(Basis):
    r"""theta (1,) times the optimal feedback: K = -theta rate S(t), k = theta rate w(t), rate = h/(2 lambda kappa)."""

    solution: Solution
    rate: float
    dim: int

    def _feedback(self, t: float) -> tuple[Array, Array]:
        y, d = self.solution(t), self.dim
        S = y[d : d + d * d].reshape(d, d)
        return -0.5 * self.rate * (S + S.T), self.rate * y[:d]

    def apply(self, t: float, theta: Array) -> tuple[Array, Array]:
        K, k = self._feedback(t)
        return theta[0] * K, theta[0] * k

    def adjoint(self, t: float, K: Array, k: Array) -> Array:
        K_best, k_best = self._feedback(t)
        return (np.einsum("ij,...ij->...", K_best, K) + k @ k_best)[..., None]


@dataclass(frozen=True, eq=False)
class LimitOptimum:
    r"""The optimum in continuous time: a* = s + h/(2 lambda kappa) grad V*.

    objective : J*, reward units      penalty : E int kappa |a* - s|^2 dt      path_kl : the same, nats; not at eta = 0
    policy : runs on any grid; theta = (1,) multiplies the feedback, and dJ/dtheta = 0 at 1
    Source: theory.md, section 9.   Checked: tests/test_limit.py::test_optimum_is_stationary
    """

    problem: Problem
    objective: float
    policy: BasisPolicy

    @cached_property
    def penalty(self) -> float:
        return evaluate(self.problem, self.policy).mean_penalty

    @property
    def path_kl(self) -> float:
        self.problem.require_path_kl()
        return self.penalty


def optimum(problem: Problem) -> LimitOptimum:
    r"""The optimal action in continuous time by the Riccati equation of V* = -1/2 x'Sx + w'x + z.

        dV*/dt + (-f x + h s).grad V* + eta^2 g^2/2 lap V* + h rate/2 |grad V*|^2 = rho V*,     V*(T, .) = r
        a* = s + rate grad V*,     rate = h/(2 lambda kappa) = 2 eta^2/((1 + eta^2) lambda),  at eta = 0: 1/(2 lambda)

    The rate is a constant, so nothing is lost where g = 0. Needs kl_weight > 0, Gaussian data and an at most quadratic
    reward; ValueError when a reward that grows makes V* infinite. Error below 1e-11 relative.
    Source: theory.md, section 9.   Checked: tests/test_limit.py::test_reference_numbers
    """
    if problem.kl_weight == 0:
        raise ValueError("kl_weight: expected a number > 0 for an optimum (actions need a penalty), got 0")
    if problem.entropy_weight > 0:
        raise ValueError(f"entropy_weight: expected 0 for the optimum of mean actions, got {problem.entropy_weight:g}")
    flow = _checked(problem, BasisPolicy.shift(problem, np.zeros(problem.dim)))
    eta, rho, r = problem.eta, problem.discount, flow.reward
    rate = (2 * eta**2 / (1 + eta**2) if eta > 0 else 0.5) / problem.kl_weight

    def rhs(t: float, y: Array) -> Array:
        _, noise, h, _ = flow.rates(t)
        (w, S), z, (F, c, _, _) = flow.split(y), y[-1], flow.drift(t)
        SF, gain = S @ F, h * rate
        S_dot = rho * S - SF - SF.T + gain * S @ S
        w_dot = rho * w - F.T @ w + S @ (c + gain * w)
        z_dot = rho * z - (c + 0.5 * gain * w) @ w + 0.5 * noise * np.vdot(S, flow.identity)
        return np.concatenate([w_dot, S_dot.ravel(), [z_dot]])

    y0, solution = _integrate(rhs, problem.horizon, 0.0, np.concatenate([r.vector, r.matrix.ravel(), [r.constant]]))
    policy = BasisPolicy.of(problem, FeedbackBasis(solution, rate, problem.dim), np.ones(1))
    (w, S), law = flow.split(y0), problem.start_law
    assert isinstance(law, Gaussian)
    objective = float(-0.5 * (law.mean @ S @ law.mean + np.sum(S * law.cov)) + w @ law.mean + y0[-1])
    return LimitOptimum(problem, objective, policy)


class MarginalKLRate(NamedTuple):
    """d/dt KL(p_t || p_t^pre), nats per time: by the formula in drifts and scores, and from the Gaussian KL itself."""

    formula: float
    derivative: float


def marginal_kl_rate(problem: Problem, policy: Policy, t: float) -> MarginalKLRate:
    r"""The rate at which the marginals of policy and pre-trained model part, in two independent ways.

        d/dt KL(p_t || p_t^pre) = E_p[ (b - b_pre).grad log(p/p_pre) ] - 1/2 eta^2 g^2 E_p|grad log(p/p_pre)|^2

    b : the drifts. The derivative differentiates 1/2 [tr(P'^{-1} P) - d + (m' - m)'P'^{-1}(m' - m) + log det P'/det P]
    along the moment equations of both laws. Nats per time; t in [0, T].
    Source: theory.md, sections 4 and 11.   Checked: tests/test_limit.py::test_marginal_kl_rate
    """
    flow, pre = _checked(problem, policy), _pretrained(problem)
    t = check.number("t", t, at_least=0)
    if t > problem.horizon:
        raise ValueError(f"t: expected a time up to the horizon {problem.horizon:g}, got {t:g}")
    p, q = flow.law(t), pre.law(t)
    _, noise, h, _ = flow.rates(t)
    (F, c, dK, dk), (F_pre, c_pre, _, _) = flow.drift(t), pre.drift(t)
    A, a = q.precision - p.precision, p.precision @ p.mean - q.precision @ q.mean  # grad log(p/q) = A x + a
    second = p.cov + np.outer(p.mean, p.mean)
    push = np.sum((dK.T @ A) * second) + (A.T @ dk + dK.T @ a) @ p.mean + dk @ a
    fisher = np.sum((A @ p.cov) * A) + np.sum((A @ p.mean + a) ** 2)
    m_dot, q_dot = F @ p.mean + c, F_pre @ q.mean + c_pre
    P_dot = F @ p.cov + p.cov @ F.T + noise * np.eye(flow.d)
    Q_dot = F_pre @ q.cov + q.cov @ F_pre.T + noise * np.eye(flow.d)
    gap, R = q.mean - p.mean, q.precision
    spread = np.sum(R * P_dot) - np.sum((R @ p.cov @ R) * Q_dot) + np.sum(R * Q_dot) - np.sum(p.precision * P_dot)
    shift = 2 * gap @ R @ (q_dot - m_dot) - gap @ R @ Q_dot @ R @ gap
    return MarginalKLRate(float(h * push - 0.5 * noise * fisher), float(0.5 * (spread + shift)))
