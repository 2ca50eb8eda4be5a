"""Algorithms: updates that are identities on quadrature noise, fixed points and their regret, and judged runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import ctrl
import numpy as np
import pytest
from ctrl import estimators as e
from ctrl import exact, learn
from ctrl.learn.contract import SimpleAscent
from ctrl.learn.cppo import moved_nats
from ctrl.learn.qlearning import Slopes
from ctrl.learn.values import Critic
from ctrl.policy import Monomials

MARTINGALE, ORTHOGONAL = Critic(learn.MartingaleLoss()), Critic(learn.Orthogonality())


def plane(eta=0.7, **other):
    return replace(ctrl.zoo.gaussian_pull_2d(eta), discount=0.3, **other)


def line(reward=None, kl_weight=0.4):
    return ctrl.Problem(schedule=ctrl.VP(beta_min=0.1, beta_max=4.0, horizon=1.0), data=ctrl.Gaussian([0.5], [[0.6]]),
                        reward=reward or ctrl.QuadraticReward([[1.0]], [-0.7]), kl_weight=kl_weight, eta=0.8)


def basis(problem, degree=1, scale=0.2):
    b, d = degree + 1, problem.dim
    rng = np.random.default_rng(5)
    return ctrl.BasisPolicy(problem, Monomials(degree), scale * rng.standard_normal((b, d, d)), scale * rng.standard_normal((b, d)))


@pytest.fixture(scope="module")
def nodes():
    """Problem, policy, an uneven grid of two steps, and all 3^6 Gauss-Hermite paths: exact for polynomials of degree 5 in each normal."""
    problem = plane()
    policy, grid = basis(problem), ctrl.TimeGrid([0.0, 0.3, 0.8])
    return problem, policy, grid, ctrl.Noise.gauss_hermite(problem, policy, grid, nodes=3)


def moved(algorithm, problem, policy, grid, noise):
    """(theta after - theta before)/step."""
    return (algorithm.update(algorithm.start(problem, policy, grid), noise).policy.theta - policy.theta) / algorithm.step


UNBIASED = (
    learn.ScoreFunction(baseline=None), learn.ScoreFunction(), learn.PPO(epochs=1), learn.DPOK(), learn.CPPO(epochs=1), learn.Pathwise(),
    learn.LogVariance(), learn.TemporalDifference(critic=MARTINGALE), learn.TemporalDifference(critic=ORTHOGONAL),
    learn.ValueGradient(critic=MARTINGALE), learn.ValueGradient(critic=ORTHOGONAL))


@pytest.mark.parametrize("algorithm", UNBIASED, ids=lambda a: repr(a)[:60])
def test_unbiased_updates_are_exact_gradient_steps(nodes, algorithm):
    problem, policy, grid, _ = nodes
    gradient = exact.evaluate(problem, policy, grid).gradient.theta
    np.testing.assert_allclose(moved(algorithm, *nodes), gradient, rtol=0, atol=1e-10 * np.linalg.norm(gradient))


@pytest.mark.parametrize("algorithm", [learn.DDPO(), learn.DPOK(kl_in_return=False), learn.AdjointMatching(), learn.Pathwise(last=1),
                                       learn.RewardWeighted()], ids=lambda a: repr(a)[:40])
def test_biased_updates_are_not(nodes, algorithm):
    problem, policy, grid, _ = nodes
    gradient = exact.evaluate(problem, policy, grid).gradient.theta
    assert np.linalg.norm(moved(algorithm, *nodes) - gradient) > 1e-2 * np.linalg.norm(gradient)


@pytest.mark.parametrize("learning", [learn.MartingaleLoss(), learn.Orthogonality()])
def test_values_learned_by_quadrature_are_the_chains(nodes, learning):
    problem, policy, grid, noise = nodes
    run = learn.ValueGradient().start(problem, policy, grid).sample(noise)
    value, moments = Critic(learning).learned(None, run)
    truth, x = exact.value(problem, policy, grid), np.random.default_rng(0).standard_normal((20, 2))
    for i in range(3):
        np.testing.assert_allclose(value(i, x), truth(i, x), rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(value.gradient(i, x), truth.gradient(i, x), rtol=1e-8, atol=1e-9)
    again, _ = Critic(learning).learned(moments, run)                         # the same batch twice teaches nothing new
    np.testing.assert_allclose(again.coefficients, value.coefficients, rtol=1e-7, atol=1e-9)
    wrong, _ = Critic(learning).learned(None, run, -run.cost)                 # planted: the cost added
    assert np.abs(wrong.gradient(0, x) - truth.gradient(0, x)).max() > 1e-2


def test_features_have_their_slopes():
    u = np.random.default_rng(1).standard_normal((4, 3))
    for features in (learn.Quadratic(), learn.Quadratic(cross=False)):
        for j in range(3):
            step = np.zeros(3)
            step[j] = 1e-4
            numeric = (features(u + step) - features(u - step)) / 2e-4
            np.testing.assert_allclose(features.slopes(u)[:, :, j], numeric, atol=1e-10)


def test_the_first_epoch_of_ppo_is_the_score_function():
    problem = plane()
    policy, grid, noise = basis(problem), problem.grid(6), ctrl.Noise(seed=3, paths=64)
    expected = e.RewardToGo(e.LeaveOneOut())(problem, policy, grid, noise).mean
    np.testing.assert_allclose(moved(learn.PPO(epochs=1), problem, policy, grid, noise), expected, rtol=1e-12)
    second = moved(learn.PPO(step=0.01), problem, policy, grid, noise)
    at = policy.with_theta(policy.theta + 0.01 * expected)
    away = e.ClippedRatio(theta_old=policy.theta)(problem, at, grid, noise).mean
    np.testing.assert_allclose(second, expected + away, rtol=1e-9)
    assert np.linalg.norm(away - expected) > 1e-4 * np.linalg.norm(expected)


def test_natural_steps_are_in_nats(nodes):
    problem, policy, grid, noise = nodes
    F, gradient = e.fisher(problem, policy, grid, noise), exact.evaluate(problem, policy, grid).gradient.theta
    free = learn.NaturalGradient(step=0.2, nats=None)
    np.testing.assert_allclose(moved(free, *nodes), np.linalg.solve(F, gradient), rtol=1e-8)
    start = free.start(problem, policy, grid)
    held = replace(free, nats=0.01).update(start, noise)
    run = replace(start.sample(noise), policy=held.policy, sampler=policy)
    np.testing.assert_allclose(moved_nats(run), 0.01, rtol=1e-10)             # KL(P_old || P_new), step by step
    pre = ctrl.BasisPolicy.shift(problem, [0.0, 0.0])
    signs = ctrl.Noise.signs(problem, pre, grid)
    shifted = replace(free, nats=0.01).update(free.start(problem, pre, grid), signs).policy
    np.testing.assert_allclose(exact.evaluate(problem, shifted, grid).path_kl, 0.01, rtol=1e-10)


def test_the_penalty_of_cppo_answers_a_step_that_is_too_large(nodes):
    problem, policy, grid, noise = nodes

    def after(**changed):
        algorithm = learn.CPPO(**{"step": 0.05, "radius": 0.1, "penalty": 0.5, **changed})
        start = algorithm.start(problem, policy, grid)
        state = algorithm.update(start, noise)
        return state.memory.penalty, np.sqrt(moved_nats(replace(start.sample(noise), policy=state.policy, sampler=policy)))

    penalty, gone = after(step=1.0)
    assert gone > 0.15 and penalty == 1.0
    penalty, gone = after(step=1e-3)
    assert gone < 0.1 / 1.5 and penalty == 0.25
    assert after()[1] > after(penalty=2.0)[1]                                 # a dearer root keeps the policy nearer
    _, gone = after(radius=after()[1])
    assert after(radius=gone)[0] == 0.5


def test_q_learning_is_the_gradient_of_sampled_actions():
    problem = line()
    policy, grid = basis(problem), ctrl.TimeGrid([0.0, 0.3, 0.8])
    exploring = policy.with_exploration([[0.49]])
    noise = ctrl.Noise.gauss_hermite(problem, exploring, grid, nodes=4)
    gradient = exact.evaluate(problem, exploring, grid).gradient.theta
    for cross in (True, False):  # on the line the same
        found = moved(learn.QLearning(exploration=0.7, critic=Critic(features=learn.Quadratic(cross))), problem, policy, grid, noise)
        np.testing.assert_allclose(found, gradient, rtol=0, atol=1e-10 * np.linalg.norm(gradient))
    with pytest.raises(ValueError, match="exploration"):
        learn.QLearning().start(problem, exploring, grid)


@pytest.mark.parametrize("cross", [True, False])
def test_slopes_are_one_linear_map(cross):
    """Rows times coefficients are a.g(x), g = (1, x) M; without products g_j does not see the other coordinates."""
    rng, form = np.random.default_rng(0), Slopes(cross)
    x, a = rng.standard_normal((2, 5, 3))
    coefficients = rng.standard_normal(form.rows(x, a).shape[1])
    M = form.matrix(coefficients, 3)
    np.testing.assert_allclose(form.rows(x, a) @ coefficients, np.sum(a * (M[0] + x @ M[1:]), axis=1), rtol=1e-12)
    assert M.shape == (4, 3) and (np.count_nonzero(M[1:]) == 9) == cross


def test_the_spread_of_q_learning_settles_where_that_of_whole_returns_grows():
    """Spread of 16 updates at N = 10 and 80, fixed seeds: 8 times as many steps, and less than half as much again; whole returns at least 4 times."""
    problem, policy = plane(), basis(plane())
    spread, whole = [], []
    for steps in (10, 80):
        grid = problem.grid(steps)
        start = learn.QLearning().start(problem, policy, grid)
        ends = [learn.QLearning(step=1.0).update(start, learn.noise_of(9, k, 256)).policy.theta for k in range(16)]
        spread.append(np.var(ends, axis=0).sum())
        whole.append(np.trace(e.ActionNoise()(problem, policy.with_exploration(np.eye(2)), grid, ctrl.Noise(1, 2048)).covariance))
    assert spread[1] < 1.5 * spread[0] and whole[1] > 4 * whole[0]


# ---- fixed points ---------------------------------------------------------------------------------------------------------


def settled(algorithm, problem, policy, grid, noise, updates=400):
    """The policy after many updates on quadrature noise; it has stopped."""
    state = algorithm.start(problem, policy, grid)
    for _ in range(updates):
        before, state = state.policy.theta, algorithm.update(state, noise)
    assert np.linalg.norm(state.policy.theta - before) < 1e-8
    return state.policy


@dataclass(frozen=True, eq=False)
class WithoutD(e.ScoreFunction):
    """Planted: a KL without its time step."""

    def returns(self, run):
        return np.broadcast_to((run.reward - (run.cost / run.grid.dt).sum(axis=1))[:, None], run.cost.shape)

    def _weighted(self, run, advantages):
        return advantages[:, :, None] * run.score_noise + run.kl_term / run.grid.dt[:, None]


@dataclass(frozen=True)
class Planted(SimpleAscent):
    step: float = 0.1

    def form(self):
        return WithoutD()


@pytest.fixture(scope="module")
def short():
    """A class of shifts and one scale on the line, which does not hold the optimum; nodes that are exact for polynomials."""
    problem = line()
    policy, grid = ctrl.BasisPolicy.scaled(problem, scale=1.0, shift=[0.0]), problem.grid(2)
    return problem, policy, grid, ctrl.Noise.gauss_hermite(problem, policy, grid, nodes=3)


def lost(short, policy):
    """Regret within the class, relative to that of the start."""
    problem, start, grid, _ = short
    best = learn.best_in_class(problem, start, grid)
    J, J0 = (exact.evaluate(problem, p, grid).objective for p in (policy, start))
    return (best.objective - J) / (best.objective - J0)


def test_right_gradients_stop_at_the_best_of_the_class(short):
    assert abs(lost(short, settled(learn.DPOK(step=0.3), *short))) < 1e-10
    assert abs(lost(short, settled(learn.TemporalDifference(step=0.3), *short))) < 1e-10


def test_a_kl_without_its_time_step_stops_elsewhere(short):
    assert lost(short, settled(Planted(), *short)) > 0.05


def test_dpok_as_published_stops_elsewhere(short):
    assert lost(short, settled(learn.DPOK(step=0.3, kl_in_return=False), *short)) > 1e-4     # the right one: below 1e-10


def test_adjoint_matching_stops_elsewhere_in_a_class_without_the_optimum(short):
    problem, _, grid, noise = short
    assert lost(short, settled(learn.AdjointMatching(step=0.3), *short)) > 1e-5
    best = exact.optimum(problem, grid).policy                                # one affine map per step: the class holds the optimum
    np.testing.assert_allclose(moved(learn.AdjointMatching(), problem, best, grid, noise), 0, atol=1e-10)


def linear():
    problem = line(ctrl.LinearReward([0.6]))
    grid = problem.grid(2)
    return problem, grid, exact.optimum(problem, grid).policy


def test_log_variance_is_zero_at_doobs_optimum():
    """With a linear reward Doob's chain is a shift: r/lambda - k1 = log phi_0(X_0), path by path."""
    problem, grid, best = linear()
    start = learn.LogVariance().start(problem, best, grid)
    run = start.sample(ctrl.Noise(seed=2, paths=50))
    left = run.reward / problem.kl_weight - run.k1.sum(axis=1) - exact.doob(problem, grid).log_phi(0, run.states[:, 0])
    np.testing.assert_allclose(left, 0, atol=1e-12)
    nodes = ctrl.Noise.gauss_hermite(problem, best, grid, nodes=4)
    np.testing.assert_allclose(moved(learn.LogVariance(), problem, best, grid, nodes), 0, atol=1e-11)
    away = learn.LogVariance().start(problem, best.with_theta(best.theta + 0.1), grid).sample(ctrl.Noise(seed=2, paths=50))
    assert np.std(away.reward / problem.kl_weight - away.k1.sum(axis=1)) > 0.05


