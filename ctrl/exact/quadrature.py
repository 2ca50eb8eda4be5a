r"""Truth in one dimension for any score, policy and reward, without sampling (theory.md, sections 1, 5, 7 and 9).

    X_{i+1} | X_i = x  ~  N( m_i(x), s_i^2 ),    m_i(x) = x + D (-f x + h mu(x)),    s_i^2 = eta^2 g^2 D + (h D)^2 Sigma

The density goes forward and the values go backward through the same kernel, by the trapezoid rule on a uniform lattice
for each time (low, low + dx, ...): for smooth integrands its error is about exp(-2 pi^2 (s/dx)^2), 5e-20 at s = 1.5 dx.
Nothing is interpolated: V_i at any x is one more integral. Without any noise (eta = 0, no exploration) points of the
start law are transported instead (`transport`).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numba import njit, prange

from ctrl import check
from ctrl.check import Array
from ctrl.exact import line_optimum, transport
from ctrl.exact.lattice import shrink
from ctrl.exact.line import WIDTH, LineChain, as_gradient, components, line_chain, line_terminal, line_truth
from ctrl.exact.line_optimum import LineOptimum as LineOptimum
from ctrl.exact.linear_doob import require_doob
from ctrl.exact.truth import Advantage, ExactGradient, Terminal, Truth, Value
from ctrl.policy import Policy
from ctrl.problem import Problem
from ctrl.schedule import TimeGrid

TRUSTED = 7.5  # V is asked for inside this many: given a state at 7.5, the edge at 11 is 8 deviations away
REACH = 9.5  # half-width of the kernel, in standard deviations of one step: exp(-45) is beyond
FAR_REACH = 38.0  # ... in log space, where exp(-38^2/2) is the smallest normal number
PLAIN = 600.0  # range of log phi within which phi itself can be summed
RESOLUTION = 1.5  # spacings per standard deviation of one step, at least
FEWEST, MOST = 551, 16001  # points of a lattice, when chosen here
EDGE_DENSITY = 1e-20  # of the peak
ALIASING = 1e-6  # what half of the nodes may miss, so that all of them miss about 1e-12
LARGE = 4_000_000  # weights: below, waking other threads costs more than it saves
SMOOTH, ROUGH = 1e-11, 1e-8  # what half of the nodes may miss of E r, relative: as it should be, and where a warning says so
BLOCKS = 16  # of sources in the forward kernel: fixed, so that sums do not depend on the number of threads


# ---- kernels ---------------------------------------------------------------------------------------------------------


def _table(reach: float, ratio: float) -> Array:
    """exp(-(k ratio)^2/2) for k = 0 ... up to `reach` standard deviations."""
    return np.exp(-0.5 * (np.arange(math.ceil(reach / ratio) + 2) * ratio) ** 2)


def _expect(centre: Array, s: float, low: float, dx: float, values: Array, reach: float = REACH) -> tuple[Array, Array]:
    """E[V(m + s xi)] and E[V(m + s xi) xi] for every centre m, V given on low + dx (0, 1, ...)."""
    table, out = _table(reach, dx / s), np.empty((centre.size, 2))
    loop = _gather_parallel if centre.size * min(table.size, values.size) > LARGE else _gather
    loop((centre - low) / dx, dx / s, table, values, out)
    return out[:, 0], out[:, 1]


@njit(cache=True, error_model="numpy")
def _gather_row(place: float, ratio: float, table: Array, values: Array) -> tuple[float, float]:
    r"""With c the node nearest to m, frac = (m - y_c)/dx and ratio = dx/s, the weight of node c + k splits into

        exp(-xi^2/2) = exp(-(frac ratio)^2/2) T_k rho^k,     T_k = exp(-(k ratio)^2/2), a table,     rho = exp(frac ratio^2)
    """
    n = values.size
    if not (place > -0.5 and place < n - 0.5):
        return 0.0, 0.0
    c = math.floor(place + 0.5)
    frac = place - c
    rho = math.exp(frac * ratio * ratio)
    total, moment = values[c], -frac * values[c]
    power = 1.0
    for k in range(1, min(table.size, n - c)):
        power *= rho
        term = table[k] * power * values[c + k]
        total += term
        moment += (k - frac) * term
    rho, power = 1.0 / rho, 1.0
    for k in range(1, min(table.size, c + 1)):
        power *= rho
        term = table[k] * power * values[c - k]
        total += term
        moment -= (k + frac) * term
    scale = ratio / math.sqrt(2 * math.pi) * math.exp(-0.5 * (frac * ratio) ** 2)
    return scale * total, scale * ratio * moment


@njit(cache=True, error_model="numpy")
def _gather(place: Array, ratio: float, table: Array, values: Array, out: Array) -> None:
    for j in range(place.size):
        out[j, 0], out[j, 1] = _gather_row(place[j], ratio, table, values)


@njit(cache=True, parallel=True, error_model="numpy")
def _gather_parallel(place: Array, ratio: float, table: Array, values: Array, out: Array) -> None:
    for j in prange(place.size):
        out[j, 0], out[j, 1] = _gather_row(place[j], ratio, table, values)


def _spread(mass: Array, centre: Array, s: float, low: float, dx: float, n: int, reach: float) -> Array:
    """Density sum_j mass_j N(y; centre_j, s^2) at y = low + dx (0, ..., n - 1): the transpose of `_expect`."""
    table, parts = _table(reach, dx / s), np.zeros((BLOCKS, n))
    loop = _scatter_parallel if centre.size * min(table.size, n) > LARGE else _scatter
    loop(mass / (s * math.sqrt(2 * math.pi)), (centre - low) / dx, dx / s, table, parts)
    return parts.sum(axis=0)


@njit(cache=True, error_model="numpy")
def _scatter_rows(first: int, last: int, mass: Array, place: Array, ratio: float, table: Array, out: Array) -> None:
    """out += the weights of `_gather_row`, times mass, for the sources first ... last - 1."""
    n = out.size
    for j in range(first, last):
        if mass[j] > 0 and place[j] > -0.5 and place[j] < n - 0.5:
            c = math.floor(place[j] + 0.5)
            frac = place[j] - c
            rho = math.exp(frac * ratio * ratio)
            weight = mass[j] * math.exp(-0.5 * (frac * ratio) ** 2)
            out[c] += weight
            power = weight
            for k in range(1, min(table.size, n - c)):
                power *= rho
                out[c + k] += table[k] * power
            rho, power = 1.0 / rho, weight
            for k in range(1, min(table.size, c + 1)):
                power *= rho
                out[c - k] += table[k] * power


@njit(cache=True, error_model="numpy")
def _scatter(mass: Array, place: Array, ratio: float, table: Array, parts: Array) -> None:
    for b in range(BLOCKS):
        _scatter_rows(b * mass.size // BLOCKS, (b + 1) * mass.size // BLOCKS, mass, place, ratio, table, parts[b])


@njit(cache=True, parallel=True, error_model="numpy")
def _scatter_parallel(mass: Array, place: Array, ratio: float, table: Array, parts: Array) -> None:
    for b in prange(BLOCKS):
        _scatter_rows(b * mass.size // BLOCKS, (b + 1) * mass.size // BLOCKS, mass, place, ratio, table, parts[b])


def _log_expect(centre: Array, s: float, low: float, dx: float, log_phi: Array, carried: Array) -> tuple[Array, Array]:
    """log E[phi(m + s xi)] and E[phi R] / E[phi] for every centre m, log phi and R given on a lattice."""
    steepest = s / dx * float(np.max(np.abs(np.diff(log_phi)), initial=0.0))
    reach, top = steepest + math.hypot(steepest, REACH), float(np.max(log_phi))
    if reach < FAR_REACH and top - np.min(log_phi) < PLAIN:  # no term can underflow that counts
        phi = np.exp(log_phi - top)
        total, moment = (_expect(centre, s, low, dx, values, reach)[0] for values in (phi, phi * carried))
        return top + np.log(total), moment / total
    out = np.empty((centre.size, 2))
    _log_gather((centre - low) / dx, dx / s, log_phi, carried, out)
    return out[:, 0] + math.log(dx / s / math.sqrt(2 * math.pi)), out[:, 1]


@njit(cache=True, parallel=True, error_model="numpy")
def _log_gather(place: Array, ratio: float, log_phi: Array, carried: Array, out: Array) -> None:
    n, reach = log_phi.size, FAR_REACH / ratio
    for j in prange(place.size):
        first = math.ceil(max(0.0, min(place[j] - reach, float(n))))
        last = math.floor(min(n - 1.0, max(place[j] + reach, -1.0)))
        top = -np.inf
        for k in range(first, last + 1):
            top = max(top, log_phi[k] - 0.5 * ((k - place[j]) * ratio) ** 2)
        out[j, 0], out[j, 1] = -np.inf, 0.0
        if top > -np.inf:
            total, moment = 0.0, 0.0
            for k in range(first, last + 1):
                weight = math.exp(log_phi[k] - 0.5 * ((k - place[j]) * ratio) ** 2 - top)
                total += weight
                moment += weight * carried[k]
            out[j, 0], out[j, 1] = top + math.log(total), moment / total


class _Lattice(NamedTuple):
    """Uniform nodes for every time: low_i + dx_i (0, ..., n - 1); dx from the ends, never from differences of nodes."""

    low: Array
    dx: Array
    n: int

    def nodes(self, i: int) -> Array:
        return self.low[i] + self.dx[i] * np.arange(self.n)

    def require(self, i: int, x: Array) -> None:
        """ValueError for states from which the chain could notice that the lattice ends."""
        half = 0.5 * (self.n - 1) * self.dx[i]
        middle, room = self.low[i] + half, TRUSTED / WIDTH * half
        off = np.abs(x - middle)
        if np.any(off > room):
            raise ValueError(f"x: expected states in [{middle - room:.4g}, {middle + room:.4g}] at step {i} "
                             f"(the chain's tails, with room for what follows), got {x[np.argmax(off)]:.4g}")


@dataclass(frozen=True, eq=False)
class _Solution:
    """The law of the chain on a lattice, and on demand its values: what every verb reads from."""

    chain: LineChain
    lattice: _Lattice
    density: Array  # (N + 1, n)
    centre: Array  # (N, n)
    gap: Array  # (N, n), mu - s
    aliasing: float  # largest change of a density when every other node is dropped; with all nodes about its square

    def mass(self, i: int) -> Array:
        return self.density[i] * self.lattice.dx[i]

    @cached_property
    def values(self) -> tuple[Array, Array]:
        """V_i on the nodes, (N + 1, n), and E[grad V_{i+1}(X_{i+1}) | X_i = node], (N, n), by Stein's lemma."""
        chain, lattice, steps = self.chain, self.lattice, self.chain.grid.steps
        values, slopes = np.empty_like(self.density), np.empty_like(self.centre)
        values[steps] = chain.problem.reward.value(lattice.nodes(steps)[:, None])
        for i in reversed(range(steps)):
            low, dx = lattice.low[i + 1], lattice.dx[i + 1]
            plain, moment = _expect(self.centre[i], chain.s[i], low, dx, values[i + 1])
            values[i] = chain.decay(i) * plain + chain.bonus[i] - chain.cost(i, self.gap[i])
            slopes[i] = moment / chain.s[i]
        return values, slopes


