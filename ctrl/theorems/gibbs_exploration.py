r"""The entropy-regularised policy is Gaussian, and q-learning's two conditions (theory.md, section 10).

    max over pi of  E_{a~pi} Q_i(x, a) + gamma D H(pi)   is attained at   pi*(a | x) = exp( Q_i(x, a) / (gamma D) ) / Z_i(x)

For Gaussian data Q_i is quadratic in a, so pi* is N( M^{-1} [...], gamma M^{-1} ), M = 2 lambda kappa I + h^2 D S, at every step size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from scipy.interpolate import CubicSpline

from ctrl import exact
from ctrl.check import Array
from ctrl.estimators import Run, runs
from ctrl.evidence import mean_test
from ctrl.exact.chain import LinearChain, entropy
from ctrl.laws import Gaussian
from ctrl.noise import Noise, NoiseLike
from ctrl.policy import AffinePolicy, Policy
from ctrl.problem import Problem
from ctrl.rollout import simulate
from ctrl.schedule import TimeGrid
from ctrl.theorems import style
from ctrl.theorems.advantage import REACH, LastStep, actions
from ctrl.theorems.reversal import short_grid
from ctrl.theorems.value import KNOTS, Solved, along, at_eta, random_states, some_steps, tolerance
from ctrl.theorems.verdict import Case, Theorem, Verdict, order_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENTROPY = 0.6  # entropy weight in units of kl_weight where a problem has none; 1 would hide gamma and lambda exchanged
ROUNDS = 6  # of policy iteration, which is Newton's method on the Riccati recursion
PATTERN_VARIABLES = 14
SPACING = 0.72  # of nodes over actions, in deviations: the trapezoid rule is off by exp(-2 pi^2/0.72^2) = 3e-17
STATIONARY = 1e-6  # per unit of a tilt
COARSE = 1e-2  # of a covariance extrapolated to D = 0


def regularised(case: Case, eta: float) -> Case:
    """The case at an eta with an entropy weight: the problem's own, or ENTROPY kl_weight."""
    return case.at(eta, entropy_weight=case.problem.entropy_weight or ENTROPY * case.problem.kl_weight)


def behaviour(problem: Problem, grid: TimeGrid) -> Policy:
    """Whoever collects the paths: the pre-trained mean, and another covariance than the policy's."""
    d = problem.dim
    return problem.pretrained(grid).with_exploration(0.6 * np.eye(d) - np.full((d, d), 0.25 / d))


def scattered(case: Case, policy: Policy, i: int, count: int = 8) -> tuple[Array, Array]:
    """Random states, each `count` times, with actions scattered around the policy's mean, (count n, d) each."""
    x = np.tile(random_states(case, i), (count, 1))
    return x, policy.mean(case.grid, i, x) + REACH * case.noise(f"scattered {i}", len(x)).actions(1, x.shape[1])[:, 0]


def over_actions(values: Array, count: int = 8) -> Array:
    """What `scattered` rows say, less their mean over the actions of a state, (count, n)."""
    table = values.reshape(count, -1)
    return table - table.mean(axis=0)


def spread_states(case: Case, t: float) -> Array:
    """States (n, d) for an order at time t: on the line 25 of them over +-2 deviations, as at a few random ones errors may cancel."""
    if case.problem.dim > 1:
        return random_states(case, round(t / case.problem.horizon * case.grid.steps))
    law = case.problem.marginal(t)
    return law.mean + np.sqrt(law.cov[0, 0]) * np.linspace(-2.0, 2.0, 25)[:, None]


# ---- the maximiser on a linear chain -------------------------------------------------------------------------------------


def improved(problem: Problem, policy: Policy, grid: TimeGrid) -> AffinePolicy:
    r"""The maximiser of E_a Q_i + gamma D H at every step and state, Q of the given policy: one round of policy iteration.

        N( M^{-1} [ 2 lambda kappa s + h (w - S (1 - D f) x) ], gamma M^{-1} ),   M = 2 lambda kappa I + h^2 D S

    S, w of V_{i+1} = -1/2 x'Sx + w'x + z, times e^{-rho D}.  Gaussian data, quadratic reward; M must be positive.
    Source: theory.md, section 10.   Checked: tests/test_theorem_gibbs_exploration.py::test_every_verdict_holds
    """
    S, w, _ = LinearChain(problem, policy, grid).values
    c, pre, decay = problem.coefficients(grid), problem.pretrained(grid), np.exp(-problem.discount * grid.dt)
    assert isinstance(pre, AffinePolicy)
    pull, gain, keep = 2 * problem.kl_weight * c.kappa, decay * c.h, 1 - c.dt * c.f
    M = pull[:, None, None] * np.eye(problem.dim) + (gain * c.h * c.dt)[:, None, None] * S[1:]
    K = np.linalg.solve(M, pull[:, None, None] * pre.K - (gain * keep)[:, None, None] * S[1:])
    k = np.linalg.solve(M, (pull[:, None] * pre.k + gain[:, None] * w[1:])[:, :, None])[:, :, 0]
    return AffinePolicy(K, k, problem.entropy_weight * np.linalg.inv(M))


