"""The contract of every estimator: (problem, policy, grid, noise) -> Gradient, by the cotangents of every step (theory.md, section 7)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from ctrl import check
from ctrl.check import Array
from ctrl.elementary import dot
from ctrl.noise import NoiseLike, require_noise
from ctrl.policy import Policy
from ctrl.problem import Problem
from ctrl.rollout import OnePass, Paths, actions, one_pass, precision, trajectories
from ctrl.schedule import Coefficients, TimeGrid

SAMPLES_LIMIT = 256 * 2**20
CHUNK_BYTES = 32 * 2**20
COVARIANCE_LIMIT = 4 * 2**30


class ValueFunction(Protocol):
    """V(i, x) -> (n,) and V.gradient(i, x) -> (n, d): an exact value, or anybody's own."""

    def __call__(self, i: int, x: Array) -> Array: ...

    def gradient(self, i: int, x: Array) -> Array: ...


class Bias(Enum):
    """Three kinds of claim about a mean on the chain."""

    NONE = "unbiased"
    ORDER_D = "O(D)"
    PRESENT = "biased"
    UNSTATED = "nothing said"


@dataclass(frozen=True)
class Claim:
    """What an estimator says of its mean on the chain: its bias, with respect to what, and what is known beyond that.

    Source: theory.md, section 7.   Checked: tests/test_estimators_claims.py::test_every_claim_is_tested_as_what_it_is
    """

    bias: Bias
    of: str = "grad J"
    note: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, [self.bias.value, f"for {self.of}", self.note and f"({self.note})"]))


UNBIASED = Claim(Bias.NONE)


class Need(Enum):
    """What an estimator asks for beyond (problem, policy, grid, noise)."""

    DIFFUSION = "eta > 0"
    VALUE = "a value V(i, x)"
    VALUE_GRADIENT = "grad V(i, x)"
    ADVANTAGE = "an advantage rate A(i, x, a)"
    REWARD_GRADIENT = "grad r"
    EXPLORATION = "sampled actions"
    KL_WEIGHT = "kl_weight > 0"
    OLD_POLICY = "theta_old"
    FISHER = "a Fisher matrix"
    BATCH = "several independent paths"


@dataclass(frozen=True, eq=False)
class Gradient:
    r"""A gradient estimate with its spread.

        mean = sum_m w_m G_m,      covariance of one unit,      standard_error = sqrt(diag covariance / n)

    mean : (p,)   covariance : (p, p)   samples : (n, p), or None when streamed   count : independent units n
    A unit is a path, an antithetic pair, a replicate of a quasi-Monte-Carlo rule, or a batch whose paths are coupled.
    exact : the noise was a quadrature rule, the mean is an expectation, standard_error is 0.
    Source: theory.md, section 7.   Checked: tests/test_estimators.py::test_streamed_moments_equal_samples
    """

    mean: Array
    covariance: Array
    count: int
    samples: Array | None = None
    exact: bool = False

    @property
    def standard_error(self) -> Array:
        """Of the mean, (p,)."""
        return np.zeros_like(self.mean) if self.exact else np.sqrt(np.diag(self.covariance) / self.count)

    @classmethod
    def from_samples(cls, samples: Array, weights: Array | None = None) -> Gradient:
        """From per-path samples (n, p); weights (n,) when the noise was a quadrature rule."""
        samples = check.array("samples", samples, (None, None), "(n, p)")
        if len(samples) == 0:
            raise ValueError(f"samples: expected shape (n, p) with n >= 1, got {samples.shape}")
        if weights is not None:
            weights = check.array("weights", weights, (len(samples),), f"({len(samples)},)")
            if weights.sum() <= 0:
                raise ValueError(f"weights: expected a positive sum, got {weights.sum():g}")
        moments = _Moments(samples.shape[1])
        moments.add(samples, weights)
        return moments.gradient(samples, exact=weights is not None)


