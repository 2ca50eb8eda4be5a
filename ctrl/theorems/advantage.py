r"""The advantage rate q: what an action is worth per unit of time (theory.md, section 6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ctrl import exact
from ctrl.check import Array
from ctrl.estimators import runs
from ctrl.evidence import mean_test
from ctrl.policy import Policy
from ctrl.theorems import style
from ctrl.theorems.value import Branches, Solved, at_eta, branches, decay, entropy_bonus, random_states, rule, solved, some_steps, tolerance
from ctrl.theorems.verdict import Case, Theorem, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REACH = 2.0  # distance of tried actions from the policy's mean, score units
NUDGE = 0.5  # V is known in the chain's tails and little farther


@dataclass(frozen=True, eq=False)
class LastStep(exact.Value):
    """V_N = r, known on every problem; nothing before it."""

    case: Case

    def __call__(self, i: int, x: Array) -> Array:
        return self.case.problem.reward.value(x)

    def gradient(self, i: int, x: Array) -> Array:
        return self.case.problem.reward.gradient(x)

    def action_value(self, i: int, x: Array, a: Array) -> Array:
        b = branches(self.case, self.case.policy, i, x, a)
        return decay(self.case, i) * b.mean(b.next(self, i + 1)) - b.mean(b.cost)


@dataclass(frozen=True, eq=False)
class Actions:
    """Actions of a sampled policy at states x (n, d): mu, s (n, d); nodes a (m, n, d) with weights (m,); grad_mu log pi (m, n, d)."""

    mu: Array
    s: Array
    a: Array
    weights: Array
    log_slope: Array

    def mean(self, values: Array) -> Array:
        """Expectation over a ~ pi of values (m, n) or (m, n, d)."""
        return np.tensordot(self.weights, values, axes=1)

    def of(self, function: exact.Advantage, i: int, x: Array) -> Array:
        """function(i, x, a) at every node, (m, n)."""
        return np.stack([function(i, x, a) for a in self.a])


def actions(case: Case, policy: Policy, i: int, x: Array) -> Actions:
    """Quadrature nodes of a ~ N(mu, Sigma)."""
    factor, mu = policy.exploration_factor(case.grid), policy.mean(case.grid, i, x)
    assert factor is not None
    z, weights = rule(case, x.shape[1], dense=False)  # q is a polynomial in a
    shift, slope = z @ factor[i].T, z @ np.linalg.inv(factor[i])
    a = mu + shift[:, None, :]
    return Actions(mu, case.problem.score(float(case.grid.times[i]), x), a, weights, np.broadcast_to(slope[:, None, :], a.shape))


def rate(at: Solved) -> exact.Advantage:
    """q of a solved policy, by the value that it has."""
    return exact.Advantage(at.case.problem, at.policy, at.case.grid, at.value)


def tried(case: Case, policy: Policy, i: int, x: Array) -> Array:
    """Actions at distance REACH from the mean, one direction a state, (n, d); in the plane no farther than moves X by NUDGE of a step's noise."""
    z, c = case.noise(f"actions {i}", len(x)).actions(1, x.shape[1])[:, 0], case.problem.coefficients(case.grid)
    far = min(REACH, NUDGE * c.noise[i] / (c.h[i] * c.dt[i])) if case.planar else REACH
    return policy.mean(case.grid, i, x) + far * z / np.linalg.norm(z, axis=1, keepdims=True)


