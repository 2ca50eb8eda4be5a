"""Simulation of the generation chain (plain NumPy stand-in until the fused kernels land)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctrl.check import Array
from ctrl.noise import NoiseLike
from ctrl.policy import Policy
from ctrl.problem import Problem
from ctrl.schedule import TimeGrid


@dataclass(frozen=True, eq=False)
class Paths:
    problem: Problem
    terminal: Array
    reward: Array
    penalty: Array
    objective: Array
    ratio: Array
    weights: Array | None
    states: Array | None = None
    noise_steps: Array | None = None
    actions: Array | None = None

    @property
    def log_weight(self) -> Array:
        self.problem.require_path_kl()
        return self.ratio


def simulate(problem: Problem, policy: Policy, grid: TimeGrid, noise: NoiseLike, *, dtype: type = np.float64,
             trajectory: bool = False, threads: int | None = None) -> Paths:
    problem.check_policy(policy, grid)
    c, d, n = problem.coefficients(grid), problem.dim, noise.paths
    xi = noise.steps(grid.steps, d) if problem.eta > 0 else np.zeros((n, grid.steps, d))
    L = policy.exploration_factor(grid)
    z = None if L is None else noise.actions(grid.steps, d)
    x = np.empty((n, grid.steps + 1, d))
    a = np.empty((n, grid.steps, d))
    x[:, 0] = problem.initial(noise)
    pen, dis, ratio = np.zeros(n), np.zeros(n), np.zeros(n)
    for i, t in enumerate(grid.times[:-1]):
        a[:, i] = policy.mean(grid, i, x[:, i])
        if z is not None:
            a[:, i] += z[:, i] @ L[i].T
        gap = a[:, i] - problem.score(float(t), x[:, i])
        cost = c.kappa[i] * c.dt[i] * np.sum(gap**2, axis=1)
        pen += cost
        dis += c.discount[i] * cost
        ratio += cost + np.sqrt(2 * c.kappa[i] * c.dt[i]) * np.sum(gap * xi[:, i], axis=1)
        x[:, i + 1] = x[:, i] + (-c.f[i] * x[:, i] + c.h[i] * a[:, i]) * c.dt[i] + c.noise[i] * xi[:, i]
    r = problem.reward.value(x[:, -1])
    return Paths(problem, x[:, -1], r, pen, c.final_discount * r - problem.kl_weight * dis, ratio, noise.weights,
                 *((x, xi, a) if trajectory else (None, None, None)))
