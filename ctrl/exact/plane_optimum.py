r"""The mean-shift optimum of a chain in the plane, for any score and reward (theory.md, section 9 (i)).

    V_i(x) = sup_y { W(y) - |y - z|^2 / (2 c) },    W(y) = e^{-rho D} E V_{i+1}(y + s xi),    z = x + D (-f x + h s(x)),    V_N = r

c = h^2 D/(2 lambda kappa) = s^2/lambda: smoothing by the step's noise, then a Moreau envelope. W and its derivatives are gathered off the
lattice of X_{i+1} at any y. The supremum is global: every node as y against every node as z, one axis after the other, says near which
nodes the maximiser lies; Newton's method ends the search, from each of them where they disagree, and the best end wins.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike

from ctrl import check
from ctrl.check import Array
from ctrl.exact.lattice import REACH, UNIT, Lattice, expect, shrink
from ctrl.exact.plane_chain import PlaneChain, states
from ctrl.exact.truth import GlobalOptimum, Truth, Value
from ctrl.policy import Policy
from ctrl.problem import Problem
from ctrl.schedule import TimeGrid

if TYPE_CHECKING:
    from scipy.interpolate import RectBivariateSpline

ASCENTS = 60  # of Newton's method
SETTLED = 1e-10  # a step this short, in standard deviations of the noise, ends it
MISSED, ROUNDS = 1e-5, 4  # of lambda, what half of the nodes may miss in W, on average under the optimum; refinements of a lattice, at most
LOUD = 3e-4  # of lambda: what is still missed after them, when it is said; all nodes miss a quarter of it, at a kink, or less
MOST_VISITS = 3e9  # of nodes, by all windows of one step: ten of them in Newton's method, a minute
APART = 2.5  # spacings: nodes farther apart than this may lead to different maxima


# ---- the Moreau envelope ---------------------------------------------------------------------------------------------


@njit(cache=True, error_model="numpy", nogil=True)
def _transform(W: Array, rate: Array, half: Array, best: Array) -> None:
    """best (n1, n2, 2): the node k' with the largest W[k'] - rate_1 (k'_1 - k_1)^2 - rate_2 (k'_2 - k_2)^2, |k' - k| <= half, for every k."""
    n1, n2 = W.shape
    level, row = np.empty((n1, n2)), np.empty((n1, n2), np.int64)
    for k in range(n1):
        for m in range(n2):
            level[k, m] = -np.inf
        for a in range(max(k - half[0], 0), min(k + half[0], n1 - 1) + 1):
            price = rate[0] * (a - k) ** 2
            for m in range(n2):
                if W[a, m] - price > level[k, m]:
                    level[k, m], row[k, m] = W[a, m] - price, a
    for k in range(n1):
        for m in range(n2):
            top = -np.inf
            for b in range(max(m - half[1], 0), min(m + half[1], n2 - 1) + 1):
                height = level[k, b] - rate[1] * (b - m) ** 2
                if height > top:
                    top, best[k, m, 0], best[k, m, 1] = height, row[k, b], b


def _padded(lattice: Lattice, values: Array) -> tuple[Lattice, Array]:
    """Wide enough for kernels at its old edges: parabolas go on beyond them, exact for quadratic tails."""
    margin = [int(np.ceil(REACH / step)) + 1 for step in lattice.step]
    for axis, room in enumerate(margin):
        v, k = np.moveaxis(values, axis, 0), np.arange(1, room + 1)[:, None]
        ends = [edge[0] + k * (edge[0] - edge[1]) + k * (k + 1) / 2 * (edge[0] - 2 * edge[1] + edge[2]) for edge in (v, v[::-1])]
        values = np.moveaxis(np.concatenate([ends[0][::-1], v, ends[1]]), 0, axis)
    shape = (lattice.shape[0] + 2 * margin[0], lattice.shape[1] + 2 * margin[1])
    return Lattice(lattice.frame, lattice.low - margin * lattice.step, lattice.step, shape), np.ascontiguousarray(values)


