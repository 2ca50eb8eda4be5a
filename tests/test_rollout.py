"""simulate against the chain written as a plain loop, its invariances, memory and messages."""

from __future__ import annotations

import os
import subprocess
import sys

import ctrl
import numpy as np
import pytest
from ctrl import (
    VE,
    VP,
    AffinePolicy,
    BasisPolicy,
    CallablePolicy,
    CallableReward,
    Gaussian,
    GaussianMixture,
    LinearReward,
    MixturePolicy,
    Noise,
    Problem,
    QuadraticReward,
    SubVP,
    TimeGrid,
    simulate,
)
from ctrl.estimators import Pathwise, Run, ScoreFunction
from ctrl.rollout import actions, trajectories
from numba import njit
from numpy.linalg import cholesky

GAUSSIAN = Gaussian([1.0, -0.5], [[0.6, 0.2], [0.2, 0.3]])
MIXTURE = GaussianMixture([0.3, 0.5, 0.2], [[-1.0, 0.5], [1.0, 0.0], [0.0, 2.0]],
                          [[[0.3, 0.1], [0.1, 0.2]], [[0.2, -0.1], [-0.1, 0.4]], [[0.5, 0.0], [0.0, 0.1]]])
PULL = QuadraticReward(matrix=[[1.0, 0.2], [0.2, 0.5]], center=[-0.5, 1.0])
GRID = TimeGrid(np.array([0, 0.07, 0.11, 0.2, 0.33, 0.41, 0.5, 0.58, 0.7, 0.81, 0.95]))


def problem_of(schedule=None, data=GAUSSIAN, eta=1.0, **more):
    return Problem(schedule or VP(0.1, 6.0), data, PULL, kl_weight=0.4, eta=eta, **more)


def affine(problem, exploration=None):
    pre = problem.pretrained(GRID)
    ramp = np.linspace(0, 0.3, GRID.steps)[:, None]
    return AffinePolicy(0.9 * pre.K + [[0, 0.05], [-0.02, 0]], pre.k + ramp * [1, -1], exploration)


def basis(problem, exploration=None):
    return BasisPolicy(problem, lambda t: np.array([1.0, t]), W=[[[0.1, 0.2], [0.0, -0.1]], [[0.0, 0.1], [0.1, 0.0]]],
                       w=[[0.1, -0.2], [0.3, 0.0]], exploration=exploration)


def own_mixture(problem, exploration=None):
    return MixturePolicy(problem.schedule, GaussianMixture([0.4, 0.6], [[-1.2, 0.3], [0.8, 0.4]], MIXTURE.covs[:2]), exploration)


def constant_affine(problem, exploration=None):
    return AffinePolicy(np.tile(-0.7 * np.eye(2), (GRID.steps, 1, 1)), np.tile([0.1, 0.2], (GRID.steps, 1)), exploration)


def arbitrary(problem, exploration=None):
    return CallablePolicy(lambda t, x, theta: -x + theta * np.sin(x[:, ::-1]) * t, [0.4, -0.3], exploration=exploration, dim=2)


@njit
def compiled_action(t, x, theta):
    return -x + theta * np.sin(x[:, ::-1]) * t


def compiled(problem, exploration=None):
    return CallablePolicy(compiled_action, [0.4, -0.3], exploration=exploration, dim=2)


def pretrained(problem, exploration=None):
    return problem.pretrained(GRID).with_exploration(exploration)


