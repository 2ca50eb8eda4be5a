r"""The noiseless chain on the line (eta = 0, mean actions): points of the start law are transported, derivatives are adjoints.

    X_{i+1} = m_i(X_i),      J = int p_0(x) ( r(X_N(x)) - lambda sum kappa_i D_i |mu - s|^2 ) dx,      p_N(X_N) = p_0(x) / |dX_N/dx|

Gauss-Legendre panels of start points are halved until nothing changes, so that jumps do no harm.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ctrl import check
from ctrl.check import Array
from ctrl.exact.line import WIDTH, LineChain, as_gradient, components, line_terminal, line_truth
from ctrl.exact.truth import ExactGradient, Truth, Value

ORDER, FIRST_PANELS = 16, 32  # Gauss-Legendre panels of start points
PANEL_CHANGE, RELATIVE_CHANGE = 1e-14, 1e-10  # of what a panel adds, and of that per its own mass, when it is halved
NARROWEST = 1e-11  # a panel that still changes at this width holds a jump, or a flow too steep for rounding
MOST_TRANSPORTED = 100_000


class _Paths(NamedTuple):
    """Noiseless paths from step `first` on, and mu - s along them: (N + 1 - first, n), (N - first, n)."""

    first: int
    states: Array
    gap: Array


def _paths(chain: LineChain, first: int, x: Array) -> _Paths:
    steps = chain.grid.steps
    states, gap = np.empty((steps + 1 - first, x.size)), np.empty((steps - first, x.size))
    states[0] = x
    for i in range(first, steps):
        states[i - first + 1], gap[i - first] = chain.step(i, states[i - first])
    return _Paths(first, states, gap)


def _adjoint(chain: LineChain, paths: _Paths, visit: Callable[[int, Array, Array], None] | None = None) -> Array:
    r"""dV_first/dx along paths: p_N = r', p_i = e^{-rho D} m_i' p_{i+1} - d cost_i/dx; `visit` sees u = dQ_i/da."""
    c, first = chain.c, paths.first
    p = chain.problem.reward.gradient(paths.states[-1][:, None])[:, 0]
    for i in reversed(range(first, chain.grid.steps)):
        x, (dm, dgap) = paths.states[i - first], chain.slopes(i, paths.states[i - first])
        push = 2 * chain.problem.kl_weight * c.kappa[i] * c.dt[i] * paths.gap[i - first]
        if visit is not None:
            visit(i, x, chain.decay(i) * c.dt[i] * c.h[i] * p - push)
        p = chain.decay(i) * dm * p - push * dgap
    return p


class _Panels(NamedTuple):
    """Gauss-Legendre panels of start points: their paths, masses, and what each panel (columns) adds to E r, x, x^2, gap^2."""

    states: Array
    gap: Array
    mass: Array
    sums: Array
    jump: bool = False


def _panels(chain: LineChain, left: Array, width: Array) -> _Panels:
    node, weight = np.polynomial.legendre.leggauss(ORDER)
    paths = _paths(chain, 0, (left[:, None] + 0.5 * width[:, None] * (node + 1)).ravel())
    start, end = paths.states[0], paths.states[-1]
    mass = chain.start_density(start) * (0.5 * width[:, None] * weight).ravel()
    terms = np.stack([chain.problem.reward.value(end[:, None]), end, end**2, *paths.gap**2]) * mass
    return _Panels(paths.states, paths.gap, mass, terms.reshape(len(terms), -1, ORDER).sum(axis=2))


def _start_panels(chain: LineChain, points: int | None) -> _Panels:
    """Panels halved until nothing changes, so that steep stretches of the flow get as many as they need."""
    centres, sd = components(chain.problem.start_law)
    count = FIRST_PANELS if points is None else -(-check.integer("points", points, at_least=3) // ORDER)
    edges = np.linspace(np.min(centres - WIDTH * sd), np.max(centres + WIDTH * sd), count + 1)
    left, width = edges[:-1], np.diff(edges)
    coarse = _panels(chain, left, width)
    if points is not None:
        return coarse
    done, total, nodes, jump = [], np.zeros(len(coarse.sums)), 0, False
    while left.size:
        left, width = np.stack([left, left + 0.5 * width], axis=1).ravel(), np.repeat(0.5 * width, 2)
        fine = _panels(chain, left, width)
        scale = np.maximum(1.0, np.abs(total + coarse.sums.sum(axis=1)))[:, None]
        change = np.max(np.abs(fine.sums[:, ::2] + fine.sums[:, 1::2] - coarse.sums) / scale, axis=0)
        # what is steep must be resolved however little it weighs: the gradient multiplies it by the slope
        relative = change / np.maximum(fine.mass.reshape(-1, 2 * ORDER).sum(axis=1), 1e-300)
        wide = width[::2] > NARROWEST
        jump = jump or bool(np.any(~wide & (relative > 1e-6)))
        halve = (change > PANEL_CHANGE) | (wide & (relative > RELATIVE_CHANGE))
        open_ = np.repeat(halve, 2)
        if nodes + fine.mass.size > MOST_TRANSPORTED and np.any(open_):
            warnings.warn(f"policy: the flow is too rough for {nodes + fine.mass.size} start points; expectations are off by "
                          f"up to {change.sum():.1g}", RuntimeWarning, stacklevel=4)
            open_[:] = False
        done.append(_only(fine, ~open_))
        total, nodes = total + done[-1].sums.sum(axis=1), nodes + done[-1].mass.size
        left, width, coarse = left[open_], width[open_], _only(fine, open_)
    order = np.argsort(np.concatenate([panels.states[0] for panels in done]))
    states, gap, mass = (np.concatenate(parts, axis=-1)[..., order] for parts in list(zip(*done, strict=True))[:3])
    return _Panels(states, gap, mass, total[:, None], jump)


def _only(panels: _Panels, chosen: Array) -> _Panels:
    at = np.repeat(chosen, ORDER)
    return _Panels(panels.states[:, at], panels.gap[:, at], panels.mass[at], panels.sums[:, chosen])


def evaluate(chain: LineChain, points: int | None) -> Truth:
    """What `quadrature.evaluate` promises, without noise."""
    states, gap, mass, sums, jump = _start_panels(chain, points)
    expected, paths = sums.sum(axis=1), _Paths(0, states, gap)
    density = _transported_density(chain, states)
    return line_truth(chain, float(expected[0]), expected[3:], line_terminal(states[-1], mass, density),
                  lambda: _transport_kl(chain, states[-1], mass, density),
                  lambda: _transport_gradient(chain, paths, mass, jump))


def _transported_density(chain: LineChain, states: Array) -> Array | None:
    """p_0(X_0) / (dX_N/dX_0) along paths, or None when a step folds the line over."""
    log_density = chain.problem.start_law.log_density(states[0][:, None])
    for i, x in enumerate(states[:-1]):
        slope = chain.slope(i, x)
        if np.any(slope <= 0):
            return None
        log_density = log_density - np.log(slope)
    return np.exp(log_density)


def _transport_gradient(chain: LineChain, paths: _Paths, mass: Array, jump: bool) -> ExactGradient:
    if jump:
        warnings.warn("policy: the reward along the flow jumps (or is too steep for rounding); a gradient along paths misses "
                      "what the jump adds", RuntimeWarning, stacklevel=4)
    per_path = np.zeros((len(mass), chain.policy.theta.size))

    def visit(i: int, x: Array, u: Array) -> None:
        chain.policy.add_vjp(per_path, chain.grid, i, x[:, None], (chain.c.discount[i] * u * mass)[:, None])

    _adjoint(chain, paths, visit)
    return as_gradient(chain.policy, per_path.sum(axis=0))


def _transport_kl(chain: LineChain, end: Array, mass: Array, density: Array | None) -> float:
    if density is None:
        raise ValueError("grid: expected steps that keep the order of points (1 - D f + D h mu' > 0) for a terminal "
                         "density, got a step that folds; use more steps")
    keep = mass > 1e-30
    return float(mass[keep] @ (np.log(density[keep]) - log_pushed(chain.pretrained, end[keep])))


def log_pushed(chain: LineChain, y: Array) -> Array:
    """log density of a noiseless chain's terminal law at y: back through every step, then log p_0 - log dX_N/dX_0."""
    log_slope = np.zeros_like(y)
    for i in reversed(range(chain.grid.steps)):
        y = _preimage(chain, i, y)
        log_slope += np.log(chain.slope(i, y))
    return chain.problem.start_law.log_density(y[:, None]) - log_slope


