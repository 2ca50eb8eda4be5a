r"""The value network's skeleton: the reward at the denoised state, and a network for the rest (theory.md, section 13).

    V_phi(t, x) = c_skip(t) r(x0_hat(t, x)) + c_out(t) F_phi(t, x),      x0_hat = (x + v s)/alpha = E[X_T | X_t = x] at eta = 1

Under the pre-trained policy V is E[r(X_T) | X_t = x]. For Gaussian data N(m, C), with P = alpha^2 C + v I the noised covariance,

    E_eta[X_T | X_t = x] = m + alpha^{eta^2} (C P^{-1})^{(1 + eta^2)/2} (x - alpha m)
    Cov_eta(X_T | X_t = x) = C ( I - (alpha^2 C P^{-1})^{eta^2} )

at every stochasticity: Tweedie's mean and the posterior covariance (C^{-1} + alpha^2/v I)^{-1} at eta = 1, a point at eta = 0. So with a
quadratic reward V - r(E_eta) = -1/2 tr(Q Cov_eta), a function of time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ctrl import exact
from ctrl.check import Array
from ctrl.estimators import runs
from ctrl.evidence import MeanTest, mean_test
from ctrl.exact.chain import LinearChain
from ctrl.laws import GaussianMixture
from ctrl.policy import BasisPolicy
from ctrl.problem import Problem
from ctrl.rollout import simulate
from ctrl.theorems import style
from ctrl.theorems.value import Solved, ahead, at_eta, law_nodes, random_states, some_steps
from ctrl.theorems.value_learning import QUADRATIC, returns_to_go
from ctrl.theorems.verdict import Case, Theorem, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARES = (0.25, 0.5, 0.75)  # of the horizon
LINE_NODES, PLANE_NODES, WIDTH = 4001, 301, 9.0  # of the data law, over so many of its deviations to either side
FEW, MORE = 64, 256  # paths from which a value is learned
STEP_ERROR = 0.05  # of V on the line: what its chain of CHAIN_STEPS steps may be away from continuous time
CHAIN_STEPS, LEARNING_STEPS = 40, 20


# ---- the denoised state --------------------------------------------------------------------------------------------------


def scales(problem: Problem, t: float) -> tuple[float, float]:
    """alpha and v at generation time t."""
    tau = problem.schedule.tau(t)
    return problem.schedule.alpha(tau), problem.schedule.v(tau)


def denoised(problem: Problem, t: float, x: Array) -> Array:
    """x0_hat = (x + v s)/alpha, (n, d): Tweedie's formula."""
    alpha, v = scales(problem, t)
    return (x + v * problem.score(t, x)) / alpha


def _undivided(problem: Problem, t: float, x: Array) -> Array:
    return x + scales(problem, t)[1] * problem.score(t, x)


def _noise_form_v(problem: Problem, t: float, x: Array) -> Array:
    """In noise form x0_hat = (x - sqrt(v) eps)/alpha with eps = -sqrt(v) s; here v eps."""
    alpha, v = scales(problem, t)
    return (x - v * (-np.sqrt(v) * problem.score(t, x))) / alpha


Denoiser = Callable[[Problem, float, Array], Array]
WRONG_DENOISERS: tuple[tuple[str, Denoiser], ...] = (("x0_hat without 1/alpha", _undivided), ("v for sqrt v in noise form", _noise_form_v))


def bayes_mean(problem: Problem, t: float, x: Array) -> Array:
    r"""E[X_0 | X_tau = x] by Bayes, component by component, (n, d); no score in it.

        (C_j^{-1} + alpha^2/v I)^{-1} (C_j^{-1} m_j + alpha/v x), averaged with the posterior weights of the components

    Source: theory.md, section 13.   Checked: tests/test_theorem_value_ansatz.py::test_posterior_means_agree
    """
    data, (alpha, v) = problem.data, scales(problem, t)
    mixture = data if isinstance(data, GaussianMixture) else GaussianMixture([1.0], data.mean[None], data.cov[None])
    information = mixture.precisions + alpha**2 / v * np.eye(problem.dim)
    pull = np.einsum("kij,kj->ki", mixture.precisions, mixture.means) + alpha / v * x[:, None, :]
    means = np.einsum("kij,nkj->nki", np.linalg.inv(information), pull)
    return np.einsum("nk,nki->ni", mixture.noised(alpha, v).responsibilities(x), means)


