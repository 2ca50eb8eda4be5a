r"""Functions on the line as Legendre series on panels that are halved until the series ends: known to rounding, kinks at panel ends.

    F(x) = sum_k c_k P_k(t),   t = (2 x - e_j - e_{j+1}) / (e_{j+1} - e_j)  on panel j,      int F = sum of weights times values at Gauss nodes
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numba import njit

from ctrl.check import Array

ORDER = 16  # Gauss-Legendre nodes of a panel, and terms of its series
TAIL = 2  # last terms that must be negligible
NEGLIGIBLE = 1e-13  # of the largest term, or of a typical panel's
NARROWEST = 1e-10  # of the whole interval: a panel that narrow holds a jump
MOST = 200_000  # nodes
KERNEL_PANEL = 4.0  # standard deviations: a normal density is integrated to rounding on panels this wide
REACH = 9.5  # standard deviations that an expectation looks at: exp(-45) is beyond

POINTS, MASSES = np.polynomial.legendre.leggauss(ORDER)
TO_SERIES = (np.polynomial.legendre.legvander(POINTS, ORDER - 1) * MASSES[:, None]).T * (np.arange(ORDER) + 0.5)[:, None]
GROW, KEEP = (2 * np.arange(ORDER) + 1) / (np.arange(ORDER) + 1), np.arange(ORDER) / (np.arange(ORDER) + 1)  # P_{j+1} = GROW t P_j - KEEP P_{j-1}
DERIVED = np.polynomial.legendre.legder(np.eye(ORDER))  # series of F -> series of dF/dt


@dataclass(frozen=True, eq=False)
class Piecewise:
    """Functions F_1 ... F_k by their values at the Gauss nodes of panels; beyond the ends they go on as constants.

    edges : (m + 1,), increasing      values : (k, m, ORDER)
    """

    edges: Array
    values: Array

    @cached_property
    def nodes(self) -> Array:
        """Gauss nodes, (m ORDER,), increasing."""
        return _nodes(self.edges[:-1], self.edges[1:]).ravel()

    @cached_property
    def weights(self) -> Array:
        """Of an integral, (m ORDER,)."""
        return (0.5 * np.diff(self.edges)[:, None] * MASSES).ravel()

    @cached_property
    def series(self) -> Array:
        """Legendre coefficients, (k, m, ORDER)."""
        return self.values @ TO_SERIES.T

    @cached_property
    def slopes(self) -> Array:
        """Legendre coefficients of the derivatives, (k, m, ORDER - 1)."""
        return self.series @ DERIVED.T * (2 / np.diff(self.edges))[:, None]

    def flat(self, k: int) -> Array:
        """F_k at all nodes, (m ORDER,)."""
        return self.values[k].ravel()

    def __call__(self, x: Array) -> Array:
        """F_1 ... F_k, (n,) -> (k, n)."""
        return _evaluate(np.ascontiguousarray(x), self.edges, self.series)

    def derivative(self, x: Array) -> Array:
        """dF_1/dx ... dF_k/dx, (n,) -> (k, n), of the nearest panel beyond the ends."""
        return _evaluate(np.ascontiguousarray(x), self.edges, self.slopes)

    def expect(self, centre: Array, s: float) -> tuple[Array, Array]:
        """E F_k(m + s xi) and E F_k(m + s xi) xi for centres m, (n,) -> (k, n) each; F counts as 0 beyond the ends."""
        return _expect(np.ascontiguousarray(centre), s, self.nodes, (self.values.reshape(len(self.values), -1) * self.weights).T.copy())


def fit(function: Callable[[Array], Array], edges: Array, widest: float, size: int, name: str) -> Piecewise:
    """Functions (n,) -> (k, n) on panels halved until the series of F_1 ends; panels never cross an edge.

    size : the row that says how large the terms of F_1 were, which is what its rounding is relative to
    A RuntimeWarning that begins with `name` says where nodes ran out.
    """
    parts = np.maximum(1, np.ceil(np.diff(edges) / widest)).astype(int)
    left = np.concatenate([np.linspace(a, b, k + 1)[:-1] for a, b, k in zip(edges, edges[1:], parts, strict=False)])
    right = np.append(left[1:], edges[-1])
    done, total, typical = [], 0, None
    while left.size:
        values = function(_nodes(left, right).ravel()).reshape(-1, left.size, ORDER)
        scale = np.abs(values[size]).max(axis=1)
        typical = max(float(np.median(scale)), 1e-6 * float(scale.max())) if typical is None else typical
        tail = np.abs(values[0] @ TO_SERIES[-TAIL:].T).max(axis=1)
        rough = (tail > NEGLIGIBLE * (scale + typical)) & (right - left > NARROWEST * (edges[-1] - edges[0]))
        total += left.size * ORDER
        if total > MOST and np.any(rough):
            warnings.warn(f"{name}: not smooth on {total} points; what depends on it is less than exact", RuntimeWarning, stacklevel=5)
            rough[:] = False
        done.append((left[~rough], right[~rough], values[:, ~rough]))
        left, right = left[rough], right[rough]
        middle = 0.5 * (left + right)
        left, right = np.concatenate([left, middle]), np.concatenate([middle, right])
    left, right, values = (np.concatenate(p, axis=axis) for p, axis in zip(zip(*done, strict=True), (0, 0, 1), strict=True))
    order = np.argsort(left)
    return Piecewise(np.append(left[order], right[order[-1]]), np.ascontiguousarray(values[:, order]))


def _nodes(left: Array, right: Array) -> Array:
    """Gauss nodes of panels, (m,), (m,) -> (m, ORDER)."""
    return 0.5 * (left + right)[:, None] + 0.5 * (right - left)[:, None] * POINTS


@njit(cache=True, error_model="numpy")
def panel_of(x: float, edges: Array) -> int:
    """Index of the panel that holds x, the nearest beyond the ends."""
    p = int(np.searchsorted(edges, x, side="right")) - 1
    return min(max(p, 0), edges.size - 2)


@njit(cache=True, error_model="numpy")
def _evaluate(x: Array, edges: Array, series: Array) -> Array:
    k, _, terms = series.shape
    out = np.zeros((k, x.size))
    for n in range(x.size):
        p = panel_of(x[n], edges)
        t = (2 * x[n] - edges[p] - edges[p + 1]) / (edges[p + 1] - edges[p])
        t = min(max(t, -1.0), 1.0)
        before, here = 0.0, 1.0
        for j in range(terms):
            for f in range(k):
                out[f, n] += series[f, p, j] * here
            before, here = here, GROW[j] * t * here - KEEP[j] * before
    return out


@njit(cache=True, error_model="numpy")
def _expect(centre: Array, s: float, nodes: Array, weighted: Array) -> tuple[Array, Array]:
    k = weighted.shape[1]
    plain, moment = np.zeros((k, centre.size)), np.zeros((k, centre.size))
    scale = 1 / (s * math.sqrt(2 * math.pi))
    for n in range(centre.size):
        first, last = np.searchsorted(nodes, centre[n] - REACH * s), np.searchsorted(nodes, centre[n] + REACH * s)
        for q in range(first, last):
            xi = (nodes[q] - centre[n]) / s
            normal = scale * math.exp(-0.5 * xi * xi)
            for f in range(k):
                plain[f, n] += normal * weighted[q, f]
                moment[f, n] += normal * xi * weighted[q, f]
    return plain, moment
