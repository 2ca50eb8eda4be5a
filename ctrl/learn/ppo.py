"""DDPO-IS, PPO: the clipped ratio of every step, for several epochs on the same paths."""

from __future__ import annotations

from dataclasses import dataclass

from ctrl import estimators as e
from ctrl.learn.contract import SimpleAscent


@dataclass(frozen=True)
class PPO(SimpleAscent):
    r"""Clipped ratios of every step against the policy that drew the paths, the KL as a term of its own.

        grad sum_i min( rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i ) - cost_i,
        rho_i = p_theta/p_old (X_{i+1}|X_i),   A_i = G_{i+1} - mean of the others

    epochs : updates on the same paths; in the first rho = 1, and it is the score function with reward-to-go      eta > 0
    Source: Schulman et al. (1707.06347); Black et al. (2305.13301); theory.md, section 7.
    Checked: tests/test_learn.py::test_the_first_epoch_of_ppo_is_the_score_function
    """

    step: float = 0.25
    epochs: int = 2
    clip: float | None = 0.2

    def form(self) -> e.Estimator:
        return e.ClippedRatio(clip=self.clip)