def data_nodes(problem: Problem) -> tuple[Array, Array]:
    """The data law on the line or in the plane by the trapezoid rule: nodes (m, d), weights (m,)."""
    law, d = problem.data, problem.dim
    z = np.linspace(-WIDTH, WIDTH, LINE_NODES if d == 1 else PLANE_NODES)
    axes = np.meshgrid(*(law.mean[j] + z * np.sqrt(law.cov[j, j]) for j in range(d)), indexing="ij")
    y = np.stack([axis.ravel() for axis in axes], axis=1)
    weights = np.exp(law.log_density(y))
    keep = weights > 1e-18 * weights.max()
    return y[keep], weights[keep] / weights.sum()


def posterior(problem: Problem, t: float, x: Array, values: Callable[[Array], Array]) -> Array:
    """E[values(X_0) | X_tau = x] over the nodes of the data law: int values p(y) N(x; alpha y, v I) dy / p_tau(x); (n, ...)."""
    (y, mass), (alpha, v) = data_nodes(problem), scales(problem, t)
    out = []
    for point in x:
        exponent = -0.5 * np.sum((point - alpha * y) ** 2, axis=1) / v
        weight = mass * np.exp(exponent - exponent.max())
        out.append(weight @ values(y) / weight.sum())
    return np.stack(out)


def generated(problem: Problem, t: float) -> tuple[Array, Array, Array]:
    r"""The law of X_T given X_t = x under the pre-trained policy in continuous time, Gaussian data: mean M x + b, covariance S.

        M = alpha^{eta^2} (C P^{-1})^{(1 + eta^2)/2},    b = m - alpha M m,    S = C (I - (alpha^2 C P^{-1})^{eta^2})

    since a deviation obeys delta' = -(f + h P^{-1}) delta, log P' = -2 f - g^2 P^{-1}, and C = M P M' + S because marginals are kept.
    Source: theory.md, sections 2 and 13.   Checked: tests/test_theorem_value_ansatz.py::test_generated_law_is_the_chains_limit
    """
    (alpha, v), eta2, m = scales(problem, t), problem.eta**2, problem.data.mean
    c, U = np.linalg.eigh(problem.data.cov)
    ratio = c / (alpha**2 * c + v)
    M = (U * (alpha**eta2 * ratio ** ((1 + eta2) / 2))) @ U.T
    return M, m - alpha * M @ m, (U * (c * (1 - (alpha**2 * ratio) ** eta2))) @ U.T


def posterior_cov(problem: Problem, t: float) -> Array:
    """(C^{-1} + alpha^2/v I)^{-1}, Gaussian data."""
    alpha, v = scales(problem, t)
    return np.linalg.inv(np.linalg.inv(problem.data.cov) + alpha**2 / v * np.eye(problem.dim))


def lifted(problem: Problem, mean: Array, cov: Array) -> Array:
    """E r(Y) for a quadratic reward and Y of these means (n, d) and this covariance: r(mean) - 1/2 tr(Q cov), (n,)."""
    quadratic = problem.reward.quadratic(problem.dim)
    assert quadratic is not None
    return problem.reward.value(mean) - 0.5 * float(np.sum(quadratic.matrix * cov))


# ---- the skeleton, and learning it ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Skeleton:
    """Weights c_skip and c_out as functions of (problem, t); no skip at all is a plain network."""

    name: str
    weights: Callable[[Problem, float], tuple[float, float]]

    def known(self, problem: Problem, t: float, x: Array) -> Array:
        """c_skip r(x0_hat), (n,)."""
        return self.weights(problem, t)[0] * problem.reward.value(denoised(problem, t, x))


def _cosine(problem: Problem, t: float) -> tuple[float, float]:
    angle = 0.5 * np.pi * problem.schedule.tau(t) / problem.horizon
    return float(np.cos(angle)), float(np.sin(angle))


def _signal(problem: Problem, t: float) -> tuple[float, float]:
    alpha, v = scales(problem, t)
    skip = alpha**2 / (alpha**2 + v)
    return skip, float(np.sqrt(1 - skip**2))


def _wrong_end(problem: Problem, t: float) -> tuple[float, float]:
    skip, out = _cosine(problem, t)
    return out, skip


COSINE, SIGNAL, WRONG_END = Skeleton("cos, sin", _cosine), Skeleton("signal share", _signal), Skeleton("exchanged", _wrong_end)
PLAIN = Skeleton("plain", lambda problem, t: (0.0, 1.0))


@dataclass(frozen=True)
class Class:
    """What F may be: (1, tau/T, (tau/T)^2) times monomials of x up to a degree (0, 1 or 2), on a skeleton."""

    skeleton: Skeleton
    degree: int

    def clock(self, problem: Problem, t: float) -> Array:
        """c_out (1, s, s^2) with s = tau/T, (3,)."""
        return self.skeleton.weights(problem, t)[1] * (problem.schedule.tau(t) / problem.horizon) ** np.arange(3)

    def monomials(self, x: Array) -> Array:
        """(..., d) -> (..., m)."""
        flat = QUADRATIC(x.reshape(-1, x.shape[-1]))[:, : (1, 1 + x.shape[-1], None)[self.degree]]
        return flat.reshape(*x.shape[:-1], -1)


