"""Estimators: unbiased as an identity where noise is quadrature, spreads against exact covariances, every planted error caught."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given

import ctrl
from ctrl import estimators, zoo
from ctrl.estimators import (
    ActionNoise,
    AdjointMatching,
    FiniteDifference,
    LeaveOneOut,
    Pathwise,
    RewardToGo,
    ScoreFunction,
    TemporalDifference,
    ValueGradient,
)
from ctrl.estimators import contract
from ctrl.evidence import fitted_order
from ctrl.policy import Monomials, TimeBins
from ctrl.testing import assert_mean, assert_unbiased, setups

# ------------------------------------------------------------------------------------------- unbiased on sign patterns


def score_forms(value):
    """Every estimator that needs eta > 0."""
    return [form(baseline, sampled_kl) for form in (ScoreFunction, RewardToGo) for sampled_kl in (False, True)
            for baseline in (None, 0.7, value, LeaveOneOut())] + [TemporalDifference(value)]


def forms_for_every_eta(value, policy):
    action = [] if policy.exploration is None else [ActionNoise(), ActionNoise(reward_to_go=True)]
    return [ValueGradient(value), Pathwise(), *action]


def unbiased_forms(problem, policy, grid):
    value = ctrl.exact.value(problem, policy, grid)
    return forms_for_every_eta(value, policy) + (score_forms(value) if problem.eta > 0 else [])


@given(setups(max_patterns=2**12))
def test_unbiased_on_sign_patterns(setup):
    for estimator in unbiased_forms(*setup):
        assert_unbiased(estimator, *setup)


@given(setups(sampled=True, max_patterns=2**12))
def test_unbiased_with_sampled_actions(setup):
    for estimator in unbiased_forms(*setup):
        assert_unbiased(estimator, *setup)


@given(setups(etas=(0.0,)))
def test_unbiased_at_eta_zero(setup):
    sampled = setup._replace(policy=setup.policy.with_exploration(0.3 * np.eye(setup.problem.dim)))
    for case in (setup, sampled):
        for estimator in unbiased_forms(*case):
            assert_unbiased(estimator, *case)


@pytest.mark.parametrize("name", ["ScoreFunction", "RewardToGo", "LeaveOneOut", "TemporalDifference"])
def test_score_forms_refuse_eta_zero(name):
    problem, policy, grid = bench(eta=0.0)
    estimator = {"ScoreFunction": ScoreFunction(), "RewardToGo": RewardToGo(sampled_kl=True),
                 "LeaveOneOut": RewardToGo(LeaveOneOut()),
                 "TemporalDifference": TemporalDifference(ctrl.exact.value(problem, policy, grid))}[name]
    with pytest.raises(ValueError, match="eta"):
        estimator(problem, policy, grid, ctrl.Noise(0, 8))


def test_action_noise_refuses_mean_actions():
    with pytest.raises(ValueError, match="exploration"):
        ActionNoise()(*bench(), ctrl.Noise(0, 8))


def test_unbiased_by_weighted_nodes():
    """Four Gauss-Hermite nodes have unequal weights: the weighted mean is the same gradient."""
    problem, policy, grid = bench(steps=2, dim=1)
    expected = ctrl.exact.evaluate(problem, policy, grid).gradient.theta
    noise = ctrl.Noise.gauss_hermite(problem, policy, grid, nodes=4)
    for estimator in unbiased_forms(problem, policy, grid):
        result = estimator(problem, policy, grid, noise)
        assert np.max(np.abs(result.mean - expected)) <= 1e-10 * np.linalg.norm(expected)
        assert np.all(result.standard_error == 0) and result.exact


# ------------------------------------------------------------------------------------------- planted errors


def bench(eta=0.7, steps=3, dim=2, sampled=False, kl_weight=0.5):
    """Where every planted error of section 7 is an error: eta != 1, d = 2, an uneven grid, a departure through x."""
    data = ctrl.Gaussian(np.array([1.0, -0.5])[:dim], np.array([[0.6, 0.2], [0.2, 0.3]])[:dim, :dim])
    reward = ctrl.QuadraticReward(np.diag([1.0, 0.5])[:dim, :dim], np.array([-0.5, 1.0])[:dim])
    problem = ctrl.Problem(ctrl.VP(0.5, 2.0, 1.0), data, reward, kl_weight=kl_weight, eta=eta)
    W = np.array([[[0.3, -0.2], [0.1, 0.2]]])[:, :dim, :dim]
    policy = ctrl.BasisPolicy(problem, lambda t: np.array([1.0]), W, np.array([[0.2, -0.1]])[:, :dim],
                              0.4 * np.eye(dim) if sampled else None)
    return problem, policy, ctrl.TimeGrid(np.array([0.0, 0.3, 0.5, 0.75, 0.9, 1.0])[[*range(steps), -1]])


class CostsWithoutTheirGradient(RewardToGo):
    """(A) reward folding: the cost is in G, e_i is missing."""

    def _weighted(self, run, returns):
        return returns[:, :, None] * run.score_noise


class LossOnDetachedStates(ScoreFunction):
    """(B) e_i, but the cost is not in G."""

    def returns(self, run):
        return np.broadcast_to(run.reward[:, None], run.cost.shape)


class NoKLGradient(LossOnDetachedStates):
    """(C) neither."""

    def _weighted(self, run, returns):
        return returns[:, :, None] * run.score_noise


class SampledCostsAndTheirGradient(ScoreFunction):
    """k1 in the return and e_i on top: the explicit gradient twice."""

    def returns(self, run):
        return np.broadcast_to((run.reward - run.sampled_cost.sum(axis=1))[:, None], run.cost.shape)


@dataclass(frozen=True, eq=False)
class OtherNoise(RewardToGo):
    """sigma_i made from something else than h sqrt(D)/(eta g) xi_i."""

    def noise(self, run):
        raise NotImplementedError

    def _weighted(self, run, returns):
        return returns[:, :, None] * self.noise(run) + run.kl_term


class NoRootOfTheStep(OtherNoise):
    def noise(self, run):
        return run.score_noise / np.sqrt(run.coefficients.dt)[:, None]


class NextStepsNoise(OtherNoise):
    def noise(self, run):
        c = run.coefficients
        return (c.h * c.dt / c.noise)[:, None] * np.roll(run.xi, -1, axis=1)


class VolatilityForControl(OtherNoise):
    """g in the place of h/(eta g)."""

    def noise(self, run):
        return np.sqrt(run.coefficients.g2 * run.coefficients.dt)[:, None] * run.xi


class MeanOverDimensions(OtherNoise):
    def noise(self, run):
        return run.score_noise / run.problem.dim


class MeanOverSteps(RewardToGo):
    def _weighted(self, run, returns):
        return super()._weighted(run, returns) / run.grid.steps


@dataclass(frozen=True, eq=False)
class BaselineThatLooksAhead(RewardToGo):
    """b = V_{i+1}(X_{i+1}), which knows xi_i."""

    def cotangents(self, run):
        ahead = np.stack([run.discounted(self.baseline, i + 1) for i in range(run.grid.steps)], axis=1)
        return self._weighted(run, self.returns(run) - ahead)


class ActionReturnsAfterTheStep(ActionNoise):
    """G_{i+1} with action noise: the cost of step i depends on its action, so it belongs in the return."""

    def cotangents(self, run):
        from_here = run.reward[:, None] - np.cumsum(run.cost[:, ::-1], axis=1)[:, ::-1]
        score = ActionNoise(reward_to_go=True).cotangents(run) / from_here[:, :, None]
        return score * (from_here + run.cost)[:, :, None]


class ActionNoiseAndExplicitGradient(ActionNoise):
    """The cost of a sampled action is in the return; e_i counts its gradient twice."""

    def cotangents(self, run):
        return super().cotangents(run) + run.kl_term


class PrefixOfSteps(RewardToGo):
    """A deterministic prefix of the steps, the rest dropped."""

    def cotangents(self, run):
        u = super().cotangents(run)
        u[:, run.grid.steps // 2 + 1:] = 0
        return u


PLANTED = [CostsWithoutTheirGradient(), LossOnDetachedStates(), NoKLGradient(), SampledCostsAndTheirGradient(), NoRootOfTheStep(),
           NextStepsNoise(), VolatilityForControl(), MeanOverDimensions(), MeanOverSteps(), Pathwise(last=1), AdjointMatching(),
           PrefixOfSteps()]


@pytest.mark.parametrize("wrong", PLANTED, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("sampled", [False, True], ids=["mean actions", "sampled actions"])
def test_planted_errors_are_rejected(wrong, sampled):
    setup = bench(sampled=sampled)
    with pytest.raises(AssertionError, match="biased"):
        assert_unbiased(wrong, *setup, tolerance=1e-3)


@pytest.mark.parametrize("eta", [0.7, 1.0])
def test_planted_baseline_that_looks_ahead_is_rejected(eta):
    setup = bench(eta=eta)
    with pytest.raises(AssertionError, match="biased"):
        assert_unbiased(BaselineThatLooksAhead(ctrl.exact.value(*setup)), *setup, tolerance=1e-3)


@pytest.mark.parametrize("wrong", [ActionReturnsAfterTheStep(), ActionNoiseAndExplicitGradient()],
                         ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_planted_action_noise_is_rejected(wrong, eta):
    setup = bench(eta=eta, sampled=True, steps=2)
    with pytest.raises(AssertionError, match="biased"):
        assert_unbiased(wrong, *setup, tolerance=1e-3)


def test_planted_errors_are_invisible_where_section_16_says():
    """g for h/(eta g) at eta = 1; mean over dimensions at d = 1; the lean adjoint for a constant shift."""
    assert_unbiased(VolatilityForControl(), *bench(eta=1.0))
    assert_unbiased(MeanOverDimensions(), *bench(dim=1))
    problem, _, grid = bench()
    assert_unbiased(AdjointMatching(), problem, ctrl.BasisPolicy.shift(problem, [0.2, -0.1]), grid)


# ------------------------------------------------------------------------------------------- estimators that couple paths


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of hand-made noise, without weights: rows of a quadrature rule as if they had been drawn."""

    start_nodes: np.ndarray
    step_nodes: np.ndarray
    weights: None = None
    group: int = 1

    @property
    def paths(self):
        return len(self.start_nodes)

    def start(self, d):
        return self.start_nodes

    def steps(self, k, d):
        return self.step_nodes

    def __getitem__(self, part):
        return replace(self, start_nodes=self.start_nodes[part], step_nodes=self.step_nodes[part])


