"""Reward-weighted regression: maximum likelihood on paths weighted by their reward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctrl import estimators as e
from ctrl.learn.contract import Algorithm, State, ascended, mean, spent, weights
from ctrl.learn.values import least_squares
from ctrl.noise import NoiseLike
from ctrl.policy import Policy
from ctrl.problem import Problem


@dataclass(frozen=True)
class RewardWeighted(Algorithm):
    r"""A share of the way to the weighted maximum-likelihood policy, by least squares for policies linear in theta.

        theta <- theta + step F_w^{-1} g_w,    g_w = 1/n sum w sum_i sigma_i,   F_w = 1/n sum w sum_i 2 kappa_i D_i (d mu_i)'(d mu_i),
        w = n e^{r/lambda - k1} / sum e^{r/lambda - k1}

    step : 1 is the whole maximisation, as published      anchored : weights of the tilted path law; False drops k1, as published
    Its fixed point minimises KL(P* || P_theta) with P* ~ P_pre e^{r/lambda}, Doob's law: not a maximum of J, unless the class holds P*.
    The weights' own noise is O(1/effective sample size). kl_weight > 0, eta > 0.
    Source: Peters and Schaal (2007); Lee et al. (2302.12192); theory.md, section 9.
    Checked: tests/test_learn.py::test_reward_weighted_regression_lands_on_the_tilt_at_once
    """

    step: float = 0.1
    anchored: bool = True
    backward = 1

    def require(self, problem: Problem, policy: Policy) -> None:
        super().require(problem, policy)
        e.RewardWeighted(self.anchored).require(problem, policy)

    def update(self, state: State, noise: NoiseLike) -> State:
        run, form = state.sample(noise), e.RewardWeighted(self.anchored)
        logits = form.logits(run)
        w = weights(noise) * np.exp(logits - logits.max())
        w /= w.sum()
        d = least_squares(e.weighted_information(run, w), mean(form, run))
        return state.moved(ascended(state.policy, self.step * d), None, spent(run, self.backward + run.problem.dim))