# ---- choosing the lattice --------------------------------------------------------------------------------------------


def _needed(chain: LineChain, low: Array, high: Array) -> int:
    """Points so that every step's noise, and the start law, is at least RESOLUTION spacings wide at both its ends."""
    span = high - low
    # sqrt(2): the start law may meet a kernel as narrow as itself
    start = math.sqrt(2) * span[0] / np.min(components(chain.problem.start_law)[1])
    return 1 + math.ceil(RESOLUTION * max(start, np.max(np.maximum(span[1:], span[:-1]) / chain.s)))


def _propagated(chain: LineChain, lattice: _Lattice, reach: float = REACH) -> _Solution:
    steps, n = chain.grid.steps, lattice.n
    density, centre, gap = np.empty((steps + 1, n)), np.empty((steps, n)), np.empty((steps, n))
    aliasing = 0.0
    density[0] = chain.start_density(lattice.nodes(0))
    for i in range(steps):
        mass = density[i] * lattice.dx[i]
        centre[i], gap[i] = chain.step(i, lattice.nodes(i))
        s, low, dx = chain.s[i], lattice.low[i + 1], lattice.dx[i + 1]
        even, odd = (_spread(mass[j::2], centre[i, j::2], s, low, dx, n, reach) for j in (0, 1))
        density[i + 1] = even + odd
        aliasing = max(aliasing, dx * float(np.sum(np.abs(even - odd))))
    return _Solution(chain, lattice, density, centre, gap, aliasing)


