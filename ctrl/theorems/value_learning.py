r"""Learning the value function: a loss that V minimises, conditions that V solves, and a loss that flattens it (theory.md, section 5).

    martingale loss       E sum_i D_i ( V_i(X_i) - G_i )^2,   G_i = r - sum_{j>=i} cost_j                  minimised by V
    orthogonality         E sum_i f_i(X_i) delta_i = 0 for every f,                                        solved by V
    squared TD residual   E sum_i delta_i^2,   delta_i = V_{i+1}(X_{i+1}) - V_i(X_i) - cost_i              right mean, wrong gradient

The last one, for stochastic dynamics: delta_i^2 holds eta^2 g^2 D |grad V|^2, which is of the order of D, while what V must satisfy
enters at D^2. As D -> 0 only a V without gradient is left. So grad V is compared here, never J.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ctrl import exact
from ctrl.check import Array
from ctrl.estimators import Run, runs
from ctrl.evidence import mean_test
from ctrl.exact.chain import LinearChain
from ctrl.learn.values import Quadratic
from ctrl.noise import Noise, NoiseLike
from ctrl.theorems import style
from ctrl.theorems.reversal import short_grid
from ctrl.theorems.value import Residuals, Solved, ahead, at_eta, cubature, law_nodes, random_states, solved, some_steps
from ctrl.theorems.verdict import Case, Theorem, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUADRATIC = Quadratic()
PATTERN_VARIABLES = 8  # of a Gauss-Hermite rule with three nodes each: 6561 paths


# ---- quadratics, step by step --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Frame:
    """Whitened states of a linear chain, u = L_i^{-1} (x - m_i), with L_i L_i' the covariance of X_i."""

    chain: LinearChain

    @cached_property
    def roots(self) -> Array:
        """L_i, (N + 1, d, d)."""
        return np.linalg.cholesky(self.chain.moments[1])

    def whiten(self, i: int, x: Array) -> Array:
        return np.linalg.solve(self.roots[i], (x - self.chain.moments[0][i]).T).T

    def colour(self, i: int, u: Array) -> Array:
        return self.chain.moments[0][i] + u @ self.roots[i].T


@dataclass(frozen=True, eq=False)
class Fit:
    """A learned value: V_i(x) = coefficients_i . QUADRATIC(u), u the whitened state, i < N; coefficients (N, p)."""

    frame: Frame
    coefficients: Array

    def __call__(self, i: int, x: Array) -> Array:
        return QUADRATIC(self.frame.whiten(i, x)) @ self.coefficients[i]

    def gradient(self, i: int, x: Array) -> Array:
        """grad V_i, (n, d) -> (n, d)."""
        du = np.einsum("npd,p->nd", QUADRATIC.slopes(self.frame.whiten(i, x)), self.coefficients[i])
        return du @ np.linalg.inv(self.frame.roots[i])

    @property
    def start(self) -> float:
        """E V_0(X_0)."""
        u, w = cubature(self.frame.chain.problem.dim)
        return float(w @ QUADRATIC(u) @ self.coefficients[0])


# ---- the martingale loss -------------------------------------------------------------------------------------------------


def outlook(chain: LinearChain, i: int, x: Array) -> tuple[Array, Array]:
    """E[r(X_N) | X_i = x] and E[sum_{j>=i} cost_j | X_i = x], (n,) each: from the law of each X_j given x, no value in it."""
    co, (dK, dk), r = chain.problem.coefficients(chain.grid), chain.departure, chain.problem.reward.quadratic(chain.problem.dim)
    assert r is not None
    rate, start = chain.problem.kl_weight * co.kappa * co.dt, np.append(co.discount, co.final_discount)
    cost = np.zeros(len(x))
    for j, (M, b, S) in enumerate(ahead(chain, i), start=i):
        y, share = x @ M.T + b, start[j] / start[i]
        if j < chain.grid.steps:
            cost += share * rate[j] * (np.sum((y @ dK[j].T + dk[j]) ** 2, axis=1) + np.sum((dK[j] @ S) * dK[j]))
    return share * (chain.problem.reward.value(y) - 0.5 * np.sum(r.matrix * S)), cost


