r"""The KL in the return and as a loss: which forms together make the gradient of its price (theory.md, sections 7 and 14).

    sample = sum_i sigma_i ( r - sum_j R_j ) - grad sum_i L_i,        R, L the KL of single steps, with its price lambda; L on detached states

    L_i, R_i / lambda       analytic kappa D |mu - s|^2       k1 = u'xi + |u|^2/2       k2 = k1^2/2       k3 = e^{-k1} - 1 + k1
    E[sigma_i R_i | X_i]    0                                 -(d mu_i)'e_i             |u|^2/2 of that   0
    -E[grad L_i | X_i]      (d mu_i)'e_i                      0                         (d mu_i)'e_i      (d mu_i)'e_i

The return owes the states' part (any R with the right mean), and (d mu_i)'e_i must come in once: from R = k1, or from L.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from ctrl.check import Array
from ctrl.estimators.contract import UNBIASED, Bias, Claim, Estimator, Need, Run


class StepKL(ABC):
    """A form of the KL of single steps, with its price lambda e^{-rho t_i}.

    right_mean : E[cost_i | X_i] is the price of the step's KL      pulls : -E[grad cost_i | X_i] on detached states, in units of (d mu_i)'e_i
    noisy : E[sigma_i cost_i | X_i] is -(d mu_i)'e_i where it has the right mean
    """

    right_mean = True
    pulls = True
    noisy = False

    @abstractmethod
    def cost(self, run: Run) -> Array:
        """(n, N), reward units."""

    @abstractmethod
    def pull(self, run: Run) -> Array:
        """Cotangents of -cost_i on detached states, (n, N, d)."""


@dataclass(frozen=True)
class Analytic(StepKL):
    """lambda kappa_i D_i |a_i - s_i|^2, the KL of the step itself.

    Source: theory.md, section 4.   Checked: tests/test_estimators_kl.py::test_the_four_by_five_table
    """

    def cost(self, run: Run) -> Array:
        return run.cost

    def pull(self, run: Run) -> Array:
        return run.kl_term


@dataclass(frozen=True)
class K1(StepKL):
    """lambda k1_i, k1 = u'xi + |u|^2/2 the log-ratio: the right mean; as a loss its gradient is zero in the mean.

    Source: theory.md, section 14.   Checked: tests/test_estimators_kl.py::test_the_four_by_five_table
    """

    pulls = False
    noisy = True

    def cost(self, run: Run) -> Array:
        return run.sampled_cost

    def pull(self, run: Run) -> Array:
        return -_price(run)[:, None] * run.score_noise


@dataclass(frozen=True)
class K2(StepKL):
    """lambda k1_i^2/2: the wrong mean; as a loss the gradient of the analytic one.

    Source: theory.md, section 14.   Checked: tests/test_estimators_kl.py::test_the_four_by_five_table
    """

    right_mean = False

    def cost(self, run: Run) -> Array:
        return 0.5 * _price(run) * run.k1**2

    def pull(self, run: Run) -> Array:
        return -(_price(run) * run.k1)[:, :, None] * run.score_noise


@dataclass(frozen=True)
class K3(StepKL):
    """lambda (e^{-k1_i} - 1 + k1_i), never negative: the right mean; as a loss the gradient of the analytic one.

    Source: theory.md, section 14.   Checked: tests/test_estimators_kl.py::test_k3_by_gauss_hermite_nodes
    """

    def cost(self, run: Run) -> Array:
        return _price(run) * (np.expm1(-run.k1) + run.k1)

    def pull(self, run: Run) -> Array:
        return (_price(run) * np.expm1(-run.k1))[:, :, None] * run.score_noise


def _price(run: Run) -> Array:
    """lambda e^{-rho t_i}, (N,)."""
    return run.problem.kl_weight * run.coefficients.discount


@dataclass(frozen=True, eq=False)
class KLForm(Estimator):
    r"""Score function with one form of the KL in the return and another, or none, as a loss on detached states.

        sum_i ( sigma_i (r - sum_j R_j) - grad L_i )

    in_return R, as_loss L : Analytic(), K1(), K2(), K3() or None
    Unbiased: (Analytic, Analytic), the score function itself; (K1, None) or (K1, K1), k1 in the return; (K3, K3) and every other pair whose R
    has the right mean, with (d mu)'e_i in it once. Biased: R alone without K1 (reward folding), L alone (a per-step loss), twice, neither.
    Source: theory.md, sections 7 and 14.   Checked: tests/test_estimators_kl.py::test_the_four_by_five_table
    """

    in_return: StepKL | None
    as_loss: StepKL | None
    needs = frozenset({Need.DIFFUSION})

    @property
    def claim(self) -> Claim:
        R, L = self.in_return, self.as_loss
        if R is None:
            return Claim(Bias.PRESENT, note="the KL does not see what the policy does to the states")
        if not R.right_mean:
            return Claim(Bias.PRESENT, note="the return has a wrong KL")
        times = int(R.noisy) + int(L is not None and L.pulls)
        return UNBIASED if times == 1 else Claim(Bias.PRESENT, note=f"e_i {'twice' if times else 'missing'}")

    def cotangents(self, run: Run) -> Array:
        spent = 0.0 if self.in_return is None else self.in_return.cost(run).sum(axis=1)
        u = (run.reward - spent)[:, None, None] * run.score_noise
        return u if self.as_loss is None else u + self.as_loss.pull(run)