class _Moments:
    """Running mean and scatter of vectors, merged block by block (Chan, Golub and LeVeque)."""

    def __init__(self, p: int) -> None:
        if 16 * p * p > COVARIANCE_LIMIT:
            raise ValueError(f"policy: expected few enough parameters for a (p, p) covariance within {COVARIANCE_LIMIT / 2**30:.0f} GiB, "
                             f"got p = {p} ({16 * p * p / 2**30:.1f} GiB)")
        self.weight, self.count, self.mean, self.scatter = 0.0, 0, np.zeros(p), np.zeros((p, p))

    def add(self, samples: Array, weights: Array | None) -> None:
        w = np.ones(len(samples)) if weights is None else weights
        weight = float(w.sum())
        mean = w @ samples / weight
        centred = samples - mean
        shift, total = mean - self.mean, self.weight + weight
        self.scatter += (w[:, None] * centred).T @ centred + np.outer(shift, shift) * self.weight * weight / total
        self.mean += shift * weight / total
        self.weight, self.count = total, self.count + len(samples)

    def gradient(self, samples: Array | None, *, exact: bool) -> Gradient:
        freedom = self.weight if exact else max(self.weight - 1, 1.0)
        return Gradient(self.mean, self.scatter / freedom, self.count, samples, exact)


@dataclass(frozen=True, eq=False)
class Run:
    """A batch of paths with everything that the cotangents are made of; arrays (n, N, d) unless said otherwise.

    What was drawn (states, departure, costs, k1) belongs to the sampler, what is differentiated (score_noise, kl_term, log_ratio)
    to the policy; they are the same unless `sampler` says who else drew the paths.
    """

    problem: Problem
    policy: Policy
    grid: TimeGrid
    noise: NoiseLike
    paths: Paths
    sampler: Policy | None = None

    @cached_property
    def coefficients(self) -> Coefficients:
        return self.problem.coefficients(self.grid)

    @property
    def states(self) -> Array:
        """X_0 ... X_N, (n, N + 1, d)."""
        assert self.paths.states is not None
        return self.paths.states

    @property
    def xi(self) -> Array:
        assert self.paths.noise_steps is not None
        return self.paths.noise_steps

    @property
    def behaviour(self) -> Policy:
        """Who drew the paths."""
        return self.sampler or self.policy

    @cached_property
    def actions(self) -> Array:
        """a_i."""
        return actions(self.behaviour, self.grid, self.noise, self.states) if self.paths.actions is None else self.paths.actions

    @cached_property
    def departure(self) -> Array:
        """a_i - s_i; of mean actions, which are mu_i(X_i), without the actions."""
        if self.behaviour.exploration is None:
            parts = self.behaviour.parts(self.grid)
            return np.stack([self.problem.mean_and_departure(self.behaviour, parts, self.grid, i, x)[1] for i, x in enumerate(self.left)], axis=1)
        return self.actions - np.stack([self.problem.score(float(t), x) for t, x in zip(self.grid.times, self.left, strict=False)], axis=1)

    @cached_property
    def pull(self) -> Array:
        """2 lambda e^{-rho t_i} kappa_i D_i, (N,): twice the weight of the running cost."""
        c = self.coefficients
        return 2 * self.problem.kl_weight * c.discount * c.kappa * c.dt

    @property
    def kl_term(self) -> Array:
        """e_i = -2 lambda kappa_i D_i (a_i - s_i): the explicit gradient of the running cost."""
        return -self.pull[:, None] * (self.departure if self.sampler is None else self.departure + self.change)

    @cached_property
    def cost(self) -> Array:
        """lambda kappa_i D_i |a_i - s_i|^2, (n, N)."""
        return 0.5 * self.pull * dot(self.departure, self.departure)

    @cached_property
    def k1(self) -> Array:
        """u_i'xi_i + |u_i|^2/2, u = sqrt(2 kappa D)(a - s): the log-ratio of step i, nats, (n, N)."""
        c = self.coefficients
        u = np.sqrt(2 * c.kappa * c.dt)[:, None] * self.departure
        return dot(u, self.xi) + 0.5 * dot(u, u)

    @property
    def sampled_cost(self) -> Array:
        """lambda k1_i: the sampled form of the running cost, (n, N)."""
        return self.problem.kl_weight * self.coefficients.discount * self.k1

    @cached_property
    def reward(self) -> Array:
        """e^{-rho T} r(X_N), (n,)."""
        return self.coefficients.final_discount * self.paths.reward

    @property
    def score_noise(self) -> Array:
        """c_i xi_i = h_i sqrt(D_i)/(eta g_i) xi_i, so that sigma_i = (d mu_i)' c_i xi_i = grad log p(X_{i+1} | X_i)."""
        return self.gain[:, None] * (self.xi if self.sampler is None else self.xi - self.ahead)

    @property
    def gain(self) -> Array:
        """c_i = h_i sqrt(D_i)/(eta g_i), (N,)."""
        c = self.coefficients
        return c.h * c.dt / c.noise

    @cached_property
    def change(self) -> Array:
        """mu - mu_old at the states: how far the policy is from the one that drew the paths."""
        if self.sampler is None:
            return np.zeros_like(self.xi)
        means = [self.policy.mean(self.grid, i, x) - self.sampler.mean(self.grid, i, x) for i, x in enumerate(self.left)]
        return np.stack(means, axis=1)

    @property
    def left(self) -> Iterator[Array]:
        """X_0 ... X_{N-1} in turn, (n, d)."""
        return (self.states[:, i] for i in range(self.grid.steps))

    @property
    def ahead(self) -> Array:
        """How much further the policy aims than the sampler, in deviations of X_{i+1}."""
        return self.gain[:, None] * self.change

    @cached_property
    def log_ratio(self) -> Array:
        """log p/p_old (X_{i+1} | X_i), (n, N)."""
        return dot(self.ahead, self.xi) - 0.5 * dot(self.ahead, self.ahead)

    def discounted(self, value: ValueFunction, i: int) -> Array:
        """e^{-rho t_i} V_i(X_i), (n,)."""
        return self._discounts[i] * value(i, self.states[:, i])

    def discounted_gradient(self, value: ValueFunction, i: int) -> Array:
        """e^{-rho t_i} grad V_i(X_i), (n, d)."""
        return self._discounts[i] * value.gradient(i, self.states[:, i])

    @cached_property
    def _discounts(self) -> Array:
        return np.append(self.coefficients.discount, self.coefficients.final_discount)