def martingale_fit(frame: Frame, sign: float = -1.0) -> Fit:
    r"""The minimiser of E sum D_i (V_i(X_i) - G_i)^2 over quadratics per step: E[phi phi'] c_i = E[phi G_i].

    D_i weighs the steps against one another and cancels where each has coefficients of its own. The expectations have degree 4 in
    X_i: cubature is exact. sign = +1 plants the cost added in G.
    Source: theory.md, section 5.   Checked: tests/test_theorem_value_learning.py::test_every_verdict_holds
    """
    u, w = cubature(frame.chain.problem.dim)
    phi = QUADRATIC(u)
    project, rows = np.linalg.solve(phi.T @ (w[:, None] * phi), phi.T * w), []
    for i in range(frame.chain.grid.steps):
        reward, cost = outlook(frame.chain, i, frame.colour(i, u))
        rows.append(project @ (reward + sign * cost))
    return Fit(frame, np.stack(rows))


Returns = Callable[[Run], Array]


def returns_to_go(run: Run) -> Array:
    """e^{-rho t_i} G_i = e^{-rho T} r - sum_{j>=i} cost_j, (n, N)."""
    return run.reward[:, None] - np.cumsum(run.cost[:, ::-1], axis=1)[:, ::-1]


def _added(run: Run) -> Array:
    return 2 * run.reward[:, None] - returns_to_go(run)


def _from_zero(run: Run) -> Array:
    return np.broadcast_to(run.reward[:, None] - run.cost.sum(axis=1, keepdims=True), run.cost.shape)


WRONG_RETURNS: tuple[tuple[str, Returns], ...] = (("cost added in G", _added), ("cost summed from 0 in G", _from_zero))


def fit_on_paths(frame: Frame, noise: NoiseLike, returns: Returns = returns_to_go) -> Fit:
    """The minimiser of the martingale loss on paths, as a program computes it: weighted least squares of returns, step by step.

    Quadrature noise, three nodes a variable, makes it the minimiser of the expectation: the loss has degree 4 in each normal.
    Source: theory.md, sections 5 and 7.   Checked: tests/test_theorem_value_learning.py::test_paths_give_what_moments_give
    """
    chain, steps, p = frame.chain, frame.chain.grid.steps, QUADRATIC(np.zeros((1, frame.chain.problem.dim))).shape[1]
    gram, target = np.zeros((steps, p, p)), np.zeros((steps, p))
    for run in runs(chain.problem, chain.policy, chain.grid, noise):
        w = np.full(run.noise.paths, 1.0) if run.noise.weights is None else run.noise.weights
        G = returns(run) / run.coefficients.discount
        for i in range(steps):
            phi = QUADRATIC(frame.whiten(i, run.states[:, i]))
            gram[i] += phi.T @ (w[:, None] * phi)
            target[i] += phi.T @ (w * G[:, i])
    return Fit(frame, np.linalg.solve(gram, target[:, :, None])[:, :, 0])