SIGMA = np.array([[0.5, 0.2], [0.2, 0.4]])
CASES = {
    **{f"affine, eta {eta}": (problem_of(eta=eta), affine, None) for eta in (0.0, 0.5, 1.0, 1.5)},
    **{f"sampled, eta {eta}": (problem_of(eta=eta), affine, SIGMA) for eta in (0.0, 0.5, 1.0, 1.5)},
    "VE": (problem_of(VE(0.1, 3.0)), affine, None),
    "subVP": (problem_of(SubVP(0.1, 6.0), eta=0.5), affine, SIGMA),
    "basis on Gaussian": (problem_of(eta=0.5), basis, SIGMA),
    "basis on mixture": (problem_of(data=MIXTURE, eta=0.5), basis, None),
    "basis on mixture, sampled": (problem_of(data=MIXTURE), basis, SIGMA),
    "mixture policy": (problem_of(data=MIXTURE, eta=1.5), own_mixture, None),
    "mixture policy, sampled": (problem_of(data=MIXTURE), own_mixture, SIGMA),
    "affine on mixture": (problem_of(data=MIXTURE), constant_affine, None),
    "mixture policy on Gaussian": (problem_of(), own_mixture, None),
    "callable": (problem_of(data=MIXTURE), arbitrary, None),
    "callable, sampled": (problem_of(eta=0.0), arbitrary, SIGMA),
    "compiled": (problem_of(data=MIXTURE), compiled, None),
    "compiled, sampled": (problem_of(eta=0.5, discount=0.3), compiled, SIGMA),
    "pre-trained": (problem_of(), pretrained, None),
    "pre-trained mixture": (problem_of(data=MIXTURE), pretrained, None),
    "pre-trained, sampled": (problem_of(), pretrained, SIGMA),
    "discount": (problem_of(discount=0.8), affine, SIGMA),
    "exact mixture start": (problem_of(data=MIXTURE, start="exact"), basis, None),
    "entropy": (problem_of(entropy_weight=0.3, discount=0.2), affine, SIGMA),
}


def specification(problem, policy, grid, noise):
    """The chain of theory.md, section 1, read off the page."""
    schedule, eta, d, N = problem.schedule, problem.eta, problem.dim, grid.steps
    x, xi, z = problem.initial(noise), noise.steps(N, d), noise.actions(N, d)
    penalty, discounted, log_weight, entropy = np.zeros((4, noise.paths))
    states, actions = [x], []
    for i in range(N):
        t, D = grid.times[i], grid.times[i + 1] - grid.times[i]
        f, g = schedule.f(schedule.horizon - t), np.sqrt(schedule.g2(schedule.horizon - t))
        h = (1 + eta**2) / 2 * g**2
        kappa = h**2 / (2 * eta**2 * g**2) if eta > 0 else g**2 / 2
        s, a = problem.score(t, x), policy.mean(grid, i, x)
        if policy.exploration is not None:
            a = a + z[:, i] @ cholesky(policy.exploration).T
            entropy += np.exp(-problem.discount * t) * D * 0.5 * np.linalg.slogdet(2 * np.pi * np.e * policy.exploration)[1]
        u = np.sqrt(2 * kappa * D) * (a - s)
        penalty += kappa * D * np.sum((a - s) ** 2, axis=1)
        discounted += np.exp(-problem.discount * t) * kappa * D * np.sum((a - s) ** 2, axis=1)
        log_weight += np.sum(u * xi[:, i], axis=1) + 0.5 * np.sum(u**2, axis=1)
        x = x + (-f * x + h * a) * D + eta * g * np.sqrt(D) * xi[:, i]
        states.append(x)
        actions.append(a)
    reward = problem.reward.value(x)
    objective = np.exp(-problem.discount * grid.times[-1]) * reward - problem.kl_weight * discounted
    return {"terminal": x, "reward": reward, "penalty": penalty, "log_weight": log_weight,
            "objective": objective + problem.entropy_weight * entropy,
            "states": np.stack(states, axis=1), "actions": np.stack(actions, axis=1), "noise_steps": xi}


def close(got, expected, tolerance):
    scale = max(1.0, float(np.max(np.abs(expected))))
    return float(np.max(np.abs(got - expected))) < tolerance * scale


