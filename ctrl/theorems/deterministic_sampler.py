r"""The deterministic sampler, eta = 0, and one action deployed under every eta (theory.md, section 11).

At eta = 0 only X_0 is random: dX = [ -f X + h mu ] dt with h = kappa = g^2/2, V is constant along paths up to the cost, and
the gradient is an adjoint. There is no density of a path to take a score of. One mu under two stochasticities differs by

    E r_eta - E r_0 = 1/2 int eta^2 g^2 E_eta[ (mu - grad log p_t^eta) . grad V^0 ] dt,      V^0 the value of r at eta = 0,

which vanishes when mu is the score of the laws that it generates itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
from scipy.interpolate import CubicSpline

from ctrl import exact
from ctrl.check import Array
from ctrl.estimators import (Estimator, FiniteDifference, LeaveOneOut, Pathwise, RewardToGo, Run, ScoreFunction, TemporalDifference, ValueGradient,
                             runs)
from ctrl.evidence import mean_test
from ctrl.exact.chain import LinearChain
from ctrl.laws import Gaussian
from ctrl.noise import Noise, NoiseLike, QuadratureNoise
from ctrl.policy import AffinePolicy, CallablePolicy, Policy
from ctrl.problem import Problem
from ctrl.rollout import simulate
from ctrl.schedule import TimeGrid
from ctrl.theorems import style
from ctrl.theorems.advantage import LastStep
from ctrl.theorems.gibbs_exploration import spread_states
from ctrl.theorems.path_kl import log_ratio_under_pre, marginal_fisher
from ctrl.theorems.reversal import longer_noising
from ctrl.theorems.value import along, random_states
from ctrl.theorems.verdict import Case, Theorem, Verdict, order_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEPLOYED = (0.0, 0.5, 1.0, 1.5)
TIMES = (0.2, 0.5, 0.9)  # of the horizon
UNBIASED = 1e-10
PATTERN_VARIABLES = 14
SETTLING = (12, 24, 48, 96, 192)  # steps, each twice the last


@lru_cache(maxsize=16)
def under(case: Case, eta: float) -> Case:
    """The case at an eta, the same object every time it is asked for: exact solvers keep what they solved by identity."""
    return case.at(eta)


def known(case: Case) -> bool:
    """Is there an exact truth at every eta: for linear chains, and on the line?"""
    return case.linear or case.problem.dim == 1


def affordable(case: Case) -> Array:
    """Numbers of steps for orders: half as many in a quick run."""
    return order_steps(case) // (2 if case.quick else 1)


# ---- the gradient --------------------------------------------------------------------------------------------------------


def start_noise(case: Case, nodes: int = 801) -> QuadratureNoise:
    """A rule for X_0, all that is random at eta = 0: sign patterns for linear cases, the trapezoid rule on +-7.4 deviations on the line."""
    if case.linear:
        return Noise.signs(case.problem, case.policy, case.grid)
    two = Noise.gauss_hermite(case.problem, case.policy, case.grid, nodes=2)
    z = np.linspace(-7.4, 7.4, nodes)
    weights = np.exp(-0.5 * z**2)
    return replace(two, nodes=z, node_weights=weights / weights.sum(), paths=nodes * two.components.size)


@dataclass(frozen=True, eq=False)
class ForcedScore(Estimator):
    """A score function at eta = 0 with g in the place of eta g: the noise that it multiplies by moved nothing."""

    def cotangents(self, run: Run) -> Array:
        c = run.coefficients
        returns = run.reward - run.cost.sum(axis=1)
        return (c.h * np.sqrt(c.dt / c.g2))[:, None] * run.xi * returns[:, None, None] + run.kl_term


@dataclass(frozen=True, eq=False)
class DoubledGain(Pathwise):
    """g^2 for h = g^2/2 in the last factor of the adjoint form."""

    def cotangents(self, run: Run) -> Array:
        u = super().cotangents(run)
        return u + (u - run.kl_term)


def per_path(estimator: Estimator | FiniteDifference, case: Case, noise: NoiseLike) -> Array:
    """Gradient samples (n, p)."""
    samples = estimator(case.problem, case.policy, case.grid, noise).samples
    assert samples is not None
    return samples


def refusals(case: Case) -> list[tuple[str, Callable[[], object]]]:
    """What has no meaning at eta = 0, and must say so with a ValueError."""
    problem, policy, grid = case.problem, case.policy, case.grid
    noise, value = case.noise("refusals", 8), LastStep(case)
    forms = [("score function", ScoreFunction()), ("score function with k1", ScoreFunction(sampled_kl=True)), ("reward-to-go", RewardToGo()),
             ("leave-one-out", RewardToGo(baseline=LeaveOneOut())), ("temporal difference", TemporalDifference(value))]
    out: list[tuple[str, Callable[[], object]]] = [(name, partial(form, problem, policy, grid, noise)) for name, form in forms]
    out.append(("log-weight of a path", lambda: simulate(problem, policy, grid, noise).log_weight))
    if known(case):
        out.append(("path KL", lambda: case.truth.path_kl))
    return out


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except ValueError as error:
        return str(error).startswith("eta:")
    return False


# ---- along the flow ------------------------------------------------------------------------------------------------------


def along_flow(case: Case, gain: float = 1.0, laplacian: float = 0.0) -> tuple[Array, Array]:
    r"""d/ds V(t + s, x + s b) at s = 0 by differences of the continuous V, and lambda kappa |mu - s|^2 there: the first-order PDE.

        b = -f x + h mu;   planted: gain 2 has b = -f x + g^2 mu,   laplacian 1 keeps g^2/2 lap V of the SDE

    Source: theory.md, section 11.   Checked: tests/test_theorem_deterministic_sampler.py::test_every_verdict_holds
    """
    problem, value, left, right, s = case.problem, exact.limit.value(case.problem, case.policy), [], [], 1e-3 * case.problem.horizon
    for share in (0.25, 0.5, 0.75):
        i = round(share * case.grid.steps)
        t, x = float(case.grid.times[i]), random_states(case, i)
        f, g2, h, kappa = problem.schedule.rates(t, 0.0)
        mu = case.policy.mean(case.grid, i, x)
        b = -f * x + gain * h * mu
        near, far = (value(t + k * s, x + k * s * b) - value(t - k * s, x - k * s * b) for k in (1, 2))
        curvature = -np.trace(value.coefficients(t)[0])
        left.append((8 * near - far) / (12 * s) + 0.5 * laplacian * g2 * curvature - problem.discount * value(t, x))
        right.append(problem.kl_weight * kappa * np.sum((mu - problem.score(t, x)) ** 2, axis=1))
    return np.concatenate(left), np.concatenate(right)


def value_errors(case: Case) -> tuple[Array, Array]:
    """Steps D and |V_0 - V(0, .)| at fixed states: to the limit, or N against 2N where there is no continuous solver."""
    x, steps = spread_states(case, 0.0), affordable(case) if case.linear else 2 * order_steps(case)

    @cache
    def V(n: int) -> Array:
        return exact.value(case.problem, case.policy, case.problem.grid(n))(0, x)

    target = exact.limit.value(case.problem, case.policy)(0.0, x) if case.linear else None
    error = [np.linalg.norm(V(n) - (V(2 * n) if target is None else target)) for n in steps.tolist()]
    return case.problem.horizon / steps, np.array(error)


def paid_values(run: Run, value: exact.Value) -> Array:
    """e^{-rho t_i} V_i(X_i) - costs paid before i, along paths, (n, N + 1): at eta = 0 the same number all along a path."""
    paid = np.concatenate([np.zeros((len(run.cost), 1)), np.cumsum(run.cost, axis=1)], axis=1)
    return along(run, value) - paid


# ---- marginals -----------------------------------------------------------------------------------------------------------


def kl_step(problem: Problem, policy: Policy, steps: int, share: float = 1 / 3) -> tuple[float, float, float]:
    r"""On the line: (KL_{i+1} - KL_i)/D of the chain's marginals, E_p[(b - b_pre) d log(p/p_pre)], and 1/2 eta^2 g^2 E_p|d log(p/p_pre)|^2.

    Densities by quadrature (at eta = 0 by transport), their slopes by splines.
    Source: theory.md, section 11.   Checked: tests/test_theorem_deterministic_sampler.py::test_rate_of_the_marginal_kl_on_the_line
    """
    full = problem.grid(steps)
    i = round(share * steps)
    t = float(full.times[i])
    grids = [TimeGrid(full.times[: k + 1]) for k in (i, i + 1)]
    now, later = (exact.evaluate(problem, policy, grid) for grid in grids)
    log_p, log_q = (_log_density(truth.terminal) for truth in (now, exact.evaluate(problem, problem.pretrained(grids[0]), grids[0])))
    x = log_p.x
    slope = log_p(x, 1) - log_q(x, 1)
    p, (_, g2, h, _) = np.exp(log_p(x)), problem.schedule.rates(t, problem.eta)
    gap = policy.mean(full, i, x[:, None])[:, 0] - problem.score(t, x[:, None])[:, 0]
    push, fisher = (float(CubicSpline(x, p * values).integrate(x[0], x[-1])) for values in (h * gap * slope, slope**2))
    return (later.terminal_kl - now.terminal_kl) / float(full.dt[i]), push, 0.5 * problem.eta**2 * g2 * fisher


def _log_density(end: exact.Terminal) -> CubicSpline:
    assert end.points is not None and end.density is not None
    keep = end.density > 1e-13 * end.density.max()
    return CubicSpline(end.points[keep], np.log(end.density[keep]))


# ---- one action under every eta ------------------------------------------------------------------------------------------


def reward_gap(case: Case, eta: float, policy: Policy, grid: TimeGrid) -> float:
    """E r(X_N) of one policy under eta, less that under eta = 0."""
    run, still = (exact.evaluate(under(case, there).problem, policy, grid).expected_reward for there in (eta, 0.0))
    return float(run - still)


def reward_only(case: Case) -> Problem:
    """The problem at eta = 0 whose value is that of the reward alone."""
    return case.at(0.0, kl_weight=0.0, discount=0.0, entropy_weight=0.0).problem


def closed_gap(case: Case, eta: float, policy: Policy, grid: TimeGrid) -> float:
    r"""The reward gap step by step: what eta changes in a step, in the currency of V^0, exactly.

        sum_i 1/2 eta^2 g^2 D E_eta[ mu . grad V^0_{i+1}(F X) - tr S - 1/4 eta^2 g^2 D mu'S mu ],     F x = x + D (-f x + h_0 mu)

    V^0_{i+1} = -1/2 x'S x + w'x + z of r alone at eta = 0.  Gaussian data, quadratic reward.
    Source: theory.md, section 11.   Checked: tests/test_theorem_deterministic_sampler.py::test_gap_step_by_step
    """
    chain, still = LinearChain(under(case, eta).problem, policy, grid), LinearChain(reward_only(case), policy, grid)
    (m, P), (S, w, _), (A, c), parts = chain.moments, still.values, still.maps, policy.parts(grid)
    assert parts is not None
    rate, total = eta**2 * case.problem.coefficients(grid).g2 * grid.dt, 0.0
    for i in range(grid.steps):
        K, k, second = parts.K[i], parts.k[i], P[i] + np.outer(m[i], m[i])
        U, u = -S[i + 1] @ A[i], w[i + 1] - S[i + 1] @ c[i]  # grad V^0(F x) = U x + u
        SK, Sk = S[i + 1] @ K, S[i + 1] @ k
        pushed = np.sum((K.T @ U) * second) + (K.T @ u + U.T @ k) @ m[i] + k @ u
        bent = np.sum((K.T @ SK) * second) + 2 * (K.T @ Sk) @ m[i] + k @ Sk
        total += 0.5 * rate[i] * (pushed - np.trace(S[i + 1]) - 0.25 * rate[i] * bent)
    return float(total)


def score_gap(case: Case, eta: float, policy: Policy, grid: TimeGrid) -> float:
    r"""The same gap as a distance from being a score: sum_i D 1/2 eta^2 g^2 E_eta[ (mu - grad log p^eta) . grad V^0 ], left points; O(D).

    Source: theory.md, sections 2 and 11.   Checked: tests/test_theorem_deterministic_sampler.py::test_every_verdict_holds
    """
    m, P = LinearChain(under(case, eta).problem, policy, grid).moments
    (S, w, _), parts = LinearChain(reward_only(case), policy, grid).values, policy.parts(grid)
    assert parts is not None
    precision = np.linalg.inv(P[:-1])
    U, u = parts.K + precision, parts.k - np.einsum("kij,kj->ki", precision, m[:-1])
    at_mean = np.sum((np.einsum("kij,kj->ki", U, m[:-1]) + u) * (w[:-1] - np.einsum("kij,kj->ki", S[:-1], m[:-1])), axis=1)
    spread = -np.einsum("kji,kjl,kli->k", U, S[:-1], P[:-1])
    return float(0.5 * eta**2 * (case.problem.coefficients(grid).g2 * grid.dt) @ (at_mean + spread))


def reward_gap_limit(case: Case, eta: float) -> float:
    """E r of the case's policy under eta, less that under eta = 0, in continuous time."""
    run, still = (exact.limit.evaluate(there.problem, there.policy).expected_reward for there in (under(case, eta), under(case, 0.0)))
    return float(run - still)


def tilted_reward(problem: Problem) -> float:
    r"""E r under the tilt p_data e^{r/lambda}: for Gaussian data and a quadratic reward N(., (C^-1 + Q/lambda)^-1).

    Source: theory.md, section 9.   Checked: tests/test_theorem_deterministic_sampler.py::test_optimum_of_eta_one_is_the_tilts_score
    """
    r, data = problem.reward.quadratic(problem.dim), problem.data
    assert r is not None and isinstance(data, Gaussian)
    precision = data.precision + r.matrix / problem.kl_weight
    tilt = Gaussian(np.linalg.solve(precision, data.precision @ data.mean + r.vector / problem.kl_weight), np.linalg.inv(precision))
    return float(-0.5 * (tilt.mean @ r.matrix @ tilt.mean + np.sum(r.matrix * tilt.cov)) + r.vector @ tilt.mean + r.constant)


def with_gain_g2(case: Case) -> Policy:
    """The case's action under the planted gain g^2 for h = g^2/2: h times 2 mu."""
    policy, parts = case.policy, case.policy.parts(case.grid)
    if parts.laws is None:
        return AffinePolicy(2 * parts.K, 2 * parts.k)

    def action(t: float, x: Array, theta: Array) -> Array:
        W, w = policy.basis.apply(t, theta)
        return 2 * (case.problem.score(t, x) + x @ W.T + w)

    def jacobian_x(t: float, x: Array, theta: Array) -> Array:
        return 2 * (case.problem.marginal(t).score_jacobian(x) + policy.basis.apply(t, theta)[0])

    return CallablePolicy(action, policy.theta, jacobian_x=jacobian_x, dim=case.problem.dim)


def deployed(case: Case, grid: TimeGrid) -> Array:
    """J (4, 4) of the optimum trained at DEPLOYED[row] and run at DEPLOYED[column]."""
    problems = [under(case, eta).problem for eta in DEPLOYED]
    policies = [exact.optimum(problem, grid).policy for problem in problems]
    return np.array([[exact.evaluate(problem, policy, grid).objective for problem in problems] for policy in policies])


# ---- the theorem ---------------------------------------------------------------------------------------------------------


class DeterministicSampler(Theorem):
    r"""At eta = 0 gradients are adjoints and score functions do not exist; one action under two etas earns two rewards.

    Source: theory.md, sections 11 and 16.   Checked: tests/test_theorem_deterministic_sampler.py::test_every_verdict_holds
    """

    name = "deterministic_sampler"
    statement = ("At η = 0 (h = κ = g²/2, κ a penalty) V moves along paths by its cost alone, ∇J = E ∫ (∂μ)' [h ∇V - 2λκ(μ - s)] dt is an adjoint, "
                 "and no score-function form exists; d/dt KL(p_t || p_t^pre) = E_p[(b - b_pre)·∇log(p/p_pre)] - ½ η² g² E_p|∇log(p/p_pre)|². One μ "
                 "run at η and at 0 differs by E r_η - E r_0 = ½ ∫ η² g² E_η[(μ - ∇log p_t^η)·∇V⁰] dt, which vanishes for the score of its own laws.")
    formulas = (
        r"\partial_tV+\left(-fx+\frac{g^2}{2}\mu\right)\cdot\nabla V=\lambda\kappa\,|\mu-s|^2,\qquad \kappa=\frac{g^2}{2}\quad(\eta=0)",
        r"\nabla J=E\int(\partial\mu)^{\top}\left[\,h\nabla V-2\lambda\kappa(\mu-s)\,\right]dt,\qquad KL(P_\theta\,\|\,P_{pre})=\infty",
        r"\frac{d}{dt}KL(p_t\,\|\,p_t^{pre})=E_p\left[(b-b_{pre})\cdot\nabla\log\frac{p}{p_{pre}}\right]"
        r"-\frac{\eta^2g^2}{2}E_p\left|\nabla\log\frac{p}{p_{pre}}\right|^2",
        r"E\,r_\eta-E\,r_0=\frac{1}{2}\int\eta^2g^2\,E_\eta\left[(\mu-\nabla\log p_t^\eta)\cdot\nabla V^0\right]dt")

    def checks(self, case: Case) -> Iterator[Verdict]:
        if case.problem.entropy_weight > 0:
            yield self.skipped(case, "entropy weight: the theorem is about mean actions, tried without it")
            case = case.at(case.problem.eta, entropy_weight=0.0)
        still = under(case, 0.0)
        yield from self._refusals(still)
        yield from self._gradient(still)
        yield from self._value(still)
        yield from self._marginals(case)
        yield from self._gaps(case)

    # -- no score function

    def _refusals(self, case: Case) -> Iterator[Verdict]:
        """A ValueError that names eta, from everything that would need a density of the path; and why."""
        forms = refusals(case)
        accepted = [name for name, call in forms if not refused(call)]
        what = f"eta = 0: a ValueError naming eta from {', '.join(name for name, _ in forms)}"
        yield self.exact(case, len(forms) - len(accepted), len(forms), 0.0, what + (f"; not from {', '.join(accepted)}" if accepted else ""))
        if case.linear:
            etas = np.array([0.08, 0.04, 0.02, 0.01])
            kl = [exact.evaluate(under(case, eta).problem, case.policy, case.grid).path_kl for eta in etas.tolist()]
            yield self.limit(case, etas, kl, -2.0, "path KL of the same μ grows like 1/eta²", over="eta")

    # -- the gradient

    def _gradient(self, case: Case) -> Iterator[Verdict]:
        """Adjoint forms against the exact gradient, X_0 by a rule that leaves no noise."""
        if not known(case) or (case.linear and case.problem.dim > PATTERN_VARIABLES):
            yield from self._differences(case)
            return
        if not case.linear:
            case = case.over(16)  # V.gradient follows a path from every node at every step
        noise, truth = start_noise(case), case.truth.gradient.theta
        size = float(np.linalg.norm(truth)) or 1.0

        def mean(estimator: Estimator, noise: QuadratureNoise = noise) -> Array:
            return estimator(case.problem, case.policy, case.grid, noise).mean / size

        allowed, over = (UNBIASED, f"{noise.paths} sign patterns") if case.linear else (1e-8, f"{noise.paths} start points")
        if case.own and not case.linear and np.any(np.abs(mean(Pathwise()) - mean(Pathwise(), start_noise(case, 1601))) > allowed):
            yield from self._differences(case)  # the flow is too rough for the rule
            return
        for name, estimator in (("pathwise (adjoint)", Pathwise()), ("value gradient", ValueGradient(case.value))):
            yield self.exact(case, mean(estimator), truth / size, allowed, f"eta = 0: {name} = grad J over {over}, N = {case.steps}")
        yield self.planted(case, mean(DoubledGain()), truth / size, allowed, "eta = 0: g² for h in the gradient")
        forced = "eta = 0: a score function with g for eta g, whose noise moved nothing"
        yield self.planted(case, mean(ForcedScore()), truth / size, allowed, f"{forced}, over {over.split()[0]} starts")
        if case.linear:
            right, wrong = (per_path(form, case, case.noise("gradient", case.paths // 50)) / size for form in (Pathwise(), ForcedScore()))
            test = mean_test(right, truth / size)
            yield self.monte_carlo(case, test, 0.5, f"eta = 0: pathwise gradient of {len(right)} paths")
            yield self.planted_sampled(case, mean_test(wrong, truth / size), f"{forced}, along {len(right)} paths", test)

    def _differences(self, case: Case) -> Iterator[Verdict]:
        """Without a truth: path by path the adjoint is the derivative of the path's own objective."""
        noise = case.noise("differences", 64)
        adjoint, doubled = per_path(Pathwise(), case, noise), per_path(DoubledGain(), case, noise)
        near, far = (per_path(FiniteDifference(epsilon), case, noise) for epsilon in (2e-4, 4e-4))
        derivative = (4 * near - far) / 3
        yield self.exact(case, adjoint, derivative, 1e-6, "eta = 0: pathwise (adjoint) = derivative of J, path by path")
        yield self.planted(case, doubled, derivative, 1e-6, "eta = 0: g² for h in the gradient, path by path")

    # -- the value

    def _value(self, case: Case) -> Iterator[Verdict]:
        """Constant along every path up to the cost; the first-order equation in continuous time."""
        if not known(case):
            yield self.skipped(case, "eta = 0: V along paths: no exact V to compare with")
            return
        run = next(runs(case.problem, case.policy, case.grid, case.noise("paths", 64)))
        paid = paid_values(run, case.value)
        ended = run.reward - run.cost.sum(axis=1)
        scale = max(1.0, float(np.abs(ended).max()))
        yield self.exact(case, paid / scale, ended[:, None] / scale, 1e-11,
                         "eta = 0: V_i(X_i) - costs already paid = r(X_N) - all costs, path by path")
        if case.linear:
            yield self.exact(case, *along_flow(case), 1e-6, "eta = 0: continuous V solves its first-order equation")
            yield self.planted(case, *along_flow(case, gain=2.0), 1e-6, "eta = 0: g² for h in the equation of V")
            yield self.planted(case, *along_flow(case, laplacian=1.0), 1e-6, "eta = 0: the SDE's ½ g² ΔV left in the equation of V")
        if case.linear or not case.quick:
            yield self.limit(case, *value_errors(case), 1.0, "eta = 0: V_0 of the chain at fixed states" + ("" if case.linear else ", N against 2N"))

    # -- marginals

    def _marginals(self, case: Case) -> Iterator[Verdict]:
        """The rate of the marginal KL, with its Fisher term wherever there is noise."""
        if case.linear:
            few = (0.0, 0.5) if case.problem.dim <= 2 else (0.0,)
            for eta in few if case.quick else (0.0, *case.etas):
                yield from self._rates(under(case, eta))
        elif case.problem.dim == 1:
            for eta in (0.0,) if case.quick else (0.0, 1.0):
                yield from self._rates_on_the_line(under(case, eta))
        else:
            yield self.skipped(case, "rate of the marginal KL: no exact marginals here")

    def _rates(self, case: Case) -> Iterator[Verdict]:
        where, T = f"eta = {case.problem.eta:g}: ", case.problem.horizon
        rates = [exact.limit.marginal_kl_rate(case.problem, case.policy, share * T) for share in TIMES]
        formula, derivative = (np.array([getattr(rate, name) for rate in rates]) for name in ("formula", "derivative"))
        yield self.exact(case, formula, derivative, 1e-8, f"{where}d/dt KL(p_t || p_t^pre), formula against the Gaussian KL's own derivative")
        if case.problem.eta == 0:
            yield self.planted(case, 2 * formula, derivative, 1e-8, f"{where}g² for h in the rate of the marginal KL")
        else:
            fisher = [marginal_fisher(case, share * T) for share in TIMES]
            yield self.planted(case, formula + fisher, derivative, 1e-8, f"{where}the rate without its Fisher term")

    def _rates_on_the_line(self, case: Case) -> Iterator[Verdict]:
        where, steps = f"eta = {case.problem.eta:g}: ", affordable(case) // 2
        table = np.array([kl_step(case.problem, case.policy, int(n)) for n in steps])
        dt = case.problem.horizon / steps
        step, push, fisher = table.T
        yield self.limit(case, dt, step - push + fisher, 1.0, f"{where}(KL_(i+1) - KL_i)/D of the chain against the rate of the marginal KL")
        weights = [np.prod([other / (other - here) for other in dt if other != here]) for here in dt]
        start, right, lost = (float(np.dot(weights, column)) for column in (step, push - fisher, push))
        row = self.exact(case, start, right, 1e-3, f"{where}rate of the marginal KL, extrapolated to D = 0")
        yield self.skipped(case, f"{row.reason}: these grids are too coarse for it") if case.own and not row.holds else row
        if case.problem.eta == 0:
            yield self.planted(case, 2 * right, start, 1e-3, f"{where}g² for h in the rate of the marginal KL")
        else:
            yield self.planted(case, lost, start, 1e-3, f"{where}the rate without its Fisher term")

    # -- train with one eta, deploy with another

    def _gaps(self, case: Case) -> Iterator[Verdict]:
        """E r of one action under several etas."""
        if not known(case):
            yield self.skipped(case, "reward gap between stochasticities: no exact E r here")
            return
        tried = DEPLOYED[1:] if case.linear or not case.quick else DEPLOYED[-1:]  # the widest gap
        gaps = {eta: reward_gap(case, eta, case.policy, case.grid) for eta in tried}
        yield from self._sampled_gaps(case, gaps)
        if case.linear:
            closed = [closed_gap(case, eta, case.policy, case.grid) for eta in gaps]
            yield self.exact(case, closed, list(gaps.values()), 1e-10, "E r_η - E r_0 step by step: what η changes, in the currency of V⁰")
            yield from self._matrix(case)
            yield from self._faithful(case)
        yield from self._planted_gaps(case)
        yield from self._gap_limits(case)

    def _sampled_gaps(self, case: Case, gaps: dict[float, float]) -> Iterator[Verdict]:
        """Simulated, both samplers from the same X_0."""
        widest, noise = max(abs(gap) for gap in gaps.values()), case.noise("deployed", min(case.paths, 100_000) // max(1, case.problem.dim // 2))
        flow = simulate(under(case, 0.0).problem, case.policy, case.grid, noise).reward
        for eta, gap in gaps.items():
            reward = simulate(under(case, eta).problem, case.policy, case.grid, noise).reward
            yield self.monte_carlo(case, mean_test(reward - flow, gap), widest,
                                   f"E r at eta = {eta:g} less E r at 0, the same μ; must see the widest gap")

    def _matrix(self, case: Case) -> Iterator[Verdict]:
        """Each optimum is the best of the four under its own eta."""
        try:
            J = deployed(case, case.grid)
        except ValueError as error:
            yield self.skipped(case, f"trained with one eta, deployed with another: {error}")
            return
        yield self.exact(case, np.max(J, axis=0), np.diag(J), 1e-12, "J of four optima under four eta: at every eta its own optimum is the best")
        yield self.planted(case, J[DEPLOYED.index(1.0)], np.diag(J), 1e-12, "the optimum of eta = 1 sold as the optimum of another eta")

    def _planted_gaps(self, case: Case) -> Iterator[Verdict]:
        """A drift of the SDE without its noise; a likelihood ratio where there is none."""
        still = under(case, 0.0)
        true = still.truth.expected_reward
        wrong = exact.evaluate(still.problem, with_gain_g2(still), still.grid).expected_reward
        yield self.planted(case, wrong, true, 1e-8, "eta = 0: h = g², the drift of the SDE without its noise: E r")
        pre = still.problem.pretrained(still.grid)
        there = exact.evaluate(still.problem, pre, still.grid).expected_reward
        yield self.planted(case, there, true, 1e-8, "eta = 0: Girsanov weight with κ = g²/2: E_pre[weight r] = E_pre r, as its noise moved nothing")
        parts = [(log_ratio_under_pre(still.policy, run), run.paths.reward) for run in
                 runs(still.problem, pre, still.grid, still.noise("Girsanov", case.paths // (8 if case.quick else 16)))]
        log_weight, reward = (np.concatenate(part) for part in zip(*parts, strict=True))
        if case.own and log_weight.var() > 4:
            yield self.skipped(case, f"eta = 0: E_pre[weight r] along paths: log-weights of variance {log_weight.var():.2g}, too heavy for a test")
            return
        weighted = np.exp(log_weight) * reward
        yield self.monte_carlo(case, mean_test(weighted, there), abs(there - true), "eta = 0: E_pre[weight r] = E_pre r; must see E_θ r")
        yield self.planted_sampled(case, mean_test(weighted, true), "eta = 0: E_pre[weight r] for E_θ r, along paths")

    def _gap_limits(self, case: Case) -> Iterator[Verdict]:
        """The gap of the pre-trained action vanishes with D; that of another action does not."""
        if not case.linear and case.quick:
            return  # a dozen quadratures
        faithful, steps = case.at(case.problem.eta, start="exact"), affordable(case) if case.linear else 2 * order_steps(case) // 3
        grids, dt = [case.problem.grid(int(n)) for n in steps], case.problem.horizon / steps
        for eta in DEPLOYED[1:] if case.linear and not case.quick else (0.5,):
            gap = [reward_gap(faithful, eta, case.problem.pretrained(grid), grid) for grid in grids]
            yield self.limit(case, dt, gap, 1.0, f"eta = {eta:g}: the gap of the pre-trained action from X_0 ~ p_T vanishes")
            if case.linear:
                target = reward_gap_limit(case, eta)
                for what, form in (("the gap of another action", reward_gap), ("½ Σ D η² g² E[(μ - ∇log p)·∇V⁰]", score_gap)):
                    error = [form(case, eta, case.policy, grid) - target for grid in grids]
                    yield self.limit(case, dt, error, 1.0, f"eta = {eta:g}: {what} tends to {target:.6g}")
            else:
                gap = [reward_gap(case, eta, case.policy, case.problem.grid(n)) for n in SETTLING]
                yield self.limit(case, case.problem.horizon / np.array(SETTLING[:-1]), np.diff(gap), 1.0,
                                 f"eta = {eta:g}: the gap of another action settles, N against 2N")

    def _faithful(self, case: Case) -> Iterator[Verdict]:
        """The optimum of eta = 1 is the score of the noised tilt, so that it earns the tilt's reward under every eta, but for its start."""
        if not case.linear or case.quick or case.problem.discount > 0:
            return
        schedules = longer_noising(case.problem.schedule)
        if case.problem.dim > 2 or not schedules:
            yield self.skipped(case, "the optimum of eta = 1 under other eta: tried for VP and OU in one and two dimensions")
            return
        try:
            tilt = tilted_reward(case.problem)
            best = [exact.limit.optimum(case.at(1.0, schedule=schedule).problem).policy for schedule in schedules]
        except ValueError as error:
            yield self.skipped(case, f"the optimum of eta = 1 under other eta: {error}")
            return
        alphas = np.array([schedule.alpha(schedule.tau(0.0)) for schedule in schedules])
        for eta in (0.0, 0.5):
            miss = [exact.limit.evaluate(case.at(eta, schedule=schedule).problem, policy).expected_reward - tilt
                    for schedule, policy in zip(schedules, best, strict=True)]
            yield self.limit(case, alphas, miss, 1 + eta**2, f"eta = {eta:g}: the optimum of eta = 1 misses the tilt's E r by α(T)^(1 + η²)",
                             over="alpha(T)")

    def figure(self, case: Case) -> Figure:
        with style.panels(4, "deterministic_sampler: one action under every stochasticity η", width=3.7) as (figure, axes):
            _draw_rewards(axes[0], case)
            _draw_gaps(axes[1], case)
            _draw_rates(axes[2], case)
            _draw_spread(axes[3], case)
        return figure


# ---- drawing -------------------------------------------------------------------------------------------------------------


def _draw_rewards(ax: Axes, case: Case) -> None:
    """E r against the eta of deployment: pre-trained, another action, two optima; simulated at DEPLOYED; the planted h = g^2."""
    pre, trained = case.problem.pretrained(case.grid), [exact.optimum(case.at(eta).problem, case.grid).policy for eta in (0.0, 1.0)]
    lines = [("pre-trained", pre), ("another action", case.policy), ("optimum of η = 0", trained[0]), ("optimum of η = 1", trained[1])]
    etas = np.linspace(0.0, 1.5, 13)
    for j, (label, policy) in enumerate(lines):
        exact_line = [exact.evaluate(case.at(eta).problem, policy, case.grid).expected_reward for eta in etas.tolist()]
        ax.plot(etas, exact_line, color=style.COLOURS[j], linestyle=style.LINES[j], label=label)
        for eta in DEPLOYED:
            at = case.at(eta)
            r = simulate(at.problem, policy, case.grid, at.noise(f"figure {label}", 5000)).reward
            ax.errorbar(eta, r.mean(), 1.96 * r.std() / np.sqrt(len(r)), fmt=style.MARKERS[j], color=style.COLOURS[j], capsize=2)
    still = case.at(0.0)
    wrong = exact.evaluate(still.problem, with_gain_g2(still), case.grid).expected_reward
    ax.plot(0.0, wrong, marker="X", markersize=8, linestyle="none", color=style.COLOURS[1], markeredgecolor="black", label="planted: h = g²")
    ax.set(xlabel="η of deployment", ylabel="E r (reward units)", title="exact lines, 5,000 paths ± 95 %")
    ax.set_ylim(top=ax.get_ylim()[1] + 1.6)
    ax.legend(loc="upper left", fontsize=7, ncols=2)


def _draw_gaps(ax: Axes, case: Case) -> None:
    """The reward gap between eta = 1 and 0 against D."""
    steps, faithful, target = np.array([20, 40, 80, 160, 320]), case.at(1.0, start="exact"), reward_gap_limit(case, 1.0)
    grids, dt = [case.problem.grid(int(n)) for n in steps], case.problem.horizon / steps
    vanishing = [abs(reward_gap(faithful, 1.0, case.problem.pretrained(grid), grid)) for grid in grids]
    gap = np.array([reward_gap(case, 1.0, case.policy, grid) for grid in grids])
    style.order_line(ax, dt, vanishing, "pre-trained, X₀ ~ p_T", 0)
    style.order_line(ax, dt, np.abs(gap - target), "another action, less its limit", 1)
    style.order_line(ax, dt, np.abs([score_gap(case, 1.0, case.policy, grid) - target for grid in grids]), "½Σ D η²g² E[(μ−∇log p)·∇V⁰], less it", 2)
    ax.loglog(dt, gap, color=style.RED, linestyle=":", marker="D", label=f"another action: → {target:.3f}")
    style.log_ticks(ax, dt, [f"1/{n}" for n in steps])
    ax.set(xlabel="step D (horizon units)", ylabel="|E r₁ − E r₀| (reward units)", title="the SDE–ODE reward gap")
    ax.set_ylim(top=60 * ax.get_ylim()[1])
    ax.legend(loc="upper left", fontsize=7)


def _draw_rates(ax: Axes, case: Case) -> None:
    """d/dt KL of the marginals at eta = 0 and 1, and without the Fisher term."""
    T = case.problem.horizon
    line = np.linspace(0.02, 1.0, 28) * T
    for j, eta in enumerate((0.0, 1.0)):
        at = under(case, eta)
        rates = [exact.limit.marginal_kl_rate(at.problem, at.policy, float(t)) for t in line]
        ax.plot(line, [rate.formula for rate in rates], color=style.COLOURS[j], linestyle=style.LINES[j], label=f"formula, η = {eta:g}")
        ax.plot(line[::4], [rate.derivative for rate in rates[::4]], color=style.COLOURS[j], marker=style.MARKERS[j], linestyle="none",
                label=f"derivative of the Gaussian KL, η = {eta:g}")
    times = line[3::6]
    lost = [exact.limit.marginal_kl_rate(at.problem, at.policy, float(t)).formula + marginal_fisher(at, float(t)) for t in times]
    ax.plot(times, lost, color=style.RED, linestyle="--", marker="x", label="planted, η = 1: no Fisher term")
    ax.set(xlabel="generation time t (horizon units)", ylabel="d/dt KL(p_t || p_t^pre) (nats per time)", title="rate of the marginal KL")
    ax.set_ylim(top=ax.get_ylim()[0] + 1.7 * (ax.get_ylim()[1] - ax.get_ylim()[0]))
    ax.legend(loc="upper left", fontsize=7)


def _draw_spread(ax: Axes, case: Case) -> None:
    """Why there is no score function at eta = 0: its variance, and the path KL, grow like 1/eta^2."""
    short, etas = case.over(20), np.array([0.05, 0.1, 0.2, 0.4, 0.8])
    for j, (name, estimator) in enumerate((("score function", RewardToGo()), ("pathwise", Pathwise()))):
        trace = []
        for eta in etas.tolist():
            at = short.at(eta, kl_weight=0.0)  # the reward's gradient alone: kappa, too, grows like 1/eta^2
            trace.append(float(np.trace(estimator(at.problem, at.policy, at.grid, at.noise("figure spread", 2000)).covariance)))
        ax.loglog(etas, trace, color=style.COLOURS[j], marker=style.MARKERS[j], linestyle=style.LINES[j],
                  label=f"{name}: variance of one path's ∇E r")
    kl = [exact.evaluate(at.problem, at.policy, at.grid).path_kl for at in (under(short, eta) for eta in etas.tolist())]
    ax.loglog(etas, kl, color=style.GREEN, marker="^", linestyle="-.", label="path KL (nats)")
    ax.loglog(etas, kl[0] * (etas[0] / etas) ** 2, color=style.GREY, linestyle=":", label="1/η²")
    ax.set(xlabel="η", ylabel="(reward / parameter)²; nats", title="what has no limit at η = 0")
    style.log_ticks(ax, etas, [f"{eta:g}" for eta in etas])
    ax.set_ylim(top=100 * ax.get_ylim()[1])
    ax.legend(loc="upper right", fontsize=7)
