"""Values on tensors: the skeleton's formula and where it is right, exact values, and the martingale loss whose minimum is V."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import ctrl
from ctrl import torch as ct
from ctrl.torch.value import value_gradients, values

torch.set_num_threads(1)


def uneven(problem, steps=4):
    times = np.append(0.0, np.cumsum(np.resize([1.0, 2.0, 1.0, 3.0], steps)))
    return ctrl.TimeGrid(problem.horizon * times / times[-1])


def setup(schedule=None, eta=0.7, steps=4, **changes):
    """The reference data and reward on another schedule, a discount, a policy that departs through x."""
    problem = replace(ctrl.zoo.gaussian_pull_2d(eta), schedule=schedule or ctrl.VP(0.5, 4.0, 1.2), discount=0.3, **changes)
    W = np.array([[[0.3, -0.2], [0.1, 0.2]]])
    return problem, ctrl.BasisPolicy(problem, lambda t: np.array([1.0]), W, np.array([[0.2, -0.1]])), uneven(problem, steps)


def sampled(problem, policy, grid, noise=None):
    return ct.sample(ct.problem_of(problem, grid), ct.policy_of(policy, grid), grid, noise or ctrl.Noise(4, 32), dtype=torch.float64)


def gap(found, expected):
    found, expected = (x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in (found, expected))
    assert found.shape == expected.shape
    return np.max(np.abs(found - expected)) / np.max(np.abs(expected))


# ------------------------------------------------------------------------------------------- the skeleton


class Wave(nn.Module):
    """F(t, x) = sin(x_1 + 2 x_2) + tau."""

    def forward(self, times, x, context):
        return (x[..., 0] + 2 * x[..., 1]).sin() + times.tau


def wave(tau, x):
    return np.sin(x[:, 0] + 2 * x[:, 1]) + tau


def posterior_mean(problem, tau, x):
    """E[Y_0 | Y_tau = x] of Gaussian data: m + alpha C (alpha^2 C + v I)^{-1} (x - alpha m)."""
    alpha, v, m, C = problem.schedule.alpha(tau), problem.schedule.v(tau), problem.data.mean, problem.data.cov
    return m + (x - alpha * m) @ np.linalg.solve(alpha**2 * C + v * np.eye(2), alpha * C)


def weights(schedule, tau):
    """c_skip = alpha^2/(alpha^2 + v) and c_out = sqrt(1 - c_skip^2)."""
    alpha, v = (np.array([c(s) for s in np.atleast_1d(tau)]).reshape(np.shape(tau)) for c in (schedule.alpha, schedule.v))
    skip = alpha**2 / (alpha**2 + v)
    return skip, np.sqrt(1 - skip**2)


def ansatz(problem, t, x, clean=posterior_mean, weights=weights):
    """The docstring's formula at generation time t."""
    tau = problem.horizon - t
    c_skip, c_out = weights(problem.schedule, tau)
    return c_skip * problem.reward.value(clean(problem, tau, x)) + c_out * wave(tau, x)


def without_alpha(problem, tau, x):
    return problem.schedule.alpha(tau) * posterior_mean(problem, tau, x)


def root_for_variance(problem, tau, x):
    """(x + sqrt(v) s)/alpha."""
    alpha, v = problem.schedule.alpha(tau), problem.schedule.v(tau)
    return (x + (alpha * posterior_mean(problem, tau, x) - x) / np.sqrt(v)) / alpha


WRONG = {
    "x0_hat without 1/alpha": {"clean": without_alpha}, "sqrt(v) for v": {"clean": root_for_variance},
    "c_skip at the wrong end": {"weights": lambda schedule, tau: weights(schedule, tau)[::-1]},
    "weights in t": {"weights": lambda schedule, tau: weights(schedule, schedule.horizon - tau)},
    "weights linear in time": {"weights": lambda schedule, tau: (np.cos(0.5 * np.pi * tau / schedule.horizon),
                                                                 np.sin(0.5 * np.pi * tau / schedule.horizon))},
    "weights of another horizon": {"weights": lambda schedule, tau: weights(ctrl.VP(0.5, 4.0, 1.0), tau)},
    "the noisy state for x0_hat": {"clean": lambda problem, tau, x: x}}


@pytest.mark.parametrize("schedule", [ctrl.VP(0.5, 4.0, 1.2), ctrl.SubVP(0.5, 4.0, 1.2), ctrl.VE(0.3, 2.0, 1.2)], ids=lambda s: type(s).__name__)
def test_ansatz_is_its_formula(schedule):
    """x0_hat is the posterior mean of Gaussian data; wrong skeletons are far off; a plain value is its network."""
    problem, policy, grid = setup(schedule)
    run = sampled(problem, policy, grid)
    found = ct.Ansatz(Wave())(run)

    def by_hand(**formula):
        return np.stack([ansatz(problem, t, run.states[:, i].numpy(), **formula) for i, t in enumerate(grid.times[:-1])], axis=1)

    assert gap(found, by_hand()) <= 1e-12
    for name, formula in WRONG.items():
        if not (formula.get("clean") is without_alpha and isinstance(schedule, ctrl.VE)):
            assert gap(by_hand(**formula), by_hand()) > 1e-2, name
    plain = [wave(problem.horizon - t, run.states[:, i].numpy()) for i, t in enumerate(grid.times[:-1])]
    assert gap(ct.PlainValue(Wave())(run), np.stack(plain, axis=1)) <= 1e-14