def continuous(problem: Problem, policy: Policy, grid: TimeGrid) -> AffinePolicy:
    r"""The formula of continuous time put on the chain: N( s + h/(2 lambda kappa) grad V_i, gamma/(2 lambda kappa) I ); off by O(D).

    Source: theory.md, section 10.   Checked: tests/test_theorem_gibbs_exploration.py::test_continuous_formula_falls_at_second_order
    """
    S, w, _ = LinearChain(problem, policy, grid).values
    c, pre = problem.coefficients(grid), problem.pretrained(grid)
    assert isinstance(pre, AffinePolicy)
    pull = 2 * problem.kl_weight * c.kappa
    rate, cov = c.h / pull, (problem.entropy_weight / pull)[:, None, None] * np.eye(problem.dim)
    return AffinePolicy(pre.K - rate[:, None, None] * S[:-1], pre.k + rate[:, None] * w[:-1], cov)


def weighted_kl(problem: Problem, grid: TimeGrid, under: Policy, first: Policy, second: Policy) -> float:
    r"""gamma sum_i e^{-rho t_i} D_i E KL( first(. | X_i) || second(. | X_i) ), states of `under`; reward units.

    What a round of policy iteration gains (under = second = its result, first = where it began), and what any policy loses
    against the optimum (under = first, second = the optimum).
    Source: theory.md, sections 8 and 10.   Checked: tests/test_theorem_gibbs_exploration.py::test_every_verdict_holds
    """
    c, (m, P) = problem.coefficients(grid), LinearChain(problem, under, grid).moments
    one, two, cov, other = first.parts(grid), second.parts(grid), first.exploration_cov(grid), second.exploration_cov(grid)
    assert one is not None and two is not None and cov is not None and other is not None
    dK = one.K - two.K
    gap = np.einsum("kij,kj->ki", dK, m[:-1]) + one.k - two.k
    spread = cov + dK @ P[:-1] @ dK.transpose(0, 2, 1) + gap[:, :, None] * gap[:, None, :]
    trace = np.einsum("kij,kji->k", np.linalg.inv(other), spread)
    kl = 0.5 * (trace - problem.dim + np.linalg.slogdet(other)[1] - np.linalg.slogdet(cov)[1])
    return problem.entropy_weight * float((c.discount * c.dt) @ kl)


def log_density(policy: Policy, grid: TimeGrid, i: int, x: Array, a: Array) -> Array:
    """log pi(a | t_i, x), (n, d), (n, d) -> (n,)."""
    cov = policy.exploration_cov(grid)
    assert cov is not None
    return Gaussian(np.zeros(x.shape[1]), cov[i]).log_density(a - policy.mean(grid, i, x))


def wrong_curvatures(problem: Problem, grid: TimeGrid) -> list[tuple[str, Array, str]]:
    """(what, what stands in the place of 2 lambda kappa per step, why that is no error here or "")."""
    c, weight = problem.coefficients(grid), problem.kl_weight
    right = 2 * weight * c.kappa
    wrong = [("covariance γ λ g²", 1 / (weight * c.g2), "λ g² equals 1/(2 λ κ) here"), ("covariance γ/(λ κ): 2 missing", weight * c.kappa, ""),
             ("covariance γ/(λ g²), that of eta = 1", weight * c.g2, "2 κ is g² at this eta")]
    return [(what, other, why if np.allclose(other, right) else "") for what, other, why in wrong]


# ---- the maximiser by quadrature -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Density:
    r"""A density over actions at states x, on the nodes of a trapezoid rule, and what a step earns there.

    a : (m, n, d)   log_weight : (m, n), the rule's volume elements   log_p : (m, n)   Q : (m, n) in units of gamma D
    """

    a: Array
    log_weight: Array
    log_p: Array
    Q: Array

    @property
    def mass(self) -> Array:
        return np.exp(self.log_p + self.log_weight)

    @property
    def mean(self) -> Array:
        return np.einsum("mn,mnd->nd", self.mass, self.a)

    @property
    def cov(self) -> Array:
        off = self.a - self.mean
        return np.einsum("mn,mni,mnj->nij", self.mass, off, off)

    @property
    def value(self) -> Array:
        """E_p Q + gamma D H(p) in units of gamma D, (n,): what the Gibbs law maximises."""
        return np.sum(self.mass * (self.Q - self.log_p), axis=0)

    def times(self, log_factor: Array) -> Density:
        """The density times exp(log_factor), normalised again."""
        log_p = self.log_p + log_factor
        top = np.max(log_p + self.log_weight, axis=0)
        return replace(self, log_p=log_p - top - np.log(np.sum(np.exp(log_p + self.log_weight - top), axis=0)))

    @property
    def tilts(self) -> Array:
        """z_j, z_j^2 and sin 2 z_j, z standardised, (3 d, m, n)."""
        z = (self.a - self.mean) / np.sqrt(np.einsum("nii->ni", self.cov))
        return np.concatenate([z, z**2, np.sin(2 * z)], axis=2).transpose(2, 0, 1)

    def slopes(self, tilts: Array, step: float = 5e-3) -> Array:
        """What tilting by e^{epsilon phi} gains per epsilon, (len(tilts), n), by differences with error step^4."""
        near, far = (np.stack([self.times(e * phi).value - self.times(-e * phi).value for phi in tilts]) for e in (step, 2 * step))
        return (8 * near - far) / (12 * step)