@dataclass(frozen=True, eq=False)
class Normal:
    """sum over steps of weight |c_out F - rest|^2 as a quadratic form in F's coefficients, c'gram c - 2 c'target + constant."""

    gram: Array
    target: Array
    constant: Array

    @classmethod
    def of(cls, family: Class, problem: Problem, steps: Iterator[tuple[float, Array, Array, Array]]) -> Normal:
        """From (t_i, states (..., n, d), weights (..., n), what F must make up for (..., n)) of every step."""
        parts = []
        for t, x, w, rest in steps:
            clock, q = family.clock(problem, t), family.monomials(x)
            weighted = np.swapaxes(w[..., None] * q, -1, -2)
            gram = np.einsum("a,b,...pq->...apbq", clock, clock, weighted @ q)
            target = np.einsum("a,...p->...ap", clock, (weighted @ rest[..., None])[..., 0])
            size = clock.size * q.shape[-1]
            parts.append((gram.reshape(*gram.shape[:-4], size, size), target.reshape(*target.shape[:-2], size), np.sum(w * rest**2, axis=-1)))
        return cls(*(sum(part[1:], start=part[0]) for part in zip(*parts, strict=True)))

    @cached_property
    def best(self) -> Array:
        """Where it is least, (..., p)."""
        inverse = np.linalg.pinv(self.gram, rcond=1e-12, hermitian=True)
        return np.einsum("...pq,...q->...p", inverse, self.target)

    def at(self, c: Array) -> Array:
        """Its value at coefficients (..., p)."""
        return np.einsum("...p,pq,...q->...", c, self.gram, c) - 2 * c @ self.target + self.constant


@dataclass(frozen=True, eq=False)
class World:
    """A policy's exact V and the laws of its chain as nodes: where a learned value is judged without noise."""

    at: Solved

    @property
    def case(self) -> Case:
        return self.at.case

    @cached_property
    def visits(self) -> list[tuple[float, float, Array, Array, Array]]:
        """(t_i, D_i, states (m, d), weights (m,), V_i there) of every step."""
        case, grid = self.case, self.case.grid
        if case.linear:
            m, P = LinearChain(case.problem, self.at.policy, grid).moments
            laws = tuple(exact.Terminal(mean, cov) for mean, cov in zip(m, P, strict=True))
        else:
            laws = exact.quadrature.marginals(case.problem, self.at.policy, grid)
        nodes = [law_nodes(case, law) for law in laws[:-1]]
        return [(float(grid.times[i]), float(grid.dt[i]), x, w, self.at.value(i, x)) for i, (x, w) in enumerate(nodes)]

    @cached_property
    def size(self) -> float:
        """sum D Var V_i(X_i): the unit of squared errors."""
        return sum(dt * float(w @ (V - w @ V) ** 2) for _, dt, _, w, V in self.visits)

    @cached_property
    def forms(self) -> dict[Class, Normal]:
        return {}

    def normal(self, family: Class) -> Normal:
        """E sum D (V_phi - V)^2."""
        if family not in self.forms:
            problem = self.case.problem
            steps = ((t, x, dt * w, V - family.skeleton.known(problem, t, x)) for t, dt, x, w, V in self.visits)
            self.forms[family] = Normal.of(family, problem, steps)
        return self.forms[family]

    def error(self, family: Class, c: Array) -> Array:
        """Squared errors of V_phi at coefficients (..., p), in units of V's variance."""
        return self.normal(family).at(c) / self.size

    def floor(self, family: Class) -> float:
        """The error that no number of paths removes, root mean square in deviations of V."""
        return float(np.sqrt(max(float(self.error(family, self.normal(family).best)), 0.0)))


