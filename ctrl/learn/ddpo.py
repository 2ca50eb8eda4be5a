"""DDPO-SF: the score function of the chain, REINFORCE with the other paths' mean as baseline; and as its code was published."""

from __future__ import annotations

from dataclasses import dataclass, field

from ctrl import estimators as e
from ctrl.learn.contract import SimpleAscent


@dataclass(frozen=True)
class ScoreFunction(SimpleAscent):
    r"""DDPO-SF: gradient ascent along the likelihood of whole paths times their return.

        theta <- theta + step * 1/n sum_paths sum_i ( sigma_i (G - mean of the others) + (d mu_i)' e_i )

    baseline : None, a number, LeaveOneOut(), or b(i, x)      The mean step is step * grad J at every step size D; eta > 0.
    Source: Black et al. (2305.13301); theory.md, sections 7 and 15.
    Checked: tests/test_learn.py::test_unbiased_updates_are_exact_gradient_steps
    """

    step: float = 0.25
    baseline: e.LeaveOneOut | float | None = field(default_factory=e.LeaveOneOut)

    def form(self) -> e.Estimator:
        return e.ScoreFunction(self.baseline)


@dataclass(frozen=True)
class DDPO(SimpleAscent):
    r"""DDPO as published: rewards standardised over the batch, log-densities averaged over dimensions, clipped ratios, no KL.

        theta <- theta + step * 1/n sum_paths sum_i grad min( rho_i A, clip(rho_i) A ),   A = (r - mean r)/std r,   rho_i = (p_theta/p_old)^{1/d}

    epochs : updates on the same paths      Without a KL it climbs E r, past the maximum of J; eta > 0.
    Source: Black et al. (2305.13301) and its published code; theory.md, section 7.
    Checked: tests/test_learn.py::test_without_a_kl_the_reward_rises_and_the_objective_falls
    """

    step: float = 0.03
    epochs: int = 1
    clip: float | None = 1e-4

    def form(self) -> e.Estimator:
        return e.DDPO(clip=self.clip)
