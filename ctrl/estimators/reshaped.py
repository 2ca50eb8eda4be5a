"""Estimators made of others: one random step, the natural gradient; and finite differences (theory.md, sections 7 and 8)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from ctrl import check
from ctrl.check import Array
from ctrl.estimators.contract import SAMPLES_LIMIT, Bias, Claim, Estimator, Gradient, Need, Run, _collect, runs
from ctrl.noise import NoiseLike, QuadratureNoise
from ctrl.policy import Policy
from ctrl.problem import Problem
from ctrl.rollout import simulate
from ctrl.schedule import TimeGrid


class _Around(Estimator):
    """An estimator made of another one, `form`, on the same paths."""

    form: Estimator

    @property
    def claim(self) -> Claim:
        return self.form.claim

    @property
    def needs(self) -> frozenset[Need]:
        return self.form.needs

    @abstractmethod
    def around(self, form: Estimator) -> Estimator:
        """The same made of another form."""

    def require(self, problem: Problem, policy: Policy) -> None:
        self.form.require(problem, policy)

    def sampler(self, policy: Policy) -> Policy | None:
        return self.form.sampler(policy)

    def unit(self, noise: NoiseLike) -> int | None:
        return self.form.unit(noise)

    def extended(self, noise: NoiseLike, grid: TimeGrid) -> NoiseLike:
        return self.form.extended(noise, grid)

    def prepared(self, batch: Callable[[], Iterator[Run]], noise: NoiseLike) -> Estimator:
        return self.around(self.form.prepared(batch, noise))


@dataclass(frozen=True, eq=False)
class OneRandomStep(_Around):
    r"""The term of one random step of each path, over its probability: one policy call with a gradient in the place of N.

        (d mu_i)' u_i / p_i,      i drawn with probability p_i for every path, u the cotangents of `form`

    form : any estimator of cotangents      probabilities : (N,) positive, summing to 1; None: 1/N each
    Unbiased for whatever the mean of `form` is, for any p > 0; the variance is at least that of `form`.
    With sign patterns the step is integrated over, too (N times as many paths).
    Source: theory.md, section 7.   Checked: tests/test_estimators_reshaped.py::test_one_random_step_is_unbiased_for_any_probabilities
    """

    form: Estimator
    probabilities: ArrayLike | None = None

    def __post_init__(self) -> None:
        check.instance("form", self.form, Estimator, "an estimator of cotangents")
        if isinstance(self.form, NaturalGradient):
            raise ValueError("form: expected NaturalGradient(OneRandomStep(...), F), got the other way round")
        if self.probabilities is None:
            return
        p = check.array("probabilities", self.probabilities, (None,), "(N,)")
        if np.any(p <= 0) or abs(p.sum() - 1) > 1e-9:
            raise ValueError(f"probabilities: expected positive numbers summing to 1, got a least one of {p.min():g}, sum {p.sum():.12g}")
        object.__setattr__(self, "probabilities", p / p.sum())

    def around(self, form: Estimator) -> OneRandomStep:
        return replace(self, form=form)

    def extended(self, noise: NoiseLike, grid: TimeGrid) -> NoiseLike:
        noise = super().extended(noise, grid)
        return noise.choosing(self._odds(grid)) if isinstance(noise, QuadratureNoise) else noise

    def _odds(self, grid: TimeGrid) -> Array:
        if self.probabilities is None:
            return np.full(grid.steps, 1 / grid.steps)
        p = np.asarray(self.probabilities)
        if p.size != grid.steps:
            raise ValueError(f"probabilities: expected one for each of {grid.steps} steps, got {p.size}")
        return p

    def cotangents(self, run: Run) -> Array:
        u, p = self.form.cotangents(run), self._odds(run.grid)
        out, every, step = np.zeros_like(u), np.arange(len(u)), run.noise.choice(p)
        out[every, step] = u[every, step] / p[step][:, None]
        return out


def information(problem: Problem, policy: Policy, grid: TimeGrid, i: int, x: Array) -> Array:
    """What step i from x adds to the Fisher information of the path, 2 kappa_i D_i (d mu_i)'(d mu_i), (n, p, p).

    Source: theory.md, section 8.   Checked: tests/test_estimators_reshaped.py::test_fisher_is_the_covariance_of_the_score
    """
    c, slope = problem.coefficients(grid), policy.jacobian_theta(grid, i, x)
    return 2 * c.kappa[i] * c.dt[i] * np.einsum("ndp,ndq->npq", slope, slope)


def fisher(problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike) -> Array:
    r"""The Fisher information of the path, the mean over these paths of what their steps add, (p, p); nats per parameter squared.

        F = sum_i 2 kappa_i D_i E[ (d mu_i)'(d mu_i) ],      KL(P_theta || P_{theta + d}) = 1/2 d'F d for policies linear in theta

    Exact where the noise is a rule that integrates squares (signs, cross) and the policy linear in x. eta > 0.
    Source: theory.md, section 8.   Checked: tests/test_estimators_reshaped.py::test_fisher_is_the_covariance_of_the_score
    """
    problem.require_path_kl()
    F, first = np.zeros((policy.theta.size, policy.theta.size)), 0
    for run in runs(problem, policy, grid, noise):
        w = np.full(len(run.states), 1 / noise.paths) if noise.weights is None else noise.weights[first : first + len(run.states)]
        first += len(w)
        F += weighted_information(run, w)
    return F


def weighted_information(run: Run, w: Array) -> Array:
    r"""The Fisher information on paths that are there already, weighted by w (n,): (p, p), without a matrix for every path.

        sum_i 2 kappa_i D_i sum_paths w (d mu_i)'(d mu_i)

    Source: theory.md, section 8.   Checked: tests/test_estimators_reshaped.py::test_fisher_is_the_covariance_of_the_score
    """
    c, rows, F = run.coefficients, np.repeat(w, run.problem.dim)[:, None], np.zeros((run.policy.theta.size,) * 2)
    for i, x in enumerate(run.left):
        slope = run.policy.jacobian_theta(run.grid, i, x).reshape(len(rows), -1)
        F += 2 * c.kappa[i] * c.dt[i] * slope.T @ (rows * slope)
    return F


@dataclass(frozen=True, eq=False)
class NaturalGradient(_Around):
    r"""The natural gradient: steepest ascent per nat of path KL instead of per parameter.

        F^{-1} sum_i (d mu_i)' u_i,      u the cotangents of `form`

    form : any estimator of cotangents      fisher F : (p, p), positive definite, exact or from other paths (`fisher`)
    Its mean is F^{-1} times that of `form`. An F from n other paths is not F: E F_n^{-1} - F^{-1} is O(1/n).
    Source: Kakade (2001); theory.md, section 8.   Checked: tests/test_estimators_reshaped.py::test_natural_gradient_is_unbiased_for_its_own_target
    """

    form: Estimator
    fisher: ArrayLike

    def __post_init__(self) -> None:
        check.instance("form", self.form, Estimator, "an estimator of cotangents")
        object.__setattr__(self, "fisher", check.spd("fisher", self.fisher))

    @property
    def claim(self) -> Claim:
        claim = self.form.claim
        return replace(claim, of=f"F^-1 {claim.of}")

    @property
    def needs(self) -> frozenset[Need]:
        return self.form.needs | {Need.FISHER}

    def around(self, form: Estimator) -> NaturalGradient:
        return replace(self, form=form)

    def cotangents(self, run: Run) -> Array:
        return self.form.cotangents(run)

    def samples(self, run: Run) -> Array:
        return self._turned(self.form.samples(run))

    def batches(self, problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, dtype: Any) -> Iterator[Array]:
        return map(self._turned, self.form.batches(problem, policy, grid, noise, dtype))

    def _turned(self, samples: Array) -> Array:
        return np.linalg.solve(np.asarray(self.fisher), samples.T).T


@dataclass(frozen=True, eq=False)
class FiniteDifference:
    r"""Central differences of the per-path objective on shared noise.

        ( J(theta + eps e_j) - J(theta - eps e_j) ) / (2 eps),   j = 1 ... p

    epsilon : parameter units.   Bias O(eps^2), none for a constant shift with a quadratic reward; 2p simulations.
    Source: theory.md, section 7.   Checked: tests/test_estimators.py::test_finite_difference_bias_is_second_order
    """

    epsilon: float = 1e-3
    claim = Claim(Bias.PRESENT, note="O(epsilon^2)")
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", check.number("epsilon", self.epsilon, above=0))

    def __call__(self, problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike) -> Gradient:
        p = policy.theta.size
        size = max(2, SAMPLES_LIMIT // 8 // (8 * p) // 2 * 2)  # whole antithetic pairs
        parts = (noise[first : first + size] for first in range(0, noise.paths, size))
        return _collect((self._samples(problem, policy, grid, part) for part in parts), noise, p, noise.group)

    def _samples(self, problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike) -> Array:
        out = np.empty((noise.paths, policy.theta.size))
        for j in range(policy.theta.size):
            step = np.zeros(policy.theta.size)
            step[j] = self.epsilon
            up = simulate(problem, policy.with_theta(policy.theta + step), grid, noise).objective
            down = simulate(problem, policy.with_theta(policy.theta - step), grid, noise).objective
            out[:, j] = (up - down) / (2 * self.epsilon)
        return out
