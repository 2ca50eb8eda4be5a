r"""Theorem `kl_estimators`: k1, k2, k3 as values, in the return and as losses (theory.md, section 14).

    k1 = sum u'xi + 1/2 |u|^2 = log dP_theta/dP_pre along P_theta paths,     k2 = k1^2 / 2,     k3 = e^{-k1} - 1 + k1,   nats

E k1 = E k3 = path KL, and k2 is biased. Of the gradients, E[k1 grad log p] = grad KL, which is k1 in the return, or k1^2/2 as a
loss; k1 as a loss has gradient 0; the k2 or k3 of each step, like the analytic KL, as a loss on detached states drops what the
policy does to the law of the states; the k3 of the whole path as a loss descends the reverse KL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ctrl import exact
from ctrl.check import Array
from ctrl.estimators import K1, K3, Analytic, Estimator, KLForm, Pathwise, RewardToGo, Score, ScoreFunction, runs
from ctrl.evidence import MeanTest, fitted_order, mean_test
from ctrl.exact import quadrature
from ctrl.exact.chain import LinearChain
from ctrl.noise import Noise, NoiseLike
from ctrl.policy import BasisPolicy, Policy
from ctrl.reward import LinearReward
from ctrl.rollout import simulate
from ctrl.theorems import style
from ctrl.theorems.path_kl import JointLaw, lattices
from ctrl.theorems.policy_gradient import pattern_steps
from ctrl.theorems.value import at_eta, random_states, rule, some_steps
from ctrl.theorems.verdict import ORDER_TOLERANCE, Case, Theorem, Verdict, order_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEGLIGIBLE, CORNER = 1e-10, 1e-12  # of the largest weight, of states and with actions: nodes left out, where V may not be asked for
MODERATE_KL = 0.2  # nats; likelihood ratios of policies further away have tails too heavy for a test of their mean
NODES = 24  # of the Gauss-Hermite rule along u
LATTICE_STEPS = 8  # where densities are carried on lattices

Slope = Callable[[Array], Array]


# ---- where a chain goes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class States:
    r"""Where a chain goes: quadrature nodes (m, d) and weights (m,) of the law of X_i at steps 0 ... N - 1.

    Gaussian data: exact for quadratic functions. On the line: the chain's density times the trapezoid rule.
    Source: theory.md, section 1.   Checked: tests/test_theorem_kl_estimators.py::test_visits_are_the_law_of_the_chain
    """

    nodes: tuple[Array, ...]
    weights: tuple[Array, ...]

    @classmethod
    def of(cls, case: Case, policy: Policy) -> States:
        nodes, weights = [], []
        for x, p in _laws(case, policy):
            seen = p > NEGLIGIBLE * p.max()
            nodes.append(x[seen])
            weights.append(p[seen])
        return cls(tuple(nodes), tuple(weights))

    def mean(self, function: Callable[[int, Array], Array]) -> Array:
        """E F_i(X_i) for F_i(x) (m, ...), at every step: (N, ...)."""
        return np.stack([np.tensordot(w, function(i, x), axes=1) for i, (w, x) in enumerate(zip(self.weights, self.nodes, strict=True))])

    def acting(self, case: Case, policy: Policy) -> Visits:
        """Together with the actions of a policy, sampled or means."""
        factor, d = policy.exploration_factor(case.grid), case.problem.dim
        if factor is None:
            return Visits(self.nodes, tuple(policy.mean(case.grid, i, x) for i, x in enumerate(self.nodes)), self.weights)
        z, w = rule(case, d)
        if d == 1 and not case.linear:
            z, w = z[::2], w[::2] / w[::2].sum()  # half of the trapezoid rule is enough for what h D moves
        states, actions, weights = [], [], []
        for i, (x, p) in enumerate(zip(self.nodes, self.weights, strict=True)):
            weight = np.outer(p, w).ravel()
            keep = weight > CORNER * weight.max()
            a = policy.mean(case.grid, i, x)[:, None] + z @ factor[i].T
            states.append(np.repeat(x, len(w), axis=0)[keep])
            actions.append(a.reshape(-1, d)[keep])
            weights.append(weight[keep])
        return Visits(tuple(states), tuple(actions), tuple(weights))


def _laws(case: Case, policy: Policy) -> Iterator[tuple[Array, Array]]:
    """Nodes (m, d) and weights (m,) of the law of X_i, i = 0 ... N - 1."""
    if case.linear:
        z, w = rule(case, case.problem.dim)
        for m, P in zip(*(part[:-1] for part in LinearChain(case.problem, policy, case.grid).moments), strict=True):
            yield m + z @ np.linalg.cholesky(P).T, w
        return
    for law in quadrature.marginals(case.problem, policy, case.grid)[:-1]:
        assert law.points is not None and law.density is not None
        yield law.points[:, None], law.density * (law.points[-1] - law.points[0]) / (len(law.points) - 1)


@dataclass(frozen=True, eq=False)
class Visits:
    """States of a chain with actions taken there: (m, d), (m, d) and weights (m,) at steps 0 ... N - 1."""

    states: tuple[Array, ...]
    actions: tuple[Array, ...]
    weights: tuple[Array, ...]

    def mean(self, function: Callable[[int, Array, Array], Array]) -> Array:
        """E F_i(X_i, a_i) for F_i(x, a) (m, ...), at every step: (N, ...)."""
        nodes = zip(self.weights, self.states, self.actions, strict=True)
        return np.stack([np.tensordot(w, function(i, x, a), axes=1) for i, (w, x, a) in enumerate(nodes)])


# ---- the log-ratio of two policies -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LogRatio:
    r"""k1 of a linear chain as a quadratic form of independent standard normals y, from the two joint laws of the path alone.

        k1 = sum_j ( 1/2 lam_j y_j^2 + beta_j y_j ) + c,
        psi(t) = E e^{-t k1} = prod (1 + t lam)^{-1/2} exp( sum 1/2 t^2 beta^2 / (1 + t lam) - t c ),   infinite unless 1 + t lam > 0

    With L, m of one law and L', m' of the other, R = L'^{-1} L, g = L'^{-1}(m - m'): lam, Q the eigenvalues of R'R - I,
    beta = Q'R'g, c = 1/2 |g|^2 - log|det R|. No kappa, no u, no step.
    Source: theory.md, sections 4 and 14.   Checked: tests/test_theorem_kl_estimators.py::test_closed_moments_against_paths
    """

    lam: Array
    beta: Array
    c: float

    @classmethod
    def of(cls, case: Case, policy: Policy, reference: Policy) -> LogRatio:
        return cls.between(*(JointLaw.of(LinearChain(case.problem, p, case.grid)) for p in (policy, reference)))

    @classmethod
    def between(cls, here: JointLaw, other: JointLaw) -> LogRatio:
        """log dP/dP' of two joint laws, under the first."""
        R, g = np.linalg.solve(other.factor, here.factor), np.linalg.solve(other.factor, here.mean - other.mean)
        lam, Q = np.linalg.eigh(R.T @ R - np.eye(len(R)))
        return cls(lam, Q.T @ (R.T @ g), 0.5 * float(g @ g) - float(np.linalg.slogdet(R)[1]))

    def psi(self, t: float) -> float:
        """E e^{-t k1}."""
        scale = 1 + t * self.lam
        if np.any(scale <= 0):
            return np.inf
        return float(np.exp(0.5 * np.sum((t * self.beta) ** 2 / scale - np.log(scale)) - t * self.c))

    def tilted_mean(self, t: float) -> float:
        """E[k1 e^{-t k1}] = -psi'(t)."""
        scale = 1 + t * self.lam
        mean = self.c + 0.5 * float(np.sum(self.lam / scale - (2 * t + t**2 * self.lam) * (self.beta / scale) ** 2))
        return self.psi(t) * mean

    @property
    def cumulants(self) -> Array:
        """Of k1, the first four."""
        lam, b2 = self.lam, self.beta**2
        return np.array([self.c + 0.5 * lam.sum(), np.sum(0.5 * lam**2 + b2), np.sum(lam**3 + 3 * lam * b2), np.sum(3 * lam**4 + 12 * lam**2 * b2)])

    @property
    def means(self) -> Array:
        """E k1, E k2, E k3."""
        mean, var = self.cumulants[:2]
        return np.array([mean, 0.5 * (var + mean**2), self.psi(1) - 1 + mean])

    @property
    def flipped(self) -> float:
        """E[e^{k1} - 1 - k1], k3 with the log-ratio's sign exchanged: chi^2(P_theta || P_pre) - KL."""
        return self.psi(-1) - 1 - float(self.cumulants[0])

    @property
    def variances(self) -> Array:
        """Per path, of k1, k2, k3; infinite where k3 has none."""
        mean, var, third, fourth = self.cumulants
        square = var + mean**2
        of_k2 = 0.25 * (fourth + 3 * var**2 + 4 * mean * third + 6 * mean**2 * var + mean**4 - square**2)
        tail = self.psi(2)  # where it is infinite, so is the variance of k3
        of_k3 = tail if np.isinf(tail) else tail + 2 * self.tilted_mean(1) + square - (self.psi(1) + mean) ** 2
        return np.array([var, of_k2, of_k3])


@dataclass(frozen=True, eq=False)
class LatticeMoments:
    r"""Moments of k = log dP/dP' and of the score S = grad log dP of whole paths on the line, under the weight e^{-t k}.

        weight = E e^{-tk},  k1 = E[k e^{-tk}],  k2 = E[k^2 e^{-tk}]/2,  score = E[S e^{-tk}] (p,),  product = E[k S e^{-tk}] (p,)

    Carried from step to step by transition densities p and p' on one lattice, e^{-tk} as the kernel p^{1-t} p'^t: no kappa, no u.
    Source: theory.md, section 14.   Checked: tests/test_theorem_kl_estimators.py::test_lattice_against_paths
    """

    weight: float
    k1: float
    k2: float
    score: Array
    product: Array

    @classmethod
    def of(cls, case: Case, policy: Policy, reference: Policy, tilt: float = 0.0) -> LatticeMoments:
        problem, grid, c = case.problem, case.grid, case.problem.coefficients(case.grid)
        low, dx, n = lattices(case, policy)
        f = np.exp(problem.start_law.log_density(y := low[0] + dx[0] * np.arange(n)[:, None]))
        k, kk, S, kS = np.zeros(n), np.zeros(n), np.zeros((n, policy.theta.size)), np.zeros((n, policy.theta.size))
        for i in range(grid.steps):
            x, y = y, low[i + 1] + dx[i + 1] * np.arange(n)[:, None]
            mean, other = (x + c.dt[i] * (-c.f[i] * x + c.h[i] * p.mean(grid, i, x)) for p in (policy, reference))
            z, far = (y - mean.T) / c.noise[i], (y - other.T) / c.noise[i]  # [to, from]
            log = 0.5 * (far**2 - z**2)
            W = np.exp(-0.5 * z**2 - tilt * log) * dx[i] / (c.noise[i] * np.sqrt(2 * np.pi))
            slope = c.h[i] * c.dt[i] / c.noise[i] * policy.jacobian_theta(grid, i, x)[:, 0]  # of the mean, in deviations
            WL, Wz, push = W * log, W * z, f[:, None] * slope
            kS = W @ kS + WL @ S + Wz @ (k[:, None] * slope) + (WL * z) @ push
            S = W @ S + Wz @ push
            f, k, kk = W @ f, W @ k + WL @ f, W @ kk + 2 * WL @ k + (WL * log) @ f
        last = dx[-1]
        return cls(float(last * f.sum()), float(last * k.sum()), float(0.5 * last * kk.sum()), last * S.sum(axis=0), last * kS.sum(axis=0))


# ---- the log-ratio alone ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bare:
    """The log-ratio alone: reward 0 and lambda 1, so that J = -path KL; a policy within MODERATE_KL nats of the pre-trained one."""

    case: Case
    policy: BasisPolicy

    @classmethod
    def of(cls, case: Case, nats: float = MODERATE_KL) -> Bare:
        problem = replace(case.problem, reward=LinearReward(np.zeros(case.problem.dim)), kl_weight=1.0, discount=0.0, entropy_weight=0.0)
        case = replace(case, problem=problem)
        if not case.linear:
            case = case.over(case.steps // 2)
        pilot = float(simulate(problem, case.policy, case.grid, case.noise("pilot", 1000)).penalty.mean())
        return cls(case, case.policy).departing(np.sqrt(min(nats / pilot, 1.0)))

    def departing(self, share: float) -> Bare:
        """The policy with so much of the departure: about share^2 of the path KL."""
        origin = self.policy.basis.origin(self.policy.theta)
        return replace(self, policy=self.policy.with_theta(origin + share * (self.policy.theta - origin)))

    def on(self, steps: int) -> Bare:
        return Bare(self.case.over(steps), self.policy)

    @property
    def solvable(self) -> bool:
        """The law of the states is known: Gaussian data, or the line."""
        return self.case.linear or self.case.problem.dim == 1

    @cached_property
    def pre(self) -> Policy:
        return self.case.problem.pretrained(self.case.grid)

    @cached_property
    def truth(self) -> exact.Truth:
        return exact.evaluate(self.case.problem, self.policy, self.case.grid)

    @property
    def kl(self) -> float:
        return self.truth.path_kl

    @property
    def slope(self) -> Array:
        """grad KL, (p,)."""
        return -self.truth.gradient.theta

    @property
    def goal(self) -> str:
        """What estimates of the path KL are held against: its exact value, or where there is none the analytic KL of the same paths."""
        return "path KL" if self.solvable else "penalty of the same paths"

    def test(self, samples: Array, penalty: Array) -> MeanTest:
        """Of estimates (n,) of the path KL against `goal`; penalty (n,) of the same paths."""
        return mean_test(samples - (self.kl if self.solvable else penalty), 0.0)

    @cached_property
    def ratio(self) -> LogRatio:
        return LogRatio.of(self.case, self.policy, self.pre)

    @cached_property
    def lattices(self) -> tuple[LatticeMoments, LatticeMoments, LatticeMoments]:
        """Under the weights 1, e^{-k1} (i.e. under P_pre) and e^{k1}."""
        plain, under_pre, up = (LatticeMoments.of(self.case, self.policy, self.pre, t) for t in (0.0, 1.0, -1.0))
        return plain, under_pre, up

    @cached_property
    def states(self) -> States:
        return States.of(self.case, self.policy)

    @cached_property
    def under_pre(self) -> States:
        return States.of(self.case, self.pre)

    @cached_property
    def rate(self) -> Array:
        """E[k1 of step i] = kappa_i D_i E|mu - s|^2, (N,)."""
        return 0.5 * self.states.mean(lambda i, x: np.sum(self.u(i, x) ** 2, axis=1))

    def u(self, i: int, x: Array) -> Array:
        """sqrt(2 kappa D) (mu - s), (m, d)."""
        c, grid = self.case.problem.coefficients(self.case.grid), self.case.grid
        return np.sqrt(2 * c.kappa[i] * c.dt[i]) * (self.policy.mean(grid, i, x) - self.pre.mean(grid, i, x))

    def moved(self, i: int, x: Array, policy: Policy) -> Array:
        """E[X_{i+1} | X_i = x] under a policy, (m, d)."""
        c = self.case.problem.coefficients(self.case.grid)
        return x + c.dt[i] * (-c.f[i] * x + c.h[i] * policy.mean(self.case.grid, i, x))

    def detached(self, slope: Slope) -> Array:
        """E sum_i slope(k1_i) sigma_i: what a loss with slope = loss' descends when applied to each step's k1 on detached states, (p,)."""
        def push(i: int, x: Array) -> Array:
            z, w, k = along_u(u := self.u(i, x))
            return np.tensordot(w * z, slope(k), axes=1)[:, None] * unit(u)  # E[slope(k1) xi | x]

        return self._pulled(push, self.states)

    def explicit(self, states: States) -> Array:
        """E sum_i 2 kappa_i D_i (d mu)'(mu - s): the gradient of the analytic KL of each step at states that are held fixed, (p,)."""
        return self._pulled(self.u, states)

    def _pulled(self, push: Callable[[int, Array], Array], states: States) -> Array:
        """E sum_i (d mu_i)' h_i sqrt(D_i)/(eta g_i) push_i(X_i)."""
        c = self.case.problem.coefficients(self.case.grid)

        def at_step(i: int, x: Array) -> Array:
            out = np.zeros((len(x), self.policy.theta.size))
            self.policy.add_vjp(out, self.case.grid, i, x, c.h[i] * c.dt[i] / c.noise[i] * push(i, x))
            return out

        return states.mean(at_step).sum(axis=0)


def unit(u: Array) -> Array:
    """u/|u|, zero where u is."""
    length = np.linalg.norm(u, axis=1, keepdims=True)
    return np.divide(u, length, out=np.zeros_like(u), where=length > 0)


def along_u(u: Array) -> tuple[Array, Array, Array]:
    """Nodes z (m,), weights (m,) and k1 = |u| z + |u|^2/2 (m, n) of one step: the noise across u does not move its log-ratio."""
    z, w = np.polynomial.hermite_e.hermegauss(NODES)
    length = np.linalg.norm(u, axis=1)
    return z, w / w.sum(), z[:, None] * length + 0.5 * length**2


# ---- the theorem -----------------------------------------------------------------------------------------------------


class KLEstimators(Theorem):
    r"""k1 and k3 estimate the path KL without bias, k1 times the score its gradient; what else is sold as such does not.

    Source: theory.md, sections 14 and 16.   Checked: tests/test_theorem_kl_estimators.py::test_every_verdict_holds
    """

    name = "kl_estimators"
    statement = ("With k1 = Σ u·ξ + ½|u|² = log dP_θ/dP_pre and k3 = e^(-k1) - 1 + k1 along paths of P_θ, E k1 = E k3 = path KL, while "
                 "k2 = k1²/2 is biased; E[k1 ∇log p] = ∇KL, i.e. k1 in the return or k1²/2 as a loss; k1 as a loss has gradient 0; k2, k3 "
                 "or the analytic KL of each step as a loss on detached states drops what θ does to the states.")
    formulas = (
        r"k_1 = \sum_i u_i \cdot \xi_i + \frac{1}{2} |u_i|^2 = \log \frac{dP_\theta}{dP_{pre}},"
        r"\quad k_2 = \frac{1}{2} k_1^2, \quad k_3 = e^{-k_1} - 1 + k_1",
        r"\mathbb{E}\,k_1 = \mathbb{E}\,k_3 = \mathrm{KL}(P_\theta \,\|\, P_{pre}), \qquad \mathbb{E}[k_1 \nabla \log p] = \nabla \mathrm{KL}, "
        r"\qquad \mathbb{E}[\nabla \log p] = 0",
        r"\mathbb{E} \sum_i (1 - e^{-k_{1,i}}) \nabla \log p_i = \mathbb{E} \sum_i 2 \kappa_i D_i (\partial \mu_i)^\top (\mu_i - s_i) "
        r"\neq \nabla \mathrm{KL}")

    def checks(self, case: Case) -> Iterator[Verdict]:
        for eta in case.etas:
            at = Bare.of(case.at(eta))
            yield from self._one_step(at)
            if at.solvable:
                short = at.on(LATTICE_STEPS)
                yield from self._values(at if at.case.linear else short)
                yield from self._gradients(at.on(pattern_steps(at.case)) if at.case.linear else short)
                if eta == 1 or at.case.linear or not case.quick:
                    yield from self._losses(at)
            if eta == 1 or not case.quick:
                if at.solvable:
                    yield from self._limits(at)
                yield from self._sampled_values(at)
                yield from self._sampled_tails(at.departing(0.5))
                yield from self._sampled_steps(at)
                yield from self._sampled_gradients(at.departing(1.5).on(10))  # far enough that the states matter
        yield self.skipped(case, "eta = 0: path KL is infinite, there is nothing to estimate")
        if not at.solvable:
            yield self.skipped(case, "exact twin beyond one step: the law of the states is not known here")

    def _one_step(self, at: Bare) -> Iterator[Verdict]:
        """Means and variances of one step's k1, k2, k3 given the state, k1 as the log-ratio of two transition densities."""
        case, where, c = at.case, at_eta(at.case), at.case.problem.coefficients(at.case.grid)
        k, rate, dt = [], [], []
        for i in some_steps(case):
            x = random_states(case, i)
            u, mean, other = at.u(i, x), at.moved(i, x, at.policy), at.moved(i, x, at.pre)
            z, w, _ = along_u(u)
            y = mean + c.noise[i] * z[:, None, None] * unit(mean - other)
            k.append(np.sum((y - other) ** 2 - (y - mean) ** 2, axis=2) / (2 * c.noise[i] ** 2))
            rate.append(0.5 * np.sum(u**2, axis=1))
            dt.append(np.full(len(x), c.dt[i]))
        k1, half, D = np.concatenate(k, axis=1), np.concatenate(rate), np.concatenate(dt)
        values = np.stack([k1, 0.5 * k1**2, k3(k1)])
        means = np.einsum("m,kmn->kn", w, values)
        spread = np.einsum("m,kmn->kn", w, (values - means[:, None]) ** 2)
        square = 2 * half  # |u|^2
        yield self.exact(case, means[[0, 2]], half, 1e-9, f"{where}E k1 = E k3 = κ D |μ - s|² of one step, from its two transition densities")
        yield self.exact(case, means[1], half + square**2 / 8, 1e-9, f"{where}E k2 of one step = ½|u|² + |u|⁴/8")
        closed = np.stack([square, 0.5 * square**2 + 0.25 * square**3, np.expm1(square) - square])
        yield self.exact(case, spread, closed, 1e-9, f"{where}Var k1, k2, k3 of one step = |u|², ½|u|⁴ + ¼|u|⁶, e^|u|² - 1 - |u|²")
        yield from self._wrong_values(at, half, 1e-9, {
            "k2 of one step sold as unbiased": means[1], "k3 of one step with the sign of the log-ratio exchanged": w @ k3(-k1),
            "k1 of one step without D in the variance": D * means[0], "k1 of one step without D in the sum": means[0] / D,
            "k1 of one step averaged over dimensions": means[0] / case.problem.dim})

    def _wrong_values(self, at: Bare, right: Array | float, allowed: float, wrong: dict[str, Array | float]) -> Iterator[Verdict]:
        for what, value in wrong.items():
            if what.endswith("averaged over dimensions") and at.case.problem.dim == 1:
                yield self.skipped(at.case, f"{at_eta(at.case)}{what}: no error at d = 1")
            else:
                yield self.planted(at.case, value, right, allowed, at_eta(at.case) + what)

    def _values(self, at: Bare) -> Iterator[Verdict]:
        """Whole paths: closed moments of a quadratic form for Gaussian data, transition densities on a lattice on the line."""
        case, where, kl = at.case, at_eta(at.case), at.kl
        if case.linear:
            means, flipped, weight, reverse = at.ratio.means, at.ratio.flipped, at.ratio.psi(1), -at.ratio.tilted_mean(1)
            by, allowed = "the joint Gaussian law of the path", 1e-9
        else:
            plain, under_pre, up = at.lattices
            means, flipped = np.array([plain.k1, plain.k2, under_pre.weight - 1 + plain.k1]), up.weight - 1 - plain.k1
            weight, reverse = under_pre.weight, -under_pre.k1
            by, allowed = f"transition densities on a lattice, N = {case.steps}", 1e-8
        reverse = 1 - weight + reverse  # E_pre[e^{k1} - 1 - k1]
        yield self.exact(case, means[[0, 2]], kl, allowed, f"{where}E k1 = E k3 = path KL, by {by}")
        yield self.exact(case, weight, 1.0, allowed, f"{where}E e^(-k1) = 1, by {by}")
        backwards = float(0.5 * at.under_pre.mean(lambda i, x: np.sum(at.u(i, x) ** 2, axis=1)).sum())
        yield self.exact(case, reverse, backwards, 10 * allowed,
                         f"{where}E_pre[e^k1 - 1 - k1] = KL(P_pre || P_θ): with the sign exchanged and paths of P_pre, the reverse KL")
        yield from self._wrong_values(at, kl, allowed, {
            "k2 sold as unbiased": means[1], "k3 with the sign of the log-ratio exchanged: χ² - KL": flipped,
            "k3 with the sign exchanged, paths of P_pre: the reverse KL": reverse,
            "k1 without D in the variance": at.rate @ case.grid.dt, "k1 without D in the sum": at.rate @ (1 / case.grid.dt),
            "k1 averaged over dimensions": means[0] / case.problem.dim})

    def _gradients(self, at: Bare) -> Iterator[Verdict]:
        """E[k1 S] = grad KL and E S = 0, over all sign patterns or on the lattice."""
        case, where = at.case, at_eta(at.case)
        if case.linear and case.steps == 1:
            yield self.skipped(case, f"{where}E[k1 ∇log p] by sign patterns: too many for two steps in d = {case.problem.dim}")
            return
        if case.linear:
            noise = Noise.signs(case.problem, at.policy, case.grid)
            by = f"{noise.paths} sign patterns, N = {case.steps}"
            score, product = scored(at, noise)
            for name, form in in_the_return().items():
                mean = -form(case.problem, at.policy, case.grid, noise).mean
                yield self.exact(case, mean, at.slope, 1e-10, f"{where}{name}: {by}")
        else:
            plain, under_pre, _ = at.lattices
            by = f"transition densities on a lattice, N = {case.steps}"
            score, product = plain.score, plain.product
            yield self.exact(case, -under_pre.score, at.explicit(at.under_pre), 1e-8,
                             f"{where}k3 of the whole path as a loss has the gradient of KL(P_pre || P_θ): {by}")
        yield self.exact(case, product, at.slope, 1e-8, f"{where}E[k1 ∇log p] = ∇KL (k1 in the return, k1²/2 as a loss): {by}")
        yield self.exact(case, score, 0.0, 1e-10, f"{where}E ∇log p = 0, the gradient of k1 as a loss: {by}")
        yield self.planted(case, score, at.slope, 1e-8, f"{where}k1 as a loss")

    def _losses(self, at: Bare) -> Iterator[Verdict]:
        """Losses on detached states, in expectation: all of them have the analytic KL's gradient, and that is not grad KL."""
        case, where, explicit = at.case, at_eta(at.case), at.explicit(at.states)
        wrong = {"k2 of each step": at.detached(lambda k: k), "k3 of each step": at.detached(lambda k: -np.expm1(-k))}
        for name, gradient in wrong.items():
            yield self.exact(case, gradient, explicit, 1e-9, f"{where}{name} as a loss: E Σ 2κD (∂μ)'(μ - s), the analytic KL's on detached states")
        wrong |= {"analytic KL of each step": explicit, "k3 of the whole path (∇KL(P_pre || P_θ))": at.explicit(at.under_pre)}
        for name, gradient in wrong.items():
            yield self.planted(case, gradient, at.slope, 1e-8, f"{where}{name} as a loss on detached states")

    def _limits(self, at: Bare) -> Iterator[Verdict]:
        """Step by step k2's bias and k3's noise vanish with D; of the whole path they stay."""
        case, where = at.case, at_eta(at.case)
        steps = order_steps(case) // (3 if case.quick and not case.linear else 1)
        bias, noise = np.array([step_by_step(at.on(int(n))) for n in steps]).T
        dt = case.problem.horizon / steps
        for error, what in ((bias, "bias of the sum of k2 over steps, E Σ |u|⁴/8"),
                            (noise, "E(Σ k3 of steps - Σ ½|u|²)² = E Σ (e^|u|² - 1 - |u|²)")):
            yield self.limit(case, dt, error, 1.0, where + what)
        if case.linear:
            steps = np.array([5, 10, 20, 40])
            kept = [(ratio := at.on(int(n)).ratio).means[1] - ratio.means[0] for n in steps]
            slope = fitted_order(case.problem.horizon / steps, np.array(kept)).slope
            yield self.planted(case, slope, 1.0, ORDER_TOLERANCE, f"{where}k2 of the whole path: its bias, {kept[-1]:.3g} "
                                                                                         f"nats, has order {slope:.2f}, it does not vanish")

    def _sampled_values(self, at: Bare) -> Iterator[Verdict]:
        """k1 along simulated paths, and what k2, the exchanged sign and the mean over dimensions make of it."""
        case, where = at.case, at_eta(at.case)
        paths = simulate(case.problem, at.policy, case.grid, case.noise("k values", 20_000 if case.quick else 100_000))
        k1, scale = paths.log_weight, at.kl if at.solvable else float(paths.penalty.mean())
        right = at.test(k1, paths.penalty)
        yield self.monte_carlo(case, right, 0.35 * scale, f"{where}mean k1 = {at.goal}")
        wrong = {"k2 sold as unbiased": 0.5 * k1**2}
        if case.linear:  # to second order in the departure the exchanged sign is right: on mixtures the exact twin is needed
            wrong["k3 with the sign of the log-ratio exchanged"] = k3(-k1)
        if case.problem.dim > 1:
            wrong["k1 averaged over dimensions"] = k1 / case.problem.dim
        for what, samples in wrong.items():
            yield self.planted_sampled(case, at.test(samples, paths.penalty), f"{where}{what}, along paths", right)

    def _sampled_tails(self, at: Bare) -> Iterator[Verdict]:
        """k3 and the scatter of all three from path to path, for a policy so near that their tails are light."""
        case, where = at.case, at_eta(at.case)
        paths = simulate(case.problem, at.policy, case.grid, case.noise("k tails", 20_000 if case.quick else 100_000))
        k1, scale = paths.log_weight, at.kl if at.solvable else float(paths.penalty.mean())
        yield self.monte_carlo(case, at.test(k3(k1), paths.penalty), 0.35 * scale, f"{where}mean k3 = {at.goal}, {scale:.2g} nats")
        if not case.linear or np.isinf(at.ratio.psi(8)):
            yield self.skipped(case, f"{where}variances of k1, k2, k3 a path: no closed form here, or tails too heavy for a test")
            return
        of_a_path = zip((k1, 0.5 * k1**2, k3(k1)), at.ratio.means, at.ratio.variances, strict=True)
        for name, (samples, mean, variance) in zip(("k1", "k2", "k3"), of_a_path, strict=True):
            yield self.monte_carlo(case, mean_test((samples - mean) ** 2, variance), variance, f"{where}variance of {name} a path, closed form")

    def _sampled_steps(self, at: Bare) -> Iterator[Verdict]:
        """The k3 of each step, summed along paths, and what becomes of k1 without D."""
        case, where, dt = at.case, at_eta(at.case), at.case.grid.dt
        noise = case.noise("k steps", 5000 if case.problem.dim < 3 else 2000)
        parts = [(run.k1, run.paths.penalty) for run in runs(case.problem, at.policy, case.grid, noise)]
        k1, penalty = (np.concatenate(part) for part in zip(*parts, strict=True))
        summed, scale = k3(k1).sum(axis=1), at.kl if at.solvable else float(penalty.mean())
        yield self.monte_carlo(case, at.test(summed, penalty), 0.2 * scale, f"{where}mean Σ k3 of steps = {at.goal}")
        if case.linear:
            spread = step_by_step(at)[1]
            yield self.monte_carlo(case, mean_test((summed - penalty) ** 2, spread), spread,
                                   f"{where}E(Σ k3 of steps - Σ ½|u|²)² = E Σ (e^|u|² - 1 - |u|²)")
        right = at.test(k1.sum(axis=1), penalty)
        for what, weight in (("variance", dt), ("sum", 1 / dt)):
            yield self.planted_sampled(case, at.test(k1 @ weight, penalty), f"{where}k1 without D in the {what}, along paths", right)

    def _sampled_gradients(self, at: Bare) -> Iterator[Verdict]:
        """Gradient samples of the same paths against grad KL, or where that is not known against the pathwise gradient."""
        case, where, right, wrong = at.case, at_eta(at.case), in_the_return(), losses()
        chosen = right | wrong | {"pathwise": Pathwise()}
        samples: dict[str, list[Array]] = {name: [] for name in chosen}
        for run in runs(case.problem, at.policy, case.grid, case.noise("k gradients", 6000 if case.quick else 30_000)):
            for name, form in chosen.items():
                samples[name].append(-form.samples(run))
        gradients = {name: np.concatenate(batches) for name, batches in samples.items()}
        target = at.slope if at.solvable else gradients["pathwise"]
        scale = float(np.linalg.norm(gradients["pathwise"].mean(axis=0)))
        against = "∇KL" if at.solvable else "the pathwise gradient of the same paths"
        tests = {name: mean_test(samples - target, 0.0) for name, samples in gradients.items() if at.solvable or name != "pathwise"}
        for name in right:
            yield self.monte_carlo(case, tests[name], 0.6 * scale, f"{where}{name}: mean gradient = {against}")
        # What a wrong one is a part of: the right one of least noise that the check does not need for itself.
        least = tests.get("pathwise", tests["k1 in the return, reward-to-go"])
        for name in wrong:
            yield self.planted_sampled(case, tests[name], f"{where}{name}, along paths", least)

    def figure(self, case: Case) -> Figure:
        family = [Bare.of(case, nats) for nats in NATS]
        k1 = [simulate(case.problem, at.policy, case.grid, case.noise("figure", FIGURE_PATHS)).log_weight for at in family]
        with style.panels(3, "kl_estimators: k1 and k3 have the right mean; the gradient needs k1 times the path's score", width=4.6, height=3.7) as (
                figure, axes):
            _draw_means(axes[0], family, k1)
            _draw_variances(axes[1], family, k1)
            _draw_losses(axes[2], case)
        return figure


def k3(k1: Array) -> Array:
    """e^{-k1} - 1 + k1, without cancellation for small k1."""
    return np.expm1(-k1) + k1


def in_the_return() -> dict[str, Estimator]:
    """Estimators of -grad KL on a bare problem that charge k1 in the return."""
    return {"k1 in the return": ScoreFunction(sampled_kl=True), "k1 in the return, reward-to-go": RewardToGo(sampled_kl=True)}


def losses() -> dict[str, Estimator]:
    """What is sold as one: a per-step loss whose gradient misses part of it or all."""
    forms = {"k1 as a loss": K1(), "k3 of each step as a loss": K3(), "analytic KL of each step as a loss": Analytic()}
    return {name: KLForm(None, form) for name, form in forms.items()}


def scored(at: Bare, noise: NoiseLike) -> tuple[Array, Array]:
    """E S and E[k1 S] over paths that weigh the same, (p,) each."""
    parts = [(Score().samples(run), run.k1.sum(axis=1)) for run in runs(at.case.problem, at.policy, at.case.grid, noise)]
    score, k1 = (np.concatenate(part) for part in zip(*parts, strict=True))
    return score.mean(axis=0), (k1[:, None] * score).mean(axis=0)


def step_by_step(at: Bare) -> tuple[float, float]:
    r"""Bias of the sum of k2 over steps, E sum |u|^4/8, and the noise of that of k3, E sum (e^{|u|^2} - 1 - |u|^2).

    Gaussian data: u ~ N(a, C), so that E|u|^4 = (tr C + |a|^2)^2 + 2 tr C^2 + 4 a'Ca and
    E e^{|u|^2} = det(I - 2C)^{-1/2} exp( a'(I - 2C)^{-1}a ).
    Source: theory.md, section 14.   Checked: tests/test_theorem_kl_estimators.py::test_step_by_step_against_nodes
    """
    if not at.case.linear:
        square = at.states.mean
        return (float(square(lambda i, x: np.sum(at.u(i, x) ** 2, axis=1) ** 2).sum() / 8),
                float(square(lambda i, x: np.expm1(w := np.sum(at.u(i, x) ** 2, axis=1)) - w).sum()))
    chain, c = LinearChain(at.case.problem, at.policy, at.case.grid), at.case.problem.coefficients(at.case.grid)
    (dK, dk), (m, P), bias, noise = chain.departure, chain.moments, 0.0, 0.0
    for i, scale in enumerate(2 * c.kappa * c.dt):
        a, C = np.sqrt(scale) * (dK[i] @ m[i] + dk[i]), scale * dK[i] @ P[i] @ dK[i].T
        second, inner = np.trace(C) + a @ a, np.eye(len(a)) - 2 * C
        bias += (second**2 + 2 * np.sum(C * C) + 4 * a @ C @ a) / 8
        noise += np.exp(a @ np.linalg.solve(inner, a) - 0.5 * np.linalg.slogdet(inner)[1]) - 1 - second
    return float(bias), float(noise)


# ---- drawing -----------------------------------------------------------------------------------------------------------

NATS, FIGURE_PATHS = (0.015, 0.03, 0.06, 0.12), 20_000


def _draw_means(ax: Axes, family: Sequence[Bare], k1: Sequence[Array]) -> None:
    """What k1, k2, k3 and the exchanged sign average to, in units of the path KL: closed moments and simulated paths."""
    kl = np.array([at.kl for at in family])
    ax.axhline(1.0, color="black", label="E k1 = E k3 = path KL")
    lines = (("planted: k2", [at.ratio.means[1] for at in family]), ("planted: k3, sign exchanged", [at.ratio.flipped for at in family]),
             ("planted: the same, paths of P_pre", [1 - at.ratio.psi(1) - at.ratio.tilted_mean(1) for at in family]))
    for (label, curve), colour, line in zip(lines, (style.RED, style.ORANGE, style.GREEN), style.LINES[1:], strict=False):
        ax.plot(kl, curve / kl, color=colour, linestyle=line, label=label)
    points = (("mean k1", lambda k: k, "o", style.BLUE), ("mean k3", k3, "s", style.SKY),
              ("mean k2", lambda k: 0.5 * k**2, "^", style.RED), ("mean k3, sign exchanged", lambda k: k3(-k), "D", style.ORANGE))
    for j, (label, form, marker, colour) in enumerate(points):
        samples = [form(k) / at.kl for k, at in zip(k1, family, strict=True)]
        bars = [1.96 * sample.std() / np.sqrt(len(sample)) for sample in samples]
        ax.errorbar(kl * (1 + 0.03 * (j - 1.5)), [sample.mean() for sample in samples], bars, fmt=marker, color=colour, capsize=2, label=label)
    ax.set(xscale="log", ylim=(0.7, 3.6), xlabel="path KL (nats)", ylabel="mean / path KL",
           title=f"Values: lines exact, points {FIGURE_PATHS:,} paths ± 95 %")
    style.log_ticks(ax, kl, [f"{x:.2g}" for x in kl])
    ax.legend(loc="upper left", fontsize=7)


def _draw_variances(ax: Axes, family: Sequence[Bare], k1: Sequence[Array]) -> None:
    """Variance a path: closed for whole-path k1, k2, k3; the k3 of each step by simulation."""
    kl, variances = [at.kl for at in family], np.array([at.ratio.variances for at in family])
    for j, (name, form) in enumerate((("k1", lambda k: k), ("k2 (biased)", lambda k: 0.5 * k**2), ("k3", k3))):
        ax.plot(kl, variances[:, j], color=style.COLOURS[j], linestyle=style.LINES[j], label=f"{name} of the whole path")
        ax.plot(kl, [form(k).var() for k in k1], linestyle="none", marker=style.MARKERS[j], color=style.COLOURS[j])
    batches = (next(runs(at.case.problem, at.policy, at.case.grid, at.case.noise("figure steps", 3000))) for at in family)
    ax.plot(kl, [k3(run.k1).sum(axis=1).var() for run in batches], linestyle=":", marker="D", color=style.RED, label="Σ k3 of steps, simulated")
    ax.set(xscale="log", yscale="log", xlabel="path KL (nats)", ylabel="variance of one path (nats²)", title="Scatter: lines exact, points simulated")
    style.log_ticks(ax, kl, [f"{x:.2g}" for x in kl])
    ax.set_ylim(top=6)
    ax.legend(loc="upper left", fontsize=7, ncols=2)


def _draw_losses(ax: Axes, case: Case) -> None:
    """Relative error of the expected gradient, all sign patterns of a short chain or its exact law."""
    at = Bare.of(case.at(0.5)).on(pattern_steps(case))
    noise = Noise.signs(at.case.problem, at.policy, at.case.grid)
    right = {name: -form(at.case.problem, at.policy, at.case.grid, noise).mean for name, form in in_the_return().items()}
    score, right["k1²/2 of the path as a loss"] = scored(at, noise)
    wrong = {"k1 as a loss": score, "k2 of each step as a loss": at.detached(lambda k: k),
             "k3 of each step as a loss": at.detached(lambda k: -np.expm1(-k)), "analytic KL of each step as a loss": at.explicit(at.states),
             "k3 of the path as a loss": at.explicit(at.under_pre)}
    error = [max(float(np.linalg.norm(g - at.slope) / np.linalg.norm(at.slope)), 1e-17) for g in (right | wrong).values()]
    bars = ax.barh(range(len(error)), error, color=[style.BLUE] * len(right) + [style.RED] * len(wrong))
    for bar in bars[len(right) :]:
        bar.set_hatch("///")
    ax.axvline(1e-10, color="black", linestyle="--", linewidth=1)
    ax.set_yticks(range(len(error)), list(right | wrong), fontsize=7)
    ax.set(xscale="log", xlim=(1e-17, 30), xlabel="|E gradient − ∇KL| / |∇KL|, exact; dashed: tolerance",
           title=f"Right (plain) and planted (hatched), η = 0.5, N = {at.case.steps}")
    ax.invert_yaxis()
