"""Two estimators of one's own for the bench, one of them wrong: ctrl bench --estimator analysis/wrong_estimator.py:folded (or :complete).

Reward folding: the running KL is subtracted from the reward, and the score function does the rest. That loses d/dtheta of the cost itself,
e_i = -2 lambda kappa_i D_i (a_i - s_i), through which the policy acts on it (theory.md, section 7). Nothing diverges, and training works;
the gradient is that of no objective.
"""

from __future__ import annotations

import numpy as np

import ctrl
from ctrl.estimators import Gradient


def _samples(problem, policy, grid, noise, explicit):
    """sum_i (d mu_i/d theta)' ( h_i sqrt(D_i)/(eta g_i) xi_i G + e_i ), G = r - the running costs; e_i only where `explicit`."""
    paths, c = ctrl.simulate(problem, policy, grid, noise, trajectory=True), problem.coefficients(grid)
    departure = [paths.actions[:, i] - problem.score(grid.times[i], paths.states[:, i]) for i in range(grid.steps)]
    pull = 2 * problem.kl_weight * c.discount * c.kappa * c.dt
    G = c.final_discount * paths.reward - sum(0.5 * pull[i] * np.sum(a**2, axis=1) for i, a in enumerate(departure))
    out = np.zeros((len(G), policy.theta.size))
    for i in range(grid.steps):
        u = c.h[i] * c.dt[i] / c.noise[i] * paths.noise_steps[:, i] * G[:, None]
        policy.add_vjp(out, grid, i, paths.states[:, i], u - pull[i] * departure[i] if explicit else u)
    return Gradient.from_samples(out, noise.weights)


def folded(problem, policy, grid, noise):
    """Wrong: without e_i."""
    return _samples(problem, policy, grid, noise, explicit=False)


def complete(problem, policy, grid, noise):
    """Right: the policy gradient of the objective with its running KL."""
    return _samples(problem, policy, grid, noise, explicit=True)
