r"""The chain in the plane, one step at a time: what lattices, transport and the optimum share (theory.md, section 1).

    X_{i+1} | X_i = x  ~  N( m_i(x), R_i ),    m_i(x) = x + D (-f x + h mu(x)),    R_i = eta^2 g^2 D I + (h D)^2 Sigma_i
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ctrl import check
from ctrl.check import Array
from ctrl.elementary import dot
from ctrl.exact.lattice import Lattice
from ctrl.exact.line import as_gradient, of_numbers
from ctrl.exact.truth import ExactGradient, Terminal, Truth
from ctrl.laws import Gaussian, Law
from ctrl.policy import Parts, Policy
from ctrl.problem import Problem
from ctrl.schedule import Coefficients, TimeGrid

WIDTH = 10.0  # half-width of what a solver covers, in standard deviations of the chain
DIRECTIONS = 256  # in which the chain's extent is followed
CHUNK = 4096  # states whose Jacobians are held at once


@dataclass(frozen=True, eq=False)
class PlaneChain:
    """One-step laws of a policy on a grid."""

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
        """Exploration covariance, (N, 2, 2); 0 when actions are means."""
        cov = self.policy.exploration_cov(self.grid)
        return np.zeros((self.grid.steps, 2, 2)) if cov is None else cov

    @cached_property
    def frames(self) -> Array:
        """F, (N, 2, 2), with orthogonal columns and F F' = R: an action leaves noise that is a product in it, too."""
        gain = self.c.h * self.c.dt
        variance, axes = np.linalg.eigh(gain[:, None, None] ** 2 * self.sigma)
        return axes * np.sqrt(np.maximum(variance, 0) + self.c.noise[:, None] ** 2)[:, None, :]

    @cached_property
    def pretrained(self) -> PlaneChain:
        """The same chain under the pre-trained policy."""
        return PlaneChain(self.problem, self.problem.pretrained(self.grid), self.grid)

    @property
    def deterministic(self) -> bool:
        return not np.any(self.frames)

    @cached_property
    def spread(self) -> Array:
        """tr Sigma, (N,)."""
        return np.trace(self.sigma, axis1=1, axis2=2)

    @cached_property
    def bonus(self) -> Array:
        """What a step earns whatever the state, (N,): gamma D H(pi) - lambda kappa D tr Sigma."""
        out = -self.problem.kl_weight * self.c.kappa * self.c.dt * self.spread
        if self.problem.entropy_weight > 0:
            out = out + self.problem.entropy_weight * self.c.dt * 0.5 * np.linalg.slogdet(2 * np.pi * np.e * self.sigma)[1]
        return out

    def decay(self, i: int) -> float:
        """e^{-rho D_i}."""
        return math.exp(-self.problem.discount * self.c.dt[i])

    def score(self, i: int, x: Array) -> Array:
        return self.problem.score(float(self.grid.times[i]), x)

    def moved(self, i: int, x: Array, a: Array) -> Array:
        """Mean of X_{i+1} given the state and the action, (n, 2)."""
        return x + self.c.dt[i] * (-self.c.f[i] * x + self.c.h[i] * a)

    def step(self, i: int, x: Array) -> tuple[Array, Array]:
        """m_i(x) and mu - s, (n, 2) each."""
        a, gap = self.problem.mean_and_departure(self.policy, self.parts, self.grid, i, x)
        return self.moved(i, x, a), gap

    def slopes(self, i: int, x: Array) -> tuple[Array, Array]:
        """dm/dx and d(mu - s)/dx, (n, 2, 2) each."""
        dmu = self.policy.jacobian_x(self.grid, i, x)
        ds = self.problem.marginal(float(self.grid.times[i])).score_jacobian(x)
        return (1 - self.c.dt[i] * self.c.f[i]) * np.eye(2) + self.c.dt[i] * self.c.h[i] * dmu, dmu - ds

    def cost(self, i: int, gap: Array) -> Array:
        """lambda kappa D |a - s|^2 for gap = a - s, (n,)."""
        return self.problem.kl_weight * self.c.kappa[i] * self.c.dt[i] * dot(gap, gap)

    def start_density(self, lattice: Lattice) -> Array:
        """p_0 on a lattice, (n1, n2)."""
        return np.exp(self.problem.start_law.log_density(lattice.nodes())).reshape(lattice.shape)

    def hull(self, width: float) -> Array:
        r"""Where the chain can be, (N + 1, DIRECTIONS, 2): the points of its boundary with normals u, exactly so for a linear chain.

        Around c, the noiseless path of the start's mean, the support function goes by h^2 -> (support of the image)^2 + width^2 u'R u.
        """
        u = directions()
        means, covs = components(self.problem.start_law)
        sd = np.sqrt(np.einsum("ui,kij,uj->uk", u, covs, u))
        which = np.argmax(u @ means.T + width * sd, axis=1)
        out, c = np.empty((self.grid.steps + 1, DIRECTIONS, 2)), self.problem.start_law.mean
        out[0] = means[which] + width * np.einsum("uij,uj->ui", covs[which], u) / sd[np.arange(DIRECTIONS), which][:, None]
        for i, frame in enumerate(self.frames):
            moved = self.step(i, np.concatenate([out[i], c[None]]))[0]
            image, c = moved[:-1] - moved[-1], moved[-1]
            along = u @ image.T
            which, reach = np.argmax(along, axis=1), np.maximum(along.max(axis=1), 0)
            noise = width**2 * u @ (frame @ frame.T)
            support = np.sqrt(reach**2 + np.sum(noise * u, axis=1))
            out[i + 1] = c + (reach[:, None] * image[which] + noise) / support[:, None]
        return out


