r"""Theorem `policy_gradient`: one gradient, many estimators (theory.md, section 7).

    grad J = E int (d mu)' [ h grad V - 2 lambda kappa (mu - s) ] dt = E int E_{a ~ pi}[ grad log pi(a | t, X) q(t, X, a) ] dt

On the chain every estimator of `ctrl.estimators` has this mean exactly. Sign patterns in the place of noise show it to
rounding; wrong formulas that people really write are shown to miss it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ctrl import exact
from ctrl.check import Array
from ctrl.estimators import (K1, K3, ActionNoise, Analytic, Estimator, FiniteDifference, KLForm, LeaveOneOut, Pathwise, RewardToGo, Run,
                             ScoreFunction, TemporalDifference, ValueFunction, ValueGradient, runs)
from ctrl.evidence import MeanTest, mean_test
from ctrl.noise import Noise
from ctrl.theorems import style
from ctrl.theorems.verdict import Case, Theorem, Verdict, convergence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNBIASED = 1e-10
PATTERN_VARIABLES = 14


@dataclass(frozen=True, eq=False)
class Spline:
    """A 1-D value function tabulated on a lattice, for Monte Carlo use: spline error far below sampling noise."""

    splines: Sequence

    @classmethod
    def of(cls, value: exact.Value, low: Array, high: Array) -> Spline:
        """On [low_i, high_i] at step i; low, high (N + 1,)."""
        from scipy.interpolate import CubicSpline

        lattices = [np.linspace(a, b, 401) for a, b in zip(low, high, strict=True)]
        return cls([CubicSpline(x, value(i, x[:, None])) for i, x in enumerate(lattices)])

    def __call__(self, i: int, x: Array) -> Array:
        return self.splines[i](x[:, 0])

    def gradient(self, i: int, x: Array) -> Array:
        return self.splines[i](x[:, 0], 1)[:, None]


def estimators(value: ValueFunction | None) -> list[tuple[str, Estimator]]:
    """The unbiased estimators for mean actions; those that need a value only when there is one."""
    free: list[tuple[str, Estimator]] = [
        ("score function", ScoreFunction()), ("score function, k1 in the return", ScoreFunction(sampled_kl=True)),
        ("reward-to-go", RewardToGo()), ("reward-to-go, k1 in the return", RewardToGo(sampled_kl=True)),
        ("reward-to-go, leave-one-out baseline", RewardToGo(baseline=LeaveOneOut())), ("pathwise", Pathwise())]
    if value is None:
        return free
    return [*free, ("reward-to-go, baseline V", RewardToGo(baseline=value)), ("temporal difference", TemporalDifference(value)),
            ("value gradient", ValueGradient(value))]


@dataclass(frozen=True, eq=False)
class Distorted(RewardToGo):
    """Reward-to-go with another array (n, N, d) in the place of c_i xi_i."""

    noise_factor: Callable[[Run], Array] = lambda run: run.score_noise

    def cotangents(self, run: Run) -> Array:
        return self.returns(run)[:, :, None] * self.noise_factor(run) + run.kl_term


def without_root_dt(run: Run) -> Array:
    return run.score_noise / np.sqrt(run.coefficients.dt)[:, None]


def next_noise(run: Run) -> Array:
    c = run.coefficients
    return (c.h * c.dt / c.noise)[:, None] * np.concatenate([run.xi[:, 1:], np.zeros_like(run.xi[:, :1])], axis=1)


def g_for_h_over_eta_g(run: Run) -> Array:
    return np.sqrt(run.coefficients.g2 * run.coefficients.dt)[:, None] * run.xi


@dataclass(frozen=True, eq=False)
class PeekingBaseline(RewardToGo):
    """A baseline that looks at X_{i+1}: here r(X_{i+1}); it depends on xi_i and takes gradient away."""

    def cotangents(self, run: Run) -> Array:
        ahead = np.stack([run.problem.reward.value(run.states[:, i + 1]) for i in range(run.grid.steps)], axis=1)
        return (self.returns(run) - ahead)[:, :, None] * run.score_noise + run.kl_term


@dataclass(frozen=True, eq=False)
class OwnMeanOfTwo(ScoreFunction):
    """Batches of two paths whose baseline is the mean with the path itself in it: factor 1 - 1/2 on the score part."""

    def cotangents(self, run: Run) -> Array:
        returns = self.returns(run)
        pairs = returns.reshape(-1, 2, returns.shape[1])
        return (pairs - pairs.mean(axis=1, keepdims=True)).reshape(returns.shape)[:, :, None] * run.score_noise + run.kl_term


@dataclass(frozen=True, eq=False)
class LaterSteps(RewardToGo):
    """A deterministic prefix: only the second half of the steps contributes."""

    def cotangents(self, run: Run) -> Array:
        u = super().cotangents(run)
        u[:, : run.grid.steps // 2] = 0
        return u


@dataclass(frozen=True, eq=False)
class LateActionReturn(ActionNoise):
    """Action noise with G_{i+1}, which leaves out the cost of the very action."""

    def returns(self, run: Run) -> Array:
        return run.reward[:, None] - (np.cumsum(run.cost[:, ::-1], axis=1)[:, ::-1] - run.cost)


def planted_errors(case: Case) -> list[tuple[str, Estimator, str]]:
    """(what, wrong estimator, why it is invisible here or "")."""
    at_one = "eta = 1: h/g is g" if case.problem.eta == 1 else ""
    off_by_one = "" if case.linear and pattern_steps(case) > 1 else "one step late is an error O(D), below a sampled run's resolution"
    no_kl = "lambda = 0" if case.problem.kl_weight == 0 else ""
    return [
        ("(A) cost in the return, no e_i", KLForm(Analytic(), None), no_kl),
        ("(B) e_i, cost not in the return", KLForm(None, Analytic()), no_kl),
        ("(C) no KL gradient at all", KLForm(None, None), no_kl),
        ("k1 as a loss", KLForm(None, K1()), no_kl),
        ("sqrt(D) missing from sigma", Distorted(noise_factor=without_root_dt), ""),
        ("xi of step i + 1", Distorted(noise_factor=next_noise), off_by_one),
        ("g for h/(eta g)", Distorted(noise_factor=g_for_h_over_eta_g), at_one),
        ("mean over dimensions", Distorted(noise_factor=lambda run: run.score_noise / run.problem.dim), "d = 1" if case.problem.dim == 1 else ""),
        ("mean over steps", Distorted(noise_factor=lambda run: run.score_noise / run.grid.steps), "N = 1" if case.steps == 1 else ""),
        ("baseline that looks at X_{i+1}", PeekingBaseline(), ""),
        ("deterministic prefix of steps", LaterSteps(), "N = 1" if case.steps == 1 else ""),
        ("truncated adjoint sold as the full one", Pathwise(last=1), "N = 1" if case.steps == 1 else ""),
    ]


def pattern_steps(case: Case) -> int:
    """The longest chain whose sign patterns are affordable, at least one step."""
    return max(1, (PATTERN_VARIABLES - case.problem.dim) // case.problem.dim)


def sample_size(case: Case) -> int:
    """Paths, in whole pairs; fewer where a path has many numbers."""
    return case.paths // (6 if case.problem.dim > 2 else 4) // 2 * 2


class PolicyGradient(Theorem):
    """All estimators have the exact gradient as their mean; wrong ones do not."""

    name = "policy_gradient"
    statement = "∇J = E ∫ (∂μ)' [ h ∇V − 2λκ(μ − s) ] dt: score-function, temporal-difference, value-gradient and pathwise forms agree"
    formulas = (
        r"\nabla_\theta J = \mathbb{E} \int_0^T (\partial_\theta \mu)^\top \left[\, h\, \nabla V - 2 \lambda \kappa\, (\mu - s) \,\right] dt",
        r"\nabla_\theta J = \mathbb{E} \int_0^T \mathbb{E}_{a \sim \pi} \left[\, \nabla_\theta \log \pi(a \mid t, X_t)\, q(t, X_t, a) \,\right] dt",
        r"\mathbb{E}[ \nabla V_{i+1}(X_{i+1}) \mid X_i ] = \dfrac{1}{\eta\, g_i \sqrt{D_i}}\, \mathbb{E}[\, V_{i+1}(X_{i+1})\, \xi_i \mid X_i \,]")

    def checks(self, case: Case) -> Iterator[Verdict]:
        if case.idle:
            yield self.skipped(case, "the objective is one constant (kl_weight = 0, constant reward): errors relative to nothing")
            return
        case = case.brief
        for eta in case.etas:
            at, tag = case.at(eta), "" if eta == 1 else f"eta = {eta:g}: "
            yield from self._exact_twin(at, tag)
            yield from self._monte_carlo_twin(at, tag)
            if eta == 1 or case.linear or not case.quick:
                yield from self._limit(at, tag)

    def _exact_twin(self, case: Case, tag: str) -> Iterator[Verdict]:
        if case.linear:
            yield from self._by_sign_patterns(case, tag)
        elif case.problem.dim == 1:
            short = case.over(20)
            measured, expected = differentiated(short), short.truth.gradient.theta
            yield self.exact(case, measured, expected, 1e-8, f"{tag}gradient by Stein's lemma = Richardson difference of J")
        else:
            yield self.skipped(case, f"{tag}exact twin: J of mixtures in {case.problem.dim} dimensions is not exact enough to take differences of")

    def _by_sign_patterns(self, case: Case, tag: str) -> Iterator[Verdict]:
        """Every estimator, and every planted error, on all sign patterns of a short chain: expectations without sampling."""
        short = case.over(pattern_steps(case))
        noise = Noise.signs(short.problem, short.policy, short.grid)
        expected, what = short.truth.gradient.theta, f"{noise.paths} sign patterns, N = {short.steps}"
        for name, estimator in estimators(short.value):
            mean = estimator(short.problem, short.policy, short.grid, noise).mean
            yield self.exact(case, mean / np.linalg.norm(expected), expected / np.linalg.norm(expected), UNBIASED, f"{tag}{name}: {what}")
        yield from self._action_noise(case, tag)
        if short.steps == 1:
            return  # half of the planted errors need a second step: by Monte Carlo then
        for name, estimator, invisible in planted_errors(short):
            if invisible:
                yield self.skipped(case, f"{tag}{name}: invisible, {invisible}")
                continue
            mean = estimator(short.problem, short.policy, short.grid, noise).mean
            yield self.planted(case, mean / np.linalg.norm(expected), expected / np.linalg.norm(expected), UNBIASED, f"{tag}{name}")

    def _action_noise(self, case: Case, tag: str) -> Iterator[Verdict]:
        d = case.problem.dim
        steps = (PATTERN_VARIABLES - d) // (2 * d)
        if steps < 1:
            yield self.skipped(case, f"{tag}action noise by sign patterns: more than 2^{PATTERN_VARIABLES} patterns in d = {d}")
            return
        short = case.over(steps)
        noise = Noise.signs(short.problem, short.exploring, short.grid)
        truth = exact.evaluate(short.problem, short.exploring, short.grid).gradient.theta
        for name, estimator in (("action noise", ActionNoise()), ("action noise, reward-to-go", ActionNoise(reward_to_go=True))):
            mean = estimator(short.problem, short.exploring, short.grid, noise).mean
            yield self.exact(case, mean / np.linalg.norm(truth), truth / np.linalg.norm(truth), UNBIASED, f"{tag}{name}: {noise.paths} sign patterns")
        if case.problem.kl_weight == 0:
            yield self.skipped(case, f"{tag}G_(i+1) with action noise: invisible, lambda = 0")
            return
        wrong = LateActionReturn()(short.problem, short.exploring, short.grid, noise).mean
        yield self.planted(case, wrong / np.linalg.norm(truth), truth / np.linalg.norm(truth), UNBIASED, f"{tag}G_(i+1) with action noise")

    def _monte_carlo_twin(self, case: Case, tag: str) -> Iterator[Verdict]:
        case = case if case.planar else case.over(20)
        paths = sample_size(case)
        noise = case.noise("gradient", paths)
        value = self._value(case, noise)
        right = [(name, e) for name, e in estimators(value) if not _couples_paths(e)]
        by_signs = case.linear and pattern_steps(case) > 1
        wrong = [] if by_signs else [(n, e) for n, e, invisible in planted_errors(case) if not invisible]
        wrong += [("own-mean baseline, batches of two", OwnMeanOfTwo())]
        wrong += [("k3 as a loss", KLForm(None, K3()))] if case.problem.kl_weight > 0 else []
        samples = self._samples(case, noise, [*right, *wrong])
        reference = samples["pathwise"]
        scale = float(np.linalg.norm(reference.mean(axis=0)))
        truth = case.truth.gradient.theta if case.solvable else 0.0

        def paired(name: str) -> MeanTest:
            """An estimator against a right one of its kind on the same paths: right ones differ by mean zero, wrong ones show."""
            return mean_test(samples[name] - samples["pathwise" if name.startswith("truncated") else "score function"], 0.0)

        for name, _ in right:
            if case.solvable:
                test = mean_test(samples[name], truth)
                yield self.monte_carlo(case, test, 0.5 * scale, f"{tag}{name}: mean of {len(reference)} paths = grad J")
            elif name != "pathwise":
                test = mean_test(samples[name] - reference, 0.0)
                yield self.monte_carlo(case, test, 0.5 * scale, f"{tag}{name} and pathwise agree on {len(reference)} shared paths")
            if name != "score function" and name.startswith(("score", "reward")) and "baseline" not in name:
                yield self.monte_carlo(case, paired(name), 0.25 * scale, f"{tag}{name} and the score function agree on shared paths")
        yield self._finite_difference(case, noise[:1000], reference[:1000], tag)
        # What a wrong one is a part of: a right one of another form, as its own right form leaves no noise on the same paths.
        step, end = paired("reward-to-go"), mean_test(samples["score function" if value is None else "value gradient"] - reference, 0.0)
        for name, _ in wrong:
            yield self.planted_sampled(case, paired(name), f"{tag}{name}", right=end if name.startswith("truncated") else step)

    def _finite_difference(self, case: Case, noise: Noise, pathwise: Array, tag: str) -> Verdict:
        """Central differences on the paths of the pathwise gradient: no sampling noise is left, only O(eps^2)."""
        steps = np.array([0.02, 0.01, 0.005, 0.0025])
        samples = [FiniteDifference(float(e))(case.problem, case.policy, case.grid, noise).samples for e in steps]
        # The median over paths: means of errors of either sign can cancel, and a few paths far out dominate squares.
        errors = [float(np.median(np.linalg.norm(s - pathwise, axis=1))) for s in samples]
        return self.limit(case, steps, errors, 2.0, f"{tag}finite difference -> pathwise gradient on the same {len(pathwise)} paths", over="epsilon")

    def _value(self, case: Case, noise: Noise) -> ValueFunction | None:
        """The exact value where there is one; in 1-D tabulated over the states that this noise visits."""
        if not case.solvable:
            return None
        if case.problem.dim > 1:
            return case.value
        visited = [run.states[:, :, 0] for run in runs(case.problem, case.policy, case.grid, noise)]
        low, high = np.min([x.min(axis=0) for x in visited], axis=0), np.max([x.max(axis=0) for x in visited], axis=0)
        return Spline.of(case.value, low - 1e-3, high + 1e-3)

    def _samples(self, case: Case, noise: Noise, chosen: list[tuple[str, Estimator]]) -> dict[str, Array]:
        """Per-path samples of several estimators on the same simulated paths."""
        parts: dict[str, list[Array]] = {name: [] for name, _ in chosen}
        for run in runs(case.problem, case.policy, case.grid, noise):
            for name, estimator in chosen:
                parts[name].append(estimator.samples(run))
        return {name: np.concatenate(batches) for name, batches in parts.items()}

    def _limit(self, case: Case, tag: str) -> Iterator[Verdict]:
        def gradient(steps: int) -> Array:
            return exact.evaluate(case.problem, case.policy, case.problem.grid(steps)).gradient.theta

        if case.planar or not case.solvable:
            yield self.skipped(case, f"{tag}limit: no exact chain of many steps for mixtures in {case.problem.dim} dimensions")
            return
        target = exact.limit.evaluate(case.problem, case.policy).gradient.theta if case.linear else None
        to = "continuous grad J" if case.linear else "itself, N against 2N (no continuous solver for mixtures)"
        yield self.limit(case, *convergence(case, gradient, target), 1.0, f"{tag}grad J of the chain -> {to}")

    def figure(self, case: Case) -> Figure:
        """Left: estimators against the exact gradient; middle: bias of the planted errors; right: order towards the limit."""
        with style.panels(3, "policy_gradient: one gradient, many estimators", width=4.6, height=3.8) as (figure, (left, middle, right)):
            self._draw_estimates(left, case.over(20))
            self._draw_bias(middle, case.at(0.5))
            for j, eta in enumerate((0.5, 1.0, 1.5)):
                at, steps = case.at(eta), np.array([25, 50, 100, 200, 400, 800])
                limit = exact.limit.evaluate(at.problem, at.policy).gradient.theta
                gradients = [exact.evaluate(at.problem, at.policy, at.problem.grid(int(n))).gradient.theta for n in steps]
                errors = [np.linalg.norm(g - limit) for g in gradients]
                style.order_line(right, case.problem.horizon / steps, errors, f"η = {eta:g}", j)
            style.log_ticks(right, case.problem.horizon / steps, [f"1/{n}" for n in steps])
            right.set(title="Limit: chain to continuous time", xlabel="step length D (horizon units)",
                      ylabel="|∇J − limit| (reward / parameter)")
            right.legend()
            return figure

    def _draw_estimates(self, ax: style.Axes, case: Case) -> None:
        chosen = [(n, e) for n, e in estimators(case.value) if not _couples_paths(e)]
        samples = self._samples(case, case.noise("figure", 20_000), chosen)
        truth = case.truth.gradient.theta[0]
        for row, (name, _) in enumerate(chosen):
            x = samples[name][:, 0]
            ax.errorbar(x.mean(), row, xerr=1.96 * x.std() / np.sqrt(len(x)), fmt="o", color=style.BLUE, capsize=3)
        ax.axvline(truth, color="black", linewidth=1, label=f"exact {truth:.4f}")
        ax.set_yticks(range(len(chosen)), [name for name, _ in chosen])
        ax.set(xlabel="∂J/∂θ₀ (reward units), mean of 20,000 paths ± 95 %", title=f"Monte Carlo against exact, N = {case.steps}")
        ax.invert_yaxis()
        ax.legend(loc="lower right")

    def _draw_bias(self, ax: style.Axes, case: Case) -> None:
        short = case.over(pattern_steps(case))
        noise, truth = Noise.signs(short.problem, short.policy, short.grid), short.truth.gradient.theta

        def relative(estimator: Estimator) -> float:
            mean = estimator(short.problem, short.policy, short.grid, noise).mean
            return max(float(np.linalg.norm(mean - truth) / np.linalg.norm(truth)), 1e-17)

        right = [(name, relative(e), style.BLUE) for name, e in estimators(short.value)]
        wrong = [(name, relative(e), style.RED) for name, e, invisible in planted_errors(short) if not invisible]
        names, bias, colours = zip(*right, *wrong, strict=True)
        ax.barh(range(len(names)), bias, color=colours, left=0)
        for row, hatch in enumerate(["" for _ in right] + ["///" for _ in wrong]):
            ax.patches[row].set_hatch(hatch)
        ax.axvline(UNBIASED, color="black", linestyle="--", linewidth=1)
        ax.set_yticks(range(len(names)), names, fontsize=7)
        ax.set(xscale="log", xlim=(1e-17, 30), xlabel="|bias| / |∇J| (exact, all sign patterns); dashed: tolerance",
               title=f"Right (plain) and planted (hatched), η = {case.problem.eta:g}")
        ax.invert_yaxis()


def _couples_paths(estimator: Estimator) -> bool:
    return isinstance(estimator, ScoreFunction) and isinstance(estimator.baseline, LeaveOneOut)


def differentiated(case: Case, step: float = 2e-2) -> Array:
    """dJ/dtheta by `richardson` differences of the exact objective, coordinate by coordinate, (p,).

    Source: theory.md, section 7.   Checked: tests/test_theorem_policy_gradient.py::test_all_verdicts_hold
    """
    theta = case.policy.theta

    def along(unit: Array) -> Callable[[float], float]:
        return lambda h: exact.evaluate(case.problem, case.policy.with_theta(theta + h * unit), case.grid).objective

    return np.array([richardson(along(unit), step) for unit in np.eye(theta.size)])


def richardson(function: Callable[[float], float], step: float = 2e-2) -> float:
    r"""f'(0) by central differences, extrapolated twice: error O(step^6).

        D(h) = ( f(h) - f(-h) ) / 2h,     ( 64 D(h/4) - 20 D(h/2) + D(h) ) / 45

    Source: standard.   Checked: tests/test_theorem_policy_gradient.py::test_richardson_difference_is_the_exact_gradient
    """
    def central(h: float) -> float:
        return (function(h) - function(-h)) / (2 * h)

    return (64 * central(step / 4) - 20 * central(step / 2) + central(step)) / 45
