r"""The optimum, and when it is the tilted law (theory.md, section 9).

    a* = s + h/(2 lambda kappa) grad V*,   V* = lambda log phi,   phi(t, x) = E_pre[ e^{r(X_T)/lambda} | X_t = x ]

The chain has two optima, O(D) apart: only means free, J*, and whole kernels free (Doob). Started from p_0 phi_0 the Doob chain ends in
its tilt p_pre e^{r/lambda}, exactly; the optimum does only where X_T forgets X_0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from ctrl import exact
from ctrl.check import Array
from ctrl.estimators import runs
from ctrl.evidence import mean_test
from ctrl.exact.chain import LinearChain
from ctrl.exact.divergence import KL, Alpha, ChiSquare, Divergence, DivergenceTilt, ForwardKL, divergence_tilt, line_divergence_tilt
from ctrl.exact.linear_doob import Exponent, LinearDoob
from ctrl.exact.quadrature import Doob
from ctrl.exact.tilt import Bridge, frontier, ideal_frontier, initial_bias, log_partition, reversal_optimum, tilt
from ctrl.laws import Gaussian
from ctrl.noise import NoiseLike
from ctrl.policy import Policy
from ctrl.rollout import simulate
from ctrl.schedule import VP
from ctrl.theorems import style
from ctrl.theorems.value import Branches, at_eta, branches, random_states, some_steps, tolerance
from ctrl.theorems.verdict import Case, Theorem, Verdict, order_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHORT = VP(beta_min=0.1, beta_max=1.0)  # a noising that forgets little
FINITE = 200  # steps of the chain whose step size is taken for bias
FLAT = 1e-6  # range of the reward over lambda, below which there is nothing to see
FEW = 8  # steps of the chain whose optima are told apart by paths; and on the line, of dense kernels, of derivatives, of a quick run
Best = exact.Optimum | exact.LineOptimum | exact.PlaneOptimum
DIVERGENCES: tuple[Divergence, ...] = (KL(), ForwardKL(), ChiSquare(), Alpha(0.5), Alpha(3.0))


# ---- a case with its optima ----------------------------------------------------------------------------------------------


class ChainTilt(NamedTuple):
    """Moments of a chain's tilt (E x, then E x x', flat), lambda log E_pre e^{r/lambda}, and E r under the tilt."""

    moments: Array
    objective: float
    reward: float


@dataclass(frozen=True, eq=False)
class Optima:
    """A case with its two optima and its pre-trained chain, each computed once."""

    case: Case

    @cached_property
    def best(self) -> Best:
        return exact.optimum(self.case.problem, self.case.grid)

    @cached_property
    def value(self) -> exact.Value:
        """V*: the value of the optimal policy; where the chain is not linear, as its solver carries it back."""
        if isinstance(self.best, exact.Optimum):
            return exact.value(self.case.problem, self.best.policy, self.case.grid)
        return self.best.value

    @cached_property
    def doob(self) -> LinearDoob | Doob:
        found = exact.doob(self.case.problem, self.case.grid)
        assert not isinstance(found, exact.plane.Doob)  # asked for in `_in_the_plane` alone
        return found

    @cached_property
    def pretrained(self) -> exact.Truth:
        return exact.evaluate(self.case.problem, self.case.problem.pretrained(self.case.grid), self.case.grid)

    @cached_property
    def tilt(self) -> ChainTilt:
        return self.tilt_at(self.case.problem.kl_weight)

    def tilt_at(self, kl_weight: float) -> ChainTilt:
        """The chain's tilt at a weight, from the law of the pre-trained X_N alone."""
        end, reward = self.pretrained.terminal, self.case.problem.reward
        if self.case.linear:
            linear = tilt(Gaussian(end.mean, end.cov), reward, kl_weight)
            assert linear.law is not None
            return ChainTilt(moments(linear.law.mean, linear.law.cov), linear.objective, linear.reward)
        assert end.points is not None and end.density is not None
        x, density = end.points.reshape(-1, self.case.problem.dim), end.density.ravel()
        rewards, masses = reward.value(x), density / density.sum()
        level = logsumexp(rewards / kl_weight, b=masses)
        tilted = masses * np.exp(rewards / kl_weight - level)
        return ChainTilt(node_moments(x, tilted), float(kl_weight * level), float(tilted @ rewards))

    @property
    def level(self) -> float:
        """lambda log E phi_0(X_0) over the start law."""
        if isinstance(self.doob, LinearDoob):
            return self.case.problem.kl_weight * log_partition(self.doob.start, self.doob.exponents[0])
        start = self.doob.chain.start_density(self.doob.lattice.nodes(0)) * self.doob.lattice.dx[0]
        return self.case.problem.kl_weight * float(logsumexp(self.doob.nodal[0], b=start))

    @cached_property
    def few(self) -> Optima:
        """The same with few steps."""
        return Optima(self.case.over(FEW)) if self.case.steps > FEW else self

    @cached_property
    def ends(self) -> tuple[Array, Array]:
        """Moments of the Doob chain's X_N, from p_0 phi_0 and from p_0."""
        if isinstance(self.doob, LinearDoob):
            laws = [self.doob.terminal(start) for start in (self.doob.tilted_start, self.doob.start)]
            return moments(laws[0].mean, laws[0].cov), moments(laws[1].mean, laws[1].cov)
        points, masses = doob_terminal(self.doob)
        return node_moments(points, masses[0]), node_moments(points, masses[1])


