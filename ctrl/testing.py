r"""For your own pytest: unbiasedness as an identity, means with stated error rates, and strategies of valid problems.

    def test_mine():
        ctrl.testing.assert_unbiased(my_estimator, problem, policy, problem.grid(steps=3))

    @given(ctrl.testing.setups(max_dim=2))
    def test_mine_everywhere(setup):
        ctrl.testing.assert_unbiased(my_estimator, *setup)

Strategies build constrained objects (positive definite, stable on their grid, kl_weight > 0); nothing is drawn and
rejected. Where an error cannot show, no test finds it: theory.md, section 16, says where that is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from ctrl import check, exact
from ctrl.check import Array
from ctrl.estimators import Gradient
from ctrl.evidence import FALSE_ALARM, MISS, MeanTest, estimate_test, mean_test
from ctrl.exact.chain import LinearChain
from ctrl.laws import Gaussian, GaussianMixture, Law
from ctrl.noise import Noise, NoiseLike
from ctrl.policy import AffinePolicy, BasisPolicy, MixturePolicy, Monomials, Policy, TimeBins
from ctrl.problem import Problem
from ctrl.reward import BumpReward, LinearReward, LogDensityReward, QuadraticReward, Reward
from ctrl.schedule import OU, VE, VP, FlowMatching, Schedule, SubVP, TimeGrid

MAX_PATTERNS = 2**18
ETAS = (0.3, 0.7, 1.0, 1.4, 2.0)

GradientEstimator = Callable[[Problem, Policy, TimeGrid, NoiseLike], Gradient]


# ---------------------------------------------------------------------------------------------- unbiasedness


def assert_unbiased(estimator: GradientEstimator, problem: Problem, policy: Policy, grid: TimeGrid,
                    tolerance: float = 1e-10) -> float:
    r"""Fail unless an estimator's expectation is the chain's exact gradient, without sampling.

        max_j | 2^{-v} sum_{signs} G_j(+-1, ..., +-1) - dJ/dtheta_j |  <=  tolerance |dJ/dtheta|,     v noise variables

    estimator : (problem, policy, grid, noise) -> Gradient, per path a polynomial of degree <= 3 in each noise variable
                (one that couples the paths of a batch, or has likelihood ratios or clips, is not: use assert_mean)
    returns   : the largest error relative to the gradient's norm

    Assumes Gaussian data, an affine policy, a quadratic reward, at most 2^18 sign patterns (ValueError otherwise).
    Warns where KL-gradient errors are invisible: kl_weight = 0, or a policy equal to the pre-trained one.
    Source: theory.md, sections 7 and 16.   Checked: tests/test_testing.py::test_assert_unbiased_accepts_and_rejects
    """
    tolerance = check.number("tolerance", tolerance, above=0)
    _require_cubic(problem, policy, grid)
    _require_few_patterns(problem, policy, grid)
    expected = exact.evaluate(problem, policy, grid).gradient.theta
    norm = float(np.linalg.norm(expected))
    if norm == 0:
        raise ValueError("policy: expected a gradient that is not zero (errors are relative to its norm), got 0")
    _warn_of_blindness(problem, policy, grid)
    measured = np.asarray(estimator(problem, policy, grid, Noise.signs(problem, policy, grid)).mean, dtype=np.float64)
    if measured.shape != expected.shape:
        raise ValueError(f"estimator: expected a mean like policy.theta, {expected.shape}, got {measured.shape}")
    error = np.abs(measured - expected) / norm
    worst = int(np.argmax(error))
    if not error[worst] <= tolerance:
        raise AssertionError("; ".join([
            f"biased: coordinate {worst} of {error.size} is {measured[worst]:.12g}, exact {expected[worst]:.12g}",
            f"error {error[worst]:.3g} of the gradient's norm {norm:.6g}, tolerance {tolerance:g}",
            *_hints(measured, problem, policy, grid)]))
    return float(error[worst])


_WHY = "sign patterns are exact for polynomials only"


def _require_cubic(problem: Problem, policy: Policy, grid: TimeGrid) -> None:
    """The premises under which sign patterns integrate the estimator exactly."""
    parts = policy.parts(grid)
    if not isinstance(problem.data, Gaussian):
        raise ValueError(f"problem: expected Gaussian data ({_WHY}), got {type(problem.data).__name__}")
    if parts is None or parts.laws is not None:
        raise ValueError(f"policy: expected a policy affine in x ({_WHY}), got {type(policy).__name__}")
    if problem.reward.quadratic(problem.dim) is None:
        raise ValueError(f"problem: expected a quadratic reward ({_WHY}), got {type(problem.reward).__name__}")


def _require_few_patterns(problem: Problem, policy: Policy, grid: TimeGrid) -> None:
    variables = problem.dim * (1 + grid.steps * ((problem.eta > 0) + (policy.exploration is not None)))
    if 2**variables > MAX_PATTERNS:
        sampled = "" if policy.exploration is None else ", or take mean actions"
        raise ValueError(f"grid: expected at most 2^18 sign patterns, got 2^{variables} (dimension {problem.dim}, "
                         f"{grid.steps} steps); reduce the problem's dimension or the steps{sampled}")


def _warn_of_blindness(problem: Problem, policy: Policy, grid: TimeGrid) -> None:
    """Section 16: where no KL-gradient error can show."""
    dK, dk = LinearChain(problem, policy, grid).departure
    if problem.kl_weight == 0 or not (np.any(dK) or np.any(dk)):
        why = "kl_weight = 0" if problem.kl_weight == 0 else "the policy is the pre-trained one"
        warnings.warn(f"errors in the KL gradient are invisible here: {why}", RuntimeWarning, stacklevel=3)


def _hints(measured: Array, problem: Problem, policy: Policy, grid: TimeGrid) -> list[str]:
    """Known wrong formulas whose exact expectation is what was measured."""
    right = exact.evaluate(problem, policy, grid).gradient.theta
    factor = float(measured @ right / (right @ right))
    wrong = _kl_mistakes(problem, policy, grid) | {f"the gradient times {factor:.6g}": factor * right}
    close = 1e-8 * max(float(np.linalg.norm(measured)), float(np.linalg.norm(right)))
    same = [name for name, value in wrong.items() if np.max(np.abs(measured - value)) <= close]
    return [f"this is the expectation of {name}" for name in same]


def _kl_mistakes(problem: Problem, policy: Policy, grid: TimeGrid) -> dict[str, Array]:
    """Exact expectations of the three ways to lose part of the KL gradient (theory.md, section 7, A to C)."""
    chain, c = LinearChain(problem, policy, grid), problem.coefficients(grid)
    (dK, dk), (m, P) = chain.departure, chain.moments
    pull = 2 * problem.kl_weight * c.discount * c.kappa * c.dt
    mean = -pull[:, None] * (np.einsum("kij,kj->ki", dK, m[:-1]) + dk)
    matrix = -pull[:, None, None] * (dK @ P[:-1]) + mean[:, :, None] * m[:-1, None, :]
    explicit = policy.pullback(grid, matrix, mean)
    reward = exact.evaluate(replace(problem, kl_weight=0.0), policy, grid).gradient.theta
    return {"costs in the return without their explicit gradient e_i": chain.gradient().theta - explicit,
            "e_i without the costs in the return": reward + explicit,
            "no KL gradient at all": reward}


# ---------------------------------------------------------------------------------------------- means


def assert_mean(samples: Array | Gradient, expected: Array | float, resolves: float, false_alarm: float = FALSE_ALARM,
                miss: float = MISS, batches: int | None = None) -> MeanTest:
    r"""Fail when the mean of independent samples is not what theory says; refuse when the test has no power.

        |mean_j - expected_j| <= z_alarm SE_j  for every j;     ValueError when (z_alarm + z_miss) max_j SE_j > resolves

    samples  : (n,) or (n, p), or a random Gradient      expected : a number or (p,)
    resolves : the smallest error that must be caught, in the samples' units
    false_alarm : probability of failing when all is right (all p coordinates together)
    miss     : probability of passing at an error of `resolves` in one coordinate
    batches  : average the samples in so many batches first, for heavy tails (likelihood ratios); costs little power

    The random standard error is allowed for (Student's law); from 30 samples or batches on the rates hold to 10 %.
    Source: theory.md, section 0.   Checked: tests/test_testing.py::test_default_rates_are_as_stated
    """
    resolves = check.number("resolves", resolves, above=0)
    for name, rate in (("false_alarm", false_alarm), ("miss", miss)):
        if not 0 < rate < 0.5:
            raise ValueError(f"{name}: expected a probability in (0, 0.5), got {rate!r:.80}")
    count, result = _tested(samples, expected, false_alarm, miss, batches)
    if result.resolves > resolves:
        enough = math.ceil(count * (result.resolves / resolves) ** 2)
        raise ValueError(f"samples: expected to resolve {resolves:g} (false alarm {false_alarm:g}, miss {miss:g}); "
                         f"{count} resolve {result.resolves:.3g}, about {enough} would do")
    if not result.holds:
        raise AssertionError(f"mean {result.mean:.8g}, expected {result.expected:.8g}, standard error "
                             f"{result.standard_error:.3g}: |z| = {abs(result.z):.3g} > {result.threshold:.3g}")
    return result


def _tested(samples: Array | Gradient, expected: Array | float, false_alarm: float, miss: float,
            batches: int | None) -> tuple[int, MeanTest]:
    """Number of independent samples, and the test of their mean."""
    if isinstance(samples, Gradient):
        if samples.exact or batches is not None:
            raise ValueError("samples: expected a Gradient from random noise and no batches, got "
                             + ("quadrature noise (use assert_unbiased)" if samples.exact else f"batches={batches}"))
        test = estimate_test(samples.mean, samples.standard_error, expected, false_alarm=false_alarm, miss=miss,
                             freedom=max(samples.count - 1, 1))
        return samples.count, test
    x = np.asarray(samples, dtype=np.float64)
    if x.ndim not in (1, 2) or len(x) < 2 or not np.all(np.isfinite(x)):
        raise ValueError(f"samples: expected finite numbers of shape (n,) or (n, p) with n >= 2, got shape {x.shape}, "
                         f"{np.count_nonzero(~np.isfinite(x))} NaN or infinite")
    return len(x), mean_test(_batch_means(x, batches), expected, false_alarm=false_alarm, miss=miss)


def _batch_means(x: Array, batches: int | None) -> Array:
    if batches is None:
        return x
    batches = check.integer("batches", batches, at_least=2)
    if len(x) % batches:
        raise ValueError(f"batches: expected a divisor of the {len(x)} samples, got {batches}")
    return x.reshape(batches, len(x) // batches, *x.shape[1:]).mean(axis=1)


# ---------------------------------------------------------------------------------------------- strategies: parts


def reals(low: float, high: float) -> st.SearchStrategy[float]:
    """One of 2001 evenly spaced numbers in [low, high] (no denormals); shrinks to the middle."""
    return st.integers(-1000, 1000).map(lambda i: 0.5 * (low + high) + 0.5 * (high - low) * i / 1000)


def vectors(dim: int, high: float) -> st.SearchStrategy[Array]:
    """(dim,) with entries in [-high, high]."""
    return st.lists(reals(-high, high), min_size=dim, max_size=dim).map(np.array)


@st.composite
def spd_matrices(draw: st.DrawFn, dim: int, low: float = 0.2, high: float = 1.5) -> Array:
    """Symmetric positive definite matrices (dim, dim): R diag R', R of plane rotations, eigenvalues in [low, high].

    Source: theory.md, section 1.   Checked: tests/test_testing.py::test_small_strategies_are_valid
    """
    rotation = np.eye(dim)
    for i in range(dim):
        for j in range(i + 1, dim):
            angle, plane = draw(reals(-1.5, 1.5)), np.eye(dim)
            plane[[i, j, i, j], [i, j, j, i]] = np.cos(angle), np.cos(angle), -np.sin(angle), np.sin(angle)
            rotation = rotation @ plane
    eigenvalues = np.array([draw(reals(low, high)) for _ in range(dim)])
    out = (rotation * eigenvalues) @ rotation.T
    return (out + out.T) / 2


@st.composite
def gaussians(draw: st.DrawFn, dim: int) -> Gaussian:
    """Gaussians with means in [-1.5, 1.5] and variances in [0.2, 1.5]."""
    return Gaussian(draw(vectors(dim, 1.5)), draw(spd_matrices(dim)))


@st.composite
def mixtures(draw: st.DrawFn, dim: int, max_components: int = 3) -> GaussianMixture:
    """Gaussian mixtures of 1 to max_components components with weights of at least 1/(5 components)."""
    count = draw(st.integers(1, max_components))
    laws = [draw(gaussians(dim)) for _ in range(count)]
    weights = np.array([draw(st.integers(1, 5)) for _ in range(count)], dtype=np.float64)
    return GaussianMixture(weights / weights.sum(), np.stack([a.mean for a in laws]), np.stack([a.cov for a in laws]))


def schedules() -> st.SearchStrategy[Schedule]:
    """VP, sub-VP, OU and VE with moderate rates, horizons in [0.5, 1.5]; straight paths up to tau = .5 ... .9."""
    low, high, horizon = reals(0.1, 1.0), reals(1.0, 4.0), reals(0.5, 1.5)
    return st.one_of(st.builds(VP, low, high, horizon), st.builds(SubVP, low, high, horizon),
                     st.builds(OU, reals(0.5, 3.0), horizon), st.builds(VE, reals(0.1, 0.5), reals(1.0, 2.0), horizon),
                     st.builds(FlowMatching, reals(0.5, 0.9)))


@st.composite
def rewards(draw: st.DrawFn, dim: int, linear: bool = True) -> Reward:
    """Quadratic (concave), linear, Gaussian log-density; with linear=False also bumps and mixture log-densities."""
    kind = draw(st.sampled_from(("quadratic", "linear", "gaussian") + (() if linear else ("bump", "mixture"))))
    if kind == "quadratic":
        return QuadraticReward(draw(spd_matrices(dim)), draw(vectors(dim, 1.5)), draw(vectors(dim, 0.5)))
    if kind == "linear":
        direction = draw(vectors(dim, 1.0))
        return LinearReward(direction + np.where(direction < 0, -0.2, 0.2))
    if kind == "bump":
        return BumpReward(draw(vectors(dim, 1.0)), draw(reals(0.5, 1.5)))
    law: Law = draw(gaussians(dim)) if kind == "gaussian" else draw(mixtures(dim))
    return LogDensityReward(law)


# ---------------------------------------------------------------------------------------------- strategies: wholes


@st.composite
def problems(draw: st.DrawFn, *, dim: int | None = None, max_dim: int = 2, etas: Sequence[float] = ETAS,
             linear: bool = True, starts: Sequence[str] = ("prior", "exact"),
             discounts: Sequence[float] = (0.0, 0.6)) -> Problem:
    """Problems with kl_weight in [0.1, 2]; linear: Gaussian data and quadratic rewards only (the exact chain applies).

    Source: theory.md, section 1.   Checked: tests/test_testing.py::test_setups_are_valid
    """
    d = draw(st.integers(1, max_dim)) if dim is None else dim
    data: Law = draw(gaussians(d) if linear else st.one_of(gaussians(d), mixtures(d)))
    return Problem(
        schedule=draw(schedules()), data=data, reward=draw(rewards(d, linear)), kl_weight=draw(reals(0.1, 2.0)),
        eta=draw(st.sampled_from(tuple(etas))), start=draw(st.sampled_from(tuple(starts))),
        discount=draw(st.sampled_from(tuple(discounts))))


@st.composite
def grids(draw: st.DrawFn, problem: Problem, *, max_steps: int = 5, sampled: bool = False,
          max_patterns: int = 2**14) -> TimeGrid:
    """Uniform and uneven grids, ending at T or before, on which the pre-trained chain contracts.

    Steps are few enough for max_patterns sign patterns (sampled: with action noise), and short enough that
    1 - D f + D h K >= 0.1 in every direction and |D f| <= 1: policies() stay stable on them.
    Source: theory.md, section 1.   Checked: tests/test_testing.py::test_setups_are_valid
    """
    per_step = problem.dim * ((problem.eta > 0) + sampled)
    most = max_steps if per_step == 0 else (int(math.log2(max_patterns)) - problem.dim) // per_step
    steps = draw(st.integers(1, max(1, min(max_steps, most))))
    lengths = np.array([draw(st.integers(1, 4)) for _ in range(steps)], dtype=np.float64)
    end = problem.horizon * draw(st.sampled_from((1.0, 0.9)))
    times = end * np.append(0.0, np.cumsum(lengths) / lengths.sum())
    while not _contracts(problem, grid := TimeGrid(times)):
        times = 0.7 * times
    return grid


def _contracts(problem: Problem, grid: TimeGrid) -> bool:
    c = problem.coefficients(grid)
    return problem.stability_factor(problem.pretrained(grid), grid) >= 0.1 and bool(np.all(np.abs(c.dt * c.f) <= 1))


@st.composite
def policies(draw: st.DrawFn, problem: Problem, grid: TimeGrid | None = None, *,
             sampled: bool | None = False) -> Policy:
    """Policies that depart from the score, also through x: shift, scaled, basis functions; with a grid AffinePolicy.

    sampled : True with exploration, False without, None either.   Mixture data: MixturePolicy with moved means, too.
    The departure's slope is at most half of the smallest slope of the score, so that grids() keep the chain stable.
    Source: theory.md, section 1.   Checked: tests/test_testing.py::test_setups_are_valid
    """
    gaussian = isinstance(problem.data, Gaussian)
    kinds = ["functions", "functions", "shift"] + (["scaled"] if gaussian else ["mixture"])
    kind = draw(st.sampled_from(kinds + (["affine", "affine"] if gaussian and grid is not None else [])))
    explores = draw(st.booleans()) if sampled is None else sampled
    policy = _mean_policy(draw, kind, problem, grid)
    return policy.with_exploration(draw(spd_matrices(problem.dim, 0.1, 0.8))) if explores else policy


def _mean_policy(draw: st.DrawFn, kind: str, problem: Problem, grid: TimeGrid | None) -> Policy:
    d, shift = problem.dim, draw(vectors(problem.dim, 0.5)) + 0.1
    if kind == "shift":
        return BasisPolicy.shift(problem, shift)
    if kind == "scaled":
        return BasisPolicy.scaled(problem, draw(st.sampled_from((0.6, 0.8, 0.9, 1.2))), shift)
    if kind == "mixture":
        assert isinstance(problem.data, GaussianMixture)
        moved = GaussianMixture(problem.data.weights, problem.data.means + shift, problem.data.covs)
        return MixturePolicy(problem.schedule, moved)
    room = 0.5 / d / _largest_variance(problem)
    if kind == "functions":
        T = problem.horizon
        choices: list[Monomials | TimeBins] = [Monomials(0, T), Monomials(1, T), TimeBins(2, T)]
        functions = draw(st.sampled_from(choices))
        count = len(functions(0.0))
        return BasisPolicy(problem, functions, draw(_slopes(count, d, room / count)), np.stack([shift] * count))
    assert grid is not None
    pre = problem.pretrained(grid)
    assert isinstance(pre, AffinePolicy)
    return AffinePolicy(pre.K + draw(_slopes(grid.steps, d, room)), pre.k + shift)


@st.composite
def _slopes(draw: st.DrawFn, count: int, dim: int, high: float) -> Array:
    """(count, dim, dim), not symmetric; magnitudes of entries in [high/2, high]."""
    entries = draw(vectors(dim * dim * count, 0.5 * high)).reshape(count, dim, dim)
    return entries + np.where(entries < 0, -0.5, 0.5) * high


def _largest_variance(problem: Problem) -> float:
    """Of the noised data law in any direction, at any time: for a Gaussian 1 / the smallest slope of the score."""
    laws = [problem.marginal(t) for t in np.linspace(0.0, problem.horizon, 9)]
    return max(float(np.linalg.eigvalsh(law.cov)[-1]) for law in laws)


class Setup(NamedTuple):
    """What an estimator takes, but for the noise."""

    problem: Problem
    policy: Policy
    grid: TimeGrid


@st.composite
def setups(draw: st.DrawFn, *, dim: int | None = None, max_dim: int = 2, etas: Sequence[float] = ETAS,
           linear: bool = True, sampled: bool = False, max_steps: int = 5, max_patterns: int = 2**14) -> Setup:
    """A problem, a policy and a grid that fit together; at most max_patterns sign patterns.

    Source: theory.md, section 1.   Checked: tests/test_testing.py::test_setups_are_valid
    """
    problem = draw(problems(dim=dim, max_dim=max_dim, etas=etas, linear=linear))
    grid = draw(grids(problem, max_steps=max_steps, sampled=sampled, max_patterns=max_patterns))
    return Setup(problem, draw(policies(problem, grid, sampled=sampled)), grid)
