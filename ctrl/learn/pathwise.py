"""Pathwise gradients: the reward's gradient through the whole chain (AlignProp, DRaFT), or through its last steps (DRaFT-K)."""

from __future__ import annotations

from dataclasses import dataclass

from ctrl import estimators as e
from ctrl.learn.contract import SimpleAscent


@dataclass(frozen=True)
class Pathwise(SimpleAscent):
    r"""Gradient ascent along the reward's gradient, carried back through every step of the chain.

        theta <- theta + step * 1/n sum_paths sum_i (d mu_i)'( h_i D_i p_{i+1} + e_i ),   p_N = grad r,   p_i = (dX_{i+1}/dX_i)' p_{i+1} - d cost_i/dx

    last K : only the policy calls of the last K steps (DRaFT-K): biased; None for all of them      Every eta; needs grad r.
    Source: Clark et al. (2309.17400); theory.md, section 7.
    Checked: tests/test_learn.py::test_unbiased_updates_are_exact_gradient_steps
    """

    step: float = 0.5
    last: int | None = None
    backward = 2  # the policy's, into theta and x at once, and the score's

    def form(self) -> e.Estimator:
        return e.Pathwise(self.last)
