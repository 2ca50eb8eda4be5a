"""Truth without sampling: by recursion on the affine-Gaussian chain, by quadrature in 1-D, by ODEs in the limit.

`evaluate`, `value` and `advantage` choose the method that applies; `chain`, `quadrature` and `limit` are the methods themselves.
Nothing here ever imports the simulator.
"""

from __future__ import annotations

from types import ModuleType

from ctrl import check
from ctrl.exact import chain as chain
from ctrl.exact import divergence as divergence
from ctrl.exact import limit as limit
from ctrl.exact import linear_doob as linear_doob
from ctrl.exact import plane as plane
from ctrl.exact import quadrature as quadrature
from ctrl.exact import tilt as tilt
from ctrl.exact.chain import Optimum as Optimum
from ctrl.exact.line_optimum import LineOptimum as LineOptimum
from ctrl.exact.linear_doob import LinearDoob as LinearDoob
from ctrl.exact.plane_optimum import PlaneOptimum as PlaneOptimum
from ctrl.exact.truth import Advantage as Advantage
from ctrl.exact.truth import ExactGradient as ExactGradient
from ctrl.exact.truth import Terminal as Terminal
from ctrl.exact.truth import Truth as Truth
from ctrl.exact.truth import Value as Value
from ctrl.policy import Policy
from ctrl.problem import Problem
from ctrl.schedule import TimeGrid


def _method(problem: Problem, policy: Policy, grid: TimeGrid) -> ModuleType:
    check.instance("problem", problem, Problem, "a ctrl.Problem")
    problem.check_types(policy, grid)
    if chain.applies(problem, policy, grid):
        return chain
    if problem.dim == 1:
        return quadrature
    if problem.dim == 2:
        return plane
    raise ValueError("problem: expected Gaussian data with an affine policy and a quadratic reward, or at most 2 dimensions, for exact truth; got "
                     f"{type(problem.data).__name__}, {type(policy).__name__}, {type(problem.reward).__name__} in dimension {problem.dim}")


def evaluate(problem: Problem, policy: Policy, grid: TimeGrid) -> Truth:
    r"""Objective, path KL, terminal law and gradient of a policy on a grid, without sampling.

        J = E[e^{-rho T} r(X_N)] - lambda E sum e^{-rho t_i} kappa_i D_i |a_i - s_i|^2

    method "chain" for Gaussian data, affine policy and quadratic reward (exact to rounding); else "quadrature" in 1-D (1e-10), "plane"
    in 2-D (1e-8).
    Source: theory.md, sections 1, 4 and 7.   Checked: tests/test_chain.py::test_reference_numbers
    """
    return _method(problem, policy, grid).evaluate(problem, policy, grid)


def value(problem: Problem, policy: Policy, grid: TimeGrid) -> Value:
    r"""The value function V(i, x), (n, d) -> (n,), with V.gradient(i, x), (n, d).

        V_i(x) = E[ r(X_N) - lambda sum_{j>=i} kappa_j D_j |a_j - s_j|^2 | X_i = x ]

    Source: theory.md, section 5.   Checked: tests/test_chain.py::test_value_is_a_martingale
    """
    return _method(problem, policy, grid).value(problem, policy, grid)


def advantage(problem: Problem, policy: Policy, grid: TimeGrid) -> Advantage:
    r"""The advantage rate q(i, x, a) = h (a - mu).grad V - lambda kappa (|a - s|^2 - |mu - s|^2 - tr Sigma), (n,).

    Source: theory.md, section 6.   Checked: tests/test_chain.py::test_advantage_is_centred_and_first_order
    """
    return _method(problem, policy, grid).advantage(problem, policy, grid)


def optimum(problem: Problem, grid: TimeGrid) -> Optimum | LineOptimum | PlaneOptimum:
    r"""The mean-shift optimum J* of the chain: its policy, objective, path KL, and the truth of running it.

        2 lambda kappa (a* - s)(x) = h E[ grad V*_{i+1}(X_{i+1}) | X_i = x ]

    By recursion for Gaussian data and a quadratic reward; else by smoothing and Moreau envelopes in 1-D and 2-D; else a ValueError.
    Source: theory.md, section 9 (i).   Checked: tests/test_line_optimum.py::test_dispatch
    """
    check.instance("problem", problem, Problem, "a ctrl.Problem")
    pretrained = problem.pretrained(grid)
    if chain.applies(problem, pretrained, grid):
        return chain.optimum(problem, grid)
    if problem.dim == 1:
        return quadrature.optimum(problem, grid)
    if problem.dim == 2:
        return plane.optimum(problem, grid)
    raise ValueError("problem: expected Gaussian data and a quadratic reward, or at most 2 dimensions, for the exact optimum, got "
                     f"{type(problem.data).__name__} and {type(problem.reward).__name__} in dimension {problem.dim}")


def doob(problem: Problem, grid: TimeGrid) -> LinearDoob | quadrature.Doob | plane.Doob:
    r"""Doob's transform of the pre-trained chain by e^{r/lambda}, the optimum when whole kernels are free: an upper bound on J* of means.

        phi_i(x) = E_pre[ e^{r(X_N)/lambda} | X_i = x ],      objective = lambda E log phi_0(X_0)

    With a start law proportional to p_0 phi_0 its terminal law is the chain's tilt, exactly. log_phi(i, x), expected_reward, path_kl.
    Source: theory.md, section 9 (ii).   Checked: tests/test_tilt.py::test_doob_dispatch
    """
    check.instance("problem", problem, Problem, "a ctrl.Problem")
    method = _method(problem, problem.pretrained(grid), grid)
    return linear_doob.doob(problem, grid) if method is chain else method.doob(problem, grid)