def gibbs(case: Case, value: exact.Value, i: int, x: Array) -> Density:
    r"""exp(Q_i(x, a) / (gamma D)) normalised over actions, nodes SPACING deviations apart to +-8 of them.

    The nodes are first those of the continuous formula, then those of the density found there.
    Source: theory.md, section 10.   Checked: tests/test_theorem_gibbs_exploration.py::test_gibbs_density_is_its_gaussian
    """
    d, c = x.shape[1], case.problem.coefficients(case.grid)
    pull, unit = 2 * case.problem.kl_weight * c.kappa[i], case.problem.entropy_weight * c.dt[i]
    z = np.array(list(product(SPACING * np.arange(-11, 12), repeat=d)))
    z = z[np.sum(z**2, axis=1) <= 66.0]
    mean = case.problem.score(float(case.grid.times[i]), x) + c.h[i] / pull * value.gradient(i + 1, x)
    root = np.broadcast_to(np.sqrt(case.problem.entropy_weight / pull) * np.eye(d), (len(x), d, d))
    for _ in range(2):
        a = mean + np.einsum("nij,mj->mni", root, z)
        Q = value.action_value(i, np.tile(x, (len(z), 1)), a.reshape(-1, d)).reshape(len(z), len(x)) / unit
        volume = d * np.log(SPACING) + np.linalg.slogdet(root)[1]
        found = Density(a, np.broadcast_to(volume, Q.shape), np.zeros_like(Q), Q).times(Q)
        mean, root = found.mean, np.linalg.cholesky(found.cov)
    return found


# ---- q-learning ----------------------------------------------------------------------------------------------------------


def action_values(run: Run, value: exact.Value) -> Array:
    r"""e^{-rho t_i} Q_i(X_i, a_i) along paths of any policy, (n, N).

    Q + cost depends on the mean of the next state alone; on the line a spline through KNOTS exact values a step stands in.
    """
    c, grid, out = run.coefficients, run.grid, np.empty(run.departure.shape[:2])
    for i in range(grid.steps):
        x, a, keep = run.states[:, i], run.actions[:, i], 1 - c.dt[i] * c.f[i]
        if x.shape[1] > 1 or len(x) <= KNOTS:
            out[:, i] = c.discount[i] * value.action_value(i, x, a)
            continue
        centre = (keep * x + c.dt[i] * c.h[i] * a)[:, 0]
        knots = np.linspace(centre.min(), centre.max(), KNOTS)[:, None]
        still = knots / keep  # where the action 0 leads to the knots
        price = 0.5 * run.pull[i] * run.problem.score(float(grid.times[i]), still)[:, 0] ** 2
        later = c.discount[i] * value.action_value(i, still, np.zeros_like(still)) + price
        out[:, i] = CubicSpline(knots[:, 0], later)(centre) - run.cost[:, i]
    return out


def martingale_steps(run: Run, value: exact.Value) -> Array:
    r"""Increments of e^{-rho t} V + int e^{-rho t} (r_run - q) dt along paths of a behaviour policy, (n, N).

        e^{-rho t_{i+1}} V_{i+1}(X_{i+1}) - e^{-rho t_i} V_i(X_i) + e^{-rho t_i} D ( r_run - q_i ),   q_i = (Q_i - V_i)/D,
        r_run = -lambda kappa |a - s|^2

    Source: theory.md, section 10; Jia and Zhou, q-learning.   Checked: tests/test_theorem_gibbs_exploration.py::test_every_verdict_holds
    """
    V = along(run, value)
    return np.diff(V, axis=1) - run.cost - (action_values(run, value) - V[:, :-1])


def tested(run: Run, steps: Array) -> Array:
    """sum_i test_i increment_i for the tests 1, x_1, x_2, a_1, a_2 of step i, (n, up to 5)."""
    tests = np.concatenate([np.ones((*steps.shape, 1)), run.states[:, :-1, :2], run.actions[:, :, :2]], axis=2)
    return np.einsum("nk,nkj->nj", steps, tests)


def entropy_steps(problem: Problem, policy: Policy, grid: TimeGrid) -> Array:
    """gamma e^{-rho t_i} D_i H(pi_i), (N,): the drift of the martingale when the entropy stands in r as well as in q."""
    c, cov = problem.coefficients(grid), policy.exploration_cov(grid)
    assert cov is not None
    return problem.entropy_weight * c.discount * c.dt * entropy(cov)


def _along(case: Case, collector: Policy, value: exact.Value, noise: NoiseLike) -> tuple[Array, Array]:
    """`tested` increments along the paths of a noise, (n, up to 5), and the increments, (n, N)."""
    batches = [(tested(run, steps), steps) for run in runs(case.problem, collector, case.grid, noise) for steps in [martingale_steps(run, value)]]
    by_test, steps = (np.concatenate(part) for part in zip(*batches, strict=True))
    return by_test, steps


# ---- limits --------------------------------------------------------------------------------------------------------------


