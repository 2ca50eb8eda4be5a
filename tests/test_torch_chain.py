"""Times, predictions and the chain on tensors: images with contexts, in chunks, and densities against torch's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

import ctrl
from ctrl import torch as ct
from ctrl.torch import chain
from ctrl.torch.policy import Prediction, Times, lift

torch.set_num_threads(1)

SCHEDULES = [ctrl.VP(0.1, 8.0, 1.3), ctrl.SubVP(0.1, 4.0), ctrl.VE(0.2, 3.0, 0.7), ctrl.DiscreteVP.linear(50, 1e-3, 0.3)]
SHAPE = (2, 3, 4)


def uneven(schedule, steps=5):
    return ctrl.TimeGrid(schedule.horizon * np.linspace(0, 1, steps + 1) ** 1.3)


def close(found, expected, tolerance=1e-12):
    """Relative to the largest number expected."""
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


# ------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_times_are_the_schedules(schedule):
    """alpha and v at tau = T - t; float32 is float64 rounded once; slices know where they begin."""
    grid = uneven(schedule)
    times, single = Times.of(schedule, grid, torch.float64), Times.of(schedule, grid)
    for name, column in (("alpha", schedule.alpha), ("v", schedule.v)):
        expected = [column(max(0.0, schedule.horizon - t)) for t in grid.times]
        np.testing.assert_array_equal(getattr(times, name), expected)
        assert torch.equal(getattr(single, name), getattr(times, name).float())
        exchanged = [column(float(t)) for t in grid.times]  # planted: t for tau
        assert not np.allclose(getattr(times, name), exchanged, rtol=1e-2) or column(0.1) == column(0.2)
    np.testing.assert_allclose(times.tau, schedule.horizon - grid.times, atol=1e-15)
    part = times[1:5][2:]
    assert len(times) == 6 and len(part) == 2 and part.first == 3 and torch.equal(part.v, times.v[3:5])
    assert len(times[-1:]) == 1 and times[-1:].first == 5 and float(times[-1:].v[0]) == 0


# ------------------------------------------------------------------------------------------- predictions


class WithoutTheRoot(Prediction):
    """-eps/v."""

    def action(self, times, x, output):
        return -output / lift(times.v, x)


class WithoutAlpha(Prediction):
    """(x_0 - x)/v."""

    def action(self, times, x, output):
        return (output - x) / lift(times.v, x)


class VelocityOfTheOtherSign(Prediction):
    """output = sqrt(v) x_0 - alpha eps."""

    def action(self, times, x, output):
        return ct.PredictsVelocity().action(times, x, -output)


class VelocityOfVP(Prediction):
    """eps = alpha output + sqrt(v) x: right only where alpha^2 + v = 1."""

    def action(self, times, x, output):
        return -(lift(times.alpha / times.v.sqrt(), x) * output + x)


def outputs(schedule):
    """States, one action, and what networks of every kind put out for it; the forward noising is x = alpha x_0 + sqrt(v) eps."""
    times = Times.of(schedule, uneven(schedule), torch.float64)[:5]
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 5, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    alpha, root = lift(times.alpha, clean), lift(times.v, clean).sqrt()
    return times, alpha * clean + root * noise, -noise / root, clean, noise, alpha * noise - root * clean


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_predictions_are_one_action(schedule):
    times, x, action, clean, noise, velocity = outputs(schedule)

    def acts(prediction, output):
        return ct.NetworkPolicy(Fixed(output), prediction)(times, x)

    for prediction, output in ((ct.PredictsNoise(), noise), (ct.PredictsClean(), clean), (ct.PredictsVelocity(), velocity),
                               (ct.PredictsScore(), action), (ct.PredictsFlow(), noise - clean)):
        assert close(acts(prediction, output), action), type(prediction).__name__
    assert close(ct.denoised(times, x, action), clean)
    right = {WithoutTheRoot: False, VelocityOfTheOtherSign: False, WithoutAlpha: isinstance(schedule, ctrl.VE),
             VelocityOfVP: not isinstance(schedule, (ctrl.VE, ctrl.SubVP))}
    assert not close(acts(ct.PredictsFlow(), clean - noise), action, 1e-2)
    for wrong, output in ((WithoutTheRoot, noise), (VelocityOfTheOtherSign, velocity), (WithoutAlpha, clean), (VelocityOfVP, velocity)):
        assert close(acts(wrong(), output), action, 1e-2) == right[wrong], wrong.__name__


class Fixed(nn.Module):
    """A network that always puts out the same."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, times, x, context):
        return self.output


def test_a_prediction_is_an_object():
    with pytest.raises(ValueError, match=r"prediction: expected a prediction, for instance PredictsNoise\(\), got str"):
        ct.NetworkPolicy(nn.Identity(), "noise")


# ------------------------------------------------------------------------------------------- images with contexts


