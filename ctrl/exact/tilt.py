r"""Tilted laws, and how far the optimum's terminal law is from one (theory.md, section 9).

    p*(x) = p_pre(x) e^{r(x)/lambda} / Z,     J = lambda log Z,     E*[r],     KL(p* || p_pre) = (E*[r] - J)/lambda

In continuous time X_T of the optimum has this law where X_0 and X_T are independent under P_pre (memoryless); else it is weighted by
1/phi(0, X_0), the initial-law bias. Gaussians in closed form; the line by panels; anything else from samples of the pre-trained model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from ctrl import check
from ctrl.check import Array
from ctrl.exact.linear_doob import Exponent, require_doob
from ctrl.exact.line import components
from ctrl.exact.panels import fit
from ctrl.laws import Gaussian, Law
from ctrl.problem import Problem
from ctrl.reward import Reward

DEPTH = 45.0  # of log-density below its top that a rule covers: e^-45 = 3e-20
FURTHEST = 60.0  # standard deviations from the mean at which a tilt is looked for
LOOK = 8001
PLANE, MOST_IN_PLANE = 9.0, 2_000_000  # in the plane: half-width in standard deviations of the law, and points


# ---- tilts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tilt:
    r"""The tilt of a law by e^{r/lambda}: the best that any model of the law can do at its KL.

    objective : lambda log E_pre e^{r/lambda}, reward units      reward : E*[r]      kl : KL(p* || p_pre), nats
    law : of the tilt where that is Gaussian, else None
    Source: theory.md, section 9.   Checked: tests/test_tilt.py::test_tilts_in_closed_form_and_by_panels
    """

    kl_weight: float
    objective: float
    reward: float
    kl: float
    law: Gaussian | None = None


def tilt(law: Law, reward: Reward, kl_weight: float) -> Tilt:
    r"""The tilt of a data law: in closed form for a Gaussian and a quadratic reward, precision C^{-1} + Q/lambda; else by quadrature.

        J = lambda log E_pre e^{r/lambda},     E*[r] = E_pre[ e^{r/lambda} r ] / E_pre e^{r/lambda},     KL* = (E*[r] - J)/lambda

    ValueError where e^{r/lambda} has no integral. Closed form to rounding; on the line by panels, to 1e-12; in the plane by the trapezoid
    rule on a lattice that is refined until J stands still to 1e-10.
    Source: theory.md, section 9.   Checked: tests/test_tilt.py::test_tilts_in_closed_form_and_by_panels
    """
    kl_weight = check.number("kl_weight", kl_weight, above=0)
    quadratic = reward.quadratic(law.dim)
    if isinstance(law, Gaussian) and quadratic is not None:
        phi = Exponent.of(quadratic, kl_weight)
        tilted, level = phi.tilted(law), log_partition(law, phi)
        return _tilt(kl_weight, level, kl_weight * phi.mean(tilted), tilted)
    if law.dim == 2:
        return _plane_tilt(law, reward, kl_weight)
    points, masses, level = line_rule(law, lambda x: reward.value(x[:, None]) / kl_weight)
    return _tilt(kl_weight, level, float(masses @ reward.value(points[:, None])), None)


def _tilt(kl_weight: float, level: float, reward: float, law: Gaussian | None) -> Tilt:
    return Tilt(kl_weight, kl_weight * level, reward, reward / kl_weight - level, law)


def _plane_tilt(law: Law, reward: Reward, kl_weight: float) -> Tilt:
    covs = law.cov[None] if isinstance(law, Gaussian) else law.covs
    spacing, half = 0.7 * float(np.sqrt(np.linalg.eigvalsh(covs).min())), PLANE * np.sqrt(np.diag(law.cov))
    last = np.inf
    while True:
        n = 2 * np.ceil(half / spacing).astype(int) + 1
        if n.prod() > MOST_IN_PLANE:
            raise ValueError("kl_weight: expected a weight large enough for e^(r / kl_weight) to be integrable under the law, and a reward that "
                             f"{MOST_IN_PLANE} points resolve, got lambda log E e^(r / lambda) that still moves at {kl_weight * last:.6g}")
        axes = [m + spacing * (np.arange(k) - k // 2) for m, k in zip(law.mean, n, strict=True)]
        x = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
        r = reward.value(x)
        scaled = law.log_density(x) + r / kl_weight
        level = float(logsumexp(scaled) + 2 * np.log(spacing))
        if abs(level - last) <= 1e-10 * max(1.0, abs(level)):
            return _tilt(kl_weight, level, float(spacing**2 * np.exp(scaled - level) @ r), None)
        spacing, last = spacing / 1.5, level


def log_partition(law: Gaussian, phi: Exponent) -> float:
    """log E phi under a Gaussian."""
    return phi.before(np.zeros((law.dim, law.dim)), law.mean, law.cov).z


def frontier(law: Law, reward: Reward, kl_weights: Sequence[float]) -> list[Tilt]:
    r"""The ideal reward-KL frontier of a law without sampling; its slope dE*[r]/dKL* is kl_weight, and dJ/dlambda = -KL*.

    Source: theory.md, section 9 (envelope).   Checked: tests/test_tilt.py::test_frontier_has_slope_lambda
    """
    return [tilt(law, reward, kl_weight) for kl_weight in kl_weights]


Exponential = Callable[[Array], Array]


class Rule(NamedTuple):
    """Points (n,) and masses (n,), summing to 1, of a law on the line; log of what its density's integral was."""

    points: Array
    masses: Array
    log_total: float


