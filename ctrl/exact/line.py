r"""The chain on the line, one step at a time: what quadrature, transport and the optimum share (theory.md, section 1).

    X_{i+1} | X_i = x  ~  N( m_i(x), s_i^2 ),    m_i(x) = x + D (-f x + h mu(x)),    s_i^2 = eta^2 g^2 D + (h D)^2 Sigma
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ctrl.check import Array
from ctrl.exact.truth import ExactGradient, Terminal, Truth
from ctrl.laws import Gaussian, Law
from ctrl.policy import AffinePolicy, Parts, Policy
from ctrl.problem import Problem
from ctrl.reward import BumpReward, ClassLogPosteriorReward, LinearReward, LogDensityReward, QuadraticReward
from ctrl.schedule import Coefficients, TimeGrid

WIDTH = 11.0  # half-width of what a solver covers, in standard deviations of the chain
NUMBERS = (QuadraticReward, LinearReward, BumpReward, LogDensityReward, ClassLogPosteriorReward)


@dataclass(frozen=True, eq=False)
class LineChain:
    """One-step laws of a policy on a grid; states are (n, 1) at the policy's face and (n,) here."""

    problem: Problem
    policy: Policy
    grid: TimeGrid

    @cached_property
    def parts(self) -> Parts | None:
        return self.policy.parts(self.grid)

    @cached_property
    def c(self) -> Coefficients:
        return self.problem.coefficients(self.grid)

    @cached_property
    def sigma(self) -> Array:
        """Exploration variance, (N,); 0 when actions are means."""
        cov = self.policy.exploration_cov(self.grid)
        return np.zeros(self.grid.steps) if cov is None else np.ascontiguousarray(cov[:, 0, 0])

    @cached_property
    def s(self) -> Array:
        """Standard deviation of one step, (N,)."""
        return np.hypot(self.c.noise, self.c.h * self.c.dt * np.sqrt(self.sigma))

    @cached_property
    def pretrained(self) -> LineChain:
        """The same chain under the pre-trained policy."""
        return _chain(self.problem, self.problem.pretrained(self.grid), self.grid)

    @property
    def deterministic(self) -> bool:
        return not np.any(self.s)

    @cached_property
    def bonus(self) -> Array:
        """What a step earns whatever the state, (N,): gamma D H(pi) - lambda kappa D tr Sigma."""
        out = -self.problem.kl_weight * self.c.kappa * self.c.dt * self.sigma
        if self.problem.entropy_weight > 0:
            out = out + self.problem.entropy_weight * self.c.dt * 0.5 * np.log(2 * np.pi * np.e * self.sigma)
        return out

    def decay(self, i: int) -> float:
        """e^{-rho D_i}."""
        return math.exp(-self.problem.discount * self.c.dt[i])

    def moved(self, i: int, x: Array, a: Array) -> Array:
        """Mean of X_{i+1} given the state and the action, (n,)."""
        return x + self.c.dt[i] * (-self.c.f[i] * x + self.c.h[i] * a)

    def action(self, i: int, x: Array) -> Array:
        return self.policy.mean(self.grid, i, x[:, None])[:, 0]

    def centre(self, i: int, x: Array) -> Array:
        return self.moved(i, x, self.action(i, x))

    def step(self, i: int, x: Array) -> tuple[Array, Array]:
        """m_i(x) and mu - s, (n,) each."""
        a, gap = self.problem.mean_and_departure(self.policy, self.parts, self.grid, i, x[:, None])
        return self.moved(i, x, a[:, 0]), gap[:, 0]

    def score(self, i: int, x: Array) -> Array:
        return self.problem.score(float(self.grid.times[i]), x[:, None])[:, 0]

    def slope(self, i: int, x: Array) -> Array:
        """dm/dx, (n,)."""
        dmu = self.policy.jacobian_x(self.grid, i, x[:, None])[:, 0, 0]
        return 1 + self.c.dt[i] * (-self.c.f[i] + self.c.h[i] * dmu)

    def slopes(self, i: int, x: Array) -> tuple[Array, Array]:
        """dm/dx and d(mu - s)/dx, (n,) each."""
        dmu = self.policy.jacobian_x(self.grid, i, x[:, None])[:, 0, 0]
        ds = self.problem.marginal(float(self.grid.times[i])).score_jacobian(x[:, None])[:, 0, 0]
        return 1 + self.c.dt[i] * (-self.c.f[i] + self.c.h[i] * dmu), dmu - ds

    def cost(self, i: int, gap: Array) -> Array:
        """lambda kappa D |a - s|^2 for gap = a - s."""
        return self.problem.kl_weight * self.c.kappa[i] * self.c.dt[i] * gap**2

    def start_density(self, x: Array) -> Array:
        """p_0(x), (n,)."""
        return np.exp(self.problem.start_law.log_density(x[:, None]))

    def edges(self, width: float) -> tuple[Array, Array]:
        r"""Where the chain can be, (N + 1,) each: `width` standard deviations, exactly so for a linear chain.

        An edge is c + width w, c the noiseless path of the start's mean and w^2 -> (secant slope of m)^2 w^2 + s^2.
        """
        return _edges(self, width)