def limit_errors(case: Case) -> tuple[Array, Array, Array, Array, Array]:
    r"""The Gibbs law at 2T/5 and fixed states against N( s + h/(2 lambda kappa) grad V, gamma/(2 lambda kappa) I ).

    D (4,); |mean error| (4,); |covariance error| (4,); covariance by the cubic through them at D = 0, and the formula's, (n, d, d).
    grad V is that of continuous time for linear cases, the chain's own elsewhere.
    """
    problem, t, covs = case.problem, 0.4 * case.problem.horizon, []
    states = spread_states(case, t)
    _, _, h, kappa = problem.schedule.rates(t, problem.eta)
    pull, dt, mean_error, cov_error = 2 * problem.kl_weight * kappa, [], [], []
    formula = np.broadcast_to(problem.entropy_weight / pull * np.eye(problem.dim), (len(states), problem.dim, problem.dim))
    for steps in (40, 80, 160, 320) if not case.quick else (20, 40, 80, 160) if case.linear else (40, 60, 80, 100):
        at, i = case.over(steps), 2 * steps // 5
        if case.linear:
            star, slope = improved(problem, case.exploring, at.grid), exact.limit.value(problem, case.exploring).gradient(t, states)
            cov, mean = star.exploration_cov(at.grid), star.mean(at.grid, i, states)
            assert cov is not None
            covs.append(np.broadcast_to(cov[i], formula.shape))
        else:
            value = exact.value(problem, case.exploring, at.grid)
            found, slope = gibbs(at, value, i, states), value.gradient(i, states)
            mean = found.mean
            covs.append(found.cov)
        dt.append(at.grid.dt[i])
        mean_error.append(np.linalg.norm(mean - problem.score(t, states) - h / pull * slope))
        cov_error.append(np.linalg.norm(covs[-1] - formula))
    weights = [np.prod([other / (other - here) for other in dt if other != here]) for here in dt]
    extrapolated = np.einsum("k,knij->nij", weights, np.stack(covs))
    return np.array(dt), np.array(mean_error), np.array(cov_error), extrapolated, formula


def fall(problem: Problem, grid: TimeGrid) -> float:
    """J* of the chain less J of the continuous formula put in the optimum's place."""
    best = exact.optimum(problem, grid)
    return best.objective - exact.evaluate(problem, continuous(problem, best.policy, grid), grid).objective


# ---- the theorem ---------------------------------------------------------------------------------------------------------