@pytest.mark.parametrize("name", CASES)
def test_chain_is_its_specification(name):
    problem, make, exploration = CASES[name]
    policy, noise = make(problem, exploration), Noise(3, 600)
    expected = specification(problem, policy, GRID, noise)
    streamed, kept = simulate(problem, policy, GRID, noise), simulate(problem, policy, GRID, noise, trajectory=True)
    single = simulate(problem, policy, GRID, noise, dtype=np.float32)
    for what in ("terminal", "reward", "penalty", "objective", "log_weight"):
        if what == "log_weight" and problem.eta == 0:
            continue
        assert close(getattr(streamed, what), expected[what], 1e-12), what
        assert np.array_equal(getattr(kept, what), getattr(streamed, what)), what
        assert close(getattr(single, what), expected[what], 3e-5), what
    for what in ("states", "actions", "noise_steps"):
        assert close(getattr(kept, what), expected[what], 1e-12), what
    assert single.terminal.dtype == np.float32


@pytest.mark.parametrize("name", CASES)
def test_actions_follow_from_states_and_noise(name):
    problem, make, exploration = CASES[name]
    policy, noise = make(problem, exploration), Noise(3, 600)
    whole, without = simulate(problem, policy, GRID, noise, trajectory=True), trajectories(problem, policy, GRID, noise)
    assert without.actions is None and np.array_equal(without.states, whole.states)
    assert np.array_equal(actions(policy, GRID, noise, without.states), whole.actions)
    score = np.stack([problem.score(float(t), x) for t, x in zip(GRID.times[:-1], whole.states.swapaxes(0, 1), strict=False)], axis=1)
    for paths in (whole, without):
        assert close(Run(problem, policy, GRID, noise, paths).departure, whole.actions - score, 1e-12)


@pytest.mark.parametrize("dim", [1, 3, 5, 9])
@pytest.mark.parametrize("components", [0, 3])
def test_every_dimension(dim, components):
    """Dense matrices and mixtures, four rows at a time and the rest."""
    rng = np.random.default_rng(dim)
    root = rng.normal(size=(max(1, components), dim, dim)) / 3
    covs, means = root @ root.transpose(0, 2, 1) + 0.4 * np.eye(dim), rng.normal(size=(max(1, components), dim))
    data = GaussianMixture([0.2, 0.3, 0.5], means, covs) if components else Gaussian(means[0], covs[0])
    problem = Problem(VP(0.1, 4.0), data, LinearReward(np.ones(dim)), kl_weight=0.3)
    policy = BasisPolicy(problem, lambda t: np.array([1.0]), W=rng.normal(size=(1, dim, dim)) / 10, w=rng.normal(size=(1, dim)),
                         exploration=covs[0])
    noise, grid = Noise(1, 300), problem.grid(7)
    expected, got = specification(problem, policy, grid, noise), simulate(problem, policy, grid, noise)
    for what in ("terminal", "penalty", "log_weight"):
        assert close(getattr(got, what), expected[what], 1e-11), what


def same(a, b):
    return all(np.array_equal(getattr(a, what), getattr(b, what)) for what in ("terminal", "reward", "penalty", "objective", "log_weight"))