def test_ends_of_the_ansatz():
    """Where alpha is small nearly the network alone, at data the reward alone."""
    problem, policy, _ = setup()
    grid = ctrl.TimeGrid(problem.horizon * np.array([0.0, 0.5, 1 - 1e-14, 1.0]))
    run = sampled(problem, policy, grid)
    first, _, last = ct.Ansatz(Wave())(run).detach().numpy().T
    start, tau = run.states[:, 0].numpy(), problem.horizon
    c_skip, c_out = weights(problem.schedule, tau)
    assert c_skip < 0.3
    np.testing.assert_allclose(first, c_skip * problem.reward.value(posterior_mean(problem, tau, start)) + c_out * wave(tau, start), rtol=1e-12)
    np.testing.assert_allclose(last, problem.reward.value(run.states[:, 2].numpy()), rtol=1e-7, atol=2e-6)


def test_gradient_of_the_ansatz():
    """Through x0_hat, and so through the score's own derivative, against central differences of the formula."""
    problem, policy, grid = setup()
    run = sampled(problem, policy, grid)
    found = value_gradients(ct.Ansatz(Wave()), run).numpy()
    discount = np.exp(-0.3 * grid.times)
    for i in range(1, grid.steps):
        x, t = run.states[:, i].numpy(), grid.times[i]
        slope = np.stack([(ansatz(problem, t, x + e) - ansatz(problem, t, x - e)) / 2e-5 for e in 1e-5 * np.eye(2)], axis=1)
        assert gap(found[:, i - 1], discount[i] * slope) <= 1e-8
    assert gap(found[:, -1], discount[-1] * problem.reward.gradient(run.states[:, -1].numpy())) <= 1e-13
    still = run[:]
    still.__dict__["pretrained"] = run.s  # planted: no gradient through the score
    assert gap(value_gradients(ct.Ansatz(Wave()), still)[:, 0], found[:, 0]) > 1e-2


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_skeleton_is_the_value_but_for_half_a_trace(eta):
    """V - r(x0_hat) = -1/2 tr(Q Cov(X_T | X_t)) in continuous time at eta = 1; planted: the same at another eta."""
    problem, _, grid = setup(eta=eta)
    problem = replace(problem, discount=0.0)
    run = sampled(problem, problem.pretrained(grid), grid)
    clean = ct.denoised(run.times[:-1], run.x, run.pretrained).detach().numpy()
    V, C, Q = ctrl.exact.limit.value(problem, ctrl.BasisPolicy.shift(problem, [0.0, 0.0])), problem.data.cov, problem.reward.matrix
    worst = 0.0
    for i, t in enumerate(grid.times[:-1]):
        tau = problem.horizon - t
        cov = np.linalg.inv(np.linalg.inv(C) + problem.schedule.alpha(tau) ** 2 / problem.schedule.v(tau) * np.eye(2))
        skeleton = problem.reward.value(clean[:, i]) - 0.5 * np.trace(Q @ cov)
        worst = max(worst, gap(skeleton, V(t, run.states[:, i].numpy())))
    assert worst <= 1e-8 if eta == 1 else worst > 1e-2


@pytest.mark.parametrize("kind", ["tensor", "list"])
def test_skeleton_knows_each_paths_context(kind):
    """Prompts by path at every time, as a tensor or any other sequence; planted: repeated in the wrong order."""
    problem, policy, grid = setup()
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    context = weight if kind == "tensor" else [f"{w:g}" for w in weight.tolist()]

    def reward(x, c):
        return x[:, 0] * (c if isinstance(c, torch.Tensor) else torch.tensor([float(word) for word in c], dtype=torch.float64))

    tensors = replace(ct.problem_of(problem, grid), reward=reward)
    run = ct.sample(tensors, ct.policy_of(policy, grid), grid, ctrl.Noise(4, 4), context, dtype=torch.float64)
    found = ct.Ansatz(Wave())(run)
    times, x = run.times[:-1], run.states[:, :-1]
    c_skip, c_out = (torch.tensor(column) for column in weights(problem.schedule, times.tau.numpy()))
    clean = ct.denoised(times, x, run.s)

    def by_hand(weight):
        return c_skip * weight.reshape(4, -1) * clean[..., 0] + c_out * Wave()(times, x, None)

    assert gap(found, by_hand(weight)) <= 1e-13 and gap(by_hand(weight.repeat(4)), by_hand(weight)) > 1e-1


