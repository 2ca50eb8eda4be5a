"""Adjoint Matching: regression of the control on the lean adjoint, which goes back through the pre-trained chain."""

from __future__ import annotations

from dataclasses import dataclass

from ctrl import estimators as e
from ctrl.learn.contract import SimpleAscent


@dataclass(frozen=True)
class AdjointMatching(SimpleAscent):
    r"""One gradient step on the regression of the control on the lean adjoint.

        loss = sum_i lambda kappa_i D_i |mu_i - s_i - h_i p_{i+1}/(2 lambda kappa_i)|^2,
        p_N = grad r,   p_i = (I + D_i(-f_i I + h_i ds_i/dx))' p_{i+1}

    Not grad J in general: it stops at the chain's optimum if the class contains it, and elsewhere if not. Every eta; needs grad r.
    Source: Domingo-Enrich et al. (2409.08861); theory.md, section 7.
    Checked: tests/test_learn.py::test_adjoint_matching_stops_elsewhere_in_a_class_without_the_optimum
    """

    step: float = 0.5
    backward = 2

    def form(self) -> e.Estimator:
        return e.AdjointMatching()