def test_reward_weighted_regression_lands_on_the_tilt_at_once():
    """Linear reward: the tilted path law is in the class, and one whole step from anywhere is there."""
    problem, grid, best = linear()
    away = best.with_theta(best.theta + np.array([0.2, -0.1, 0.1, 0.2]))
    noise = ctrl.Noise.gauss_hermite(problem, away, grid, nodes=28)
    for start in (away, best):
        theta = learn.RewardWeighted(step=1.0).update(learn.RewardWeighted(step=1.0).start(problem, start, grid), noise).policy.theta
        np.testing.assert_allclose(theta, best.theta, atol=1e-8)
    wild = learn.RewardWeighted(step=1.0, anchored=False)                     # as published it chases the reward: no fixed point there
    assert np.abs(wild.update(wild.start(problem, best, grid), noise).policy.theta - best.theta).max() > 0.1


def test_reward_weighted_regression_stops_at_the_tilt_not_at_the_optimum():
    """Quadratic reward: the tilt has a smaller covariance per step, so that its regression is another policy than the best."""
    problem = line()
    policy, grid = ctrl.BasisPolicy.scaled(problem, scale=1.0, shift=[0.0]), problem.grid(2)
    noise = ctrl.Noise.gauss_hermite(problem, policy, grid, nodes=16)
    at = (problem, policy, grid, noise)
    assert lost(at, settled(learn.RewardWeighted(step=0.5), *at, updates=60)) > 1e-3


