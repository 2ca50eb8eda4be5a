"""Score functions of sampled actions: the sampler as a black box, and advantages of single actions (theory.md, sections 6 and 7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ctrl import check
from ctrl.check import Array
from ctrl.estimators.contract import UNBIASED, Estimator, Need, Run


def action_score(run: Run) -> Array:
    """Sigma_i^{-1} (a_i - mu_i), (n, N, d): grad log pi(a_i | t_i, X_i) = (d mu_i)' of it.

    Source: theory.md, section 7.   Checked: tests/test_estimators.py::test_unbiased_with_sampled_actions
    """
    factor = run.policy.exploration_factor(run.grid)
    if factor is None:
        raise ValueError("policy: expected a policy with exploration (sampled actions), got exploration=None")
    # a - mu = L z, so Sigma^{-1} (a - mu) = L'^{-1} z.
    return np.einsum("kji,nkj->nki", np.linalg.inv(factor), run.noise.actions(run.grid.steps, run.problem.dim))


@dataclass(frozen=True, eq=False)
class ActionNoise(Estimator):
    r"""Score function of the sampled actions: the policy gradient that treats the sampler as a black box.

        sum_i grad log pi(a_i | t_i, X_i) G = sum_i (d mu_i)' Sigma_i^{-1} (a_i - mu_i) G     with sampled costs in G and no e_i

    reward_to_go : G_i, the return from step i on (cost_i depends on a_i), in the place of G
    Unbiased for the objective of sampled actions, at every eta; its variance grows like N. Needs a policy with exploration.
    Source: theory.md, section 7.   Checked: tests/test_estimators.py::test_unbiased_on_sign_patterns
    """

    reward_to_go: bool = False
    claim = replace(UNBIASED, of="grad J of sampled actions")
    needs = frozenset({Need.EXPLORATION})

    def returns(self, run: Run) -> Array:
        """What multiplies the action's score, (n, N)."""
        from_here = np.cumsum(run.cost[:, ::-1], axis=1)[:, ::-1]
        return run.reward[:, None] - (from_here if self.reward_to_go else from_here[:, :1])

    def cotangents(self, run: Run) -> Array:
        return self.returns(run)[:, :, None] * action_score(run)


@dataclass(frozen=True, eq=False)
class ActionAdvantage(Estimator):
    r"""Score function of the sampled actions times an advantage rate: the actor of an actor-critic, the q form before its average over actions.

        sum_i D_i grad log pi(a_i | t_i, X_i) A(i, X_i, a_i) = sum_i D_i (d mu_i)' Sigma_i^{-1} (a_i - mu_i) A(i, X_i, a_i)

    advantage : A(i, x, a) -> (n,), reward units per time, as of step i (it is discounted here)
    With the chain's A = (Q_i - V_i)/D_i of sampled actions unbiased for their objective; with the rate q of continuous time off by O(D).
    No e_i: the price of an action is in A. Every eta; needs a policy with exploration.
    Source: theory.md, sections 6 and 7; Jia and Zhou, q-learning in continuous time.
    Checked: tests/test_estimators_adjoint.py::test_action_advantages_of_the_chain_are_unbiased
    """

    advantage: Callable[[int, Array, Array], Array]
    claim = replace(UNBIASED, of="grad J of sampled actions", note="with A = (Q_i - V_i)/D_i of the chain; O(D) with q")
    needs = frozenset({Need.EXPLORATION, Need.ADVANTAGE})

    def cotangents(self, run: Run) -> Array:
        c, actions = run.coefficients, run.actions
        at = [check.returned("advantage", self.advantage(i, x, actions[:, i]), (len(x),)) for i, x in enumerate(run.left)]
        return (c.discount * c.dt * np.stack(at, axis=1))[:, :, None] * action_score(run)