# ---- TD residuals: a root and a minimum ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Residual:
    r"""Second moments of delta_i = e^{-rho D} phi_{i+1}'c_{i+1} - phi_i'c_i - cost_i for values linear in c_0 ... c_{N-1}, V_N = r.

    here   E phi_i phi_i', (N, p, p)                        there   e^{-2 rho D} E phi_{i+1} phi_{i+1}', (N - 1, p, p)
    cross  e^{-rho D} E phi_i phi_{i+1}', (N - 1, p, p)     push    e^{-rho D} E phi_{i+1} cost_i, (N - 1, p)
    pull   E phi_i ( e^{-rho D} r [i = N - 1] - cost_i ), (N, p)
    """

    here: Array
    there: Array
    cross: Array
    pull: Array
    push: Array

    @property
    def root(self) -> Array:
        """Coefficients at which E phi_i delta_i = 0 at every step, (N, p): back substitution."""
        c = [np.linalg.solve(self.here[-1], self.pull[-1])]
        for here, cross, pull in zip(self.here[-2::-1], self.cross[::-1], self.pull[-2::-1], strict=True):
            c.append(np.linalg.solve(here, pull + cross @ c[-1]))
        return np.stack(c[::-1])

    @property
    def least(self) -> Array:
        """Coefficients at which E sum delta_i^2 is least, (N, p): block elimination of tridiagonal normal equations."""
        diagonal, right = self.here.copy(), self.pull.copy()
        diagonal[1:] += self.there
        right[1:] += self.push
        for i, cross in enumerate(self.cross):
            eliminated = np.linalg.solve(diagonal[i], cross)
            diagonal[i + 1] -= cross.T @ eliminated
            right[i + 1] += eliminated.T @ right[i]
        c = [np.linalg.solve(diagonal[-1], right[-1])]
        for i in reversed(range(len(self.cross))):
            c.append(np.linalg.solve(diagonal[i], right[i] + self.cross[i] @ c[-1]))
        return np.stack(c[::-1])


def transition(frame: Frame, i: int, z: Array) -> tuple[Array, Array]:
    """X_{i+1} (m, d) and cost_i (m,) when X_i has the whitened states z[:, :d] and the step the normals z[:, d:]; mean actions."""
    chain, d = frame.chain, frame.chain.problem.dim
    (A, c), (dK, dk), co, x = chain.maps, chain.departure, chain.problem.coefficients(chain.grid), frame.colour(i, z[:, :d])
    y = x @ A[i].T + c[i] + co.noise[i] * z[:, d:]
    return y, chain.problem.kl_weight * co.kappa[i] * co.dt[i] * np.sum((x @ dK[i].T + dk[i]) ** 2, axis=1)


def quadratic_residual(frame: Frame) -> Residual:
    """Over quadratics per step of a linear chain, which hold V (mean actions); degree 4 in both states together: cubature is exact."""
    problem, steps = frame.chain.problem, frame.chain.grid.steps
    z, w = cubature(2 * problem.dim)
    phi, gamma = QUADRATIC(z[:, : problem.dim]), np.exp(-problem.discount * frame.chain.grid.dt)
    there, cross, pull, push = [], [], [], []
    for i in range(steps):
        y, cost = transition(frame, i, z)
        if i + 1 < steps:
            after = gamma[i] * QUADRATIC(frame.whiten(i + 1, y))
            there.append(after.T @ (w[:, None] * after))
            cross.append(phi.T @ (w[:, None] * after))
            push.append(after.T @ (w * cost))
        known = 0.0 if i + 1 < steps else gamma[i] * problem.reward.value(y)
        pull.append(phi.T @ (w * (known - cost)))
    here = np.broadcast_to(phi.T @ (w[:, None] * phi), (steps, phi.shape[1], phi.shape[1]))
    return Residual(here, *(np.stack(part) for part in (there, cross, pull, push)))


def scaled_residual(at: Solved) -> Residual:
    r"""Over c_i V_i(x) + b_i with V exact, on the line: at V itself c = 1 and b = 0, and c is the part of grad V that is kept.

    E[e^{-rho D} V_{i+1} | X_i] = V_i + cost_i turns all of it into means over the law of X_i (mean actions).
    """
    case, chain_laws = at.case, exact.quadrature.marginals(at.case.problem, at.policy, at.case.grid)
    c, last, gamma = case.problem.coefficients(case.grid), case.grid.steps - 1, np.exp(-case.problem.discount * case.grid.dt)
    here, cross, pull, push = [], [], [], []
    for i, law in enumerate(chain_laws[:-1]):
        x, w = law_nodes(case, law)
        gap = at.policy.mean(case.grid, i, x) - case.problem.score(float(case.grid.times[i]), x)
        cost = case.problem.kl_weight * c.kappa[i] * c.dt[i] * np.sum(gap**2, axis=1)
        V = at.value(i, x)
        phi, after = np.stack([V, np.ones_like(V)]), np.stack([V + cost, np.full_like(V, gamma[i])])  # after: e^{-rho D} E[phi_{i+1} | x]
        here.append(phi @ (w[:, None] * phi.T))
        cross.append(phi @ (w[:, None] * after.T))
        pull.append(phi @ (w * ((V + cost if i == last else 0.0) - cost)))
        push.append(after @ (w * cost))
    there = gamma[:-1, None, None] ** 2 * np.stack(here[1:])
    return Residual(np.stack(here), there, np.stack(cross[:-1]), np.stack(pull), np.stack(push[:-1]))


