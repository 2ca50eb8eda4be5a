r"""Theorem `performance_difference`: from theta to theta' (theory.md, section 8).

    J(theta') - J(theta) = sum_i E_{theta'}[ Q_i(X_i, a_i) - V_i(X_i) ],       Q, V of theta, a_i ~ pi'

The local surrogate asks the same at the states of theta. The two part at second order in theta' - theta, at first order in the
path KL: the ground on which TRPO, PPO and CPPO stand. The Fisher information is what measures that KL, exactly so where mu is
linear in theta.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
from scipy.interpolate import CubicSpline

from ctrl import exact
from ctrl.check import Array
from ctrl.elementary import dot
from ctrl.estimators import Run, Score, information, runs
from ctrl.evidence import mean_test
from ctrl.noise import Noise, NoiseLike
from ctrl.policy import BasisPolicy, Policy
from ctrl.reward import BumpReward
from ctrl.schedule import TimeGrid
from ctrl.theorems import style
from ctrl.theorems.advantage import LastStep
from ctrl.theorems.kl_estimators import LATTICE_STEPS, LatticeMoments, LogRatio, States
from ctrl.theorems.path_kl import JOINT_STEPS
from ctrl.theorems.policy_gradient import pattern_steps, richardson
from ctrl.theorems.reversal import short_grid
from ctrl.theorems.value import KNOTS, Solved, along, at_eta, decay, entropy_bonus, random_states, solved, tolerance
from ctrl.theorems.verdict import Case, Theorem, Verdict, order_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REACH = 0.01  # nats between theta and theta' on the line: further, V of theta is asked for where its lattice ends
SIZES = (0.04, 0.02, 0.01, 0.005)  # |theta' - theta| of the local statements


@dataclass(frozen=True, eq=False)
class Walked(Solved):
    """A solved policy and where its chain goes."""

    @cached_property
    def states(self) -> States:
        return States.of(self.case, self.policy)

    def moved(self, step: Array) -> Walked:
        """theta + step; sampled actions also get another covariance."""
        policy = self.policy.with_theta(self.policy.theta + step)
        return replace(self, policy=policy if policy.exploration is None else policy.with_exploration(0.7 * policy.exploration))


def walked(case: Case) -> list[Walked]:
    """As `solved`."""
    return [Walked(at.case, at.policy, at.actions) for at in solved(case)]


@dataclass(frozen=True, eq=False)
class Move:
    """From a policy theta to another, theta'."""

    at: Walked
    to: Walked

    @property
    def case(self) -> Case:
        return self.at.case

    @property
    def gain(self) -> float:
        """J(theta') - J(theta)."""
        return self.to.truth.objective - self.at.truth.objective

    def worth(self, i: int, x: Array) -> Array:
        """Q_i(x, mu'(x)) - V_i(x) of theta, mean actions, (m,)."""
        return self.at.value.action_value(i, x, self.to.policy.mean(self.case.grid, i, x)) - self.at.value(i, x)

    def over(self, states: States) -> tuple[float, float]:
        """sum_i e^{-rho t_i} E of (Q_i(X_i, a_i), V_i(X_i)) of theta over given states with the actions of theta'."""
        discount, value = self.case.problem.coefficients(self.case.grid).discount, self.at.value
        Q = discount @ states.acting(self.case, self.to.policy).mean(value.action_value)
        return float(Q), float(discount @ states.mean(value))

    @cached_property
    def there(self) -> tuple[float, float]:
        """Over the states of theta'."""
        return self.over(self.to.states)

    def entropy(self, policy: Policy) -> float:
        """sum_i e^{-rho t_i} gamma D_i H(pi_i), what a policy's -gamma log pi comes to."""
        return float(self.case.problem.coefficients(self.case.grid).discount @ entropy_bonus(self.case, policy))

    @property
    def exactly(self) -> float:
        """The right-hand side of the identity; with an entropy weight q loses gamma log pi'."""
        return self.there[0] - self.there[1] + self.entropy(self.to.policy)

    @cached_property
    def surrogate(self) -> float:
        """What theta' would gain if the states stayed those of theta."""
        Q, V = self.over(self.at.states)
        return Q - V + self.entropy(self.to.policy)

    def errors(self) -> dict[str, float]:
        """Wrong right-hand sides."""
        mine, other = self.entropy(self.to.policy), self.entropy(self.at.policy)
        entropy = {} if self.case.problem.entropy_weight == 0 else {
            "no -γ log π' in q": self.exactly - mine, "-γ log π for -γ log π'": self.exactly - mine + other}
        return {"states of θ in the exact identity": self.surrogate, "Q for q": self.there[0],
                "advantage of θ'": Move(self.to, self.to).exactly} | entropy

    @cached_property
    def kl_rates(self) -> Array:
        """kappa_i D_i E_{theta'} |mu' - mu|^2, (N,): KL(P_theta' || P_theta) step by step, mean actions."""
        c, grid = self.case.problem.coefficients(self.case.grid), self.case.grid

        def squared(i: int, x: Array) -> Array:
            return np.sum((self.to.policy.mean(grid, i, x) - self.at.policy.mean(grid, i, x)) ** 2, axis=1)

        return c.kappa * c.dt * self.to.states.mean(squared)