class Point(NamedTuple):
    """W - |y - z|^2/(2 c) at y, (n,), its gradient (n, 2), and minus its Hessian, (n, 2, 2)."""

    height: Array
    slope: Array
    bend: Array


def _expected(lattice: Lattice, values: Array, y: Array) -> Array:
    """E of values at y + s xi, (n,)."""
    return expect(*_padded(lattice, values), y, UNIT)[:, 0]


@dataclass(frozen=True, eq=False)
class Envelope:
    """One step back: W off the lattice of X_{i+1}, and the best mean y of X_{i+1} for a free mean z of it."""

    lattice: Lattice
    values: Array
    decay: float
    c: float

    @cached_property
    def _wide(self) -> tuple[Lattice, Array]:
        return _padded(self.lattice, self.values)

    def smoothed(self, y: Array) -> Array:
        """W, (n,)."""
        return self.decay * expect(*self._wide, y, UNIT)[:, 0]

    def missed(self, y: Array) -> Array:
        """By how much W changes when every other row, or column, of nodes is dropped, (n, 2)."""
        wide, values = self._wide
        rows, columns = (np.where(np.arange(n) % 2, -1.0, 1.0) for n in wide.shape)
        return self.decay * np.abs(np.stack([expect(wide, v, y, UNIT)[:, 0] for v in (values * rows[:, None], values * columns)], axis=1))

    def at(self, y: Array, z: Array) -> Point:
        E, back = expect(*self._wide, y, UNIT, order=2), np.linalg.inv(self.lattice.frame)
        second = np.stack([E[:, 3], E[:, 4], E[:, 4], E[:, 5]], axis=1).reshape(-1, 2, 2) - E[:, :1, None] * np.eye(2)
        gap = y - z
        return Point(self.decay * E[:, 0] - np.sum(gap**2, axis=1) / (2 * self.c), self.decay * E[:, 1:3] @ back - gap / self.c,
                     np.eye(2) / self.c - self.decay * back.T @ second @ back)

    @cached_property
    def nodes(self) -> Array:
        """The best node for every node as z, (n1, n2, 2)."""
        lattice, W = self.lattice, self.smoothed(self.lattice.nodes()).reshape(self.lattice.shape)
        size = lattice.step * np.linalg.norm(lattice.frame, axis=0)
        steepest = np.array([np.max(np.abs(np.diff(W, axis=axis))) for axis in (0, 1)]) / size
        best = np.zeros((*lattice.shape, 2), dtype=np.int64)
        _transform(W, size**2 / (2 * self.c), np.ceil(1 + self.c * steepest / size).astype(np.int64), best)
        return best

    def best(self, z: Array) -> tuple[Array, Array, Array]:
        """The maximiser y (n, 2), the maximum (n,), and where it had to be chosen among several, (n,)."""
        z = self.lattice.nearest(z)
        corner = np.minimum(np.floor(self.lattice.place(z)).astype(int), np.array(self.lattice.shape) - 2)
        near = np.stack([self.nodes[corner[:, 0] + a, corner[:, 1] + b] for a in (0, 1) for b in (0, 1)], axis=1)
        frame, low, step = self.lattice.frame, self.lattice.low, self.lattice.step
        y, height = self._ascend((low + step * near.mean(axis=1)) @ frame.T, z)
        torn = np.max(np.ptp(near, axis=1), axis=1) > APART
        several = np.zeros(len(z), dtype=bool)
        for k in range(4 if np.any(torn) else 0):
            tried, level = self._ascend((low + step * near[torn, k]) @ frame.T, z[torn])
            several[torn] |= np.linalg.norm(tried - y[torn], axis=1) > 1e-6 * np.linalg.norm(step * frame)
            better = level > height[torn]
            chosen = np.flatnonzero(torn)[better]
            y[chosen], height[chosen] = tried[better], level[better]
        return y, height, several

    def _ascend(self, y: Array, z: Array) -> tuple[Array, Array]:
        """Newton's method from y, steps halved until they lead up; where the bend is not positive, along the slope."""
        y, active, noise = y.copy(), np.arange(len(y)), np.linalg.norm(self.lattice.frame, axis=0).min()
        here = self.at(y, z)
        height, length = here.height.copy(), np.ones((len(y), 1))
        for _ in range(ASCENTS):
            lowest = np.linalg.eigvalsh(here.bend)[:, 0]
            bend = here.bend + np.maximum(0, 0.1 / self.c - lowest)[:, None, None] * np.eye(2)
            step = np.linalg.solve(bend, here.slope[:, :, None])[:, :, 0]
            tried = self.lattice.nearest(y[active] + length[active] * step)
            there = self.at(tried, z[active])
            up = there.height >= height[active] - 1e-13 * np.abs(height[active])
            length[active] = np.where(up[:, None], 1.0, 0.25 * length[active])
            moved = np.linalg.norm(tried - y[active], axis=1)
            y[active[up]], height[active[up]] = tried[up], there.height[up]
            here = Point(*(np.where(up.reshape(-1, *(1,) * (new.ndim - 1)), new, old) for new, old in zip(there, here, strict=True)))
            going = moved > SETTLED * noise
            if not np.any(going):
                break
            active, here = active[going], Point(*(field[going] for field in here))
        return y, height


