"""Statistics of prompts: the baseline path by path, unbiased and of less variance by enumeration of whole batches, planted errors rejected."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from statistics import mean, stdev

import numpy as np
import pytest
import torch

import ctrl
from ctrl import torch as ct
from ctrl.estimators import LeaveOneOut
from ctrl.torch.prompts import PerPrompt, by_prompt

torch.set_num_threads(1)
SCALES, OFFSETS = (1.0, 2.0, 0.5), (3.0, -2.0, 0.5)  # of the rewards of three prompts
GRID = ctrl.TimeGrid(np.array([0.0, 0.4, 1.0]))


def line(scale=1.0):
    """One coordinate, eta != 1, a discount, a departure through x."""
    data, reward = ctrl.Gaussian([1.0], [[0.6]]), ctrl.QuadraticReward([[scale]], [-0.5])
    problem = ctrl.Problem(ctrl.VP(0.5, 2.0, 1.0), data, reward, kl_weight=0.5, eta=0.7, discount=0.3)
    return problem, ctrl.BasisPolicy(problem, lambda t: np.array([1.0, t]), np.array([[[0.3]], [[-0.2]]]), np.array([[0.2], [-0.1]]))


def sampled(noise, prompts, grid=GRID):
    """Paths whose rewards depend on their prompts."""
    problem, policy = line()
    tensors = ct.problem_of(problem, grid)
    scales, offsets = (torch.tensor(numbers, dtype=torch.float64) for numbers in (SCALES, OFFSETS))
    asked = replace(tensors, reward=lambda x, context: scales[context] * tensors.reward(x, None) + offsets[context])
    return ct.sample(asked, ct.policy_of(policy, grid), grid, noise, torch.as_tensor(prompts), dtype=torch.float64)


def statistics(steps, mean=0.0, weight=0.0):
    """Three prompts, of which this is known."""
    out = PerPrompt(3, steps).double()
    out.mean += torch.as_tensor(mean)
    out.weight += torch.as_tensor(weight)
    return out


def every_batch(objective, prompts, grid=GRID):
    """Gradients of all batches that sign patterns make, (patterns^paths, p): their mean is the expectation, for cubics in each normal."""
    signs = ctrl.Noise.signs(*line(), grid)
    at = np.array(list(product(range(signs.paths), repeat=len(prompts)))).ravel()
    noise = ctrl.noise.ArrayNoise(signs.start(1)[at], signs.steps(grid.steps, 1)[at])
    run, out = sampled(noise, np.resize(prompts, at.size), grid), []
    for first in range(0, at.size, len(prompts)):
        part = run[first : first + len(prompts)]
        out.append(torch.cat([g.flatten() for g in torch.autograd.grad(-objective.loss(part).mean(), run.policy.trainable())]))
    return torch.stack(out).numpy()


def exact(prompts, grid=GRID):
    """The gradient of the mean objective of these prompts; a constant in a reward has none."""
    return np.mean([ctrl.exact.evaluate(*line(SCALES[c]), grid).gradient.theta for c in prompts], axis=0)


def error(objective, prompts):
    expected = exact(prompts)
    return np.linalg.norm(every_batch(objective, prompts).mean(0) - expected) / np.linalg.norm(expected)


def baseline(returns, prompts, means, weights):
    """Path by path, as it is written."""
    out = np.empty_like(returns)
    for j in range(len(returns)):
        others = [k for k in range(len(returns)) if k != j]
        own = [k for k in others if prompts[k] == prompts[j]]
        w = weights[prompts[j]]
        if len(own) + w > 0:
            out[j] = (returns[own].sum(0) + w * means[prompts[j]]) / (len(own) + w)
        else:
            out[j] = returns[others].mean(0)
    return out


PROMPTS = np.array([0, 1, 0, 2, 0, 1])
BEFORE = dict(mean=np.array([[0.4, -0.3], [1.0, 2.0], [-0.7, 0.1]]), weight=np.array([3.0, 0.0, 5.0]))


@pytest.mark.parametrize("kind", [ct.ScoreFunction, ct.RewardToGo, ct.ClippedRatio])
@pytest.mark.parametrize("known", [{}, BEFORE], ids=["first update", "later"])
def test_baseline_is_its_formula(kind, known):
    """A prompt of three paths, of two, and of one; alone and of two processes; then what is remembered, which forgets."""
    run, state = sampled(ctrl.Noise(0, 6), PROMPTS), statistics(2, **known)
    before = known or dict(mean=np.zeros((3, 2)), weight=np.zeros(3))
    objective = kind(state)
    returns = objective.returns(run).numpy()
    expected = returns - baseline(returns, PROMPTS, before["mean"], before["weight"])
    np.testing.assert_allclose(objective.advantage(run), expected, rtol=1e-12, atol=1e-12)

    sent = torch.cat([torch.as_tensor(returns), torch.as_tensor(PROMPTS)[:, None]], 1)
    halves = [objective.advantage(replace(half, joined=lambda x: sent)) for half in (run[:2], run[2:])]
    np.testing.assert_allclose(torch.cat(halves), expected, rtol=1e-12, atol=1e-12)

    objective.remember(run)
    for c in range(3):
        w, own = before["weight"][c], returns[c == PROMPTS]
        np.testing.assert_allclose(state.mean[c], (w * before["mean"][c] + own.sum(0)) / (w + len(own)), rtol=1e-12)
        assert state.weight[c] == w + len(own)
    kept = state.mean[1:].clone()
    for _ in range(9):
        objective.remember(sampled(ctrl.Noise(1, 2), [0, 0]))
    assert state.weight[0] == 16 and torch.equal(state.mean[1:], kept)  # what was not asked keeps its own


@pytest.mark.parametrize("kind", [ct.ScoreFunction, ct.RewardToGo, ct.ClippedRatio])
@pytest.mark.parametrize("known", [{}, BEFORE], ids=["first update", "later"])
def test_unbiased_on_every_batch(kind, known):
    """Two paths of a prompt and one of another, all 512 batches of sign patterns: the exact gradient, whatever earlier updates say."""
    assert error(kind(statistics(2, **known)), (2, 1, 0) if known and kind is ct.RewardToGo else (0, 0, 1)) < 1e-10


class WithThePathItself(PerPrompt):
    """The prompt's mean of the whole batch."""

    def forward(self, run, returns):
        same = (run.prompt[:, None] == run.prompt).to(returns)
        return same @ returns / same.sum(1, keepdim=True)