class GibbsExploration(Theorem):
    r"""With entropy in the objective the best policy is a Gibbs law, Gaussian on linear chains; two conditions know q and V.

    Source: theory.md, sections 10 and 16.   Checked: tests/test_theorem_gibbs_exploration.py::test_every_verdict_holds
    """

    name = "gibbs_exploration"
    statement = ("With entropy weight γ the best policy against a value V is π*(a|x) ∝ exp(Q(x, a)/(γ D)), in the limit "
                 "N(s + h/(2λκ) ∇V, γ/(2λκ) I): known covariance, only the mean is learned. A round of policy iteration raises J by "
                 "γ Σ D E KL(π || π*). E_π[q - γ log π] = 0, and V + ∫ (r_run - q) dt is a martingale under every behaviour policy.")
    formulas = (
        r"\pi^*(a|x)\propto e^{Q_i(x,a)/(\gamma D)}=\mathcal{N}\left(M^{-1}[2\lambda\kappa s+h(w-S(1-Df)x)],\ \gamma M^{-1}\right),"
        r"\quad M=2\lambda\kappa I+h^2DS",
        r"\pi^*\;\to\;\mathcal{N}\left(s+\frac{h}{2\lambda\kappa}\nabla V,\ \frac{\gamma}{2\lambda\kappa}I\right)\quad(D\to 0)",
        r"J(\pi')-J(\pi)=\gamma\sum_i D_i\,E_{\pi'}KL(\pi\,\|\,\pi'),\qquad J^*-J(\pi)=\gamma\sum_i D_i\,E_{\pi}KL(\pi\,\|\,\pi^*)",
        r"E_\pi[\,q-\gamma\log\pi\,]=0,\qquad V(t,X_t)+\int_0^t(r_{run}-q)\,ds\ \ \mathrm{a\ martingale\ under\ any\ behaviour}")

    def checks(self, case: Case) -> Iterator[Verdict]:
        if case.problem.kl_weight == 0:
            yield self.skipped(case, "λ = 0: actions cost nothing, and exp(Q/(γ D)) need not be normalisable")
            return
        for eta in (*case.etas, 0.0):
            at = regularised(case, eta)
            if case.linear:
                yield from self._linear(at)
            elif case.problem.dim > 1:
                yield from self._last_step(at)
            elif eta == 0:
                yield self.skipped(case, "eta = 0: sampled actions without a linear chain: their noise alone, h D sqrt(Σ), is too fine for a lattice")
            else:
                yield from self._pointwise(at)
        if case.problem.dim > 1 and not case.linear:
            yield self.skipped(case, "steps before the last: tried on linear chains and on the line, where V of sampled actions is exact")

    def _linear(self, case: Case) -> Iterator[Verdict]:
        """Everything in closed form; an unbounded problem has no maximiser."""
        try:
            best = exact.chain.optimum(case.problem, case.grid)
        except ValueError as error:
            yield self.skipped(case, f"{at_eta(case)}no maximiser: {error}")
            return
        at = Solved(case, case.exploring, "sampled actions")
        yield from self._gibbs_law(at)
        yield from self._iteration(at, best)
        yield from self._conditions(at)
        yield from self._signs(case)
        if case.problem.eta in (0, 1) or not case.quick:
            yield from self._sampled(at)
        if case.problem.eta == 1 or not case.quick:
            yield self._falls(case)
        if case.problem.eta > 0 or not case.quick:
            yield from self._limits(at)

    def _pointwise(self, case: Case) -> Iterator[Verdict]:
        """The density by quadrature."""
        at = Solved(case, case.exploring, "sampled actions")
        yield from self._tilts(case, at.value, some_steps(case))
        yield from self._conditions(at)
        if case.problem.eta == 1 or not case.quick:
            yield from self._sampled(at)
        if case.problem.eta == 1:
            yield from self._limits(at)

    def _gibbs_law(self, at: Solved) -> Iterator[Verdict]:
        """log of the Gaussian formula against Q/(gamma D), both centred over actions; and what else people write."""
        case, where, gamma, c = at.case, at_eta(at.case), at.case.problem.entropy_weight, at.case.problem.coefficients(at.case.grid)
        star, wrong = improved(case.problem, at.policy, case.grid), wrong_curvatures(case.problem, case.grid)
        logs, Qs, excess = [], [], []
        for i in some_steps(case):
            x, a = scattered(case, star, i)
            logs.append(over_actions(log_density(star, case.grid, i, x, a)))
            Qs.append(over_actions(at.value.action_value(i, x, a) / (gamma * c.dt[i])))
            off = over_actions(np.sum((a - star.mean(case.grid, i, x)) ** 2, axis=1))
            excess.append([(2 * case.problem.kl_weight * c.kappa[i] - other[i]) / (2 * gamma) * off for _, other, _ in wrong])
        log_pi, Q, shift = (np.stack(part) for part in (logs, Qs, excess))
        yield self.exact(case, log_pi, Q, 1e-9, f"{where}log N(M⁻¹[...], γ M⁻¹) = Q/(γ D) + a function of x, at random states and actions")
        for j, (what, _, invisible) in enumerate(wrong):
            if invisible:
                yield self.skipped(case, f"{where}{what}: invisible, {invisible}")
            else:
                yield self.planted(case, log_pi + shift[:, j], Q, 1e-9, f"{where}{what}")
        yield self.planted(case, log_pi * float(case.grid.dt[0]), Q, 1e-9, f"{where}entropy without D: the law exp(Q/γ)")

    def _iteration(self, at: Solved, best: exact.Optimum) -> Iterator[Verdict]:
        """Every round gains what the KL says, down to the optimum; the continuous formula loses near it."""
        case, where, problem, grid = at.case, at_eta(at.case), at.case.problem, at.case.grid
        policies: list[Policy] = [at.policy]
        for _ in range(ROUNDS):
            policies.append(improved(problem, policies[-1], grid))
        unit = max(1.0, abs(best.objective))
        J = np.array([exact.evaluate(problem, policy, grid).objective for policy in policies]) / unit
        gains = [weighted_kl(problem, grid, new, old, new) / unit for old, new in zip(policies, policies[1:], strict=False)]
        yield self.exact(case, np.diff(J), gains, 1e-11, f"{where}J(π') - J(π) = γ Σ D E_π' KL(π || π') in {ROUNDS} rounds of policy iteration")
        yield self.exact(case, min(0.0, float(np.diff(J).min())), 0.0, 1e-13, f"{where}policy iteration never lowers J, to rounding")
        yield self.exact(case, J[-1], best.objective / unit, 1e-12, f"{where}policy iteration ends at the entropy-regularised optimum")
        others = [at.policy, behaviour(problem, grid), continuous(problem, best.policy, grid)]
        lost = np.array([best.objective - exact.evaluate(problem, policy, grid).objective for policy in others]) / unit
        yield self.exact(case, lost, [weighted_kl(problem, grid, p, p, best.policy) / unit for p in others], 1e-11,
                         f"{where}J* - J(π) = γ Σ D E_π KL(π || π*): regret is a KL between laws of actions")
        yield self.planted(case, -lost[-1], 0.0, 1e-13, f"{where}the continuous formula on the chain as a round: from the optimum J falls")
        yield self._pointwise_q(case, best)

    def _pointwise_q(self, case: Case, best: exact.Optimum) -> Verdict:
        """At the optimum q is gamma log pi* itself, action by action."""
        value, rates, logs = exact.value(case.problem, best.policy, case.grid), [], []
        for i in some_steps(case):
            x, a = scattered(case, best.policy, i)
            rates.append((value.action_value(i, x, a) - value(i, x)) / case.grid.dt[i])
            logs.append(case.problem.entropy_weight * log_density(best.policy, case.grid, i, x, a))
        return self.exact(case, np.concatenate(rates), np.concatenate(logs), 1e-9, f"{at_eta(case)}q* = γ log π*, action by action")

    def _tilts(self, case: Case, value: exact.Value, steps: tuple[int, ...]) -> Iterator[Verdict]:
        """No tilt of the Gibbs density gains anything at first order; tilts of wrong densities do. E Q + gamma D H is concave."""
        where, c, gamma = at_eta(case), case.problem.coefficients(case.grid), case.problem.entropy_weight
        wrong = wrong_curvatures(case.problem, case.grid)
        right, flat, others = [], [], []
        for i in steps:
            found = gibbs(case, value, i, random_states(case, i, 3))
            off = np.sum((found.a - found.mean) ** 2, axis=2)
            excess = [(2 * case.problem.kl_weight * c.kappa[i] - other[i]) / (2 * gamma) for _, other, _ in wrong]
            right.append(found.slopes(found.tilts))
            flat.append(found.times((c.dt[i] - 1) * found.Q).slopes(found.tilts))
            others.append([found.times(much * off).slopes(found.tilts) for much in excess])
        what = f"E Q + γ D H, in units of γ D, is stationary at exp(Q/(γ D)) under tilts by z, z², sin 2z, at steps {', '.join(map(str, steps))}"
        yield self.exact(case, np.stack(right), 0.0, STATIONARY, f"{where}{what}")
        for j, (name, _, invisible) in enumerate(wrong):
            if invisible:
                yield self.skipped(case, f"{where}{name}: invisible, {invisible}")
            else:
                yield self.planted(case, np.stack([out[j] for out in others]), 0.0, STATIONARY, f"{where}{name}")
        yield self.planted(case, np.stack(flat), 0.0, STATIONARY, f"{where}entropy without D: the law exp(Q/γ)")

    def _conditions(self, at: Solved) -> Iterator[Verdict]:
        """E_pi[q - gamma log pi] = 0 at random states."""
        case, where, gamma = at.case, at_eta(at.case), at.case.problem.entropy_weight
        rates, logs = [], []
        for i in some_steps(case):
            x = random_states(case, i)
            pi = actions(case, at.policy, i, x)
            Q = np.stack([at.value.action_value(i, x, a) for a in pi.a])
            rates.append((pi.mean(Q) - at.value(i, x)) / case.grid.dt[i])
            logs.append(gamma * pi.mean(np.stack([log_density(at.policy, case.grid, i, x, a) for a in pi.a])))
        q, log_pi = np.concatenate(rates), np.concatenate(logs)
        allowed = tolerance(case) / float(np.min(case.grid.dt))  # q is a difference of values over D
        yield self.exact(case, q - log_pi, 0.0, allowed, f"{where}E_π[q - γ log π] = 0 for q = (Q - V)/D")
        yield self.planted(case, q + log_pi, 0.0, allowed, f"{where}entropy as a cost")
        yield self.planted(case, q - log_pi / float(case.grid.dt[0]), 0.0, allowed, f"{where}entropy without D in V")

    def _signs(self, case: Case) -> Iterator[Verdict]:
        """The martingale along another policy's paths, over all sign patterns: tests of degree 1 times increments of degree 2."""
        where, d, problem = at_eta(case), case.problem.dim, case.problem
        steps = (PATTERN_VARIABLES // d - 1) // (1 + (problem.eta > 0))
        if steps < 1:
            yield self.skipped(case, f"{where}the martingale over sign patterns: more than 2^{PATTERN_VARIABLES} of them in {d} dimensions")
            return
        grid = short_grid(problem, steps)
        collector, value = behaviour(problem, grid), exact.value(problem, case.exploring, grid)
        noise = Noise.signs(problem, collector, grid)
        run = next(runs(problem, collector, grid, noise))
        assert len(run.states) == noise.paths
        steps_right, steps_twice = (martingale_steps(run, value) + extra for extra in (0.0, entropy_steps(problem, case.exploring, grid)))
        right, twice = (noise.weights @ tested(run, steps) for steps in (steps_right, steps_twice))
        size = noise.weights @ np.abs(tested(run, steps_twice))
        what = "E Σ test (increment of V + ∫ (r_run - q) dt) = 0 along another policy's paths"
        yield self.exact(case, right / size, 0.0, 1e-10, f"{where}{what}, test = 1, x_j, a_j, over {noise.paths} sign patterns")
        yield self.planted(case, twice / size, 0.0, 1e-10, f"{where}entropy counted in r and in q")

    def _sampled(self, at: Solved) -> Iterator[Verdict]:
        """The martingale along simulated paths of another policy, and J of the improved policy."""
        case, where, problem = at.case, at_eta(at.case), at.case.problem
        collector, drift = behaviour(problem, case.grid), entropy_steps(problem, at.policy, case.grid)
        if problem.eta == 0:  # given the action nothing is random: the martingale does not move at all
            still = np.concatenate([martingale_steps(run, at.value) for run in runs(problem, collector, case.grid, case.noise("q-learning", 100))])
            what = "V + ∫ (r_run - q) dt is constant, path by path, under another policy"
            yield self.exact(case, still, 0.0, 1e-11, f"{where}{what}")
            yield self.planted(case, still + drift, 0.0, 1e-11, f"{where}entropy counted in r and in q, path by path")
            return
        pilot = _along(case, collector, at.value, case.noise("q pilot", 1000))
        samples = _along(case, collector, at.value, case.noise("q-learning", 5000 if case.quick else 40_000))
        what = f"{where}V + ∫ (r_run - q) dt along another policy's paths"
        unit, spread = pilot[0].std(axis=0), pilot[1].var(axis=0)
        weight = np.divide(drift, spread, out=np.zeros_like(drift), where=spread > 0)  # of all weights of time it sees a drift best
        weight /= np.abs(weight).max()
        seen = float(drift @ weight)
        yield self.monte_carlo(case, mean_test(samples[0] / unit, 0.0), 0.15,
                               f"{what}: E Σ test increment = 0, test = 1, x_j, a_j, in deviations of a path")
        yield self.monte_carlo(case, mean_test(samples[1] @ weight, 0.0), abs(seen), f"{what} has no drift; must see the entropy counted twice")
        yield self.planted_sampled(case, mean_test((samples[1] + drift) @ weight, 0.0), f"{where}entropy counted in r and in q, along paths")
        if case.linear:
            star = improved(problem, at.policy, case.grid)
            J, gain = exact.evaluate(problem, star, case.grid).objective, weighted_kl(problem, case.grid, star, at.policy, star)
            paths = simulate(problem, star, case.grid, case.noise("improved", case.paths // 5))
            yield self.monte_carlo(case, mean_test(paths.objective, J), gain, f"{where}J of the Gibbs policy; must see what it gains")

    def _limits(self, at: Solved) -> Iterator[Verdict]:
        """Mean and covariance of the Gibbs law at 2T/5 tend to the continuous formula at order 1."""
        case, where, problem = at.case, at_eta(at.case), at.case.problem
        try:
            dt, mean, cov, extrapolated, formula = limit_errors(case)
        except ValueError as error:
            if not case.own:
                raise
            yield self.skipped(case, f"{where}limit: {error}")
            return
        yield self.limit(case, dt, mean, 1.0, f"{where}mean of the Gibbs law against s + h/(2λκ) ∇V")
        yield self.limit(case, dt, cov, 1.0, f"{where}covariance of the Gibbs law against γ/(2λκ) I")
        what = "covariance extrapolated to D = 0"
        yield self.exact(case, extrapolated, formula, COARSE, f"{where}{what} = γ/(2λκ) I")
        _, g2, _, kappa = problem.schedule.rates(0.4 * problem.horizon, problem.eta)
        for name, wrong in (("γ λ g²", problem.entropy_weight * problem.kl_weight * g2),
                            ("γ/(λ κ): 2 missing", problem.entropy_weight / (problem.kl_weight * kappa))):
            if np.isclose(wrong, formula[0, 0, 0], rtol=2 * COARSE):
                yield self.skipped(case, f"{where}covariance {name}: invisible, the same number here")
            else:
                yield self.planted(case, wrong * np.eye(problem.dim), extrapolated, COARSE, f"{where}covariance {name}, against the {what}")

    def _falls(self, case: Case) -> Verdict:
        """The continuous formula is O(D) from the optimum, so that J, flat there, falls by O(D^2)."""
        steps = order_steps(case) // 2
        falls = [fall(case.problem, case.problem.grid(int(n))) for n in steps]
        return self.limit(case, case.problem.horizon / steps, falls, 2.0,
                          f"{at_eta(case)}fall of J when the optimum is replaced by the continuous formula")

    def _last_step(self, case: Case) -> Iterator[Verdict]:
        """Without a truth: V_N = r is known, so that Q of the last step is one quadrature."""
        if case.problem.dim > 2:
            yield self.skipped(case, f"{at_eta(case)}the density over actions by quadrature: tried in 1-D and 2-D")
            return
        i, value = case.grid.steps - 1, LastStep(case)
        yield from self._tilts(case, value, (i,))
        if case.quick and case.problem.eta not in (0, 1):
            return
        samples = []
        for run in runs(case.problem, behaviour(case.problem, case.grid), case.grid, case.noise("last step", 1300 if case.quick else 8000)):
            x, a = run.states[:, i], run.actions[:, i]
            gap = run.paths.reward - value.action_value(i, x, a) * run.coefficients.discount[i] - run.cost[:, i]
            samples.append(gap[:, None] * np.concatenate([np.ones((len(x), 1)), x, a], axis=1))
        found, what = np.concatenate(samples), f"{at_eta(case)}last step along another policy's paths"
        if case.problem.eta == 0:
            yield self.exact(case, found, 0.0, 1e-11, f"{what}: r + (r_run - q) D - V = 0, path by path")
            return
        found /= found.std(axis=0)
        yield self.monte_carlo(case, mean_test(found, 0.0), 0.25, f"{what}: E test (r + (r_run - q) D - V) = 0, test = 1, x_j, a_j, in deviations")

    def figure(self, case: Case) -> Figure:
        with style.panels(4, "gibbs_exploration: the entropy-regularised policy is a Gibbs law", width=3.7) as (figure, axes):
            _draw_law(axes[0], regularised(case, 1.0))
            _draw_iteration(axes[1], regularised(case, 1.0))
            _draw_orders(axes[2], case)
            _draw_martingale(axes[3], regularised(case, 1.0))
        return figure


# ---- drawing -------------------------------------------------------------------------------------------------------------


def _draw_law(ax: Axes, case: Case) -> None:
    """The first coordinate of the action at one state: the formula, what others write, and sampled actions reweighted by exp(Q/(gamma D))."""
    at, i, c = Solved(case, case.exploring, "sampled actions"), 2 * case.grid.steps // 5, case.problem.coefficients(case.grid)
    x, gamma = random_states(case, i)[:1], case.problem.entropy_weight
    star, near = (make(case.problem, at.policy, case.grid) for make in (improved, continuous))
    mean, pull = star.mean(case.grid, i, x)[0, 0], 2 * case.problem.kl_weight * c.kappa[i]
    covs, curvature = star.exploration_cov(case.grid), gamma / pull
    assert covs is not None
    cov, line = covs[i], mean + 4 * np.sqrt(curvature) * np.linspace(-1, 1, 201)

    def normal(centre: float, variance: float) -> Array:
        return np.exp(-0.5 * (line - centre) ** 2 / variance) / np.sqrt(2 * np.pi * variance)

    ax.plot(line, normal(mean, cov[0, 0]), color=style.BLUE, label="N(M⁻¹[…], γM⁻¹)")
    ax.plot(line, normal(near.mean(case.grid, i, x)[0, 0], curvature), color=style.SKY, linestyle=":", label=f"continuous formula, N = {case.steps}")
    ax.plot(line, normal(mean, 2 * cov[0, 0]), color=style.RED, linestyle="--", label="planted: 2 missing")
    ax.plot(line, normal(mean, gamma * case.problem.kl_weight * c.g2[i]), color=style.ORANGE, linestyle="-.", label="planted: γλg²")
    _draw_reweighted(ax, at, star, i, x)
    ax.set(xlabel="action, first coordinate (score units)", ylabel="density (1 / score units)", title="π* at one state, t = 2T/5")
    ax.set_ylim(top=1.75 * ax.get_ylim()[1])
    ax.legend(loc="upper left", fontsize=7)


def _draw_reweighted(ax: Axes, at: Solved, star: AffinePolicy, i: int, x: Array) -> None:
    """Weighted histogram of a wide policy's actions, weights exp(Q/(gamma D)) / its density, with 95 % bars."""
    case, wide = at.case, AffinePolicy(star.K, star.k, 4 * np.asarray(star.exploration))
    z = case.noise("figure law", 20_000).actions(1, x.shape[1])[:, 0]
    X, factor = np.tile(x, (len(z), 1)), wide.exploration_factor(case.grid)
    assert factor is not None
    a = wide.mean(case.grid, i, X) + z @ factor[i].T
    log_weight = at.value.action_value(i, X, a) / (case.problem.entropy_weight * case.grid.dt[i]) - log_density(wide, case.grid, i, X, a)
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    low, high = np.quantile(a[:, 0], [0.08, 0.92])
    edges = np.linspace(low, high, 14)
    for k, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        inside = (a[:, 0] >= low) & (a[:, 0] < high)
        share = float(weight[inside].sum())
        error = float(np.sqrt(np.sum((weight * (inside - share)) ** 2)))
        ax.errorbar(0.5 * (low + high), share / (high - low), 1.96 * error / (high - low), fmt="o", color="black", capsize=2, markersize=3,
                    label="actions reweighted by exp(Q/γD), 95 %" if k == 0 else None)


def _draw_iteration(ax: Axes, case: Case) -> None:
    """What is missing to the optimum, round by round."""
    for j, (make, steps, label) in enumerate(((improved, case.steps, "Gibbs policy"), (continuous, case.steps, "continuous formula"),
                                              (continuous, 4 * case.steps, "continuous formula"))):
        at = case.over(steps)
        best, missing = exact.optimum(at.problem, at.grid).objective, []
        policy: Policy = at.exploring
        for _ in range(ROUNDS + 1):
            missing.append(max(best - exact.evaluate(at.problem, policy, at.grid).objective, 1e-16))
            policy = make(at.problem, policy, at.grid)
        ax.semilogy(missing, color=style.COLOURS[j], marker=style.MARKERS[j], linestyle=style.LINES[j], label=f"{label}, N = {steps}")
    ax.axhline(1e-16, color=style.GREY, linewidth=0.8, linestyle=":", label="rounding")
    ax.set(xlabel="round of policy iteration", ylabel="J* − J (reward units)", title="policy iteration ends at J*", ylim=(1e-17, 1e3))
    ax.legend(loc="upper right", fontsize=7)


def _draw_orders(ax: Axes, case: Case) -> None:
    """The continuous formula is O(D) away, and costs O(D^2) of J."""
    at = regularised(case, 0.5)
    dt, mean, cov, *_ = limit_errors(at)
    falls = [fall(at.problem, at.problem.grid(round(at.problem.horizon / D))) for D in dt.tolist()]
    style.order_line(ax, dt, mean, "mean of π*", 0)
    style.order_line(ax, dt, cov, "covariance of π*", 1)
    style.order_line(ax, dt, falls, "fall of J from J*", 2)
    ax.set(xlabel="step D (horizon units)", ylabel="error (score units; squared; reward)", title="η = 0.5: against the continuous formula")
    ax.set_ylim(top=30 * ax.get_ylim()[1])
    ax.legend(loc="upper left", fontsize=7)


def _draw_martingale(ax: Axes, case: Case) -> None:
    """V + int (r_run - q) dt along another policy's paths, and with the entropy counted twice."""
    at = Solved(case, case.exploring, "sampled actions")
    steps = _along(case, behaviour(case.problem, case.grid), at.value, case.noise("figure q", 10_000))[1]
    total, t, show = np.cumsum(steps, axis=1), case.grid.times[1:], slice(3, None, 4)
    mean, bar = total.mean(axis=0), 1.96 * total.std(axis=0) / np.sqrt(len(total))
    ax.axhline(0.0, color=style.BLUE, label="0 (exact)")
    ax.errorbar(t[show], mean[show], bar[show], fmt="o", color="black", capsize=2, label="another policy's paths (95 %)")
    ax.plot(t, mean + np.cumsum(entropy_steps(case.problem, at.policy, case.grid)), color=style.RED, linestyle="--",
            label="planted: entropy in r and in q")
    ax.set(xlabel="generation time t (horizon units)", ylabel="E[V + ∫(r − q)dt] − V₀ (reward units)", title="off-policy martingale")
    ax.legend(loc="upper left", fontsize=7)