def _contained(solution: _Solution) -> bool:
    """Is no mass lost, and next to none near an edge, at any time?"""
    p, dx = solution.density, solution.lattice.dx
    lost = np.abs(p.sum(axis=1) * dx - 1)
    return bool(np.all(lost < 1e-11) and np.all(np.maximum(p[:, 0], p[:, -1]) < EDGE_DENSITY * np.max(p, axis=1)))


def _roughness(solution: _Solution) -> float:
    """Relative change of E r(X_N) when every other node is dropped: large when the reward is not smooth on them."""
    steps = solution.chain.grid.steps
    terms = solution.mass(steps) * solution.chain.problem.reward.value(solution.lattice.nodes(steps)[:, None])
    return float(abs(terms.sum() - 2 * terms[::2].sum()) / max(np.abs(terms).sum(), 1e-300))


def _refuse(chain: LineChain, need: int, points: int | None) -> None:
    smallest = np.min(chain.s)
    if points is not None:
        raise ValueError(f"points: expected at least {need} (to resolve each step's noise, {smallest:.3g} at its "
                         f"smallest, and the policy's turns), got {points}")
    raise ValueError(f"grid: expected steps that at most {MOST} points resolve, got {chain.grid.steps} steps with "
                     f"noise down to {smallest:.3g}, which need {need} (use fewer or longer steps, or give points)")