# ---- backward through the steps --------------------------------------------------------------------------------------


class Fields(NamedTuple):
    """On the nodes of a time: V*, E* r(X_N), E* sum kappa D |a - s|^2, (n1, n2); a - s, (n1, n2, 2); choices among several maxima."""

    value: Array
    reward: Array
    penalty: Array
    feedback: Array
    ties: int


class Stages(NamedTuple):
    """What the way back leaves behind: lattices and fields of N + 1 times, envelopes of N steps."""

    lattices: tuple[Lattice, ...]
    fields: tuple[Fields, ...]
    envelopes: tuple[Envelope, ...]


def _backward(chain: PlaneChain, lattices: tuple[Lattice, ...], mass: tuple[Array, ...], rounds: int) -> Stages:
    """From the last step to the first; a lattice that turns out too coarse for the step that leads to it is refined on the way.

    mass : of the pre-trained chain on the lattices, (n1, n2); times e^{V*/lambda} it is nearly the law of the optimal chain
    """
    problem, steps, at = chain.problem, chain.grid.steps, list(lattices)
    rate = chain.c.h**2 * chain.c.dt / (2 * problem.kl_weight * chain.c.kappa)
    fields: dict[int, Fields] = {}
    envelopes: dict[int, Envelope] = {}

    def on(i: int) -> Array:
        """Fields of step i on its lattice; what half of the nodes of X_{i+1} miss in W, (n, 2)."""
        x, shape = at[i].nodes(), at[i].shape
        if i == steps:
            reward = problem.reward.value(x).reshape(shape)
            fields[i] = Fields(reward, reward, np.zeros(shape), np.zeros((*shape, 2)), 0)
            return np.zeros((len(x), 2))
        after = at[i + 1]
        if (visits := (at[i].size + after.size) * after.window(REACH)) > MOST_VISITS:
            raise ValueError(f"reward: expected one that {MOST_VISITS:g} visits of nodes resolve in step {i}, got one on a lattice of "
                             f"{after.shape[0]} x {after.shape[1]}, {visits:.1g} visits (smooth the reward, raise kl_weight, or use more steps)")
        envelopes[i] = Envelope(after, fields[i + 1].value, chain.decay(i), float(rate[i]))
        z = chain.step(i, x)[0]
        y, best, several = envelopes[i].best(z)
        u = (y - after.nearest(z)) / (chain.c.dt[i] * chain.c.h[i])
        reward, penalty = (_expected(after, field, y).reshape(shape) for field in (fields[i + 1].reward, fields[i + 1].penalty))
        paid = (chain.c.kappa[i] * chain.c.dt[i] * np.sum(u**2, axis=1)).reshape(shape)
        fields[i] = Fields(best.reshape(shape), reward, penalty + paid, u.reshape(*shape, 2), int(np.count_nonzero(several)))
        return envelopes[i].missed(y)

    on(steps)
    for i in reversed(range(steps)):
        for left in reversed(range(rounds + 1)):
            missed = on(i)
            error = _share(mass[i], fields[i].value / problem.kl_weight) @ missed / problem.kl_weight
            if left == 0 or np.max(error) <= MISSED:
                break
            at[i + 1] = at[i + 1].finer(shrink(error, MISSED))
            on(i + 1)
        if rounds > 0 and np.max(error) > LOUD:
            warnings.warn(f"reward: the optimal value is not smooth at step {i + 1}; J* is off by up to {np.max(error) * problem.kl_weight:.1g}",
                          RuntimeWarning, stacklevel=5)
    return Stages(tuple(at), tuple(fields[i] for i in range(steps + 1)), tuple(envelopes[i] for i in range(steps)))