def over_products_of_two_paths(estimator, problem, policy, grid):
    """Expectation of an estimator on batches of n = 2: the mean over all ordered pairs of sign patterns."""
    rule = ctrl.Noise.signs(problem, policy, grid)
    start, steps = rule.start(problem.dim), rule.steps(grid.steps, problem.dim)
    pairs = [Batch(start[[a, b]], steps[[a, b]]) for a in range(rule.paths) for b in range(rule.paths)]
    return np.mean([estimator(problem, policy, grid, pair).mean for pair in pairs], axis=0)


class OwnMean(ScoreFunction):
    """The planted baseline: the batch mean, the path itself included."""

    def cotangents(self, run):
        returns = self.returns(run)
        return self._weighted(run, returns - returns.mean(axis=0))


@pytest.mark.parametrize("form", [ScoreFunction, RewardToGo])
@pytest.mark.parametrize("sampled_kl", [False, True])
def test_leave_one_out_on_products_of_two_paths(form, sampled_kl):
    setup = bench(steps=2, dim=1)
    expected = ctrl.exact.evaluate(*setup).gradient.theta
    measured = over_products_of_two_paths(form(LeaveOneOut(), sampled_kl), *setup)
    assert np.max(np.abs(measured - expected)) <= 1e-10 * np.linalg.norm(expected)


