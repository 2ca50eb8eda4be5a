r"""The noiseless chain in the plane (eta = 0, mean actions): points of the start law are transported, derivatives are adjoints.

    X_{i+1} = m_i(X_i),      J = int p_0(x) ( r(X_N(x)) - lambda sum kappa_i D_i |mu - s|^2 ) dx,      p_N(X_N) = p_0(x) / det(dX_N/dx)

Square Gauss-Legendre panels of start points are quartered until nothing changes, so that watersheds of the flow get as many as they need.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from ctrl import check
from ctrl.check import Array
from ctrl.exact.plane_chain import PlaneChain, Pullback, back, plane_terminal, plane_truth, states
from ctrl.exact.truth import ExactGradient, Truth, Value

WIDTH = 8.0  # half-width of the start points, in standard deviations of their law
ORDER, FIRST_PANELS = 10, 8  # Gauss-Legendre nodes and panels along an axis
PANEL_CHANGE = 1e-9  # of what a panel adds, when it is quartered
MOST = 500_000  # start points
AT_ONCE = 32_768  # start points whose paths are held at once


class _Paths(NamedTuple):
    """Noiseless paths from step `first` on, and mu - s along them: (N + 1 - first, n, 2), (N - first, n, 2)."""

    first: int
    states: Array
    gap: Array


def _paths(chain: PlaneChain, first: int, x: Array) -> _Paths:
    states, gap = np.empty((chain.grid.steps + 1 - first, *x.shape)), np.empty((chain.grid.steps - first, *x.shape))
    states[0] = x
    for i in range(first, chain.grid.steps):
        states[i - first + 1], gap[i - first] = chain.step(i, states[i - first])
    return _Paths(first, states, gap)


def _adjoint(chain: PlaneChain, paths: _Paths, visit: Callable[[int, Array, Array], None] | None = None) -> Array:
    r"""grad V_first along paths: p_N = grad r, p_i = e^{-rho D} (dm_i/dx)' p_{i+1} - d cost_i/dx; `visit` sees u = dQ_i/da."""
    c, first = chain.c, paths.first
    p = chain.problem.reward.gradient(paths.states[-1])
    for i in reversed(range(first, chain.grid.steps)):
        x, gap = paths.states[i - first], paths.gap[i - first]
        if visit is not None:
            visit(i, x, c.dt[i] * (chain.decay(i) * c.h[i] * p - 2 * chain.problem.kl_weight * c.kappa[i] * gap))
        p = back(chain, i, x, gap, p)
    return p


class _Panels(NamedTuple):
    """Squares of start points: low corners (m, 2), widths (m,), nodes (m, n, 2), masses (m, n), and what each panel adds, (m, terms)."""

    low: Array
    width: Array
    nodes: Array
    mass: Array
    sums: Array

    @classmethod
    def of(cls, chain: PlaneChain, low: Array, width: Array) -> _Panels:
        """terms: r(X_N), X_N, |X_N|^2, and |mu - s|^2 at every step, times mass."""
        point, weight = np.polynomial.legendre.leggauss(ORDER)
        square = 0.5 + 0.5 * np.stack(np.meshgrid(point, point, indexing="ij"), axis=-1).reshape(-1, 2)
        nodes = low[:, None] + width[:, None, None] * square
        mass = np.exp(chain.problem.start_law.log_density(nodes.reshape(-1, 2))).reshape(len(low), -1)
        mass *= 0.25 * width[:, None] ** 2 * np.outer(weight, weight).ravel()
        terms = []
        for part in _parts(nodes.reshape(-1, 2)):
            paths = _paths(chain, 0, part)
            end = paths.states[-1]
            terms.append(np.column_stack([chain.problem.reward.value(end), end, end**2, np.sum(paths.gap**2, axis=2).T]))
        return cls(low, width, nodes, mass, np.einsum("pn,pnt->pt", mass, np.concatenate(terms).reshape(*mass.shape, -1)))

    def quarters(self, chain: PlaneChain) -> _Panels:
        half = np.repeat(0.5 * self.width, 4)
        corners = np.tile([[0, 0], [0, 1], [1, 0], [1, 1]], (len(self.width), 1))
        return self.of(chain, np.repeat(self.low, 4, axis=0) + half[:, None] * corners, half)

    def only(self, chosen: Array) -> _Panels:
        return _Panels(*(field[chosen] for field in self))


def _parts(x: Array) -> Iterator[Array]:
    return (x[k : k + AT_ONCE] for k in range(0, len(x), AT_ONCE))


def _start_panels(chain: PlaneChain) -> _Panels:
    """Panels quartered until nothing changes."""
    room = chain.hull(WIDTH)[0]
    width = float(np.max(np.ptp(room, axis=0))) / FIRST_PANELS
    low = room.min(axis=0) + width * np.stack(np.meshgrid(*2 * [np.arange(FIRST_PANELS)], indexing="ij"), axis=-1).reshape(-1, 2)
    coarse, done, count = _Panels.of(chain, low, np.full(len(low), width)), [], 0
    total = np.abs(coarse.sums.sum(axis=0))
    while coarse.width.size:
        fine = coarse.quarters(chain)
        change = np.max(np.abs(fine.sums.reshape(-1, 4, len(total)).sum(axis=1) - coarse.sums) / np.maximum(1, total), axis=1)
        quarter = change > PANEL_CHANGE
        if count + fine.mass.size + 4 * np.sum(quarter) * fine[2][0].size > MOST and np.any(quarter):
            warnings.warn(f"policy: the flow is too rough for {count + fine.mass.size} start points; expectations are off by "
                          f"up to {change.sum():.1g}", RuntimeWarning, stacklevel=4)
            quarter[:] = False
        open_ = np.repeat(quarter, 4)
        done.append(fine.only(~open_))
        count, coarse = count + done[-1].mass.size, fine.only(open_)
    return _Panels(*(np.concatenate(fields) for fields in zip(*done, strict=True)))