def runs(problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, dtype: DTypeLike = np.float64, *, sampler: Policy | None = None,
         unit: int | None = None) -> Iterator[Run]:
    """The paths in chunks whose trajectories fit in CHUNK_BYTES; an even number of units, for estimators that pair paths.

    sampler : the policy that draws the paths, if not `policy` itself      unit : paths that stay together, noise.group if not given
    """
    check.instance("problem", problem, Problem, "a ctrl.Problem")
    problem.check_types(policy, grid)
    require_noise(noise)
    width = max(problem.dim * (grid.steps + 1), policy.theta.size)
    fit, pair = CHUNK_BYTES // (8 * width), 2 * (unit or noise.group)
    # Whole units where two of them fit or the caller needs them; of a long replicate, pieces.
    size = fit // pair * pair or (pair if unit or pair <= 4 else max(fit // 4 * 4, 4))
    for first in range(0, noise.paths, size):
        part = noise[first : first + size]
        yield Run(problem, policy, grid, part, trajectories(problem, sampler or policy, grid, part, dtype), sampler)


def _collect(batches: Iterator[Array], noise: NoiseLike, p: int, unit: int) -> Gradient:
    """Per-path samples in blocks -> Gradient; samples are kept up to SAMPLES_LIMIT, moments beyond."""
    keep = noise.paths // unit * p * 8 <= SAMPLES_LIMIT
    moments, kept, first, rest = _Moments(p), [], 0, np.empty((0, p))
    for batch in batches:
        weights = None if noise.weights is None else noise.weights[first : first + len(batch)]
        first += len(batch)
        rows = np.concatenate([rest, batch]) if len(rest) else batch
        whole = len(rows) // unit * unit
        units, rest = rows[:whole].reshape(-1, unit, p).mean(axis=1), rows[whole:]
        if len(units):
            moments.add(units, weights)
        if keep:
            kept.append(units)
    return moments.gradient(np.concatenate(kept) if keep else None, exact=noise.weights is not None)