def test_without_a_kl_the_reward_rises_and_the_objective_falls():
    problem = ctrl.zoo.gaussian_pull_2d()
    policy, grid = ctrl.BasisPolicy.shift(problem, [0.0, 0.0]), problem.grid(10)
    run = learn.train(learn.DDPO(step=0.1), problem, policy, grid, seed=0, paths=256, updates=80)
    rewards = [exact.evaluate(problem, policy.with_theta(theta), grid).expected_reward for theta in run.theta[::20]]
    assert np.all(np.diff(rewards) > 0) and run.objective[-1] < run.objective.max() - 0.1
    right = learn.train(learn.ScoreFunction(step=0.1), problem, policy, grid, seed=0, paths=256, updates=80)
    assert right.objective[-1] > run.objective[-1] + 0.1


# ---- judged runs ----------------------------------------------------------------------------------------------------------


def race(algorithm, seed=0, updates=40, steps=10):
    problem = ctrl.zoo.gaussian_pull_2d()
    grid, zero = problem.grid(steps), np.zeros((1, 2, 2))
    policy = ctrl.BasisPolicy(problem, lambda t: np.array([problem.schedule.alpha(problem.schedule.tau(t))]), zero, zero[:, 0])
    return problem, policy, grid, learn.train(algorithm, problem, policy, grid, seed=seed, paths=128, updates=updates)


