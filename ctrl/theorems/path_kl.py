r"""Theorem `path_kl`: Girsanov, and what the regulariser really is (theory.md, section 4).

    KL(P_theta || P_pre) = E_theta int kappa |mu - s|^2 dt,      kappa = h^2 / (2 eta^2 g^2),   nats

On the chain the left-point sum is exact, because each step is a pair of Gaussians with covariance eta^2 g^2 D I whose means
are h D (mu - s) apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ctrl import exact
from ctrl.check import Array
from ctrl.elementary import dot
from ctrl.estimators import Run, runs
from ctrl.evidence import mean_test
from ctrl.exact import quadrature
from ctrl.exact.chain import LinearChain
from ctrl.laws import Gaussian
from ctrl.policy import Policy
from ctrl.rollout import simulate
from ctrl.schedule import TimeGrid
from ctrl.theorems import style
from ctrl.theorems.verdict import Case, Theorem, Verdict, convergence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JOINT_STEPS = 12
MILD_KL = 0.02  # nats; likelihood ratios of policies further away can lack a third moment
FEWEST, MOST = 401, 2001  # points of a lattice


@dataclass(frozen=True, eq=False)
class JointLaw:
    """The whole path (X_0, ..., X_N) of a linear-Gaussian chain as one Gaussian vector: mean + factor @ standard normals."""

    mean: Array
    factor: Array
    dim: int

    @classmethod
    def of(cls, chain: LinearChain) -> JointLaw:
        (A, c), R, start = chain.maps, chain.step_cov, chain.problem.start_law
        d, n = chain.problem.dim, len(A)
        mean, factor = np.zeros((n + 1, d)), np.zeros((n + 1, d, n + 1, d))
        mean[0], factor[0, :, 0] = start.mean, np.linalg.cholesky(start.cov)
        for i in range(n):
            mean[i + 1] = A[i] @ mean[i] + c[i]
            factor[i + 1] = np.einsum("ab,bjk->ajk", A[i], factor[i])
            factor[i + 1, :, i + 1] += np.linalg.cholesky(R[i])
        return cls(mean.ravel(), factor.reshape((n + 1) * d, (n + 1) * d), d)

    def kl(self, other: JointLaw) -> float:
        """KL between two path laws as plain Gaussians in (N + 1) d dimensions: no step, no kappa, no Girsanov."""
        ratio = np.linalg.solve(other.factor, self.factor)
        gap = np.linalg.solve(other.factor, self.mean - other.mean)
        return 0.5 * (float(np.sum(ratio**2)) - len(ratio) + float(gap @ gap)) - float(np.linalg.slogdet(ratio)[1])

    def terminal(self) -> Gaussian:
        last = self.factor[-self.dim :]
        return Gaussian(self.mean[-self.dim :], last @ last.T)

    def conditional_kl(self, other: JointLaw) -> float:
        """E KL( P(. | X_N) || P'(. | X_N) ) under self, from the two conditional Gaussians."""
        (B, b, C), (B2, b2, C2) = self._given_end(), other._given_end()
        end, n = self.terminal(), len(C)
        precision = np.linalg.inv(C2)
        slope, gap = B - B2, (B - B2) @ end.mean + b - b2
        spread = float(np.sum(precision * C) + np.sum(precision * (slope @ end.cov @ slope.T)) + gap @ precision @ gap)
        return 0.5 * (spread - n + float(np.linalg.slogdet(C2)[1] - np.linalg.slogdet(C)[1]))

    def _given_end(self) -> tuple[Array, Array, Array]:
        """X_0 ... X_{N-1} given X_N = x: mean B x + b, covariance C."""
        d, cov = self.dim, self.factor @ self.factor.T
        B = np.linalg.solve(cov[-d:, -d:], cov[-d:, :-d]).T
        return B, self.mean[:-d] - B @ self.mean[-d:], cov[:-d, :-d] - B @ cov[-d:, :-d]


def wrong_rates(case: Case) -> list[tuple[str, Array, str]]:
    """(what, weight of |mu - s|^2 per step in the place of kappa_i D_i, why it is invisible here or "")."""
    c, d, schedule = case.problem.coefficients(case.grid), case.problem.dim, case.problem.schedule
    right = c.kappa * c.dt
    v = np.array([schedule.v(schedule.tau(float(t))) for t in case.grid.times[:-1]])
    return [
        ("g^2 for g^2/2", c.g2 * c.dt, "" if not np.allclose(c.g2 * c.dt, right) else "g^2 equals kappa at this eta"),
        ("g^2/2 kept at eta != 1", 0.5 * c.g2 * c.dt, "eta = 1: kappa is g^2/2" if case.problem.eta == 1 else ""),
        ("time step missing in the sum", c.kappa, ""),
        ("time step missing in the variance", right * c.dt, ""),
        ("mean over dimensions", right / d, "d = 1" if d == 1 else ""),
        ("unweighted |eps - eps_ref|^2", v, ""),
        ("full log-SNR step for its half", 2 * right, ""),
    ]


def departure_under(policy: Policy, run: Run) -> Array:
    """mu - s of a policy at the states of a run, (n, N, d), whatever policy the run was drawn from."""
    steps = enumerate(run.grid.times[:-1])
    gaps = [policy.mean(run.grid, i, run.states[:, i]) - run.problem.score(float(t), run.states[:, i]) for i, t in steps]
    return np.stack(gaps, axis=1)


def log_ratio_under_pre(policy: Policy, run: Run) -> Array:
    """log dP_theta/dP_pre = sum (u'xi - |u|^2/2), u = sqrt(2 kappa D)(mu - s), along P_pre paths, (n,), nats."""
    c = run.coefficients
    u = np.sqrt(2 * c.kappa * c.dt)[:, None] * departure_under(policy, run)
    return np.sum(u * run.xi - 0.5 * u**2, axis=(1, 2))


class PathKL(Theorem):
    """Path KL: exact as a left-point sum, a log-likelihood ratio in the mean, and larger than the terminal KL."""

    name = "path_kl"
    statement = "KL(P_theta || P_pre) = E_theta ∫ κ |μ - s|² dt,  κ = h²/(2 η² g²), nats; the left-point sum is exact on the chain"
    formulas = (
        r"\mathrm{KL}(P_\theta \Vert P_{\mathrm{pre}}) = \mathbb{E}_\theta \int_0^T \kappa\, |\mu - s|^2\, dt,"
        r"\qquad \kappa = \dfrac{h^2}{2\, \eta^2 g^2}",
        r"\log \dfrac{dP_\theta}{dP_{\mathrm{pre}}} = \sum_i \left( u_i^\top \xi_i + \frac{1}{2} |u_i|^2 \right),"
        r"\qquad u_i = \sqrt{2 \kappa_i D_i}\, (\mu_i - s_i)",
        r"\mathrm{KL}_{\mathrm{terminal}} \leq \mathrm{KL}_{\mathrm{path}}")

    def checks(self, case: Case) -> Iterator[Verdict]:
        case = case.brief
        for eta in case.etas:
            at, tag = case.at(eta), "" if eta == 1 else f"eta = {eta:g}: "
            yield from self._exact_twin(at, tag)
            yield from self._monte_carlo_twin(at, tag)
            yield from self._planted(at, tag)
            if eta == 1 or case.linear or not case.quick:
                yield from self._limit(at, tag)

    def _exact_twin(self, case: Case, tag: str) -> Iterator[Verdict]:
        yield self._step_identity(case, tag)
        yield self._noise_form(case, tag)
        if case.linear:
            short = case.over(JOINT_STEPS)
            here = JointLaw.of(LinearChain(short.problem, short.policy, short.grid))
            pre = JointLaw.of(LinearChain(short.problem, short.problem.pretrained(short.grid), short.grid))
            yield self.exact(case, here.kl(pre), short.truth.path_kl, 1e-10, f"{tag}KL of the joint path laws = left-point sum")
            yield self.exact(case, here.terminal().kl(pre.terminal()), short.truth.terminal_kl, 1e-10, f"{tag}terminal KL by the joint law")
            gap = short.truth.path_kl - short.truth.terminal_kl
            yield self.exact(case, here.conditional_kl(pre), gap, 1e-8, f"{tag}path KL - terminal KL = E KL of the paths given X_N")
            rates = [exact.limit.marginal_kl_rate(case.problem, case.policy, t * case.problem.horizon) for t in (0.2, 0.5, 0.9)]
            yield self.exact(case, [r.formula for r in rates], [r.derivative for r in rates], 1e-8, f"{tag}rate of the marginal KL")
        elif case.problem.dim == 1:
            short = case.over(8)
            yield self.exact(case, dense_path_kl(short), short.truth.path_kl, 1e-9, f"{tag}E log-ratio of densities on a lattice = left-point sum")
        if not case.linear and case.solvable:
            short = case.over(8)
            ordered = float(short.truth.terminal_kl <= short.truth.path_kl)
            yield self.exact(case, ordered, 1.0, 0.0, f"{tag}terminal KL <= path KL")

    def _step_identity(self, case: Case, tag: str) -> Verdict:
        """KL of the two transition densities of one step, by sign nodes, against kappa D |mu - s|^2."""
        run = next(runs(case.problem, case.policy, case.grid, case.noise("step", 64)))
        c, left, right = case.problem.coefficients(case.grid), [], []
        for i in range(0, case.steps, 7):
            x = run.states[:, i]
            mu, s = case.policy.mean(case.grid, i, x), case.problem.score(float(case.grid.times[i]), x)
            mean, mean_pre, sd = (c.h[i] * c.dt[i] * mu, c.h[i] * c.dt[i] * s, c.noise[i])
            # log N(y; mean) - log N(y; mean_pre) is linear in y, so two nodes per coordinate, y = mean +- sd, are exact.
            nodes = np.stack([mean + sd, mean - sd])
            left.append((((nodes - mean_pre) ** 2 - (nodes - mean) ** 2) / (2 * sd**2)).mean(axis=0).sum(axis=1))
            right.append(c.kappa[i] * c.dt[i] * np.sum((mu - s) ** 2, axis=1))
        return self.exact(case, np.stack(left), np.stack(right), 1e-11, f"{tag}KL of one step's transition densities = kappa D |mu - s|^2")

    def _noise_form(self, case: Case, tag: str) -> Verdict:
        """kappa / v = (1 + eta^2)^2/(4 eta^2) |d log(alpha/sqrt v)/dtau|: half the log-SNR rate weighs |eps - eps_ref|^2."""
        schedule, eta, T = case.problem.schedule, case.problem.eta, case.problem.horizon
        tau = T * np.array([0.15, 0.4, 0.8])

        def log_ratio(s: float) -> float:
            return float(np.log(schedule.alpha(s)) - 0.5 * np.log(schedule.v(s)))

        def slope(s: float, h: float) -> float:
            return (log_ratio(s + h) - log_ratio(s - h)) / (2 * h)

        measured = [(1 + eta**2) ** 2 / (4 * eta**2) * abs(4 * slope(s, 5e-4 * T) - slope(s, 1e-3 * T)) / 3 for s in tau]
        expected = [schedule.rates(schedule.t(s), eta)[3] / schedule.v(s) for s in tau]
        return self.exact(case, measured, expected, 1e-7, f"{tag}kappa in noise form: half the log-SNR rate, from alpha and v alone")

    def _monte_carlo_twin(self, case: Case, tag: str) -> Iterator[Verdict]:
        log_weight, penalty = self._ratios(case, 2 * case.paths)
        scale = case.truth.path_kl if case.solvable else float(penalty.mean())
        if case.solvable:
            yield self.monte_carlo(case, mean_test(log_weight, scale), 0.15 * scale, f"{tag}mean log dP_theta/dP_pre = path KL")
            yield self.monte_carlo(case, mean_test(penalty, scale), 0.05 * scale, f"{tag}mean of the running penalty = path KL")
        yield self.monte_carlo(case, mean_test(log_weight - penalty, 0.0), 0.15 * scale, f"{tag}log-ratio and penalty agree in the mean")
        yield from self._weights(case, MILD_KL / scale, tag)

    def _weights(self, case: Case, shrink: float, tag: str) -> Iterator[Verdict]:
        """Means of likelihood ratios, for a policy close to the pre-trained one: only then are their tails light enough."""
        basis, theta = case.policy.basis, case.policy.theta
        origin = basis.origin(theta)
        mild = case.policy.with_theta(origin + np.sqrt(min(shrink, 1.0)) * (theta - origin))
        paths = simulate(case.problem, mild, case.grid, case.noise("weights", case.paths))
        what = f"for a policy {float(paths.penalty.mean()):.2g} nats away"
        yield self.monte_carlo(case, mean_test(np.exp(-paths.log_weight), 1.0), 0.05, f"{tag}E_theta[dP_pre/dP_theta] = 1 {what}")
        ratios = [log_ratio_under_pre(mild, run) for run in self._pre_runs(case, case.paths // 10)]
        yield self.monte_carlo(case, mean_test(np.exp(np.concatenate(ratios)), 1.0), 0.05, f"{tag}E_pre[dP_theta/dP_pre] = 1 {what}")

    def _ratios(self, case: Case, n: int) -> tuple[Array, Array]:
        paths = simulate(case.problem, case.policy, case.grid, case.noise("path KL", n))
        return paths.log_weight, paths.penalty

    def _pre_runs(self, case: Case, n: int) -> Iterator[Run]:
        return runs(case.problem, case.problem.pretrained(case.grid), case.grid, case.noise("under pre", n))

    def _planted(self, case: Case, tag: str) -> Iterator[Verdict]:
        if case.linear:
            yield from self._planted_exactly(case, tag)
            return
        n, c = case.paths // 5, case.problem.coefficients(case.grid)
        batches = [(dot(run.departure, run.departure), run.paths.log_weight)
                   for run in runs(case.problem, case.policy, case.grid, case.noise("planted", n))]
        squared, log_ratio = (np.concatenate(part) for part in zip(*batches, strict=True))
        # Judged as the right formula is: against the exact KL, or where there is none against the paths' own log-ratios.
        target = case.truth.path_kl if case.solvable else log_ratio
        right = mean_test(squared @ (c.kappa * c.dt) - target, 0.0)
        yield self.monte_carlo(case, right, 0.25 * float(log_ratio.mean()), f"{tag}the penalty of the planted errors' own paths")
        for what, weight, invisible in wrong_rates(case):
            if invisible:
                yield self.skipped(case, f"{tag}{what}: invisible, {invisible}")
            else:
                yield self.planted_sampled(case, mean_test(squared @ weight - target, 0.0), f"{tag}{what}", right)
        gaps = (departure_under(case.policy, run) for run in self._pre_runs(case, n))
        under_pre = np.concatenate([dot(gap, gap) @ (c.kappa * c.dt) for gap in gaps])
        yield self.planted_sampled(case, mean_test(under_pre - target, 0.0), f"{tag}reverse KL, i.e. expectation over P_pre states", right)
        yield self.skipped(case, f"{tag}eta of the policy unlike eta of the reference: the joint law of a path is needed, i.e. Gaussian data")

    def _planted_exactly(self, case: Case, tag: str) -> Iterator[Verdict]:
        squared = LinearChain(case.problem, case.policy, case.grid).mean_departure
        for what, weight, invisible in wrong_rates(case):
            if invisible:
                yield self.skipped(case, f"{tag}{what}: invisible, {invisible}")
            else:
                yield self.planted(case, weight @ squared, case.truth.path_kl, 1e-9, f"{tag}{what}")
        yield self.planted(case, reverse_kl(case), case.truth.path_kl, 1e-9, f"{tag}reverse KL, i.e. expectation over P_pre states")
        short = case.over(JOINT_STEPS)
        yield self.planted(case, mismatched_eta_kl(short, 1.1), short.truth.path_kl, 1e-9, f"{tag}eta of the policy unlike eta of the reference")
        rate = exact.limit.marginal_kl_rate(case.problem, case.policy, 0.5 * case.problem.horizon)
        fisher = marginal_fisher(case, 0.5 * case.problem.horizon)
        yield self.planted(case, rate.formula + fisher, rate.derivative, 1e-8, f"{tag}marginal KL rate without its Fisher term")

    def _limit(self, case: Case, tag: str) -> Iterator[Verdict]:
        def path_kl(steps: int) -> float:
            return exact.evaluate(case.problem, case.policy, case.problem.grid(steps)).path_kl

        if case.planar or not case.solvable:
            yield self.skipped(case, f"{tag}limit: no exact chain of many steps for mixtures in {case.problem.dim} dimensions")
            return
        target = exact.limit.evaluate(case.problem, case.policy).path_kl if case.linear else None
        to = "continuous path KL" if case.linear else "itself, N against 2N (no continuous solver for mixtures)"
        yield self.limit(case, *convergence(case, path_kl, target), 1.0, f"{tag}path KL of the chain -> {to}")

    def figure(self, case: Case) -> Figure:
        """Left: exact against sampled path KL over N; middle: wrong KLs over N; right: order towards the limit."""
        with style.panels(3, "path_kl: KL(P_θ || P_pre) = E ∫ κ |μ − s|² dt") as (figure, (left, middle, right)):
            steps = np.array([10, 20, 40, 80, 160])
            self._draw_sampled(left, case, steps)
            self._draw_wrong(middle, case, steps)
            for j, eta in enumerate((0.5, 1.0, 1.5)):
                at = case.at(eta)
                curve = [exact.evaluate(at.problem, at.policy, at.problem.grid(int(n))).path_kl for n in 4 * steps]
                limit = exact.limit.evaluate(at.problem, at.policy).path_kl
                style.order_line(right, case.problem.horizon / (4 * steps), np.abs(np.array(curve) - limit), f"η = {eta:g}", j)
            style.log_ticks(right, case.problem.horizon / (4 * steps), [f"1/{4 * n}" for n in steps])
            right.set(title="Limit: chain to continuous time", xlabel="step length D (horizon units)", ylabel="|path KL − limit| (nats)")
            right.legend()
            return figure

    def _draw_sampled(self, ax: style.Axes, case: Case, steps: Array) -> None:
        for j, eta in enumerate((0.5, 1.0, 1.5)):
            at = case.at(eta)
            cases = [at.over(int(n)) for n in steps]
            ax.plot(steps, [c.truth.path_kl for c in cases], color=style.COLOURS[j], linestyle=style.LINES[j], label=f"path KL, η = {eta:g}")
            sampled = [self._ratios(c, 20_000)[0] for c in cases]
            ax.errorbar(steps, [s.mean() for s in sampled], [1.96 * s.std() / np.sqrt(len(s)) for s in sampled], fmt=style.MARKERS[j],
                        color=style.COLOURS[j], capsize=2)
        terminal = [case.over(int(n)).truth.terminal_kl for n in steps]
        ax.plot(steps, terminal, color=style.GREY, linestyle=":", label="terminal KL, η = 1")
        ax.set(xscale="log", ylim=(0, None), xlabel="steps N", ylabel="KL (nats)", title="Exact (lines), mean log-ratio ± 95 % (points)")
        style.log_ticks(ax, steps, [str(n) for n in steps])
        ax.legend(loc="lower center", ncols=2, fontsize=7)

    def _draw_wrong(self, ax: style.Axes, case: Case, steps: Array) -> None:
        at = case.at(0.5)
        cases = [at.over(int(n)) for n in steps]
        squared = [LinearChain(c.problem, c.policy, c.grid).mean_departure for c in cases]
        ax.plot(steps, [c.truth.path_kl for c in cases], color="black", linewidth=2.5, label="path KL")
        for j, (what, _, _) in enumerate(wrong_rates(at)[:6]):
            wrong = [wrong_rates(c)[j][1] @ s for c, s in zip(cases, squared, strict=True)]
            ax.plot(steps, wrong, color=style.COLOURS[j], linestyle=style.LINES[j], marker=style.MARKERS[j], label=what)
        ax.set(xscale="log", yscale="log", xlabel="steps N", ylabel="claimed KL (nats)", title="Planted errors at η = 0.5")
        style.log_ticks(ax, steps, [str(n) for n in steps])
        ax.set_ylim(top=ax.get_ylim()[1] * 60)
        ax.legend(fontsize=7, ncols=2, loc="upper left")


def dense_path_kl(case: Case) -> float:
    r"""E_theta sum_i int p(y | x) log[ p(y | x) / p_pre(y | x) ] dy in 1-D, densities on lattices as wide as the chain (no kappa).

    Source: theory.md, section 4.   Checked: tests/test_theorem_path_kl.py::test_dense_lattice_needs_no_kappa
    """
    problem, grid, c = case.problem, case.grid, case.problem.coefficients(case.grid)
    pre = problem.pretrained(grid)
    low, dx, n = lattices(case, case.policy)
    density, total = np.exp(problem.start_law.log_density(y := low[0] + dx[0] * np.arange(n)[:, None])), 0.0
    for i in range(grid.steps):
        x, y = y, low[i + 1] + dx[i + 1] * np.arange(n)[:, None]
        mean, other = (x + c.dt[i] * (-c.f[i] * x + c.h[i] * p.mean(grid, i, x)) for p in (case.policy, pre))
        z, far = (y - mean.T) / c.noise[i], (y - other.T) / c.noise[i]  # [to, from]
        W = np.exp(-0.5 * z**2) * dx[i] / (c.noise[i] * np.sqrt(2 * np.pi))
        total += dx[i + 1] * float(np.sum((W * (0.5 * (far**2 - z**2))) @ density))
        density = W @ density
    return total


def lattices(case: Case, policy: Policy) -> tuple[Array, Array, int]:
    """Ends (N + 1,), spacings (N + 1,) and number of nodes of lattices as wide as the chain's own, fine enough for every step's noise."""
    laws = quadrature.marginals(case.problem, policy, case.grid)
    low, high = (np.array([law.points[end] for law in laws if law.points is not None]) for end in (0, -1))
    span, noise = high - low, case.problem.coefficients(case.grid).noise
    n = max(FEWEST, 1 + int(np.ceil(2 * np.max(np.maximum(span[1:], span[:-1]) / noise))))
    if n > MOST:
        raise ValueError(f"grid: expected steps whose noise {MOST} points resolve, got a need of {n}")
    return low, span / (n - 1), n


def reverse_kl(case: Case) -> float:
    """E_pre sum kappa D |mu - s|^2: the same integrand over the states of the pre-trained chain."""
    c = case.problem.coefficients(case.grid)
    dK, dk = LinearChain(case.problem, case.policy, case.grid).departure
    m, P = LinearChain(case.problem, case.problem.pretrained(case.grid), case.grid).moments
    squared = np.einsum("kij,kjl,kil->k", dK, P[:-1], dK) + np.sum((np.einsum("kij,kj->ki", dK, m[:-1]) + dk) ** 2, axis=1)
    return float((c.kappa * c.dt) @ squared)


def mismatched_eta_kl(case: Case, factor: float) -> float:
    """KL when the reference chain runs with eta' = factor * eta: variances differ at every step, so it grows like N."""
    other = case.at(case.problem.eta * factor)
    here = JointLaw.of(LinearChain(case.problem, case.policy, case.grid))
    reference = LinearChain(other.problem, other.problem.pretrained(other.grid), other.grid)
    return here.kl(JointLaw.of(reference))


def marginal_fisher(case: Case, t: float) -> float:
    """1/2 eta^2 g^2 E_p |grad log(p / p_pre)|^2 at generation time t, from chains of 400 steps up to t."""
    grid = TimeGrid(np.linspace(0.0, t, 401))
    (m, P), (n, R) = (tuple(v[-1] for v in LinearChain(case.problem, policy, grid).moments)
                      for policy in (case.policy, case.problem.pretrained(grid)))
    A, at_mean = np.linalg.inv(R) - np.linalg.inv(P), np.linalg.solve(R, m - n)
    g2 = case.problem.schedule.rates(t, case.problem.eta)[1]
    return 0.5 * case.problem.eta**2 * g2 * float(np.trace(A @ P @ A) + at_mean @ at_mean)
