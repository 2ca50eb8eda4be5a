r"""Learning V on paths: quadratics in x, step by step, by the martingale loss or by orthogonality conditions (theory.md, section 5)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np

from ctrl.check import Array
from ctrl.estimators import Run
from ctrl.learn.contract import Diverged, weights
from ctrl.problem import Problem

Moments = tuple[Array, ...]


@dataclass(frozen=True)
class Quadratic:
    """1, x_j, x_j x_k with j <= k: (n, d) -> (n, p); without `cross` only the squares, for high dimensions."""

    cross: bool = True

    def _pairs(self, d: int) -> tuple[Array, Array]:
        return np.triu_indices(d) if self.cross else (np.arange(d), np.arange(d))

    def __call__(self, x: Array) -> Array:
        j, k = self._pairs(x.shape[1])
        return np.concatenate([np.ones((len(x), 1)), x, x[:, j] * x[:, k]], axis=1)

    def slopes(self, x: Array) -> Array:
        """d features / d x, (n, d) -> (n, p, d)."""
        (n, d), (j, k) = x.shape, self._pairs(x.shape[1])
        eye = np.eye(d)
        products = x[:, j, None] * eye[k] + x[:, k, None] * eye[j]
        return np.concatenate([np.zeros((n, 1, d)), np.broadcast_to(eye, (n, d, d)), products], axis=1)


@dataclass(frozen=True, eq=False)
class LearnedValue:
    """V_i(x) = coefficients_i . features(x) for i < N, and V_N = r, which is known; coefficients (N, p)."""

    problem: Problem
    features: Quadratic
    coefficients: Array

    def __call__(self, i: int, x: Array) -> Array:
        return self.problem.reward.value(x) if i == len(self.coefficients) else self.features(x) @ self.coefficients[i]

    def gradient(self, i: int, x: Array) -> Array:
        """grad V_i, (n, d) -> (n, d)."""
        if i == len(self.coefficients):
            return self.problem.reward.gradient(x)
        return np.einsum("npd,p->nd", self.features.slopes(x), self.coefficients[i])


class Learning(ABC):
    """What V solves: moments of a batch, and the coefficients at which they vanish."""

    @abstractmethod
    def moments(self, run: Run, features: Quadratic, cost: Array) -> Moments:
        """Sums over paths, which may be added up over batches; cost (n, N), discounted."""

    @abstractmethod
    def solve(self, moments: Moments) -> Array:
        """Coefficients, (N, p)."""


def least_squares(gram: Array, target: Array) -> Array:
    """gram^+ target for one step, on features scaled alike: directions that no path has tried get nothing."""
    if not (np.all(np.isfinite(gram)) and np.all(np.isfinite(target))):
        raise Diverged("moments: expected numbers, got overflow")
    scale = np.sqrt(np.maximum(np.diag(gram), np.finfo(float).tiny))
    return np.linalg.lstsq(gram / np.outer(scale, scale), target / scale, rcond=1e-10)[0] / scale


@dataclass(frozen=True)
class MartingaleLoss(Learning):
    r"""Regression on returns: V is the minimiser of E sum_i D_i (V_i(X_i) - G_i)^2, G_i = r - sum_{j>=i} cost_j.

    D_i cancels, as each step has coefficients of its own.
    Source: Jia and Zhou; theory.md, section 5.   Checked: tests/test_learn.py::test_values_learned_by_quadrature_are_the_chains
    """

    def moments(self, run: Run, features: Quadratic, cost: Array) -> Moments:
        w, G = weights(run.noise), run.reward[:, None] - np.cumsum(cost[:, ::-1], axis=1)[:, ::-1]
        phi = [features(x) for x in run.left]
        gram = np.stack([f.T @ (w[:, None] * f) for f in phi])
        return gram, np.stack([f.T @ (w * G[:, i]) for i, f in enumerate(phi)]) / run.coefficients.discount[:, None]

    def solve(self, moments: Moments) -> Array:
        return np.stack([least_squares(gram, target) for gram, target in zip(*moments, strict=True)])


@dataclass(frozen=True)
class Orthogonality(Learning):
    r"""The root of E phi_i(X_i) ( V_{i+1}(X_{i+1}) - V_i(X_i) - cost_i ) = 0 at every step: bootstrapping, solved backwards from V_N = r.

    Source: Jia and Zhou; theory.md, section 5.   Checked: tests/test_learn.py::test_values_learned_by_quadrature_are_the_chains
    """

    def moments(self, run: Run, features: Quadratic, cost: Array) -> Moments:
        w, start = weights(run.noise), run.coefficients.discount
        gamma = np.append(start[1:], run.coefficients.final_discount) / start
        phi, last = [features(x) for x in run.left], run.grid.steps - 1
        gram = np.stack([f.T @ (w[:, None] * f) for f in phi])
        cross = np.stack([gamma[i] * f.T @ (w[:, None] * phi[i + 1]) for i, f in enumerate(phi[:-1])] or [np.zeros_like(gram[0])])
        known = [(run.reward if i == last else 0.0) - cost[:, i] for i in range(last + 1)]
        return gram, cross, np.stack([f.T @ (w * known[i]) / start[i] for i, f in enumerate(phi)])

    def solve(self, moments: Moments) -> Array:
        gram, cross, target = moments
        out = np.zeros_like(target)
        for i in reversed(range(len(target))):
            ahead = cross[i] @ out[i + 1] if i + 1 < len(target) else 0.0
            out[i] = least_squares(gram[i], target[i] + ahead)
        return out


@dataclass(frozen=True)
class Critic:
    """How a value is learned: linear in features of every step's state, on this batch and, with weights keep^k, the k-th before it.

    keep : 0 for this batch alone; more paths and older policies with a larger one
    """

    learning: Learning = field(default_factory=MartingaleLoss)
    features: Quadratic = field(default_factory=Quadratic)
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.keep < 1:
            raise ValueError(f"keep: expected a number in [0, 1), got {self.keep!r}")

    def learned(self, past: Moments | None, run: Run, cost: Array | None = None) -> tuple[LearnedValue, Moments]:
        """V after this batch, and what to remember; cost : the running cost, if not the run's."""
        fresh = self.learning.moments(run, self.features, run.cost if cost is None else cost)
        moments = fresh if past is None else tuple(new + self.keep * old for new, old in zip(fresh, past, strict=True))
        return LearnedValue(run.problem, self.features, self.learning.solve(moments)), moments