def line_rule(law: Law, exponent: Exponential) -> Rule:
    r"""A quadrature rule for the law proportional to p(x) e^{g(x)} on the line, by panels; log_total = log E_p e^g.

    Source: theory.md, section 9.   Checked: tests/test_tilt.py::test_tilts_in_closed_form_and_by_panels
    """
    low, high, top = support(law, exponent)

    def density(x: Array) -> Array:
        return np.tile(np.exp(law.log_density(x[:, None]) + exponent(x) - top), (2, 1))

    rule = fit(density, np.array([low, high]), float(np.min(components(law)[1])), 1, "reward")
    weights = rule.weights * rule.flat(0)
    return Rule(rule.nodes, weights / weights.sum(), float(np.log(weights.sum()) + top))


def support(law: Law, exponent: Exponential) -> tuple[float, float, float]:
    """Where p e^g is more than e^-45 of its top, and the logarithm of its top; ValueError where it has no integral."""
    if law.dim != 1:
        raise ValueError(f"law: expected a Gaussian with a quadratic reward, or dimension 1, got {type(law).__name__} in dimension {law.dim}")
    far = FURTHEST * float(np.sqrt(law.cov[0, 0]))
    x = np.linspace(float(law.mean[0]) - far, float(law.mean[0]) + far, LOOK)
    levels = law.log_density(x[:, None]) + exponent(x)
    seen = np.flatnonzero(levels > levels.max() - DEPTH)
    if seen[0] == 0 or seen[-1] == LOOK - 1:
        raise ValueError("kl_weight: expected a weight large enough for e^(r / kl_weight) to be integrable under the law, got one that still "
                         f"grows {FURTHEST:g} standard deviations away")
    return float(x[seen[0] - 1]), float(x[seen[-1] + 1]), float(levels.max())