class Estimator(ABC):
    """(problem, policy, grid, noise) -> Gradient, by the cotangents u_i of every step.

    claim : what its mean is, and `needs` : what it asks for; whoever writes one of their own may leave both unsaid.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """What is asked for beyond the four arguments."""
        return frozenset()

    @property
    def claim(self) -> Claim:
        """What is said of the mean."""
        return Claim(Bias.UNSTATED)

    @abstractmethod
    def cotangents(self, run: Run) -> Array:
        """u_i, (n, N, d)."""

    def __call__(self, problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, *, dtype: DTypeLike = np.float64) -> Gradient:
        """dtype : of the states, float64 or float32; sums over paths are always float64."""
        check.instance("problem", problem, Problem, "a ctrl.Problem")
        problem.check_types(policy, grid)
        require_noise(noise)
        self.require(problem, policy)
        kind, noise = precision(dtype), self.extended(noise, grid)
        ready = self.prepared(lambda: runs(problem, policy, grid, noise, kind, sampler=self.sampler(policy)), noise)
        return _collect(ready.batches(problem, policy, grid, noise, kind), noise, policy.theta.size, self.unit(noise) or noise.group)

    def require(self, problem: Problem, policy: Policy) -> None:
        """ValueError for what is needed and is not there."""
        if Need.DIFFUSION in self.needs:
            problem.require_path_kl()
        if Need.EXPLORATION in self.needs and policy.exploration is None:
            raise ValueError("policy: expected a policy with exploration (sampled actions), got exploration=None")
        if Need.KL_WEIGHT in self.needs and problem.kl_weight == 0:
            raise ValueError(f"kl_weight: expected kl_weight > 0 for {type(self).__name__} (it divides by it), got 0")

    def sampler(self, policy: Policy) -> Policy | None:
        """Who draws the paths, if not the policy itself."""
        return None

    def unit(self, noise: NoiseLike) -> int | None:
        """Consecutive paths that the estimator couples; None where it couples none."""
        return None

    def extended(self, noise: NoiseLike, grid: TimeGrid) -> NoiseLike:
        """The noise with the variables that the estimator draws on top, where it is a quadrature rule."""
        return noise

    def prepared(self, batch: Callable[[], Iterator[Run]], noise: NoiseLike) -> Estimator:
        """The estimator with what it must know of the whole batch (a mean, a norm): two passes over the same paths."""
        return self

    def batches(self, problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, dtype: Any) -> Iterator[Array]:
        """Samples, in the same pass as the paths where the form and the policy allow it, else from whole trajectories."""
        form = self.one_pass()
        chunks = None if form is None else one_pass(problem, policy, grid, noise, form, dtype)
        if chunks is None:
            there = self.sampler(policy)
            return (self.samples(run) for run in runs(problem, policy, grid, noise, dtype, sampler=there, unit=self.unit(noise)))
        return (self.of_sums(G, *sums.astype(np.float64, copy=False)) for G, sums in chunks)

    def one_pass(self) -> OnePass | None:
        """What the kernels must sum for `of_sums`; None where cotangents need the whole trajectory."""
        return None

    def of_sums(self, G: Array, S: Array, P: Array) -> Array:
        """Samples (n, p) from returns G (n,), S = sum_i (d mu_i)' c_i xi_i and P = sum_i (d mu_i)' ( c_i xi_i w_i + e_i )."""
        return G[:, None] * S + P

    def samples(self, run: Run) -> Array:
        """sum_i (d mu_i / d theta)' u_i per path, (n, p)."""
        u = self.cotangents(run)
        out = np.zeros((len(u), run.policy.theta.size))
        for i in range(run.grid.steps):
            run.policy.add_vjp(out, run.grid, i, run.states[:, i], u[:, i])
        return out