def test_planted_own_mean_is_off_by_its_factor():
    """The own-mean baseline shrinks the score part by 1 - 1/n = 1/2, and leaves e_i as it is."""
    for kl_weight in (0.0, 0.5):
        problem, policy, grid = bench(steps=2, dim=1, kl_weight=kl_weight)
        expected = ctrl.exact.evaluate(problem, policy, grid).gradient.theta
        signs = ctrl.Noise.signs(problem, policy, grid)
        score_part = CostsWithoutTheirGradient()(problem, policy, grid, signs).mean
        predicted = 0.5 * score_part + (expected - score_part)
        measured = over_products_of_two_paths(OwnMean(), problem, policy, grid)
        assert np.max(np.abs(measured - predicted)) <= 1e-10 * np.linalg.norm(expected)
        assert np.max(np.abs(measured - expected)) > 0.1 * np.linalg.norm(expected)


def test_leave_one_out_refuses_pairs_and_single_paths():
    for noise in (ctrl.Noise(0, 8, antithetic=True), ctrl.Noise(0, 1)):
        with pytest.raises(ValueError, match="leave-one-out"):
            ScoreFunction(LeaveOneOut())(*bench(), noise)


# ------------------------------------------------------------------------------------------- finite differences


def fd_errors(policy, problem, grid, epsilons):
    """Exact bias of central differences, relative to the gradient's norm, for each epsilon."""
    expected = ctrl.exact.evaluate(problem, policy, grid).gradient.theta
    noise = ctrl.Noise.signs(problem, policy, grid)
    means = [FiniteDifference(e)(problem, policy, grid, noise).mean for e in epsilons]
    return np.array([np.max(np.abs(mean - expected)) for mean in means]) / np.linalg.norm(expected)