def _share(mass: Array, tilt: Array) -> Array:
    """Probabilities proportional to mass e^tilt, both (n1, n2), flat."""
    logs = np.log(np.maximum(mass, 1e-300)) + tilt
    share = np.exp(logs - np.max(logs)).ravel()
    return share / share.sum()


# ---- what it returns -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PlanePolicy(Policy):
    r"""The optimal action in the plane, mu_i(x) = s(t_i, x) + theta (a* - s)_i(x), on the grid of its optimum.

    (a* - s)_i is a quintic spline through the nodes of a lattice, and goes on as a constant beyond them.
    theta : (1,), 1 at the optimum, where dJ/dtheta = 0
    Source: theory.md, section 9.   Checked: tests/test_plane.py::test_policy_attains_the_optimum
    """

    problem: Problem
    times: TimeGrid
    lattices: tuple[Lattice, ...]
    feedback: tuple[Array, ...]
    theta: Array
    exploration: Array | None = None

    @property
    def dim(self) -> int:
        return 2

    def with_theta(self, theta: ArrayLike) -> PlanePolicy:
        return replace(self, theta=check.array("theta", theta, (1,), "(1,)"))

    @cached_property
    def splines(self) -> tuple[tuple[RectBivariateSpline, RectBivariateSpline], ...]:
        """Of both coordinates of a* - s in the nodes' indices, N pairs."""
        from scipy.interpolate import RectBivariateSpline

        def spline(u: Array) -> RectBivariateSpline:
            return RectBivariateSpline(np.arange(len(u)), np.arange(len(u.T)), u, kx=5, ky=5)

        return tuple((spline(u[:, :, 0]), spline(u[:, :, 1])) for u in self.feedback)

    def _on(self, grid: TimeGrid) -> None:
        if grid is not self.times and not np.array_equal(grid.times, self.times.times):
            raise ValueError(f"grid: expected the grid of the optimum ({self.times.steps} steps), got {grid.steps} other steps")

    def shift(self, i: int, x: Array) -> Array:
        """(a* - s)_i, (n, 2) -> (n, 2)."""
        k = self.lattices[i].place(self.lattices[i].nearest(x))
        return np.stack([spline.ev(k[:, 0], k[:, 1]) for spline in self.splines[i]], axis=1)

    def mean(self, grid: TimeGrid, i: int, x: Array) -> Array:
        self._on(grid)
        return self.problem.score(float(grid.times[i]), x) + self.theta[0] * self.shift(i, x)

    def jacobian_x(self, grid: TimeGrid, i: int, x: Array) -> Array:
        self._on(grid)
        lattice = self.lattices[i]
        k = lattice.place(lattice.nearest(x)).T
        by_index = np.stack([np.stack([f.ev(*k, dx=1, dy=0), f.ev(*k, dx=0, dy=1)], axis=1) for f in self.splines[i]], axis=1)
        slope = by_index / lattice.step @ np.linalg.inv(lattice.frame)
        return self.problem.marginal(float(grid.times[i])).score_jacobian(x) + self.theta[0] * slope

    def add_vjp(self, out: Array, grid: TimeGrid, i: int, x: Array, u: Array) -> None:
        self._on(grid)
        out += np.sum(self.shift(i, x) * u, axis=1, keepdims=True)