def moments(mean: Array, cov: Array) -> Array:
    """E x and E x x', flat."""
    return np.concatenate([mean, (cov + np.outer(mean, mean)).ravel()])


def node_moments(points: Array, masses: Array) -> Array:
    """The same of masses (n,) at points (n,) or (n, d)."""
    x = points.reshape(len(masses), -1)
    return np.concatenate([masses @ x, ((masses[:, None] * x).T @ x).ravel()])


def log_kernels(doob: Doob, i: int, x: Array) -> tuple[Array, float]:
    """log of N(y; m_i(x), s_i^2) phi_{i+1}(y) dy over the nodes y of time i + 1, (n, nodes), less a constant, and the constant."""
    chain, lattice = doob.chain, doob.lattice
    z = (lattice.nodes(i + 1) - chain.centre(i, x)[:, None]) / chain.s[i]
    return doob.nodal[i + 1] - 0.5 * z**2, float(np.log(lattice.dx[i + 1] / chain.s[i] / np.sqrt(2 * np.pi)))


def doob_terminal(doob: Doob) -> tuple[Array, Array]:
    """Points (n,) of X_N on the line and its masses from p_0 phi_0 and from p_0, (2, n); every kernel normalised by its own row sum."""
    lattice, plain = doob.lattice, doob.chain.start_density(doob.lattice.nodes(0))
    masses = np.stack([plain * np.exp(doob.nodal[0] - doob.nodal[0].max()), plain])
    masses = masses / masses.sum(axis=1, keepdims=True)
    for i in range(doob.grid.steps):
        seen = np.any(masses > 1e-25, axis=0)
        log_kernel, _ = log_kernels(doob, i, lattice.nodes(i)[seen])
        kernel = np.exp(log_kernel - log_kernel.max(axis=1, keepdims=True))
        masses = (masses[:, seen] / kernel.sum(axis=1)) @ kernel
    return lattice.nodes(doob.grid.steps), masses


def solved(case: Case) -> bool:
    """Both optima are known exactly: a linear chain, or the line."""
    return case.linear or case.problem.dim == 1


def resolved(case: Case) -> bool:
    """Quadrature resolves the reward; else it warns."""
    at = case.at(1.0).over(FEW)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "reward: not smooth", RuntimeWarning)
        try:
            exact.evaluate(at.problem, at.problem.pretrained(at.grid), at.grid)
        except RuntimeWarning:
            return False
    return True


def without(case: Case) -> Case:
    """Without discount and entropy weight, for which section 9 is stated."""
    return case.at(case.problem.eta, discount=0.0, entropy_weight=0.0) if case.problem.discount or case.problem.entropy_weight else case


# ---- identities ----------------------------------------------------------------------------------------------------------


def next_states(case: Case, policy: Policy, i: int, x: Array) -> Branches:
    """One step from states x (n, d): exact to degree 3 on linear chains, a rule finer than the features of phi on the line."""
    if case.linear:
        return branches(case, policy, i, x)
    a, c = policy.mean(case.grid, i, x), case.problem.coefficients(case.grid)
    xi = np.linspace(-7.0, 7.0, 561)  # on coarse grids grad V* turns within a twentieth of a deviation
    weights = np.exp(-0.5 * xi**2)
    y = x + c.dt[i] * (-c.f[i] * x + c.h[i] * a) + c.noise[i] * xi[:, None, None]
    return Branches(np.broadcast_to(a, y.shape), y, np.zeros(y.shape[:2]), weights / weights.sum())


def stationarity(at: Optima) -> tuple[Array, Array, Array, Array]:
    """At random states of some steps: a* - s, E[grad V*_{i+1}(X_{i+1}) | x], h_i, kappa_i, (n, d) each.

    The last step only where grad r is sure to be that of r: a user's reward may jump.
    """
    case, parts = at.case, []
    c = case.problem.coefficients(case.grid)
    for i in some_steps(case)[: -1 if case.own else None]:
        x = random_states(case, i)
        a, b = at.best.policy.mean(case.grid, i, x), next_states(case, at.best.policy, i, x)
        slope = at.value.gradient(i + 1, b.states.reshape(-1, x.shape[1])).reshape(b.states.shape)
        ones = np.ones_like(x)
        parts.append((a - case.problem.score(float(case.grid.times[i]), x), b.mean(slope), c.h[i] * ones, c.kappa[i] * ones))
    gap, pull, h, kappa = (np.concatenate(part) for part in zip(*parts, strict=True))
    return gap, pull, h, kappa


def path_by_path(at: Optima, noise: NoiseLike) -> tuple[Array, Array, Array]:
    """r(X_N), log dP*/dP_pre by the densities of every step, and log phi_0(X_0), along paths; (n,) each.

    Linear: paths of the Doob chain, Gaussian kernels. On the line: paths of the pre-trained chain, kernels normalised by their row sums.
    """
    case, problem = at.case, at.case.problem
    if isinstance(at.doob, LinearDoob):
        x = at.doob.start.from_normals(noise.start(problem.dim))
        first, ratio, z = at.doob.log_phi(0, x), np.zeros(len(x)), noise.steps(case.steps, problem.dim)
        chain = LinearChain(problem, problem.pretrained(case.grid), case.grid)
        zero, (A, c) = np.zeros(problem.dim), chain.maps
        for i, (B, b, C) in enumerate(zip(*at.doob.kernel, strict=True)):
            step = z[:, i] @ np.linalg.cholesky(C).T
            y = x @ B.T + b + step
            ratio = ratio + Gaussian(zero, C).log_density(step) - Gaussian(zero, chain.step_cov[i]).log_density(y - x @ A[i].T - c[i])
            x = y
        return problem.reward.value(x), ratio, first
    pretrained = problem.pretrained(case.grid)
    run = next(runs(problem, pretrained, case.grid, noise))
    ratio = np.zeros(len(run.states))
    for i in range(case.steps):
        log_kernel, scale = log_kernels(at.doob, i, run.states[:, i, 0])
        ratio = ratio + at.doob.log_phi(i + 1, run.states[:, i + 1]) - logsumexp(log_kernel, axis=1) - scale
    return run.reward, ratio, at.doob.log_phi(0, run.states[:, 0])