def test_finite_difference_bias_is_second_order():
    problem, policy, grid = bench()
    epsilons = 0.2 * 0.5 ** np.arange(6)
    error = fd_errors(policy, problem, grid, epsilons)
    assert error[0] > 1e-4
    order = fitted_order(epsilons, error)
    assert abs(order.slope - 2) <= 4 * order.standard_error + 1e-2
    assert abs(np.log2(error[-2] / error[-1]) - 2) < 1e-2


def test_finite_difference_is_unbiased_for_a_constant_shift():
    problem, _, grid = bench()
    error = fd_errors(ctrl.BasisPolicy.shift(problem, [0.2, -0.1]), problem, grid, [1.0, 0.1])
    assert np.all(error <= 1e-10)


def test_planted_one_sided_difference_is_first_order():
    problem, _, grid = bench()
    policy = ctrl.BasisPolicy.shift(problem, [0.2, -0.1])
    noise = ctrl.Noise.signs(problem, policy, grid)
    expected = ctrl.exact.evaluate(problem, policy, grid).gradient.theta[0]
    base = ctrl.simulate(problem, policy, grid, noise).objective.mean()
    gaps = [(ctrl.simulate(problem, policy.with_theta([0.2 + e, -0.1]), grid, noise).objective.mean() - base) / e - expected
            for e in (0.2, 0.1)]
    assert abs(gaps[0] / gaps[1] - 2) < 1e-6 and abs(gaps[1]) > 1e-3


# ------------------------------------------------------------------------------------------- moments