@dataclass(frozen=True, eq=False)
class OptimalValue(Value):
    """V*_i(x), its gradient and Q*_i(x, a) in the plane, by one more envelope; states on the solver's lattices."""

    chain: PlaneChain
    lattices: tuple[Lattice, ...]
    envelopes: tuple[Envelope, ...]

    def _at(self, i: int, x: Array, last: int) -> Array:
        x = states(self.chain, i, x, last)
        off = np.max(np.abs(self.lattices[i].nearest(x) - x), axis=1, initial=0.0)
        if i < self.chain.grid.steps and np.any(off > 1e-9):
            worst = x[np.argmax(off)]
            raise ValueError(f"x: expected states on the lattice of step {i}, got ({worst[0]:.4g}, {worst[1]:.4g})")
        return x

    def __call__(self, i: int, x: Array) -> Array:
        x = self._at(i, x, self.chain.grid.steps)
        return self.chain.problem.reward.value(x) if i == self.chain.grid.steps else self.envelopes[i].best(self.chain.step(i, x)[0])[1]

    def gradient(self, i: int, x: Array) -> Array:
        x = self._at(i, x, self.chain.grid.steps)
        if i == self.chain.grid.steps:
            return self.chain.problem.reward.gradient(x)
        z, envelope = self.chain.step(i, x)[0], self.envelopes[i]
        return np.einsum("nij,ni->nj", self.chain.slopes(i, x)[0], envelope.best(z)[0] - z) / envelope.c

    def action_value(self, i: int, x: Array, a: Array) -> Array:
        x, a = self._at(i, x, self.chain.grid.steps - 1), check.points("a", a, 2)
        centre = self._at(i + 1, self.chain.moved(i, x, a), self.chain.grid.steps)
        return self.envelopes[i].smoothed(centre) - self.chain.cost(i, a - self.chain.score(i, x))


@dataclass(frozen=True, eq=False)
class PlaneOptimum(GlobalOptimum):
    r"""The mean-shift optimum in the plane (see GlobalOptimum).

    ties : (N,) nodes at which the best action was chosen among several local maxima: a* jumps there
    Source: theory.md, section 9 (i).   Checked: tests/test_plane.py::test_optimum_of_products_of_lines
    """

    ties: Array


def solve(chain: PlaneChain, lattices: tuple[Lattice, ...], mass: tuple[Array, ...], fixed: bool,
          evaluate: Callable[[Problem, Policy, TimeGrid], Truth]) -> PlaneOptimum:
    """The optimum over means of a pre-trained chain with the given masses (n1, n2) on lattices, which are refined unless fixed."""
    problem, grid = chain.problem, chain.grid
    lattices, fields, envelopes = _backward(chain, lattices, mass, 0 if fixed else ROUNDS)
    policy = PlanePolicy(problem, grid, lattices[:-1], tuple(f.feedback for f in fields[:-1]), np.ones(1))
    objective, reward, penalty = (float(np.sum(mass[0] * field)) for field in fields[0][:3])
    return PlaneOptimum(problem, grid, policy, OptimalValue(chain, lattices, envelopes), objective, reward, penalty, evaluate,
                        np.array([f.ties for f in fields[:-1]]))
