"""What every exact solver returns: one face for the chain, the 1-D quadrature and the continuous limit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ctrl import check
from ctrl.check import Array
from ctrl.elementary import dot
from ctrl.policy import Policy
from ctrl.problem import Problem
from ctrl.schedule import TimeGrid


@dataclass(frozen=True, eq=False)
class Terminal:
    """Law of X_N: mean (d,), cov (d, d); by quadrature also its density (n,) at points (n,), in the plane (n1, n2) at (n1, n2, 2)."""

    mean: Array
    cov: Array
    points: Array | None = None
    density: Array | None = None


@dataclass(frozen=True, eq=False)
class ExactGradient:
    """dJ/dtheta (p,); for an AffinePolicy also dJ/dK (N, d, d) and dJ/dk (N, d)."""

    theta: Array
    K: Array | None = None
    k: Array | None = None


@dataclass(frozen=True, eq=False)
class Truth:
    r"""Objective and its parts, without sampling.

        objective = E[e^{-rho T} r(X_N)] - lambda E sum e^{-rho t_i} kappa_i D_i |a_i - s_i|^2 + gamma sum e^{-rho t_i} D_i H(pi_i)

    expected_reward : E r(X_N), undiscounted        penalty : E sum kappa D |a - s|^2, undiscounted, at every eta
    terminal_kl : KL(law of X_N || law of the pre-trained X_N), nats      gradient : computed on first access
    method : "chain", "quadrature", "plane" or "limit"
    Source: theory.md, sections 1 and 4.   Checked: tests/test_chain.py::test_reference_numbers
    """

    problem: Problem
    objective: float
    expected_reward: float
    penalty: float
    mean_penalty: float
    terminal: Terminal
    method: str
    compute_terminal_kl: Callable[[], float]
    compute_gradient: Callable[[], ExactGradient]

    @property
    def path_kl(self) -> float:
        r"""KL(P_theta || P_pre) = E sum kappa D |mu - s|^2 in nats; never the tr Sigma of sampled actions. ValueError at eta = 0."""
        self.problem.require_path_kl()
        return self.mean_penalty

    @cached_property
    def terminal_kl(self) -> float:
        return self.compute_terminal_kl()

    @cached_property
    def gradient(self) -> ExactGradient:
        return self.compute_gradient()


class Value(ABC):
    r"""The value function of a policy on a grid, current-valued:

        V_i(x) = E[ e^{-rho (t_N - t_i)} r(X_N) - lambda sum_{j>=i} e^{-rho (t_j - t_i)} kappa_j D_j |a_j - s_j|^2 | X_i = x ]

    (+ entropy terms when entropy_weight > 0; no maximum: the policy is given.)
    """

    @abstractmethod
    def __call__(self, i: int, x: Array) -> Array:
        """V_i(x), (n, d) -> (n,)."""

    @abstractmethod
    def gradient(self, i: int, x: Array) -> Array:
        """grad V_i(x), (n, d) -> (n, d)."""

    @abstractmethod
    def action_value(self, i: int, x: Array, a: Array) -> Array:
        """Q_i(x, a) = -lambda kappa D |a - s|^2 + e^{-rho D} E[V_{i+1}(X_{i+1}) | x, a], (n, d), (n, d) -> (n,)."""


@dataclass(frozen=True, eq=False)
class GlobalOptimum:
    r"""A mean-shift optimum found by a global search, with the face of the chain's: policy, objective, penalty, path_kl, truth.

        objective = E V*_0(X_0),    penalty = E sum kappa D |a* - s|^2,    expected_reward = E* r(X_N)      (undiscounted, as in Truth)

    policy : its theta (1,) multiplies the feedback      value : V*, its gradient, Q*
    truth : J, terminal law and gradient of the policy by an independent solver, `evaluate`
    Source: theory.md, section 9 (i).   Checked: tests/test_line_optimum.py::test_reference_numbers
    """

    problem: Problem
    grid: TimeGrid
    policy: Policy
    value: Value
    objective: float
    expected_reward: float
    penalty: float
    evaluate: Callable[[Problem, Policy, TimeGrid], Truth]

    @property
    def path_kl(self) -> float:
        """KL(P* || P_pre), nats; ValueError at eta = 0."""
        self.problem.require_path_kl()
        return self.penalty

    @cached_property
    def truth(self) -> Truth:
        return self.evaluate(self.problem, self.policy, self.grid)


@dataclass(frozen=True, eq=False)
class Advantage:
    r"""The advantage rate in closed form (theory.md, section 6).

        q(t, x, a) = h (a - mu).grad V - lambda kappa ( |a - s|^2 - |mu - s|^2 - tr Sigma )      (tr Sigma only for sampled actions)

    q(i, x, a) : (n, d), (n, d) -> (n,), reward units per time.  (Q_i - V_i)/D = q - gamma H + O(D), gamma H the entropy rate
    (0 without an entropy weight).  Centred: E_{a ~ pi} q = 0.
    Source: theory.md, section 6.   Checked: tests/test_chain.py::test_advantage_is_centred_and_first_order
    """

    problem: Problem
    policy: Policy
    grid: TimeGrid
    value: Value

    def __call__(self, i: int, x: Array, a: Array) -> Array:
        if check.integer("i", i, at_least=0) >= self.grid.steps:
            raise ValueError(f"i: expected a step in 0 ... {self.grid.steps - 1}, got {i}")
        x, a = check.points("x", x, self.problem.dim), check.points("a", a, self.problem.dim)
        c = self.problem.coefficients(self.grid)
        mu = self.policy.mean(self.grid, i, x)
        s = self.problem.score(float(self.grid.times[i]), x)
        cov = self.policy.exploration_cov(self.grid)
        spread = 0.0 if cov is None else float(np.trace(cov[i]))
        cost = dot(a - s, a - s) - dot(mu - s, mu - s) - spread
        push = dot(a - mu, self.value.gradient(i, x))
        return c.h[i] * push - self.problem.kl_weight * c.kappa[i] * cost