class Conditional(nn.Module):
    """A small network that sees time, image and label: (n, k, *shape) -> (n, k, *shape)."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.mix, self.label = nn.Linear(24, 24), nn.Embedding(5, 24)

    def forward(self, times, x, context):
        h = self.mix(x.flatten(2)) + times.tau[:, None] + (0 if context is None else self.label(context)[:, None])
        return h.tanh().reshape(x.shape)


def brightness(images, context):
    return images.mean((1, 2, 3)) * (1.0 if context is None else context)


def images(eta=0.7, **changes):
    """Problem, policy and grid with networks in the place of laws, in float64."""
    pretrained, policy = (ct.NetworkPolicy(Conditional(seed), ct.PredictsNoise()).double() for seed in (0, 1))
    problem = ct.Problem(ctrl.VP(0.1, 8.0), pretrained.frozen(), brightness, SHAPE, 0.3, eta, 0.4)
    return replace(problem, **changes), policy, uneven(problem.schedule)


LABELS = torch.arange(7) % 5


@pytest.mark.parametrize("chunk", [1, 24 * 5, 24 * 5 * 3, 24 * 5 * 7])
def test_simulate_does_not_depend_on_chunks(chunk, monkeypatch):
    """One, three or all seven paths at a time, each with its own noise and label; progress is told of every chunk."""
    problem, policy, grid = images()
    noise = ctrl.Noise(1, 7)
    whole = ct.simulate(problem, policy, grid, noise, LABELS, dtype=torch.float64)
    monkeypatch.setattr(chain, "CHUNK_NUMBERS", chunk)
    told = []
    pieces = ct.simulate(problem, policy, grid, noise, LABELS, dtype=torch.float64, progress=told.append)
    for name in ("terminal", "reward", "penalty", "objective"):
        assert close(getattr(pieces, name), getattr(whole, name), 1e-13)
    size = max(1, chunk // 120)
    assert told == [*range(size, 7, size), 7]
    if size == 3:  # planted: every chunk with the first rows of the context
        monkeypatch.setattr(chain, "rows", lambda context, part: context[: part.stop - part.start])
        assert not close(ct.simulate(problem, policy, grid, noise, LABELS, dtype=torch.float64).terminal, whole.terminal, 1e-3)


def test_sample_is_simulate_with_its_trajectory():
    problem, policy, grid = images()
    noise = ctrl.Noise(1, 7)
    paths, run = (go(problem, policy, grid, noise, LABELS, dtype=torch.float64) for go in (ct.simulate, ct.sample))
    assert torch.equal(run.states[:, -1], paths.terminal) and torch.equal(run.reward, paths.reward) and len(run) == 7
    assert close(run.kl, paths.penalty) and close(run.objective, paths.objective)
    c, x = run.coefficients, run.states[:, :-1]
    f, h, dt, noise_of = (lift(torch.tensor(column), x) for column in (c.f, c.h, c.dt, c.noise))
    assert close(run.states[:, 1:], x + (-f * x + h * run.actions) * dt + noise_of * run.xi)
    assert not any(tensor.requires_grad for tensor in (run.states, run.actions, run.reward, paths.objective))


def test_slices_of_a_run_keep_their_contexts():
    """Labels as a tensor or as any other sequence; planted: labels of other paths."""
    problem, policy, grid = images()
    run = ct.sample(problem, policy, grid, ctrl.Noise(1, 7), LABELS, dtype=torch.float64)
    part = run[2:6]
    assert len(part) == 4 and close(part.cost, run.cost[2:6]) and close(part.log_ratio + 1, run.log_ratio[2:6] + 1)
    assert not close(replace(part, context=LABELS[:4]).cost, run.cost[2:6], 1e-2)
    assert replace(run, context=list("abcdefg"))[2:6].context == list("cdef")


def test_start_laws():
    """N(0, v(T) I) without one, a law's own samples with one: the analytic part's."""
    noise = ctrl.Noise(2, 6)
    problem, policy, grid = images(schedule=ctrl.VE(0.2, 3.0))
    start = ct.sample(problem, policy, grid, noise, dtype=torch.float64).states[:, 0]
    np.testing.assert_allclose(start.flatten(1), noise.start(24) * (9 - 0.04) ** 0.5, rtol=1e-14)
    law = ctrl.Gaussian(np.arange(24.0), np.diag(1 + np.arange(24.0)))
    start = ct.sample(replace(problem, start=law), policy, grid, noise, dtype=torch.float64).states[:, 0]
    np.testing.assert_allclose(start.flatten(1), law.sample(noise), rtol=1e-14)


def test_pretrained_paths_have_no_penalty():
    problem, _, grid = images()
    for policy in (problem.pretrained, ct.NetworkPolicy(Conditional(0), ct.PredictsNoise()).double()):
        paths = ct.simulate(problem, policy, grid, ctrl.Noise(1, 7), LABELS, dtype=torch.float64)
        assert torch.equal(paths.penalty, torch.zeros(7, dtype=torch.float64))
        assert torch.equal(paths.objective, np.exp(-0.4) * paths.reward)


# ------------------------------------------------------------------------------------------- densities


def log_density(run, policy):
    """log p(X_{i+1} | X_i) of every step by torch's Normal, summed over coordinates."""
    c, x = run.coefficients, run.states[:, :-1]
    f, h, dt, scale = (lift(torch.tensor(column), x) for column in (c.f, c.h, c.dt, c.noise))
    mean = x + (-f * x + h * policy(run.times[:-1], x, run.context)) * dt
    return Normal(mean, scale.expand_as(x)).log_prob(run.states[:, 1:]).flatten(2).sum(2)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("at_once", [2**16, 11])