@dataclass(frozen=True, eq=False)
class Batch:
    """Simulated paths in `repeats` batches of n: states (repeats, n, N, d), returns to go and r(x0_hat) (repeats, n, N)."""

    world: World
    states: Array
    returns: Array
    skipped: Array

    @classmethod
    def simulated(cls, world: World, label: str, repeats: int, n: int) -> Batch:
        case, policy, t = world.case, world.at.policy, world.case.grid.times
        every = list(runs(case.problem, policy, case.grid, case.noise(label, repeats * n)))
        states = np.concatenate([run.states[:, :-1] for run in every])
        returns = np.concatenate([returns_to_go(run) for run in every])
        hats = [case.problem.reward.value(denoised(case.problem, float(t[i]), states[:, i])) for i in range(case.grid.steps)]
        shape = (repeats, n, case.grid.steps)
        return cls(world, states.reshape(*shape, -1), returns.reshape(shape), np.stack(hats, axis=1).reshape(shape))

    def steps(self, family: Class, n: int) -> Iterator[tuple[float, Array, Array, Array]]:
        """What Normal asks for, from the first n paths of each batch: weights D_i / n."""
        problem, grid = self.world.case.problem, self.world.case.grid
        for i, t in enumerate(grid.times[:-1].tolist()):
            rest = self.returns[:, :n, i] - family.skeleton.weights(problem, t)[0] * self.skipped[:, :n, i]
            yield t, self.states[:, :n, i], np.full(rest.shape, grid.dt[i] / n), rest

    def learned(self, family: Class, n: int) -> Array:
        """Squared errors of the minimisers of the martingale loss on each batch's first n paths, (repeats,)."""
        return self.world.error(family, Normal.of(family, self.world.case.problem, self.steps(family, n)).best)

    def slopes(self, family: Class, c: Array) -> Array:
        """Per path half the derivative of the martingale loss at c, (paths, p)."""
        problem, total = self.world.case.problem, 0.0
        for t, x, w, rest in self.steps(family, self.states.shape[1]):
            clock, q = family.clock(problem, t), family.monomials(x)
            off = w * (np.einsum("rnp,ap,a->rn", q, c.reshape(3, -1), clock) - rest)
            total = total + np.einsum("rn,a,rnp->rnap", off, clock, q)
        return np.asarray(total).reshape(-1, len(c))


# ---- the theorem ---------------------------------------------------------------------------------------------------------