def fisher(at: Walked) -> Array:
    r"""F = sum_i 2 kappa_i D_i E[ (d mu_i)'(d mu_i) ], (p, p): the Fisher information of the path, mean actions, eta > 0.

    Source: theory.md, section 8.   Checked: tests/test_theorem_performance_difference.py::test_fisher_is_the_hessian_of_the_path_kl
    """
    return at.states.mean(partial(information, at.case.problem, at.policy, at.case.grid)).sum(axis=0)


def directions(case: Case, seed: str, count: int) -> Array:
    """Random unit vectors of parameters, (count, p)."""
    z = case.noise(f"directions {seed}", count).start(case.policy.theta.size)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


# ---- likelihood ratios of steps and of paths -----------------------------------------------------------------------------


def weighted(run: Run, value: exact.Value, other: Policy) -> Array:
    r"""Along paths of theta, sum_i rho ( V_{i+1}(X_{i+1}) - V_i(X_i) - cost'_i ), discounted, for three choices of the ratio rho, (n, 3).

        one step: rho_i = dN(m', s^2)/dN(m, s^2) at X_{i+1}      all steps so far: rho_0 ... rho_i      the whole path: rho_0 ... rho_{N-1}

    cost' is that of theta'. The first has the mean of the surrogate, the second that of the exact identity.
    Source: theory.md, section 8.   Checked: tests/test_theorem_performance_difference.py::test_ratios_of_steps_and_of_paths
    """
    moved = replace(run, policy=other, sampler=run.policy)
    away = run.departure + moved.change
    gain = np.diff(along(run, value), axis=1) - 0.5 * run.pull * dot(away, away)
    so_far = np.cumsum(moved.log_ratio, axis=1)
    return np.stack([np.sum(np.exp(ratio) * gain, axis=1) for ratio in (moved.log_ratio, so_far, so_far[:, -1:])], axis=1)


@dataclass(frozen=True, eq=False)
class ShortCase(Case):
    """A few unequal stable steps, for tensor rules."""

    @property
    def grid(self) -> TimeGrid:
        return short_grid(self.problem, self.steps)


def tabulated(function: Callable[[Array], Array], x: Array) -> Array:
    """function (n, d) -> (n,) at states (n, d); on the line by a spline through KNOTS of its values where there are more states."""
    if x.shape[1] > 1 or len(x) <= KNOTS:
        return function(x)
    knots = np.linspace(x.min(), x.max(), KNOTS)
    return CubicSpline(knots, function(knots[:, None]))(x[:, 0])


# ---- the theorem ---------------------------------------------------------------------------------------------------------