@dataclass(frozen=True, eq=False)
class Flattened:
    """The squared TD residual's minimiser on a grid, at T/2: its gradients and the true ones, and E V_0(X_0) of it where quadratic."""

    gradient: Array
    truth: Array
    start: float | None

    @property
    def kept(self) -> float:
        """|grad V fitted| / |grad V|."""
        return float(np.linalg.norm(self.gradient) / np.linalg.norm(self.truth))

    @classmethod
    def on(cls, case: Case, steps: int) -> Flattened:
        """At the mean and one deviation from it along every axis; on the line at random states."""
        at, i = solved(case.over(steps))[0], steps // 2
        if not case.linear:
            truth = at.value.gradient(i, random_states(at.case, i))
            return cls(scaled_residual(at).least[i, 0] * truth, truth, None)
        frame, eye = Frame(LinearChain(case.problem, case.policy, at.case.grid)), np.eye(case.problem.dim)
        fit = Fit(frame, quadratic_residual(frame).least)
        x = frame.colour(i, np.concatenate([0 * eye[:1], eye, -eye]))
        return cls(fit.gradient(i, x), at.value.gradient(i, x), fit.start)


# ---- derivatives of the losses at V, along simulated paths -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AtTruth:
    r"""Derivatives of the losses at V in the directions f = 1, x_j, V, per path, (n, up to 5); f_N = 0, since V_N = r is known.

        martingale   -sum_i D_i f_i(X_i) (G_i - V_i(X_i)),   G_i - V_i(X_i) = sum_{j>=i} delta_j            mean 0
        orthogonal    sum_i f_i(X_i) delta_i                                                                mean 0
        squared       sum_i ( f_{i+1}(X_{i+1}) - f_i(X_i) ) delta_i; along f = V its mean is E sum_{i<N-1} delta_i^2, not 0
    """

    martingale: Array
    orthogonal: Array
    squared: Array

    @classmethod
    def simulated(cls, at: Solved, noise: NoiseLike) -> AtTruth:
        run, dt = Residuals.simulated(at, noise), at.case.grid.dt
        V = run.value[:, :-1, None]
        f = np.concatenate([np.ones_like(V), run.states[:, :, :3], V], axis=2)
        later = np.concatenate([f[:, 1:], np.zeros_like(f[:, :1])], axis=1)
        to_go = np.cumsum(run.residual[:, ::-1], axis=1)[:, ::-1]
        pairs = ((f, -dt * to_go), (f, run.residual), (later - f, run.residual))
        return cls(*(np.einsum("nkf,nk->nf", function, residual) for function, residual in pairs))


# ---- the theorem ---------------------------------------------------------------------------------------------------------


