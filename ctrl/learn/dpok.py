"""DPOK: policy gradient with a learned value as baseline, and a KL to the pre-trained model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ctrl import estimators as e
from ctrl.check import Array
from ctrl.learn.contract import Ascent, State
from ctrl.learn.values import Critic


@dataclass(frozen=True, eq=False)
class RewardRatio(e.ClippedRatio):
    """The clipped ratio with A_i = r - V_i, V the expected reward: what is left when the KL is a loss on detached states."""

    def returns(self, run: e.Run) -> Array:
        return np.broadcast_to(run.reward[:, None], run.cost.shape)


@dataclass(frozen=True)
class DPOK(Ascent):
    r"""Score function of the reward and the step-wise KL, the learned value as baseline, clipped where epochs reuse paths.

        grad sum_i min( rho_i A_i, clip(rho_i) A_i ) - cost_i,       A_i = G_{i+1} - V_i(X_i)

    kl_in_return : False is DPOK as published, A_i = r - V_i with V the expected reward and the KL a loss on detached states: it does not see
                   what the policy does to the states where the KL is paid, and stops elsewhere
    eta > 0.
    Source: Fan et al. (2305.16381); theory.md, section 7.   Checked: tests/test_learn.py::test_dpok_as_published_stops_elsewhere
    """

    step: float = 0.5
    epochs: int = 1
    clip: float | None = 0.2
    kl_in_return: bool = True
    critic: Critic = field(default_factory=Critic)

    def estimator(self, state: State, run: e.Run) -> tuple[e.Estimator, Any]:
        value, memory = self.critic.learned(state.memory, run, None if self.kl_in_return else np.zeros_like(run.cost))
        form = e.ClippedRatio if self.kl_in_return else RewardRatio
        return form(baseline=value, clip=self.clip), memory
