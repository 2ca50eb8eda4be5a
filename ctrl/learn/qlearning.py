"""Continuous-time q-learning: the advantage rate of sampled actions is learned, and the actor climbs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ctrl import check
from ctrl import estimators as e
from ctrl.check import Array
from ctrl.learn.contract import Algorithm, State, ascended, mean, spent, weights
from ctrl.learn.values import Critic, Moments, least_squares
from ctrl.noise import NoiseLike
from ctrl.policy import Policy
from ctrl.problem import Problem


class Memory(NamedTuple):
    """What the critic has seen, and the moments of the slope's regression."""

    critic: Moments
    slope: tuple[Array, Array]


@dataclass(frozen=True, eq=False)
class Actor(e.Estimator):
    r"""E_{a~pi}[ grad log pi q ] with q = h (a - mu).g - lambda kappa (|a - s|^2 - ...), in closed form: D h g(X_i) - 2 lambda kappa D (mu - s)."""

    slope: Array

    def cotangents(self, run: e.Run) -> Array:
        c, exploring = run.coefficients, deviations(run)
        g = np.stack([affine(x) @ self.slope[i] for i, x in enumerate(run.left)], axis=1)
        return (c.discount * c.dt * c.h)[:, None] * g - run.pull[:, None] * (run.departure - exploring)


def affine(x: Array) -> Array:
    """1, x_j: (n, d) -> (n, 1 + d)."""
    return np.concatenate([np.ones((len(x), 1)), x], axis=1)


@dataclass(frozen=True)
class Slopes:
    """What a (n, d) and x (n, d) are to the regression: rows z (n, m), and coefficients (m,) as the matrix of g(x) = (1, x) M, (1 + d, d).

    cross : every coordinate's g affine in all of x; without, in its own alone, for high dimensions, as V's features without products
    """

    cross: bool

    def rows(self, x: Array, a: Array) -> Array:
        if not self.cross:
            return np.concatenate([a, x * a], axis=1)
        return (affine(x)[:, :, None] * a[:, None, :]).reshape(len(x), -1)

    def matrix(self, coefficients: Array, d: int) -> Array:
        return coefficients.reshape(1 + d, d) if self.cross else np.concatenate([coefficients[None, :d], np.diag(coefficients[d:])])


def deviations(run: e.Run) -> Array:
    """a - mu of the sampled actions, (n, N, d)."""
    return run.actions - np.stack([run.policy.mean(run.grid, i, x) for i, x in enumerate(run.left)], axis=1)


@dataclass(frozen=True)
class QLearning(Algorithm):
    r"""Actor-critic on sampled actions: V and q make V(X) + int (r_run - q) a martingale, and the mean action climbs q.

        q(i, x, a) = h (a - mu).g_i(x) - lambda kappa ( |a - s|^2 - |mu - s|^2 - tr Sigma ),     E_{a~pi} q = 0 by form,
        E (a - mu) (1, x)' [ V_{i+1}(X_{i+1}) - V_i(X_i) - lambda kappa D (|mu - s|^2 + tr Sigma) - h D (a - mu).g_i(X_i) ] = 0,
        theta <- theta + step * 1/n sum_paths sum_i (d mu_i)'( D_i h_i g_i(X_i) - 2 lambda kappa_i D_i (mu_i - s_i) )

    exploration : Sigma = exploration^2 I of the behaviour; its covariance is known, only the mean is learned; judged by the mean action's J
    g is affine in x, step by step (each coordinate in its own alone where the critic's features are without products). The sampler is a black
    box: g comes from the actions' own noise. V's change over a step is O(sqrt(D)), so that the update's variance settles as N grows, where whole
    returns times the actions' score (`ActionNoise`) grow like N. Every eta.
    Source: Jia and Zhou, q-learning in continuous time; theory.md, sections 6 and 10.
    Checked: tests/test_learn.py::test_q_learning_is_the_gradient_of_sampled_actions,
    tests/test_learn.py::test_the_spread_of_q_learning_settles_where_that_of_whole_returns_grows
    """

    step: float = 0.5
    exploration: float = 1.0
    critic: Critic = field(default_factory=Critic)
    keep: float = 0.8

    def require(self, problem: Problem, policy: Policy) -> None:
        check.number("exploration", self.exploration, above=0)
        if policy.exploration is not None:
            raise ValueError("policy: expected exploration=None (q-learning brings its own), got a covariance")

    def update(self, state: State, noise: NoiseLike) -> State:
        behaviour = state.policy.with_exploration(self.exploration**2 * np.eye(state.problem.dim))
        run = state.sample(noise, behaviour)
        past = state.memory
        value, seen = self.critic.learned(None if past is None else past.critic, run)
        moments = self.moments(run, value)
        if past is not None:
            moments = (moments[0] + self.keep * past.slope[0], moments[1] + self.keep * past.slope[1])
        form = Slopes(self.critic.features.cross)
        slope = np.stack([form.matrix(least_squares(gram, target), run.problem.dim) for gram, target in zip(*moments, strict=True)])
        return state.moved(ascended(state.policy, self.step * mean(Actor(slope), run)), Memory(seen, moments), spent(run, 1))

    def moments(self, run: e.Run, value: e.ValueFunction) -> tuple[Array, Array]:
        """E z z' and E z delta of every step, z = h D (1, x) (a - mu) flattened, delta the residual before q: (N, m, m), (N, m)."""
        w, c, a, form = weights(run.noise), run.coefficients, deviations(run), Slopes(self.critic.features.cross)
        # What q takes from the running cost is taken out of it: the mean action's cost and tr Sigma stay.
        cost = 0.5 * run.pull * (np.sum((run.departure - a) ** 2, axis=2) + run.problem.dim * self.exploration**2)
        v = np.stack([run.discounted(value, i) for i in range(run.grid.steps + 1)], axis=1)
        delta = (np.diff(v, axis=1) - cost) / c.discount
        gram, target = [], []
        for i, x in enumerate(run.left):
            z = c.h[i] * c.dt[i] * form.rows(x, a[:, i])
            gram.append(z.T @ (w[:, None] * z))
            target.append(z.T @ (w * delta[:, i]))
        return np.stack(gram), np.stack(target)