def in_one_step(at: Optima, x: Array) -> Array:
    """log phi_0(x) of a linear chain by the law of X_N given X_0 = x, one Gaussian, (n,)."""
    case, reward = at.case, at.case.problem.reward.quadratic(at.case.problem.dim)
    chain = LinearChain(case.problem, case.problem.pretrained(case.grid), case.grid)
    assert reward is not None
    d = case.problem.dim
    Phi, offset, R = np.eye(d), np.zeros(d), np.zeros((d, d))
    for A, c, step in zip(*chain.maps, chain.step_cov, strict=True):
        Phi, offset, R = A @ Phi, A @ offset + c, A @ R @ A.T + step
    return Exponent.of(reward, case.problem.kl_weight).before(Phi, offset, R)(x)


def wrong_values(at: Optima, x: Array) -> list[tuple[str, Array]]:
    """What people put in the place of V*_0(x) = lambda log phi_0(x) of the Doob chain."""
    problem = at.case.problem
    tau = problem.schedule.tau(0.0)
    tweedie = (x + problem.schedule.v(tau) * problem.score(0.0, x)) / problem.schedule.alpha(tau)
    plain = exact.value(problem, problem.pretrained(at.case.grid), at.case.grid)
    return [("r(x0_hat) for V* (Jensen)", problem.reward.value(tweedie)), ("E_pre[r | x] for V* (Jensen)", plain(0, x))]


def slopes_in_lambda(at: Optima) -> tuple[Array, Array]:
    """d/dlambda of J*, E* r and the penalty by four differences, error e^4, and their values, (3,) each."""
    weight, e = at.case.problem.kl_weight, 0.01 * at.case.problem.kl_weight

    def numbers(best: Best) -> Array:
        return np.array([best.objective, expected_reward(best), best.penalty])

    weights = [weight + k * e for k in (-2, -1, 1, 2)]
    around = np.array([numbers(exact.optimum(replace(at.case.problem, kl_weight=w), at.case.grid)) for w in weights])
    return np.array([1, -8, 8, -1]) @ around / (12 * e), numbers(at.best)


def expected_reward(best: Best) -> float:
    """E* r(X_N)."""
    return best.truth.expected_reward if isinstance(best, exact.Optimum) else best.expected_reward


def continuous_objective(case: Case) -> float | None:
    """J* of continuous time: by ODEs for a linear case, by time reversal on the line at eta = 1, else unknown."""
    if case.linear:
        return exact.limit.optimum(case.problem).objective
    return reversal_optimum(case.problem).objective if case.problem.eta == 1 else None


def two_optima(case: Case) -> tuple[Array, Array, Array]:
    """Step lengths, J* of means and the Doob value, (4,) each; coarser grids in a quick run and on the line at eta != 1."""
    shorter = 4 if case.quick else 1 if case.linear or case.problem.eta == 1 else 2
    steps = order_steps(case) // shorter
    grids = [case.problem.grid(n) for n in steps.tolist()]
    means = np.array([exact.optimum(case.problem, grid).objective for grid in grids])
    return case.problem.horizon / steps, means, np.array([exact.doob(case.problem, grid).objective for grid in grids])


# ---- f-divergences -------------------------------------------------------------------------------------------------------


def primal(found: DivergenceTilt, ratio: Array, rewards: Array, kl_weight: float, divergence: Divergence) -> float:
    """E_p r - lambda D_f(p || p_pre) of any p/p_pre at the points."""
    return float(found.masses @ (ratio * rewards) - kl_weight * found.masses @ divergence.f(ratio))


def dual(found: DivergenceTilt, rewards: Array, kl_weight: float, divergence: Divergence) -> float:
    r"""c + lambda E_pre f*((r - c)/lambda), f*(y) = max_u { u y - f(u) }: above every primal value, by Fenchel, whatever c."""
    y = (rewards - found.level) / kl_weight
    u = divergence.ratio(y)
    return found.level + kl_weight * float(found.masses @ (u * y - divergence.f(u)))


# ---- the theorem ---------------------------------------------------------------------------------------------------------