def evaluate(chain: PlaneChain) -> Truth:
    """Objective and the rest by panels of start points; the terminal law has no density at hand, its KL has."""
    panels = _start_panels(chain)
    sums, x, mass = panels.sums.sum(axis=0), panels.nodes.reshape(-1, 2), panels.mass.ravel()
    keep = mass > 1e-25
    x, mass = x[keep], mass[keep]
    end = np.concatenate([_paths(chain, 0, part).states[-1] for part in _parts(x)])
    return plane_truth(chain, float(sums[0]), sums[5:], plane_terminal(end, mass),
                       lambda: _terminal_kl(chain, x, mass), lambda: _gradient(chain, x, mass))


def _gradient(chain: PlaneChain, x: Array, mass: Array) -> ExactGradient:
    out = Pullback(chain)
    for part, weight in zip(_parts(x), _parts(mass[:, None]), strict=True):
        _adjoint(chain, _paths(chain, 0, part), partial(_weighted, chain, out, weight))
    return out.gradient()


def _weighted(chain: PlaneChain, out: Pullback, weight: Array, i: int, x: Array, u: Array) -> None:
    out.add(i, x, chain.c.discount[i] * weight * u)


def _terminal_kl(chain: PlaneChain, x: Array, mass: Array) -> float:
    """sum of mass times log p_N(X_N)/q_N(X_N), p_N by the change of variables along paths, q_N by going back through the pre-trained flow."""
    x, mass = x[mass > 1e-20], mass[mass > 1e-20]
    total = 0.0
    for part, weight in zip(_parts(x), _parts(mass), strict=True):
        paths, log_density = _paths(chain, 0, part), chain.problem.start_law.log_density(part)
        for i in range(chain.grid.steps):
            log_density = log_density - np.log(_volume(chain, i, paths.states[i], "steps"))
        total += float(weight @ (log_density - log_pushed(chain.pretrained, paths.states[-1])))
    return total


def _volume(chain: PlaneChain, i: int, x: Array, which: str) -> Array:
    """det dm_i/dx, (n,); ValueError where it is not positive."""
    volume = np.linalg.det(chain.slopes(i, x)[0])
    if np.any(volume <= 0):
        raise ValueError(f"grid: expected {which} that keep the orientation of the plane (det(1 - D f + D h d mu/dx) > 0) for a terminal "
                         "density, got a step that folds; use more steps")
    return volume


def log_pushed(chain: PlaneChain, y: Array) -> Array:
    """log density of a noiseless chain's terminal law at y: back through every step, then log p_0 - log det dX_N/dX_0."""
    log_volume = np.zeros(len(y))
    for i in reversed(range(chain.grid.steps)):
        y = _preimage(chain, i, y)
        log_volume += np.log(_volume(chain, i, y, "pre-trained steps"))
    return chain.problem.start_law.log_density(y) - log_volume


def _preimage(chain: PlaneChain, i: int, y: Array) -> Array:
    """x with m_i(x) = y, by Newton's method with steps halved until the miss shrinks."""
    x = y - (chain.step(i, y)[0] - y)
    miss = chain.step(i, x)[0] - y
    for _ in range(60):
        if np.max(np.abs(miss) / (1 + np.abs(y)), initial=0.0) < 1e-14:
            break
        move, length = np.linalg.solve(chain.slopes(i, x)[0], miss[:, :, None])[:, :, 0], np.ones((len(x), 1))
        for _ in range(20):
            tried = chain.step(i, x - length * move)[0] - y
            worse = np.linalg.norm(tried, axis=1) > np.linalg.norm(miss, axis=1) * (1 - 1e-4 * length[:, 0]) + 1e-14
            if not np.any(worse):
                break
            length[worse] *= 0.5
        x, miss = x - length * move, tried
    if np.max(np.abs(miss), initial=0.0) > 1e-9:
        raise ValueError(f"grid: expected pre-trained steps that can be traced back for a terminal density, got a miss of "
                         f"{np.max(np.abs(miss)):.1g} at step {i}; use more steps")
    return x


@dataclass(frozen=True, eq=False)
class TransportValue(Value):
    """V along the noiseless path from x; see `value`."""

    chain: PlaneChain

    def __call__(self, i: int, x: Array) -> Array:
        chain = self.chain
        paths = _paths(chain, i, states(chain, i, x, last=chain.grid.steps))
        out = chain.problem.reward.value(paths.states[-1])
        for j in reversed(range(i, chain.grid.steps)):
            out = chain.decay(j) * out + chain.bonus[j] - chain.cost(j, paths.gap[j - i])
        return out

    def gradient(self, i: int, x: Array) -> Array:
        return _adjoint(self.chain, _paths(self.chain, i, states(self.chain, i, x, last=self.chain.grid.steps)))

    def action_value(self, i: int, x: Array, a: Array) -> Array:
        chain = self.chain
        x, a = states(chain, i, x, last=chain.grid.steps - 1), check.points("a", a, 2)
        return chain.decay(i) * self(i + 1, chain.moved(i, x, a)) - chain.cost(i, a - chain.score(i, x))