class ValueAnsatz(Theorem):
    r"""Under the pre-trained policy V is r at the denoised state up to Jensen's gap, and a network need only learn the rest.

    Source: theory.md, section 13.   Checked: tests/test_theorem_value_ansatz.py::test_every_verdict_holds
    """

    name = "value_ansatz"
    statement = ("V_φ = c_skip r(x̂₀) + c_out F_φ, x̂₀ = (x + v s)/α = E[X_T | X_t = x] at η = 1, c_skip = 1 and c_out = 0 at t = T. Under the "
                 "pre-trained policy, for Gaussian data and a quadratic reward, V - r(E_η[X_T | x]) = -½ tr(Q Cov_η(X_T | x)) at every η; at "
                 "η = 1 E_η is x̂₀ and Cov_η = (C⁻¹ + α²/v I)⁻¹.")
    formulas = (
        r"V_\varphi(t, x) = c_{\mathrm{skip}}\, r(\hat{x}_0) + c_{\mathrm{out}}\, F_\varphi(t, x),"
        r"\qquad \hat{x}_0 = \dfrac{x + v\, s}{\alpha} = \mathbb{E}_{\eta = 1}[X_T \mid X_t = x]",
        r"V - r(\mathbb{E}_\eta[X_T \mid x]) = -\frac{1}{2}\, \mathrm{tr}\left( Q\, \mathrm{Cov}_\eta(X_T \mid x) \right),"
        r"\qquad \mathrm{Cov}_\eta = C \left( I - (\alpha^2 C P^{-1})^{\eta^2} \right)",
        r"\mathbb{E}_\eta[X_T \mid x] = m + \alpha^{\eta^2} (C P^{-1})^{(1 + \eta^2)/2} (x - \alpha m),"
        r"\qquad P = \alpha^2 C + v I")

    def checks(self, case: Case) -> Iterator[Verdict]:
        if case.problem.discount > 0 or case.problem.entropy_weight > 0:
            yield self.skipped(case, "discount and entropy: the skeleton is tried without them")
        case = case.at(case.problem.eta, discount=0.0, entropy_weight=0.0)
        yield from self._denoised(case)
        yield from self._denoised_sampled(case)
        yield from self._terminal(case)
        if case.linear:
            for eta in (*case.etas, 0.0) if not case.quick or case.problem.dim <= 2 else case.etas:
                yield from self._gap(case.at(eta))
            for eta in case.etas:
                yield from self._chain(case.at(eta))
            yield from self._sampled(case.at(0.5))
        if case.linear or case.problem.dim == 1:
            for eta in case.etas if case.linear else (1.0,):
                yield from self._limit(case.at(eta))
            if not case.linear:
                yield from self._posterior(case.at(1.0))
            yield from self._learning(case.at(1.0))
        else:
            yield self.skipped(case, "V against r(x0_hat), and learning it: tried where V is exact in time, on linear chains and on the line")

    def _denoised(self, case: Case) -> Iterator[Verdict]:
        """x0_hat against the posterior mean: by Bayes, and for mixtures by quadrature of the data law."""
        problem, by_quadrature = case.problem, isinstance(case.problem.data, GaussianMixture) and case.problem.dim <= 2
        at = [(share * problem.horizon, random_states(case, int(share * case.steps))) for share in SHARES]

        def over(denoiser: Denoiser) -> Array:
            return np.concatenate([denoiser(problem, t, x) for t, x in at])

        right = over(bayes_mean)
        yield self.exact(case, over(denoised), right, 1e-10, "x0_hat = (x + v s)/alpha is the posterior mean by Bayes, t = T/4, T/2, 3T/4")
        if by_quadrature:
            means = np.concatenate([posterior(problem, t, x, lambda y: y) for t, x in at])
            yield self.exact(case, over(denoised), means, 1e-9, "x0_hat = (x + v s)/alpha is the posterior mean by quadrature of the data law")
        for what, wrong in WRONG_DENOISERS:
            if what.endswith("1/alpha") and all(scales(problem, t)[0] == 1 for t, _ in at):
                yield self.skipped(case, f"{what}: no error for VE, where alpha = 1")
            else:
                yield self.planted(case, over(wrong), right, 1e-10, f"{what}, against the posterior mean")

    def _denoised_sampled(self, case: Case) -> Iterator[Verdict]:
        """Noised data: Y_0 - x0_hat(Y_tau) is orthogonal to functions of Y_tau."""
        problem, t = case.problem, 0.5 * case.problem.horizon
        (alpha, v), count = scales(problem, t), 5000 if case.quick else 50_000
        clean = problem.data.sample(case.noise("clean", count))
        y = alpha * clean + np.sqrt(v) * case.noise("noised", count).start(problem.dim)
        tests = np.concatenate([np.ones((count, 1)), y[:, :3]], axis=1)

        def test(denoiser: Denoiser) -> MeanTest:
            off = (denoiser(problem, t, y) - clean)[:, :3]
            return mean_test((off[:, :, None] * tests[:, None, :]).reshape(count, -1) / spread, 0.0)

        spread = ((clean - problem.data.mean)[:, :3, None] * tests[:, None, :]).reshape(count, -1).std(axis=0)
        right = test(denoised)
        yield self.monte_carlo(case, right, 0.15, "E (x0_hat(Y) - Y_0) f(Y) = 0 for noised data at T/2, f = 1, y_j; in deviations of Y_0 f")
        for what, wrong in WRONG_DENOISERS:
            if not (what.endswith("1/alpha") and alpha == 1):
                yield self.planted_sampled(case, test(wrong), f"{what}, on noised data", right)

    def _terminal(self, case: Case) -> Iterator[Verdict]:
        """V_phi(T, .) = r whatever F is."""
        problem, x = case.problem, random_states(case, case.steps)
        F = np.cos(np.arange(len(x))) * (1 + np.abs(problem.reward.value(x)))

        def ends(skeleton: Skeleton) -> Array:
            return skeleton.known(problem, problem.horizon, x) + skeleton.weights(problem, problem.horizon)[1] * F

        right = problem.reward.value(x)
        for skeleton in (COSINE, SIGNAL):
            yield self.exact(case, ends(skeleton), right, 1e-12, f"V_phi(T, x) = r(x) whatever F: c_skip = {skeleton.name}")
        yield self.planted(case, ends(WRONG_END), right, 1e-12, "c_skip at the wrong end: V_phi(T, x) is F")

    def _gap(self, case: Case) -> Iterator[Verdict]:
        """Continuous time, any eta: V of the pre-trained policy from its ODEs against the law of X_T given X_t in closed form."""
        problem, where = case.problem, at_eta(case)
        value = exact.limit.value(problem, BasisPolicy.shift(problem, np.zeros(problem.dim)))
        at = [(share * problem.horizon, random_states(case, int(share * case.steps))) for share in SHARES]
        laws = [generated(problem, t) for t, _ in at]
        V = np.concatenate([value(t, x) for t, x in at])
        right = np.concatenate([lifted(problem, x @ M.T + b, S) for (_, x), (M, b, S) in zip(at, laws, strict=True)])
        yield self.exact(case, V, right, 1e-9, f"{where}V - r(E_eta[X_T|x]) = -1/2 tr(Q Cov_eta) in continuous time, pre-trained policy")
        tweedie = np.concatenate([lifted(problem, denoised(problem, t, x), S) for (t, x), (_, _, S) in zip(at, laws, strict=True)])
        bayes = np.concatenate([lifted(problem, x @ M.T + b, posterior_cov(problem, t)) for (t, x), (M, b, _) in zip(at, laws, strict=True)])
        if problem.eta == 1:
            yield self.exact(case, bayes, V, 1e-9, "V - r(x0_hat) = -1/2 tr(Q (C^-1 + alpha^2/v I)^-1)")
            jensen = np.concatenate([problem.reward.value(denoised(problem, t, x)) for t, x in at])
            yield self.planted(case, jensen, V, 1e-9, "r(x0_hat) sold as V (Jensen)")
            yield self.skipped(case, "Tweedie's mean and the posterior covariance are no errors at eta = 1")
        else:
            yield self.planted(case, tweedie, V, 1e-9, f"{where}Tweedie's x0_hat for E_eta[X_T|x]")
            yield self.planted(case, bayes, V, 1e-9, f"{where}posterior covariance for Cov_eta")

    def _chain(self, case: Case) -> Iterator[Verdict]:
        """The exact twin: the chain's own conditional law of X_N, carried forward, against the chain's V, carried backward."""
        problem, where, pre = case.problem, at_eta(case), case.problem.pretrained(case.grid)
        chain, value, left, right = LinearChain(problem, pre, case.grid), exact.value(problem, pre, case.grid), [], []
        for i in some_steps(case):
            x = random_states(case, i)
            *_, (M, b, S) = ahead(chain, i)
            left.append(value(i, x))
            right.append(lifted(problem, x @ M.T + b, S))
        yield self.exact(case, np.concatenate(left), np.concatenate(right), 1e-10,
                         f"{where}V_i - r(E_eta[X_N|x]) = -1/2 tr(Q Cov_eta(X_N|x)) of the chain, at every step size")

    def _sampled(self, case: Case) -> Iterator[Verdict]:
        """Simulated pre-trained paths: what X_{N/2} tells of X_N, at an eta where Tweedie's formula does not."""
        problem, i, pre = case.problem, case.steps // 2, case.problem.pretrained(case.grid)
        *_, (M, b, S) = ahead(LinearChain(problem, pre, case.grid), i)
        paths = simulate(problem, pre, case.grid, case.noise("ansatz", 4000 if case.quick else 40_000), trajectory=True)
        assert paths.states is not None
        x, t = paths.states[:, i], float(case.grid.times[i])
        tests = np.concatenate([np.ones((len(x), 1)), x[:, :3]], axis=1)
        root = np.sqrt(np.diag(S))

        def test(mean: Array, cov: Array) -> MeanTest:
            off = (((paths.terminal - mean) / root)[:, :3, None] * tests[:, None, :]).reshape(len(x), -1)
            rest = paths.reward - lifted(problem, mean, cov)
            return mean_test(np.column_stack([off, rest / rest.std()]) if rest.std() > 1e-9 else off, 0.0)

        right = test(x @ M.T + b, S)
        yield self.monte_carlo(case, right, 0.3, f"{at_eta(case)}E (X_N - E_eta[X_N|X_i]) f(X_i) = 0, f = 1, x_j, and E r(X_N) = E r(E_eta) "
                                                 "- 1/2 tr(Q Cov_eta); in deviations")
        yield self.planted_sampled(case, test(denoised(problem, t, x), S), f"{at_eta(case)}Tweedie's x0_hat for E_eta[X_N|X_i], on paths", right)

    def _limit(self, case: Case) -> Iterator[Verdict]:
        """The chain's V tends to E_eta[r(X_T) | X_t = x] at order 1: in closed form for Gaussian data, any eta."""
        target, what = (in_closed_form, "r(E_eta) - 1/2 tr(Q Cov_eta)") if case.linear else (posterior_reward, "E[r(X_0) | X_tau = x]")
        error = limit_errors(case, target)
        if np.all(error > 0):
            yield self.limit(case, case.problem.horizon / limit_steps(case), error, 1.0,
                             f"{at_eta(case)}V of the pre-trained chain -> {what}, t = 0 and T/2")
        else:
            yield self.skipped(case, f"{at_eta(case)}limit: V does not depend on the step size here")

    def _posterior(self, case: Case) -> Iterator[Verdict]:
        """What the posterior law says of V on the line: all of it at eta = 1, and nothing at another eta."""
        right, half = (at_two_times(case, lambda t, x: posterior_reward(case.problem, t, x)), chain_values(case.at(0.5), CHAIN_STEPS))
        yield self.exact(case, chain_values(case, CHAIN_STEPS), right, STEP_ERROR,
                         f"V of {CHAIN_STEPS} steps is E[r(X_0) | X_tau = x] up to its step-size error")
        yield self.planted(case, half, right, STEP_ERROR, "eta = 0.5: the posterior law for that of X_T given X_t")
        jensen = at_two_times(case, lambda t, x: case.problem.reward.value(denoised(case.problem, t, x)))
        yield self.planted(case, jensen, right, 1e-9, "r(x0_hat) sold as E[r(X_0) | X_tau = x] (Jensen)")

    def _learning(self, case: Case) -> Iterator[Verdict]:
        """The martingale loss from few paths: with the skeleton and without, in a fixed class of F."""
        world = World(Solved(case.over(LEARNING_STEPS), case.policy, "mean actions"))
        if world.size < 1e-12:
            yield self.skipped(case, "learning: V is a function of time alone")
            return
        batch = Batch.simulated(world, "ansatz learning", 24 if case.quick else 48, MORE)
        affine, plain = Class(COSINE, 1), Class(PLAIN, 1)
        slopes = batch.slopes(affine, world.normal(affine).best)
        yield self.monte_carlo(case, mean_test(slopes / slopes.std(axis=0), 0.0), 0.15,
                               "the skeleton's martingale loss is stationary at the exact projection of V; deviations of a path")
        gain = batch.learned(plain, MORE) - batch.learned(affine, MORE)
        row = self.planted_sampled(case, mean_test(gain, 0.0), f"a plain network learns V as fast, F affine in x: {compared(batch, 1)}")
        yield replace(row, holds=None if row.holds is None else row.holds and bool(gain.mean() > 0))
        yield self.skipped(case, f"F quadratic in x, measured and not judged: {compared(batch, 2)}; what the skeleton lowers is the error "
                                 "that is left of all paths, not the noise of few")

    def figure(self, case: Case) -> Figure:
        """The gap over time at three eta; what V is at T/2; the chain's way to the limit; learning curves."""
        with style.panels(4, "value_ansatz: V is r at the denoised state, and a function of time", width=3.7) as (figure, axes):
            _draw_gap(axes[0], case)
            _draw_state(axes[1], case)
            _draw_orders(axes[2], case)
            _draw_learning(axes[3], case)
        return figure