class PerformanceDifference(Theorem):
    r"""What theta' gains over theta is theta's advantage along the paths of theta'; along its own paths, to first order only.

    Source: theory.md, sections 8 and 16.   Checked: tests/test_theorem_performance_difference.py::test_every_verdict_holds
    """

    name = "performance_difference"
    statement = ("J(θ') - J(θ) = E_θ' ∫ q(t, X', a'; π_θ) dt, on the chain Σ E_θ'[Q_i(X_i, a_i) - V_i(X_i)] exactly; with the states of θ "
                 "in their place the gap is O(|θ' - θ|²) = O(path KL); and path KL(θ || θ + δ) = ½ δ'Fδ with the Fisher information "
                 "F = Σ 2κ_i D_i E[(∂μ_i)'(∂μ_i)], exactly for policies linear in θ.")
    formulas = (
        r"J(\theta') - J(\theta) = \mathbb{E}_{\theta'} \int_0^T q(t, X'_t, a'_t; \pi_\theta)\, dt"
        r" = \sum_i \mathbb{E}_{\theta'}\left[\, Q_i^\theta(X_i, a_i) - V_i^\theta(X_i) \,\right]",
        r"L_\theta(\theta') = J(\theta) + \sum_i \mathbb{E}_\theta\left[\, Q_i^\theta(X_i, \mu'_i) - V_i^\theta(X_i) \,\right],"
        r"\qquad J(\theta') - L_\theta(\theta') = O(|\theta' - \theta|^2) = O(\mathrm{KL})",
        r"\mathrm{KL}(P_\theta \Vert P_{\theta + \delta}) = \frac{1}{2}\, \delta^\top F \delta,"
        r"\qquad F = \sum_i 2 \kappa_i D_i\, \mathbb{E}\left[ (\partial \mu_i)^\top \partial \mu_i \right]")

    def checks(self, case: Case) -> Iterator[Verdict]:
        if not (case.linear or case.problem.dim == 1):
            yield from self._last_step(case.over(10))
            for eta in case.etas:
                yield from self._sampled_fisher(case.at(eta, entropy_weight=0.0))
            yield self.skipped(case, "Q and V before the last step, and the surrogate made of them: no exact truth here")
            return
        case = case.over(max(case.steps // ((1 if case.linear else 2) * (2 if case.quick else 1)), 2))
        for eta in (*case.etas, 0.0):
            here, thorough = case.at(eta), case.linear or not case.quick
            if eta == 0 and not case.linear:
                yield from self._pointwise(here)
                continue
            both = walked(here)
            for at in both if case.linear else both[:1]:  # sampled actions on the line: once, below
                yield from self._identity(at)
            if eta > 0:
                yield from self._fisher(case.at(eta, entropy_weight=0.0))
            if case.problem.entropy_weight > 0:
                yield self.skipped(case, f"{at_eta(here)}mean actions, and what is said of them: with an entropy weight they have no objective")
            else:
                yield from self._of_means(both[0], thorough or eta == 1)
        if case.problem.entropy_weight == 0:
            yield from self._identity(walked(case.at(1.0, entropy_weight=0.3, discount=0.5))[0], "γ = 0.3, ρ = 0.5: ")

    def _of_means(self, at: Walked, thorough: bool) -> Iterator[Verdict]:
        """What is said of mean actions."""
        case, eta, quick = at.case, at.case.problem.eta, at.case.quick
        if thorough and (eta > 0 or not quick):
            yield from self._local(at)
        if eta > 0:
            yield from self._ratios(case)
        if eta == 1 or not quick:
            yield from self._bounded(case)
            if case.linear or (eta == 1 and not quick):
                yield from self._limit(at)
        if eta > 0 and ((eta == 1) == case.linear or (case.linear and not quick)):  # at eta = 1 the bump's gap is small
            yield from self._sampled(walked(case.over(10 if quick else 20))[0])

    def _moves(self, at: Walked, seed: str) -> list[Move]:
        """A few steps in random directions, so far that nothing is local; on the line within reach of V's lattice."""
        case, count = at.case, 3 if at.case.linear else 1 if at.case.quick else 2
        units = directions(case, seed, count)
        if case.linear:
            sizes = np.full(count, 0.3)
        else:
            noisy = case.at(case.problem.eta or 1.0, entropy_weight=0.0)
            F = fisher(Walked(noisy, at.policy.with_exploration(None), "mean actions"))
            sizes = np.sqrt(2 * REACH / np.einsum("kp,pq,kq->k", units, F, units))
        return [Move(at, at.moved(size * unit)) for size, unit in zip(sizes, units, strict=True)]

    def _identity(self, at: Walked, setting: str = "") -> Iterator[Verdict]:
        """J(theta') - J(theta) from two objectives, and as theta's advantage over the law of theta'."""
        case, where, moves = at.case, setting or at_eta(at.case), self._moves(at, "identity")
        gains = [move.gain for move in moves]
        yield self.exact(case, [move.exactly for move in moves], gains, tolerance(case),
                         f"{where}{at.actions}: J(θ') - J(θ) = Σ E_θ'[Q - V]" + (" + γ D H(π')" if case.problem.entropy_weight > 0 else ""))
        wrong = [move.errors() for move in moves]
        for what in wrong[0]:
            row = self.planted(case, [errors[what] for errors in wrong], gains, tolerance(case), f"{where}{at.actions}: {what}")
            yield row

    def _pointwise(self, case: Case) -> Iterator[Verdict]:
        """Without noise the identity holds from every start point."""
        if case.problem.entropy_weight > 0:
            yield self.skipped(case, "eta = 0: sampled actions on the line: their noise alone, h D sqrt(Σ), is too fine for a lattice")
            return
        at = walked(case)[0]
        move, x = self._moves(at, "pointwise")[0], random_states(case, 0)
        gain = move.to.value(0, x) - at.value(0, x)
        yield self.exact(case, flowed(move, move.to.policy, x), gain, 1e-10, "eta = 0: V' - V at start points = Σ (Q - V) along the flow of θ'")
        row = self.planted(case, flowed(move, at.policy, x), gain, 1e-10, "eta = 0: states of θ along the flow")
        yield row

    def _local(self, at: Walked) -> Iterator[Verdict]:
        """The surrogate has the right slope, and leaves J at second order in theta' - theta, at first order in the path KL."""
        case, where = at.case, at_eta(at.case)
        units = directions(case, "local", 4 if case.linear or not case.quick else 2)

        @cache
        def surrogate(k: int, size: float) -> float:
            return Move(at, at.moved(size * units[k])).surrogate

        slopes = [richardson(partial(surrogate, k), SIZES[1]) for k in range(2)]
        yield self.exact(case, slopes, units[:2] @ at.truth.gradient.theta, 1e-8, f"{where}slope of the surrogate at θ' = θ is ∇J, random directions")
        gaps = np.array([[Move(at, at.moved(size * unit)).gain - surrogate(k, size) for k, unit in enumerate(units)] for size in SIZES])
        size, error, what = np.array(SIZES), np.linalg.norm(gaps, axis=1), f"{where}J - surrogate, {len(units)} random directions"
        if case.own and not np.all(error > 1e-12):
            yield self.skipped(case, f"{what}: no gap on this problem")
            return
        yield self.limit(case, size, error, 2.0, what, over="|θ' - θ|")
        if case.problem.eta > 0:
            kl = 0.5 * size**2 * np.einsum("kp,pq,kq->k", units, fisher(at), units).mean()
            yield self.limit(case, kl, error, 1.0, what, over="path KL (nats)")

    def _bounded(self, case: Case) -> Iterator[Verdict]:
        """Pinsker: states weigh differently by at most sqrt(KL/2) in total variation, so where q is bounded the gap is too."""
        where = at_eta(case)
        if case.problem.dim > 1 or not isinstance(case.problem.reward, BumpReward):
            yield self.skipped(case, f"{where}Pinsker-type bound of the gap: needs a bounded q, i.e. a bounded reward and departure")
            return
        at = Walked(case, BasisPolicy.shift(case.problem, [0.1]), "mean actions")
        moves = [Move(at, at.moved(np.array([size]))) for size in ((0.05,) if case.quick else (0.1, 0.05, 0.02))]
        gaps, bounds = np.array([abs(move.gain - move.surrogate) for move in moves]), np.array([pinsker(move) for move in moves])
        yield self.exact(case, np.maximum(gaps - bounds[:, 0], 0.0), 0.0, 1e-12,
                         f"{where}|J - surrogate| <= Σ osc(Q - V) sqrt(KL/2), up to {np.max(gaps / bounds[:, 0]):.2g} of it, constant shift")
        row = self.planted(case, np.maximum(gaps - bounds[:, 1], 0.0), 0.0, 1e-12, f"{where}the KL for its square root in that bound (excess)")
        yield row

    def _ratios(self, case: Case) -> Iterator[Verdict]:
        """Ratios of steps and of paths in expectation, Gauss-Hermite nodes in the place of noise."""
        where, d = at_eta(case), case.problem.dim
        if not case.linear or d > 2:
            yield self.skipped(case, f"{where}likelihood ratios by tensor rules: need Gaussian data in one or two dimensions; by Monte Carlo then")
            return
        short = ShortCase(case.name, case.problem, case.quick, case.seed, steps=2, own=case.own)
        at = walked(short)[0]
        move = Move(at, at.moved(0.05 * directions(short, "ratios", 1)[0]))
        noise = Noise.gauss_hermite(short.problem, at.policy, short.grid, nodes=6 if d == 2 else 20)
        samples = np.concatenate([weighted(run, at.value, move.to.policy) for run in runs(short.problem, at.policy, short.grid, noise)])
        step, so_far, path = noise.weights @ samples
        by = f"{noise.paths} Gauss-Hermite nodes, N = 2"
        yield self.exact(short, step, move.surrogate, 1e-8, f"{where}E_θ Σ (ratio of one step)(V_(i+1) - V_i - cost'_i) = surrogate: {by}")
        yield self.exact(short, so_far, move.gain, 1e-8, f"{where}E_θ Σ (ratio of all steps so far)(...) = J(θ') - J(θ): {by}")
        for wrong, right, what in ((path, move.surrogate, "a path ratio used as a step ratio"),
                                   (step, move.gain, "a step ratio used as a path ratio")):
            yield self.planted(short, wrong, right, 1e-8, where + what)

    def _fisher(self, case: Case) -> Iterator[Verdict]:
        """KL(P_theta || P_{theta + d}) without kappa, against 1/2 d'Fd; F as the covariance of the score."""
        where, policy = at_eta(case), case.policy
        short = case.over(JOINT_STEPS if case.linear else LATTICE_STEPS)
        F = fisher(Walked(short, policy, "mean actions"))
        unit = directions(case, "fisher", 1)[0]
        steps = [size * unit for size in ((0.05, 0.3, 1.0) if case.linear else (0.05, 0.2))]
        others = [policy.with_theta(policy.theta + step) for step in steps]
        if case.linear:
            kl, by = [LogRatio.of(short, policy, other).means[0] for other in others], "joint Gaussian laws of the path"
        else:
            kl, by = [LatticeMoments.of(short, policy, other).k1 for other in others], "transition densities on a lattice"
        half = [0.5 * step @ F @ step for step in steps]
        allowed = 1e-10 if case.linear else 1e-8
        yield self.exact(case, half, kl, allowed, f"{where}½ δ'Fδ = KL(P_θ || P_(θ+δ)) by {by}, |δ| up to {np.linalg.norm(steps[-1]):.2g}")
        yield self.planted(case, 0.5 * np.array(half), kl, allowed, f"{where}the missing 2 in F")
        if case.linear and pattern_steps(case) > 1:
            short = case.over(pattern_steps(case))
            noise = Noise.signs(short.problem, policy, short.grid)
            score = np.concatenate([Score().samples(run) for run in runs(short.problem, policy, short.grid, noise)])
            F = fisher(Walked(short, policy, "mean actions"))
            yield self.exact(case, score.T @ score / len(score), F, 1e-10, f"{where}F = E[∇log p ∇log p'] over {noise.paths} sign patterns")
            yield self.planted(case, F / 2, score.T @ score / len(score), 1e-10, f"{where}the missing 2 in F, against the covariance of the score")
        elif case.problem.eta == 1 or not case.quick:
            yield from self._sampled_fisher(case)

    def _sampled_fisher(self, case: Case) -> Iterator[Verdict]:
        """(S.d)^2 and d'Fd along the same paths: the score's variance is the Fisher information, whatever the problem."""
        case, where = case.over(10), at_eta(case)
        unit, c, parts = directions(case, "fisher", 1)[0], case.problem.coefficients(case.grid), []
        for run in runs(case.problem, case.policy, case.grid, case.noise("fisher", 8000 if case.quick else 20_000)):
            moved = [case.policy.jacobian_theta(case.grid, i, run.states[:, i]) @ unit for i in range(case.steps)]
            parts.append(((Score().samples(run) @ unit) ** 2, np.sum(np.stack(moved, axis=1) ** 2, axis=2) @ (2 * c.kappa * c.dt)))
        square, F = (np.concatenate(part) for part in zip(*parts, strict=True))
        right = mean_test(square - F, 0.0)
        yield self.monte_carlo(case, right, 0.4 * float(F.mean()), f"{where}E(∇log p · d)² = d'Fd along the same paths")
        yield self.planted_sampled(case, mean_test(square - F / 2, 0.0), f"{where}the missing 2 in F, along paths", right)

    def _sampled(self, at: Walked) -> Iterator[Verdict]:
        """The identity along simulated paths of theta', the surrogate by ratios of steps along paths of theta."""
        case, where = at.case, at_eta(at.case)
        move, few, scale = visible_move(at), case.problem.dim > 2, 1 if case.quick else 3
        gap, walks = abs(move.gain - move.surrogate), case.noise("walks", scale * (4000 if few else 5000))
        if case.own and gap < 1e-12:
            yield self.skipped(case, f"{where}J(θ') - J(θ) along paths: no gap on this problem")
            return
        there, here = (mean_test(travelled(move, policy, walks), move.gain) for policy in (move.to.policy, at.policy))
        yield self.monte_carlo(case, there, gap, f"{where}mean Σ (Q - V) of θ along paths of θ' = J(θ') - J(θ); must see the surrogate in its place")
        yield self.planted_sampled(case, here, f"{where}states of θ in the exact identity, along paths", there)
        if few:
            yield self.skipped(case, f"{where}likelihood ratios of paths in d = {case.problem.dim}: too few of these paths see the gap")
            return
        noise = case.noise("ratios", scale * 20_000)
        samples = np.concatenate([weighted(run, at.value, move.to.policy) for run in runs(case.problem, at.policy, case.grid, noise)])
        step, so_far, path = (mean_test(samples[:, j], mean) for j, mean in enumerate((move.surrogate, move.gain, move.surrogate)))
        yield self.monte_carlo(case, step, gap, f"{where}mean Σ (ratio of one step)(V_(i+1) - V_i - cost'_i) along paths of θ = surrogate")
        yield self.monte_carlo(case, so_far, 2 * gap, f"{where}mean Σ (ratio of all steps so far)(...) along paths of θ = J(θ') - J(θ)")
        yield self.planted_sampled(case, path, f"{where}a path ratio used as a step ratio, along paths", step)

    def _limit(self, at: Walked) -> Iterator[Verdict]:
        """sum D E_theta'[q] with the advantage rate q tends to the gain at order 1: of continuous time, or on the line of the chain itself."""
        case, where = at.case, at_eta(at.case)
        step = (0.3 if case.linear else 0.1) * np.eye(at.policy.theta.size)[0]

        def curve(steps: int) -> float:
            here = Walked(case.over(steps), at.policy, at.actions)
            move, c = Move(here, here.moved(step)), case.problem.coefficients(here.case.grid)
            q = exact.advantage(case.problem, at.policy, here.case.grid)
            total = float((c.discount * c.dt) @ move.to.states.acting(here.case, move.to.policy).mean(q))
            return total if case.linear else total - move.gain

        steps, target = order_steps(case) // (4 if case.quick else 1 if case.linear else 2), 0.0
        if case.linear:
            before, after = (exact.limit.evaluate(case.problem, policy).objective for policy in (at.policy, at.moved(step).policy))
            target = after - before
        to = "J(θ') - J(θ) of continuous time" if case.linear else "J(θ') - J(θ) of the chain"
        error = [abs(curve(n) - target) for n in steps.tolist()]
        if case.own and not np.all(np.array(error) > 1e-12):
            yield self.skipped(case, f"{where}Σ D E_θ' q(t, X', a'): no error to fit on this problem")
            return
        row = self.limit(case, case.problem.horizon / steps, error, 1.0, f"{where}Σ D E_θ' q(t, X', a') -> {to}")
        yield row

    def _last_step(self, case: Case) -> Iterator[Verdict]:
        """Policies that differ in the last step alone: V_N = r is known, one quadrature gives Q."""
        for eta in case.etas[: 1 if case.quick else None]:
            here = case.at(eta)
            if case.problem.entropy_weight > 0:
                yield self.skipped(case, f"{at_eta(here)}the last step of mean actions: with an entropy weight they have no objective")
                continue
            gain, worth, Q = last_gains(here, here.noise("last step", 800 if case.quick else 3000))
            right, scale = mean_test(gain - worth, 0.0), float(np.abs(worth).mean())
            yield self.monte_carlo(here, right, scale, f"{at_eta(here)}r' - cost' - (r - cost) = Q(X, a') - V(X) in the mean, policies that differ "
                                                       "in the last step")
            for what, wrong in (("Q for q", Q), ("advantage of θ'", np.zeros_like(Q))):
                yield self.planted_sampled(here, mean_test(gain - wrong, 0.0), f"{at_eta(here)}{what}, in the last step", right)

    def figure(self, case: Case) -> Figure:
        with style.panels(3, "performance_difference: from θ to θ'", width=4.3, height=3.6) as (figure, axes):
            at = walked(case)[0]
            _draw_gain(axes[0], at)
            _draw_gap(axes[1], at)
            _draw_fisher(axes[2], at)
        return figure


def pinsker(move: Move) -> Array:
    r"""sum_i e^{-rho t_i} osc(Q_i - V_i) sqrt(KL_i / 2), KL_i that of X_0 ... X_i, and the same with KL_i / 2 for its root: a planted error, (2,).

        | E_{theta'} F(X_i) - E_theta F(X_i) | <= osc(F) TV <= osc(F) sqrt(KL_i / 2),      osc = sup - inf over the states of both

    Source: theory.md, section 8.   Checked: tests/test_theorem_performance_difference.py::test_the_bound_holds_and_its_plain_kl_does_not
    """
    discount, osc = move.case.problem.coefficients(move.case.grid).discount, []
    half = 0.5 * np.concatenate([[0.0], np.cumsum(move.kl_rates)[:-1]])
    for i, states in enumerate(zip(move.to.states.nodes, move.at.states.nodes, strict=True)):
        osc.append(float(np.ptp(move.worth(i, np.concatenate(states)))))
    return np.array([(discount * osc) @ np.sqrt(half), (discount * osc) @ half])


def flowed(move: Move, drives: Policy, x: Array) -> Array:
    """sum_i e^{-rho t_i} (Q_i(X_i, mu'(X_i)) - V_i(X_i)) along noiseless paths of one policy from x (n, d), (n,)."""
    case, c, total = move.case, move.case.problem.coefficients(move.case.grid), np.zeros(len(x))
    for i in range(case.steps):
        total += c.discount[i] * move.worth(i, x)
        x = x + c.dt[i] * (-c.f[i] * x + c.h[i] * drives.mean(case.grid, i, x))
    return total


def travelled(move: Move, policy: Policy, noise: NoiseLike) -> Array:
    """sum_i e^{-rho t_i} (Q_i(X_i, mu'(X_i)) - V_i(X_i)) along simulated paths of a policy, (n,)."""
    case, totals = move.case, []
    for run in runs(case.problem, policy, case.grid, noise):
        total = np.zeros(len(run.states))
        for i, discount in enumerate(run.coefficients.discount):
            total += discount * tabulated(partial(move.worth, i), run.states[:, i])
        totals.append(total)
    return np.concatenate(totals)


def visible_move(at: Walked, nats: float = 0.3) -> Move:
    """Of four moves of about so many nats, the improvement (the tails of a loss are heavy) that owes most to the change of the states."""
    p, F = at.policy.theta.size, fisher(at)
    units = [sign * unit for unit in (np.eye(p)[0], np.ones(p) / np.sqrt(p)) for sign in (1, -1)]
    moves = [Move(at, at.moved(np.sqrt(2 * nats / (unit @ F @ unit)) * unit)) for unit in units]
    return max(moves, key=lambda move: (move.gain > 0, abs(move.gain - move.surrogate)))


def last_gains(case: Case, noise: NoiseLike) -> tuple[Array, Array, Array]:
    """What another last action changes on the same noise, (r' - cost') - (r - cost); Q(X, a') - V(X); Q(X, a'): (n,) each, undiscounted before T."""
    c, grid, i, value, parts = case.problem.coefficients(case.grid), case.grid, case.steps - 1, LastStep(case), []
    for run in runs(case.problem, case.policy, grid, noise):
        x, a = run.states[:, i], case.policy.mean(grid, i, run.states[:, i])
        other, s = a + 0.5, case.problem.score(float(grid.times[i]), x)

        def ends(action: Array, x: Array = x, s: Array = s, xi: Array = run.xi[:, i]) -> Array:
            y = x + c.dt[i] * (-c.f[i] * x + c.h[i] * action) + c.noise[i] * xi
            cost = case.problem.kl_weight * c.kappa[i] * c.dt[i] * np.sum((action - s) ** 2, axis=1)
            return decay(case, i) * case.problem.reward.value(y) - cost

        Q = value.action_value(i, x, other)
        parts.append((ends(other) - ends(a), Q - value.action_value(i, x, a), Q))
    gain, worth, Q = (np.concatenate(part) for part in zip(*parts, strict=True))
    return gain, worth, Q


# ---- drawing -------------------------------------------------------------------------------------------------------------


def _draw_gain(ax: Axes, at: Walked) -> None:
    """Along a ray of parameters: the gain from two objectives, theta's advantage along simulated paths, and planted errors."""
    unit, line = np.eye(at.policy.theta.size)[0], np.linspace(-0.3, 0.3, 13)
    moves = [Move(at, at.moved(size * unit)) for size in line]
    ax.plot(line, [move.gain for move in moves], color=style.BLUE, label="J(θ') − J(θ), exact")
    ax.plot(line, [move.surrogate for move in moves], color=style.RED, linestyle="--", label="surrogate (planted: states of θ)")
    ax.plot(line, [Move(move.to, move.to).exactly for move in moves], color=style.ORANGE, linestyle="-.", label="planted: advantage of θ'")
    for j, move in list(enumerate(moves))[::3]:
        samples = travelled(move, move.to.policy, at.case.noise(f"figure {j}", 2000))
        ax.errorbar(line[j], samples.mean(), 1.96 * samples.std() / np.sqrt(len(samples)), fmt="o", color="black", capsize=2,
                    label="Σ (Q − V) along paths of θ' (95 %)" if j == 0 else None)
    ax.set(xlabel="θ' − θ along the first coordinate", ylabel="gain (reward units)", title=f"The identity, N = {at.case.steps}")
    ax.legend(loc="lower right")


def _draw_gap(ax: Axes, at: Walked) -> None:
    """J - surrogate against the distance, in random directions; J itself for the planted advantage of theta'."""
    units, sizes = directions(at.case, "figure", 3), np.array([0.08, *SIZES])
    for k, unit in enumerate(units):
        moves = [Move(at, at.moved(size * unit)) for size in sizes]
        style.order_line(ax, sizes, np.abs([move.gain - move.surrogate for move in moves]), f"direction {k + 1}", k)
    style.order_line(ax, sizes, np.abs([move.gain for move in moves]), "planted, advantage of θ'", 3)
    ax.set(xlabel="|θ' − θ|", ylabel="|J(θ') − J(θ) − surrogate| (reward units)", title="Gap of the surrogate")
    ax.set_ylim(top=ax.get_ylim()[1] * 40)
    ax.legend(loc="upper left", ncols=2, fontsize=7)


def _draw_fisher(ax: Axes, at: Walked) -> None:
    """Path KL between theta and theta + delta: joint laws, sampled log-ratios, 1/2 delta'F delta, and F without its 2."""
    case, unit, sizes = at.case, np.eye(at.policy.theta.size)[0], np.array([0.05, 0.1, 0.2, 0.4, 0.8])
    half = 0.5 * sizes**2 * float(unit @ fisher(at) @ unit)
    ax.loglog(sizes, half, color=style.BLUE, label="½ δ'Fδ")
    ax.loglog(sizes, half / 2, color=style.RED, linestyle="--", label="planted: 2 missing in F")
    others = [at.moved(size * unit).policy for size in sizes]
    ax.loglog(sizes, [LogRatio.of(case, at.policy, other).means[0] for other in others], linestyle="none", marker="s", markersize=8,
              markerfacecolor="none", color="black", label="KL of the joint Gaussian laws")
    run, c = next(runs(case.problem, at.policy, case.grid, case.noise("figure KL", 3000))), case.problem.coefficients(case.grid)
    change = np.stack([others[0].mean(case.grid, i, run.states[:, i]) for i in range(case.steps)], axis=1) - run.actions
    back = -change / sizes[0] * (c.h * c.dt / c.noise)[:, None]  # mu is linear in theta: one change serves every size
    for size in sizes:
        k1 = np.sum(size * back * run.xi + 0.5 * (size * back) ** 2, axis=(1, 2))
        ax.errorbar(1.04 * size, k1.mean(), 1.96 * k1.std() / np.sqrt(len(k1)), fmt="o", color=style.ORANGE, capsize=2,
                    label="mean log-ratio, 3,000 paths (95 %)" if size == sizes[0] else None)
    ax.set(xlabel="|δ|, first coordinate", ylabel="KL(P_θ || P_(θ+δ)) (nats)", title="Fisher information of the path")
    style.log_ticks(ax, sizes, [f"{size:g}" for size in sizes])
    ax.legend(loc="upper left")
