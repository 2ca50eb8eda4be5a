"""Likelihood ratios: paths of an old policy, or weights of a tilted law (theory.md, sections 7 to 9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from ctrl import check
from ctrl.check import Array
from ctrl.estimators.contract import UNBIASED, Bias, Claim, Estimator, Need, Run
from ctrl.estimators.likelihood import Baseline, LeaveOneOut, RewardToGo, require_independent
from ctrl.noise import NoiseLike
from ctrl.policy import Policy


def _clipped(ratio: Array, advantage: Array, clip: float | None) -> Array:
    """ratio times advantage where min(ratio A, clip(ratio) A) still has a slope, else 0."""
    if clip is None:
        return ratio * advantage
    free = np.where(advantage >= 0, ratio <= 1 + clip, ratio >= 1 - clip)
    return np.where(free, ratio * advantage, 0.0)


@dataclass(frozen=True, eq=False)
class ClippedRatio(RewardToGo):
    r"""The clipped ratio of every step (PPO, DDPO-IS), with the analytic KL as its own term.

        sum_i grad min( rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i ) + (d mu_i)' e_i,
        rho_i = p_theta/p_old (X_{i+1}|X_i),      A_i = G_{i+1} - b_i

    theta_old (p,) : of the policy that draws the paths; None: theta itself      clip : None for no clipping
    At theta_old unbiased. Away from it biased even without clipping, as the states stay those of the old policy: the mean is then the gradient
    of the local surrogate (section 8) exactly; clipping comes on top. sampled_kl: k1 of the old policy in the return and no e_i. eta > 0.
    Source: Schulman et al. (1707.06347); Black et al. (2305.13301); theory.md, sections 7 and 8.
    Checked: tests/test_estimators_ratio.py::test_the_ratio_is_the_surrogates_gradient_and_clipping_comes_on_top
    """

    baseline: Baseline = field(default_factory=LeaveOneOut)
    theta_old: ArrayLike | None = None
    clip: float | None = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is not None:
            check.number("clip", self.clip, above=0)

    @property
    def claim(self) -> Claim:
        if self.theta_old is None:
            return UNBIASED
        return Claim(Bias.PRESENT, note="states of theta_old" + ("" if self.clip is None else ", and clipping"))

    def sampler(self, policy: Policy) -> Policy | None:
        return None if self.theta_old is None else policy.with_theta(self.theta_old)

    def _weighted(self, run: Run, advantages: Array) -> Array:
        return super()._weighted(run, _clipped(np.exp(run.log_ratio), advantages, self.clip))


@dataclass(frozen=True, eq=False)
class DDPO(Estimator):
    r"""DDPO as published: rewards standardised over the batch, log-densities averaged over dimensions, no KL.

        sum_i grad min( rho_i A, clip(rho_i) A ),     rho_i = (p_theta/p_old (X_{i+1}|X_i))^{1/d},      A = (r - mean r)/(std r + 1e-8)

    batch n : so many consecutive paths share mean and (population) std; None: all paths do      theta_old, clip : as in ClippedRatio
    Biased: at theta_old its mean is grad E r / (d std r), to O(1/n); for jointly Gaussian reward and score, E_n = c_n times that with
    c_n = sqrt(2/n) Gamma(n/2)/Gamma((n-1)/2) = 1 - 3/(4n) + ..., .564 for pairs. Standard errors are those of batches, or, with one batch of
    all paths, of paths as if mean and std were known. eta > 0.
    Source: Black et al. (2305.13301) and its published code; theory.md, section 7.
    Checked: tests/test_estimators_ratio.py::test_ddpo_is_the_reward_gradient_over_d_std_in_large_batches
    """

    batch: int | None = None
    theta_old: ArrayLike | None = None
    clip: float | None = 1e-4
    needs = frozenset({Need.DIFFUSION, Need.BATCH})

    def __post_init__(self) -> None:
        if self.clip is not None:
            check.number("clip", self.clip, above=0)
        if self.batch is not None:
            check.integer("batch", self.batch, at_least=2)

    @property
    def claim(self) -> Claim:
        return Claim(Bias.PRESENT, note="grad E r / (d std r) in large batches; no KL" + ("" if self.theta_old is None else "; states of theta_old"))

    def sampler(self, policy: Policy) -> Policy | None:
        return None if self.theta_old is None else policy.with_theta(self.theta_old)

    def unit(self, noise: NoiseLike) -> int | None:
        if self.batch is None:
            return None
        if noise.weights is not None or noise.paths % self.batch or self.batch % noise.group:
            kind = "a quadrature rule" if noise.weights is not None else f"{noise.paths} paths in groups of {noise.group}"
            raise ValueError(f"noise: expected random paths in whole batches of {self.batch}, got {kind}")
        return self.batch

    def prepared(self, batch: Callable[[], Iterator[Run]], noise: NoiseLike) -> Estimator:
        if self.batch is not None:
            return self
        require_independent(noise, "DDPO's batch statistics")
        r = np.concatenate([run.reward for run in batch()])
        mean = float(np.average(r, weights=noise.weights))
        return _Standardised(self, mean, math.sqrt(float(np.average((r - mean) ** 2, weights=noise.weights))))

    def cotangents(self, run: Run) -> Array:
        r = run.reward.reshape(-1, self.batch or len(run.reward))
        return self._of(run, ((r - r.mean(axis=1, keepdims=True)) / (r.std(axis=1, keepdims=True) + 1e-8)).ravel())

    def _of(self, run: Run, advantage: Array) -> Array:
        ratio = np.exp(run.log_ratio / run.problem.dim)
        return _clipped(ratio, advantage[:, None], self.clip)[:, :, None] * run.score_noise / run.problem.dim


@dataclass(frozen=True, eq=False)
class _Standardised(Estimator):
    """DDPO with the batch's mean and std as numbers."""

    form: DDPO
    mean: float
    std: float

    def sampler(self, policy: Policy) -> Policy | None:
        return self.form.sampler(policy)

    def cotangents(self, run: Run) -> Array:
        return self.form._of(run, (run.reward - self.mean) / (self.std + 1e-8))