class ValueLearning(Theorem):
    r"""The martingale loss is minimised by V, the orthogonality conditions are solved by V, and the squared TD residual is neither.

    Source: theory.md, sections 5 and 16; Jia and Zhou.   Checked: tests/test_theorem_value_learning.py::test_every_verdict_holds
    """

    name = "value_learning"
    statement = ("V minimises the martingale loss E Σ D_i (V_i(X_i) - G_i)², G_i = r - Σ_{j≥i} cost_j, and solves E Σ ξ(X_i) δ_i = 0, "
                 "δ_i = V_{i+1}(X_{i+1}) - V_i(X_i) - cost_i, for every test function ξ; minimising E Σ δ_i² keeps the mean of V and "
                 "loses its gradient as D → 0.")
    formulas = (
        r"V = \mathrm{argmin}_\varphi\; \mathbb{E} \sum_i D_i \left( V_\varphi(t_i, X_i) - G_i \right)^2,"
        r"\qquad G_i = r(X_N) - \sum_{j \geq i} \mathrm{cost}_j",
        r"\mathbb{E} \sum_i \xi(X_i)\, \delta_i = 0 \quad \mathrm{for\ every}\ \xi,"
        r"\qquad \delta_i = V_{i+1}(X_{i+1}) - V_i(X_i) - \mathrm{cost}_i",
        r"\mathrm{argmin}_\varphi\; \mathbb{E} \sum_i \delta_i^2 \;\neq\; V: \quad \nabla V_\varphi \to 0 \quad \mathrm{as}\ D \to 0")

    def checks(self, case: Case) -> Iterator[Verdict]:
        if not (case.linear or case.problem.dim == 1):
            yield self.skipped(case, "what is learned is compared with V: tried where V is exact in time, on linear chains and on the line")
            return
        for eta in case.etas:
            at = case.at(eta)
            if case.linear and case.problem.entropy_weight == 0:
                yield from self._learned(at)
                yield from self._on_paths(at)
            else:
                yield self.skipped(at, f"{at_eta(at)}learned exactly: over per-step quadratics, which hold V for a linear case with mean actions")
            if eta == 1 or not case.quick or case.linear:
                yield from self._sampled(solved(at)[0])
                yield from self._flattened(at)

    def _learned(self, case: Case) -> Iterator[Verdict]:
        """V and grad V of the fits against the exact ones, over all steps."""
        where, frame = at_eta(case), Frame(LinearChain(case.problem, case.policy, case.grid))
        expected = values_and_slopes(case, case.value)
        yield self.exact(case, values_and_slopes(case, martingale_fit(frame)), expected, 1e-9,
                         f"{where}V and grad V by the martingale loss, its expectation by moments")
        root = Fit(frame, quadratic_residual(frame).root)
        yield self.exact(case, values_and_slopes(case, root), expected, 1e-9,
                         f"{where}V and grad V by the orthogonality conditions, a root by linear solves")
        if case.problem.kl_weight == 0:
            yield self.skipped(case, f"{where}errors in the cost are invisible at kl_weight = 0")
        else:
            yield self.planted(case, values_and_slopes(case, martingale_fit(frame, sign=1.0)), expected, 1e-9,
                               f"{where}martingale loss with the cost added in G")

    def _on_paths(self, case: Case) -> Iterator[Verdict]:
        """The loss as a program has it, on the paths of a quadrature noise."""
        where = at_eta(case)
        if (steps := PATTERN_VARIABLES // case.problem.dim - 1) < 2:
            yield self.skipped(case, f"{where}martingale loss on quadrature paths: too many, 3^{3 * case.problem.dim} of two steps")
            return
        grid = short_grid(case.problem, steps)
        noise, value = Noise.gauss_hermite(case.problem, case.policy, grid, nodes=3), exact.value(case.problem, case.policy, grid)
        frame = Frame(LinearChain(case.problem, case.policy, grid))
        states = [(i, random_states(case, i)) for i in range(steps)]

        def slopes_of(fit: exact.Value | Fit) -> Array:
            return np.concatenate([fit.gradient(i, x) for i, x in states])

        expected = slopes_of(value)
        what = f"{where}grad V by the martingale loss on all Gauss-Hermite paths, N = {steps}"
        yield self.exact(case, slopes_of(fit_on_paths(frame, noise)), expected, 1e-9, what)
        if case.problem.kl_weight > 0:
            for wrong, returns in WRONG_RETURNS:
                yield self.planted(case, slopes_of(fit_on_paths(frame, noise, returns)), expected, 1e-9, f"{where}{wrong}: its grad V")

    def _sampled(self, at: Solved) -> Iterator[Verdict]:
        """Derivatives of the losses at V along paths: zero, zero, and not zero."""
        case, where = at.case, at_eta(at.case)
        pilot = AtTruth.simulated(at, case.noise("learning pilot", 2000))
        if np.all(pilot.orthogonal.std(axis=0) < 1e-9):
            yield self.skipped(case, f"{where}V is known from the start: nothing random is left in the return")
            return
        run = AtTruth.simulated(at, case.noise("learning", 50_000 if not case.quick else 6_000))
        martingale, orthogonal, squared = (mean_test(samples / unit.std(axis=0), 0.0) for samples, unit in (
            (run.martingale, pilot.martingale), (run.orthogonal, pilot.orthogonal), (run.squared, pilot.squared)))
        along = "f = 1, x_j, V, in deviations of a path"
        yield self.monte_carlo(case, martingale, 0.15, f"{where}the martingale loss is stationary at V along {along}")
        yield self.monte_carlo(case, orthogonal, 0.15, f"{where}E sum f(X_i) delta_i = 0 for {along}")
        yield self.planted_sampled(case, squared, f"{where}the squared TD residual, as if stationary at V along {along}", orthogonal)

    def _flattened(self, case: Case) -> Iterator[Verdict]:
        """The squared TD residual: right mean, wrong gradient, worse on finer grids."""
        where = at_eta(case)
        if case.problem.entropy_weight > 0:
            yield self.skipped(case, f"{where}squared TD residual: minimised exactly for mean actions")
            return
        fits, steps = {n: Flattened.on(case, n) for n in flattened_steps(case)}, flattened_steps(case)[1]
        middle = fits[steps]
        if np.linalg.norm(middle.truth) < 1e-9:
            yield self.skipped(case, f"{where}squared TD residual: V has no gradient to lose")
            return
        if middle.start is not None:
            J = exact.evaluate(case.problem, case.policy, case.problem.grid(steps)).objective
            yield self.exact(case, middle.start, J, 1e-8, f"{where}the squared TD residual's minimiser has the right mean: J cannot tell it")
        row = self.planted(case, middle.gradient, middle.truth, 0.1, f"{where}grad V of the squared TD residual's minimiser, N = {steps}")
        yield row
        kept = [fit.kept for fit in fits.values()]
        row = self.planted(case, kept[-1], 1.0, 0.1, f"{where}squared TD residual keeps " + ", ".join(f"{k:.2g}" for k in kept)
                           + f" of |grad V| at N = {', '.join(map(str, fits))}: worse as D -> 0")
        falls = bool(np.all(np.diff(kept) < 0))
        yield self.skipped(case, f"{row.reason}: not yet on its slope") if case.own and not falls else replace(row, holds=row.holds and falls)

    def figure(self, case: Case) -> Figure:
        with style.panels(3, "value_learning: the martingale loss finds V, the squared TD residual flattens it") as (figure, axes):
            _draw_learned(axes[0], case)
            _draw_paths(axes[1], case)
            _draw_flattened(axes[2], case)
        return figure


def flattened_steps(case: Case) -> tuple[int, ...]:
    """Grids on which the squared TD residual is minimised."""
    if not case.linear:
        return (10, 20) if case.quick else (10, 20, 40, 80)
    return (10, 40, 160) if case.quick or case.problem.dim > 3 else (10, 40, 160, 640)


def values_and_slopes(case: Case, value: exact.Value | Fit) -> Array:
    """V_i and grad V_i at random states of some steps before the end, in one row of numbers."""
    at = [(i, random_states(case, i)) for i in some_steps(case)]
    return np.concatenate([part.ravel() for i, x in at for part in (value(i, x), value.gradient(i, x))])


# ---- drawing -------------------------------------------------------------------------------------------------------------


def slope_error(case: Case, fit: Fit) -> float:
    """Root mean square of |grad V fitted - grad V| over the chain's law and its steps, relative to that of |grad V|."""
    u, w = cubature(case.problem.dim)
    off, size = 0.0, 0.0
    for i in range(case.grid.steps):
        x = fit.frame.colour(i, u)
        true = case.value.gradient(i, x)
        off += float(w @ np.sum((fit.gradient(i, x) - true) ** 2, axis=1))
        size += float(w @ np.sum(true**2, axis=1))
    if size == 0:
        raise ValueError("problem: expected a value that depends on x, got a constant one")
    return float(np.sqrt(off / size))


def _draw_learned(ax: Axes, case: Case) -> None:
    """V(T/2, .) along the first axis through the mean: exact, learned on paths, and flattened."""
    frame, i, line = Frame(LinearChain(case.problem, case.policy, case.grid)), case.grid.steps // 2, np.linspace(-2.5, 2.5, 41)
    residual = quadratic_residual(frame)
    x = frame.colour(i, np.zeros((1, case.problem.dim))) + line[:, None] * np.eye(case.problem.dim)[0]
    ax.plot(x[:, 0], case.value(i, x), color=style.BLUE, label="V (exact)")
    fits = np.stack([fit_on_paths(frame, case.noise(f"figure {k}", 2000))(i, x) for k in range(8)])
    at = slice(2, None, 6)
    ax.errorbar(x[at, 0], fits.mean(axis=0)[at], 1.96 * fits.std(axis=0, ddof=1)[at], fmt="o", color="black", capsize=2,
                label="martingale loss, 2,000 paths (95 %)")
    ax.plot(x[at, 0], Fit(frame, residual.root)(i, x)[at], linestyle="none", marker="s", markersize=9, markerfacecolor="none",
            color=style.GREEN, label="orthogonality conditions")
    ax.plot(x[:, 0], Fit(frame, residual.least)(i, x), color=style.RED, linestyle="--", label="planted: squared TD residual")
    ax.set(xlabel="first coordinate of x (state units)", ylabel="V(T/2, x) (reward units)", title=f"What is learned, N = {case.steps}")
    ax.legend(loc="lower center")


def _draw_paths(ax: Axes, case: Case) -> None:
    """Error of grad V against the number of paths."""
    frame, counts = Frame(LinearChain(case.problem, case.policy, case.grid)), np.array([250, 500, 1000, 2000, 4000])
    errors = np.array([[slope_error(case, fit_on_paths(frame, case.noise(f"figure {n} {k}", int(n)))) for k in range(4)] for n in counts])
    mean = np.sqrt(np.mean(errors**2, axis=1))
    ax.errorbar(counts, mean, 1.96 * errors.std(axis=1, ddof=1) / 2, marker="o", color=style.BLUE, capsize=2,
                label="martingale loss, 4 batches (95 %)")
    ax.loglog(counts, mean[0] * np.sqrt(counts[0] / counts), color=style.GREY, linestyle=":", label="slope −1/2")
    least = slope_error(case, Fit(frame, quadratic_residual(frame).least))
    ax.axhline(least, color=style.RED, linestyle="--", label="planted: squared TD residual, all paths")
    ax.set(xlabel="paths", ylabel="|∇V learned − ∇V| / |∇V|", title="Error of the gradient")
    style.log_ticks(ax, counts, [f"{n:,}" for n in counts])
    ax.minorticks_off()
    ax.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
    ax.legend(loc="lower left")


def _draw_flattened(ax: Axes, case: Case) -> None:
    """How much of grad V the squared TD residual keeps."""
    steps = np.array([10, 20, 40, 80, 160, 320])
    dt = case.problem.horizon / steps
    for index, eta in enumerate((1.0, 0.5)):
        kept = [Flattened.on(case.at(eta), int(n)).kept for n in steps]
        ax.loglog(dt, kept, marker=style.MARKERS[index], color=style.COLOURS[index], linestyle=style.LINES[index],
                  label=f"squared TD residual, η = {eta:g}")
    ax.axhline(1.0, color="black", linewidth=1, label="martingale loss (exact)")
    ax.set(xlabel="step D (horizon units)", ylabel="|∇V fitted| / |∇V|  at T/2", title="Planted: what is left of the gradient")
    style.log_ticks(ax, dt, [f"1/{n}" for n in steps])
    ax.legend(loc="lower right")