# ------------------------------------------------------------------------------------------- exact values


def test_values_carry_the_discount_and_end_in_the_reward():
    problem, policy, grid = setup()
    run = sampled(problem, policy, grid, ctrl.Noise.signs(problem, policy, grid))
    V, discount = ctrl.exact.value(problem, policy, grid), np.exp(-0.3 * grid.times)
    x = run.states.numpy()
    found, slopes = values(ct.ExactValue(V), run), value_gradients(ct.ExactValue(V), run)
    assert gap(found, np.stack([discount[i] * V(i, x[:, i]) for i in range(grid.steps + 1)], axis=1)) <= 1e-13
    assert gap(slopes, np.stack([discount[i] * V.gradient(i, x[:, i]) for i in range(1, grid.steps + 1)], axis=1)) <= 1e-13
    assert not found.requires_grad and not slopes.requires_grad
    assert gap(found.diff(dim=1).mean(0), run.paid.mean(0)) <= 1e-12  # E[V_{i+1} - V_i] = E cost_i
    assert abs(float(found[:, 0].mean()) / ctrl.exact.evaluate(problem, policy, grid).objective - 1) <= 1e-12


# ------------------------------------------------------------------------------------------- the martingale loss


class Moved(ct.Value):
    """V + w'phi with phi = (1, x_1, cos x_2, tau x_1^2)."""

    def __init__(self, value, w=(0.0, 0.0, 0.0, 0.0)):
        super().__init__()
        self.exact, self.w = ct.ExactValue(value), nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def features(self, run):
        x, tau = run.states[:, :-1], run.times.tau[:-1]
        return torch.stack([torch.ones_like(x[..., 0]), x[..., 0], x[..., 1].cos(), tau * x[..., 0].square()], dim=-1)

    def forward(self, run):
        return self.exact(run) + self.features(run) @ self.w


def slope(value, run, loss=ct.martingale_loss):
    """Gradient of the mean loss in w, in units of its parts' sizes."""
    each = torch.autograd.grad(loss(value, run).mean(), value.w)[0]
    scale = (run.at(run.coefficients.dt)[:, None] * value.features(run).abs()).sum(1).mean(0)
    return float((each / scale).abs().max())


def squared_difference(value, run):
    """The squared TD residual: its minimum is elsewhere."""
    v = torch.cat([run.at(run.coefficients.discount) * value(run), run.final[:, None]], dim=1)
    return (v.diff(dim=1) - run.paid).square().sum(1)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_martingale_loss_is_least_at_the_value(eta):
    """Sign patterns: given X_i the return's mean is V_i exactly, so that the slope is zero in every direction and the loss grows by the square."""
    problem, policy, grid = setup(eta=eta, steps=3)
    run = sampled(problem, policy, grid, ctrl.Noise.signs(problem, policy, grid))
    V = ctrl.exact.value(problem, policy, grid)
    assert slope(Moved(V), run) <= 1e-13
    away = Moved(V, (0.1, -0.2, 0.3, 0.1))
    grown = (ct.martingale_loss(away, run) - ct.martingale_loss(Moved(V), run)).mean()
    c = run.coefficients
    square = (run.at(c.dt * c.discount**2) * (away.features(run) @ away.w).square()).sum(1).mean().detach()
    assert float(square) > 1e-2 and gap(grown, square) <= 1e-11


def doctored(run, cost_to_go):
    other = run[:]
    other.__dict__["cost_to_go"] = cost_to_go
    return other


def test_planted_values_are_not_the_minimum():
    problem, policy, grid = setup(steps=3)
    run = sampled(problem, policy, grid, ctrl.Noise.signs(problem, policy, grid))
    V, paid = Moved(ctrl.exact.value(problem, policy, grid)), run.paid
    wrong = {"from i + 1": run.cost_to_go - paid, "added": -run.cost_to_go, "from 0": run.cost_to_go[:, :1].expand_as(paid), "none": 0 * paid}
    for name, cost_to_go in wrong.items():
        assert slope(V, doctored(run, cost_to_go)) > 1e-2, name
    assert slope(Moved(ctrl.exact.value(problem, problem.pretrained(grid), grid)), run) > 1e-2
    assert slope(V, run, squared_difference) > 1e-2


def test_martingale_loss_moves_the_value_alone():
    """Its gradient reaches the value's parameters, not the policy's, nor the states."""
    problem, policy, grid = setup()
    run = sampled(problem, policy, grid)
    value = ct.Ansatz(Linear())
    ct.martingale_loss(value, run).mean().backward()
    assert value.network.w.grad.abs().min() > 0 and run.x.grad is None
    assert all(p.grad is None for p in run.policy.parameters())


class Linear(nn.Module):
    """F = x'w."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, times, x, context):
        return x @ self.w
