"""Exploration: sampled actions against the averaged dynamics (theory.md, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ctrl import exact
from ctrl.check import Array
from ctrl.elementary import dot
from ctrl.estimators import Run, runs
from ctrl.evidence import fitted_order, mean_test
from ctrl.exact.chain import LinearChain
from ctrl.noise import Noise
from ctrl.policy import AffinePolicy, Policy
from ctrl.problem import Problem
from ctrl.rollout import Paths, simulate
from ctrl.schedule import TimeGrid
from ctrl.theorems import style
from ctrl.theorems.reversal import short_grid
from ctrl.theorems.verdict import ORDER_TOLERANCE, Case, Theorem, Verdict, order_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def action_cost(policy: Policy, problem: Problem, grid: TimeGrid) -> float:
    """What sampling alone is charged: sum kappa_i D_i tr Sigma_i, before kl_weight."""
    cov = policy.exploration_cov(grid)
    assert cov is not None
    co = problem.coefficients(grid)
    return float((co.kappa * co.dt) @ np.trace(cov, axis1=1, axis2=2))


def action_cost_limit(policy: Policy, problem: Problem) -> float:
    """int kappa tr Sigma dt for a constant Sigma, by adaptive quadrature of the schedule."""
    from scipy.integrate import quad

    assert policy.exploration is not None
    kappa = quad(lambda t: problem.schedule.rates(t, problem.eta)[3], 0.0, problem.horizon, epsabs=1e-13, epsrel=1e-13)[0]
    return float(kappa * np.trace(policy.exploration))


def propagated(problem: Problem, policy: Policy, grid: TimeGrid, added: Array) -> Array:
    """Covariance at the end of what every step adds, (N, d, d) -> (d, d): sum_i (A_{N-1} ... A_{i+1}) added_i (...)'."""
    co, parts = problem.coefficients(grid), policy.parts(grid)
    assert parts is not None
    total, ahead = np.zeros((problem.dim, problem.dim)), np.eye(problem.dim)
    for i in reversed(range(grid.steps)):
        total += ahead @ added[i] @ ahead.T
        ahead = ahead @ ((1 - co.dt[i] * co.f[i]) * np.eye(problem.dim) + co.dt[i] * co.h[i] * parts.K[i])
    return total


def sampling_cov(problem: Problem, policy: Policy, grid: TimeGrid, power: int = 2) -> Array:
    """What sampled actions add per step, h^2 D^2 Sigma, (N, d, d); power = 1 is the planted h^2 D Sigma."""
    co, cov = problem.coefficients(grid), policy.exploration_cov(grid)
    assert cov is not None
    return (co.h**2 * co.dt**power)[:, None, None] * cov


def divided(problem: Problem, policy: Policy, grid: TimeGrid) -> AffinePolicy:
    """The planted policy that samples with Sigma/D, so that its noise per step has the size of a Brownian one."""
    parts, cov = policy.parts(grid), policy.exploration_cov(grid)
    assert parts is not None and cov is not None
    return AffinePolicy(parts.K, parts.k, cov / grid.dt[:, None, None])


@dataclass(frozen=True, eq=False)
class Gaps:
    r"""Sampled actions against mean actions on one grid, without sampling; s and m the two chains.

    square : E|X_s - X_m|^2 on the same noise = tr(P_s - P_m)      law : |P_s - P_m|, Frobenius      objective : J_s - J_m
    Source: theory.md, section 3.   Checked: tests/test_theorem_exploration.py::test_every_verdict_holds
    """

    square: float
    law: float
    objective: float

    @classmethod
    def of(cls, problem: Problem, sampled: Policy, grid: TimeGrid) -> Gaps:
        s = exact.evaluate(problem, sampled, grid)
        m = exact.evaluate(problem, sampled.with_exploration(None), grid)
        gap = s.terminal.cov - m.terminal.cov
        return cls(float(np.trace(gap)), float(np.linalg.norm(gap)), s.objective - m.objective)


