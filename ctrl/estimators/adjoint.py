"""Gradients through the state: of a value, or of the reward carried back along the chain (theory.md, section 7)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ctrl import check
from ctrl.check import Array
from ctrl.estimators.contract import UNBIASED, Bias, Claim, Estimator, Need, Run, ValueFunction


@dataclass(frozen=True, eq=False)
class ValueGradient(Estimator):
    r"""The value's gradient in the place of the score function.

        sum_i (d mu_i)' ( D_i h_i grad V_{i+1}(X_{i+1}) + e_i )

    value : V.gradient(i, x) -> (n, d).   Unbiased for the chain with the true V, at every eta.
    Source: theory.md, section 7.   Checked: tests/test_estimators.py::test_unbiased_on_sign_patterns
    """

    value: ValueFunction
    claim = replace(UNBIASED, note="with the true V")
    needs = frozenset({Need.VALUE_GRADIENT})

    def cotangents(self, run: Run) -> Array:
        gradient = np.stack([run.discounted_gradient(self.value, i + 1) for i in range(run.grid.steps)], axis=1)
        return (run.coefficients.h * run.coefficients.dt)[:, None] * gradient + run.kl_term


@dataclass(frozen=True, eq=False)
class QForm(Estimator):
    r"""The policy gradient of continuous time with its integral as a left-point sum; the average over actions is taken in closed form.

        sum_i D_i E_{a~pi}[ grad log pi(a | t_i, X_i) q(t_i, X_i, a) ] = sum_i (d mu_i)' ( D_i h_i grad V_i(X_i) + e_i ),      whatever Sigma

    value : V.gradient(i, x) -> (n, d).   With the true V the bias is O(D): `ValueGradient` has V_{i+1}(X_{i+1}) in its place. Every eta.
    Source: Scores as Actions (2409.08400); theory.md, sections 6 and 7.
    Checked: tests/test_estimators_adjoint.py::test_q_form_is_first_order
    """

    value: ValueFunction
    claim = Claim(Bias.ORDER_D, note="with the true V")
    needs = frozenset({Need.VALUE_GRADIENT})

    def cotangents(self, run: Run) -> Array:
        gradient = np.stack([run.discounted_gradient(self.value, i) for i in range(run.grid.steps)], axis=1)
        return (run.coefficients.h * run.coefficients.dt)[:, None] * gradient + run.kl_term


@dataclass(frozen=True, eq=False)
class Pathwise(Estimator):
    r"""Differentiation through the whole chain (AlignProp, DRaFT), or through its last K steps (DRaFT-K).

        sum_i (d mu_i)' ( h_i D_i p_{i+1} + e_i ),    p_N = grad r,   p_i = (dX_{i+1}/dX_i)' p_{i+1} - d cost_i / dx

    last K : only the policy calls of the last K steps, with their e_i: biased; None (or K >= N) for all steps: unbiased for the chain
    Every eta; needs grad r.
    Source: Clark et al. (2309.17400); theory.md, section 7.
    Checked: tests/test_estimators.py::test_unbiased_on_sign_patterns, tests/test_estimators_adjoint.py::test_truncated_pathwise_lacks_the_early_steps
    """

    last: int | None = None
    needs = frozenset({Need.REWARD_GRADIENT})

    def __post_init__(self) -> None:
        if self.last is not None:
            check.integer("last", self.last, at_least=1)

    @property
    def claim(self) -> Claim:
        return UNBIASED if self.last is None else Claim(Bias.PRESENT, note=f"without the first N - {self.last} steps")

    def cotangents(self, run: Run) -> Array:
        c, e = run.coefficients, run.kl_term
        out, first = np.zeros_like(e), max(run.grid.steps - (self.last or run.grid.steps), 0)
        for i, p in _costates(run, first):
            out[:, i] = c.h[i] * c.dt[i] * p + e[:, i]
        return out


def _costates(run: Run, first: int) -> Iterator[tuple[int, Array]]:
    """(i, p_{i+1}) for i = N - 1 ... first: grad r pulled back through the chain, less the running cost's gradient."""
    c, grid, e = run.coefficients, run.grid, run.kl_term
    p = c.final_discount * run.problem.reward.gradient(run.states[:, -1])
    for i in range(grid.steps - 1, first - 1, -1):
        yield i, p
        if i > first:
            x = run.states[:, i]
            slope = run.policy.jacobian_x(grid, i, x)
            departure = slope - run.problem.marginal(float(grid.times[i])).score_jacobian(x)
            p = _through(run, i, slope, p) + np.einsum("nji,nj->ni", departure, e[:, i])


def _through(run: Run, i: int, slope: Array, p: Array) -> Array:
    """(I + D_i(-f_i I + h_i slope))' p, (n, d)."""
    c = run.coefficients
    return (1 - c.dt[i] * c.f[i]) * p + c.h[i] * c.dt[i] * np.einsum("nji,nj->ni", slope, p)


@dataclass(frozen=True, eq=False)
class AdjointMatching(Estimator):
    r"""The lean adjoint: the reward's gradient carried back by the *pre-trained* chain, without what the running cost owes to x.

        sum_i (d mu_i)' ( h_i D_i p_{i+1} + e_i ),    p_N = grad r,   p_i = (I + D_i(-f_i I + h_i ds_i/dx))' p_{i+1}

    the gradient of Adjoint Matching's regression -sum_i lambda kappa_i D_i |mu_i - s_i - h_i p_{i+1}/(2 lambda kappa_i)|^2 in mu.
    Not grad J, except where mu - s does not depend on x (a constant shift); zero at the chain's optimum. Every eta; needs grad r.
    Source: Domingo-Enrich et al. (2409.08861); theory.md, section 7.
    Checked: tests/test_estimators_adjoint.py::test_lean_adjoint_is_zero_at_the_optimum_and_biased_elsewhere
    """

    claim = Claim(Bias.PRESENT, note="zero at the chain's optimum; unbiased for a constant shift")
    needs = frozenset({Need.REWARD_GRADIENT})

    def cotangents(self, run: Run) -> Array:
        c, out = run.coefficients, run.kl_term
        p = c.final_discount * run.problem.reward.gradient(run.states[:, -1])
        for i in reversed(range(run.grid.steps)):
            out[:, i] += c.h[i] * c.dt[i] * p
            if i > 0:
                slope = run.problem.marginal(float(run.grid.times[i])).score_jacobian(run.states[:, i])
                p = _through(run, i, slope, p)
        return out
