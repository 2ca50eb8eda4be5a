"""A fine-tuning problem: schedule, data law, reward and KL weight (theory.md, section 1)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import overload

import numpy as np
from numpy.typing import ArrayLike

from ctrl import check
from ctrl.check import Array
from ctrl.laws import Gaussian, GaussianMixture, Law, StartNoise, noised_law
from ctrl.policy import AffinePolicy, CallablePolicy, MixturePolicy, Parts, Policy
from ctrl.reward import Reward
from ctrl.schedule import Coefficients, Schedule, TimeGrid


@dataclass(frozen=True, eq=False)
class Problem:
    r"""Reward fine-tuning of a diffusion model as stochastic control of its score.

        dX = [ -f X + h a ] dt + eta g dB,      h = (1 + eta^2)/2 g^2,      coefficients at tau = T - t
        J(theta) = E[ e^{-rho T} r(X_T) ] - lambda E int e^{-rho t} kappa |a - s|^2 dt + gamma E int e^{-rho t} H(pi) dt

    kl_weight lambda >= 0 (reward units per nat)    eta >= 0 (1: reverse SDE, 0: probability-flow ODE)
    start "prior" (N(0, prior variance I)) or "exact" (the noised data law)    entropy_weight gamma >= 0
    discount rho >= 0 (1/time)      pre-trained action s(t, x) = grad log p_{T-t}(x)
    Source: Scores as Actions (2409.08400); theory.md, section 1.   Checked: tests/test_problem.py::test_contract_example
    """

    schedule: Schedule
    data: Law
    reward: Reward
    kl_weight: float
    eta: float = 1.0
    start: str = "prior"
    entropy_weight: float = 0.0
    discount: float = 0.0

    def __post_init__(self) -> None:
        for name, kind in (("schedule", Schedule), ("data", (Gaussian, GaussianMixture)), ("reward", Reward)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}: expected a {name} object of this library, got {type(getattr(self, name)).__name__}")
        for name in ("kl_weight", "eta", "entropy_weight", "discount"):
            object.__setattr__(self, name, check.number(name, getattr(self, name), at_least=0))
        if self.start not in ("prior", "exact"):
            raise ValueError(f'start: expected "prior" or "exact", got {self.start!r}')
        if self.reward.dim not in (None, self.data.dim):
            raise ValueError(f"reward: expected dimension {self.data.dim} like the data, got {self.reward.dim}")

    @property
    def dim(self) -> int:
        return self.data.dim

    @property
    def horizon(self) -> float:
        return self.schedule.horizon

    def grid(self, steps: int) -> TimeGrid:
        """A uniform grid of `steps` steps on [0, T]; one object for equal numbers, so that what is cached by grid is found again."""
        return _uniform(self, check.integer("steps", steps, at_least=1))

    def marginal(self, t: float) -> Law:
        """The noised data law p_{T-t} at generation time t in [0, T]."""
        return noised_law(self.schedule, self.data, self._within(t))

    def _within(self, t: float) -> float:
        t = float(t)
        if not 0 <= t <= self.horizon * (1 + 1e-12):  # also refuses NaN
            raise ValueError(f"t: expected a generation time in [0, {self.horizon:g}], got {t:g}")
        return t

    def score(self, t: float, x: ArrayLike) -> Array:
        """The pre-trained action s(t, x) = grad log p_{T-t}(x), (n, d) -> (n, d)."""
        return self.marginal(t).score(x)

    def affine_score(self, t: float) -> tuple[Array, Array]:
        """(K_pre, k_pre) with s(t, x) = K_pre x + k_pre; Gaussian data only."""
        if not isinstance(self.data, Gaussian):
            raise ValueError("problem: expected Gaussian data (an affine score), got a mixture")
        return _affine_score(self.schedule, self.data, self._within(t))

    def pretrained(self, grid: TimeGrid) -> AffinePolicy | MixturePolicy:
        """The pre-trained policy mu = s: affine per step for Gaussian data, the data's own mixture otherwise."""
        self.coefficients(grid)
        return _pretrained(self.schedule, self.data, grid)

    @cached_property
    def start_law(self) -> Law:
        """Law of X_0: the prior, or the noised data law at tau = T."""
        if self.start == "exact":
            return self.marginal(0.0)
        return Gaussian(np.zeros(self.dim), self.schedule.prior_variance * np.eye(self.dim))

    def mean_and_departure(self, policy: Policy, parts: Parts | None, grid: TimeGrid, i: int, x: Array) -> tuple[Array, Array]:
        """mu(t_i, x) and mu - s, (n, d) each, given policy.parts(grid); a mixture's score that both are made of is computed once."""
        t = float(grid.times[i])
        score = self.score(t, x)
        if parts is not None and parts.laws is not None and parts.laws[i] is self.marginal(t):
            gap = x @ parts.K[i].T + parts.k[i]
            return score + gap, gap
        a = policy.mean(grid, i, x)
        return a, a - score

    def initial(self, noise: StartNoise) -> Array:
        """X_0, (n, d), as a pure function of the noise."""
        return self.start_law.sample(noise)

    def coefficients(self, grid: TimeGrid) -> Coefficients:
        """Left-point coefficients of the generation SDE on a grid."""
        if not isinstance(grid, TimeGrid):
            raise ValueError(f"grid: expected a TimeGrid, got {type(grid).__name__}")
        if grid.times[-1] > self.horizon * (1 + 1e-12):
            raise ValueError(f"grid: expected times up to the horizon {self.horizon:g}, got {grid.times[-1]:.6g}")
        return _coefficients(self.schedule, grid, self.eta, self.discount)

    def require_path_kl(self) -> None:
        """ValueError at eta = 0, where path measures are singular to one another."""
        if self.eta == 0:
            raise ValueError("eta: expected eta > 0 for a path KL or a score-function form (it is infinite or undefined "
                             "at eta = 0; use the penalty), got 0")

    def check_types(self, policy: Policy, grid: TimeGrid) -> None:
        """ValueError unless these are a policy and a grid within the horizon."""
        if not isinstance(policy, Policy):
            raise ValueError(f"policy: expected a policy of this library, got {type(policy).__name__}")
        self.coefficients(grid)

    def check_policy(self, policy: Policy, grid: TimeGrid) -> None:
        """What every solver and simulator checks first: dimensions, entropy, and a warning for an unstable grid."""
        self.check_types(policy, grid)
        c = self.coefficients(grid)
        dim = policy.state_dim if isinstance(policy, CallablePolicy) else policy.dim
        if dim not in (None, self.dim):
            raise ValueError(f"policy: expected dimension {self.dim} like the problem, got {dim}")
        if self.entropy_weight > 0 and policy.exploration is None:
            raise ValueError("entropy_weight: expected a policy with exploration (mean actions have no entropy), "
                             "got exploration=None")
        lowest = self._lowest_slope(policy, grid, bound=True)
        if np.any(1 - c.dt * c.f + c.dt * c.h * lowest < -1) and (factor := self.stability_factor(policy, grid)) < -1:
            warnings.warn(f"unstable grid: a step multiplies some direction by {factor:.3g} (below -1); use more steps",
                          RuntimeWarning, stacklevel=3)

    def stability_factor(self, policy: Policy, grid: TimeGrid) -> float:
        r"""The smallest eigenvalue over steps of 1 - D f + D h K: below -1 the chain overshoots and grows with N.

        For mixture scores K is bounded below by minus the largest component precision. Nothing is known of a CallablePolicy:
        the pre-trained policy stands in for it.
        Source: theory.md, section 1.   Checked: tests/test_problem.py::test_unstable_grid_warns
        """
        c = self.coefficients(grid)
        return float(np.min(1 - c.dt * c.f + c.dt * c.h * self._lowest_slope(policy, grid, bound=False)))

    def _lowest_slope(self, policy: Policy, grid: TimeGrid, *, bound: bool) -> Array:
        """The smallest real part of an eigenvalue of d mu/dx at every step, (N,), or a cheap lower bound (row sums)."""
        parts = policy.parts(grid) or self.pretrained(grid).parts(grid)
        lowest = -(np.abs(parts.K) @ np.ones(self.dim)).max(axis=1) if bound else np.linalg.eigvals(parts.K).real.min(axis=1)
        if parts.laws is not None:
            lowest = lowest - np.array([1 / np.linalg.eigvalsh(law.covs).min() for law in parts.laws])  # type: ignore[union-attr]
        return lowest


