r"""The step size: what depends on the grid, and what must not (theory.md, section 12).

    J^D -> J,   grad J^D -> grad J,   KL^D -> KL      as D -> 0, at order 1

for one theta in continuous time on every legal grid. On the chain the error is exact: with the continuous V,

    J^D - J = sum_i E[ e^{-rho D_i} V(t_{i+1}, X_{i+1}) - V(t_i, X_i) - cost_i ]          (a telescoping sum over the chain)

each term being what one Euler step does wrong, O(D_i^2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import ArrayLike

from ctrl import exact
from ctrl.check import Array
from ctrl.evidence import mean_test
from ctrl.exact.chain import LinearChain
from ctrl.exact.limit import LimitValue
from ctrl.laws import Gaussian
from ctrl.policy import AffinePolicy, BasisPolicy, Monomials, Parts, Policy
from ctrl.problem import Problem
from ctrl.rollout import simulate
from ctrl.schedule import VE, TimeGrid
from ctrl.theorems import style
from ctrl.theorems.value import at_eta, cubature, random_states
from ctrl.theorems.value_learning import Frame, transition
from ctrl.theorems.verdict import Case, Theorem, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINED = 20  # steps of the uniform grid on which tables and functions of the step index were made
ALLOWANCE = 2.0  # times the step-size error of that grid per D: what order 1 allows any grid


# ---- grids and a policy in continuous time -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Grids t_i = T shape(i/N): one shape, any number of steps."""

    name: str
    shape: Callable[[Array], Array]

    def grid(self, problem: Problem, steps: int) -> TimeGrid:
        return TimeGrid(problem.horizon * self.shape(np.linspace(0.0, 1.0, steps + 1)))


UNIFORM = Family("uniform", lambda u: u)
QUADRATIC = Family("quadratic", lambda u: u**2)  # fine where the noise is strong
PARABOLIC = Family("parabolic", lambda u: 0.5 * (u + u**2))  # half as much so
GEOMETRIC = Family("geometric", lambda u: (1 - 0.1**u) / (1 - 0.1))  # fine at data, last step a tenth of the first


def families(case: Case) -> tuple[Family, ...]:
    """On the line steps must keep noise enough for a lattice."""
    return (UNIFORM, QUADRATIC, GEOMETRIC) if case.linear else (UNIFORM, PARABOLIC)


def moving(problem: Problem) -> BasisPolicy:
    """A departure from the score that depends on x and on t: mu = s - 0.2 (1 - t/T) x + 0.2 - 0.1 t/T."""
    eye, one = np.eye(problem.dim), np.ones(problem.dim)
    return BasisPolicy(problem, Monomials(1, problem.horizon), W=np.stack([-0.2 * eye, 0.2 * eye]), w=np.stack([0.2 * one, -0.1 * one]))


def legal(policy: Policy, problem: Problem, grid: TimeGrid) -> bool:
    """Stable: |1 - D f + D h K| < 1 in every direction (theory.md, section 1)."""
    return problem.stability_factor(policy, grid) > -1


def facts(truth: exact.Truth) -> Array:
    """(J, KL), (2,); KL is the penalty at eta = 0."""
    return np.array([truth.objective, truth.penalty])


def slope(truth: exact.Truth) -> Array:
    """grad J, (p,)."""
    return truth.gradient.theta


# ---- planted policies ----------------------------------------------------------------------------------------------------

Clock = Callable[[TimeGrid, int], float]


def counted(grid: TimeGrid, i: int) -> float:
    """The step index on the grid of training: i/TRAINED, and its last step for all that follow."""
    return min(i, TRAINED - 1) / TRAINED


def fraction(grid: TimeGrid, i: int) -> float:
    """The share of steps done, i/N: t/T on a uniform grid, and on no other."""
    return i / grid.steps