# ---- the initial-law bias --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bridge:
    r"""X_T | X_t = x ~ N(m + Phi (x - alpha m), Gamma) under the pre-trained model in continuous time, Gaussian data N(m, C).

        Phi = alpha^{eta^2} (C / C_tau)^{(1 + eta^2)/2},      Gamma = C (I - (alpha^2 C / C_tau)^{eta^2}),      C_tau = alpha^2 C + v I

    Phi, Gamma, C_tau : (d, d)      alpha at tau = T - t      mean, start_mean : m, alpha m
    At eta = 1 the time reversal's regression of Y_0 on Y_tau, at eta = 0 the flow of the ODE; the marginals are p_tau at every eta.
    Source: theory.md, sections 2 and 9.   Checked: tests/test_tilt.py::test_bridge_against_fine_chains
    """

    Phi: Array
    Gamma: Array
    mean: Array
    start_mean: Array

    @classmethod
    def of(cls, problem: Problem, t: float = 0.0) -> Bridge:
        """From generation time t to the end."""
        data, schedule, e2 = problem.data, problem.schedule, problem.eta**2
        if not isinstance(data, Gaussian):
            raise ValueError(f"problem: expected Gaussian data for a bridge in closed form, got {type(data).__name__}")
        tau = schedule.tau(check.number("t", t, at_least=0))
        alpha, v = schedule.alpha(tau), schedule.v(tau)
        c, U = np.linalg.eigh(data.cov)
        noised = alpha**2 * c + v
        Phi = U * (alpha**e2 * (c / noised) ** (0.5 * (1 + e2))) @ U.T
        Gamma = U * (-c * np.expm1(e2 * np.log1p(-v / noised))) @ U.T
        return cls(Phi, Gamma, data.mean, alpha * data.mean)

    def centre(self, x: Array) -> Array:
        """E[X_T | X_t = x], (n, d) -> (n, d)."""
        return self.mean + (x - self.start_mean) @ self.Phi.T

    def log_phi(self, phi: Exponent) -> Exponent:
        """log E[phi(X_T) | X_t = x] as a function of x."""
        return phi.before(self.Phi, self.mean - self.Phi @ self.start_mean, self.Gamma)


@dataclass(frozen=True, eq=False)
class InitialBias:
    r"""The optimum's terminal law in continuous time against the tilt of the pre-trained terminal law.

    terminal : law of X_T of the optimum, weighted by 1/phi(0, X_0)      tilt : proportional to p_pre e^{r/lambda}
    kl : KL(terminal || tilt), nats, without cancellation      pretrained : law of X_T under P_pre
    Source: theory.md, section 9.   Checked: tests/test_tilt.py::test_initial_law_bias
    """

    terminal: Gaussian
    tilt: Gaussian
    pretrained: Gaussian
    kl: float


def initial_bias(problem: Problem) -> InitialBias:
    r"""The initial-law bias for Gaussian data and a quadratic reward, in closed form at every eta > 0 and every noising.

        M = (Gamma^{-1} + S)^{-1},   F = Gamma^{-1} Phi P_0 Phi' Gamma^{-1},   E = Gamma^{-1} - C_T^{-1},   C_T = Gamma + Phi P_0 Phi'
        cov = M + M F M,   tilt precision = M^{-1} - E,   their product I + e,   e = (F - E) M - E M F M,   F - E = Gamma^{-1} Phi P_0 Phi' E
        KL = 1/2 sum (e_j - log(1 + e_j)) + 1/2 |m_tilt - m|^2_{tilt precision},     m_tilt - m = (M^{-1} - E)^{-1} E (m - E_pre X_T)

    e is of fourth order in Phi and the difference of means of second: both are formed without subtracting what is equal. S = Q/lambda.
    Source: theory.md, section 9.   Checked: tests/test_tilt.py::test_initial_law_bias
    """
    require_doob(problem)
    reward, start = problem.reward.quadratic(problem.dim), problem.start_law
    if reward is None or not isinstance(start, Gaussian):
        raise ValueError("problem: expected Gaussian data and a quadratic reward for the initial-law bias, got "
                         f"{type(problem.data).__name__} and {type(problem.reward).__name__}")
    bridge, phi = Bridge.of(problem), Exponent.of(reward, problem.kl_weight)
    Phi, G, P = bridge.Phi, np.linalg.inv(bridge.Gamma), start.cov
    b, C_T = bridge.centre(start.mean[None])[0], bridge.Gamma + Phi @ P @ Phi.T
    M, across = phi.posterior(bridge.Gamma), G @ Phi @ P @ Phi.T
    F = across @ G
    E = across @ np.linalg.inv(C_T)
    mean, precision = M @ (G @ b + phi.w), np.linalg.inv(M) - E
    gap = np.linalg.solve(precision, E @ (mean - b))
    e = np.linalg.eigvals((across @ E - E @ M @ F) @ M).real
    kl = 0.5 * float(np.sum(e - np.log1p(e)) + gap @ precision @ gap)
    cov = M + M @ F @ M
    return InitialBias(Gaussian(mean, (cov + cov.T) / 2), phi.tilted(Gaussian(b, (C_T + C_T.T) / 2)), Gaussian(b, (C_T + C_T.T) / 2), kl)