@pytest.mark.parametrize("name", ["sampled, eta 1.0", "mixture policy", "compiled"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_threads_chunks_and_padding_change_nothing(name, dtype):
    problem, make, exploration = CASES[name]
    policy, noise = make(problem, exploration), Noise(4, 1500, antithetic=True)
    whole = simulate(problem, policy, GRID, noise, dtype=dtype, threads=1)
    assert same(simulate(problem, policy, GRID, noise, dtype=dtype, threads=2), whole)
    assert same(simulate(problem, policy, GRID, noise, dtype=dtype), whole)
    for cuts in ([0, 2, 300, 1500], [0, 1024, 1500]):
        pieces = [simulate(problem, policy, GRID, noise[a:b], dtype=dtype) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        assert np.array_equal(np.concatenate([p.terminal for p in pieces]), whole.terminal)
        assert np.array_equal(np.concatenate([p.log_weight for p in pieces]), whole.log_weight)


def test_compiled_action_is_the_python_one():
    """The same mean in the kernels and in NumPy: trajectories, Jacobians by complex step, and the estimators on them."""
    problem, noise = problem_of(data=MIXTURE), Noise(7, 700)
    fast, plain = compiled(problem), arbitrary(problem)
    for make in (lambda p: simulate(problem, p, GRID, noise, trajectory=True).states,
                 lambda p: ScoreFunction()(problem, p, GRID, noise).samples, lambda p: Pathwise()(problem, p, GRID, noise).samples):
        assert close(make(fast), make(plain), 1e-11)


@pytest.mark.parametrize(("action", "message"), [
    (njit(lambda t, x, theta: x + "no"), "action: expected code that Numba compiles for float64, .*got"),
    (njit(lambda t, x, theta: x[:1]), r"action: expected .*shape \(256, 2\), got"),
    (njit(lambda t, x, theta: np.sum(x)), "action: expected"),
])
def test_compiled_actions_are_refused(action, message):
    with pytest.raises(ValueError, match=message):
        simulate(problem_of(), CallablePolicy(action, [0.0, 0.0], dim=2), GRID, Noise(0, 10))


def test_a_compiled_action_keeps_its_shape_at_every_time():
    """The shape is known at the first time alone; later, another one would be read beyond its end."""
    late = njit(lambda t, x, theta: theta * x[: len(x) if t < 0.5 else 2])
    with pytest.raises(ValueError, match="action: expected the shape of x"):
        simulate(problem_of(), CallablePolicy(late, [0.1, 0.2], dim=2), GRID, Noise(0, 10))


@njit
def only_real(t, x, theta):
    out = np.empty(x.shape)
    out[:] = theta[0] * x
    return out


def test_compiled_action_for_floats_alone_needs_its_jacobian():
    setup = problem_of(), CallablePolicy(only_real, [-0.9], dim=2), GRID
    with pytest.raises(ValueError, match="action: expected code that accepts complex numbers"):
        ScoreFunction()(*setup, Noise(0, 10))
    given = CallablePolicy(only_real, [-0.9], jacobian_theta=lambda t, x, theta: x[:, :, None], dim=2)
    assert ScoreFunction()(setup[0], given, GRID, Noise(0, 10)).samples.shape == (10, 1)


USERS = """
import numpy as np
from ctrl.estimators import Pathwise, ScoreFunction
from numba import njit
import ctrl
from ctrl.kernels.chain import run

@njit(cache=True)
def action(t, x, theta):
    return theta[0] * x

@njit(cache=True)
def reward(x):
    return -np.sum(x**2, axis=1)

if __name__ == "__main__":
    problem = ctrl.Problem(ctrl.VP(0.1, 6.0), ctrl.Gaussian([0.5], [[0.3]]), ctrl.CallableReward(reward), kl_weight=0.5)
    policy = ctrl.CallablePolicy(action, [-0.8], dim=1)
    paths = ctrl.simulate(problem, policy, problem.grid(8), ctrl.Noise(1, 300))
    hits = [sum(f.stats.cache_hits.values()) for f in (run, action, reward)]
    misses = [sum(f.stats.cache_misses.values()) for f in (run, action, reward)]
    print(*hits, *misses, paths.objective.mean())
"""


def test_own_action_comes_from_the_cache(tmp_path):
    """A user's compiled action and reward: the second process compiles nothing, neither theirs nor the kernel that calls them.

    The first, whose file is new, compiles theirs; the kernel may be known from earlier runs.
    """
    (tmp_path / "users.py").write_text(USERS)
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1"}
    lines = [subprocess.run([sys.executable, "users.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout.split()
             for _ in range(2)]
    (cold, cold_missed), (warm, warm_missed) = ((line[:3], line[3:6]) for line in lines)
    assert cold[1:] == ["0"] * 2 and warm_missed == ["0"] * 3 and warm[1:] == cold_missed[1:] and "0" not in warm
    assert int(cold[0]) + int(cold_missed[0]) == int(warm[0])
    assert lines[0][6] == lines[1][6]


def test_quadrature_noise_gives_the_exact_objective():
    problem = problem_of()
    policy, grid = BasisPolicy.scaled(problem, 0.9, [0.1, 0.1]), problem.grid(3)
    paths = simulate(problem, policy, grid, Noise.signs(problem, policy, grid))
    truth = ctrl.exact.evaluate(problem, policy, grid)
    assert paths.weights @ paths.objective == pytest.approx(truth.objective, rel=1e-12)
    assert paths.weights @ paths.penalty == pytest.approx(truth.penalty, rel=1e-12)


def test_coarsened_noise_runs():
    problem = problem_of()
    fine = problem.grid(12)
    noise, coarse = Noise(0, 700).coarsened(fine, 3), fine.coarsened(3)
    policy = BasisPolicy.shift(problem, [0.1, 0.2])
    got, expected = simulate(problem, policy, coarse, noise), specification(problem, policy, coarse, noise)
    assert close(got.terminal, expected["terminal"], 1e-12)


@pytest.mark.parametrize(("plant", "caught"), [
    (lambda A, D: A, False),
    (lambda A, D: A[::-1], True),  # tau and t exchanged
    (lambda A, D: np.roll(A, -1, axis=0), True),  # right point
])
def test_specification_rejects_planted_errors(plant, caught):
    problem = problem_of()
    right, noise = affine(problem), Noise(3, 300)
    policy = AffinePolicy(plant(right.K, GRID.dt), right.k)
    expected = specification(problem, right, GRID, noise)
    assert close(simulate(problem, policy, GRID, noise).terminal, expected["terminal"], 1e-12) is not caught


def test_streaming_keeps_memory_bounded():
    """10^6 paths x 1000 steps in d = 2 keep under 200 MB; here 2 10^5 paths (the chunk is the same), in a fresh process."""
    code = """
import resource, sys, numpy as np, ctrl
problem = ctrl.Problem(ctrl.VP(), ctrl.Gaussian(np.zeros(2), np.eye(2)), ctrl.LinearReward([1.0, 1.0]), kl_weight=1.0)
grid = problem.grid(40)
policy = ctrl.BasisPolicy.shift(problem, [0.1, 0.1])
ctrl.simulate(problem, policy, grid, ctrl.Noise(0, 10))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
paths = ctrl.simulate(problem, policy, grid, ctrl.Noise(0, int(sys.argv[1])))
print((peak() - before) / 1024)
"""
    small, large = (float(subprocess.run([sys.executable, "-c", code, str(n)], check=True, capture_output=True, text=True).stdout)
                    for n in (40_000, 240_000))
    assert small + (large - small) * (1_000_000 - 40_000) / 200_000 < 200


ETA0 = problem_of(eta=0.0)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: simulate(ETA0, affine(ETA0), GRID, Noise(0, 5)).log_weight, "eta: expected eta > 0"),
    (lambda: simulate(ETA0, affine(ETA0), GRID, Noise(0, 5), dtype=np.int32), "dtype: expected float64 or float32, got int32"),
    (lambda: simulate(ETA0, affine(ETA0), GRID, Noise(0, 5), threads=0), "threads: expected an integer >= 1, got 0"),
    (lambda: simulate(ETA0, affine(ETA0), GRID, Noise(0, 10**11), trajectory=True), "trajectory: .* GiB .*100000000000 paths"),
    (lambda: simulate(ETA0, affine(ETA0), ETA0.grid(4), Noise(0, 5)), "grid: expected 10 steps"),
])
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("bad", [lambda x: x, lambda x: np.full(len(x), np.nan)])
def test_bad_rewards_are_refused(bad):
    problem = Problem(VP(), GAUSSIAN, CallableReward(bad), kl_weight=1.0)
    with pytest.raises(ValueError, match="value|reward"):
        simulate(problem, problem.pretrained(GRID), GRID, Noise(0, 5))