def test_training_is_judged_by_exact_objectives():
    problem, policy, grid, run = race(learn.Pathwise(), updates=5)
    assert len(run.objective) == len(run.theta) == len(run.seconds) == 6 and not run.diverged
    for J, theta in zip(run.objective, run.theta, strict=True):
        assert exact.evaluate(problem, policy.with_theta(theta), grid).objective == J
    assert list(run.queries) == [128 * k for k in range(6)] and list(run.evaluations) == [128 * 10 * 4 * k for k in range(6)]
    assert np.all(np.diff(run.seconds) > 0)
    _, _, _, again = race(learn.Pathwise(), updates=5)
    _, _, _, other = race(learn.Pathwise(), updates=5, seed=1)
    assert np.array_equal(again.theta, run.theta) and not np.array_equal(other.theta, run.theta)
    rarely = learn.train(learn.Pathwise(), problem, policy, grid, seed=0, paths=128, updates=4, every=2)
    assert np.array_equal(rarely.theta, run.theta[:5:2]) and np.array_equal(rarely.objective, run.objective[:5:2])
    assert list(rarely.queries) == [0, 256, 512]
    with pytest.raises(ValueError, match="multiple of every"):
        learn.train(learn.Pathwise(), problem, policy, grid, seed=0, paths=128, updates=5, every=2)
    assert run.reached(run.objective[0]) == 0 and run.reached(np.inf) is None
    assert replace(run, objective=np.array([0.0, 2, 1, 2, 3, 4])).reached(2.0) == 3


