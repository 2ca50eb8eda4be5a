r"""Truth in the plane for any score, policy and reward, without sampling (theory.md, sections 1, 5, 7 and 9).

    X_{i+1} | X_i = x  ~  N( m_i(x), R_i ),    m_i(x) = x + D (-f x + h mu(x)),    R_i = eta^2 g^2 D I + (h D)^2 Sigma_i

As in `quadrature` the density goes forward and the values go backward through the same kernel, by the trapezoid rule. Every time
has a lattice of its own, a tensor lattice in the frame F, R = F F', in which the kernel that lands on it is a product of two unit
normals: a window of it is two short vectors of weights, and nothing is interpolated. A lattice is refined where half of its nodes
do not give what all of them give; for smooth integrands the error is about exp(-2 pi^2 (sd/spacing)^2), 4e-14 at 1.25.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from ctrl import check
from ctrl.check import Array
from ctrl.exact import plane_optimum
from ctrl.exact import plane_transport as transport
from ctrl.exact.lattice import LOG_REACH, REACH, UNIT, Lattice, Source, expect, log_expect, parity, parity_of_sum, shrink
from ctrl.exact.linear_doob import require_doob
from ctrl.exact.plane_chain import WIDTH, PlaneChain, Pullback, back, components, directions, plane_chain, plane_terminal, plane_truth, states
from ctrl.exact.plane_optimum import PlaneOptimum
from ctrl.exact.truth import Advantage, ExactGradient, Truth, Value
from ctrl.policy import Policy
from ctrl.problem import Problem
from ctrl.schedule import TimeGrid

TRUSTED = 6.5  # V is asked for inside this many: given a state at 6.5, the edge at 10 is 7.6 deviations away
RESOLUTION, COARSE = 1.25, 0.8  # spacings per standard deviation of one step: of an answer, and of a look at where the chain is
ALIASING = 1e-5  # what half of the nodes may miss, so that all of them miss about 1e-10
MOST, MOST_TOGETHER = 4_000_000, 30_000_000  # nodes of one lattice, and of all
MOST_VISITS = 3e9  # of nodes, by all windows of one step: seconds
MOST_FOR_REWARD = 1_000_000  # ... of the last lattice, when the reward asks for more than the chain does
GROWTHS, ENOUGH = 5, 8.0  # of the optimum's room, until it holds so many standard deviations of the optimal chain
EDGE_DENSITY = 1e-20  # of the peak


# ---- public verbs ----------------------------------------------------------------------------------------------------


def evaluate(problem: Problem, policy: Policy, grid: TimeGrid, resolution: float | None = None) -> Truth:
    r"""Objective, its parts, the terminal law and the gradient of a chain in the plane, for any score, policy and reward.

        p_{i+1}(y) = int p_i(x) N(y; m_i(x), R_i) dx,
        J = e^{-rho T} int p_N r - lambda sum e^{-rho t_i} kappa_i D_i E|a_i - s_i|^2,
        grad J = sum_i e^{-rho t_i} D_i E[ (d mu_i)'( h_i e^{-rho D_i} F_i^{-T} E[V_{i+1}(X_{i+1}) xi | X_i] - 2 lambda kappa_i (mu_i - s_i) ) ]

    resolution : spacings per standard deviation of a step; chosen, and raised where that is not enough, when None
    terminal.points (n1, n2, 2), terminal.density (n1, n2)
    Assumes a reward that is smooth on the lattice (else a RuntimeWarning says how far off) and a density with Gaussian tails.
    Error: about 1e-8 relative (2e-8 at most on the zoo's chains of 4 to 20 steps); it falls like exp(-const resolution^2),
    and none is from the step size: the chain is the object.
    Without noise (eta = 0, mean actions) panels of start points are transported, quartered until nothing changes; no terminal.density.
    Source: theory.md, sections 1 and 7.   Checked: tests/test_plane.py::test_error_falls_spectrally
    """
    chain = plane_chain(problem, policy, grid)
    if chain.deterministic:
        return transport.evaluate(chain)
    solution = _solve(chain, resolution)
    lattice, mass = solution.lattices[-1], solution.mass(grid.steps)
    x = lattice.nodes()
    terminal = plane_terminal(x, mass, x.reshape(*lattice.shape, 2), solution.density[-1])
    return plane_truth(chain, float(mass @ problem.reward.value(x)), solution.gap2, terminal,
                       lambda: _terminal_kl(solution), lambda: _gradient(solution))


def value(problem: Problem, policy: Policy, grid: TimeGrid, resolution: float | None = None) -> Value:
    r"""The value function of a policy on a chain in the plane, at any state, by one more integral.

        V_i(x) = -lambda kappa_i D_i |mu - s|^2 + e^{-rho D_i} int N(y; m_i(x), R_i) V_{i+1}(y) dy,    V_N = r
        grad V_i(x) = -d cost/dx + e^{-rho D_i} (dm_i/dx)' F_i^{-T} E[V_{i+1}(X_{i+1}) xi]                (Stein)

    (+ gamma D H - lambda kappa D tr Sigma for sampled actions.) Good to 1e-8 within 6 standard deviations of the policy's chain;
    well beyond them a ValueError says so. Without noise V follows the path from x, and grad V its adjoint.
    Source: theory.md, section 5.   Checked: tests/test_plane.py::test_value_against_the_chain
    """
    chain = plane_chain(problem, policy, grid)
    return transport.TransportValue(chain) if chain.deterministic else _KernelValue(chain, _solve(chain, resolution))


def advantage(problem: Problem, policy: Policy, grid: TimeGrid) -> Advantage:
    r"""The advantage rate of a policy on a chain in the plane, closed form in the gradient of its value.

        q(t_i, x, a) = h (a - mu).grad V_i(x) - lambda kappa ( |a - s|^2 - |mu - s|^2 - tr Sigma )

    Reward units per time; (Q_i - V_i)/D - q = O(D).
    Source: theory.md, section 6.   Checked: tests/test_plane.py::test_advantage_is_centred_and_first_order
    """
    return Advantage(problem, policy, grid, value(problem, policy, grid))


def optimum(problem: Problem, grid: TimeGrid, resolution: float | None = None) -> PlaneOptimum:
    r"""The mean-shift optimum J* of a chain in the plane for any score and reward: smoothing, then a Moreau envelope, step by step.

        V*_i(x) = sup_y { e^{-rho D} E V*_{i+1}(y + eta g sqrt(D) xi) - lambda kappa |y - z|^2 / (h^2 D) },   z = x + D (-f x + h s(x))
        2 lambda kappa (a* - s)(x) = h e^{-rho D} E[ grad V*_{i+1}(X_{i+1}) | X_i = x ]      (stationarity)

    The supremum is global. Where its argument jumps V* has a kink, which the trapezoid rule resolves to second order only: `ties` counts
    such nodes, and J* is good to 1e-8 where they carry no mass. `truth` runs the policy by `evaluate`: what it falls short of J* is second
    order in the policy's error, and an independent check.
    Needs eta > 0, kl_weight > 0 and entropy_weight = 0; ValueError where the optimal chain has no bound.
    Source: theory.md, section 9 (i).   Checked: tests/test_plane.py::test_optimum_of_products_of_lines
    """
    problem.require_path_kl()
    if problem.kl_weight == 0:
        raise ValueError("kl_weight: expected a positive weight (the optimum is unbounded without a penalty), got 0")
    if problem.entropy_weight > 0:
        raise ValueError(f"entropy_weight: expected 0 for the optimum of mean actions in the plane, got {problem.entropy_weight:g}")
    chain = plane_chain(problem, problem.pretrained(grid), grid)
    plan = _plan(chain)
    for _ in range(GROWTHS):
        solution = _said(_smooth(_propagated(chain, plan, None))) if resolution is None else _propagated(chain, _Plan.over(plan.points), resolution)
        mass = tuple(p * lattice.area for p, lattice in zip(solution.density, solution.lattices, strict=True))
        out = plane_optimum.solve(chain, solution.lattices, mass, resolution is not None, evaluate)
        steered = PlaneChain(problem, out.policy, grid)
        if all(np.allclose(lattice.nearest(x), x) for lattice, x in zip(solution.lattices, steered.hull(ENOUGH), strict=True)):
            return out
        plan = plan._replace(points=np.concatenate([plan.points, steered.hull(WIDTH)], axis=1))
    raise ValueError(f"kl_weight: expected a weight large enough to bound the objective, got {problem.kl_weight:g} (the optimal chain still "
                     f"leaves the room of {GROWTHS} attempts)")


@dataclass(frozen=True, eq=False)
class Doob:
    r"""The Doob transform of the pre-trained chain by e^{r/lambda} in the plane: the optimum when whole kernels are free.

        phi_i(x) = E_pre[ e^{r(X_N)/lambda} | X_i = x ]
        objective = lambda E log phi_0(X_0),    path_kl = E*[r]/lambda - E log phi_0(X_0)

    objective : reward units      path_kl : nats      expected_reward : E*[r], start law unchanged
    Source: theory.md, section 9 (ii).   Checked: tests/test_plane.py::test_doob
    """

    problem: Problem
    grid: TimeGrid
    objective: float
    path_kl: float
    expected_reward: float
    chain: PlaneChain
    lattices: tuple[Lattice, ...]
    nodal: tuple[Array, ...]

    def log_phi(self, i: int, x: Array) -> Array:
        """log phi_i(x), (n, 2) -> (n,)."""
        x = states(self.chain, i, x, last=self.grid.steps)
        if i == self.grid.steps:
            return self.problem.reward.value(x) / self.problem.kl_weight
        _require(self.lattices[i], i, x)
        return log_expect(self.lattices[i + 1], self.nodal[i + 1], self.nodal[i + 1], self.chain.step(i, x)[0])[0]


def doob(problem: Problem, grid: TimeGrid) -> Doob:
    r"""Doob's transform of the pre-trained chain in the plane: phi, its objective and its path KL.

        phi_i(x) = int N(y; m_i(x), R_i) phi_{i+1}(y) dy,    phi_N = e^{r/lambda}      (in log space)

    Needs eta > 0, kl_weight > 0 and no discount. Lattices are refined until half of their nodes give E[phi] to 1e-5, and all 1e-10.
    Source: theory.md, section 9 (ii).   Checked: tests/test_plane.py::test_doob
    """
    chain = plane_chain(problem, problem.pretrained(grid), grid)
    require_doob(problem)
    plan = _plan(chain)
    for _ in range(6):
        if (out := _doob_on(chain, _propagated(chain, plan, None))) is not None:
            return out
        plan = plan.wider(1.25)
    raise ValueError("reward: expected e^(r / kl_weight) to be integrable under the pre-trained chain, got a tilted law that leaves "
                     f"{WIDTH * 1.25**5:.3g} standard deviations")


def _doob_on(chain: PlaneChain, solution: _Solution) -> Doob | None:
    """Backward through every step, each lattice refined until it is fine enough for phi; None where a tilted law meets an edge."""
    problem, steps, lattices = chain.problem, chain.grid.steps, list(solution.lattices)
    end = _reward_on(problem, lattices[steps])
    nodal, carried = {steps: end / problem.kl_weight}, {steps: end}

    def on(i: int, lattice: Lattice) -> Array:
        """log phi_i and E*[r | X_i] on a lattice, into nodal and carried; what half of the nodes that gave them miss, (n, 2)."""
        if i == steps:
            carried[i] = _reward_on(problem, lattice)
            nodal[i] = carried[i] / problem.kl_weight
            return np.zeros((lattice.size, 2))
        log_phi, reward, missed = log_expect(lattices[i + 1], nodal[i + 1], carried[i + 1], chain.step(i, lattice.nodes())[0])
        nodal[i], carried[i] = log_phi.reshape(lattice.shape), reward.reshape(lattice.shape)
        return missed

    for i in reversed(range(steps)):
        while True:
            missed = on(i, lattices[i])
            with np.errstate(divide="ignore"):
                tilted = np.log(solution.density[i]) + nodal[i]
            tilted = np.exp(tilted - np.max(tilted))
            error = tilted.ravel() @ missed / tilted.sum()
            if np.max(error) <= ALIASING:
                break
            lattices[i + 1] = finer = lattices[i + 1].finer(shrink(error, ALIASING))
            if finer.size > MOST or lattices[i].size * finer.window(LOG_REACH) > MOST_VISITS:
                raise ValueError(f"reward: expected e^(r / kl_weight) smooth enough for {MOST_VISITS:g} visits of nodes in step {i}, got one of "
                                 f"which half of the nodes miss {np.max(error):.1g} (raise kl_weight, smooth the reward, or use more steps)")
            on(i + 1, lattices[i + 1])
        if not _within(tilted):
            return None
    start = solution.mass(0)
    log_phi, expected = float(start @ nodal[0].ravel()), float(start @ carried[0].ravel())
    return Doob(problem, chain.grid, problem.kl_weight * log_phi, expected / problem.kl_weight - log_phi, expected, chain, tuple(lattices),
                tuple(nodal[i] for i in range(steps + 1)))


# ---- the law of the chain --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Solution:
    """The law of the chain, on a lattice for every time: what every verb reads from."""

    chain: PlaneChain
    lattices: tuple[Lattice, ...]  # N + 1
    density: tuple[Array, ...]  # N + 1, (n1, n2)
    gap2: Array  # (N,), E |mu - s|^2
    missed: Array  # (N, 2), what every other row, or column, of nodes misses
    source: Source  # of the last step
    rough: float = 0.0  # what half of the last nodes miss of E r, relative, where lattices were refined for it

    def mass(self, i: int) -> Array:
        """Probabilities of the nodes, (n,)."""
        return self.density[i].ravel() * self.lattices[i].area

    @property
    def contained(self) -> bool:
        """Is next to no mass near an edge, at any time?"""
        return all(_within(p) for p in self.density)

    def backward(self) -> Iterator[tuple[int, Array, Array, Array]]:
        """From the last step on: i, V_i on the nodes (n1, n2), E[grad V_{i+1}(X_{i+1}) | X_i = node] (n, 2), mu - s (n, 2)."""
        chain, steps = self.chain, self.chain.grid.steps
        values = _reward_on(chain.problem, self.lattices[steps])
        for i in reversed(range(steps)):
            following = self.lattices[i + 1]
            centre, gap = chain.step(i, self.lattices[i].nodes())
            moments = expect(following, values, centre, UNIT)
            values = (chain.decay(i) * moments[:, 0] + chain.bonus[i] - chain.cost(i, gap)).reshape(self.lattices[i].shape)
            yield i, values, moments[:, 1:] @ np.linalg.inv(following.frame), gap

    @cached_property
    def values(self) -> tuple[Array, ...]:
        """V_i on the nodes, N + 1 of (n1, n2)."""
        out = [_reward_on(self.chain.problem, self.lattices[-1]), *(v for _, v, _, _ in self.backward())]
        return tuple(reversed(out))


def _within(p: Array) -> bool:
    """Is a density (n1, n2) next to nothing at the edges of its lattice?"""
    return bool(max(np.max(edge) for edge in (p[0], p[-1], p[:, 0], p[:, -1])) < EDGE_DENSITY * np.max(p))


def _require(lattice: Lattice, i: int, x: Array) -> None:
    """ValueError for states from which the chain could notice that the lattice ends."""
    half = 0.5 * (np.array(lattice.shape) - 1)
    off = np.max(np.abs(lattice.place(x) / half - 1), axis=1, initial=0.0)
    if np.any(off > TRUSTED / WIDTH):
        centre, worst = lattice.frame @ (lattice.low + half * lattice.step), x[np.argmax(off)]
        raise ValueError(f"x: expected states near ({centre[0]:.4g}, {centre[1]:.4g}) at step {i} (the chain's tails, with room for what "
                         f"follows), got ({worst[0]:.4g}, {worst[1]:.4g}), {np.max(off) * WIDTH / TRUSTED:.3g} times as far as is known")


def _reward_on(problem: Problem, lattice: Lattice) -> Array:
    return np.ascontiguousarray(problem.reward.value(lattice.nodes()).reshape(lattice.shape))


class _Plan(NamedTuple):
    """What the lattices must cover, (N + 1, n, 2), how fine they must at least be in their frames, (N + 1, 2), and kernels' reach, (N,)."""

    points: Array
    spacing: Array
    reach: Array

    @classmethod
    def over(cls, points: Array) -> _Plan:
        return cls(points, np.full((len(points), 2), np.inf), np.full(len(points) - 1, REACH))

    def wider(self, factor: float) -> _Plan:
        """By a factor about the middle."""
        middle = 0.5 * (self.points.max(axis=1, keepdims=True) + self.points.min(axis=1, keepdims=True))
        return self._replace(points=middle + factor * (self.points - middle))

    def lattice(self, chain: PlaneChain, i: int, resolution: float) -> Lattice:
        """For X_i: fine enough for the step that leads to it (at first, for the start law), and for the one that leaves it."""
        frame = chain.frames[max(i - 1, 0)]
        if i == 0:  # sqrt(2): the start law and the first step may be equally narrow
            inverse = np.linalg.inv(frame)
            precision = np.linalg.inv(inverse @ components(chain.problem.start_law)[1] @ inverse.T)
            widths = np.min(1 / np.sqrt(2 * np.diagonal(precision, axis1=1, axis2=2)), axis=0)
        elif i < chain.grid.steps:
            widths = 1 / np.linalg.norm(np.linalg.solve(chain.frames[i], frame), axis=0)
        else:
            widths = UNIT
        return Lattice.around(frame, self.points[i], np.minimum(np.minimum(1, widths) / resolution, self.spacing[i]))


def _affordable(chain: PlaneChain, lattice: Lattice, before: list[Lattice]) -> None:
    """ValueError for one more lattice that costs too much, given those of the times before."""
    visits = before[-1].size * lattice.window(REACH) if before else 0
    if lattice.size > MOST or sum(b.size for b in before) + lattice.size > MOST_TOGETHER or visits > MOST_VISITS:
        smallest = np.sqrt(np.min(np.sum(chain.frames**2, axis=1)))
        raise ValueError(f"grid: expected steps that {MOST} nodes resolve ({MOST_TOGETHER} for all steps, {MOST_VISITS:g} visits a step), got "
                         f"{chain.grid.steps} steps with noise down to {smallest:.3g}, which need a lattice of "
                         f"{lattice.shape[0]} x {lattice.shape[1]} (use fewer or longer steps, or a smoother policy)")


def _propagated(chain: PlaneChain, plan: _Plan, resolution: float | None) -> _Solution:
    """The law of the chain, one time after the other; a lattice that turns out too coarse for what follows is refined on the way."""
    steps, fineness = chain.grid.steps, resolution or RESOLUTION
    lattices: list[Lattice] = []
    densities, gap2, missed = [], np.empty(steps), np.empty((steps, 2))
    source: Source | None = None

    def law(lattice: Lattice) -> Array:
        """Density of the time that has been reached, on any lattice."""
        _affordable(chain, lattice, lattices)
        if source is None:
            return chain.start_density(lattice)
        return source.onto(lattice, reach=plan.reach[len(lattices) - 1]).sum(axis=(0, 1))

    lattice = plan.lattice(chain, 0, fineness)
    density = law(lattice)
    for i in range(steps):
        following = plan.lattice(chain, i + 1, fineness)
        _affordable(chain, following, [*lattices, lattice])
        while True:
            centre, gap = chain.step(i, lattice.nodes())
            mass = density * lattice.area
            squared = mass * np.sum(gap**2, axis=1).reshape(mass.shape)
            leaving = Source(mass, centre.reshape(*mass.shape, 2))
            parts = leaving.onto(following, reach=plan.reach[i])
            missed[i] = np.maximum(following.area * parity(parts), parity_of_sum(squared))
            if resolution is not None or np.max(missed[i]) <= ALIASING:
                break
            lattice = lattice.finer(shrink(missed[i], ALIASING))
            density = law(lattice)
        lattices.append(lattice)
        densities.append(density)
        gap2[i], source = squared.sum(), leaving
        lattice, density = following, parts.sum(axis=(0, 1))
    assert source is not None
    return _Solution(chain, (*lattices, lattice), (*densities, density), gap2, missed, source)


def _smooth(solution: _Solution) -> _Solution:
    """The last lattice refined until the reward is smooth on it, or nodes run out."""
    chain, lattice, density = solution.chain, solution.lattices[-1], solution.density[-1]
    before = sum(other.size for other in solution.lattices[:-1])
    while np.max(error := parity_of_sum(density * _reward_on(chain.problem, lattice))) > ALIASING:
        finer = lattice.finer(shrink(error, ALIASING))
        visits = solution.lattices[-2].size * finer.window(REACH)
        if finer.size > MOST_FOR_REWARD or before + finer.size > MOST_TOGETHER or visits > MOST_VISITS:
            break
        lattice, density = finer, solution.source.onto(finer).sum(axis=(0, 1))
    return replace(solution, lattices=(*solution.lattices[:-1], lattice), density=(*solution.density[:-1], density), rough=float(np.max(error)))


def _said(solution: _Solution) -> _Solution:
    """The solution, with a warning where the reward is not smooth on its last lattice."""
    if solution.rough > ALIASING:
        n1, n2 = solution.lattices[-1].shape
        warnings.warn(f"reward: not smooth on {n1} x {n2} nodes; expectations are off by up to {solution.rough:.1g}, relative",
                      RuntimeWarning, stacklevel=5)
    return solution


def _plan(chain: PlaneChain) -> _Plan:
    """Room for the chain, the pre-trained chain and 6 trusted standard deviations, and spacings, by a look at a coarse solution."""
    width, pre = WIDTH, chain.pretrained.hull(WIDTH)
    while True:
        plan = _Plan.over(np.concatenate([chain.hull(width), pre], axis=1))
        coarse = _propagated(chain, plan, COARSE)
        if coarse.contained:
            break
        if width > 3 * WIDTH:
            raise ValueError("policy: expected a chain whose density falls like a Gaussian, got some still near the edge at "
                             f"{width:.3g} standard deviations")
        width *= 1.25
    corners = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * 6 * WIDTH / TRUSTED
    boxes, spacing = np.empty((len(plan.points), 4, 2)), plan.spacing.copy()
    for i, lattice in enumerate(coarse.lattices):
        z, mass = lattice.nodes() @ np.linalg.inv(lattice.frame).T, coarse.mass(i) / coarse.mass(i).sum()
        mean = mass @ z
        boxes[i] = (mean + corners * np.sqrt(mass @ (z - mean) ** 2)) @ lattice.frame.T
        if i < len(coarse.missed):
            spacing[i] = lattice.step * np.where(coarse.missed[i] > ALIASING, shrink(coarse.missed[i], ALIASING), np.inf)
    return plan._replace(points=np.concatenate([plan.points, boxes], axis=1), spacing=spacing)


def _solve(chain: PlaneChain, resolution: float | None) -> _Solution:
    return _said(_solved(chain, None if resolution is None else check.number("resolution", resolution, at_least=0.25)))


@lru_cache(maxsize=2)
def _solved(chain: PlaneChain, resolution: float | None) -> _Solution:
    """Cached by identity: truth and value of a chain are asked for one after the other."""
    if resolution is None:
        return _smooth(_propagated(chain, _plan(chain), None))
    return _propagated(chain, _Plan.over(_plan(chain).points), resolution)


# ---- what evaluate and value are made of -----------------------------------------------------------------------------


def _gradient(solution: _Solution) -> ExactGradient:
    chain, c, out = solution.chain, solution.chain.c, Pullback(solution.chain)
    for i, _, slopes, gap in solution.backward():
        u = c.h[i] * chain.decay(i) * slopes - 2 * chain.problem.kl_weight * c.kappa[i] * gap
        mass = solution.mass(i)
        keep = mass > 1e-25
        out.add(i, solution.lattices[i].nodes()[keep], (c.discount[i] * c.dt[i] * mass[:, None] * u)[keep])
    return out.gradient()


def _terminal_kl(solution: _Solution) -> float:
    """int p log(p/q) over the nodes where p counts; q the terminal density of the pre-trained chain."""
    lattice, p = solution.lattices[-1], solution.density[-1].ravel()
    keep = p > 1e-13 * np.max(p)  # of a Gaussian, 1e-13 is left out
    x, p = lattice.nodes()[keep], p[keep]
    pre = solution.chain.pretrained
    log_q = transport.log_pushed(pre, x) if pre.deterministic else _log_pretrained(pre, lattice, x)[keep]
    if not np.all(np.isfinite(log_q)):
        raise ValueError("policy: expected a terminal law within 35 standard deviations of the pre-trained one, got "
                         "one where its density underflows")
    return float(lattice.area * np.sum(p * (np.log(p) - log_q)))


def _log_pretrained(pre: PlaneChain, lattice: Lattice, likely: Array) -> Array:
    """log of the pre-trained chain's terminal density at the nodes of a lattice, (n,), good at the likely ones."""
    hull, u = pre.hull(1.0), directions()
    centre = 0.5 * (hull.max(axis=1) + hull.min(axis=1))
    # how many deviations of the pre-trained chain the policy's law reaches: paths that end there need that much room,
    # and the steps that lead there are tilted by at most their share of it
    z = max(float(np.max((likely - centre[-1]) @ d)) / float((at - centre[-1]) @ d) for d, at in zip(u, hull[-1], strict=True))
    share = pre.c.noise / np.linalg.norm(hull - centre[:, None], axis=2).min(axis=1)[1:]
    plan = _Plan.over(pre.hull(max(WIDTH, math.hypot(7.0, z))))._replace(reach=REACH + z * share)
    source = _propagated(pre, plan, None).source
    # a given step of the pre-trained chain leaves noise eta g sqrt(D), isotropic: a product in any of these frames
    sd = pre.c.noise[-1] / np.linalg.norm(lattice.frame, axis=0)
    with np.errstate(divide="ignore"):
        return np.log(source.onto(lattice, sd, float(plan.reach[-1])).sum(axis=(0, 1))).ravel()


@dataclass(frozen=True, eq=False)
class _KernelValue(Value):
    """V through the kernel; see `value`."""

    chain: PlaneChain
    solution: _Solution

    def _moments(self, i: int, centre: Array, sd: Array = UNIT) -> Array:
        """E[V_{i+1}], E[V_{i+1} xi], (n, 3), around the given centres."""
        return expect(self.solution.lattices[i + 1], self.solution.values[i + 1], centre, sd)

    def __call__(self, i: int, x: Array) -> Array:
        chain, x = self.chain, states(self.chain, i, x, last=self.chain.grid.steps)
        if i == chain.grid.steps:
            return chain.problem.reward.value(x)
        _require(self.solution.lattices[i], i, x)
        centre, gap = chain.step(i, x)
        return chain.decay(i) * self._moments(i, centre)[:, 0] + chain.bonus[i] - chain.cost(i, gap)

    def gradient(self, i: int, x: Array) -> Array:
        chain, x = self.chain, states(self.chain, i, x, last=self.chain.grid.steps)
        if i == chain.grid.steps:
            return chain.problem.reward.gradient(x)
        _require(self.solution.lattices[i], i, x)
        centre, gap = chain.step(i, x)
        slopes = self._moments(i, centre)[:, 1:] @ np.linalg.inv(chain.frames[i])
        return back(chain, i, x, gap, slopes)

    def action_value(self, i: int, x: Array, a: Array) -> Array:
        chain, lattice = self.chain, self.solution.lattices[i + 1]
        x, a = states(chain, i, x, last=chain.grid.steps - 1), check.points("a", a, 2)
        centre, cost = chain.moved(i, x, a), chain.cost(i, a - chain.score(i, x))
        _require(lattice, i + 1, centre)
        sd = chain.c.noise[i] / np.linalg.norm(chain.frames[i], axis=0)
        if i + 1 < chain.grid.steps and np.all(sd >= lattice.step):
            return chain.decay(i) * self._moments(i, centre, sd)[:, 0] - cost
        # r is known itself, and an action given may leave less noise than the lattice resolves: V_{i+1} at the nodes of a rule
        xi = np.linspace(-6.4, 6.4, 65) if chain.c.noise[i] > 0 else np.zeros(1)
        weight = np.exp(-0.5 * xi**2)
        noise = chain.c.noise[i] * np.stack(np.broadcast_arrays(xi[:, None], xi), axis=-1).reshape(-1, 2)
        nodes = (centre[:, None] + noise).reshape(-1, 2)
        weights = np.outer(weight, weight).ravel() / weight.sum() ** 2
        return chain.decay(i) * self(i + 1, nodes).reshape(len(x), -1) @ weights - cost
