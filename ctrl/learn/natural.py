"""Natural gradient: steepest ascent per nat of path KL, in a trust region of nats if one is given."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ctrl import check
from ctrl import estimators as e
from ctrl.learn.contract import Algorithm, State, ascended, mean, spent, weights
from ctrl.noise import NoiseLike


@dataclass(frozen=True)
class NaturalGradient(Algorithm):
    r"""The score function's gradient g, turned by the Fisher information of the path: KL(P_theta || P_{theta + d}) = 1/2 d'F d.

        d = step F^{-1} g,   shortened to 1/2 d'F d = nats where it is longer

    nats : radius of the trust region in path KL, None for none      damping : share of tr F / p added to F's diagonal
    F and g from the same paths. At step = 1 with exact F it is Newton's method on the path KL of policies linear in theta. eta > 0.
    Source: Kakade (2001); Schulman et al. (1502.05477); theory.md, section 8.
    Checked: tests/test_learn.py::test_natural_steps_are_in_nats
    """

    step: float = 0.1
    nats: float | None = 0.1
    damping: float = 0.0
    backward = 1

    def update(self, state: State, noise: NoiseLike) -> State:
        run = state.sample(noise)
        F = e.weighted_information(run, weights(noise))
        F[np.diag_indices(len(F))] += self.damping * np.trace(F) / len(F)
        d = self.step * np.linalg.solve(F, mean(e.RewardToGo(e.LeaveOneOut()), run))
        kl = 0.5 * float(d @ F @ d)
        if self.nats is not None and kl > check.number("nats", self.nats, above=0):
            d *= math.sqrt(self.nats / kl)
        # F asks for one pull-back per coordinate of the action.
        return state.moved(ascended(state.policy, d), None, spent(run, self.backward + run.problem.dim))