def plane_chain(problem: Problem, policy: Policy, grid: TimeGrid) -> PlaneChain:
    """The chain, after checking that it has one."""
    if problem.dim != 2:
        raise ValueError(f"problem: expected dimension 2 for the plane, got {problem.dim}")
    problem.check_policy(policy, grid)
    return _chain(problem, policy, grid) if of_numbers(problem, policy, grid) else PlaneChain(problem, policy, grid)


@lru_cache(maxsize=16)
def _chain(problem: Problem, policy: Policy, grid: TimeGrid) -> PlaneChain:
    """Cached by identity, so that what solvers keep of a chain is found again."""
    return PlaneChain(problem, policy, grid)


def directions() -> Array:
    """Unit vectors, (DIRECTIONS, 2)."""
    angle = 2 * np.pi * np.arange(DIRECTIONS) / DIRECTIONS
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def components(law: Law) -> tuple[Array, Array]:
    """Means (K, 2) and covariances (K, 2, 2) of a law's Gaussian components."""
    return (law.mean[None], law.cov[None]) if isinstance(law, Gaussian) else (law.means, law.covs)


def plane_truth(chain: PlaneChain, reward: float, gap2: Array, terminal: Terminal, terminal_kl: Callable[[], float],
           gradient: Callable[[], ExactGradient]) -> Truth:
    """J and the penalties from E r and E|mu - s|^2 at every step."""
    problem, c = chain.problem, chain.c
    running = chain.bonus - problem.kl_weight * c.kappa * c.dt * gap2
    return Truth(problem=problem, objective=float(c.final_discount * reward + c.discount @ running),
                 expected_reward=reward, penalty=float((c.kappa * c.dt) @ (gap2 + chain.spread)),
                 mean_penalty=float((c.kappa * c.dt) @ gap2), terminal=terminal, method="plane",
                 compute_terminal_kl=terminal_kl, compute_gradient=gradient)


def plane_terminal(x: Array, mass: Array, points: Array | None = None, density: Array | None = None) -> Terminal:
    """A terminal law by its masses (n,) at x (n, 2), with its density at points, if it has one."""
    mean = mass @ x
    return Terminal(mean, (mass[:, None] * (x - mean)).T @ (x - mean), points, density)


class Pullback:
    """Sums (d mu / d theta)' u over nodes, CHUNK at a time: Jacobians of many parameters at all nodes would not fit in memory."""

    def __init__(self, chain: PlaneChain) -> None:
        self.chain, self.total = chain, np.zeros((CHUNK, chain.policy.theta.size))

    def add(self, i: int, x: Array, u: Array) -> None:
        for k in range(0, len(x), CHUNK):
            part = slice(k, k + CHUNK)
            self.chain.policy.add_vjp(self.total[: len(x[part])], self.chain.grid, i, x[part], u[part])

    def gradient(self) -> ExactGradient:
        return as_gradient(self.chain.policy, self.total.sum(axis=0))


def states(chain: PlaneChain, i: int, x: Array, last: int) -> Array:
    """The states, after checking the step: 0 <= i <= last."""
    if check.integer("i", i, at_least=0) > last:
        raise ValueError(f"i: expected a step in 0 ... {last}, got {i}")
    return check.points("x", x, 2)


def back(chain: PlaneChain, i: int, x: Array, gap: Array, slopes: Array) -> Array:
    """grad V_i from mu - s and E grad V_{i+1}: through the step, and off the cost, (n, 2)."""
    dm, dgap = chain.slopes(i, x)
    push = 2 * chain.problem.kl_weight * chain.c.kappa[i] * chain.c.dt[i] * gap
    return chain.decay(i) * np.einsum("nij,ni->nj", dm, slopes) - np.einsum("nij,ni->nj", dgap, push)