def test_log_ratio_is_that_of_densities(eta, at_once):
    """0 with the score as gradient at the sampling policy; the difference of torch's log-densities away from it; k1 against the reference."""
    problem, policy, grid = images(eta)
    run = replace(ct.sample(problem, policy, grid, ctrl.Noise(1, 7), LABELS, dtype=torch.float64), at_once=at_once)
    assert run.log_ratio.abs().max() <= 1e-12
    theta = policy.trainable()
    for found, expected in zip(*(torch.autograd.grad(f.sum(), theta) for f in (run.log_ratio, log_density(run, policy))), strict=True):
        assert close(found, expected, 1e-11)
    other = ct.NetworkPolicy(Conditional(2), ct.PredictsNoise()).double()
    away, expected = replace(run, policy=other), log_density(run, other) - log_density(run, policy)
    assert away.log_ratio.abs().max() > 0.1 and close(away.log_ratio, expected, 1e-11)
    assert close(run.k1, log_density(run, policy) - log_density(run, problem.pretrained), 1e-11)
    assert not close(away.log_ratio / problem.dim, expected, 0.5)  # planted: the mean over coordinates
    assert not close(away.log_ratio / run.at(run.coefficients.dt).sqrt(), expected, 1e-2)  # planted: no root of the step


def test_cost_is_the_divergence_of_kernels():
    """lambda e^{-rho t} KL( p_theta(.|x) || p_pre(.|x) ) at every state; what was paid stays when the policy moves on."""
    problem, policy, grid = images()
    run = ct.sample(problem, policy, grid, ctrl.Noise(1, 7), LABELS, dtype=torch.float64)
    c = run.coefficients
    gap = lift(torch.tensor(c.h * c.dt / c.noise), run.actions) * (run.actions - run.s)
    divergence = 0.5 * gap.square().flatten(2).sum(2)
    assert close(run.cost, 0.3 * torch.tensor(c.discount) * divergence) and close(run.kl, divergence.sum(1)) and close(run.paid, run.cost)
    other = ct.NetworkPolicy(Conditional(2), ct.PredictsNoise()).double()
    for away in (replace(run, policy=other), run.under(other)):
        assert torch.equal(away.paid, run.paid) and torch.equal(away.objective, run.objective) and not close(away.cost, run.cost, 1e-2)
        assert torch.equal(away.cost, run.rate * (other(run.times[:-1], run.states[:, :-1], LABELS) - run.s).square().flatten(2).sum(2))


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("changes", "message"), [
    ({"schedule": "VP"}, "schedule: expected a noising schedule"), ({"pretrained": nn.Identity()}, "pretrained: expected a ctrl.torch policy"),
    ({"start": "prior"}, "start: expected a law or None"), ({"shape": (2, 0)}, "shape: expected an integer"),
    ({"kl_weight": -1.0}, "kl_weight"), ({"eta": -0.1}, "eta"), ({"discount": np.nan}, "discount")])
def test_wrong_problems_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        images(**changes)


def test_wrong_noise_grids_and_contexts_are_refused():
    problem, policy, grid = images()
    for go in (ct.simulate, ct.sample):
        with pytest.raises(ValueError, match="noise: expected a ctrl.Noise"):
            go(problem, policy, grid, 3)
        with pytest.raises(ValueError, match="grid: expected a TimeGrid"):
            go(problem, policy, [0.0, 1.0], ctrl.Noise(0, 2))
        with pytest.raises(ValueError, match="grid: expected times up to the horizon 1, got 2"):
            go(problem, policy, ctrl.TimeGrid([0.0, 2.0]), ctrl.Noise(0, 2))
        with pytest.raises(ValueError, match="context: expected one for each of 2 paths, got 7"):
            go(problem, policy, grid, ctrl.Noise(0, 2), LABELS)


def test_a_rule_without_step_noise_is_refused():
    """Its zeros would pass for noise."""
    problem, grid = ctrl.zoo.mixture_bump_1d(eta=0.0), ctrl.TimeGrid([0.0, 0.5, 1.0])
    policy = problem.pretrained(grid)
    rule = ctrl.Noise.signs(problem, policy, grid)
    module = ct.policy_of(policy, grid)
    assert len(ct.sample(ct.problem_of(problem, grid), module, grid, rule)) == 2
    for go in (ct.simulate, ct.sample):
        with pytest.raises(ValueError, match="noise: expected a quadrature rule with step noise"):
            go(ct.problem_of(replace(problem, eta=1.0), grid), module, grid, rule)
