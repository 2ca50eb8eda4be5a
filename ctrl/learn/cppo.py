"""CPPO: the local surrogate less an adaptive penalty on the square root of the KL between policies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from ctrl import check
from ctrl import estimators as e
from ctrl.check import Array
from ctrl.learn.contract import Algorithm, State, ascended, mean, spent, weights
from ctrl.learn.values import Critic, Moments
from ctrl.noise import NoiseLike


class Memory(NamedTuple):
    """The penalty's weight C, and what the critic has seen."""

    penalty: float
    critic: Moments | None


def moved_nats(run: e.Run) -> float:
    """KL(P_old || P_theta) on paths of the old policy, sum_i |c_i (mu - mu_old)|^2 / 2 in the mean."""
    return 0.5 * float(weights(run.noise) @ np.sum(run.ahead**2, axis=(1, 2)))


@dataclass(frozen=True, eq=False)
class Penalised(e.Estimator):
    r"""The gradient of the surrogate and of -C sqrt(KL): rho_i (V_{i+1} - V_i) sigma_i + (d mu_i)' e_i - C grad KL / (2 sqrt(KL))."""

    value: e.ValueFunction
    penalty: float

    def cotangents(self, run: e.Run) -> Array:
        v = np.stack([run.discounted(self.value, i) for i in range(run.grid.steps + 1)], axis=1)
        u = (np.exp(run.log_ratio) * np.diff(v, axis=1))[:, :, None] * run.score_noise + run.kl_term
        kl = moved_nats(run)
        # At the old policy the root has a kink; 0 is one of its slopes.
        return u if kl == 0 else u - self.penalty / (2 * math.sqrt(kl)) * run.gain[:, None] * run.ahead


@dataclass(frozen=True)
class CPPO(Algorithm):
    r"""Several steps up the penalised surrogate on the same paths; the penalty doubles where the policy went too far, halves where not far enough.

        L(theta) - C sqrt( KL(P_old || P_theta) ),     C <- 2 C where sqrt(KL) > 1.5 radius,   C/2 where sqrt(KL) < radius/1.5

    L : the local surrogate of section 8, sum_i rho_i (V_{i+1}(X_{i+1}) - V_i(X_i)) - cost_i on paths of the old policy      radius : sqrt(nats)
    penalty : C at the start      critic : how V is learned      eta > 0
    Source: Zhao, Tang and Yao (2305.18901); theory.md, sections 8 and 15.
    Checked: tests/test_learn.py::test_the_penalty_of_cppo_answers_a_step_that_is_too_large
    """

    step: float = 0.25
    epochs: int = 4
    radius: float = 0.3
    penalty: float = 0.1
    critic: Critic = field(default_factory=Critic)

    def remembered(self) -> Memory:
        return Memory(check.number("penalty", self.penalty, above=0), None)

    def update(self, state: State, noise: NoiseLike) -> State:
        run, policy = state.sample(noise), state.policy
        value, seen = self.critic.learned(state.memory.critic, run)
        form = Penalised(value, state.memory.penalty)
        for epoch in range(self.epochs):
            policy = ascended(policy, self.step * mean(form, run if epoch == 0 else replace(run, policy=policy, sampler=state.policy)))
        gone = math.sqrt(moved_nats(replace(run, policy=policy, sampler=state.policy)))
        factor = 2.0 if gone > 1.5 * self.radius else 0.5 if gone < self.radius / 1.5 else 1.0
        return state.moved(policy, Memory(factor * form.penalty, seen), spent(run, self.epochs, again=self.epochs))