@pytest.mark.parametrize("algorithm", learn.ALL, ids=lambda a: type(a).__name__)
def test_every_algorithm_learns(algorithm):
    """At its own step size: regret within the class falls to a stated share of the start's; without a KL, only halfway."""
    problem, policy, grid, run = race(algorithm)
    best = learn.best_in_class(problem, policy, grid).objective
    share = (best - run.objective) / (best - run.objective[0])
    assert share.min() > -1e-9 and share[-1] < (0.6 if isinstance(algorithm, learn.DDPO) else 0.1)


@pytest.mark.parametrize("step", [1e3, 1e9])
def test_a_run_that_diverges_says_so(step):
    for algorithm in learn.ALL:
        if not isinstance(algorithm, learn.NaturalGradient | learn.RewardWeighted):
            _, _, _, run = race(algorithm.with_step(step), updates=12)
            assert run.objective[-1] < -1e3 and len(run.objective) == 13 and np.isfinite(run.objective[0])
            assert not run.diverged or run.objective[-1] == -np.inf


def test_the_search_finds_the_inside_of_its_grid():
    problem, policy, grid, _ = race(learn.Pathwise(), updates=1)
    for first in (1e-3, 1e3):
        found = learn.search(learn.Pathwise(step=first), problem, policy, grid, paths=64, updates=20, factor=4.0)
        steps = list(found.scores)
        at = steps.index(found.algorithm.step)
        assert 0 < at < len(steps) - 1 and found.scores[steps[at]] == max(found.scores.values())
        assert 0.05 < found.algorithm.step < 10
    with pytest.raises(ValueError, match="factor"):
        learn.search(learn.Pathwise(), problem, policy, grid, paths=64, updates=2, factor=1.0)


def test_regret_has_two_parts():
    problem = ctrl.zoo.gaussian_pull_2d()
    grid = problem.grid(5)
    whole, shifts = problem.pretrained(grid), ctrl.BasisPolicy.shift(problem, [0.0, 0.0])
    assert 0 <= learn.Yardstick.of(problem, whole, grid).of_class < 1e-9          # one affine map per step holds the optimum
    yard, best = learn.Yardstick.of(problem, shifts, grid), learn.best_in_class(problem, shifts, grid)
    assert yard.of_class > 0.1 and best.gradient_norm < 1e-6
    np.testing.assert_allclose(exact.evaluate(problem, best.policy, grid).objective, yard.best)
    J = np.array([-2.0, yard.best])
    np.testing.assert_allclose(yard.regret(J), yard.of_class + yard.within(J))
    mixture = ctrl.zoo.mixture_bump_1d()
    policy = ctrl.BasisPolicy.shift(mixture, [0.3])
    single = learn.best_in_class(mixture, policy, mixture.grid(8))
    both = learn.best_in_class(mixture, policy, mixture.grid(8), starts=[[-1.0], [1.0]])
    assert both.objective >= single.objective


def test_what_needs_a_diffusion_says_so():
    problem = ctrl.zoo.gaussian_pull_2d(eta=0.0)
    policy, grid = ctrl.BasisPolicy.shift(problem, [0.1, 0.1]), problem.grid(5)
    smooth = (learn.ValueGradient, learn.Pathwise, learn.AdjointMatching, learn.QLearning)
    for algorithm in learn.ALL:
        if isinstance(algorithm, smooth):
            run = learn.train(algorithm.with_step(0.05), problem, policy, grid, seed=0, paths=64, updates=3)
            assert run.objective[-1] > run.objective[0]
        else:
            with pytest.raises(ValueError, match="eta"):
                algorithm.start(problem, policy, grid)
    for algorithm in (learn.LogVariance(), learn.RewardWeighted()):
        with pytest.raises(ValueError, match="kl_weight"):
            algorithm.start(replace(ctrl.zoo.gaussian_pull_2d(), kl_weight=0.0), policy, grid)
    with pytest.raises(ValueError, match="step"):
        learn.Pathwise(step=-1.0).start(problem, policy, grid)
    with pytest.raises(ValueError, match="keep"):
        Critic(keep=1.0)
