r"""Policy-gradient estimators on the chain: one gradient, many estimators (theory.md, section 7).

Every estimator is a choice of cotangents u_i in one formula; per path,

    gradient sample = sum_i (d mu_i / d theta)' u_i,          xi the noise, G returns, c_i = h_i sqrt(D_i) / (eta g_i),
                                                              e_i = -2 lambda kappa_i D_i (a_i - s_i).
    ScoreFunction        u_i = c_i xi_i (G - b_i) + e_i       G the total return (REINFORCE, DDPO-SF)
    RewardToGo           u_i = c_i xi_i (G_{i+1} - b_i) + e_i G_{i+1} the return after step i
    TemporalDifference   u_i = c_i xi_i (V_{i+1}(X_{i+1}) - V_i(X_i)) + e_i
    ValueGradient        u_i = D_i h_i grad V_{i+1}(X_{i+1}) + e_i
    Pathwise             u_i = D_i h_i p_{i+1} + e_i          p the adjoint of the whole chain
    ActionNoise          u_i = Sigma_i^{-1} (a_i - mu_i) G    sampled actions only
    FiniteDifference     not a cotangent: (J(theta + e) - J(theta - e)) / 2e on shared noise

All running terms carry e^{-rho t_i} and the reward e^{-rho T}. Values are arguments: this module never computes one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from ctrl import check
from ctrl.check import Array
from ctrl.kernels.gradient import BASELINE, DIFFERENCE, NO_VALUE
from ctrl.noise import NoiseLike, require_noise
from ctrl.policy import Policy
from ctrl.problem import Problem
from ctrl.rollout import OnePass, Paths, one_pass, precision, simulate
from ctrl.schedule import Coefficients, TimeGrid

SAMPLES_LIMIT = 256 * 2**20
CHUNK_BYTES = 32 * 2**20
COVARIANCE_LIMIT = 4 * 2**30


class ValueFunction(Protocol):
    """V(i, x) -> (n,) and V.gradient(i, x) -> (n, d): an exact value, or anybody's own."""

    def __call__(self, i: int, x: Array) -> Array: ...

    def gradient(self, i: int, x: Array) -> Array: ...


def _quadratic(value: Any) -> tuple[Array, Array, Array] | None:
    """S, w, z of a value that is known to be -1/2 x'S_i x + w_i'x + z_i (the exact one of an affine-Gaussian chain), else None."""
    return getattr(value, "quadratic", None)


@dataclass(frozen=True, eq=False)
class Gradient:
    r"""A gradient estimate with its spread.

        mean = sum_m w_m G_m,      covariance of one path,      standard_error = sqrt(diag covariance / n)

    mean : (p,)   covariance : (p, p)   samples : (n, p), or None when streamed   count : independent units n
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
    """A batch of paths with everything that the cotangents are made of; arrays (n, N, d) unless said otherwise."""

    problem: Problem
    policy: Policy
    grid: TimeGrid
    noise: NoiseLike
    paths: Paths

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

    @cached_property
    def departure(self) -> Array:
        """a_i - s_i."""
        assert self.paths.actions is not None
        score = [self.problem.score(float(t), self.states[:, i]) for i, t in enumerate(self.grid.times[:-1])]
        return self.paths.actions - np.stack(score, axis=1)

    @cached_property
    def pull(self) -> Array:
        """2 lambda e^{-rho t_i} kappa_i D_i, (N,): twice the weight of the running cost."""
        c = self.coefficients
        return 2 * self.problem.kl_weight * c.discount * c.kappa * c.dt

    @property
    def kl_term(self) -> Array:
        """e_i = -2 lambda kappa_i D_i (a_i - s_i): the explicit gradient of the running cost."""
        return -self.pull[:, None] * self.departure

    @cached_property
    def cost(self) -> Array:
        """lambda kappa_i D_i |a_i - s_i|^2, (n, N)."""
        return 0.5 * self.pull * np.sum(self.departure**2, axis=2)

    @cached_property
    def k1(self) -> Array:
        """u_i'xi_i + |u_i|^2/2, u = sqrt(2 kappa D)(a - s): the log-ratio of step i, nats, (n, N)."""
        c = self.coefficients
        u = np.sqrt(2 * c.kappa * c.dt)[:, None] * self.departure
        return np.sum(u * self.xi, axis=2) + 0.5 * np.sum(u**2, axis=2)

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
        c = self.coefficients
        return (c.h * c.dt / c.noise)[:, None] * self.xi

    def discounted(self, value: ValueFunction, i: int) -> Array:
        """e^{-rho t_i} V_i(X_i), (n,)."""
        return self._discounts[i] * value(i, self.states[:, i])

    def discounted_gradient(self, value: ValueFunction, i: int) -> Array:
        """e^{-rho t_i} grad V_i(X_i), (n, d)."""
        return self._discounts[i] * value.gradient(i, self.states[:, i])

    @cached_property
    def _discounts(self) -> Array:
        return np.append(self.coefficients.discount, self.coefficients.final_discount)