# ---- in continuous time at eta = 1, any data on the line --------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ReversalOptimum:
    r"""The optimum in continuous time at eta = 1 on the line, where X_T given X_0 = x is the posterior of the data given noise.

        phi(0, x) = E[ e^{r(Y)/lambda} | alpha Y + sqrt(v) xi = x ],   objective = lambda E log phi(0, X_0),   path_kl = E*[r]/lambda - E log phi
        law of X_T = p_data(y) e^{r(y)/lambda} E_{X_0}[ N(X_0; alpha y, v) / (p_T(X_0) phi(0, X_0)) ]

    points, masses : (n,) of the law of X_T, masses sum to 1      tilt : (n,) of p_pre e^{r/lambda}/Z      bias : KL(law of X_T || tilt), nats
    Source: theory.md, section 9.   Checked: tests/test_tilt.py::test_reversal_optimum
    """

    objective: float
    expected_reward: float
    path_kl: float
    bias: float
    points: Array
    masses: Array
    tilt: Array


def reversal_optimum(problem: Problem) -> ReversalOptimum:
    r"""The continuous-time optimum of a 1-D problem at eta = 1 without a grid in time: two integrals, to 1e-12.

    Assumes the score of the data law, so that the reverse SDE is the time reversal of the noising; start "prior" or "exact".
    Source: theory.md, section 9.   Checked: tests/test_tilt.py::test_reversal_optimum
    """
    require_doob(problem)
    if problem.eta != 1:
        raise ValueError(f"eta: expected 1, where the model is the time reversal of the noising, got {problem.eta:g}")
    schedule, lam = problem.schedule, problem.kl_weight
    alpha, v = schedule.alpha(schedule.tau(0.0)), schedule.v(schedule.tau(0.0))
    y, tilted, level = line_rule(problem.data, lambda x: problem.reward.value(x[:, None]) / lam)
    x, start, _ = line_rule(problem.start_law, np.zeros_like)
    noise = -0.5 * (x[:, None] - alpha * y) ** 2 / v - 0.5 * np.log(2 * np.pi * v)
    joint = logsumexp(noise + np.log(np.maximum(tilted, 1e-300)) + level, axis=1)  # log of p_T phi
    p_T = problem.marginal(0.0).log_density(x[:, None])
    masses = tilted * (start @ np.exp(noise + level - joint[:, None]))
    tilted = tilted * (start @ np.exp(noise - p_T[:, None]))  # from the data's tilt to that of the pre-trained model
    tilted = tilted / tilted.sum()
    expected, log_phi = float(masses @ problem.reward.value(y[:, None])), float(start @ (joint - p_T))
    seen = masses > 1e-30
    bias = float(masses[seen] @ np.log(masses[seen] / tilted[seen]))
    return ReversalOptimum(lam * log_phi, expected, expected / lam - log_phi, bias, y, masses, tilted)