def test_streamed_moments_equal_samples(monkeypatch):
    """Chunks of a few paths and no kept samples: the same mean, covariance and standard error to rounding."""
    problem, policy, grid = bench()
    for noise in (ctrl.Noise(3, 1000), ctrl.Noise(3, 1000, antithetic=True), ctrl.Noise.signs(problem, policy, grid),
                  ctrl.Noise.gauss_hermite(*bench(steps=1), nodes=3)):
        setup = bench(steps=1) if noise.weights is not None and noise.paths == 81 else (problem, policy, grid)
        whole = Pathwise()(*setup, noise)
        with monkeypatch.context() as patch:
            patch.setattr(contract, "SAMPLES_LIMIT", 0)
            patch.setattr(contract, "CHUNK_BYTES", 2000)
            streamed = Pathwise()(*setup, noise)
        assert streamed.samples is None and whole.samples.shape == (noise.paths // noise.group, 6)
        assert whole.count == streamed.count == len(whole.samples)
        for name in ("mean", "covariance", "standard_error"):
            np.testing.assert_allclose(getattr(streamed, name), getattr(whole, name), rtol=1e-11, atol=1e-13)
        if noise.weights is None:
            np.testing.assert_allclose(whole.mean, whole.samples.mean(axis=0), rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(whole.covariance, np.cov(whole.samples.T), rtol=1e-11, atol=1e-13)


def test_weighted_moments_are_those_of_the_rule():
    samples, weights = np.array([[0.0, 1.0], [2.0, 5.0], [4.0, -1.0]]), np.array([0.25, 0.5, 0.25])
    gradient = ctrl.Gradient.from_samples(samples, weights)
    mean = weights @ samples
    np.testing.assert_allclose(gradient.mean, mean, rtol=1e-15)
    np.testing.assert_allclose(gradient.covariance, (weights[:, None] * (samples - mean)).T @ (samples - mean), rtol=1e-14)


def test_antithetic_standard_error_is_that_of_pairs():
    """By hand, path by path; treating partners as independent would state another error (the planted one)."""
    problem, policy, grid = bench()
    noise = ctrl.Noise(5, 4000, antithetic=True)
    gradient = Pathwise()(problem, policy, grid, noise)
    run = next(iter(estimators.runs(problem, policy, grid, noise)))
    paths = Pathwise().samples(run)
    pairs = 0.5 * (paths[0::2] + paths[1::2])
    np.testing.assert_allclose(gradient.standard_error, pairs.std(axis=0, ddof=1) / np.sqrt(2000), rtol=1e-11)
    as_if_independent = paths.std(axis=0, ddof=1) / np.sqrt(4000)
    assert np.max(np.abs(as_if_independent / gradient.standard_error - 1)) > 0.2


# ------------------------------------------------------------------------------------------- covariances of section 17


class Remembered:
    """A value function that answers a repeated question about the same states from memory."""

    def __init__(self, value):
        self.value, self.known = value, {}

    def _ask(self, question, i, x):
        at, answer = self.known.get((question, i), (None, None))
        if at is None or at.shape != x.shape or not np.array_equal(at, x):
            answer = getattr(self.value, question)(i, x)
            self.known[question, i] = x.copy(), answer
        return answer

    def __call__(self, i, x):
        return self._ask("__call__", i, x)

    def gradient(self, i, x):
        return self._ask("gradient", i, x)


def polynomial_of_noise(problem, policy, grid):
    """G = z'Mz + b'z + c, score (d, m) and e = E z + e0 of a policy with unit shift Jacobian; z all normals, (m,).

    score sums h sqrt(D)/(eta g) xi for mean actions, Sigma^{-1}(a - mu) for sampled ones; e is zero for the latter.
    """
    d, N, co = problem.dim, grid.steps, problem.coefficients(grid)
    parts, pre, factor = policy.parts(grid), problem.pretrained(grid).parts(grid), policy.exploration_factor(grid)
    m = d * (1 + N + (N if factor is not None else 0))
    at = np.eye(m).reshape(-1, d, m)
    x, x0 = np.linalg.cholesky(problem.start_law.cov) @ at[0], problem.start_law.mean
    b, c, score, E, e0, rows = np.zeros(m), 0.0, np.zeros((d, m)), np.zeros((d, m)), np.zeros(d), []
    for i in range(N):
        a, a0 = parts.K[i] @ x, parts.K[i] @ x0 + parts.k[i]
        if factor is not None:
            a = a + factor[i] @ at[1 + N + i]
        u, u0, weight = a - pre.K[i] @ x, a0 - pre.K[i] @ x0 - pre.k[i], problem.kl_weight * co.kappa[i] * co.dt[i]
        b, c = b - 2 * weight * u0 @ u, c - weight * u0 @ u0
        rows.append(np.sqrt(weight) * u)
        if factor is None:
            score, E, e0 = score + co.h[i] * co.dt[i] / co.noise[i] * at[1 + i], E - 2 * weight * u, e0 - 2 * weight * u0
        else:
            score = score + np.linalg.inv(factor[i]).T @ at[1 + N + i]
        keep, gain = 1 - co.dt[i] * co.f[i], co.h[i] * co.dt[i]
        x, x0 = keep * x + gain * a + co.noise[i] * at[1 + i], keep * x0 + gain * a0
    r = problem.reward.quadratic(d)
    U = np.concatenate(rows)
    M, b = -U.T @ U - 0.5 * x.T @ r.matrix @ x, b + (r.vector - r.matrix @ x0) @ x
    return M, b, c - 0.5 * x0 @ r.matrix @ x0 + r.vector @ x0 + r.constant, score, E, e0


def exact_variance(M, b, c, s, e, e0):
    """Variance of (s'z)(z'Mz + b'z + c) + e'z + e0: given t = s'z/|s| it is quadratic in the rest; then 8 nodes in t."""
    length = np.linalg.norm(s)
    mirror = s / length - (np.arange(len(s)) == 0)
    mirror *= np.sqrt(2 / (mirror @ mirror))
    M, b, e = M - np.outer(mirror, mirror @ M), b - mirror * (mirror @ b), e - mirror * (mirror @ e)
    M = M - np.outer(M @ mirror, mirror)
    t, w = np.polynomial.hermite_e.hermegauss(8)
    rest = M[1:, 1:]
    mean = length * t * (c + b[0] * t + M[0, 0] * t**2 + np.trace(rest)) + e[0] * t + e0
    linear = length * t[:, None] * (b[1:] + 2 * t[:, None] * M[0, 1:]) + e[1:]
    variance = np.sum(linear**2, axis=1) + 2 * (length * t) ** 2 * np.sum(rest**2)
    w = w / w.sum()
    return w @ variance + w @ mean**2 - (w @ mean) ** 2


def exact_trace(problem, policy, grid):
    M, b, c, score, E, e0 = polynomial_of_noise(problem, policy, grid)
    return sum(exact_variance(M, b, c, score[j], E[j], e0[j]) for j in range(problem.dim))


def reference(steps, exploration=None):
    """Section 17's policy: K = 0.9 K_pre, k = k_pre + (.1, .1); the shift is its theta[1:]."""
    problem = zoo.gaussian_pull_2d()
    return problem, ctrl.BasisPolicy.scaled(problem, 0.9, [0.1, 0.1], exploration), problem.grid(steps)


@pytest.mark.parametrize("sampled", [False, True])
def test_exact_trace_is_that_of_four_nodes(sampled):
    """The closed variance against the estimators' covariance under a rule that is exact for degree 7."""
    problem, _, _ = bench(dim=1)
    policy, grid = ctrl.BasisPolicy.shift(problem, [0.2], [[0.4]] if sampled else None), bench(steps=2)[2]
    noise = ctrl.Noise.gauss_hermite(problem, policy, grid, nodes=4)
    estimator = ActionNoise() if sampled else ScoreFunction()
    measured = np.trace(estimator(problem, policy, grid, noise).covariance)
    np.testing.assert_allclose(measured, exact_trace(problem, policy, grid), rtol=1e-11)


def test_trace_of_the_score_function():
    assert abs(exact_trace(*reference(160)) - 131.5) < 0.05


@pytest.mark.parametrize("steps, expected", [(20, 1507), (40, 2668), (80, 5015), (160, 9720)])
def test_trace_of_action_noise(steps, expected):
    assert abs(exact_trace(*reference(steps, np.eye(2))) - expected) < 0.6


TRACES = {"reward-to-go": (128.5, 0.15), "with V": (24.2, 0.25), "temporal difference": (1.00, 0.07),
          "value gradient": (0.844, 0.07), "pathwise": (2.85, 0.07)}


@lru_cache(maxsize=1)
def squared_errors():
    """|G_m - dJ/dshift|^2 per path, whose expectation is the covariance's trace; one simulation for all estimators."""
    problem, policy, grid = reference(160)
    value = Remembered(ctrl.exact.value(problem, policy, grid))
    forms = {"reward-to-go": RewardToGo(), "with V": RewardToGo(value), "temporal difference": TemporalDifference(value),
             "value gradient": ValueGradient(value), "pathwise": Pathwise()}
    expected = ctrl.exact.evaluate(problem, policy, grid).gradient.theta[1:]
    out = {name: [] for name in forms}
    for run in estimators.runs(problem, policy, grid, ctrl.Noise(17, 40_000)):
        for name, form in forms.items():
            out[name].append(np.sum((form.cotangents(run).sum(axis=1) - expected) ** 2, axis=1))
    return {name: np.concatenate(parts) for name, parts in out.items()}


@pytest.mark.parametrize("name", TRACES)
def test_traces_by_simulation(name):
    """False alarm 1e-6; the relative error that is caught with probability 0.999 stands in TRACES."""
    expected, resolved = TRACES[name]
    assert_mean(squared_errors()[name], expected, resolves=resolved * expected, batches=400)


def test_planted_traces_are_rejected():
    """Neighbouring rows of the table exchanged: 24.2 for reward-to-go, 0.844 for the temporal difference."""
    for name, other in (("reward-to-go", "with V"), ("temporal difference", "value gradient")):
        with pytest.raises(AssertionError, match="standard error"):
            assert_mean(squared_errors()[name], TRACES[other][0], resolves=TRACES[name][1] * TRACES[name][0], batches=400)


# ------------------------------------------------------------------------------------------- beyond affine policies


def mixture_setup(kind):
    problem = zoo.mixture_bump_1d(eta=0.7)
    if kind == "mixture":
        law = ctrl.GaussianMixture(problem.data.weights, problem.data.means - 0.15, problem.data.covs)
        return problem, ctrl.MixturePolicy(problem.schedule, law), problem.grid(30)
    return problem, ctrl.CallablePolicy(lambda t, x, theta: problem.score(t, x) + theta[0] * np.cos(x) + theta[1] * x,
                                        [-0.15, 0.1], dim=1), problem.grid(30)


RESOLVES = {"with V": 0.3, "temporal difference": 0.15, "value gradient": 0.15, "pathwise": 0.6}


@lru_cache(maxsize=2)
def mixture_truth(kind):
    setup = mixture_setup(kind)
    return *setup, Remembered(ctrl.exact.value(*setup)), ctrl.exact.evaluate(*setup).gradient.theta, ctrl.Noise(11, 15_000)


@pytest.mark.parametrize("name", RESOLVES)
@pytest.mark.parametrize("kind", ["mixture", "callable"])
def test_mixture_and_callable_policies_by_simulation(kind, name):
    """False alarm 1e-6; RESOLVES: the error, in units of the gradient's norm, caught with probability 0.999."""
    *setup, value, expected, noise = mixture_truth(kind)
    estimator = {"with V": RewardToGo(value), "temporal difference": TemporalDifference(value),
                 "value gradient": ValueGradient(value), "pathwise": Pathwise()}[name]
    assert_mean(estimator(*setup, noise), expected, resolves=RESOLVES[name] * float(np.linalg.norm(expected)))


class ValueGradientWithoutTheCost(ValueGradient):
    def cotangents(self, run):
        return super().cotangents(run) - run.kl_term


@pytest.mark.parametrize("kind", ["mixture", "callable"])
def test_planted_error_beyond_affine_policies_is_rejected(kind):
    """Without e_i, at the same number of paths."""
    *setup, value, expected, noise = mixture_truth(kind)
    with pytest.raises(AssertionError, match="standard error"):
        assert_mean(ValueGradientWithoutTheCost(value)(*setup, noise), expected,
                    resolves=RESOLVES["value gradient"] * float(np.linalg.norm(expected)))


# ------------------------------------------------------------------------------------------- one pass


def one_pass_cases():
    """Problems and policies that have everything: discount, departure through x and t, sampled actions, parameters per step."""
    problem = replace(bench()[0], discount=0.4)
    grid = ctrl.TimeGrid(np.array([0, 0.07, 0.11, 0.2, 0.33, 0.41, 0.5, 0.58, 0.7, 0.81, 1.0]))
    pre, free = problem.pretrained(grid), ctrl.BasisPolicy(problem, TimeBins(3), 0.1 * np.arange(12.0).reshape(3, 2, 2) - 0.4,
                                                           np.array([[0.1, -0.2], [0.3, 0.0], [-0.1, 0.2]]))
    affine = ctrl.AffinePolicy(0.9 * pre.K + [[0, 0.1], [-0.2, 0]], pre.k + 0.1, [[0.3, 0.1], [0.1, 0.2]])
    policies = {"bins": free, "bins, sampled": free.with_exploration([[0.5, 0.2], [0.2, 0.4]]), "affine, sampled": affine,
                "scaled": ctrl.BasisPolicy.scaled(problem, 0.8, [0.1, -0.3]), "shift": ctrl.BasisPolicy.shift(problem, [0.2, 0.1]), "none": pre}
    return {name: (problem, policy, grid) for name, policy in policies.items()}


def one_pass_forms(value):
    return [form(baseline, sampled_kl) for form in (ScoreFunction, RewardToGo) for sampled_kl in (False, True)
            for baseline in (None, 0.7, value)] + [TemporalDifference(value)]


def by_trajectories(estimator, setup, noise):
    return np.concatenate([estimator.samples(run) for run in estimators.runs(*setup, noise)])


@pytest.mark.parametrize("name", one_pass_cases())
def test_one_pass_is_the_cotangents(name):
    """Path by path, the sums of the kernels are the cotangents of whole trajectories; exchanged forms of the return are told apart."""
    setup, noise = one_pass_cases()[name], ctrl.Noise(3, 601)
    forms = one_pass_forms(ctrl.exact.value(*setup))
    expected = [by_trajectories(form, setup, noise) for form in forms]
    for form, samples in zip(forms, expected, strict=True):
        assert form.one_pass() is not None
        scale = np.max(np.abs(samples))
        got = form(*setup, noise).samples
        np.testing.assert_allclose(got, samples, rtol=0, atol=1e-12 * scale)
        np.testing.assert_allclose(form(*setup, noise, dtype=np.float32).samples, samples, rtol=0, atol=1e-4 * scale)
        pieces = [form(*setup, noise[a:b]).samples for a, b in ((0, 300), (300, 601))]
        assert np.array_equal(np.concatenate(pieces), got)
    apart = [np.max(np.abs(a - b)) > 1e-3 * np.max(np.abs(a)) for k, a in enumerate(expected) for b in expected[k + 1 :]]
    assert np.all(apart) if name != "none" else np.any(apart)     # without a departure nothing is spent


def test_one_pass_on_mixtures():
    """A mixture's score in the drift and in the cost."""
    problem = zoo.mixture_bump_1d()
    policy = ctrl.BasisPolicy(problem, Monomials(1), W=[[[0.2]], [[-0.1]]], w=[[0.3], [0.1]])
    setup, noise = (problem, policy, problem.grid(9)), ctrl.Noise(5, 300, antithetic=True)
    for form in (ScoreFunction(), RewardToGo(0.3, sampled_kl=True)):
        pairs = by_trajectories(form, setup, noise).reshape(150, 2, -1).mean(axis=1)
        np.testing.assert_allclose(form(*setup, noise).samples, pairs, rtol=0, atol=1e-12 * np.max(np.abs(pairs)))


class OnlyTheCost(TemporalDifference):
    def cotangents(self, run):
        return run.kl_term


@pytest.mark.parametrize("own", [CostsWithoutTheirGradient(), OnlyTheCost(None)])
def test_own_cotangents_are_not_passed_by(own):
    """A subclass is never replaced by its parent's kernel."""
    setup, noise = bench(), ctrl.Noise(3, 100)
    assert own.one_pass() is None
    np.testing.assert_array_equal(own(*setup, noise).samples, by_trajectories(own, setup, noise))


@pytest.mark.parametrize("steps", [2, 5])
def test_one_pass_refuses_the_value_of_another_grid(steps):
    """Shorter, it would be read beyond its end; longer, at the wrong times."""
    problem, policy, grid = bench(steps=3)
    value = ctrl.exact.value(problem, policy, problem.grid(steps))
    for form in (RewardToGo(value), TemporalDifference(value)):
        with pytest.raises(ValueError, match="value: expected one on this grid, of 3 steps and dimension 2, got"):
            form(problem, policy, grid, ctrl.Noise(0, 10))


def test_one_pass_leaves_the_rest_to_trajectories():
    """Policies that are not linear in x, and values that are not quadratic."""
    problem = zoo.mixture_bump_1d()
    grid, noise = problem.grid(5), ctrl.Noise(3, 100)
    for policy in (problem.pretrained(grid), ctrl.CallablePolicy(lambda t, x, theta: theta * x, [-0.5], dim=1)):
        assert policy.terms(grid) is None
        ScoreFunction()(problem, policy, grid, noise)
    assert RewardToGo(lambda i, x: np.zeros(len(x))).one_pass() is None and RewardToGo(LeaveOneOut()).one_pass() is None