def runs(problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, dtype: DTypeLike = np.float64) -> Iterator[Run]:
    """The paths in chunks whose trajectories fit in CHUNK_BYTES; an even number of units, for estimators that pair paths."""
    check.instance("problem", problem, Problem, "a ctrl.Problem")
    problem.check_types(policy, grid)
    require_noise(noise)
    unit = 2 * noise.group
    width = max(problem.dim * (grid.steps + 1), policy.theta.size)
    size = max(1, CHUNK_BYTES // (8 * width) // unit) * unit
    for first in range(0, noise.paths, size):
        part = noise[first : first + size]
        yield Run(problem, policy, grid, part, simulate(problem, policy, grid, part, dtype=dtype, trajectory=True))


def _collect(batches: Iterator[Array], noise: NoiseLike, p: int) -> Gradient:
    """Per-path samples in blocks -> Gradient; samples are kept up to SAMPLES_LIMIT, moments beyond."""
    keep = noise.paths // noise.group * p * 8 <= SAMPLES_LIMIT
    moments, kept, first = _Moments(p), [], 0
    for batch in batches:
        weights = None if noise.weights is None else noise.weights[first : first + len(batch)]
        first += len(batch)
        units = batch.reshape(-1, noise.group, p).mean(axis=1)
        moments.add(units, weights)
        if keep:
            kept.append(units)
    return moments.gradient(np.concatenate(kept) if keep else None, exact=noise.weights is not None)


class Estimator(ABC):
    """(problem, policy, grid, noise) -> Gradient, by the cotangents u_i of every step."""

    needs_diffusion = False

    @abstractmethod
    def cotangents(self, run: Run) -> Array:
        """u_i, (n, N, d)."""

    def __call__(self, problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, *, dtype: DTypeLike = np.float64) -> Gradient:
        """dtype : of the states, float64 or float32; sums over paths are always float64."""
        check.instance("problem", problem, Problem, "a ctrl.Problem")
        problem.check_types(policy, grid)
        require_noise(noise)
        if self.needs_diffusion:
            problem.require_path_kl()
        return _collect(self._batches(problem, policy, grid, noise, precision(dtype)), noise, policy.theta.size)

    def _batches(self, problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, dtype: Any) -> Iterator[Array]:
        """Samples, in the same pass as the paths where the form and the policy allow it, else from whole trajectories."""
        form = self.one_pass()
        chunks = None if form is None else one_pass(problem, policy, grid, noise, form, dtype)
        if chunks is None:
            return (self.samples(run) for run in runs(problem, policy, grid, noise, dtype))
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


@dataclass(frozen=True)
class LeaveOneOut:
    """The baseline b_i = mean return of the other paths of the batch (unbiased, unlike the mean that includes the path).

    With quadrature noise the other path is an independent copy, integrated out.
    Source: theory.md, section 7.   Checked: tests/test_estimators.py::test_leave_one_out_on_products_of_two_paths
    """


Baseline = float | LeaveOneOut | Callable[[int, Array], Array] | None


@dataclass(frozen=True, eq=False)
class ScoreFunction(Estimator):
    r"""Score-function gradient with the total return (REINFORCE, DDPO-SF).

        sum_i ( sigma_i (G - b_i) + (d mu_i)' e_i ),     sigma_i = (d mu_i)' h_i sqrt(D_i)/(eta g_i) xi_i,   G = r - sum cost

    baseline b : None, a number, LeaveOneOut(), or b(i, x) -> (n,) such as an exact V
    sampled_kl : the k1 form, KL in the return as lambda (u'xi + |u|^2/2) per step and no e_i
    Unbiased for the chain at every step size; eta > 0.
    Source: theory.md, section 7; Black et al. (2305.13301).   Checked: tests/test_estimators.py::test_unbiased_on_sign_patterns
    """

    baseline: Baseline = None
    sampled_kl: bool = False
    needs_diffusion = True
    to_go = False

    def __post_init__(self) -> None:
        b = self.baseline
        if isinstance(b, type):
            raise ValueError(f"baseline: expected None, a number, LeaveOneOut() or b(i, x), got the class {b.__name__}")
        if not (b is None or isinstance(b, LeaveOneOut) or callable(b)):
            object.__setattr__(self, "baseline", check.number("baseline", b))

    def returns(self, run: Run) -> Array:
        """What multiplies sigma_i before the baseline, (n, N): G at every step."""
        cost = run.sampled_cost if self.sampled_kl else run.cost
        return np.broadcast_to((run.reward - cost.sum(axis=1))[:, None], cost.shape)

    def cotangents(self, run: Run) -> Array:
        b = self.baseline
        level: Array | float = 0.0
        if callable(b):
            at = (check.returned("baseline", b(i, run.states[:, i]), (len(run.states),)) for i in range(run.grid.steps))
            level = run.coefficients.discount * np.stack(list(at), axis=1)
        elif isinstance(b, float):
            level = b
        return self._weighted(run, self.returns(run) - level)

    def one_pass(self) -> OnePass | None:
        # A subclass may have cotangents of its own, which the kernels would not see.
        if type(self) not in (ScoreFunction, RewardToGo) or isinstance(self.baseline, LeaveOneOut):
            return None
        value = _quadratic(self.baseline) if callable(self.baseline) else None
        if callable(self.baseline) and value is None:
            return None
        return OnePass(self.sampled_kl, self.to_go, NO_VALUE if value is None else BASELINE, value)

    def of_sums(self, G: Array, S: Array, P: Array) -> Array:
        return super().of_sums(G - self.baseline if isinstance(self.baseline, float) else G, S, P)

    def _weighted(self, run: Run, returns: Array) -> Array:
        u = returns[:, :, None] * run.score_noise
        return u if self.sampled_kl else u + run.kl_term

    def __call__(self, problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, *, dtype: DTypeLike = np.float64) -> Gradient:
        if not isinstance(self.baseline, LeaveOneOut):
            return super().__call__(problem, policy, grid, noise, dtype=dtype)
        problem.require_path_kl()
        mean = self._mean_returns(problem, policy, grid, noise, precision(dtype))
        return _AroundMean(self, mean, noise)(problem, policy, grid, noise, dtype=dtype)

    def _mean_returns(self, problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, dtype: Any) -> Array:
        """Mean over all paths of the returns at every step, (N,)."""
        if noise.group > 1:
            raise ValueError("noise: expected independent paths for a leave-one-out baseline, got antithetic pairs")
        if noise.weights is None and noise.paths < 2:
            raise ValueError(f"noise: expected at least 2 paths for a leave-one-out baseline, got {noise.paths}")
        w = np.full(noise.paths, 1 / noise.paths) if noise.weights is None else noise.weights
        mean, first = np.zeros(grid.steps), 0
        for run in runs(problem, policy, grid, noise, dtype):
            returns = self.returns(run)
            mean += w[first : first + len(returns)] @ returns
            first += len(returns)
        return mean


@dataclass(frozen=True, eq=False)
class _AroundMean(Estimator):
    """G - mean of the others = (G - mean of all) n/(n - 1); with quadrature noise the others are integrated out."""

    form: ScoreFunction
    mean: Array
    noise: NoiseLike

    def cotangents(self, run: Run) -> Array:
        n = self.noise.paths
        factor = 1.0 if self.noise.weights is not None else n / (n - 1)
        return self.form._weighted(run, factor * (self.form.returns(run) - self.mean))


@dataclass(frozen=True, eq=False)
class RewardToGo(ScoreFunction):
    r"""Score-function gradient with the return after step i.

        sum_i ( sigma_i (G_{i+1} - b_i) + (d mu_i)' e_i ),       G_{i+1} = r - sum_{j>i} cost_j   (j >= i in the k1 form)

    Unbiased for the chain at every step size; eta > 0. With b = V the variance drops several times.
    Source: theory.md, section 7.   Checked: tests/test_estimators.py::test_unbiased_on_sign_patterns
    """

    to_go = True

    def returns(self, run: Run) -> Array:
        cost = run.sampled_cost if self.sampled_kl else run.cost
        from_here = np.cumsum(cost[:, ::-1], axis=1)[:, ::-1]
        # The k1 cost of step i depends on xi_i, so it stays; the analytic cost of step i does not.
        return run.reward[:, None] - (from_here if self.sampled_kl else from_here - cost)


@dataclass(frozen=True, eq=False)
class TemporalDifference(Estimator):
    r"""Score function times the temporal-difference residual of a given value function.

        sum_i ( sigma_i (V_{i+1}(X_{i+1}) - V_i(X_i)) + (d mu_i)' e_i )

    value : V(i, x) -> (n,).   Unbiased for the chain with the true V; eta > 0.
    Source: theory.md, section 7; Scores as Actions (2409.08400).   Checked: tests/test_estimators.py::test_unbiased_on_sign_patterns
    """

    value: ValueFunction
    needs_diffusion = True

    def cotangents(self, run: Run) -> Array:
        v = np.stack([run.discounted(self.value, i) for i in range(run.grid.steps + 1)], axis=1)
        return np.diff(v, axis=1)[:, :, None] * run.score_noise + run.kl_term

    def one_pass(self) -> OnePass | None:
        value = _quadratic(self.value) if type(self) is TemporalDifference else None
        return None if value is None else OnePass(use=DIFFERENCE, value=value)

    def of_sums(self, G: Array, S: Array, P: Array) -> Array:
        return P


@dataclass(frozen=True, eq=False)
class ValueGradient(Estimator):
    r"""The value's gradient in the place of the score function.

        sum_i (d mu_i)' ( D_i h_i grad V_{i+1}(X_{i+1}) + e_i )

    value : V.gradient(i, x) -> (n, d).   Unbiased for the chain with the true V, at every eta.
    Source: theory.md, section 7.   Checked: tests/test_estimators.py::test_unbiased_on_sign_patterns
    """

    value: ValueFunction

    def cotangents(self, run: Run) -> Array:
        gradient = np.stack([run.discounted_gradient(self.value, i + 1) for i in range(run.grid.steps)], axis=1)
        return (run.coefficients.h * run.coefficients.dt)[:, None] * gradient + run.kl_term


@dataclass(frozen=True, eq=False)
class Pathwise(Estimator):
    r"""Differentiation through the whole chain (AlignProp, DRaFT with all steps).

        sum_i (d mu_i)' ( h_i D_i p_{i+1} + e_i ),    p_N = grad r,   p_i = (dX_{i+1}/dX_i)' p_{i+1} - d cost_i / dx

    Unbiased for the chain, at every eta; needs grad r.
    Source: theory.md, section 7.   Checked: tests/test_estimators.py::test_unbiased_on_sign_patterns
    """

    def cotangents(self, run: Run) -> Array:
        c, grid, e = run.coefficients, run.grid, run.kl_term
        out = np.empty_like(e)
        p = c.final_discount * run.problem.reward.gradient(run.states[:, -1])
        for i in reversed(range(grid.steps)):
            out[:, i] = c.h[i] * c.dt[i] * p + e[:, i]
            if i == 0:
                break
            x = run.states[:, i]
            slope = run.policy.jacobian_x(grid, i, x)
            departure = slope - run.problem.marginal(float(grid.times[i])).score_jacobian(x)
            through = c.h[i] * c.dt[i] * np.einsum("nji,nj->ni", slope, p)
            p = (1 - c.dt[i] * c.f[i]) * p + through + np.einsum("nji,nj->ni", departure, e[:, i])
        return out


@dataclass(frozen=True, eq=False)
class ActionNoise(Estimator):
    r"""Score function of the sampled actions: the policy gradient that treats the sampler as a black box.

        sum_i grad log pi(a_i | t_i, X_i) G = sum_i (d mu_i)' Sigma_i^{-1} (a_i - mu_i) G     with sampled costs in G and no e_i

    reward_to_go : G_i, the return from step i on (cost_i depends on a_i), in the place of G
    Unbiased for the objective of sampled actions, at every eta; its variance grows like N. Needs a policy with exploration.
    Source: theory.md, section 7.   Checked: tests/test_estimators.py::test_unbiased_on_sign_patterns
    """

    reward_to_go: bool = False

    def returns(self, run: Run) -> Array:
        """What multiplies the action's score, (n, N)."""
        from_here = np.cumsum(run.cost[:, ::-1], axis=1)[:, ::-1]
        return run.reward[:, None] - (from_here if self.reward_to_go else from_here[:, :1])

    def cotangents(self, run: Run) -> Array:
        factor = run.policy.exploration_factor(run.grid)
        if factor is None:
            raise ValueError("policy: expected a policy with exploration (sampled actions), got exploration=None")
        z = run.noise.actions(run.grid.steps, run.problem.dim)
        # a - mu = L z, so Sigma^{-1} (a - mu) = L'^{-1} z.
        return self.returns(run)[:, :, None] * np.einsum("kji,nkj->nki", np.linalg.inv(factor), z)


@dataclass(frozen=True, eq=False)
class FiniteDifference:
    r"""Central differences of the per-path objective on shared noise.

        ( J(theta + eps e_j) - J(theta - eps e_j) ) / (2 eps),   j = 1 ... p

    epsilon : parameter units.   Bias O(eps^2), none for a constant shift with a quadratic reward; 2p simulations.
    Source: theory.md, section 7.   Checked: tests/test_estimators.py::test_finite_difference_bias_is_second_order
    """

    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", check.number("epsilon", self.epsilon, above=0))

    def __call__(self, problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike) -> Gradient:
        p = policy.theta.size
        size = max(1, SAMPLES_LIMIT // 8 // (8 * p) // noise.group) * noise.group
        parts = (noise[first : first + size] for first in range(0, noise.paths, size))
        return _collect((self._samples(problem, policy, grid, part) for part in parts), noise, p)

    def _samples(self, problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike) -> Array:
        out = np.empty((noise.paths, policy.theta.size))
        for j in range(policy.theta.size):
            step = np.zeros(policy.theta.size)
            step[j] = self.epsilon
            up = simulate(problem, policy.with_theta(policy.theta + step), grid, noise).objective
            down = simulate(problem, policy.with_theta(policy.theta - step), grid, noise).objective
            out[:, j] = (up - down) / (2 * self.epsilon)
        return out