# ---- from samples ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Yardstick:
    r"""Optimal objective, reward and KL at one kl_weight, estimated from pre-trained samples by self-normalised weights.

        J* = lambda (logsumexp(r/lambda) - log n),      s.e. = lambda sd(w)/sqrt(n),      ESS = n^2 / sum w^2   (mean of w is 1)

    objective, reward (reward units), kl (nats), each with its standard error by the delta method; ess : of n samples
    weights : (n,), summing to n.   Regret of a model is objective - J(model): nats times kl_weight, that is reward units.
    Assumes a memoryless noising; a bound for every chain up to O(D).   Bias O(1/ESS): distrust it below an ESS of about 50.
    Source: theory.md, section 9.   Checked: tests/test_torch_yardstick.py::test_yardstick_is_the_exact_tilt
    """

    kl_weight: float
    objective: float
    objective_error: float
    reward: float
    reward_error: float
    kl: float
    kl_error: float
    ess: float
    weights: Array

    def mean(self, values: ArrayLike) -> float:
        """The optimum's expectation of anything known per sample, (n,): for instance the share that a judge accepts."""
        values = check.array("values", values, (len(self.weights),), f"({len(self.weights)},)")
        return float(np.mean(self.weights * values))


def yardstick(rewards: ArrayLike, kl_weight: float) -> Yardstick:
    r"""The optimum's numbers from the rewards (n,) of samples of the pre-trained model.

    Source: theory.md, section 9.   Checked: tests/test_torch_yardstick.py::test_yardstick_is_the_exact_tilt
    """
    r = check.array("rewards", rewards, (None,), "(n,)")
    kl_weight = check.number("kl_weight", kl_weight, above=0)
    if len(r) < 2:
        raise ValueError(f"rewards: expected at least 2 samples, got {len(r)}")
    n, scaled = len(r), r / kl_weight
    level = float(logsumexp(scaled) - np.log(n))
    w = np.exp(scaled - level)
    reward = float(np.mean(w * r))
    # Influence functions: J* = lambda log mean e^{r/lambda}, E*[r] = mean(w r), KL* = (E*[r] - J*)/lambda.
    on_objective, on_reward = kl_weight * (w - 1), w * (r - reward)
    errors = [float(np.std(f, ddof=1) / np.sqrt(n)) for f in (on_objective, on_reward, (on_reward - on_objective) / kl_weight)]
    return Yardstick(kl_weight, kl_weight * level, errors[0], reward, errors[1], (reward - kl_weight * level) / kl_weight, errors[2],
                     n / float(np.mean(w**2)), w)


def average(parts: Sequence[Yardstick]) -> Yardstick:
    r"""The mean over contexts (prompts, classes) of their yardsticks: every statement holds for each and on average; ess the least.

    weights : of the parts' samples taken in turn, the j-th of the k-th part at j + k m, m the number of parts
    Source: theory.md, section 1 (context).   Checked: tests/test_torch_yardstick.py::test_average_over_contexts
    """
    if len({len(part.weights) for part in parts}) != 1:
        raise ValueError(f"parts: expected as many samples of each context, got {', '.join(str(len(part.weights)) for part in parts)}")
    if len(parts) == 1:
        return parts[0]

    def mean(name: str) -> float:
        return float(np.mean([getattr(part, name) for part in parts]))

    def error(name: str) -> float:
        return float(np.sqrt(np.sum([getattr(part, name) ** 2 for part in parts])) / len(parts))

    return Yardstick(parts[0].kl_weight, mean("objective"), error("objective_error"), mean("reward"), error("reward_error"), mean("kl"),
                     error("kl_error"), min(part.ess for part in parts), np.stack([part.weights for part in parts], axis=1).ravel())


def ideal_frontier(rewards: ArrayLike, kl_weights: Sequence[float]) -> list[Yardstick]:
    r"""The ideal reward-KL frontier: no model at KL* nats has more reward than E*[r]; its slope dE*[r]/dKL* is kl_weight.

    Source: theory.md, section 9 (envelope).   Checked: tests/test_torch_yardstick.py::test_frontier_has_slope_lambda
    """
    return [yardstick(rewards, kl_weight) for kl_weight in kl_weights]
