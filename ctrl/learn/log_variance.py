"""Log-variance (VarGrad, trajectory balance): the variance of the reward less the log-ratio of the path."""

from __future__ import annotations

from dataclasses import dataclass

from ctrl import estimators as e
from ctrl.learn.contract import SimpleAscent


@dataclass(frozen=True)
class LogVariance(SimpleAscent):
    r"""Descent of the variance of r/lambda - log dP_theta/dP_pre under the policy's own paths, times lambda.

        theta <- theta - step * lambda grad 1/2 Var_n( r/lambda - k1 )

    On policy its mean is a step of grad J; given X_0 the variance is zero at Doob's optimum. kl_weight > 0, eta > 0.
    Source: Richter et al. (2010.10436); theory.md, section 7.   Checked: tests/test_learn.py::test_log_variance_is_zero_at_doobs_optimum
    """

    step: float = 0.5

    def form(self) -> e.Estimator:
        return e.LogVariance()