@dataclass(frozen=True, eq=False)
class Indexed(Policy):
    """A planted policy: what was learned is read off the step index, at T clock(grid, i) in the place of t_i.

    table : the whole action is (a table of actions), else only what is added to the score (basis functions of the index)
    """

    policy: BasisPolicy
    clock: Clock
    table: bool

    @property
    def theta(self) -> Array:  # type: ignore[override]
        return self.policy.theta

    @property
    def exploration(self) -> Array | None:  # type: ignore[override]
        return self.policy.exploration

    @property
    def dim(self) -> int:
        return self.policy.dim

    def with_theta(self, theta: ArrayLike) -> Self:
        return replace(self, policy=self.policy.with_theta(theta))

    def _times(self, grid: TimeGrid, i: int) -> tuple[float, float]:
        """When the score is asked for, and when the basis."""
        read = self.policy.problem.horizon * self.clock(grid, i)
        return (read if self.table else float(grid.times[i])), read

    def mean(self, grid: TimeGrid, i: int, x: Array) -> Array:
        at, read = self._times(grid, i)
        W, w = self.policy.basis.apply(read, self.theta)
        return self.policy.problem.score(at, x) + x @ W.T + w

    def jacobian_x(self, grid: TimeGrid, i: int, x: Array) -> Array:
        at, read = self._times(grid, i)
        return self.policy.problem.marginal(at).score_jacobian(x) + self.policy.basis.apply(read, self.theta)[0]

    def add_vjp(self, out: Array, grid: TimeGrid, i: int, x: Array, u: Array) -> None:
        out += self.policy.basis.adjoint(self._times(grid, i)[1], u[:, :, None] * x[:, None, :], u)

    def parts(self, grid: TimeGrid) -> Parts:
        problem, times = self.policy.problem, [self._times(grid, i) for i in range(grid.steps)]
        W, w = (np.stack(part) for part in zip(*(self.policy.basis.apply(read, self.theta) for _, read in times), strict=True))
        if not isinstance(problem.data, Gaussian):
            return Parts(W, w, tuple(problem.marginal(at) for at, _ in times))
        K, k = (np.stack(part) for part in zip(*(problem.affine_score(at) for at, _ in times), strict=True))
        return Parts(K + W, k + w, None)


INDEXED: tuple[tuple[str, Clock, bool, Family], ...] = (
    (f"a table of {TRAINED} actions, its last one repeated", counted, True, UNIFORM),
    ("a table of as many actions as steps, made on a uniform grid", fraction, True, QUADRATIC),
    (f"basis functions of the step index i/{TRAINED}", counted, False, UNIFORM),
    ("basis functions of i/N in the place of t/T", fraction, False, QUADRATIC))


# ---- what is measured ------------------------------------------------------------------------------------------------------


def etas(case: Case) -> tuple[float, ...]:
    """Every grid costs: a quick run leaves eta = 0 out, and on the line and in many dimensions tries eta = 1 alone."""
    if not case.quick:
        return (*case.etas, 0.0) if case.linear else case.etas
    return case.etas if case.linear and case.problem.dim <= 2 else (1.0,)