Target = Callable[[Problem, float, Array], Array]


def in_closed_form(problem: Problem, t: float, x: Array) -> Array:
    """r(E_eta[X_T | x]) - 1/2 tr(Q Cov_eta), Gaussian data and a quadratic reward."""
    M, b, S = generated(problem, t)
    return lifted(problem, x @ M.T + b, S)


def posterior_reward(problem: Problem, t: float, x: Array) -> Array:
    """E[r(X_0) | X_tau = x] by quadrature of the data law."""
    return posterior(problem, t, x, problem.reward.value)


def at_two_times(case: Case, function: Callable[[float, Array], Array]) -> Array:
    """function(t, x) at fixed states of t = 0 and T/2."""
    return np.concatenate([function(0.5 * half * case.problem.horizon, random_states(case, half * case.steps // 2)) for half in (0, 1)])


def chain_values(case: Case, steps: int) -> Array:
    """V of the pre-trained chain at the same times and states; an even number of steps."""
    grid = case.problem.grid(steps)
    value = exact.value(case.problem, case.problem.pretrained(grid), grid)
    return at_two_times(case, lambda t, x: value(round(t / case.problem.horizon * steps), x))


def limit_steps(case: Case) -> Array:
    return np.array([20, 40, 80, 160] if case.linear else [10, 20, 40, 80])


def limit_errors(case: Case, target: Target) -> Array:
    """Errors of the chain's V over limit_steps, noise-free."""
    limit = at_two_times(case, lambda t, x: target(case.problem, t, x))
    return np.array([np.linalg.norm(chain_values(case, int(n)) - limit) for n in limit_steps(case)])


def compared(batch: Batch, degree: int) -> str:
    """Skeleton against plain: rms errors from few paths, from more, and from all."""
    families = Class(COSINE, degree), Class(PLAIN, degree)
    rms = [(f"{n} paths", *(float(np.sqrt(batch.learned(family, n).mean())) for family in families)) for n in (FEW, MORE)]
    rms.append(("all paths", *(batch.world.floor(family) for family in families)))
    return "rms error, skeleton : plain, " + ", ".join(f"{a:.3f} : {b:.3f} of {name}" for name, a, b in rms)


# ---- drawing -------------------------------------------------------------------------------------------------------------


def _draw_gap(ax: Axes, case: Case) -> None:
    """V - r(E_eta[X_T | x]) over time: closed form, and pairs (X_i, X_N) of simulated paths."""
    for j, eta in enumerate((1.0, 0.5, 0.25)):
        at = case.at(eta).over(160)
        problem, grid, zero = at.problem, at.grid, np.zeros((1, case.problem.dim))
        t = np.linspace(0.0, problem.horizon, 101)
        gap = [float((lifted(problem, zero, generated(problem, s)[2]) - problem.reward.value(zero))[0]) for s in t]
        ax.plot(t, gap, color=style.COLOURS[j], linestyle=style.LINES[j], label=f"η = {eta:g}" + (": the posterior's" if eta == 1 else ""))
        paths = simulate(problem, problem.pretrained(grid), grid, at.noise("figure gap", 3000), trajectory=True)
        assert paths.states is not None
        for i in range(16 + 8 * j, grid.steps, 32):
            M, b, _ = generated(problem, float(grid.times[i]))
            off = paths.reward - problem.reward.value(paths.states[:, i] @ M.T + b)
            ax.errorbar(grid.times[i], off.mean(), 1.96 * off.std() / np.sqrt(len(off)), fmt=style.MARKERS[j], color=style.COLOURS[j], capsize=2)
    ax.set(xlabel="generation time t (horizon units)", ylabel="V − r(E[X_T | x]) (reward units)",
           title="−½ tr(Q Cov); simulated, 95 %")
    ax.legend(loc="lower right")


def _draw_state(ax: Axes, case: Case) -> None:
    """V(T/2, .) of the pre-trained policy along the first axis, at eta = 1."""
    at = case.at(1.0)
    problem, i, line = at.problem, at.steps // 2, np.linspace(-2.5, 2.5, 61)
    t, x = float(at.grid.times[i]), line[:, None] * np.eye(problem.dim)[0]
    value, hat = exact.value(problem, problem.pretrained(at.grid), at.grid), denoised(problem, t, x)
    ax.plot(line, value(i, x), color=style.BLUE, label=f"V of the chain, N = {at.steps}")
    ax.plot(line[::6], lifted(problem, hat, posterior_cov(problem, t))[::6], linestyle="none", marker="o", markerfacecolor="none", color="black",
            label="r(x̂₀) − ½ tr(Q Cov)")
    ax.plot(line, problem.reward.value(hat), color=style.ORANGE, linestyle="-.", label="planted: r(x̂₀) (Jensen)")
    for (_, wrong), short, colour, dash in zip(WRONG_DENOISERS, ("x̂₀ without 1/α", "v for √v"), (style.RED, style.PURPLE), ("--", ":"), strict=True):
        ax.plot(line, problem.reward.value(wrong(problem, t, x)), color=colour, linestyle=dash, label=f"planted: {short}")
    ax.set(xlabel="first coordinate of x (state units)", ylabel="reward units", title="t = T/2, η = 1, pre-trained")
    ax.legend(loc="lower center", fontsize=7)


def _draw_orders(ax: Axes, case: Case) -> None:
    """V of the pre-trained chain against its closed form."""
    dt = case.problem.horizon / limit_steps(case)
    for j, eta in enumerate((1.0, 0.5, 0.25)):
        style.order_line(ax, dt, limit_errors(case.at(eta), in_closed_form), f"η = {eta:g}", j)
    style.log_ticks(ax, dt, [f"1/{n}" for n in limit_steps(case)])
    ax.set(xlabel="step D (horizon units)", ylabel="|V of the chain − limit| (reward units)", title="Limit: order 1")
    ax.legend()


def _draw_learning(ax: Axes, case: Case) -> None:
    """Errors of learned values against the number of paths, F affine and F quadratic; dotted: all paths."""
    world = World(Solved(case.at(1.0).over(LEARNING_STEPS), case.policy, "mean actions"))
    counts, batch = np.array([16, 32, 64, 128, 256]), Batch.simulated(world, "figure learning", 16, 256)
    for j, (family, name) in enumerate(((Class(PLAIN, 1), "plain, F affine"), (Class(COSINE, 1), "skeleton, F affine"),
                                        (Class(PLAIN, 2), "plain, F quadratic"), (Class(COSINE, 2), "skeleton, F quadratic"))):
        errors = np.stack([batch.learned(family, int(n)) for n in counts])
        mean, bar = errors.mean(axis=1), 1.96 * errors.std(axis=1, ddof=1) / np.sqrt(errors.shape[1])
        ax.errorbar(counts, np.sqrt(mean), bar / (2 * np.sqrt(mean)), marker=style.MARKERS[j], linestyle=style.LINES[j], color=style.COLOURS[j],
                    capsize=2, label=name)
        ax.axhline(world.floor(family), color=style.COLOURS[j], linewidth=0.8, linestyle=":")
    ax.set(xscale="log", yscale="log", xlabel="paths", ylabel="rms error of V (deviations of V)", title="Learned from few paths; dotted: from all")
    style.log_ticks(ax, counts, [str(n) for n in counts])
    ax.minorticks_off()
    ax.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
    ax.legend(loc="upper right", fontsize=7)
