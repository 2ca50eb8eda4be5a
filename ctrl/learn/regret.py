"""What is lost: J* - J in two parts, what the class cannot reach and what the algorithm has not reached."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ctrl import check, exact
from ctrl.check import Array
from ctrl.policy import Policy
from ctrl.problem import Problem
from ctrl.schedule import TimeGrid


@dataclass(frozen=True, eq=False)
class Best:
    """The best policy of a class: exact J and the norm of its gradient there."""

    policy: Policy
    objective: float
    gradient_norm: float


def best_in_class(problem: Problem, policy: Policy, grid: TimeGrid, starts: ArrayLike | None = None) -> Best:
    r"""The maximiser of the exact J over theta, by L-BFGS on the exact objective and gradient from theta and from every further start.

        J_class = max_theta J(theta)

    starts : (m, p) further starts, for objectives with several maxima: where there are some, the best that was found is returned
    Source: theory.md, sections 9 and 15.   Checked: tests/test_learn.py::test_regret_has_two_parts
    """
    from scipy.optimize import minimize

    p = policy.theta.size
    more = np.empty((0, p)) if starts is None else check.array("starts", starts, (None, p), f"(m, {p})")

    def loss(theta: Array) -> tuple[float, Array]:
        try:
            truth = exact.evaluate(problem, policy.with_theta(theta), grid)
            return -truth.objective, -truth.gradient.theta
        except ValueError:  # a line search far out, where no exact method reaches
            return np.inf, np.zeros(p)

    exact.evaluate(problem, policy, grid)
    ends = [minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-9})
            for start in (policy.theta, *more)]
    end = min(ends, key=lambda result: result.fun)
    return Best(policy.with_theta(end.x), -float(end.fun), float(np.linalg.norm(end.jac)))


@dataclass(frozen=True)
class Yardstick:
    r"""J* over all means and over a class: regret J* - J = (J* - J_class) + (J_class - J).

    Source: theory.md, section 9 (i) and section 15.   Checked: tests/test_learn.py::test_regret_has_two_parts
    """

    optimum: float
    best: float

    @classmethod
    def of(cls, problem: Problem, policy: Policy, grid: TimeGrid, starts: ArrayLike | None = None) -> Yardstick:
        """Both by exact methods."""
        return cls(exact.optimum(problem, grid).objective, best_in_class(problem, policy, grid, starts).objective)

    @property
    def of_class(self) -> float:
        """What no policy of the class can reach."""
        return self.optimum - self.best

    def regret(self, objective: ArrayLike) -> Array:
        """J* - J, of any shape."""
        return self.optimum - np.asarray(objective, dtype=np.float64)

    def within(self, objective: ArrayLike) -> Array:
        """J_class - J, of any shape."""
        return self.best - np.asarray(objective, dtype=np.float64)