def _preimage(chain: LineChain, i: int, y: Array) -> Array:
    """x with m_i(x) = y for an increasing m_i, by Newton's method inside a shrinking bracket."""
    moved = chain.centre(i, y) - y
    x, room = y - moved, 1.0 + 2 * np.abs(moved)
    low, high = y - room, y + room
    for _ in range(60):
        below, above = chain.centre(i, low) > y, chain.centre(i, high) < y
        if not np.any(below | above):
            break
        room *= 2
        low, high = np.where(below, low - room, low), np.where(above, high + room, high)
    for _ in range(80):
        miss, slope = chain.centre(i, x) - y, chain.slope(i, x)
        if np.any(slope <= 0):
            raise ValueError("grid: expected pre-trained steps that keep the order of points (1 - D f + D h s' > 0) "
                             "for a terminal density, got a step that folds; use more steps")
        low, high = np.where(miss < 0, x, low), np.where(miss > 0, x, high)
        step = x - miss / slope
        step = np.where((step < low) | (step > high), 0.5 * (low + high), step)
        done = np.max(np.abs(step - x) / (1 + np.abs(x))) < 4e-16
        x = step
        if done:
            break
    return x


@dataclass(frozen=True, eq=False)
class TransportValue(Value):
    """V along the noiseless path from x; see `value`."""

    chain: LineChain

    def __call__(self, i: int, x: Array) -> Array:
        chain, paths = self.chain, _paths(self.chain, i, check.points("x", x, 1)[:, 0])
        out = chain.problem.reward.value(paths.states[-1][:, None])
        for j in reversed(range(i, chain.grid.steps)):
            out = chain.decay(j) * out + chain.bonus[j] - chain.cost(j, paths.gap[j - i])
        return out

    def gradient(self, i: int, x: Array) -> Array:
        return _adjoint(self.chain, _paths(self.chain, i, check.points("x", x, 1)[:, 0]))[:, None]

    def action_value(self, i: int, x: Array, a: Array) -> Array:
        chain, y, act = self.chain, check.points("x", x, 1)[:, 0], check.points("a", a, 1)[:, 0]
        following = self(i + 1, chain.moved(i, y, act)[:, None])
        return chain.decay(i) * following - chain.cost(i, act - chain.score(i, y))