@dataclass(frozen=True, eq=False)
class RewardWeighted(Estimator):
    r"""Reward-weighted regression: the direction of maximum likelihood on paths weighted by their reward.

        w sum_i sigma_i,      w = n e^{r/lambda - k1} / sum e^{r/lambda - k1}

    anchored : the weights of the tilted path law P* ~ P_pre e^{r/lambda}; False drops k1, as published: weights of P_old e^{r/lambda}
    theta_old (p,) : of the policy that draws the paths (k1 is its log-ratio); the mean does not depend on it where anchored
    Not grad J: its mean is -grad KL(P* || P_theta), up to O(1/n) of the batch's own normalisation. Standard errors as if the norm were
    known. kl_weight > 0, eta > 0.
    Source: Peters and Schaal (2007); Lee et al. (2302.12192); theory.md, sections 7 and 9.
    Checked: tests/test_estimators_ratio.py::test_reward_weighted_direction_is_that_of_the_tilted_law
    """

    anchored: bool = True
    theta_old: ArrayLike | None = None
    needs = frozenset({Need.DIFFUSION, Need.KL_WEIGHT, Need.BATCH})

    @property
    def claim(self) -> Claim:
        return Claim(Bias.PRESENT, note="-grad KL(P* || P_theta) in large batches" if self.anchored else "-grad KL(P_old e^{r/lambda} || P_theta)")

    def sampler(self, policy: Policy) -> Policy | None:
        return None if self.theta_old is None else policy.with_theta(self.theta_old)

    def logits(self, run: Run) -> Array:
        """r/lambda - k1, (n,)."""
        return run.reward / run.problem.kl_weight - (run.k1.sum(axis=1) if self.anchored else 0.0)

    def prepared(self, batch: Callable[[], Iterator[Run]], noise: NoiseLike) -> Estimator:
        require_independent(noise, "self-normalised weights")
        logits = np.concatenate([self.logits(run) for run in batch()])
        top = float(logits.max())
        return _Normalised(self, top + math.log(float(np.average(np.exp(logits - top), weights=noise.weights))))

    def cotangents(self, run: Run) -> Array:
        logits = self.logits(run)
        return self._of(run, float(logits.max() + np.log(np.mean(np.exp(logits - logits.max())))))

    def _of(self, run: Run, log_mean: float) -> Array:
        return np.exp(self.logits(run) - log_mean)[:, None, None] * run.score_noise


@dataclass(frozen=True, eq=False)
class _Normalised(Estimator):
    """Reward-weighted regression with the batch's norm as a number."""

    form: RewardWeighted
    log_mean: float

    def sampler(self, policy: Policy) -> Policy | None:
        return self.form.sampler(policy)

    def cotangents(self, run: Run) -> Array:
        return self.form._of(run, self.log_mean)