@dataclass(frozen=True, eq=False)
class Study:
    """A case with its policy in continuous time: exact chains on many grids, each computed once, and their limit."""

    case: Case

    @property
    def problem(self) -> Problem:
        return self.case.problem

    @cached_property
    def policy(self) -> BasisPolicy:
        return moving(self.problem)

    @cached_property
    def known(self) -> dict[tuple[str, int], exact.Truth]:
        return {}

    def truth(self, family: Family, steps: int) -> exact.Truth:
        key = (family.name, steps)
        if key not in self.known:
            self.known[key] = exact.evaluate(self.problem, self.policy, family.grid(self.problem, steps))
        return self.known[key]

    def facts(self, family: Family, steps: int) -> Array:
        """(J, KL), (2,)."""
        return facts(self.truth(family, steps))

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of steps over which orders are fitted."""
        if self.case.linear:
            return 40, 80, 160, 320
        if self.case.quick:
            return 9, 18, 36, 72
        return (20, 40, 80, 160) if self.problem.eta == 1 else (10, 20, 40, 80)  # less noise asks for a finer lattice

    @property
    def tried(self) -> tuple[int, ...]:
        """From few steps to many, on which one theta must give the same."""
        if self.case.linear:
            return (10, 100, 300) if self.case.quick else (10, 100, 1000)
        return 10, self.steps[-2], self.steps[-1]

    @property
    def planted(self) -> int:
        """Steps on which planted policies are run."""
        return 200 if self.case.linear else 80

    @cached_property
    def continuous(self) -> exact.Truth:
        return exact.limit.evaluate(self.problem, self.policy)

    @cached_property
    def limit(self) -> Array:
        """(J, KL) in continuous time, by ODEs; on the line Romberg's extrapolation of uniform grids, error O(D^3)."""
        return facts(self.continuous) if self.case.linear else self.extrapolated(facts)

    @cached_property
    def gradient(self) -> Array:
        """grad J in continuous time, (p,), by the same two ways."""
        return slope(self.continuous) if self.case.linear else self.extrapolated(slope)

    def extrapolated(self, of: Callable[[exact.Truth], Array]) -> Array:
        coarse, middle, fine = (of(self.truth(UNIFORM, self.steps[-1] * k // 2)) for k in (1, 2, 4))
        return (8 * fine - 6 * middle + coarse) / 3

    def errors(self, family: Family, of: Callable[[exact.Truth], Array], limit: Array) -> tuple[Array, Array]:
        """1/N and the size of the error, (m,) each."""
        return 1 / np.array(self.steps), np.array([np.linalg.norm(of(self.truth(family, n)) - limit) for n in self.steps])

    def excess(self, claimed: Array, grid: TimeGrid) -> Array:
        """(claimed - limit) / (what order 1 allows on a grid), (2,): within [-1, 1] for what transfers."""
        coarse, price = self.facts(UNIFORM, TRAINED) - self.limit, self.problem.kl_weight
        # J = E r - lambda KL: its two errors may cancel on one grid and not on another
        errors = np.maximum([abs(coarse[0] + price * coarse[1]) + price * abs(coarse[1]), abs(coarse[1])], 1e-9)
        return (claimed - self.limit) / (ALLOWANCE * errors * float(grid.dt.max()) * TRAINED / self.problem.horizon)


def step_defects(problem: Problem, policy: Policy, grid: TimeGrid, value: LimitValue) -> Array:
    r"""What each Euler step does wrong in the mean, (N,): e^{-rho t_i} E[ e^{-rho D_i} V(t_{i+1}, X_{i+1}) - V(t_i, X_i) - cost_i ].

    V is the continuous value; X follows the chain. Quadratic in both states: cubature is exact. Mean actions.
    Source: theory.md, sections 5 and 12.   Checked: tests/test_theorem_step_size.py::test_defects_add_up_to_the_error
    """
    frame, (z, w) = Frame(LinearChain(problem, policy, grid)), cubature(2 * problem.dim)
    discount, out = np.exp(-problem.discount * grid.times), []
    for i in range(grid.steps):
        y, cost = transition(frame, i, z)
        x = frame.colour(i, z[:, : problem.dim])
        now, later = (value(float(grid.times[j]), points) for j, points in ((i, x), (i + 1, y)))
        out.append(w @ (discount[i + 1] * later - discount[i] * (now + cost)))
    return np.array(out)


# ---- the theorem ---------------------------------------------------------------------------------------------------------


class StepSize(Theorem):
    r"""J, its gradient and the KL of one theta converge at order 1, on every legal grid to the same.

    Source: theory.md, section 12.   Checked: tests/test_theorem_step_size.py::test_every_verdict_holds
    """

    name = "step_size"
    statement = ("One θ in continuous time has the same J and the same KL in nats on every legal grid, up to O(D): J^D → J, KL^D → KL, "
                 "∇J^D → ∇J at order 1, and J^D - J = Σ E[V(t_{i+1}, X_{i+1}) - V(t_i, X_i) - cost_i] with the continuous V. Tables and "
                 "functions of the step index, and a KL without its D, do not transfer.")
    formulas = (
        r"J^D = J + O(D),\qquad \nabla_\theta J^D = \nabla_\theta J + O(D),\qquad \mathrm{KL}^D = \mathrm{KL} + O(D)",
        r"J^D - J = \sum_i \mathbb{E}\left[\, V(t_{i+1}, X_{i+1}) - V(t_i, X_i) - \mathrm{cost}_i \,\right],"
        r"\qquad \mathrm{each\ term}\ O(D_i^2)",
        r"\sum_i \kappa_i |\mu_i - s_i|^2 \sim \frac{\mathrm{KL}}{D},\qquad \sum_i \kappa_i D_i^2 |\mu_i - s_i|^2 \sim D\,\mathrm{KL}")

    def checks(self, case: Case) -> Iterator[Verdict]:
        if case.problem.entropy_weight > 0:
            yield self.skipped(case, "entropy: that of a fixed covariance is the same on every grid; tried without it")
            case = case.at(case.problem.eta, entropy_weight=0.0)
        yield from self._action(case)
        if not (case.linear or case.problem.dim == 1):
            yield self.skipped(case, "J and KL on many grids: exact in time for linear chains and on the line only")
            return
        for eta in etas(case):
            study, thorough = Study(case.at(eta)), eta == 1 or not case.quick
            if case.linear and thorough:
                yield from self._defects(study)
            if isinstance(case.problem.schedule, VE):
                yield self.skipped(case, f"{at_eta(study.case)}limit: VE is pre-asymptotic on uniform grids (it needs a geometric grid)")
                continue
            yield from self._orders(study)
            if thorough:
                yield from self._transfer(study)
                yield from self._without_step(study)
            if eta == 1:
                yield from self._sampled(study)

    def _action(self, case: Case) -> Iterator[Verdict]:
        """The action at a time is the same on every grid that has this time; what is read off the index is not."""
        problem, policy, x = case.problem, moving(case.problem), random_states(case, case.steps // 4)
        quarter = ((UNIFORM, TRAINED, TRAINED // 4), (UNIFORM, 10 * TRAINED, 10 * TRAINED // 4), (QUADRATIC, 2 * TRAINED, TRAINED))

        def acted(who: Policy) -> Array:
            return np.stack([who.mean(family.grid(problem, steps), i, x) for family, steps, i in quarter])

        right = acted(policy)
        yield self.exact(case, right, right[:1], 1e-12, "the action at t = T/4 is the same on three grids that have this time")
        for what, clock, table, family in INDEXED:
            row = self.planted(case, acted(Indexed(policy, clock, table)), right, 1e-12, f"{what}: its action at t = T/4 on {family.name} grids")
            yield row
        numbers = AffinePolicy(np.zeros((TRAINED, problem.dim, problem.dim)), np.zeros((TRAINED, problem.dim)))
        refused = float(_refuses(numbers, problem.grid(10 * TRAINED), x))
        yield self.exact(case, refused, 1.0, 0.0, f"an AffinePolicy of {TRAINED} steps is refused on {10 * TRAINED}")

    def _defects(self, study: Study) -> Iterator[Verdict]:
        """The step-size error as a sum over steps, exact at every step size."""
        value, measured, expected = exact.limit.value(study.problem, study.policy), [], []
        for family, steps in zip(families(study.case), (10, 13, 17), strict=True):
            grid = family.grid(study.problem, steps)
            measured.append(study.truth(family, steps).objective - study.limit[0])
            expected.append(float(step_defects(study.problem, study.policy, grid, value).sum()))
        yield self.exact(study.case, measured, expected, 1e-8, f"{at_eta(study.case)}J^D - J = sum of what each Euler step does wrong, "
                                                               "N = 10, 13, 17 on three kinds of grid")

    def _orders(self, study: Study) -> Iterator[Verdict]:
        """(J, KL) and grad J against the limit."""
        case, where = study.case, at_eta(study.case)
        curves = [(*study.errors(family, facts, study.limit), f"(J, KL) on {family.name} grids, to the same limit") for family in families(case)]
        if not case.quick or (case.linear and case.problem.dim <= 2 and case.problem.eta == 1):
            curves.append((*study.errors(UNIFORM, slope, study.gradient), "grad J of the chain"))
        for dt, error, what in curves:
            if np.all(error > 0):
                yield self.limit(case, dt, error, 1.0, where + what, over="1/N")
            else:
                yield self.skipped(case, f"{where}{what}: does not depend on the step size here")

    def _transfer(self, study: Study) -> Iterator[Verdict]:
        """The same J and KL from few steps to many, in units of what order 1 allows; and what does not transfer."""
        case, problem, where = study.case, study.problem, at_eta(study.case)
        grids = [(family, n) for family in families(case) for n in study.tried if legal(study.policy, problem, family.grid(problem, n))]
        worst = np.concatenate([study.excess(study.facts(family, n), family.grid(problem, n)) for family, n in grids])
        tried = f"N = {', '.join(map(str, study.tried))}, {', '.join(family.name for family in families(case))}"
        yield self.exact(case, worst, 0.0, 1.0, f"{where}one theta, the same J and KL up to O(D): {tried}; in units of what order 1 allows")
        for what, clock, table, family in INDEXED:
            grid = family.grid(problem, study.planted)
            claimed = facts(exact.evaluate(problem, Indexed(study.policy, clock, table), grid))
            row = self.planted(case, study.excess(claimed, grid), 0.0, 1.0, f"{where}{what}: (J, KL) on {study.planted} {family.name} steps")
            yield row
        yield self.skipped(case, f"{where}basis functions of i/N are no error on a uniform grid, where i/N is t/T")

    def _without_step(self, study: Study) -> Iterator[Verdict]:
        """A KL whose sum or whose variance lacks D, made right on the fewest steps, on the most; and how it goes with D."""
        case, where, few, most = study.case, at_eta(study.case), study.tried[0], study.tried[-1]
        dt = study.problem.horizon / np.array(study.steps)
        kl = np.array([study.facts(UNIFORM, n)[1] for n in study.steps])
        for what, power, growth in (("the sum lacks D", -1, "grows like N"), ("the variance lacks D", 1, "shrinks like 1/N")):
            claimed = study.facts(UNIFORM, most)[1] * (few / most) ** power
            excess = study.excess(np.array([study.limit[0], claimed]), UNIFORM.grid(study.problem, most))
            row = self.planted(case, excess, 0.0, 1.0, f"{where}KL where {what}, made right on {few} steps by its weight: on {most}")
            yield row
            yield self.limit(case, dt, kl * dt**power, power, f"{where}KL where {what} {growth}")

    def _sampled(self, study: Study) -> Iterator[Verdict]:
        """J and KL of simulated paths on two grids with the same Brownian paths: their differences are the exact ones."""
        case, problem, policy = study.case, study.problem, study.policy
        fine = problem.grid(4 * TRAINED)
        coarse, noise = fine.coarsened(4), case.noise("step size", 20_000 if not case.quick else 4000)
        many, few = simulate(problem, policy, fine, noise), simulate(problem, policy, coarse, noise.coarsened(fine, 4))
        gap = study.facts(UNIFORM, TRAINED) - study.facts(UNIFORM, 4 * TRAINED)
        on = f"on {TRAINED} steps less that on {4 * TRAINED}, same Brownian paths"
        yield self.monte_carlo(case, mean_test(few.objective - many.objective, gap[0]), max(abs(gap[0]), 0.05 * float(few.objective.std())),
                               f"J {on}; must see that there is a difference, or 0.05 of a path's deviation if that is more")
        right = mean_test(few.penalty - many.penalty, gap[1])
        yield self.monte_carlo(case, right, abs(gap[1]), f"KL {on}; must see that there is a difference")
        for wrong, ratio in (("the sum lacks D", 4.0), ("the variance lacks D", 0.25)):
            yield self.planted_sampled(case, mean_test(few.penalty - ratio * many.penalty, gap[1]), f"KL where {wrong}, between the two grids", right)

    def figure(self, case: Case) -> Figure:
        with style.panels(3, "step_size: one θ, every grid", width=4.6) as (figure, axes):
            study = Study(case)
            _draw_orders(axes[0], study)
            _draw_kl(axes[1], study)
            _draw_transfer(axes[2], study)
        return figure


def _refuses(policy: Policy, grid: TimeGrid, x: Array) -> bool:
    try:
        policy.mean(grid, 0, x)
    except ValueError:
        return True
    return False


# ---- drawing -------------------------------------------------------------------------------------------------------------

SHOWN = np.array([10, 32, 100, 316, 1000])
SHORT = ("table of 20 actions, uniform", "table of N actions, quadratic", "functions of i/20, uniform", "functions of i/N, quadratic")


def _draw_orders(ax: Axes, study: Study) -> None:
    """Errors of J and KL on three kinds of grid, and of grad J."""
    steps = np.array([20, 40, 80, 160])
    for j, family in enumerate(families(study.case)):
        error = np.array([study.facts(family, int(n)) - study.limit for n in steps])
        style.order_line(ax, 1 / steps, np.abs(error[:, 0]), f"J, {family.name}", j)
    style.order_line(ax, 1 / steps, np.abs(error[:, 1]), f"KL, {family.name}", 3)
    slopes = [float(np.linalg.norm(slope(study.truth(UNIFORM, int(n))) - study.gradient)) for n in steps]
    style.order_line(ax, 1 / steps, slopes, "∇J, uniform", 4)
    style.log_ticks(ax, 1 / steps, [f"1/{n}" for n in steps])
    ax.set(xlabel="mean step 1/N (horizon units)", ylabel="|on the grid − limit| (reward units, nats)", title="Limit: order 1")
    ax.set_ylim(top=ax.get_ylim()[1] * 10)
    ax.legend(loc="upper left", ncols=2)


def _draw_kl(ax: Axes, study: Study) -> None:
    """KL over N: on three kinds of grid, simulated, and where D is missing."""
    case, kl = study.case, np.array([study.facts(UNIFORM, int(n))[1] for n in SHOWN])
    for j, family in enumerate(families(case)):
        ax.plot(SHOWN, [study.facts(family, int(n))[1] for n in SHOWN], color=style.COLOURS[j], linestyle=style.LINES[j], label=family.name)
    for n in SHOWN[:3]:
        penalty = simulate(study.problem, study.policy, study.problem.grid(int(n)), case.noise(f"figure {n}", 4000)).penalty
        ax.errorbar(n, penalty.mean(), 1.96 * penalty.std() / np.sqrt(len(penalty)), fmt="o", color="black", capsize=2,
                    label="simulated, uniform (95 %)" if n == SHOWN[0] else None)
    ax.plot(SHOWN, kl * SHOWN / SHOWN[0], color=style.RED, marker="D", label="planted: the sum lacks D")
    ax.plot(SHOWN, kl * SHOWN[0] / SHOWN, color=style.PURPLE, marker="v", linestyle="--", label="planted: the variance lacks D")
    ax.set(xscale="log", yscale="log", xlabel="steps N", ylabel="KL (nats)", title="The same KL on every grid")
    style.log_ticks(ax, SHOWN, [f"{n:,}" for n in SHOWN])
    ax.set_ylim(top=ax.get_ylim()[1] * 300)
    ax.legend(loc="upper left", ncols=2, fontsize=7)


def _draw_transfer(ax: Axes, study: Study) -> None:
    """How far (J, KL) is from its limit over N: one theta, and what is read off the step index."""
    for j, family in enumerate(families(study.case)):
        off = [np.linalg.norm(study.facts(family, int(n)) - study.limit) for n in SHOWN]
        ax.plot(SHOWN, off, color=style.COLOURS[j], linestyle=style.LINES[j], label=family.name)
    colours = (style.RED, style.PURPLE, style.SKY, style.GREY)
    for (_, clock, table, family), short, colour, marker in zip(INDEXED, SHORT, colours, ("D", "v", "P", "X"), strict=True):
        wrong = Indexed(study.policy, clock, table)
        claimed = [facts(exact.evaluate(study.problem, wrong, family.grid(study.problem, int(n)))) for n in SHOWN[:4]]
        off = [np.linalg.norm(both - study.limit) for both in claimed]
        ax.plot(SHOWN[:4], off, color=colour, marker=marker, linestyle=":", label=f"planted: {short}")
    ax.set(xscale="log", yscale="log", xlabel="steps N", ylabel="|(J, KL) − limit| (reward units, nats)", title="What transfers, and what does not")
    style.log_ticks(ax, SHOWN, [f"{n:,}" for n in SHOWN])
    ax.set_ylim(top=ax.get_ylim()[1] * 300)
    ax.legend(loc="upper left", ncols=2, fontsize=7)
