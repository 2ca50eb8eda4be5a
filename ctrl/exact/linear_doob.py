r"""Doob's transform of the linear-Gaussian pre-trained chain: the optimum when whole kernels are free (theory.md, section 9 (ii)).

    phi_i(x) = E_pre[ e^{r(X_N)/lambda} | X_i = x ] = exp( -1/2 x'S_i x + w_i'x + z_i ),
    X_{i+1} | X_i = x  ~  N( C (R^{-1} (A x + c) + w_{i+1}), C ),      C = (R^{-1} + S_{i+1})^{-1}
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ctrl import check
from ctrl.check import Array
from ctrl.elementary import quadratic_form
from ctrl.exact.chain import LinearChain
from ctrl.laws import Gaussian
from ctrl.problem import Problem
from ctrl.reward import Quadratic
from ctrl.schedule import TimeGrid


class Exponent(NamedTuple):
    """log phi(x) = -1/2 x'S x + w'x + z."""

    S: Array
    w: Array
    z: float

    @classmethod
    def of(cls, reward: Quadratic, kl_weight: float) -> Exponent:
        """r/lambda."""
        return cls(reward.matrix / kl_weight, reward.vector / kl_weight, reward.constant / kl_weight)

    def __call__(self, x: Array) -> Array:
        return -0.5 * quadratic_form(x, self.S) + x @ self.w + self.z

    def mean(self, law: Gaussian) -> float:
        """E log phi under a Gaussian."""
        spread = float(np.sum(self.S * law.cov))
        return float(self(law.mean[None])[0]) - 0.5 * spread

    def posterior(self, R: Array) -> Array:
        """(R^{-1} + S)^{-1}, the covariance of N(m, R) phi; ValueError where that has no integral."""
        root = np.linalg.cholesky(R)
        inner = np.eye(len(R)) + root.T @ self.S @ root
        if (smallest := float(np.min(np.linalg.eigvalsh(inner)))) <= 0:
            raise ValueError(f"kl_weight: expected a weight large enough for E e^(r / kl_weight) to be finite, got 1 + R S = {smallest:.3g}")
        return root @ np.linalg.solve(inner, root.T)

    def before(self, A: Array, c: Array, R: Array) -> Exponent:
        r"""log E phi(A x + c + R^{1/2} xi) as a function of x.

            S' = A'(S - S C S)A,   w' = A'(I - S C)(w - S c),   z' = z + w'c - 1/2 c'S c + 1/2 (w - S c)'C(w - S c) + 1/2 log det(C R^{-1})
        """
        C = self.posterior(R)
        pull = self.w - self.S @ c
        S = A.T @ (self.S - self.S @ C @ self.S) @ A
        volume = float(np.linalg.slogdet(C)[1] - np.linalg.slogdet(R)[1])
        z = self.z + float(self.w @ c - 0.5 * c @ self.S @ c + 0.5 * pull @ C @ pull) + 0.5 * volume
        return Exponent((S + S.T) / 2, A.T @ (pull - self.S @ (C @ pull)), z)

    def tilted(self, law: Gaussian) -> Gaussian:
        """The law proportional to N(m, C) phi."""
        cov = self.posterior(law.cov)
        return Gaussian(cov @ (law.precision @ law.mean + self.w), (cov + cov.T) / 2)


@dataclass(frozen=True, eq=False)
class LinearDoob:
    r"""The Doob transform of a linear-Gaussian chain by e^{r/lambda}, in any dimension.

        objective = lambda E log phi_0(X_0),      path_kl = E*[r]/lambda - E log phi_0(X_0),      expected_reward = E*[r]

    The start law is unchanged in these; `tilted_start` is p_0 phi_0 / E phi_0, from which the terminal law is the chain's tilt exactly.
    log_phi(i, x) : (n,)      gradient(i, x) : grad log phi, (n, d)      kernel : B (N, d, d), b (N, d), C (N, d, d), N(B x + b, C)
    Source: theory.md, section 9 (ii).   Checked: tests/test_tilt.py::test_linear_doob_chain
    """

    problem: Problem
    grid: TimeGrid
    exponents: tuple[Exponent, ...]
    kernel: tuple[Array, Array, Array]

    @property
    def start(self) -> Gaussian:
        law = self.problem.start_law
        assert isinstance(law, Gaussian)
        return law

    @cached_property
    def tilted_start(self) -> Gaussian:
        return self.exponents[0].tilted(self.start)

    def marginals(self, start: Gaussian) -> tuple[Array, Array]:
        """Means (N + 1, d) and covariances (N + 1, d, d) of X_0 ... X_N from a start law."""
        B, b, C = self.kernel
        m, P = np.empty((len(b) + 1, b.shape[1])), np.empty((len(b) + 1, *C.shape[1:]))
        m[0], P[0] = start.mean, start.cov
        for i in range(len(b)):
            m[i + 1], P[i + 1] = B[i] @ m[i] + b[i], B[i] @ P[i] @ B[i].T + C[i]
        return m, P

    def terminal(self, start: Gaussian) -> Gaussian:
        """Law of X_N from a start law."""
        m, P = self.marginals(start)
        return Gaussian(m[-1], P[-1])

    @property
    def objective(self) -> float:
        return self.problem.kl_weight * self.exponents[0].mean(self.start)

    @cached_property
    def expected_reward(self) -> float:
        return self.problem.kl_weight * self.exponents[-1].mean(self.terminal(self.start))

    @property
    def path_kl(self) -> float:
        return (self.expected_reward - self.objective) / self.problem.kl_weight

    def log_phi(self, i: int, x: Array) -> Array:
        """log phi_i(x), (n, d) -> (n,)."""
        return self.exponents[check.integer("i", i, at_least=0)](check.points("x", x, self.problem.dim))

    def gradient(self, i: int, x: Array) -> Array:
        """grad log phi_i(x), (n, d) -> (n, d)."""
        phi = self.exponents[check.integer("i", i, at_least=0)]
        return phi.w - check.points("x", x, self.problem.dim) @ phi.S


def doob(problem: Problem, grid: TimeGrid) -> LinearDoob:
    r"""Doob's transform of the pre-trained linear-Gaussian chain by a backward recursion of exponents, exact to rounding.

        log phi_i(x) = log E[ phi_{i+1}(A_i x + c_i + R_i^{1/2} xi) ],      log phi_N = r/lambda

    Needs Gaussian data, a quadratic reward, eta > 0, kl_weight > 0 and no discount.
    Source: theory.md, section 9 (ii).   Checked: tests/test_tilt.py::test_linear_doob_chain
    """
    chain = LinearChain(problem, problem.pretrained(grid), grid)
    require_doob(problem)
    reward = problem.reward.quadratic(problem.dim)
    assert reward is not None
    (A, c), R = chain.maps, chain.step_cov
    exponents, kernel = [Exponent.of(reward, problem.kl_weight)], []
    for i in reversed(range(grid.steps)):
        C, precision = exponents[-1].posterior(R[i]), np.linalg.inv(R[i])
        kernel.append((C @ precision @ A[i], C @ (precision @ c[i] + exponents[-1].w), C))
        exponents.append(exponents[-1].before(A[i], c[i], R[i]))
    B, b, C = (np.stack(part[::-1]) for part in zip(*kernel, strict=True))
    return LinearDoob(problem, grid, tuple(exponents[::-1]), (B, b, C))


def require_doob(problem: Problem) -> None:
    """ValueError where e^{r/lambda} tilts nothing: eta = 0, kl_weight = 0, a discount."""
    problem.require_path_kl()
    if problem.kl_weight == 0 or problem.discount > 0:
        raise ValueError(f"problem: expected kl_weight > 0 and discount 0 for Doob's transform, got kl_weight "
                         f"{problem.kl_weight:g} and discount {problem.discount:g}")
