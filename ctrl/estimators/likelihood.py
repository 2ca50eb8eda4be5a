"""Score-function forms: the likelihood of each step times a return (theory.md, section 7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ctrl import check
from ctrl.check import Array
from ctrl.estimators.contract import UNBIASED, Bias, Claim, Estimator, Need, Run, ValueFunction, runs
from ctrl.kernels.gradient import BASELINE, DIFFERENCE, NO_VALUE
from ctrl.noise import NoiseLike
from ctrl.policy import Policy
from ctrl.problem import Problem
from ctrl.rollout import OnePass
from ctrl.schedule import TimeGrid


def _quadratic(value: Any) -> tuple[Array, Array, Array] | None:
    """S, w, z of a value that is known to be -1/2 x'S_i x + w_i'x + z_i (the exact one of an affine-Gaussian chain), else None."""
    return getattr(value, "quadratic", None)


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
    needs = frozenset({Need.DIFFUSION})
    to_go = False

    @property
    def claim(self) -> Claim:
        return UNBIASED

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

    def _weighted(self, run: Run, advantages: Array) -> Array:
        """u_i from what multiplies sigma_i after the baseline, (n, N)."""
        u = advantages[:, :, None] * run.score_noise
        return u if self.sampled_kl else u + run.kl_term

    def prepared(self, batch: Callable[[], Iterator[Run]], noise: NoiseLike) -> Estimator:
        """Mean returns over all paths at every step, where the baseline is made of them."""
        if not isinstance(self.baseline, LeaveOneOut):
            return self
        require_independent(noise, "a leave-one-out baseline")
        n, mean, first = noise.paths, np.zeros(()), 0
        w = np.full(n, 1 / n) if noise.weights is None else noise.weights
        for run in batch():
            returns = self.returns(run)
            mean = mean + w[first : first + len(returns)] @ returns
            first += len(returns)
        return _AroundMean(self, mean, 1.0 if noise.weights is not None else n / (n - 1))


def require_independent(noise: NoiseLike, what: str) -> None:
    """ValueError unless the noise is a quadrature rule or at least two independent paths."""
    if noise.group > 1:
        raise ValueError(f"noise: expected independent paths for {what}, got groups of {noise.group} (antithetic pairs, replicates)")
    if noise.weights is None and noise.paths < 2:
        raise ValueError(f"noise: expected at least 2 paths for {what}, got {noise.paths}")


@dataclass(frozen=True, eq=False)
class _AroundMean(Estimator):
    """G - mean of the others = (G - mean of all) n/(n - 1); with quadrature noise the others are integrated out."""

    form: ScoreFunction
    mean: Array
    factor: float

    def sampler(self, policy: Policy) -> Policy | None:
        return self.form.sampler(policy)

    def cotangents(self, run: Run) -> Array:
        return self.form._weighted(run, self.factor * (self.form.returns(run) - self.mean))


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
    claim = replace(UNBIASED, note="with the true V")
    needs = frozenset({Need.DIFFUSION, Need.VALUE})

    def cotangents(self, run: Run) -> Array:
        v = np.stack([run.discounted(self.value, i) for i in range(run.grid.steps + 1)], axis=1)
        return np.diff(v, axis=1)[:, :, None] * run.score_noise + run.kl_term

    def one_pass(self) -> OnePass | None:
        value = _quadratic(self.value) if type(self) is TemporalDifference else None
        return None if value is None else OnePass(use=DIFFERENCE, value=value)

    def of_sums(self, G: Array, S: Array, P: Array) -> Array:
        return P


@dataclass(frozen=True, eq=False)
class Score(Estimator):
    r"""The score of the whole path, S = sum_i sigma_i = grad log p: mean zero, covariance the Fisher information of the path.

    Source: theory.md, sections 7 and 8.   Checked: tests/test_estimators_reshaped.py::test_fisher_is_the_covariance_of_the_score
    """

    claim = Claim(Bias.NONE, of="0")
    needs = frozenset({Need.DIFFUSION})

    def cotangents(self, run: Run) -> Array:
        return run.score_noise


def best_constant(problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, form: ScoreFunction | None = None) -> float:
    r"""The constant baseline of least total variance, a number for `ScoreFunction(baseline=...)` or `RewardToGo(baseline=...)`.

        b = E[S'F] / E[S'S],      S = sum_i sigma_i,   F the sample without a baseline;      tr Cov(F - b S) is least there

    noise : of another batch, or a quadrature rule (exact with 4 Gauss-Hermite nodes), so that the baseline stays independent of the paths
    form : whose baseline it is, ScoreFunction() if not given; one that couples no paths
    Source: theory.md, section 7.   Checked: tests/test_estimators_likelihood.py::test_best_constant_is_the_vertex_of_the_variance
    """
    form, along, square, first = ScoreFunction() if form is None else form, 0.0, 0.0, 0
    form.require(problem, policy)
    for run in runs(problem, policy, grid, noise):
        S, F = Score().samples(run), form.samples(run)
        w = np.full(len(S), 1 / noise.paths) if noise.weights is None else noise.weights[first : first + len(S)]
        first += len(S)
        along, square = along + float(w @ np.sum(S * F, axis=1)), square + float(w @ np.sum(S * S, axis=1))
    return along / square


@dataclass(frozen=True, eq=False)
class LogVariance(ScoreFunction):
    r"""Log-variance (VarGrad, trajectory balance): the variance of r/lambda - log dP_theta/dP_pre, zero at Doob's optimum.

        -lambda d/dtheta 1/2 Var_n( r/lambda - k1 ) = 1/n sum_paths sum_i sigma_i ( r - lambda k1 - mean of the others ),      Var_n over n - 1

    theta_old (p,) : of the policy that draws the paths; k1 and sigma are those of theta, the variance is under its law
    At theta itself it is the score function with k1 in the return and the leave-one-out baseline: unbiased. Under another law it is the
    gradient of another loss. Paths are coupled; kl_weight > 0, eta > 0.
    Source: Richter et al. (2010.10436); theory.md, section 7.
    Checked: tests/test_estimators_likelihood.py::test_log_variance_is_a_gradient_of_the_sample_variance
    """

    baseline: Baseline = field(default_factory=LeaveOneOut, init=False)
    sampled_kl: bool = field(default=True, init=False)
    theta_old: ArrayLike | None = None
    needs = frozenset({Need.DIFFUSION, Need.KL_WEIGHT, Need.BATCH})

    @property
    def claim(self) -> Claim:
        return UNBIASED if self.theta_old is None else Claim(Bias.PRESENT, note="the variance under the law of theta_old")

    def sampler(self, policy: Policy) -> Policy | None:
        return None if self.theta_old is None else policy.with_theta(self.theta_old)

    def returns(self, run: Run) -> Array:
        moved = run.problem.kl_weight * run.coefficients.discount * run.log_ratio
        return super().returns(run) - moved.sum(axis=1)[:, None]