def _solve(chain: LineChain, points: int | None, hull: tuple[Array, Array] | None = None, width: float = WIDTH,
           reach: float = REACH, fewest: int = FEWEST) -> _Solution:
    """The law on a lattice just wide and fine enough for it; `hull` asks for at least that much room, `fewest` for that many points."""
    n = fewest if points is None else check.integer("points", points, at_least=3)
    while True:
        low, high = chain.edges(width)
        if hull is not None:
            low, high = np.minimum(low, hull[0]), np.maximum(high, hull[1])
        need = _needed(chain, low, high)
        if need <= n:
            solution = _propagated(chain, _Lattice(low, (high - low) / (n - 1), n), reach)
            if not _contained(solution):
                if width > 3 * WIDTH:
                    raise ValueError("policy: expected a chain whose density falls like a Gaussian, got some still "
                                     f"near the edge at {width:.3g} standard deviations")
                width *= 1.25
                continue
            if solution.aliasing < (ALIASING if points is None else 20 * ALIASING):
                return solution
            # a score that turns sharply, between components, asks for more than the noise does
            need = 1 + math.ceil((n - 1) / float(shrink(np.array(solution.aliasing), ALIASING)))
        if points is not None or need > MOST:
            _refuse(chain, need, points)
        n = need + (need + 1) % 2


def _smooth(solution: _Solution, points: int | None) -> _Solution:
    """Refined until the reward is smooth on the lattice, or points run out."""
    while _roughness(solution) > SMOOTH:
        lattice = solution.lattice
        finer = 2 * lattice.n - 1
        if points is not None or finer > MOST:
            break
        solution = _propagated(solution.chain, _Lattice(lattice.low, lattice.dx / 2, finer))
    return solution


def _said(solution: _Solution) -> _Solution:
    """The solution, with a warning where the reward is not smooth on its lattice."""
    if (rough := _roughness(solution)) > ROUGH:
        warnings.warn(f"reward: not smooth on {solution.lattice.n} points; expectations are off by up to {rough:.1g}, relative",
                      RuntimeWarning, stacklevel=4)
    return solution