def rate_errors(case: Case, policy: Policy, gain: str = "h") -> tuple[Array, Array, Array, Array]:
    r"""Steps D (4,); |(Q_i - V_i)/D + gamma H - q|; the spread over actions of Q and of q, at T/2 and fixed states and actions.

    gain "g2" plants g^2 in the place of h.  V_i of an entropy-regularised policy holds gamma D H, which Q_i does not.
    """
    middle = case.over(2 * (case.steps // 2))
    x = random_states(middle, middle.steps // 2)
    a, other = tried(middle, policy, middle.steps // 2, x), policy.mean(middle.grid, middle.steps // 2, x)
    dt, error, spread_Q, spread_q = [], [], [], []
    for steps in (40, 80, 160, 320) if case.linear else (20, 40, 80, 160):
        at, i = case.over(steps), steps // 2
        q = exact.advantage(at.problem, policy, at.grid)
        h, g2 = (at.problem.coefficients(at.grid).h[i], at.problem.coefficients(at.grid).g2[i])
        wrong = (g2 - h) * np.sum((a - other) * q.value.gradient(i, x), axis=1) if gain == "g2" else 0.0
        Q = q.value.action_value(i, x, a)
        rate = (Q - q.value(i, x) + entropy_bonus(at, policy)[i]) / at.grid.dt[i]
        dt.append(at.grid.dt[i])
        error.append(np.linalg.norm(rate - q(i, x, a) - wrong))
        spread_Q.append(np.linalg.norm(Q - q.value.action_value(i, x, other)))
        spread_q.append(np.linalg.norm(q(i, x, a) - q(i, x, other)))
    return np.array(dt), np.array(error), np.array(spread_Q), np.array(spread_q)


class AdvantageRate(Theorem):
    r"""The advantage of an action over the policy is D q(t, x, a) + O(D^2), centred under the policy.

    Source: theory.md, sections 6 and 16.   Checked: tests/test_theorem_advantage.py::test_every_verdict_holds
    """

    name = "advantage"
    statement = ("The advantage rate is known once ∇V is: q(t, x, a) = lim (Q_D - V)/D = h (a - μ)·∇V "
                 "- λ κ (|a - s|² - |μ - s|² - tr Σ), and E_{a~π} q = 0; on the sampled chain E_π[Q_i - V_i] = 0 exactly.")
    formulas = (
        r"q(t, x, a) = \lim_{D \to 0} \dfrac{Q_D(t, x, a) - V(t, x)}{D} = h\, (a - \mu) \cdot \nabla V"
        r" - \lambda \kappa \left( |a - s|^2 - |\mu - s|^2 - \mathrm{tr}\, \Sigma \right)",
        r"\mathbb{E}_{a \sim \pi}\, q(t, x, a) = 0,\qquad \mathbb{E}_\pi [\, Q_i - V_i \,] = 0")

    def checks(self, case: Case) -> Iterator[Verdict]:
        for eta in case.etas:
            at = solved(case.at(eta))[-1]
            yield from self._stein(at)
            if case.solvable:
                yield from self._centred(at)
                yield from self._planted(at)
                yield from self._sampled(at)
                if eta == 1 or case.linear or not case.quick:
                    yield from self._limits(at)
        if case.planar:
            yield from self._in_the_plane(case.brief.at(0.5) if case.quick else case.brief)
        elif not case.solvable:
            yield self.skipped(case, "q before the last step needs grad V, which has no exact truth here")

    def _in_the_plane(self, case: Case) -> Iterator[Verdict]:
        """On a brief chain; each truth costs: in a quick run at eta = 1/2 alone, where everything about h shows."""
        if not case.solvable:
            yield self.skipped(case, "q before the last step needs grad V, which has no exact truth here")
            return
        for eta in (case.problem.eta,) if case.quick else case.etas:
            at = solved(case.at(eta))[-1]
            yield from self._centred(at)
            yield from self._planted(at)
            yield from self._sampled(at)
        yield self.skipped(case, "limits, and the q form of the chain before the last step: many steps, or a rule in four variables, in the plane")

    def _value(self, at: Solved) -> exact.Value:
        return at.value if at.case.solvable else LastStep(at.case)

    def _steps(self, case: Case) -> tuple[int, ...]:
        return some_steps(case) if case.solvable else (case.grid.steps - 1,)

    def _stein(self, at: Solved) -> Iterator[Verdict]:
        r"""E_pi[grad log pi Q_i] / D = h e^{-rho D} E grad V_{i+1} - 2 lambda kappa (mu - s): the chain's own q form, at every step size."""
        case, value, where = at.case, self._value(at), at_eta(at.case)
        left, right, planted, batch = [], [], [], []
        c = case.problem.coefficients(case.grid)
        for i in self._steps(case):
            x = random_states(case, i)
            pi, b = actions(case, at.policy, i, x), branches(case, at.policy, i, x)
            Q = np.stack([value.action_value(i, x, a) for a in pi.a])
            left.append(pi.mean(pi.log_slope * Q[:, :, None]) / case.grid.dt[i])
            # two independent actions a batch: Q_k - (Q_k + Q_l)/2, every pair of nodes
            centred = 0.5 * (Q - pi.mean(Q))
            batch.append(pi.mean(pi.log_slope * centred[:, :, None]) / case.grid.dt[i])
            slope = decay(case, i) * b.mean(value_slopes(value, i + 1, b))
            cost = 2 * case.problem.kl_weight * c.kappa[i] * (pi.mu - pi.s)
            right.append(c.h[i] * slope - cost)
            planted.append(c.g2[i] * slope - cost)
        measured, expected = np.concatenate(left), np.concatenate(right)
        what = "at random states" if case.solvable else "at the last step, where V_N = r is known"
        yield self.exact(case, measured, expected, 1e-8, f"{where}E_π[∇log π Q]/D = h E∇V_(i+1) - 2λκ(μ - s) {what}")
        yield self.planted(case, np.concatenate(batch), expected, 1e-8,
                           f"{where}Q centred by the mean of a batch of 2 that includes it: factor 1 - 1/2")
        if case.problem.eta == 1:
            yield self.skipped(case, "g² for h is no error at eta = 1")
        else:
            yield self.planted(case, np.concatenate(planted), measured, 1e-8, f"{where}g² for h in the q form of the chain")

    def _centred(self, at: Solved) -> Iterator[Verdict]:
        """E_pi q = 0, E_pi[Q_i - V_i] = -gamma D H, and V.action_value against one-step quadrature."""
        case, where, allowed = at.case, at_eta(at.case), tolerance(at.case)
        q, bonus = rate(at), entropy_bonus(case, at.policy)
        rates, gaps, values, direct = [], [], [], []
        for i in some_steps(case):
            x = random_states(case, i)
            pi, a = actions(case, at.policy, i, x), tried(case, at.policy, i, x)
            rates.append(pi.mean(pi.of(q, i, x)))
            Q = np.stack([at.value.action_value(i, x, action) for action in pi.a])
            gaps.append(pi.mean(Q) + bonus[i] - at.value(i, x))
            b = branches(case, at.policy, i, x, a)
            values.append(at.value.action_value(i, x, a))
            direct.append(decay(case, i) * b.mean(b.next(at.value, i + 1)) - b.mean(b.cost))
        yield self.exact(case, np.concatenate(rates), 0.0, 1e-9, f"{where}E_π q = 0 at random states")
        extra = " (+ γ D H)" if case.problem.entropy_weight > 0 else ""
        if not case.planar:  # nodes of both actions and noise would be needed
            yield self.exact(case, np.concatenate(gaps), 0.0, allowed, f"{where}E_π[Q_i - V_i]{extra} = 0 of the sampled chain")
        yield self.exact(case, np.concatenate(values), np.concatenate(direct), allowed,
                         f"{where}Q(x, a) against one-step quadrature")

    def _planted(self, at: Solved) -> Iterator[Verdict]:
        """Wrong rates against E_pi q = 0."""
        case, where, i = at.case, at_eta(at.case), at.case.grid.steps // 2
        x = random_states(case, i)
        pi, q = actions(case, at.policy, i, x), rate(at)
        Q = np.stack([at.value.action_value(i, x, a) for a in pi.a])
        yield self.planted(case, pi.mean(Q), 0.0, 1e-9, f"{where}Q for q")
        if (price := case.problem.kl_weight * float(case.problem.coefficients(case.grid).kappa[i])) == 0:
            yield self.skipped(case, f"{where}errors in the cost are invisible at kl_weight = 0")
            return
        spread = float(np.trace(at.policy.exploration_cov(case.grid)[i]))  # type: ignore[index]
        uncentred = pi.of(q, i, x) - price * (np.sum((pi.mu - pi.s) ** 2, axis=1) + spread)
        yield self.planted(case, pi.mean(uncentred), 0.0, 1e-9, f"{where}q not centred: cost |a - s|² alone")
        yield self.planted(case, pi.mean(pi.of(q, i, x)) - 2 * price * spread, 0.0, 1e-9, f"{where}the sign of tr Σ in q")

    def _sampled(self, at: Solved) -> Iterator[Verdict]:
        """q along simulated paths of sampled actions, and Q of one step."""
        case, where, c = at.case, at_eta(at.case), at.case.problem.coefficients(at.case.grid)
        q = rate(at)
        cov, every = at.policy.exploration_cov(case.grid), max(case.grid.steps // 10, 1)
        assert cov is not None
        tested = range(0, case.grid.steps, every)
        sums = []
        for run in runs(case.problem, at.policy, case.grid, case.noise("advantage", 5000 if case.quick else 20_000)):
            a = run.actions
            sums.append(sum(c.dt[i] * q(i, run.states[:, i], a[:, i]) for i in tested))
        seen = 2 * case.problem.kl_weight * sum(c.dt[i] * c.kappa[i] * float(np.trace(cov[i])) for i in tested)
        total = np.concatenate(sums)
        what = f"{where}E sum D q(t, X, a) = 0 along sampled paths, every {every} steps"
        if seen > 0:
            yield self.monte_carlo(case, mean_test(total, 0.0), seen, f"{what}; must see the wrong sign of tr Σ")
            yield self.planted_sampled(case, mean_test(total - seen, 0.0), f"{where}the sign of tr Σ along sampled paths")
        else:
            yield self.monte_carlo(case, mean_test(total, 0.0), 0.3 * float(total.std()), what)
        yield self._one_step(at)

    def _one_step(self, at: Solved) -> Verdict:
        """Q at the state and action, of a few, where it is furthest from V: next states drawn, V_{i+1} averaged."""
        case, i, c = at.case, at.case.grid.steps // 2, at.case.problem.coefficients(at.case.grid)
        x = random_states(case, i)
        a = tried(case, at.policy, i, x)
        furthest = [int(np.argmax(np.abs(at.value.action_value(i, x, a) - at.value(i, x))))]
        x, a = x[furthest], a[furthest]
        xi = case.noise("one step", max(case.paths // 10, 5000)).start(case.problem.dim)
        y = x + c.dt[i] * (-c.f[i] * x + c.h[i] * a) + c.noise[i] * xi
        cost = case.problem.kl_weight * c.kappa[i] * c.dt[i] * float(np.sum((a - case.problem.score(float(case.grid.times[i]), x)) ** 2))
        Q, V = float(at.value.action_value(i, x, a)[0]), float(at.value(i, x)[0])
        return self.monte_carlo(case, mean_test(decay(case, i) * at.value(i + 1, y) - cost, Q), abs(Q - V),
                                f"{at_eta(case)}Q(x, a) by one simulated step; must see V in its place")

    def _limits(self, at: Solved) -> Iterator[Verdict]:
        """(Q - V)/D tends to q at order 1, Q forgets the action, and g^2 for h never gets there."""
        case, where = at.case, at_eta(at.case)
        dt, error, spread_Q, spread_q = rate_errors(case, at.policy)
        yield self.limit(case, dt, error, 1.0, f"{where}(Q_i - V_i)/D - q at fixed t, x, a")
        yield self.limit(case, dt, spread_q, 0.0, f"{where}q keeps its spread over actions")
        collapse = self.limit(case, dt, spread_Q, 0.0, f"{where}Q for q: its spread over actions collapses")
        yield as_planted(collapse)
        if case.linear:
            yield self.exact(case, *self._continuous(at), 1e-4, f"{where}(Q - V)/D extrapolated to D = 0 is q of continuous V")
        if case.problem.eta != 1:
            error = rate_errors(case, at.policy, gain="g2")[1]
            yield as_planted(self.limit(case, dt, error, 1.0, f"{where}g² for h in q"))

    def _continuous(self, at: Solved) -> tuple[Array, Array]:
        """(Q - V)/D by one Richardson step between D = T/640 and T/1280, and q with grad V of continuous time."""
        case, rates = at.case, []
        i = case.grid.steps // 2
        x = random_states(case, i)
        a, t = tried(case, at.policy, i, x), float(case.grid.times[i])
        for steps in (16 * case.steps, 32 * case.steps):
            fine = case.problem.grid(steps)
            value, j = exact.value(case.problem, at.policy, fine), i * steps // case.steps
            bonus = entropy_bonus(case.over(steps), at.policy)[j]
            rates.append((value.action_value(j, x, a) - value(j, x) + bonus) / fine.dt[j])
        _, _, h, kappa = case.problem.schedule.rates(t, case.problem.eta)
        mu, s = at.policy.mean(case.grid, i, x), case.problem.score(t, x)
        cov = at.policy.exploration
        cost = np.sum((a - s) ** 2, axis=1) - np.sum((mu - s) ** 2, axis=1) - (0.0 if cov is None else float(np.trace(cov)))
        slope = exact.limit.value(case.problem, at.policy).gradient(t, x)
        return 2 * rates[1] - rates[0], h * np.sum((a - mu) * slope, axis=1) - case.problem.kl_weight * kappa * cost

    def figure(self, case: Case) -> Figure:
        with style.panels(3, "advantage: (Q − V)/D tends to q, and q is centred under the policy") as (figure, axes):
            _draw_rate(axes[0], case)
            _draw_centred(axes[1], case)
            _draw_orders(axes[2], case)
        return figure


def value_slopes(value: exact.Value, i: int, b: Branches) -> Array:
    """grad V at the branches' next states, (m, n, d)."""
    return value.gradient(i, b.states.reshape(-1, b.states.shape[2])).reshape(b.states.shape)


def as_planted(row: Verdict) -> Verdict:
    """A limit that a wrong formula must miss."""
    return replace(row, check="planted", holds=not row.holds, reason=f"planted: {row.reason}" + (" was NOT caught" if row.holds else ""))


# ---- drawing -------------------------------------------------------------------------------------------------------------


def _ray(case: Case, policy: Policy, i: int, length: Array) -> tuple[Array, Array]:
    """One state and actions mu + length e_1 there, (n, d) each."""
    x = np.tile(random_states(case, i)[:1], (len(length), 1))
    return x, policy.mean(case.grid, i, x) + length[:, None] * np.eye(case.problem.dim)[0]


def _draw_rate(ax: Axes, case: Case) -> None:
    """q along a ray of actions, with (Q - V)/D by simulated steps, at eta = 0.5 where g^2 is not h."""
    at = solved(case.at(0.5))[-1]
    case, i = at.case, at.case.grid.steps // 2
    q, c, line = exact.advantage(case.problem, at.policy, case.grid), case.problem.coefficients(case.grid), np.linspace(-3, 3, 61)
    x, a = _ray(case, at.policy, i, line)
    wrong = (c.g2[i] - c.h[i]) * np.sum((a - at.policy.mean(case.grid, i, x)) * at.value.gradient(i, x), axis=1)
    V = at.value(i, x)
    ax.plot(line, q(i, x, a), color=style.BLUE, label="q (exact)")
    ax.plot(line, (at.value.action_value(i, x, a) - V) / c.dt[i], color=style.SKY, linestyle=":", label=f"(Q − V)/D, N = {case.steps}")
    ax.plot(line, q(i, x, a) + wrong, color=style.RED, linestyle="--", label="planted: g² for h")
    ax.plot(line, at.value.action_value(i, x, a), color=style.ORANGE, linestyle="-.", label="planted: Q for q")
    for k in range(6, 61, 12):
        xi = case.noise(f"figure {k}", 40_000).start(case.problem.dim)
        y = x[:1] + c.dt[i] * (-c.f[i] * x[:1] + c.h[i] * a[[k]]) + c.noise[i] * xi
        gap = a[k] - case.problem.score(float(case.grid.times[i]), x[:1])[0]
        rate = (decay(case, i) * at.value(i + 1, y) - V[0]) / c.dt[i] - case.problem.kl_weight * c.kappa[i] * float(gap @ gap)
        ax.errorbar(line[k], rate.mean(), 1.96 * rate.std() / np.sqrt(len(rate)), fmt="o", color="black", capsize=2,
                    label="one simulated step (95 %)" if k == 6 else None)
    ax.set(xlabel="action − mean, first coordinate (score units)", ylabel="reward units per unit time", title="η = 0.5, t = T/2, one state")
    ax.legend()


def _draw_centred(ax: Axes, case: Case) -> None:
    """The running sum of D q along sampled paths stays at 0; planted versions drift."""
    at = solved(case)[-1]
    q, c, cov = exact.advantage(case.problem, at.policy, case.grid), case.problem.coefficients(case.grid), at.policy.exploration_cov(case.grid)
    assert cov is not None
    run = next(iter(runs(case.problem, at.policy, case.grid, case.noise("figure q", 20_000))))
    a = run.actions
    parts = np.stack([c.dt[i] * q(i, run.states[:, i], a[:, i]) for i in range(case.grid.steps)], axis=1)
    total = np.cumsum(parts, axis=1)
    price = case.problem.kl_weight * c.kappa * c.dt
    spread = np.trace(cov, axis1=1, axis2=2)
    gap = [np.sum((at.policy.mean(case.grid, i, run.states[:, i]) - case.problem.score(float(t), run.states[:, i])) ** 2, axis=1).mean()
           for i, t in enumerate(case.grid.times[:-1])]
    t, show = case.grid.times[1:], slice(3, None, 4)
    mean, bar = total.mean(axis=0), 1.96 * total.std(axis=0) / np.sqrt(len(total))
    ax.axhline(0.0, color=style.BLUE, label="E Σ D q = 0 (exact)")
    ax.errorbar(t[show], mean[show], bar[show], fmt="o", color="black", capsize=2, label="sampled paths (95 %)")
    ax.plot(t, mean - np.cumsum(2 * price * spread), color=style.RED, linestyle="--", label="planted: sign of tr Σ")
    ax.plot(t, mean - np.cumsum(price * (spread + gap)), color=style.ORANGE, linestyle="-.", label="planted: not centred")
    ax.set(xlabel="generation time t (horizon units)", ylabel="E Σ D q (reward units)", title="centred along sampled paths")
    ax.legend(loc="lower left")


def _draw_orders(ax: Axes, case: Case) -> None:
    """(Q - V)/D - q is O(D); Q forgets the action; g^2 for h does not converge."""
    at = solved(case.at(0.5))[-1]
    dt, error, spread_Q, spread_q = rate_errors(at.case, at.policy)
    style.order_line(ax, dt, error, "|(Q − V)/D − q|", 0)
    style.order_line(ax, dt, spread_q, "spread of q over actions", 2)
    style.order_line(ax, dt, spread_Q, "planted Q for q: spread", 1)
    style.order_line(ax, dt, rate_errors(at.case, at.policy, gain="g2")[1], "planted g² for h: error", 3)
    ax.set(xlabel="step D (horizon units)", ylabel="reward units per time (Q: reward)", title="η = 0.5: order 1")
    ax.legend()
