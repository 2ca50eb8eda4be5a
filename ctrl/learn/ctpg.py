"""Continuous-time policy gradient with a learned V: its temporal difference or its gradient moves the policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ctrl import estimators as e
from ctrl.learn.contract import Ascent, State
from ctrl.learn.values import Critic
from ctrl.policy import Policy
from ctrl.problem import Problem


@dataclass(frozen=True)
class TemporalDifference(Ascent):
    r"""The paper's policy gradient: the score of every step times the temporal difference of the learned V.

        theta <- theta + step * 1/n sum_paths sum_i ( sigma_i (V_{i+1}(X_{i+1}) - V_i(X_i)) + (d mu_i)' e_i )

    critic : how V is learned, by the martingale loss or orthogonality      The mean step is step * grad J where V is the chain's; eta > 0.
    Source: Scores as Actions (2409.08400); theory.md, sections 5 and 7.
    Checked: tests/test_learn.py::test_unbiased_updates_are_exact_gradient_steps
    """

    step: float = 0.5
    critic: Critic = field(default_factory=Critic)

    def estimator(self, state: State, run: e.Run) -> tuple[e.Estimator, Any]:
        value, memory = self.critic.learned(state.memory, run)
        return e.TemporalDifference(value), memory


@dataclass(frozen=True)
class ValueGradient(Ascent):
    r"""The learned value's gradient in the place of the score function.

        theta <- theta + step * 1/n sum_paths sum_i (d mu_i)'( D_i h_i grad V_{i+1}(X_{i+1}) + e_i ),      V_N = r

    critic : how V is learned      The mean step is step * grad J where V is the chain's; every eta; needs grad r for its last step.
    Source: Scores as Actions (2409.08400); theory.md, sections 5 and 7.
    Checked: tests/test_learn.py::test_unbiased_updates_are_exact_gradient_steps
    """

    step: float = 0.5
    critic: Critic = field(default_factory=Critic)

    def require(self, problem: Problem, policy: Policy) -> None:
        """Nothing: every eta."""

    def estimator(self, state: State, run: e.Run) -> tuple[e.Estimator, Any]:
        value, memory = self.critic.learned(state.memory, run)
        return e.ValueGradient(value), memory