def conditional_cost(run: Run, *, centred: bool = True) -> Array:
    r"""Per path, what sampling is charged beyond its mean: conditionally on the states it averages to zero, (n,).

        sum_i kappa_i D_i ( |a_i - s_i|^2 - |mu_i - s_i|^2 - tr Sigma_i )       (centred = False leaves tr Sigma in)

    Any problem, no truth needed.   Source: theory.md, section 3.
    Checked: tests/test_theorem_exploration.py::test_every_verdict_holds
    """
    rate = run.coefficients.kappa * run.coefficients.dt
    mean = np.stack([run.policy.mean(run.grid, i, run.states[:, i]) for i in range(run.grid.steps)], axis=1)
    off = run.actions - mean
    extra = dot(off, 2 * run.departure - off)  # |a - s|^2 - |mu - s|^2 with a - s = departure
    return extra @ rate - (action_cost(run.policy, run.problem, run.grid) if centred else 0.0)


def squared_gap(sampled: Paths, mean: Paths) -> Array:
    """|X_s - X_m|^2 per path, (n,)."""
    return np.sum((sampled.terminal - mean.terminal) ** 2, axis=1)


def _at(eta: float) -> str:
    return "" if eta == 1 else f"eta = {eta:g}: "


class Exploration(Theorem):
    """Sampled actions converge to the mean action's SDE; see `statement`."""

    name = "exploration"
    statement = ("Sampling a_i ~ N(mu, Sigma) at each grid time and holding it converges to the SDE of the mean action, since the "
                 "drift is affine in the action and the volatility is not controlled; only the cost moves at once: "
                 "E|X_sampled - X_mean|² = O(D), law gap O(D), J_sampled - J_mean → -λ ∫ κ tr Σ dt.")
    formulas = (
        r"a_i \sim \mathcal{N}(\mu, \Sigma) \quad\Rightarrow\quad \mathbb{E}\, |X^{\mathrm{sampled}} - X^{\mathrm{mean}}|^2 = O(D)",
        r"J_{\mathrm{sampled}} - J_{\mathrm{mean}} \;\to\; -\lambda \int_0^T \kappa\, \mathrm{tr}\, \Sigma\, dt \qquad (D \to 0)")

    def checks(self, case: Case) -> Iterator[Verdict]:
        if case.problem.kl_weight == 0:
            yield self.skipped(case, "lambda = 0: sampling is charged nothing")
            return
        if case.problem.discount > 0:
            yield self.skipped(case, "discount: the theorem is tried without it")
            case = case.at(case.problem.eta, discount=0.0)
        if case.linear:
            yield from self._signs(case)
            yield from self._recursion(case)
        else:
            yield self.skipped(case, "exact twin over sign patterns and the propagated covariance: need Gaussian data")
        if case.solvable:
            truth = exact.evaluate(case.problem, case.exploring, case.grid)
            yield from self._charge(case, truth)
            yield from self._sampled(case, truth)
        else:
            yield self.skipped(case, "Monte Carlo twin of J: no exact J to compare with")
        yield from self._conditional(case)
        yield from self._orders(case)

    def _signs(self, case: Case) -> Iterator[Verdict]:
        """Simulated paths averaged over all sign patterns against the recursion of the sampled chain."""
        steps = {1: 4, 2: 3}.get(case.problem.dim, 1)
        for eta in dict.fromkeys((0.0, 1.0, case.problem.eta)):
            here, what = case.at(eta), f"over all sign patterns, N = {steps}"
            variables = here.problem.dim * (1 + steps * (1 + (eta > 0)))
            if variables > 18:
                yield self.skipped(here, f"{_at(eta)}exact twin {what}: too many, 2^{variables}")
                continue
            problem, grid, sampled = here.problem, short_grid(here.problem, steps), here.exploring
            noise = Noise.signs(problem, sampled, grid)
            s, m = simulate(problem, sampled, grid, noise), simulate(problem, here.policy, grid, noise)
            truth, charge = exact.evaluate(problem, sampled, grid), action_cost(sampled, problem, grid)
            simulated = noise.weights @ np.stack([s.objective, s.reward, s.penalty], axis=1)
            expected = [truth.objective, truth.expected_reward, truth.penalty]
            yield self.exact(here, simulated, expected, 1e-12, f"{_at(eta)}E of J, reward and penalty of sampled actions {what}")
            gap = float(noise.weights @ squared_gap(s, m))
            trace = Gaps.of(problem, sampled, grid).square
            yield self.exact(here, gap, trace, 1e-12, f"{_at(eta)}E|X_sampled - X_mean|^2 = tr(P_sampled - P_mean) {what}")
            free = simulated[0] + problem.kl_weight * charge
            yield self.planted(here, free, truth.objective, 1e-12, f"{_at(eta)}tr Sigma left out of the sampled running cost")

    def _recursion(self, case: Case) -> Iterator[Verdict]:
        """What sampling adds to the covariance, h^2 D^2 Sigma per step carried to the end; and two ways to add too much."""
        for eta in case.etas:
            here = case.at(eta)
            problem, grid, sampled = here.problem, here.grid, here.exploring
            P = exact.evaluate(problem, sampled, grid).terminal.cov - exact.evaluate(problem, here.policy, grid).terminal.cov
            right = propagated(problem, sampled, grid, sampling_cov(problem, sampled, grid))
            yield self.exact(here, P, right, 1e-11, f"{_at(eta)}P_sampled - P_mean = sum of h^2 D^2 Sigma carried to the end")
            injected = propagated(problem, sampled, grid, sampling_cov(problem, sampled, grid, power=1))
            yield self.planted(here, injected, right, 1e-11, f"{_at(eta)}injecting h sqrt(D) sqrt(Sigma) noise per step")
            over = LinearChain(problem, divided(problem, sampled, grid), grid).moments[1][-1]
            mean = LinearChain(problem, here.policy, grid).moments[1][-1]
            yield self.planted(here, over - mean, right, 1e-11, f"{_at(eta)}sampling with Sigma/D")

    def _charge(self, case: Case, truth: exact.Truth) -> Iterator[Verdict]:
        """J, penalty and mean penalty of the sampled chain hang together by tr Sigma."""
        problem, charge = case.problem, action_cost(case.exploring, case.problem, case.grid)
        yield self.exact(case, truth.penalty - truth.mean_penalty, charge, 1e-11, "penalty - mean penalty = sum kappa D tr Sigma")
        parts = truth.expected_reward - problem.kl_weight * (truth.mean_penalty + charge)
        if problem.discount == 0 and problem.entropy_weight == 0:
            yield self.exact(case, truth.objective, parts, 1e-11, "J = E r - lambda (mean penalty + sum kappa D tr Sigma)")
            free = truth.expected_reward - problem.kl_weight * truth.mean_penalty
            yield self.planted(case, free, truth.objective, 1e-11, "tr Sigma left out of J (exact chain)")

    def _sampled(self, case: Case, truth: exact.Truth) -> Iterator[Verdict]:
        """J of simulated sampled actions, and their distance from mean actions on the same noise."""
        problem, grid, sampled = case.problem, case.grid, case.exploring
        noise = case.noise("exploration")
        paths, mean = (simulate(problem, p, grid, noise) for p in (sampled, case.policy))
        lost = problem.kl_weight * action_cost(sampled, problem, grid)
        objective = paths.objective - (mean.objective - case.truth.objective)  # a control variate of known mean
        yield self.monte_carlo(case, mean_test(objective, truth.objective), 0.1 * lost,
                               "J of sampled actions (must see a tenth of the lambda kappa tr Sigma charge)")
        free = mean_test(objective + lost, truth.objective)
        yield self.planted_sampled(case, free, "tr Sigma left out of the sampled running cost (simulated)")
        if not case.linear:
            return
        gap, expected = squared_gap(paths, mean), float(np.trace(truth.terminal.cov - case.truth.terminal.cov))
        right = mean_test(gap, expected)
        yield self.monte_carlo(case, right, 0.05 * expected, "E|X_sampled - X_mean|^2 on shared noise")
        over = squared_gap(simulate(problem, divided(problem, sampled, grid), grid, noise), mean)
        yield self.planted_sampled(case, mean_test(over, expected), "sampling with Sigma/D (simulated)", right)

    def _conditional(self, case: Case) -> Iterator[Verdict]:
        """The charge beyond tr Sigma has mean zero whatever the law of the states: it needs no truth."""
        if case.linear:
            return
        problem, grid, sampled = case.problem, case.grid, case.exploring
        batches = list(runs(problem, sampled, grid, case.noise("conditional", paths=1_500 if case.quick else 10_000)))
        charge = action_cost(sampled, problem, grid)
        what = "sum kappa D (|a - s|^2 - |mu - s|^2 - tr Sigma) has mean 0"
        test = mean_test(np.concatenate([conditional_cost(run) for run in batches]), 0.0)
        yield self.monte_carlo(case, test, 0.1 * charge, what)
        wrong = mean_test(np.concatenate([conditional_cost(run, centred=False) for run in batches]), 0.0)
        yield self.planted_sampled(case, wrong, "tr Sigma left out of the conditional charge")

    def _orders(self, case: Case) -> Iterator[Verdict]:
        """Both gaps vanish at order 1 in D; J moves at once by the action cost, up to O(D)."""
        if not case.solvable:
            yield self.skipped(case, "limit: no exact law to compare with")
            return
        steps = order_steps(case)
        for eta in (0.0, 0.5, 1.0, 1.5) if case.linear and not case.quick else (1.0,):
            here = case.at(eta)
            problem, sampled = here.problem, here.exploring
            gaps = [Gaps.of(problem, sampled, problem.grid(int(n))) for n in steps]
            dt, jump = problem.horizon / steps, -problem.kl_weight * action_cost_limit(sampled, problem)
            yield self.limit(here, dt, [g.law for g in gaps], 1.0, f"{_at(eta)}covariance of X_sampled against X_mean")
            yield self.limit(here, dt, [g.objective - jump for g in gaps], 1.0,
                             f"{_at(eta)}J_sampled - J_mean against -lambda int kappa tr Sigma dt")
            if case.linear:
                yield self.limit(here, dt, [g.square for g in gaps], 1.0,
                                 f"{_at(eta)}E|X_sampled - X_mean|^2 on shared noise (strong order 1/2)")
        if case.linear:
            yield from self._orders_planted(case, steps)

    def _orders_planted(self, case: Case, steps: Array) -> Iterator[Verdict]:
        """Gaps that do not vanish have order 0, not 1."""
        problem, sampled = case.problem, case.exploring
        grids = [problem.grid(int(n)) for n in steps]
        dt = problem.horizon / steps
        injected = [np.trace(propagated(problem, sampled, g, sampling_cov(problem, sampled, g, power=1))) for g in grids]
        over = [Gaps.of(problem, divided(problem, sampled, g), g).square for g in grids]
        for error, what in ((injected, "injecting h sqrt(D) sqrt(Sigma) noise"), (over, "sampling with Sigma/D")):
            slope = fitted_order(dt, np.array(error)).slope
            yield self.planted(case, slope, 1.0, ORDER_TOLERANCE, f"{what}: the gap has order {slope:.2f}, it does not vanish")

    def figure(self, case: Case) -> Figure:
        """Gaps in law and path against D beside a planted one; simulated gaps on exact curves; J."""
        with style.panels(3, "Exploration: sampled actions follow the mean action, and pay for it", width=3.9) as (figure, axes):
            _draw_orders(axes[0], case)
            _draw_paths(axes[1], case)
            _draw_objective(axes[2], case)
        return figure