class OptimalTilt(Theorem):
    r"""The optimal action, its two exact twins on the chain, and the tilt that its terminal law is, or is not.

    Source: theory.md, sections 9 and 16.   Checked: tests/test_theorem_optimal_tilt.py::test_every_verdict_holds
    """

    name = "optimal_tilt"
    statement = ("sup E r - λ KL is attained at a* = s + h/(2λκ) ∇V*, V* = λ log φ, φ(t, x) = E_pre[e^{r(X_T)/λ} | X_t = x]; path KL* = "
                 "E*[r]/λ - E log φ(0, X_0). The law of X_T is ∝ p_pre e^{r/λ} if X_0 and X_T are independent under P_pre, else weighted by "
                 "1/φ(0, X_0). On the chain: the mean-shift optimum 2λκ(a* - s) = h E[∇V*_(i+1)] and the Doob chain, O(D) apart; from p_0 φ_0 "
                 "the Doob chain ends in the chain's tilt exactly. dJ*/dλ = -KL*, dE*[r]/dKL* = λ.")
    formulas = (
        r"a^*=s+\frac{h}{2\lambda\kappa}\nabla V^*,\quad V^*=\lambda\log\varphi,\quad \varphi(t,x)=E_{pre}[\,e^{r(X_T)/\lambda}\,|\,X_t=x\,]",
        r"V_i^*(x)=\sup_y\ \left\{E\,V_{i+1}^*(y+\eta g\sqrt{D}\,\xi)-\frac{\lambda|y-y_0|^2}{2\eta^2g^2D}\right\},"
        r"\quad 2\lambda\kappa\,(a^*-s)=h\,E[\nabla V_{i+1}^*(X_{i+1})|X_i=x]",
        r"X_0\sim p_0\,\varphi_0\ \Rightarrow\ X_N\sim p_{pre}\,e^{r/\lambda}/Z,\quad \frac{r}{\lambda}-\log\frac{dP^*}{dP_{pre}}=\log\varphi_0(X_0)",
        r"\frac{dJ^*}{d\lambda}=-KL^*,\quad \frac{dE^*[r]}{dKL^*}=\lambda,\quad"
        r"\mathrm{argmax}\ E\,r-\lambda D_f=p_{pre}\,(f')^{-1}((r-c)/\lambda)")

    def checks(self, case: Case) -> Iterator[Verdict]:
        if case.problem.kl_weight == 0:
            yield self.skipped(case, "λ = 0: nothing holds the optimum back, and there is no tilt")
            return
        if without(case) is not case:
            yield self.skipped(case, "discount and entropy weight are set to 0: with them the optimum is no tilt (see gibbs_exploration)")
        case = without(case)
        r = case.problem.reward.value(case.problem.data.sample(case.noise("divergences", 2000)))
        if np.ptp(r) < FLAT * case.problem.kl_weight:
            yield self.skipped(case, f"a reward that moves by {np.ptp(r):.1g} tilts nothing that shows at λ = {case.problem.kl_weight:g}")
            return
        if case.quick and not case.linear:
            case = case.over(min(case.steps, FEW))
        yield from self._divergences(case, r)
        if case.planar and (brief := case.brief).solvable:
            yield from self._samples_of_the_data(case)
            yield from self._in_the_plane(brief)
            return
        if not solved(case):
            yield from self._samples_of_the_data(case)
            yield self.skipped(case, "the chain's two optima: no exact truth for mixtures in more than one dimension")
            return
        if case.own and not case.linear and not resolved(case):
            yield self.skipped(case, "the chain's two optima: the reward is not smooth enough for quadrature to resolve")
            return
        for eta in (*case.etas, 0.0):
            at = Optima(case.at(eta))
            yield from self._means(at)
            if case.linear or eta == 1 or not case.quick:
                yield from self._envelope(at if case.linear else at.few)
            if eta > 0:
                yield from self._kernels(at)
                yield from self._sampled(at)
            if eta > 0 and (not case.quick or (case.linear and eta == 1)):
                yield from self._limits(at.case)
            if eta > 0 and case.linear:
                yield from self._continuous(at.case)
                yield from self._bias(at.case)
        if not case.linear:
            yield from self._short_on_the_line(case.at(1.0))
            if case.quick:
                yield self.skipped(case, "limits of both optima on the line: in a full run")

    def _in_the_plane(self, case: Case) -> Iterator[Verdict]:
        """A brief chain: its tilt against paths of the pre-trained chain; in a full run both optima, by lattices and along optimal paths."""
        lam, problem, at = case.problem.kl_weight, case.problem, Optima(case)
        r = simulate(problem, problem.pretrained(case.grid), case.grid, case.noise("tilt", min(case.paths, 100_000))).reward
        yield from self._weights(case, r, at.tilt.objective, at.tilt.reward, "paths of the pre-trained chain")
        if case.quick:
            yield self.skipped(case, "the chain's two optima in the plane: seconds each, in a full run")
            return
        best, kernels = exact.optimum(problem, case.grid), exact.plane.doob(problem, case.grid)
        try:
            yield self.exact(case, best.truth.objective, best.objective, 1e-5, "J of the optimal policy = E V*_0")
        except ValueError as error:
            yield self.skipped(case, f"J of the optimal policy: its jumps are too much for lattices ({str(error)[:60]} ...)")
        spent = (expected_reward(best) - best.objective) / lam
        yield self.exact(case, best.penalty, spent, 1e-4, "path KL* = (E*[r] - E V*_0)/λ")
        yield self._exchanged(case, lam**2 * spent, best.penalty, 1e-4, "in path KL*")
        yield self.exact(case, float(best.objective < kernels.objective), 1.0, 0.0, "J* of means < λ E log φ_0: fewer controls, less value")
        yield self.planted(case, kernels.objective, best.objective, 1e-5, "the Doob value as the chain's J*")
        gap, noise = kernels.objective - best.objective, case.noise("optimum", case.paths // 10)
        earned = np.concatenate([run.reward - lam * run.paths.log_weight for run in runs(problem, best.policy, case.grid, noise)])
        test = mean_test(earned, best.objective)
        yield self.monte_carlo(case, test, gap, "E[r - λ log dP*/dP_pre] = J* along optimal paths; must see the Doob value for J*")
        yield self.planted_sampled(case, mean_test(earned, kernels.objective), "the Doob value as the chain's J*, along paths", test)

    def _exchanged(self, case: Case, measured: ArrayLike, expected: ArrayLike, allowed: float, where: str) -> Verdict:
        what = f"{at_eta(case)}λ and 1/λ exchanged {where}"
        if case.problem.kl_weight == 1:
            return self.skipped(case, f"{what}: invisible at λ = 1")
        return self.planted(case, measured, expected, allowed, what)

    def _means(self, at: Optima) -> Iterator[Verdict]:
        """The mean-shift optimum: stationary state by state and as a whole, and what it costs."""
        case, where, best, lam = at.case, at_eta(at.case), at.best, at.case.problem.kl_weight
        if isinstance(best, exact.LineOptimum) and np.any(best.kinks):
            yield self.skipped(case, f"{where}stationarity: V* has {best.kinks.sum()} kinks in {case.steps} steps, where the optimal action jumps")
        else:
            yield from self._stationary(at)
            yield self.exact(case, best.truth.objective, best.objective, 1e-10, f"{where}J of the optimal policy = E V*_0")
        spent, what = (expected_reward(best) - best.objective) / lam, "path KL*" if case.problem.eta > 0 else "penalty*"
        yield self.exact(case, best.penalty, spent, 1e-8, f"{where}{what} = (E*[r] - E V*_0)/λ")
        yield self._exchanged(case, lam**2 * spent, best.penalty, 1e-8, f"in {what}")

    def _stationary(self, at: Optima) -> Iterator[Verdict]:
        case, where, lam, allowed = at.case, at_eta(at.case), at.case.problem.kl_weight, 10 * tolerance(at.case)
        gap, pull, h, kappa = stationarity(at)
        yield self.exact(case, 2 * lam * kappa / h * gap, pull, allowed, f"{where}2λκ(a* - s)/h = E[∇V*_(i+1) | x] at random states")
        yield self._exchanged(case, 2 * kappa / (lam * h) * gap, pull, allowed, "in a*")
        if case.problem.eta == 1:
            yield self.skipped(case, "a* = s + ∇V*/λ is no error at eta = 1")
        else:
            yield self.planted(case, lam * gap, pull, allowed, f"{where}a* = s + ∇V*/λ, the formula of eta = 1")
        theta = at.best.truth.gradient.theta
        unit = at.pretrained.gradient.theta if case.linear else np.array([at.best.penalty])
        yield self.exact(case, theta / np.linalg.norm(unit), 0.0, 1e-8,
                         f"{where}∇J = 0 at the optimal policy, in units of " + ("∇J at the pre-trained one" if case.linear else "its penalty"))

    def _envelope(self, at: Optima) -> Iterator[Verdict]:
        case, where, allowed = at.case, at_eta(at.case), 1e-6
        slope, numbers = slopes_in_lambda(at)
        what = "path KL*" if case.problem.eta > 0 else "penalty*"
        yield self.exact(case, slope[0], -numbers[2], allowed, f"{where}dJ*/dλ = -{what}")
        yield self.exact(case, slope[1] / slope[2], case.problem.kl_weight, 10 * allowed, f"{where}dE*[r]/d{what} = λ: the slope of the frontier")
        yield self._exchanged(case, 1 / case.problem.kl_weight, slope[1] / slope[2], 10 * allowed, "in the slope of the frontier")

    def _kernels(self, at: Optima) -> Iterator[Verdict]:
        """The Doob chain: its terminal law, its paths, its value."""
        case, where, lam, allowed = at.case, at_eta(at.case), at.case.problem.kl_weight, 10 * tolerance(at.case)
        few = at if case.linear else at.few
        (ended, unweighted), steps = few.ends, f"E x, E x x', N = {few.case.steps}"
        yield self.exact(case, ended, few.tilt.moments, allowed, f"{where}from p_0 φ_0 the Doob chain ends in the chain's tilt: {steps}")
        yield self.planted(case, unweighted, few.tilt.moments, allowed, f"{where}the tilt claimed for the Doob chain from p_0: {steps}")
        yield self._exchanged(case, few.tilt_at(1 / lam).moments, ended, allowed, "in the tilt")
        yield self.exact(case, few.level, few.tilt.objective, allowed, f"{where}λ log E φ_0(X_0) = λ log E_pre e^(r/λ)")
        r, ratio, first = path_by_path(few, case.noise("paths", 32))
        yield self.exact(case, r / lam - ratio, first, allowed, f"{where}r/λ - log dP*/dP_pre = log φ_0(X_0) path by path")
        yield self._exchanged(case, r * lam - ratio, first, allowed, "in the weight of a path")
        x = random_states(case, 0)
        true = lam * at.doob.log_phi(0, x)
        if case.linear:
            yield self.exact(case, true, lam * in_one_step(at, x), allowed, f"{where}λ log φ_0(x) by the law of X_N given X_0, one Gaussian")
        for what, wrong in wrong_values(at, x):
            yield self.planted(case, wrong, true, allowed, where + what)
        spent = at.doob.expected_reward / lam - at.doob.path_kl
        yield self.exact(case, lam * spent, at.doob.objective, allowed, f"{where}path KL of the Doob chain = E*[r]/λ - E log φ_0")
        ordered = at.best.objective < at.doob.objective <= few.level + 1e-10 if few is at else at.best.objective < at.doob.objective
        yield self.exact(case, float(ordered), 1.0, 0.0, f"{where}J* of means < λ E log φ_0: fewer controls, less value")
        yield self.planted(case, at.doob.objective, at.best.objective, 1e-10, f"{where}the Doob value as the chain's J*")

    def _sampled(self, at: Optima) -> Iterator[Verdict]:
        """Paths of the optimal policy, and the tilt from paths of the pre-trained chain alone."""
        case, where, lam, problem = at.case, at_eta(at.case), at.case.problem.kl_weight, at.case.problem
        few = at.few
        gap, noise = few.doob.objective - few.best.objective, case.noise("optimum", case.paths // (2 if case.linear else 10))
        left = np.concatenate([run.reward - lam * run.paths.log_weight - few.value(0, run.states[:, 0])
                               for run in runs(problem, few.best.policy, few.case.grid, noise)])
        test = mean_test(left, 0.0)
        yield self.monte_carlo(case, test, gap, f"{where}E[r - λ log dP*/dP_pre - V*_0(X_0)] = 0, N = {FEW}; must see the Doob value for J*")
        wrong = mean_test(left - gap, 0.0)
        yield self.planted_sampled(case, wrong, f"{where}the Doob value as the chain's J*", test)
        r = simulate(problem, problem.pretrained(case.grid), case.grid, case.noise("tilt", min(case.paths, 100_000))).reward
        yield from self._weights(case, r, at.tilt.objective, at.tilt.reward, "paths of the pre-trained chain")

    def _weights(self, case: Case, rewards: Array, objective: float, reward: float, what: str) -> Iterator[Verdict]:
        """Self-normalised weights of samples against the exact tilt: E w = 1 and E w (r - E*[r]) = 0."""
        lam, where = case.problem.kl_weight, at_eta(case)
        w = np.exp((rewards - objective) / lam)
        samples = np.stack([w, w * (rewards - reward) / max(float(rewards.std()), 1e-300)], axis=1)
        test = mean_test(samples, np.array([1.0, 0.0]))
        yield self.monte_carlo(case, test, 0.2, f"{where}the tilt from {what}: E w = 1, E w (r - E*[r]) = 0 in deviations of r")
        if lam == 1:
            yield self.skipped(case, f"{where}λ and 1/λ exchanged in the weights: invisible at λ = 1")
            return
        wrong = np.exp(lam * rewards - objective / lam)
        yield self.planted_sampled(case, mean_test(wrong, 1.0), f"{where}λ and 1/λ exchanged in the weights", mean_test(w, 1.0))

    def _samples_of_the_data(self, case: Case) -> Iterator[Verdict]:
        if case.problem.dim != 2:
            yield self.skipped(case, "the tilt of the data law: by quadrature in at most two dimensions")
            return
        found = tilt(case.problem.data, case.problem.reward, case.problem.kl_weight)
        rewards = case.problem.reward.value(case.problem.data.sample(case.noise("tilt")))
        yield from self._weights(case, rewards, found.objective, found.reward, "samples of the data law")

    def _limits(self, case: Case) -> Iterator[Verdict]:
        """Both optima tend to the one of continuous time at order 1, and so to each other."""
        where, limit = at_eta(case), continuous_objective(case)
        dt, means, kernels = two_optima(case)
        yield self.limit(case, dt, kernels - means, 1.0, f"{where}the Doob value less J* of means")
        if limit is None:
            yield self.skipped(case, f"{where}limits of both optima: on the line known in closed form at eta = 1 alone")
            return
        how = "" if case.linear else ", by time reversal"
        yield self.limit(case, dt, kernels - limit, 1.0, f"{where}the Doob value to J* of continuous time{how}")
        if case.linear:  # on the line the terms of order D can all but cancel
            yield self.limit(case, dt, means - limit, 1.0, f"{where}J* of means to J* of continuous time")

    def _continuous(self, case: Case) -> Iterator[Verdict]:
        """V* = lambda log phi, phi from the law of X_T given X_t, against the Riccati equation of the optimum."""
        problem, where, lam = case.problem, at_eta(case), case.problem.kl_weight
        best, reward, feedback, slope, factor = exact.limit.optimum(problem), problem.reward.quadratic(problem.dim), [], [], []
        assert reward is not None
        for i in (0, 2 * case.steps // 5, 9 * case.steps // 10):
            t, x = float(case.grid.times[i]), random_states(case, i)
            phi = Bridge.of(problem, t).log_phi(Exponent.of(reward, lam))
            K, k = best.policy.affine_at(t)
            _, _, h, kappa = problem.schedule.rates(t, problem.eta)
            feedback.append(x @ K.T + k - problem.score(t, x))
            slope.append(lam * (phi.w - x @ phi.S))
            factor.append(np.full_like(x, 2 * kappa / h))
        a, V, rate = (np.concatenate(part) for part in (feedback, slope, factor))
        yield self.exact(case, lam * rate * a, V, 1e-8, f"{where}continuous time: 2λκ(a* - s)/h by Riccati = λ ∇log φ in closed form")
        yield self._exchanged(case, rate * a / lam, V, 1e-8, "in a* of continuous time")
        if problem.eta != 1:
            yield self.planted(case, lam * a, V, 1e-8, f"{where}continuous time: a* = s + ∇V*/λ, the formula of eta = 1")
        phi, start = Bridge.of(problem).log_phi(Exponent.of(reward, lam)), problem.start_law
        assert isinstance(start, Gaussian)
        yield self.exact(case, best.objective, lam * phi.mean(start), 1e-9, f"{where}continuous time: J* by Riccati = λ E log φ(0, X_0)")
        if problem.dim <= 2 or not case.quick:
            truth, bias = exact.limit.evaluate(problem, best.policy), initial_bias(problem)
            spent = Exponent.of(reward, lam).mean(bias.terminal) - phi.mean(start)
            yield self.exact(case, truth.path_kl, spent, 1e-8, f"{where}continuous time: path KL* = E*[r]/λ - E log φ(0, X_0)")
            end, here = truth.terminal, moments(bias.terminal.mean, bias.terminal.cov)
            yield self.exact(case, here, moments(end.mean, end.cov), 1e-9,
                             f"{where}law of X_T: tilt weighted by 1/φ(0, X_0) = that of Riccati's policy")
            yield self.exact(case, Gaussian(end.mean, end.cov).kl(bias.tilt), bias.kl, 1e-8,
                             f"{where}initial-law bias, KL(law of X_T || tilt): {bias.kl:.3g} nats")

    def _bias(self, case: Case) -> Iterator[Verdict]:
        """What is taken for the initial-law bias, and where it is taken for nothing."""
        where, problem = at_eta(case), case.problem
        bias = initial_bias(problem)
        chain = exact.optimum(problem, problem.grid(FINITE)).truth.terminal
        finite = Gaussian(chain.mean, chain.cov).kl(bias.tilt)
        yield self.planted(case, finite, bias.kl, 1e-8, f"{where}KL at N = {FINITE} quoted as bias: {finite:.3g} for {bias.kl:.3g} nats")
        short = initial_bias(replace(problem, schedule=SHORT, start="exact"))
        yield self.planted(case, moments(short.tilt.mean, short.tilt.cov), moments(short.terminal.mean, short.terminal.cov), 1e-8,
                           f"{where}the tilt claimed for a short noising, {short.kl:.3g} nats away")

    def _short_on_the_line(self, case: Case) -> Iterator[Verdict]:
        for problem, what in ((case.problem, "this noising"), (replace(case.problem, schedule=SHORT, start="exact"), "a short noising")):
            found = reversal_optimum(problem)
            row = self.planted(case, node_moments(found.points, found.tilt), node_moments(found.points, found.masses), 1e-8,
                               f"the tilt claimed for {what}, {found.bias:.3g} nats away")
            yield row

    def _divergences(self, case: Case, r: Array) -> Iterator[Verdict]:
        """f-tilts of samples of the data law with rewards r (n,): no law on them does better, because the dual value is the same."""
        problem, lam = case.problem, case.problem.kl_weight
        for divergence in DIVERGENCES:
            found, name = divergence_tilt(r, lam, divergence), str(divergence)
            best, wrong = (primal(found, u, r, lam, divergence) for u in (found.ratio, divergence_tilt(r, 1 / lam, divergence).ratio))
            bound = dual(found, r, lam, divergence)
            yield self.exact(case, best, bound, 1e-9, f"E r - λ D_f of p_pre (f')⁻¹((r - c)/λ) = its dual bound: {name}")
            yield self._exchanged(case, wrong, bound, 1e-9, f"in the f-tilt: {name}")
        away = np.array([4e-3, 2e-3, 1e-3, 5e-4])
        best = divergence_tilt(r, lam, KL()).objective
        error = np.array([divergence_tilt(r, lam, Alpha(1 + e)).objective - best for e in away])
        yield self.limit(case, away, error, 1.0, "α-divergence to KL", over="α - 1")
        if problem.dim == 1:
            one, other = tilt(problem.data, problem.reward, lam), line_divergence_tilt(problem.data, problem.reward, lam, KL())
            yield self.exact(case, [other.objective, other.reward, other.divergence], [one.objective, one.reward, one.kl], 1e-9,
                             "the f-tilt of KL on the line = p_data e^(r/λ)/Z: J, E r, KL")

    def figure(self, case: Case) -> Figure:
        with style.panels(4, "optimal_tilt: the optimum ends in p_pre e^(r/λ)/Z, where X_T forgets X_0", width=3.7) as (figure, axes):
            case = without(case)
            _draw_terminal(axes[0], case)
            _draw_bias(axes[1], case)
            _draw_frontier(axes[2], case)
            _draw_orders(axes[3], case)
        return figure


# ---- drawing -------------------------------------------------------------------------------------------------------------


def _bell(x: Array, law: Gaussian) -> Array:
    """Density of the first coordinate."""
    return np.exp(-0.5 * (x - law.mean[0]) ** 2 / law.cov[0, 0]) / np.sqrt(2 * np.pi * law.cov[0, 0])


def _draw_terminal(ax: Axes, case: Case) -> None:
    """The first coordinate of X_N: pre-trained, tilted, of simulated optimal paths, and the tilt with lambda exchanged."""
    at, problem, lam = Optima(case), case.problem, case.problem.kl_weight
    pre = Gaussian(at.pretrained.terminal.mean, at.pretrained.terminal.cov)
    tilts = [tilt(pre, problem.reward, weight).law for weight in (lam, 1 / lam)]
    ends = simulate(problem, at.best.policy, case.grid, case.noise("figure", 20_000)).terminal[:, 0]
    assert tilts[0] is not None and tilts[1] is not None
    wide = 4 * np.sqrt(pre.cov[0, 0])
    x = np.linspace(pre.mean[0] - wide, pre.mean[0] + wide, 201)
    ax.plot(x, _bell(x, pre), color=style.GREY, linestyle=":", label="p_pre (exact)")
    ax.plot(x, _bell(x, tilts[0]), color=style.BLUE, label="tilt p_pre e^(r/λ)/Z (exact)")
    if lam != 1:
        ax.plot(x, _bell(x, tilts[1]), color=style.RED, linestyle="--", label="planted: λ and 1/λ exchanged")
    counts, edges = np.histogram(ends, bins=25, range=(x[0], x[-1]))
    width = edges[1] - edges[0]
    density, bar = counts / (len(ends) * width), 1.96 * np.sqrt(counts) / (len(ends) * width)
    shown = counts > 0
    ax.errorbar(0.5 * (edges[1:] + edges[:-1])[shown], density[shown], bar[shown], fmt="o", color="black", capsize=2, markersize=3,
                label="optimal paths (95 %)")
    ax.set(xlabel="first coordinate of X_N (state units)", ylabel="density (1/state units)", title=f"terminal laws, N = {case.steps}",
           ylim=(0, 1.5 * float(density.max())))
    ax.legend(loc="upper left")


def _draw_bias(ax: Axes, case: Case) -> None:
    """KL of the optimum's terminal law to the tilt against the strength of the noising, and the step size that is taken for it."""
    strengths = np.array([1.0, 2.0, 4.0, 10.0, 20.0])
    for index, eta in enumerate((0.5, 1.0, 1.5)):
        bias = [initial_bias(replace(case.problem, schedule=VP(0.1, b), start="exact", eta=eta)).kl for b in strengths]
        ax.loglog(strengths, bias, marker=style.MARKERS[index], linestyle=style.LINES[index], color=style.COLOURS[index],
                  label=f"η = {eta:g} (exact)")
    finite = []
    for b in strengths:
        problem = replace(case.problem, schedule=VP(0.1, b), start="exact", eta=1.0)
        end = exact.optimum(problem, problem.grid(FINITE)).truth.terminal
        finite.append(Gaussian(end.mean, end.cov).kl(initial_bias(problem).tilt))
    ax.loglog(strengths, finite, "x--", color=style.RED, label=f"planted: chain of N = {FINITE}, η = 1")
    style.log_ticks(ax, strengths, [f"{b:g}" for b in strengths])
    ax.set(xlabel="largest noise rate β (1/time)", ylabel="KL(X_T || tilt) (nats)", title="initial-law bias: longer noising, less", ylim=(1e-23, 1e3))
    ax.legend(loc="lower left")


def _draw_frontier(ax: Axes, case: Case) -> None:
    """The ideal frontier, exact and from samples of the pre-trained law; the chain's optima on it; its slope at the case's lambda."""
    problem, lam = case.problem, case.problem.kl_weight
    weights = lam * np.geomspace(0.25, 4, 7)
    ideal = frontier(problem.data, problem.reward, (lam * np.geomspace(0.2, 6, 40)).tolist())
    ax.plot([t.kl for t in ideal], [t.reward for t in ideal], color=style.BLUE, label="ideal: tilts (exact)")
    chains = [exact.optimum(replace(problem, kl_weight=float(w)), case.grid) for w in weights]
    ax.plot([b.penalty for b in chains], [expected_reward(b) for b in chains], style.MARKERS[1], color=style.ORANGE,
            label=f"J* of means, N = {case.steps}")
    found = ideal_frontier(problem.reward.value(problem.data.sample(case.noise("frontier", 20_000))), weights.tolist())
    ax.errorbar([y.kl for y in found], [y.reward for y in found], [1.96 * y.reward_error for y in found], [1.96 * y.kl_error for y in found],
                fmt="o", color="black", capsize=2, markersize=3, label="from 20,000 samples (95 %)")
    here, reach = tilt(problem.data, problem.reward, lam), 0.35
    for slope, colour, line, what in ((lam, "black", "-.", "slope λ"), (1 / lam, style.RED, "--", "planted: slope 1/λ")):
        if slope == lam or lam != 1:
            ax.plot(here.kl + np.array([-reach, reach]), here.reward + slope * np.array([-reach, reach]), color=colour, linestyle=line, label=what)
    ax.set(xlabel="KL to the pre-trained law (nats)", ylabel="E r (reward units)", title="reward-KL frontier: dE*[r]/dKL* = λ")
    ax.legend(loc="lower right")


def _draw_orders(ax: Axes, case: Case) -> None:
    """Both optima of the chain against J* of continuous time."""
    dt, means, kernels = two_optima(case)
    limit = continuous_objective(case)
    assert limit is not None
    style.order_line(ax, dt, np.abs(means - limit), "J* of means − J*", 0)
    style.order_line(ax, dt, np.abs(kernels - limit), "Doob value − J*", 1)
    style.order_line(ax, dt, kernels - means, "planted, Doob for J*", 3)
    ax.set(xlabel="step D (horizon units)", ylabel="difference (reward units)", title="two optima of the chain: O(D) apart")
    ax.legend(loc="lower right")