def _with_room(chain: LineChain, points: int | None) -> _Solution:
    """Solved on a lattice that also covers the pre-trained chain, and can be trusted within 6 standard deviations."""
    return _said(_roomy(chain, None if points is None else check.integer("points", points, at_least=3)))


@lru_cache(maxsize=4)
def _roomy(chain: LineChain, points: int | None) -> _Solution:
    """Cached by identity: truth, value and marginals of a chain are asked for one after the other."""
    solution = _solve(chain, points, hull=chain.pretrained.edges(WIDTH))
    lattice, p = solution.lattice, solution.density * solution.lattice.dx[:, None]
    x = np.stack([lattice.nodes(i) for i in range(chain.grid.steps + 1)])
    mean = np.sum(p * x, axis=1)
    half = 6 * WIDTH / TRUSTED * np.sqrt(np.sum(p * (x - mean[:, None]) ** 2, axis=1))  # of several modes, too
    low, high = np.minimum(x[:, 0], mean - half), np.maximum(x[:, -1], mean + half)
    if np.any(low < x[:, 0]) or np.any(high > x[:, -1]):
        solution = _solve(chain, points, hull=(low, high), fewest=lattice.n)
    return _smooth(solution, points)


# ---- public verbs ----------------------------------------------------------------------------------------------------


def evaluate(problem: Problem, policy: Policy, grid: TimeGrid, points: int | None = None) -> Truth:
    r"""Objective, its parts, the terminal law and the gradient of a 1-D chain, for any score, policy and reward.

        p_{i+1}(y) = int p_i(x) N(y; m_i(x), s_i^2) dx,
        J = e^{-rho T} int p_N r - lambda sum e^{-rho t_i} kappa_i D_i E|a_i - s_i|^2,
        grad J = sum_i e^{-rho t_i} D_i E[ (d mu_i)'( h_i e^{-rho D_i} E[V_{i+1}(X_{i+1}) xi | X_i]/s_i
                                                      - 2 lambda kappa_i (mu_i - s_i) ) ]

    points : nodes of the lattice; chosen when None (at most 16001)      terminal.points, terminal.density : (n,)
    Assumes a reward that is smooth on the lattice (else a RuntimeWarning says how far off) and a density with Gaussian
    tails. Error: below 1e-10 relative, from truncation and aliasing; none from the step size, the chain is the object.
    Without noise (eta = 0, mean actions) start points are transported, on panels that are halved until nothing changes
    (so that jumps do no harm); the density follows by change of variables.
    Source: theory.md, sections 1 and 7.   Checked: tests/test_quadrature.py::test_reference_numbers
    """
    chain = line_chain(problem, policy, grid)
    if chain.deterministic:
        return transport.evaluate(chain, points)
    solution = _with_room(chain, points)
    n, x = grid.steps, solution.lattice.nodes(grid.steps)
    mass = solution.mass(n)
    gap2 = np.array([solution.mass(i) @ solution.gap[i] ** 2 for i in range(n)])
    reward = float(mass @ problem.reward.value(x[:, None]))
    return line_truth(chain, reward, gap2, line_terminal(x, mass, solution.density[n]),
                  lambda: _terminal_kl(solution), lambda: _gradient(solution))


def value(problem: Problem, policy: Policy, grid: TimeGrid, points: int | None = None) -> Value:
    r"""The value function of a policy on a 1-D chain, at any state, by one more integral.

        V_i(x) = -lambda kappa_i D_i |mu - s|^2 + e^{-rho D_i} int N(y; m_i(x), s_i^2) V_{i+1}(y) dy,    V_N = r
        V_i'(x) = -d cost/dx + e^{-rho D_i} m_i'(x) E[V_{i+1}(X_{i+1}) xi]/s_i                            (Stein)

    (+ gamma D H - lambda kappa D tr Sigma for sampled actions.) Good to 1e-10 within 6 standard deviations of the
    policy's chain; well beyond them a ValueError says so. Without noise V follows the path from x, and V' its adjoint.
    Source: theory.md, section 5.   Checked: tests/test_quadrature.py::test_value_against_dense_recursion
    """
    chain = line_chain(problem, policy, grid)
    return transport.TransportValue(chain) if chain.deterministic else _KernelValue(_with_room(chain, points))