STEPS = (20, 40, 80, 160, 320, 640)


def _draw_orders(ax: Axes, case: Case) -> None:
    problem, sampled = case.problem, case.exploring
    grids = [problem.grid(n) for n in STEPS]
    dt = problem.horizon / np.array(STEPS)
    gaps = [Gaps.of(problem, sampled, g) for g in grids]
    style.order_line(ax, dt, [g.square for g in gaps], "mean square, same noise", 0)
    style.order_line(ax, dt, [g.law for g in gaps], "covariance", 1)
    injected = [np.trace(propagated(problem, sampled, g, sampling_cov(problem, sampled, g, power=1))) for g in grids]
    slope = fitted_order(dt, np.array(injected)).slope
    ax.loglog(dt, injected, color=style.GREY, marker="x", label=f"planted, Σ/D: order {round(slope, 2) + 0:.2f}")
    ax.set(xlabel="step length D (horizon units)", ylabel="gap at the end (state units²)", title="Gap to mean actions")
    ax.set_ylim(top=max(injected) * 100)
    style.log_ticks(ax, dt, [f"1/{n}" for n in STEPS])
    ax.legend(loc="upper left")


def _draw_paths(ax: Axes, case: Case) -> None:
    """E|X_s - X_m|^2 along generation: exact lines, simulated points on shared noise."""
    problem, sampled = case.problem, case.exploring
    for j, steps in enumerate((20, 40, 80)):
        grid, noise = problem.grid(steps), case.noise(f"figure {steps}", 2000)
        s, m = (simulate(problem, p, grid, noise, trajectory=True).states for p in (sampled, case.policy))
        assert s is not None and m is not None
        at = np.linspace(0, steps, 11).astype(int)[1:]
        gap = np.sum((s[:, at] - m[:, at]) ** 2, axis=2)
        P_s, P_m = (LinearChain(problem, p, grid).moments[1] for p in (sampled, case.policy))
        exact_gap = np.trace(P_s - P_m, axis1=1, axis2=2)
        ax.plot(grid.times, exact_gap, color=style.COLOURS[j], linestyle=style.LINES[j])
        ax.errorbar(grid.times[at], gap.mean(axis=0), yerr=1.96 * gap.std(axis=0) / np.sqrt(len(gap)), linestyle="none",
                    color=style.COLOURS[j], marker=style.MARKERS[j], elinewidth=0.9, label=f"N = {steps}")
    ax.set(xlabel="generation time t (horizon units)", ylabel="E |X sampled − X mean|² (state units²)",
           title="Same noise; bars 95 %, exact lines")
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper right")


