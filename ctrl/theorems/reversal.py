"""The reversal theorem: every member of the eta-family carries the noised laws backwards (theory.md, section 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ctrl import exact
from ctrl.check import Array
from ctrl.evidence import mean_test
from ctrl.exact.chain import LinearChain
from ctrl.laws import GaussianMixture, Law
from ctrl.noise import Noise
from ctrl.policy import AffinePolicy, BasisPolicy, Policy
from ctrl.problem import Problem
from ctrl.reward import LinearReward
from ctrl.rollout import simulate
from ctrl.schedule import OU, VE, VP, Schedule, TimeGrid
from ctrl.theorems import style
from ctrl.theorems.verdict import Case, Theorem, Verdict, order_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ETAS = (0.0, 0.5, 1.0, 1.5)
TIMES = (0.0, 0.15, 0.4, 0.7, 0.95)  # of the horizon; 0.5 would hide an exchange of tau and t
ROUNDING = 1e-11
POINTS = 4001  # transported at eta = 0: the trapezoid error, 1e-7 of a variance, is far below any step-size error here


@dataclass(frozen=True, eq=False)
class Generation:
    """What somebody writes for the generation SDE at one time: dX = (-f X + h a) dt + sqrt(noise) dB, a the score of `law`."""

    f: float
    h: float
    noise: float
    law: Law


def generation(problem: Problem, t: float) -> Generation:
    """The right one: h = (1 + eta^2)/2 g^2, noise eta^2 g^2, the law at tau = T - t."""
    f, g2, h, _ = problem.schedule.rates(t, problem.eta)
    return Generation(f, h, problem.eta**2 * g2, problem.marginal(t))


def _gain_g2(problem: Problem, t: float) -> Generation:
    return replace(generation(problem, t), h=problem.schedule.rates(t, problem.eta)[1])


def _noise_g(problem: Problem, t: float) -> Generation:
    return replace(generation(problem, t), noise=problem.schedule.rates(t, problem.eta)[1])


def _sign_of_f(problem: Problem, t: float) -> Generation:
    right = generation(problem, t)
    return replace(right, f=-right.f)


def _clock_exchanged(problem: Problem, t: float) -> Generation:
    """The noise time's number in the place of the generation time's."""
    return generation(problem, problem.schedule.tau(t))


def _score_of_data(problem: Problem, t: float) -> Generation:
    return replace(generation(problem, t), law=problem.data)


Rule = Callable[[Problem, float], Generation]
PLANTED: tuple[tuple[str, Rule], ...] = (
    ("gain g^2 for h", _gain_g2), ("noise g for eta g", _noise_g), ("the sign of f", _sign_of_f),
    ("tau and t exchanged", _clock_exchanged), ("score of the un-noised data", _score_of_data))


def _components(law: Law) -> tuple[Array, Array]:
    """Means (K, d) and covariances (K, d, d) of a law seen as a mixture."""
    return (law.means, law.covs) if isinstance(law, GaussianMixture) else (law.mean[None], law.cov[None])


def log_density_rate(problem: Problem, t: float, x: Array) -> Array:
    r"""d/dt log p_{T-t}(x) from the moments of the noised law and their rates, (n, d) -> (n,); no generation SDE in it.

        d/dtau log p = sum_j rho_j [ -1/2 tr(C_j^-1 C_j') + 1/2 y'C_j^-1 C_j' C_j^-1 y + y'C_j^-1 m_j' ],   y = x - m_j
        m_j' = f m_j,   C_j' = 2 f C_j + g^2 I,      d/dt = -d/dtau

    Source: theory.md, sections 1 and 2.   Checked: tests/test_theorem_reversal.py::test_log_density_rate_is_a_derivative
    """
    law, tau = problem.marginal(t), problem.schedule.tau(t)
    f, g2 = problem.schedule.f(tau), problem.schedule.g2(tau)
    means, covs = _components(law)
    precision, cov_rate = np.linalg.inv(covs), 2 * f * covs + g2 * np.eye(problem.dim)
    pull = np.einsum("kij,nkj->nki", precision, x[:, None, :] - means)
    trace = np.einsum("kij,kji->k", precision, cov_rate)
    rates = -0.5 * trace + 0.5 * np.einsum("nki,kij,nkj->nk", pull, cov_rate, pull) + f * np.einsum("nki,ki->nk", pull, means)
    weight = law.responsibilities(x) if isinstance(law, GaussianMixture) else np.ones((len(x), 1))
    return -np.sum(weight * rates, axis=1)


def rates_in_time(problem: Problem, noise: Noise) -> tuple[Array, Array]:
    """d/dt log p at points of the marginal: from f and g^2, and by Richardson differences of the noised law, which knows alpha and v."""
    T, rates, differences = problem.horizon, [], []
    for t in (0.2 * T, 0.5 * T, 0.8 * T):
        x = problem.marginal(t).sample(noise)

        def slope(h: float, t: float = t, x: Array = x) -> Array:
            return (problem.marginal(t + h).log_density(x) - problem.marginal(t - h).log_density(x)) / (2 * h)

        rates.append(log_density_rate(problem, t, x))
        differences.append((4 * slope(5e-4 * T) - slope(1e-3 * T)) / 3)
    return np.concatenate(rates), np.concatenate(differences)


def residual(problem: Problem, t: float, x: Array, rule: Rule = generation) -> Array:
    r"""How far a generation SDE is from carrying p_{T-t}, relative to the size of its terms, (n, d) -> (n,).

        d_t log p + div b + b.s - noise/2 (div s + |s|^2) = 0,      b = -f x + h a,   s = grad log p_{T-t},   noise = eta^2 g^2

    the Fokker-Planck equation of dX = b dt + sqrt(noise) dB divided by p.  a = s for the theorem; div from closed Jacobians.
    Source: theory.md, section 2.   Checked: tests/test_theorem_reversal.py::test_every_verdict_holds
    """
    law, written = problem.marginal(t), rule(problem, t)
    s, div_s = law.score(x), np.trace(law.score_jacobian(x), axis1=1, axis2=2)
    b = -written.f * x + written.h * written.law.score(x)
    div_b = -written.f * problem.dim + written.h * np.trace(written.law.score_jacobian(x), axis1=1, axis2=2)
    terms = np.stack([log_density_rate(problem, t, x), div_b, np.sum(b * s, axis=1), -0.5 * written.noise * div_s,
                      -0.5 * written.noise * np.sum(s**2, axis=1)])
    return terms.sum(axis=0) / np.abs(terms).sum(axis=0)


def worst_residual(problem: Problem, noise: Noise, rule: Rule = generation) -> Array:
    """The residual largest in size at every time of TIMES, at points drawn from the law there, (len(TIMES),)."""
    out = []
    for share in TIMES:
        t = share * problem.horizon
        values = residual(problem, t, problem.marginal(t).sample(noise), rule)
        out.append(values[np.argmax(np.abs(values))])
    return np.array(out)


def short_grid(problem: Problem, steps: int) -> TimeGrid:
    """A few unequal stable steps from the start, so that a slip of one index in t or in D is seen."""
    return TimeGrid(0.3 * problem.horizon * np.linspace(0.0, 1.0, steps + 1) ** 1.3)


def right_point(problem: Problem, grid: TimeGrid) -> AffinePolicy:
    """The score at the wrong end of every step: still of order 1, so that only the exact twin of the chain sees it."""
    K, k = zip(*(problem.affine_score(float(t)) for t in grid.times[1:]), strict=True)
    return AffinePolicy(np.stack(K), np.stack(k))


def moments(x: Array) -> Array:
    """Per path the coordinates and their products i <= j, (n, d) -> (n, d + d (d + 1) / 2)."""
    i, j = np.triu_indices(x.shape[1])
    return np.concatenate([x, x[:, i] * x[:, j]], axis=1)


def expected_moments(mean: Array, cov: Array) -> Array:
    """E moments(X) of a law with this mean and covariance."""
    i, j = np.triu_indices(len(mean))
    return np.concatenate([mean, (cov + np.outer(mean, mean))[i, j]])


def law_error(problem: Problem, grid: TimeGrid) -> float:
    """Distance of the pre-trained chain's terminal mean and covariance from the data's, in units of the data's covariance."""
    pre = problem.pretrained(grid)
    if problem.eta == 0 and not exact.chain.applies(problem, pre, grid):
        return _distance(problem, exact.quadrature.evaluate(problem, pre, grid, points=POINTS).terminal)
    return _distance(problem, exact.evaluate(problem, pre, grid).terminal)


def _distance(problem: Problem, end: exact.Terminal) -> float:
    root = np.linalg.inv(np.linalg.cholesky(problem.data.cov))
    mean, cov = root @ (end.mean - problem.data.mean), root @ (end.cov - problem.data.cov) @ root.T
    return float(np.sqrt(mean @ mean + np.sum(cov**2)))


def prior_bias(problem: Problem) -> Array:
    r"""Bias of the terminal mean when X_0 ~ N(0, v I) stands for p_T, in continuous time, (d,).

        m_T - m = -alpha^{1 + eta^2} ( C (alpha^2 C + v I)^{-1} )^{(1 + eta^2)/2} m,      alpha = alpha(T), v = v(T)

    since a mean's error delta obeys delta' = (-f - h P^{-1}) delta and log P' = -2 f - g^2 P^{-1} (P the noised covariance).
    Gaussian data.   Source: theory.md, section 2.   Checked: tests/test_theorem_reversal.py::test_prior_bias_has_its_slope
    """
    tau, power = problem.schedule.tau(0.0), 1 + problem.eta**2
    alpha, v = problem.schedule.alpha(tau), problem.schedule.v(tau)
    c, basis = np.linalg.eigh(problem.data.cov)
    factor = alpha**power * (c / (alpha**2 * c + v)) ** (power / 2)
    return -basis @ (factor * (basis.T @ problem.data.mean))


def measured_bias(problem: Problem) -> Array:
    """The same bias by the moment equations in continuous time."""
    pre = BasisPolicy.shift(problem, np.zeros(problem.dim))
    return exact.limit.evaluate(replace(problem, start="prior"), pre).terminal.mean - problem.data.mean


def longer_noising(schedule: Schedule) -> list[Schedule]:
    """The same schedule with less and less signal left at its end; empty where alpha(T) = 1 always."""
    if isinstance(schedule, VP):
        return [replace(schedule, beta_max=b) for b in (6.0, 9.0, 12.0, 15.0)]
    if isinstance(schedule, OU):
        return [replace(schedule, beta=b / schedule.horizon) for b in (3.0, 4.0, 5.0, 6.0)]
    return []


def _at(eta: float) -> str:
    return "" if eta == 1 else f"eta = {eta:g}: "


class Reversal(Theorem):
    """Every eta has the marginals of the noising, run backwards; see `statement`."""

    name = "reversal"
    statement = ("With the exact score as action and X_0 ~ p_T, the generation SDE has the noised laws as its marginals at every "
                 "stochasticity: dX = [-f X + h s] dt + eta g dB, h = (1 + eta²)/2 g², s = ∇ log p_{T-t}  ⇒  law(X_t) = p_{T-t} "
                 "for all eta ≥ 0.")
    formulas = (
        r"dX_t = \left[\, -f X_t + h\, s(t, X_t) \,\right] dt + \eta\, g\, dB_t,\qquad h = \dfrac{1 + \eta^2}{2}\, g^2,"
        r"\qquad s = \nabla \log p_{T-t}",
        r"X_0 \sim p_T \;\;\Rightarrow\;\; \mathrm{law}(X_t) = p_{T-t} \quad \mathrm{for\ every}\ \eta \geq 0")

    def checks(self, case: Case) -> Iterator[Verdict]:
        yield from self._pointwise(case)
        yield from self._chain(case)
        yield from self._sampled(case)
        yield from self._orders(case)
        yield from self._prior(case)

    def _pointwise(self, case: Case) -> Iterator[Verdict]:
        """The Fokker-Planck equation at points, for any law in any dimension; and what it rejects."""
        rate, difference = rates_in_time(case.problem, case.noise("rates", paths=32))
        yield self.exact(case, rate, difference, 1e-7, "d/dt log p from f and g against differences of p_(T-t) itself (alpha and v)")
        for eta in dict.fromkeys((*ETAS, case.problem.eta)):
            problem, noise = case.at(eta).problem, case.at(eta).noise("points", paths=32 if case.quick else 128)
            what = f"{_at(eta)}Fokker-Planck residual of p_(T-t) at points, relative to its terms"
            yield self.exact(case, worst_residual(problem, noise), 0.0, ROUNDING, what)
        for name, rule in PLANTED:
            eta = 0.5
            if name == "the sign of f" and isinstance(case.problem.schedule, VE):
                yield self.skipped(case, "planted: the sign of f is no error for VE, where f = 0")
                continue
            problem, noise = case.at(eta).problem, case.at(eta).noise("points", paths=32)
            yield self.planted(case, worst_residual(problem, noise, rule), 0.0, ROUNDING, f"{_at(eta)}{name} (Fokker-Planck)")
        yield self.skipped(case, "planted: gain g^2 for h and noise g for eta g are no errors at eta = 1; they were tried at eta = 0.5")

    def _chain(self, case: Case) -> Iterator[Verdict]:
        """Moments of X_N under all sign patterns against the recursion: this one sees the right-point score."""
        if not case.linear:
            yield self.skipped(case, "exact twin of the chain: needs Gaussian data (the moments of a mixture chain do not close)")
            return
        steps = {1: 5, 2: 3, 3: 2}.get(case.problem.dim, 1)
        if case.problem.dim * (1 + steps) > 18:
            yield self.skipped(case, f"exact twin of the chain: too many sign patterns, 2^{case.problem.dim * (1 + steps)}")
            return
        for eta in (0.5, 1.0):
            problem = case.at(eta, start="exact").problem
            grid = short_grid(problem, steps)
            mean, cov = (v[-1] for v in LinearChain(problem, problem.pretrained(grid), grid).moments)
            expected = expected_moments(mean, cov)
            what = f"{_at(eta)}mean and second moments of X_N over all sign patterns, N = {steps}"
            yield self.exact(case, _sign_moments(problem, problem.pretrained(grid), grid), expected, 1e-12, what)
            wrong = _sign_moments(problem, right_point(problem, grid), grid)
            yield self.planted(case, wrong, expected, 1e-12, f"{_at(eta)}right-point score (exact chain)")

    def _sampled(self, case: Case) -> Iterator[Verdict]:
        """Simulated terminal moments, standardised by the chain's exact law."""
        if not case.solvable:
            yield self.skipped(case, "Monte Carlo twin: the mixture chain in 2-D has no exact law to compare with")
            return
        for eta in (0.5, 1.0) if not case.quick else (0.5,) if case.linear else (1.0,):
            here = case.at(eta, start="exact")
            problem, grid = here.problem, here.grid
            end = exact.evaluate(problem, problem.pretrained(grid), grid).terminal
            root = np.linalg.inv(np.linalg.cholesky(end.cov))
            expected = expected_moments(np.zeros(problem.dim), np.eye(problem.dim))

            def standardised(policy: Policy, label: str, paths: int) -> Array:
                x = simulate(problem, policy, grid, here.noise(label, min(here.paths, paths))).terminal  # noqa: B023
                return moments((x - end.mean) @ root.T)  # noqa: B023

            test = mean_test(standardised(problem.pretrained(grid), "reversal", 200_000), expected)
            what = f"{_at(eta)}standardised mean and second moments of X_N, N = {grid.steps}"
            yield self.monte_carlo(here, test, 0.06 if case.quick else 0.03, what)
            if case.linear and eta != 1:
                pre, gain = problem.pretrained(grid), 2 / (1 + eta**2)
                assert isinstance(pre, AffinePolicy)
                wrong, right = (mean_test(standardised(policy, "gain", 20_000), expected)
                                for policy in (AffinePolicy(gain * pre.K, gain * pre.k), pre))
                yield self.planted_sampled(here, wrong, f"{_at(eta)}gain g^2 for h (simulated)", right)

    def _orders(self, case: Case) -> Iterator[Verdict]:
        """The chain's terminal law comes to the data law at order 1."""
        if not case.solvable:
            yield self.skipped(case, "limit: the mixture chain in 2-D has no exact law to compare with")
            return
        if isinstance(case.problem.schedule, VE):
            yield self.skipped(case, "limit: VE is pre-asymptotic on uniform grids of a few hundred steps (it needs a geometric grid)")
            return
        steps = order_steps(case)
        for eta in (1.0,) if case.quick and not case.linear else ETAS:
            # the reward plays no part here, and a linear one is cheap to integrate
            problem = case.at(eta, start="exact", reward=LinearReward(np.ones(case.problem.dim))).problem
            error = np.array([law_error(problem, problem.grid(int(n))) for n in steps])
            what = f"{_at(eta)}terminal mean and covariance against the data's"
            yield self.limit(case, problem.horizon / steps, error, 1.0, what)

    def _prior(self, case: Case) -> Iterator[Verdict]:
        """What the prior start adds, and what no step size removes."""
        if not case.linear:
            yield self.skipped(case, "bias of the prior start: in closed form for Gaussian data only")
            return
        schedules = longer_noising(case.problem.schedule) if case.problem.dim <= 2 else []
        for eta in (0.5,) if case.quick or not schedules else (0.0, 0.5, 1.0):
            problems = [case.at(eta, schedule=s).problem for s in schedules or [case.problem.schedule]]
            bias = np.stack([measured_bias(p) for p in problems])
            what = f"{_at(eta)}bias of the terminal mean from the prior start, continuous time"
            yield self.exact(case, bias, np.stack([prior_bias(p) for p in problems]), 1e-8, what)
            if schedules:
                alphas = np.array([s.alpha(s.tau(0.0)) for s in schedules])
                yield self.limit(case, alphas, np.linalg.norm(bias, axis=1), 1 + eta**2,
                                 f"{_at(eta)}bias of the prior start grows like alpha(T)^(1 + eta^2)", over="alpha(T)")
        if not schedules:
            yield self.skipped(case, "slope of the prior start's bias in alpha(T): alpha = 1 for VE" if case.problem.dim <= 2 else
                               "slope of the prior start's bias in alpha(T): tried in one and two dimensions")

    def figure(self, case: Case) -> Figure:
        """Order in D for every eta; simulated variances on exact curves; the prior start's bias."""
        with style.panels(3, "Reversal: one law for every stochasticity η", width=3.9) as (figure, axes):
            _draw_orders(axes[0], case)
            _draw_variances(axes[1], case)
            _draw_bias(axes[2], case)
        return figure


def _sign_moments(problem: Problem, policy: Policy, grid: TimeGrid) -> Array:
    noise = Noise.signs(problem, policy, grid)
    return noise.weights @ moments(simulate(problem, policy, grid, noise).terminal)


def _draw_orders(ax: Axes, case: Case) -> None:
    steps = np.array([40, 80, 160, 320, 640])
    for j, eta in enumerate(ETAS):
        problem = case.at(eta, start="exact").problem
        error = [law_error(problem, problem.grid(int(n))) for n in steps]
        style.order_line(ax, problem.horizon / steps, error, f"η = {eta:g}", j)
    problem = case.at(0.5, start="exact").problem
    wrong = [_wrong_gain_error(problem, problem.grid(int(n))) for n in steps]
    ax.loglog(problem.horizon / steps, wrong, color=style.GREY, marker="x", label="planted, η = 0.5: g² for h")
    ax.set(xlabel="step length D (horizon units)", ylabel="error of the terminal law (data sd)", title="The law, order 1 in D")
    ax.legend(loc="upper left")
    ax.set_ylim(top=ax.get_ylim()[1] * 3e3)
    style.log_ticks(ax, problem.horizon / steps, [f"1/{n}" for n in steps])


def _wrong_gain_error(problem: Problem, grid: TimeGrid) -> float:
    pre, gain = problem.pretrained(grid), 2 / (1 + problem.eta**2)
    assert isinstance(pre, AffinePolicy)
    return _distance(problem, exact.evaluate(problem, AffinePolicy(gain * pre.K, gain * pre.k), grid).terminal)


def _draw_variances(ax: Axes, case: Case) -> None:
    """Variance of the first coordinate along generation: the law's, the chains', and 2,000 simulated paths."""
    t = np.linspace(0.0, case.problem.horizon, 200)
    ax.plot(t, [case.problem.marginal(s).cov[0, 0] for s in t], color="black", label="noised data law")
    for j, eta in enumerate((0.0, 1.0, 1.5)):
        here = case.at(eta, start="exact")
        grid = here.grid
        states = simulate(here.problem, here.problem.pretrained(grid), grid, here.noise("figure", 2000), trajectory=True).states
        assert states is not None
        at = np.arange(j, grid.steps + 1, 6)
        x = states[:, at, 0]
        variance = x.var(axis=0, ddof=1)
        bar = 1.96 * ((x - x.mean(axis=0)) ** 2).std(axis=0) / np.sqrt(len(x))
        P = LinearChain(here.problem, here.problem.pretrained(grid), grid).moments[1][:, 0, 0]
        ax.plot(grid.times, P, color=style.COLOURS[j], linestyle=style.LINES[j], linewidth=1.0)
        ax.errorbar(grid.times[at], variance, yerr=bar, color=style.COLOURS[j], marker=style.MARKERS[j], linestyle="none",
                    elinewidth=0.9, label=f"η = {eta:g}")
    ax.set(xlabel="generation time t (horizon units)", ylabel="variance of the first coordinate",
           title=f"Marginals, N = {case.steps}: exact lines, simulated 95 %")
    ax.legend(loc="lower left")


def _draw_bias(ax: Axes, case: Case) -> None:
    schedules = longer_noising(case.problem.schedule)
    alphas = np.array([s.alpha(s.tau(0.0)) for s in schedules])
    for j, eta in enumerate((0.0, 1.0)):
        bias = [float(np.linalg.norm(measured_bias(case.at(eta, schedule=s).problem))) for s in schedules]
        style.order_line(ax, alphas, bias, f"η = {eta:g}", j)
        fine = np.geomspace(alphas.min(), alphas.max(), 5)
        ax.loglog(fine, bias[-1] * (fine / alphas[-1]) ** (1 + eta**2), color=style.GREY, linewidth=0.8, linestyle=":")
    ax.set(xlabel="signal left at the start, α(T)", ylabel="bias of the terminal mean (state units)",
           title=r"The prior start's bias $\propto\alpha(T)^{1+\eta^2}$ (dotted)")
    style.log_ticks(ax, alphas, [f"{a:.2g}" for a in alphas])
    ax.legend(loc="upper left")