def marginals(problem: Problem, policy: Policy, grid: TimeGrid, points: int | None = None) -> tuple[Terminal, ...]:
    r"""The laws of X_0 ... X_N of a 1-D chain, each with its density on a lattice of its own.

        p_{i+1}(y) = int p_i(x) N(y; m_i(x), s_i^2) dx

    points, density of each : (n,), evenly spaced, so that E F(X_i) = spacing * sum density F(points) to 1e-10 for a smooth F.
    ValueError without any noise, where X_i has no density of its own.
    Source: theory.md, section 1.   Checked: tests/test_theorem_performance_difference.py::test_marginals_are_the_laws_of_shorter_chains
    """
    chain = line_chain(problem, policy, grid)
    if chain.deterministic:
        raise ValueError("eta: expected eta > 0 or a policy with exploration for densities on a lattice, got neither")
    solution = _with_room(chain, points)
    return tuple(line_terminal(solution.lattice.nodes(i), solution.mass(i), solution.density[i]) for i in range(grid.steps + 1))


def advantage(problem: Problem, policy: Policy, grid: TimeGrid) -> Advantage:
    r"""The advantage rate of a policy on a 1-D chain, closed form in the gradient of its value.

        q(t_i, x, a) = h (a - mu) V_i'(x) - lambda kappa ( |a - s|^2 - |mu - s|^2 - tr Sigma )

    Reward units per time; (Q_i - V_i)/D - q = O(D).
    Source: theory.md, section 6.   Checked: tests/test_quadrature.py::test_advantage_is_the_first_order_limit
    """
    return Advantage(problem, policy, grid, value(problem, policy, grid))


def optimum(problem: Problem, grid: TimeGrid) -> LineOptimum:
    r"""The mean-shift optimum J* of a 1-D chain for any score and reward: smoothing, then a Moreau envelope, step by step.

        V*_i(x) = sup_y { e^{-rho D} E V*_{i+1}(y + eta g sqrt(D) xi) - lambda kappa |y - z|^2 / (h^2 D) },   z = x + D (-f x + h s(x))
        2 lambda kappa (a* - s)(x) = h e^{-rho D} E[ V*_{i+1}'(X_{i+1}) | X_i = x ]      (stationarity)

    The supremum is global. Where its argument jumps V* has a kink and a* a jump ("double well with a hard optimum"): both are found to
    rounding and kept as ends of panels, so J*, E* r and the penalty stay good to 1e-12; `truth`, by another solver, needs eta = 0 or
    no jumps for that. With eta = 0 the same holds with a penalty and no smoothing.
    Needs kl_weight > 0 and entropy_weight = 0; ValueError where the objective has no bound. A reward with jumps costs digits (a
    RuntimeWarning says so when points run out).
    Source: theory.md, section 9 (i).   Checked: tests/test_line_optimum.py::test_reference_numbers
    """
    check.instance("problem", problem, Problem, "a ctrl.Problem")
    if problem.kl_weight == 0:
        raise ValueError("kl_weight: expected a positive weight (the optimum is unbounded without a penalty), got 0")
    if problem.entropy_weight > 0:
        raise ValueError(f"entropy_weight: expected 0 for the optimum of mean actions on the line, got {problem.entropy_weight:g}")
    chain = line_chain(problem, problem.pretrained(grid), grid)
    if np.any(chain.c.h == 0):
        raise ValueError(f"schedule: expected g > 0 at every step of the grid, got 0 at step {int(np.argmax(chain.c.h == 0))}")
    return line_optimum.solve(chain, evaluate)


