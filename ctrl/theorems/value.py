r"""The value function of a policy, and the martingale that it makes (theory.md, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from scipy.interpolate import CubicSpline

from ctrl import exact
from ctrl.check import Array
from ctrl.elementary import dot
from ctrl.estimators import Run, runs
from ctrl.evidence import mean_test
from ctrl.exact.chain import LinearChain, entropy
from ctrl.laws import Gaussian
from ctrl.noise import NoiseLike
from ctrl.policy import Policy
from ctrl.schedule import TimeGrid
from ctrl.theorems import style
from ctrl.theorems.verdict import Case, Theorem, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STATES = 6  # random states of an exact identity
NEGLIGIBLE = 2e-13  # weight of a quadrature node that is left out
FAINT = 1e-10  # density, of its peak, below which a lattice node is left out: V is not asked for so far out
NEAR, OUT = 1.5, 6.3  # deviations of states, and of the noise of a step from them, in the plane: together within the 6.5 to which V is known
KNOTS = 600  # of the spline that stands in for V along simulated paths on the line


# ---- one step of the chain, by quadrature --------------------------------------------------------------------------------


def rule(case: Case, variables: int, dense: bool = True) -> tuple[Array, Array]:
    r"""Nodes (m, variables) and weights (m,) of a rule for standard normals.

        linear cases: +-sqrt(v) e_j with equal weights, exact to degree 3 in any dimension
        on the line, and if dense for two variables in the plane: the trapezoid rule, 0.3 apart to +-6.9 (in the plane 0.2, to 6.3: few and
        long steps; a mixture's V is too steep for few Gauss-Hermite nodes: 7e-6 with 20)
        else: Gauss-Hermite, 8 nodes a variable

    Source: theory.md, section 7.   Checked: tests/test_theorem_value.py::test_rules_integrate_what_they_claim
    """
    if case.linear or variables == 0:
        cross = np.sqrt(max(variables, 1)) * np.eye(variables)
        points = np.concatenate([cross, -cross]) if variables else np.zeros((1, 0))
        return points, np.full(len(points), 1 / len(points))
    if case.problem.dim == 1 or (dense and case.planar and case.solvable and variables == 2):
        x = np.linspace(-6.9, 6.9, 47) if case.problem.dim == 1 else np.linspace(-OUT, OUT, 64)
        w = np.exp(-0.5 * x**2)
    else:
        x, w = np.polynomial.hermite_e.hermegauss(8)
    weights = np.array(list(product(w / w.sum(), repeat=variables))).prod(axis=1)
    keep = weights > NEGLIGIBLE  # far corners weigh nothing, and lie where no lattice reaches
    return np.array(list(product(x, repeat=variables)))[keep], weights[keep]


def cubature(d: int) -> tuple[Array, Array]:
    r"""Nodes (2 d^2 + 1, d) and weights of a rule for d standard normals, exact to degree 5.

        0: 2/(d + 2)      +-sqrt(d + 2) e_j: (4 - d)/(2 (d + 2)^2)      sqrt((d + 2)/2) (+-e_j +-e_k), j < k: 1/(d + 2)^2

    Source: McNamee and Stenger, Numer. Math. 10 (1967).   Checked: tests/test_theorem_value.py::test_rules_integrate_what_they_claim
    """
    axes, (j, k), edge = np.sqrt(d + 2) * np.eye(d), np.triu_indices(d, 1), np.sqrt((d + 2) / 2) * np.eye(d)
    pairs = [a * edge[j] + b * edge[k] for a in (1, -1) for b in (1, -1)]
    weights = [np.full(1, 2 / (d + 2)), np.full(2 * d, (4 - d) / (2 * (d + 2) ** 2)), np.full(4 * len(j), 1 / (d + 2) ** 2)]
    return np.concatenate([np.zeros((1, d)), axes, -axes, *pairs]), np.concatenate(weights)


def ahead(chain: LinearChain, i: int) -> Iterator[tuple[Array, Array, Array]]:
    """The law of X_j given X_i = x for j = i, ..., N, step by step forward: mean M x + b and covariance S."""
    (A, c), R, d = chain.maps, chain.step_cov, chain.problem.dim
    M, b, S = np.eye(d), np.zeros(d), np.zeros((d, d))
    yield M, b, S
    for j in range(i, chain.grid.steps):
        M, b, S = A[j] @ M, A[j] @ b + c[j], A[j] @ S @ A[j].T + R[j]
        yield M, b, S


def law_nodes(case: Case, law: exact.Terminal) -> tuple[Array, Array]:
    """Nodes (m, d) and weights (m,) of a chain's law: exact to degree 5 for a linear chain; else those of its lattice."""
    if case.linear:
        z, w = cubature(case.problem.dim)
        return law.mean + z @ np.linalg.cholesky(law.cov).T, w
    assert law.points is not None and law.density is not None
    density, points = law.density.ravel(), law.points.reshape(-1, case.problem.dim)
    keep = density > FAINT * density.max()
    return points[keep], density[keep] / density.sum()


@dataclass(frozen=True, eq=False)
class Branches:
    """One step from n states along m quadrature nodes: actions and next states (m, n, d), costs (m, n), weights (m,)."""

    actions: Array
    states: Array
    cost: Array
    weights: Array

    def mean(self, values: Array) -> Array:
        """Expectation of branch values (m, n) or (m, n, d)."""
        return np.tensordot(self.weights, values, axes=1)

    def next(self, function: Callable[[int, Array], Array], i: int) -> Array:
        """A value function at the next states, (m, n)."""
        m, n, d = self.states.shape
        return function(i, self.states.reshape(m * n, d)).reshape(m, n)


def branches(case: Case, policy: Policy, i: int, x: Array, actions: Array | None = None) -> Branches:
    """All branches of step i from states x (n, d): under the policy, or under given actions (n, d)."""
    c, d, factor = case.problem.coefficients(case.grid), x.shape[1], policy.exploration_factor(case.grid)
    moves, explores = c.noise[i] > 0, factor is not None and actions is None
    nodes, weights = rule(case, d * (int(moves) + int(explores)))
    a = policy.mean(case.grid, i, x) if actions is None else actions
    a = np.broadcast_to(a, (len(nodes), *x.shape))
    if explores:
        assert factor is not None
        a = a + (nodes[:, -d:] @ factor[i].T)[:, None, :]
    y = x + c.dt[i] * (-c.f[i] * x + c.h[i] * a)
    if moves:
        y = y + c.noise[i] * nodes[:, None, :d]
    gap = a - case.problem.score(float(case.grid.times[i]), x)
    return Branches(a, y, case.problem.kl_weight * c.kappa[i] * c.dt[i] * dot(gap, gap), weights)


def decay(case: Case, i: int) -> float:
    """e^{-rho D_i}."""
    return float(np.exp(-case.problem.discount * case.grid.dt[i]))


def entropy_bonus(case: Case, policy: Policy) -> Array:
    """gamma D_i H(pi_i), (N,): what a step earns for its entropy; 0 without entropy weight."""
    cov = policy.exploration_cov(case.grid)
    if case.problem.entropy_weight == 0 or cov is None:
        return np.zeros(case.grid.steps)
    return case.problem.entropy_weight * case.grid.dt * entropy(cov)


@dataclass(frozen=True, eq=False)
class Solved:
    """A case with one of its policies, and their exact value and truth, computed once."""

    case: Case
    policy: Policy
    actions: str

    @cached_property
    def value(self) -> exact.Value:
        return self.case.value if self.policy is self.case.policy else exact.value(self.case.problem, self.policy, self.case.grid)

    @cached_property
    def truth(self) -> exact.Truth:
        return self.case.truth if self.policy is self.case.policy else exact.evaluate(self.case.problem, self.policy, self.case.grid)


def solved(case: Case) -> list[Solved]:
    """Mean and sampled actions; with an entropy weight, sampled actions alone have an objective."""
    sampled = Solved(case, case.exploring, "sampled actions")
    return [sampled] if case.problem.entropy_weight > 0 else [Solved(case, case.policy, "mean actions"), sampled]


def random_states(case: Case, i: int, count: int = STATES) -> Array:
    """States (n, d) where the chain lives at step i: from the noised data law's mean and covariance; in the plane not farther than NEAR."""
    law, z = case.problem.marginal(float(case.grid.times[i])), case.noise(f"states {i}", count).start(case.problem.dim)
    if case.planar:
        z = z * np.minimum(1, NEAR / np.linalg.norm(z, axis=1, keepdims=True))
    return law.mean + z @ np.linalg.cholesky(law.cov).T


def some_steps(case: Case) -> tuple[int, ...]:
    """First, middle, last but one and last step."""
    n = case.grid.steps
    return tuple(sorted({0, n // 2, max(n - 2, 0), n - 1}))


def at_eta(case: Case) -> str:
    """The start of a verdict's text: the eta, where it is not 1."""
    return "" if case.problem.eta == 1 else f"eta = {case.problem.eta:g}: "


def tolerance(case: Case) -> float:
    """Of an exact identity: rounding for the linear chain, the solver's accuracy for quadrature."""
    return 1e-10 if case.linear else 1e-8


# ---- values along simulated paths ----------------------------------------------------------------------------------------


def along(run: Run, value: exact.Value) -> Array:
    """e^{-rho t_i} V_i(X_i) for i = 0 ... N, (n, N + 1); on the line by a spline through KNOTS exact values a step."""
    out, discounts = np.empty(run.states.shape[:2]), np.append(run.coefficients.discount, run.coefficients.final_discount)
    for i in range(run.grid.steps + 1):
        x = run.states[:, i]
        if len(x) <= KNOTS or x.shape[1] > 1:
            out[:, i] = discounts[i] * value(i, x)
        else:
            knots = np.linspace(x.min(), x.max(), KNOTS)
            out[:, i] = discounts[i] * CubicSpline(knots, value(i, knots[:, None]))(x[:, 0])
    return out


@dataclass(frozen=True, eq=False)
class Residuals:
    """Along simulated paths, discounted to time 0: TD residuals and costs (n, N), V_0 ... V_N (n, N + 1), returns (n,); states (n, N, d)."""

    residual: Array
    cost: Array
    value: Array
    returns: Array
    states: Array

    @classmethod
    def simulated(cls, at: Solved, noise: NoiseLike) -> Residuals:
        """V_{i+1}(X_{i+1}) - V_i(X_i) - cost_i + entropy_i along the paths of a noise."""
        case, policy, value = at.case, at.policy, at.value
        bonus = case.problem.coefficients(case.grid).discount * entropy_bonus(case, policy)
        parts = []
        for run in runs(case.problem, policy, case.grid, noise):
            values = along(run, value)
            residual = np.diff(values, axis=1) - run.cost + bonus
            parts.append((residual, run.cost, values, run.reward - run.cost.sum(axis=1) + bonus.sum(), run.states[:, :-1]))
        return cls(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def tested(self) -> Array:
        """sum_i test(X_i) residual_i for the test functions 1, x_1, x_2, x_3, (n, up to 4)."""
        by_state = np.einsum("nk,nkd->nd", self.residual, self.states[:, :, :3])
        return np.concatenate([self.residual.sum(axis=1, keepdims=True), by_state], axis=1)


def shifted(value: exact.Value, i: int, x: Array, h: float = 1e-3) -> Array:
    """grad V by central differences with error h^6, (n, d)."""
    columns = []
    for unit in np.eye(x.shape[1]):
        near, next_, far = (value(i, x + k * h * unit) - value(i, x - k * h * unit) for k in (1, 2, 3))
        columns.append((45 * near - 9 * next_ + far) / (60 * h))
    return np.stack(columns, axis=1)


def start_mean(case: Case, value: exact.Value) -> float:
    r"""E V_0(X_0), the start law integrated component by component: by `rule`, on the line trapezoid on +-7.4 deviations."""
    law = case.problem.start_law
    if isinstance(law, Gaussian):
        parts = [(1.0, law.mean, law.cov)]
    else:
        parts = list(zip(law.weights, law.means, law.covs, strict=True))
    if case.linear or case.planar:
        z, w = rule(case, case.problem.dim)
    else:
        z = np.linspace(-7.4, 7.4, 401 if case.problem.eta > 0 else 8001)[:, None]  # without noise V is as steep as the flow
        w = np.exp(-0.5 * z[:, 0] ** 2)
        w /= w.sum()
    return float(sum(p * (w @ value(0, m + z @ np.linalg.cholesky(cov).T)) for p, m, cov in parts))


# ---- the theorem ---------------------------------------------------------------------------------------------------------


class ValueMartingale(Theorem):
    r"""V_i(X_i) minus the costs already paid is a martingale of the chain, exactly, and E V_0(X_0) = J.

    Source: theory.md, section 5.   Checked: tests/test_theorem_value.py::test_every_verdict_holds
    """

    name = "value"
    statement = ("The value function minus the costs already paid is a martingale: "
                 "E[V_{i+1}(X_{i+1}) | X_i = x] - V_i(x) - λ κ_i D_i |μ_i - s_i|² = 0, V_N = r, E V_0(X_0) = J; "
                 "in the limit ∂V/∂t + (-f x + h μ)·∇V + ½ η² g² ΔV - λ κ |μ - s|² = 0.")
    formulas = (
        r"V(t, x) = \mathbb{E} \left[\, r(X_T) - \lambda \int_t^T \kappa\, |\mu - s|^2\, du \,\mid\, X_t = x \,\right]",
        r"\mathbb{E}\left[\, V_{i+1}(X_{i+1}) - V_i(X_i) \mid X_i \,\right] = \lambda\, \kappa_i D_i\, |\mu_i - s_i|^2",
        r"\partial_t V + (-f x + h \mu) \cdot \nabla V + \frac{1}{2} \eta^2 g^2\, \Delta V = \lambda \kappa\, |\mu - s|^2,\qquad V(T, x) = r(x)")

    def checks(self, case: Case) -> Iterator[Verdict]:
        if case.idle:
            yield self.skipped(case, "the objective is one constant (kl_weight = 0, constant reward): errors relative to nothing")
            return
        case = case.brief.at(0.5) if case.planar and case.quick else case.brief
        if not case.solvable:
            yield from self._last_step(case)
            yield self.skipped(case, "V before the last step has no exact truth here, and any estimate of it from paths would be "
                                     "compared with itself")
            return
        if case.planar:
            yield from self._in_the_plane(case)
            return
        for eta in (*case.etas, 0.0):
            both = solved(case.at(eta))
            if eta == 0 and not case.linear:
                yield self.skipped(case, "eta = 0: sampled actions on the line: their noise alone, h D sqrt(Σ), is too fine for a lattice")
            # each quadrature costs: in a quick run on the line, sampled actions are tried at eta = 1 alone
            for at in both if eta == 1 or case.linear or (eta > 0 and not case.quick) else self._mean_actions(both):
                yield from self._identities(at)
                if eta == 1 or (eta > 0 and at is both[0]):
                    yield from self._sampled(at)
            if eta > 0:
                yield from self._planted(both[0])
                if eta == 1 or case.linear or not case.quick:
                    yield from self._limits(both[0])

    def _in_the_plane(self, case: Case) -> Iterator[Verdict]:
        """Mean actions; each truth costs: in a quick run at eta = 1/2 alone, where everything about h shows."""
        if case.problem.entropy_weight > 0:
            yield self.skipped(case, "mean actions have no objective with an entropy weight")
            return
        yield self.skipped(case, "in the plane: sampled actions (a rule in four variables), eta = 0 (V is as steep as the flow), limits (many steps)")
        for eta in (case.problem.eta,) if case.quick else case.etas:
            at = solved(case.at(eta))[0]
            yield from self._identities(at)
            yield from self._sampled(at)
            yield from self._planted(at)

    def _mean_actions(self, both: list[Solved]) -> list[Solved]:
        return [at for at in both if at.actions == "mean actions"]

    def _identities(self, at: Solved) -> Iterator[Verdict]:
        """E V_0 = J; the conditional TD identity; V_i at mid-time; grad V as a derivative."""
        case, where, allowed = at.case, f"{at_eta(at.case)}{at.actions}", tolerance(at.case)
        yield self.exact(case, start_mean(case, at.value), at.truth.objective, allowed, f"{where}: E V_0(X_0) = J")
        before, now = self._conditional(at, at.value)
        yield self.exact(case, before, now, allowed, f"{where}: E[V_(i+1) | x] - cost = V_i(x) at random states")
        if case.linear or case.problem.eta > 0:
            yield self.exact(case, *self._midway(at), allowed, f"{where}: E V_i(X_i) = J + costs already paid, at T/2")
        i, x = case.grid.steps // 2, random_states(case, case.grid.steps // 2)
        yield self.exact(case, shifted(at.value, i, x), at.value.gradient(i, x), 1e-8, f"{where}: grad V is the derivative of V")

    def _conditional(self, at: Solved, value: exact.Value, formula: str = "") -> tuple[Array, Array]:
        """E[V_{i+1}(X_{i+1}) | x] - cost (+ entropy) and V_i(x) over some steps and states; `formula` names a planted error."""
        case, left, right = at.case, [], []
        bonus = entropy_bonus(case, at.policy)
        for i in some_steps(case)[:-1]:
            x = random_states(case, i)
            b = branches(case, at.policy, i, x)
            cost = b.mean(b.cost)
            if formula == "added":
                cost = -cost
            elif formula == "right point":
                cost = b.mean(self._right_cost(at, i, b))
            elif formula == "reward":
                cost = cost - case.grid.dt[i] * case.problem.reward.value(x)
            left.append(decay(case, i) * b.mean(b.next(value, i + 1)) - cost + bonus[i])
            right.append(value(i, x))
        return np.concatenate(left), np.concatenate(right)

    def _right_cost(self, at: Solved, i: int, b: Branches) -> Array:
        """lambda kappa D |mu - s|^2 at the right point of step i, along branches, (m, n): a planted error."""
        c, y = at.case.problem.coefficients(at.case.grid), b.states.reshape(-1, b.states.shape[2])
        gap = at.policy.mean(at.case.grid, i + 1, y) - at.case.problem.score(float(at.case.grid.times[i + 1]), y)
        return at.case.problem.kl_weight * c.kappa[i + 1] * c.dt[i + 1] * dot(gap, gap).reshape(b.cost.shape)

    def _midway(self, at: Solved) -> tuple[float, float]:
        """e^{-rho t} E V_i(X_i) by the law of X_i, and J plus the costs already paid, at T/2."""
        case, i = at.case, at.case.grid.steps // 2
        part = exact.evaluate(case.problem, at.policy, TimeGrid(case.grid.times[: i + 1]))
        discount = float(np.exp(-case.problem.discount * case.grid.times[i]))
        paid, law = discount * part.expected_reward - part.objective, part.terminal
        x, w = law_nodes(case, law)
        return float(discount * (w @ at.value(i, x))), at.truth.objective + paid

    def _planted(self, at: Solved) -> Iterator[Verdict]:
        """Wrong values and wrong residuals against the exact twins."""
        case, where, allowed = at.case, at_eta(at.case), tolerance(at.case)
        wrong = {"reward": "a reward at every step"}
        if case.problem.kl_weight == 0:
            yield self.skipped(case, f"{where}errors in the cost are invisible at kl_weight = 0")
        else:
            free = exact.value(replace(case.problem, kl_weight=0.0), at.policy, case.grid)
            added = 2 * start_mean(case, free) - start_mean(case, at.value)
            yield self.planted(case, added, at.truth.objective, allowed, f"{where}E V_0 with the cost added instead of subtracted")
            yield self.planted(case, at.truth.objective, self._midway(at)[0], allowed,
                               f"{where}cost summed from 0: costs already paid count again in V at T/2")
            wrong |= {"added": "cost added in the TD residual", "right point": "cost at the right point"}
        for formula, what in wrong.items():
            yield self.planted(case, *self._conditional(at, at.value, formula), allowed, where + what)
        pretrained = case.problem.pretrained(case.grid).with_exploration(at.policy.exploration)
        other = exact.value(case.problem, pretrained, case.grid)
        yield self.planted(case, *self._conditional(at, other), allowed,
                           f"{where}the pre-trained policy's V under the policy's own dynamics")

    def _sampled(self, at: Solved) -> Iterator[Verdict]:
        """Martingale orthogonality along simulated paths."""
        case, where = at.case, f"{at_eta(at.case)}{at.actions}"
        pilot = Residuals.simulated(at, case.noise(f"value pilot {at.actions}", 2000))
        paths = 50_000 if not case.quick else 10_000 if case.linear or case.problem.eta == 1 else 30_000
        run = Residuals.simulated(at, case.noise(f"value {at.actions}", paths))
        yield self.monte_carlo(case, mean_test(run.returns, at.truth.objective), 0.1 * float(pilot.returns.std()),
                               f"{where}: E[r - sum cost] = E V_0; must see 0.1 of a path's deviation")
        unit = pilot.tested().std(axis=0)
        yield self.monte_carlo(case, mean_test(run.tested() / unit, 0.0), 0.1,
                               f"{where}: E sum test(X_i) residual_i = 0, test = 1, x_j, in deviations of a path")
        if case.problem.kl_weight == 0:
            return
        # the test function of time that tells a wrong cost best: E cost_i / Var residual_i, from paths of its own
        weight = pilot.cost.mean(axis=0) / pilot.residual.var(axis=0)
        weight = weight / weight.max()
        seen = 2 * float(weight @ pilot.cost.mean(axis=0))
        yield self.monte_carlo(case, mean_test(run.residual @ weight, 0.0), seen,
                               f"{where}: E sum w(t_i) residual_i = 0; must see a cost of the wrong sign")
        yield self.planted_sampled(case, mean_test((run.residual + 2 * run.cost) @ weight, 0.0),
                                   f"{where}: cost added in the TD residual along paths")

    def _limits(self, at: Solved) -> Iterator[Verdict]:
        """V of the chain tends to V of continuous time at order 1; the latter solves its equation."""
        case, where = at.case, at_eta(at.case)
        grids, error = chain_errors(case, at.policy)
        yield self.limit(case, case.problem.horizon / grids, error, 1.0,
                         f"{where}V of the chain at fixed states, t = 0 and T/2" + ("" if case.linear else ", N against 2N"))
        if case.linear:
            yield self.exact(case, *self._equation(case, at.policy), 1e-6, f"{where}continuous V solves its equation")

    def _equation(self, case: Case, policy: Policy) -> tuple[Array, Array]:
        """-dV/dt by differences, and the rest of the equation at random states."""
        problem, value = case.problem, exact.limit.value(case.problem, policy)
        cov = policy.exploration
        spread = 0.0 if cov is None else float(np.trace(cov))
        bonus = 0.0 if problem.entropy_weight == 0 or cov is None else problem.entropy_weight * float(entropy(cov))
        left, right, step = [], [], 1e-3 * problem.horizon
        for i in (case.grid.steps // 4, case.grid.steps // 2, 3 * case.grid.steps // 4):
            t, x = float(case.grid.times[i]), random_states(case, i)
            near, far = (value(t + k * step, x) - value(t - k * step, x) for k in (1, 2))
            f, g2, h, kappa = problem.schedule.rates(t, problem.eta)
            mu, s, (S, _, _) = policy.mean(case.grid, i, x), problem.score(t, x), value.coefficients(t)
            drift = np.sum((-f * x + h * mu) * value.gradient(t, x), axis=1)
            cost = problem.kl_weight * kappa * (np.sum((mu - s) ** 2, axis=1) + spread)
            left.append(-(8 * near - far) / (12 * step))
            right.append(drift - 0.5 * problem.eta**2 * g2 * np.trace(S) - cost + bonus - problem.discount * value(t, x))
        return np.concatenate(left), np.concatenate(right)

    def _last_step(self, case: Case) -> Iterator[Verdict]:
        """Without a truth: V_N = r is known in any dimension, and V_(N-1) is one quadrature."""
        for eta in case.etas:
            at = solved(case.at(eta))[0]
            samples, deviation = last_step(at, at.case.noise("last step", 2000 if case.quick else 8000))
            yield self.monte_carlo(at.case, mean_test(samples / deviation, 0.0), 0.25,
                                   f"{at_eta(at.case)}last step, V_(N-1) by quadrature: E test(X)(r - E[r | X]) = 0, test = 1, x_j, "
                                   "in deviations of r given X")

    def figure(self, case: Case) -> Figure:
        with style.panels(3, "value: V minus the costs already paid is a martingale") as (figure, axes):
            _draw_conditional(axes[0], case)
            _draw_martingale(axes[1], case)
            _draw_orders(axes[2], case)
        return figure


def last_step(at: Solved, noise: NoiseLike) -> tuple[Array, float]:
    """test(X_{N-1}) (r(X_N) - E[r | X_{N-1}]) for the tests 1, x_j, (n, 1 + d), and the deviation of r given X_{N-1}."""
    case, i, gaps, variances = at.case, at.case.grid.steps - 1, [], []
    for run in runs(case.problem, at.policy, case.grid, noise):
        x = run.states[:, i]
        b = branches(case, at.policy, i, x)
        r = b.next(lambda _, y: case.problem.reward.value(y), i + 1)
        now = b.mean(r)
        gaps.append((run.paths.reward - now)[:, None] * np.concatenate([np.ones((len(x), 1)), x], axis=1))
        variances.append(b.mean(r**2) - now**2)
    return np.concatenate(gaps), float(np.sqrt(np.mean(np.concatenate(variances))))


def chain_errors(case: Case, policy: Policy) -> tuple[Array, Array]:
    """Numbers of steps and the error of V at fixed states, t = 0 and T/2: to the limit, or N against 2N."""
    states = {0: random_states(case, 0), 1: random_states(case, case.grid.steps // 2)}
    grids = np.array([10, 20, 40, 80]) * (4 if case.linear else 1 if case.quick or case.problem.eta != 1 else 2)

    def curve(steps: int) -> Array:
        value = exact.value(case.problem, policy, case.problem.grid(steps))
        return np.concatenate([value(half * steps // 2, x) for half, x in states.items()])

    if not case.linear:
        every = [curve(int(n)) for n in (*grids, 2 * grids[-1])]
        return grids, np.array([np.linalg.norm(a - b) for a, b in zip(every, every[1:], strict=False)])
    limit = exact.limit.value(case.problem, policy)
    true = np.concatenate([limit(0.5 * half * case.problem.horizon, x) for half, x in states.items()])
    return grids, np.array([np.linalg.norm(curve(int(n)) - true) for n in grids])


# ---- drawing -------------------------------------------------------------------------------------------------------------


def returns_from(case: Case, i: int, x: Array, noise: NoiseLike) -> Array:
    """Returns r - sum_{j>=i} cost_j of paths restarted at X_i = x (d,), mean actions, no discount; (n,)."""
    c, policy = case.problem.coefficients(case.grid), case.policy
    state, xi = np.tile(x, (noise.paths, 1)), noise.steps(case.grid.steps, len(x))
    total = np.zeros(noise.paths)
    for j in range(i, case.grid.steps):
        a = policy.mean(case.grid, j, state)
        gap = a - case.problem.score(float(case.grid.times[j]), state)
        total -= case.problem.kl_weight * c.kappa[j] * c.dt[j] * dot(gap, gap)
        state = state + c.dt[j] * (-c.f[j] * state + c.h[j] * a) + c.noise[j] * xi[:, j]
    return total + case.problem.reward.value(state)


def _draw_conditional(ax: Axes, case: Case) -> None:
    """V(T/2, .) along the first axis: exact, planted, and by restarted paths."""
    i, d = case.grid.steps // 2, case.problem.dim
    line = np.linspace(-2.5, 2.5, 101)
    x = np.concatenate([line[:, None], np.zeros((101, d - 1))], axis=1)
    free = exact.value(replace(case.problem, kl_weight=0.0), case.policy, case.grid)
    pre = exact.value(case.problem, case.problem.pretrained(case.grid), case.grid)
    ax.plot(line, case.value(i, x), color=style.BLUE, label="V (exact)")
    ax.plot(line, 2 * free(i, x) - case.value(i, x), color=style.RED, linestyle="--", label="planted: cost added")
    ax.plot(line, pre(i, x), color=style.ORANGE, linestyle="-.", label="planted: pre-trained V")
    for k, point in enumerate(np.linspace(-2.2, 2.2, 7)):
        start = np.concatenate([[point], np.zeros(d - 1)])
        g = returns_from(case, i, start, case.noise(f"figure {k}", 4000))
        ax.errorbar(point, g.mean(), 1.96 * g.std() / np.sqrt(len(g)), fmt="o", color="black", capsize=2,
                    label="paths from x (95 %)" if k == 0 else None)
    ax.set(xlabel="first coordinate of x (state units)", ylabel="V(T/2, x) (reward units)", title="conditional mean of the return")
    ax.legend()


def _draw_martingale(ax: Axes, case: Case) -> None:
    """E V_i(X_i) - costs already paid, over time, with planted versions."""
    noise = case.noise("figure martingale", 20_000)
    run = Residuals.simulated(Solved(case, case.policy, "mean actions"), noise)
    t, zero = case.grid.times, np.zeros((len(run.cost), 1))
    drift = np.concatenate([zero, np.cumsum(run.residual, axis=1)], axis=1)  # M_i - M_0: no noise of the start
    paid = np.concatenate([zero, np.cumsum(run.cost, axis=1)], axis=1).mean(axis=0)
    J = case.truth.objective
    show = slice(None, None, 4)
    mean, bar = J + drift.mean(axis=0), 1.96 * drift.std(axis=0) / np.sqrt(len(drift))
    ax.axhline(J, color=style.BLUE, label="J (exact)")
    ax.errorbar(t[show], mean[show], bar[show], fmt="o", color="black", capsize=2, label="martingale (paths, 95 %)")
    ax.plot(t, mean + 2 * paid, color=style.RED, linestyle="--", label="planted: cost added")
    ax.plot(t, mean + paid, color=style.ORANGE, linestyle="-.", label="planted: paid costs forgotten")
    ax.set(xlabel="generation time t (horizon units)", ylabel="E[V − costs paid] (reward units)", title="constant in time")
    ax.legend(loc="upper left")


def _draw_orders(ax: Axes, case: Case) -> None:
    """The chain's V against continuous time."""
    for index, eta in enumerate((1.0, 0.5)):
        at = case.at(eta)
        grids, error = chain_errors(at, at.policy)
        style.order_line(ax, case.problem.horizon / grids, error, f"η = {eta:g}", index)
    ax.minorticks_off()
    ax.set(xlabel="step D (horizon units)", ylabel="|V of chain − V| (reward units)", title="limit: order 1", yticks=[0.02, 0.05, 0.1],
           yticklabels=["0.02", "0.05", "0.1"], xticks=[0.005, 0.01, 0.02], xticklabels=["0.005", "0.01", "0.02"])
    ax.legend()