@lru_cache(maxsize=256)
def _uniform(problem: Problem, steps: int) -> TimeGrid:
    return TimeGrid.uniform(steps, problem.horizon)


@lru_cache(maxsize=256)
def _coefficients(schedule: Schedule, grid: TimeGrid, eta: float, discount: float) -> Coefficients:
    return schedule.coefficients(grid, eta, discount)


@lru_cache(maxsize=4096)
def _affine_score(schedule: Schedule, data: Gaussian, t: float) -> tuple[Array, Array]:
    """Read-only; without the law itself, of which an ODE would make one at every time that it looks at."""
    tau, (variance, axes) = schedule.tau(t), data.principal
    alpha = schedule.alpha(tau)
    K = (axes / (-(alpha**2) * variance - schedule.v(tau))) @ axes.T
    k = -alpha * (K @ data.mean)
    K.flags.writeable = k.flags.writeable = False
    return K, k


@overload
def _pretrained(schedule: Schedule, data: Gaussian, grid: TimeGrid) -> AffinePolicy: ...
@overload
def _pretrained(schedule: Schedule, data: Law, grid: TimeGrid) -> AffinePolicy | MixturePolicy: ...
@lru_cache(maxsize=64)
def _pretrained(schedule: Schedule, data: Law, grid: TimeGrid) -> AffinePolicy | MixturePolicy:
    if isinstance(data, GaussianMixture):
        return MixturePolicy(schedule, data)
    alpha, v = (np.array(c) for c in zip(*((schedule.alpha(tau), schedule.v(tau)) for tau in map(schedule.tau, grid.times[:-1])), strict=True))
    variance, axes = data.principal
    precision = (axes / (alpha[:, None] ** 2 * variance + v[:, None])[:, None, :]) @ axes.T
    precision = 0.5 * (precision + precision.swapaxes(1, 2))
    return AffinePolicy(K=-precision, k=alpha[:, None] * (precision @ data.mean))