def _draw_objective(ax: Axes, case: Case) -> None:
    """J_s - J_m over D: exact line to the predicted jump, simulated points, and the planted cost without tr Sigma."""
    problem, sampled = case.problem, case.exploring
    dt = problem.horizon / np.array(STEPS)
    ax.plot(dt, [Gaps.of(problem, sampled, problem.grid(n)).objective for n in STEPS], color=style.BLUE, label="exact")
    jump = -problem.kl_weight * action_cost_limit(sampled, problem)
    ax.axhline(jump, color="black", linestyle="--", linewidth=1, label="limit −λ ∫ κ tr Σ dt")
    for n in STEPS[:4]:
        grid, noise = problem.grid(n), case.noise(f"figure J {n}", 4000)
        gap = simulate(problem, sampled, grid, noise).objective - simulate(problem, case.policy, grid, noise).objective
        bar, lost = 1.96 * gap.std() / np.sqrt(len(gap)), problem.kl_weight * action_cost(sampled, problem, grid)
        ax.errorbar(problem.horizon / n, gap.mean(), yerr=bar, color=style.BLUE, marker="o", elinewidth=0.9,
                    label="simulated, 95 %" if n == STEPS[0] else None)
        ax.errorbar(problem.horizon / n, gap.mean() + lost, yerr=bar, color=style.GREY, marker="x", elinewidth=0.9,
                    label="planted: no tr Σ in the cost" if n == STEPS[0] else None)
    ax.set(xlabel="step length D (horizon units)", ylabel="J sampled − J mean (reward units)", title="The objective moves at once")
    ax.legend(loc="center right")