@dataclass(frozen=True, eq=False)
class Doob:
    r"""The Doob transform of the pre-trained chain by e^{r/lambda}: the optimum when whole kernels are free.

        phi_i(x) = E_pre[ e^{r(X_N)/lambda} | X_i = x ]
        objective = lambda E log phi_0(X_0),    path_kl = E*[r]/lambda - E log phi_0(X_0)

    objective : reward units      path_kl : nats      expected_reward : E*[r], start law unchanged
    Source: theory.md, section 9 (ii).   Checked: tests/test_quadrature.py::test_doob
    """

    problem: Problem
    grid: TimeGrid
    objective: float
    path_kl: float
    expected_reward: float
    chain: LineChain
    lattice: _Lattice
    nodal: Array

    def log_phi(self, i: int, x: Array) -> Array:
        """log phi_i(x), (n, 1) -> (n,)."""
        y = check.points("x", x, 1)
        if i == self.grid.steps:
            return self.problem.reward.value(y) / self.problem.kl_weight
        centre, lattice = self.chain.centre(i, y[:, 0]), self.lattice
        lattice.require(i, y[:, 0])
        return _log_expect(centre, self.chain.s[i], lattice.low[i + 1], lattice.dx[i + 1], self.nodal[i + 1],
                           self.nodal[i + 1])[0]


def doob(problem: Problem, grid: TimeGrid) -> Doob:
    r"""Doob's transform of the pre-trained 1-D chain: phi, its objective and its path KL.

        phi_i(x) = int N(y; m_i(x), s_i^2) phi_{i+1}(y) dy,    phi_N = e^{r/lambda}      (in log space)

    Needs eta > 0, kl_weight > 0 and no discount. The lattice grows until the objective stands still to 1e-12.
    Source: theory.md, section 9 (ii).   Checked: tests/test_quadrature.py::test_doob
    """
    chain = line_chain(problem, problem.pretrained(grid), grid)
    require_doob(problem)
    width, last = WIDTH, np.inf
    for _ in range(8):
        out = _doob_on(chain, _said(_smooth(_solve(chain, None, width=width), None)))
        if abs(out.objective - last) <= 1e-12 * max(1.0, abs(out.objective)):
            return out
        width, last = 1.25 * width, out.objective
    raise ValueError("kl_weight: expected a weight large enough for e^(r / kl_weight) to be integrable under the pre-trained chain, got log "
                     f"phi that still moves at {width:.3g} standard deviations")


def _doob_on(chain: LineChain, solution: _Solution) -> Doob:
    problem, lattice, steps = chain.problem, solution.lattice, chain.grid.steps
    nodal = np.empty_like(solution.density)
    reward = problem.reward.value(lattice.nodes(steps)[:, None])
    nodal[steps] = reward / problem.kl_weight
    for i in reversed(range(steps)):
        nodal[i], reward = _log_expect(solution.centre[i], chain.s[i], lattice.low[i + 1], lattice.dx[i + 1],
                                       nodal[i + 1], reward)
    start = solution.mass(0)
    log_phi = float(start @ np.where(start > 0, nodal[0], 0.0))
    expected = float(start @ reward)
    return Doob(problem, chain.grid, problem.kl_weight * log_phi, expected / problem.kl_weight - log_phi, expected,
                chain, lattice, nodal)


# ---- what evaluate is made of ----------------------------------------------------------------------------------------


def _gradient(solution: _Solution) -> ExactGradient:
    chain, lattice = solution.chain, solution.lattice
    c, weight, slopes = chain.c, chain.problem.kl_weight, solution.values[1]
    per_node = np.zeros((lattice.n, chain.policy.theta.size))
    for i in range(chain.grid.steps):
        u = c.h[i] * chain.decay(i) * slopes[i] - 2 * weight * c.kappa[i] * solution.gap[i]
        u = u * (c.discount[i] * c.dt[i] * solution.mass(i))
        chain.policy.add_vjp(per_node, chain.grid, i, lattice.nodes(i)[:, None], u[:, None])
    return as_gradient(chain.policy, per_node.sum(axis=0))


def _terminal_kl(solution: _Solution) -> float:
    """int p log(p/q) over the nodes where p counts; q the terminal density of the pre-trained chain."""
    lattice, steps = solution.lattice, solution.chain.grid.steps
    p = solution.density[steps]
    keep = p > 1e-22 * np.max(p)
    log_q = _log_pretrained(solution, keep)
    if not np.all(np.isfinite(log_q)):
        raise ValueError("policy: expected a terminal law within 35 standard deviations of the pre-trained one, got "
                         "one where its density underflows")
    return float(lattice.dx[steps] * np.sum(p[keep] * (np.log(p[keep]) - log_q)))