class OfThisUpdate(PerPrompt):
    """The running mean has seen the batch before it is used on it."""

    def forward(self, run, returns):
        self.weight.zero_()
        self.remember(run, returns)
        return super().forward(run, returns)


class DividedByTheDeviation(ct.ScoreFunction):
    """DDPO as published: a prompt's advantages in units of its rewards' standard deviation, here true up to a factor."""

    def advantage(self, run):
        return super().advantage(run) / torch.tensor(SCALES, dtype=torch.float64)[run.prompt, None]


def test_planted_baselines_are_rejected():
    planted = [ct.ScoreFunction(WithThePathItself(3, 2)), ct.ScoreFunction(OfThisUpdate(3, 2).double()), DividedByTheDeviation(statistics(2))]
    for objective in planted:
        assert error(objective, (0, 0, 1)) > 0.05, objective


def test_variance_falls_where_prompts_differ():
    """Exactly, over all 256 batches of two paths of each of two prompts; all baselines have the same mean gradient. With mean rewards 7.2
    apart and deviations of 2.4 and 4.8 it is .70 of the whole batch's at once, and .31 when the prompts' paths of earlier updates are known."""
    grid, prompts = ctrl.TimeGrid(np.array([0.0, 1.0])), (0, 0, 1, 1)

    def variance(baseline):
        gradients = every_batch(ct.ScoreFunction(baseline), prompts, grid)
        np.testing.assert_allclose(gradients.mean(0), exact(prompts, grid), rtol=1e-10)
        return gradients.var(0).sum()

    run = sampled(ctrl.Noise.signs(*line(), grid), np.zeros(4, int), grid)
    means = [[float(run.problem.rewards(run.states[:, -1], torch.full((4,), c)).mean())] for c in range(3)]
    whole, fresh, later = variance(LeaveOneOut()), variance(statistics(1)), variance(statistics(1, means, 16.0))
    assert (fresh / whole, later / whole) == pytest.approx((0.703, 0.310), abs=1e-3)


def test_weights_of_each_prompt():
    """A batch's gradient is that of every prompt's own regression; a constant in a prompt's reward moves nothing. Over all paths it does."""
    prompts, form, plain = [0, 1, 0, 2, 1, 0], ct.RewardWeighted(by_prompt=True), ct.RewardWeighted()
    run = sampled(ctrl.Noise(3, len(prompts)), prompts)

    def gradient(objective, part):
        return torch.autograd.grad(objective.loss(part).sum(), run.policy.trainable(), retain_graph=True)

    own = [[k for k, c in enumerate(prompts) if c == number] for number in range(3)]
    alone = [gradient(plain, run[at]) for at in own]  # each prompt as a batch of its own
    for g, *parts in zip(gradient(form, run), *alone, strict=True):
        assert torch.allclose(g, sum(parts), rtol=1e-12, atol=0)
    weight = form.weight(run)
    assert weight[3] == 1 and torch.allclose(torch.stack([weight[at].mean() for at in own]), torch.ones(3, dtype=torch.float64), rtol=1e-14)
    dearer = replace(run, reward=run.reward + torch.tensor(OFFSETS, dtype=torch.float64)[prompts])
    assert torch.allclose(form.weight(dearer), weight, rtol=1e-12)
    assert not torch.allclose(plain.weight(dearer), plain.weight(run), rtol=0.1)  # planted: easy prompts take the others' weight


def test_what_needs_prompts_says_so():
    problem, policy = line()
    objective, noise = ct.estimator(ct.ScoreFunction(statistics(2))), ctrl.Noise(0, 4)
    with pytest.raises(ValueError, match="context: expected prompts, or the number of its prompt for each of 4 paths, got NoneType"):
        objective(problem, policy, GRID, noise)
    with pytest.raises(ValueError, match="noise: expected independent random paths for a leave-one-out baseline, got a quadrature rule"):
        objective(problem, policy, GRID, ctrl.Noise.gauss_hermite(problem, policy, GRID, nodes=2))
    with pytest.raises(ValueError, match="baseline: expected at least 2 paths for a leave-one-out baseline of prompts not met before, got 1"):
        ct.ScoreFunction(statistics(2)).advantage(sampled(ctrl.Noise(0, 1), [1]))
    assert ct.ScoreFunction(statistics(2, **BEFORE)).advantage(sampled(ctrl.Noise(0, 1), [2])).isfinite().all()
    with pytest.raises(ValueError, match="memory: expected"):
        PerPrompt(3, 2, memory=-1)


def test_statistics_by_prompt():
    r = torch.tensor([1.0, 2.0, 4.0, 8.0])
    first, second = by_prompt(torch.tensor([5, 2, 5, 5]), reward=r, kl=2 * r)
    assert first == {"prompt": 2, "paths": 1, "reward": 2.0, "reward_std": None, "kl": 4.0, "kl_std": None}
    assert second["paths"] == 3 and second["reward"] == pytest.approx(mean([1, 4, 8])) and second["kl_std"] == pytest.approx(stdev([2, 8, 16]))
