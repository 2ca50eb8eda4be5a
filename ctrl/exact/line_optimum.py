r"""The mean-shift optimum of a chain on the line, for any score and reward (theory.md, section 9 (i)).

    V_i(x) = sup_y { W(y) - (y - z)^2 / (2 c) },    W(y) = e^{-rho D} E V_{i+1}(y + s xi),    z = x + D (-f x + h s(x)),    V_N = r

c = h^2 D/(2 lambda kappa), which is s^2/lambda at eta > 0: smoothing by the step's noise, then a Moreau envelope. V lives on panels that
never cross a kink, so Gauss-Legendre sums and series keep everything to rounding. The supremum is global: G(y) = y - c W'(y) is the z
whose maximiser is y where G increases, so every increasing branch of G is a candidate, and the best branch moves up with z. Where it
jumps, V has a kink and the optimal action a jump; both become panel ends. Without noise (eta = 0) W is V_{i+1} itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numba import njit
from numpy.typing import ArrayLike

from ctrl import check
from ctrl.check import Array
from ctrl.exact.line import WIDTH, LineChain, components
from ctrl.exact.panels import GROW, KEEP, KERNEL_PANEL, POINTS, REACH, Piecewise, fit
from ctrl.exact.truth import GlobalOptimum, Truth, Value
from ctrl.policy import Policy
from ctrl.problem import Problem
from ctrl.schedule import TimeGrid

# What is carried back: V, V', E r(X_N), E sum kappa D |a - s|^2, E |r| + costs (what rounding is relative to), a - s.
V, SLOPE, REWARD, PENALTY, SIZE, FEEDBACK = range(6)
FEWEST_PANELS, FIRST_LOOK = 12, 64  # of a time's states, at least; of the last time's, so that no feature of a reward is missed
LOOK = 2048  # points among which kinks are looked for
ENOUGH = 9.0  # standard deviations of the optimal chain that the room must hold: exp(-40) is beyond
GROWTHS = 8  # of the room, before the objective counts as unbounded


# ---- the Moreau envelope ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Envelope:
    r"""U(z) = max_y { W(y) - (y - z)^2/(2 c) } over an interval, by the increasing branches of G(y) = y - c W'(y).

    ahead : W, W', ... of y      first, last : (b,) a branch's first and last knot      starts : (b,) z from which it is the best
    knots, levels, panel : y, G(y) and the panel above every knot
    """

    ahead: Piecewise
    c: float
    first: Array
    last: Array
    knots: Array
    levels: Array
    panel: Array
    starts: Array

    def best(self, z: Array, branch: Array | None = None) -> Array:
        """The maximiser y, (n,): over everything, or within given branches (n,)."""
        if branch is None:
            branch = np.searchsorted(self.starts[1:], z, side="right")
        return _invert(z, branch, self.first, self.last, self.knots, self.levels, self.panel, self.ahead.edges, self.ahead.series[SLOPE],
                       self.c)

    @property
    def breaks(self) -> Array:
        """The z where U is not smooth: jumps of the maximiser, and where it meets the ends of the interval."""
        return np.concatenate([[self.levels[self.first[0]]], self.starts[1:], [self.levels[self.last[-1]]]])

    @classmethod
    def of(cls, ahead: Piecewise, c: float) -> Envelope:
        """All branches, then those which are the best somewhere."""
        every = cls._candidates(ahead, c, _branches(ahead, c))
        kept, starts = [0], [-np.inf]
        for j in range(1, len(every.first)):
            while (crossing := every._crossing(kept[-1], j)) <= starts[-1]:
                kept.pop(), starts.pop()
            kept.append(j)
            starts.append(crossing)
        return replace(every, first=every.first[kept], last=every.last[kept], starts=np.array(starts))

    @classmethod
    def _candidates(cls, ahead: Piecewise, c: float, branches: list[tuple[float, float]]) -> Envelope:
        inner, knots = ahead.edges, []
        for a, b in branches:
            knots.append(np.concatenate([[a], inner[(inner > a) & (inner < b)], [b]]))
        last = np.cumsum([len(k) for k in knots]) - 1
        first = np.append(0, last[:-1] + 1)
        flat = np.concatenate(knots)
        above = np.append(flat[1:], flat[-1])
        above[last] = flat[last]
        panel = np.clip(np.searchsorted(inner, 0.5 * (flat + above), side="right") - 1, 0, len(inner) - 2)
        panel[last] = panel[np.maximum(last - 1, first)]
        levels = flat - c * _slopes(flat, panel, inner, ahead.series[SLOPE])[0]
        return cls(ahead, c, first, last, flat, levels, panel, np.full(len(first), -np.inf))

    def _crossing(self, j: int, k: int) -> float:
        """The z from which branch k is better than the lower branch j; their difference falls with slope (y_j - y_k)/c."""

        def gain(z: float) -> tuple[float, float]:
            y = self.best(np.full(2, z), np.array([j, k]))
            U = self.ahead(y)[V] - (y - z) ** 2 / (2 * self.c)
            return float(U[1] - U[0]), float(y[1] - y[0]) / self.c

        low, high = (f(self.levels[self.first[k]], self.levels[self.last[j]]) for f in (min, max))
        room = 1e-3 * (self.ahead.edges[-1] - self.ahead.edges[0])
        while gain(low)[0] > 0:
            low, room = low - room, 2 * room
        while gain(high)[0] < 0:
            high, room = high + room, 2 * room
        z = 0.5 * (low + high)
        for _ in range(100):
            ahead, slope = gain(z)
            low, high = (z, high) if ahead < 0 else (low, z)
            new = z - ahead / slope if slope > 0 else z
            new = new if low < new < high else 0.5 * (low + high)
            if abs(new - z) <= 1e-15 * (1 + abs(z)):
                break
            z = new
        return z


def _branches(ahead: Piecewise, c: float) -> list[tuple[float, float]]:
    """Intervals on which G increases, in order; an end of the line where it falls is a branch of one point."""
    t = np.concatenate([[-1.0], POINTS, [1.0]])
    edges, series = ahead.edges, ahead.series[SLOPE]
    panels = range(len(edges) - 1)
    y = 0.5 * (edges[:-1, None] + edges[1:, None]) + 0.5 * np.diff(edges)[:, None] * t
    slope, curvature = _slopes(y.ravel(), np.repeat(np.array(panels), t.size), edges, series)
    level, rising = (y.ravel() - c * slope).reshape(y.shape), (1 - c * curvature).reshape(y.shape) > 0
    falls = np.append(False, level[1:, 0] < level[:-1, -1] - 1e-10 * (1 + np.abs(level[1:, 0])))  # at a kink of W, without noise
    if rising.all() and not falls.any():
        return [(float(edges[0]), float(edges[-1]))]
    out = [] if rising[0, 0] else [(edges[0], edges[0])]
    start = None
    for p in panels:
        if start is not None and falls[p]:
            out.append((start, edges[p]))
            start = None
        for k in range(t.size):
            if rising[p, k] == (start is not None):
                continue
            turn = edges[p] if k == 0 else _turn(p, y[p, k - 1], y[p, k], edges, series, c)
            if start is None:
                start = turn
            else:
                out.append((start, turn))
                start = None
    out.append((edges[-1] if start is None else start, edges[-1]))
    return [(float(a), float(b)) for a, b in out]


def _turn(p: int, left: float, right: float, edges: Array, series: Array, c: float) -> float:
    """Where G turns between two points of panel p, by bisection."""
    rises = c * _slope(left, p, edges, series)[1] < 1
    for _ in range(60):
        middle = 0.5 * (left + right)
        left, right = (middle, right) if (c * _slope(middle, p, edges, series)[1] < 1) == rises else (left, middle)
    return 0.5 * (left + right)


@njit(cache=True, error_model="numpy")
def _slope(y: float, p: int, edges: Array, series: Array) -> tuple[float, float]:
    """W'(y) and W''(y) by the series of W' on panel p."""
    half = 0.5 * (edges[p + 1] - edges[p])
    t = (y - 0.5 * (edges[p] + edges[p + 1])) / half
    before, here, dbefore, dhere = 0.0, 1.0, 0.0, 0.0
    value, slope = 0.0, 0.0
    for j in range(series.shape[1]):
        value += series[p, j] * here
        slope += series[p, j] * dhere
        before, here = here, GROW[j] * t * here - KEEP[j] * before
        dbefore, dhere = dhere, dbefore + (2 * j + 1) * before
    return value, slope / half


@njit(cache=True, error_model="numpy")
def _slopes(y: Array, panel: Array, edges: Array, series: Array) -> tuple[Array, Array]:
    out = np.empty((2, y.size))
    for n in range(y.size):
        out[0, n], out[1, n] = _slope(y[n], panel[n], edges, series)
    return out[0], out[1]


@njit(cache=True, error_model="numpy")
def _invert(z: Array, branch: Array, first: Array, last: Array, knots: Array, levels: Array, panel: Array, edges: Array, series: Array,
            c: float) -> Array:
    """The y of a branch with y - c W'(y) = z, or its nearest end: Newton's method inside a shrinking bracket."""
    out = np.empty(z.size)
    for n in range(z.size):
        low, high = first[branch[n]], last[branch[n]]
        if z[n] <= levels[low] or z[n] >= levels[high]:
            out[n] = knots[low] if z[n] <= levels[low] else knots[high]
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if levels[middle] <= z[n] else (low, middle)
        a, b, p = knots[low], knots[high], panel[low]
        y = a + (b - a) * (z[n] - levels[low]) / (levels[high] - levels[low])
        for _ in range(100):
            slope, curvature = _slope(y, p, edges, series)
            miss = y - c * slope - z[n]
            if miss > 0:
                b = y
            else:
                a = y
            step = miss / (1 - c * curvature)
            if abs(step) <= 1e-8 * (knots[high] - knots[low]):  # what is left is its square
                y -= step
                break
            y = y - step if a < y - step < b else 0.5 * (a + b)
        out[n] = y
    return out


# ---- backward through the steps --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Backward:
    """V and what goes with it at every time, and W at every step, for means kept within [low_i, high_i]."""

    chain: LineChain
    low: Array
    high: Array

    @property
    def rate(self) -> Array:
        """c_i = h^2 D/(2 lambda kappa), (N,)."""
        co = self.chain.c
        return co.h**2 * co.dt / (2 * self.chain.problem.kl_weight * co.kappa)

    def room(self, i: int) -> tuple[float, float]:
        """The states at time i that an expectation from step i - 1 can see."""
        pad = REACH * float(self.chain.s[i - 1]) if i > 0 else 0.0
        return float(self.low[i]) - pad, float(self.high[i]) + pad

    def widest(self, i: int) -> float:
        """Of a panel at time i: narrow enough for the noise that lands on it, and for the start law."""
        a, b = self.room(i)
        noise = float(self.chain.s[i - 1]) if i > 0 else float(np.min(components(self.chain.problem.start_law)[1]))
        fewest = FIRST_LOOK if i == self.chain.grid.steps else FEWEST_PANELS
        return min((b - a) / fewest, KERNEL_PANEL * noise if noise > 0 else math.inf)

    @cached_property
    def stages(self) -> tuple[list[Piecewise], list[Envelope]]:
        """(V, V', R, K, a - s) of x at times 0 ... N, and the envelopes of steps 0 ... N - 1."""
        steps, r = self.chain.grid.steps, self.chain.problem.reward

        def terminal(x: Array) -> Array:
            value, zero = r.value(x[:, None]), np.zeros_like(x)
            return np.stack([value, r.gradient(x[:, None])[:, 0], value, zero, np.abs(value), zero])

        here, envelopes = [fit(terminal, np.array(self.room(steps)), self.widest(steps), SIZE, "reward")], []
        for i in reversed(range(steps)):
            envelopes.append(Envelope.of(self._ahead(i, here[-1]), float(self.rate[i])))
            here.append(fit(self._step(i, envelopes[-1]), self._edges(i, envelopes[-1].breaks), self.widest(i), SIZE, "reward"))
        return here[::-1], envelopes[::-1]

    def _ahead(self, i: int, later: Piecewise) -> Piecewise:
        """W, W' and the other rows' expectations, by the mean y of X_{i+1}."""
        s, decay, ends = float(self.chain.s[i]), self.chain.decay(i), np.array([self.low[i + 1], self.high[i + 1]])
        if s == 0:
            scale = np.array([decay, decay, 1.0, 1.0, 1.0])[:, None, None]
            return Piecewise(later.edges, later.values[:FEEDBACK] * scale)
        carried = Piecewise(later.edges, later.values[[V, REWARD, PENALTY, SIZE]])

        def smoothed(y: Array) -> Array:
            (W, *rest), (dW, *_) = carried.expect(y, s)
            return np.stack([decay * W, decay * dW / s, *rest])

        return fit(smoothed, ends, (ends[1] - ends[0]) / FEWEST_PANELS, SIZE, "reward")

    def _step(self, i: int, envelope: Envelope) -> Callable[[Array], Array]:
        chain, c = self.chain, float(self.rate[i])
        gain, price = chain.c.dt[i] * chain.c.h[i], chain.c.kappa[i] * chain.c.dt[i]

        def carried(x: Array) -> Array:
            z = chain.centre(i, x)
            y = envelope.best(z)
            W, _, R, K, size = envelope.ahead(y)
            u, cost = (y - z) / gain, (y - z) ** 2 / (2 * c)
            return np.stack([W - cost, chain.slope(i, x) * (y - z) / c, R, K + price * u**2, size + cost, u])

        return carried

    def _edges(self, i: int, breaks: Array) -> Array:
        """Ends of the states at step i, and the states between whose z is a break."""
        a, b = self.room(i)
        x = np.linspace(a, b, LOOK)
        above = self.chain.centre(i, x) >= breaks[:, None]
        k, j = np.nonzero(above[:, 1:] != above[:, :-1])
        left, right, up = x[j], x[j + 1], above[k, j + 1]
        at = 0.5 * (left + right)
        for _ in range(60 if at.size else 0):
            miss = self.chain.centre(i, at) - breaks[k]
            beyond = (miss >= 0) == up
            left, right = np.where(beyond, left, at), np.where(beyond, at, right)
            step = miss / self.chain.slope(i, at)
            inside = (at - step > left) & (at - step < right)
            at = np.where(inside | (np.abs(step) < 1e-8), at - step, 0.5 * (left + right))
            if np.max(np.abs(step)) < 1e-8:  # and what is left is its square
                break
        edges = np.sort(np.concatenate([[a, b], at]))
        return edges[np.append(True, np.diff(edges) > 1e-12 * (b - a))]


# ---- what it returns -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LinePolicy(Policy):
    r"""The optimal action on the line, mu_i(x) = s(t_i, x) + theta (a* - s)_i(x), on the grid of its optimum.

    theta : (1,), 1 at the optimum, where dJ/dtheta = 0      feedback : (a* - s)_i on panels, N of them
    Source: theory.md, section 9.   Checked: tests/test_line_optimum.py::test_policy_attains_the_optimum
    """

    problem: Problem
    times: TimeGrid
    feedback: tuple[Piecewise, ...]
    theta: Array
    exploration: Array | None = None

    @property
    def dim(self) -> int:
        return 1

    def with_theta(self, theta: ArrayLike) -> LinePolicy:
        return replace(self, theta=check.array("theta", theta, (1,), "(1,)"))

    def _on(self, grid: TimeGrid) -> None:
        if grid is not self.times and not np.array_equal(grid.times, self.times.times):
            raise ValueError(f"grid: expected the grid of the optimum ({self.times.steps} steps), got {grid.steps} other steps")

    def shift(self, i: int, x: Array) -> Array:
        """(a* - s)_i, (n, 1) -> (n, 1)."""
        return self.feedback[i](x[:, 0])[0][:, None]

    def mean(self, grid: TimeGrid, i: int, x: Array) -> Array:
        self._on(grid)
        return self.problem.score(float(grid.times[i]), x) + self.theta[0] * self.shift(i, x)

    def jacobian_x(self, grid: TimeGrid, i: int, x: Array) -> Array:
        self._on(grid)
        slope = self.problem.marginal(float(grid.times[i])).score_jacobian(x)
        return slope + self.theta[0] * self.feedback[i].derivative(x[:, 0])[0][:, None, None]

    def add_vjp(self, out: Array, grid: TimeGrid, i: int, x: Array, u: Array) -> None:
        self._on(grid)
        out += self.shift(i, x) * u


@dataclass(frozen=True, eq=False)
class OptimalValue(Value):
    """V*_i(x), its gradient and Q*_i(x, a) on the line, from series; states within the solver's room."""

    backward: _Backward

    def _at(self, i: int, x: Array, last: int) -> Array:
        chain = self.backward.chain
        if check.integer("i", i, at_least=0) > last:
            raise ValueError(f"i: expected a step in 0 ... {last}, got {i}")
        y = check.points("x", x, 1)[:, 0]
        low, high = self.backward.low[i], self.backward.high[i]
        if i < chain.grid.steps and np.any(off := (y < low) | (y > high)):
            raise ValueError(f"x: expected states in [{low:.4g}, {high:.4g}] at step {i}, got {y[np.argmax(off)]:.4g}")
        return y

    def __call__(self, i: int, x: Array) -> Array:
        chain = self.backward.chain
        y = self._at(i, x, chain.grid.steps)
        return chain.problem.reward.value(y[:, None]) if i == chain.grid.steps else self.backward.stages[0][i](y)[V]

    def gradient(self, i: int, x: Array) -> Array:
        chain = self.backward.chain
        y = self._at(i, x, chain.grid.steps)
        return chain.problem.reward.gradient(y[:, None]) if i == chain.grid.steps else self.backward.stages[0][i](y)[SLOPE][:, None]

    def action_value(self, i: int, x: Array, a: Array) -> Array:
        chain = self.backward.chain
        y, act = self._at(i, x, chain.grid.steps - 1), check.points("a", a, 1)[:, 0]
        centre = chain.moved(i, y, act)
        self._at(i + 1, centre[:, None], chain.grid.steps)
        return self.backward.stages[1][i].ahead(centre)[V] - chain.cost(i, act - chain.score(i, y))


@dataclass(frozen=True, eq=False)
class LineOptimum(GlobalOptimum):
    r"""The mean-shift optimum on the line (see GlobalOptimum).

    kinks : (N,) jumps of the optimal action per step
    Source: theory.md, section 9 (i).   Checked: tests/test_line_optimum.py::test_reference_numbers
    """

    kinks: Array


def solve(chain: LineChain, evaluate: Callable[[Problem, Policy, TimeGrid], Truth]) -> LineOptimum:
    """The optimum over means of a pre-trained chain; its room grows until the optimal chain stays inside."""
    problem, grid = chain.problem, chain.grid
    low, high = chain.edges(WIDTH)
    for _ in range(GROWTHS):
        backward = _Backward(chain, low, high)
        here, envelopes = backward.stages
        feedback = tuple(Piecewise(p.edges, p.values[[FEEDBACK]]) for p in here[:-1])
        policy = LinePolicy(problem, grid, feedback, np.ones(1))
        left, right = LineChain(problem, policy, grid).edges(ENOUGH)
        if np.all(left >= low) and np.all(right <= high):
            break
        low, high = np.minimum(low, left - 0.1 * (right - left)), np.maximum(high, right + 0.1 * (right - left))
    else:
        raise ValueError(f"kl_weight: expected a weight large enough to bound the objective, got {problem.kl_weight:g} "
                         f"(the optimal chain still leaves [{low[-1]:.3g}, {high[-1]:.3g}])")
    start = here[0]
    mass = start.weights * chain.start_density(start.nodes)
    objective, reward, penalty = (float(mass @ start.flat(k)) for k in (V, REWARD, PENALTY))
    kinks = np.array([len(e.starts) - 1 for e in envelopes])
    return LineOptimum(problem, grid, policy, OptimalValue(backward), objective, reward, penalty, evaluate, kinks)