def _log_pretrained(solution: _Solution, keep: Array) -> Array:
    """log of the pre-trained chain's terminal density at the kept nodes of the last lattice."""
    chain, lattice, steps = solution.chain.pretrained, solution.lattice, solution.chain.grid.steps
    x = lattice.nodes(steps)
    if chain.deterministic:
        return transport.log_pushed(chain, x[keep])
    low, high = chain.edges(WIDTH)
    p = solution.density[steps]
    likely = x[p > 1e-13 * np.max(p)]
    # how many deviations of the pre-trained chain the policy's law reaches: paths that end there need that much room
    z = WIDTH * float(np.max(np.abs(2 * likely - low[-1] - high[-1]))) / (high[-1] - low[-1])
    reach = math.hypot(12.0, z)
    hull = (lattice.low, lattice.low + lattice.dx * (lattice.n - 1))
    pre = _solve(chain, None, hull, max(WIDTH, math.hypot(7.0, z)), reach)
    q = _spread(pre.mass(steps - 1), pre.centre[steps - 1], chain.s[steps - 1], lattice.low[steps], lattice.dx[steps],
                lattice.n, reach)
    with np.errstate(divide="ignore"):
        return np.log(q[keep])


@dataclass(frozen=True, eq=False)
class _KernelValue(Value):
    """V through the kernel; see `value`."""

    solution: _Solution

    def _step(self, i: int, centre: Array, s: float) -> tuple[Array, Array]:
        """E[V_{i+1}] and E[V_{i+1} xi] around the given centres."""
        lattice = self.solution.lattice
        return _expect(centre, s, lattice.low[i + 1], lattice.dx[i + 1], self.solution.values[0][i + 1])

    def __call__(self, i: int, x: Array) -> Array:
        x, chain = check.points("x", x, 1), self.solution.chain
        if i == chain.grid.steps:
            return chain.problem.reward.value(x)
        y = np.ascontiguousarray(x[:, 0])
        self.solution.lattice.require(i, y)
        centre, gap = chain.step(i, y)
        plain, _ = self._step(i, centre, chain.s[i])
        return chain.decay(i) * plain + chain.bonus[i] - chain.cost(i, gap)

    def gradient(self, i: int, x: Array) -> Array:
        x, chain = check.points("x", x, 1), self.solution.chain
        if i == chain.grid.steps:
            return chain.problem.reward.gradient(x)
        y = np.ascontiguousarray(x[:, 0])
        self.solution.lattice.require(i, y)
        (centre, gap), (dm, dgap) = chain.step(i, y), chain.slopes(i, y)
        _, moment = self._step(i, centre, chain.s[i])
        push = 2 * chain.problem.kl_weight * chain.c.kappa[i] * chain.c.dt[i] * dgap * gap
        return (chain.decay(i) * dm * moment / chain.s[i] - push)[:, None]

    def action_value(self, i: int, x: Array, a: Array) -> Array:
        chain, lattice = self.solution.chain, self.solution.lattice
        y, act = check.points("x", x, 1)[:, 0], check.points("a", a, 1)[:, 0]
        centre, noise = chain.moved(i, y, act), float(chain.c.noise[i])
        cost = chain.cost(i, act - chain.score(i, y))
        lattice.require(i + 1, centre)
        if noise >= RESOLUTION * lattice.dx[i + 1]:
            return chain.decay(i) * self._step(i, centre, noise)[0] - cost
        # an action given leaves less noise than the lattice resolves: V_{i+1} itself, at Gauss-Hermite nodes
        xi, weight = np.polynomial.hermite_e.hermegauss(24 if noise > 0 else 1)
        nodes = (centre[:, None] + noise * xi).reshape(-1, 1)
        return chain.decay(i) * self(i + 1, nodes).reshape(len(y), -1) @ (weight / weight.sum()) - cost