def line_chain(problem: Problem, policy: Policy, grid: TimeGrid) -> LineChain:
    """The chain, after checking that it has one."""
    if problem.dim != 1:
        raise ValueError(f"problem: expected dimension 1 for quadrature, got {problem.dim}")
    problem.check_policy(policy, grid)
    return _chain(problem, policy, grid) if of_numbers(problem, policy, grid) else LineChain(problem, policy, grid)


def of_numbers(problem: Problem, policy: Policy, grid: TimeGrid) -> bool:
    """Whether policy and reward are read-only numbers: a function may answer otherwise next time, a network in training for one."""
    return policy.parts(grid) is not None and isinstance(problem.reward, NUMBERS)


# Cached by identity, so that what solvers keep of a chain is found again.


@lru_cache(maxsize=64)
def _chain(problem: Problem, policy: Policy, grid: TimeGrid) -> LineChain:
    return LineChain(problem, policy, grid)


@lru_cache(maxsize=64)
def _edges(chain: LineChain, width: float) -> tuple[Array, Array]:
    law = chain.problem.start_law
    centres, sd = components(law)
    low, high = np.empty(chain.grid.steps + 1), np.empty(chain.grid.steps + 1)
    low[0], high[0] = np.min(centres - width * sd), np.max(centres + width * sd)
    middle = law.mean[0]
    for i in range(chain.grid.steps):
        left, middle, right = chain.centre(i, np.array([low[i], middle, high[i]]))
        low[i + 1] = middle - np.hypot(middle - left, width * chain.s[i])
        high[i + 1] = middle + np.hypot(right - middle, width * chain.s[i])
    return low, high


def components(law: Law) -> tuple[Array, Array]:
    """Means and standard deviations of a law's Gaussian components, (K,) each."""
    if isinstance(law, Gaussian):
        return law.mean, np.sqrt(law.cov[0])
    return law.means[:, 0], np.sqrt(law.covs[:, 0, 0])


def line_truth(chain: LineChain, reward: float, gap2: Array, terminal: Terminal, terminal_kl: Callable[[], float],
               gradient: Callable[[], ExactGradient]) -> Truth:
    """J and the penalties from E r and E|mu - s|^2 at every step."""
    problem, c = chain.problem, chain.c
    running = chain.bonus - problem.kl_weight * c.kappa * c.dt * gap2
    return Truth(problem=problem, objective=float(c.final_discount * reward + c.discount @ running),
                 expected_reward=reward, penalty=float((c.kappa * c.dt) @ (gap2 + chain.sigma)),
                 mean_penalty=float((c.kappa * c.dt) @ gap2), terminal=terminal, method="quadrature",
                 compute_terminal_kl=terminal_kl, compute_gradient=gradient)


def line_terminal(x: Array, mass: Array, density: Array | None) -> Terminal:
    """A terminal law by its masses (n,) at points (n,), with its density there if it has one."""
    mean = float(mass @ x)
    return Terminal(np.array([mean]), np.array([[mass @ (x - mean) ** 2]]), x if density is not None else None, density)


def as_gradient(policy: Policy, theta: Array) -> ExactGradient:
    """dJ/dtheta, split into K and k for an affine policy."""
    if not isinstance(policy, AffinePolicy):
        return ExactGradient(theta)
    size = policy.K.size
    return ExactGradient(theta, theta[:size].reshape(policy.K.shape), theta[size:].reshape(policy.k.shape))
