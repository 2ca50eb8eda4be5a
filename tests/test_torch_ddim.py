"""The DDIM step against diffusers, its density against torch.distributions, and both sides of its kinship with the Euler chain."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ctrl import VP, DiscreteVP, Gaussian, LinearReward, Problem, TimeGrid, exact
from ctrl.torch.ddim import DDIM

SCHEDULES = {"linear": DiscreteVP.linear(), "scaled_linear": DiscreteVP.scaled_linear(), "squaredcos_cap_v2": DiscreteVP.squaredcos()}
SHAPE = (4, 3, 8, 8)


def scheduler_of(name, spacing, to_one, prediction, double):
    """diffusers' own sampler, 50 steps; in double precision it keeps its float32 betas and computes in float64."""
    diffusers = pytest.importorskip("diffusers")
    ends = {"beta_start": 0.00085, "beta_end": 0.012} if name == "scaled_linear" else {}
    out = diffusers.DDIMScheduler(beta_schedule=name, clip_sample=False, set_alpha_to_one=to_one, timestep_spacing=spacing,
                                  prediction_type=prediction, **ends)
    out.set_timesteps(50)
    if double:
        out.alphas_cumprod, out.final_alpha_cumprod = out.alphas_cumprod.double(), out.final_alpha_cumprod.double()
    return out


def noised(schedule, t, seed=0):
    """A state at timestep t and a wrong-ish noise prediction there, float64."""
    x0, eps, off, noise = torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    tau = schedule.noise_time(t)
    return schedule.alpha(tau) * x0 + schedule.v(tau) ** 0.5 * eps, eps + 0.3 * off, noise


def largest_gap(scheduler, schedule, ddim_eta, to_one, dtype, kind=DDIM):
    """max |ours - diffusers'| / max |diffusers'| over the whole list of timesteps."""
    worst = 0.0
    for t in scheduler.timesteps.tolist():
        x, eps, noise = noised(schedule, t)
        alpha, s = schedule.alpha(schedule.noise_time(t)), schedule.v(schedule.noise_time(t)) ** 0.5
        output = {"epsilon": eps, "v_prediction": (eps - s * x) / alpha, "sample": (x - s * eps) / alpha}[scheduler.config.prediction_type]
        x, eps, noise, output = (z.to(dtype) for z in (x, eps, noise, output))
        theirs = scheduler.step(output, t, x, eta=ddim_eta, variance_noise=noise if ddim_eta else None).prev_sample
        ours = kind(schedule, ddim_eta).step(x, eps, t, max(t - 20, -1 if to_one else 0), noise)
        assert ours.dtype == dtype
        worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
    return worst


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_step_is_that_of_diffusers(name, spacing, prediction):
    for to_one in (True, False):
        double, single = (scheduler_of(name, spacing, to_one, prediction, double=d) for d in (True, False))
        schedule = DiscreteVP.of(double)
        for ddim_eta in (0.0, 0.3, 1.0):
            assert largest_gap(double, schedule, ddim_eta, to_one, torch.float64) < 2e-13
            assert largest_gap(single, schedule, ddim_eta, to_one, torch.float32) < 4e-6
            assert largest_gap(single, SCHEDULES[name], ddim_eta, to_one, torch.float32) < 4e-5


class EtaSquared(DDIM):
    """std = ddim_eta^2 ... in the place of ddim_eta ..., the mean left alone."""

    def std(self, t, t_prev):
        return self.ddim_eta * DDIM.std(self, t, t_prev)


class DropsDirection(DDIM):
    """sqrt(v') in the place of sqrt(v' - std^2): the deterministic mean with noise on top."""

    def mean(self, x, eps, t, t_prev):
        return DDIM(self.schedule, 0.0).mean(x, eps, t, t_prev)


class NextTimestep(DDIM):
    """alphas_cumprod read one timestep early."""

    def _kernel(self, t, t_prev):
        return DDIM._kernel(self, t - 0.999, max(t_prev - 1, -1))


@pytest.mark.parametrize("planted", [EtaSquared, DropsDirection, NextTimestep])
def test_planted_steps_are_not_that_of_diffusers(planted):
    double = scheduler_of("linear", "trailing", True, "epsilon", double=True)
    assert largest_gap(double, DiscreteVP.of(double), 0.3, True, torch.float64, planted) > 1e-3


def test_where_std_is_zero_the_step_is_the_mean():
    for t, t_prev, ddim_eta in ((500, 480, 0.0), (19, -1, 1.0), (0, 0, 1.0)):
        kernel, (x, eps, noise) = DDIM(SCHEDULES["linear"], ddim_eta), noised(SCHEDULES["linear"], t)
        assert kernel.std(t, t_prev) == 0.0
        torch.testing.assert_close(kernel.step(x, eps, t, t_prev, noise), kernel.mean(x, eps, t, t_prev), rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"^ddim_eta: expected .*, got ddim_eta = .* from timestep"):
            kernel.log_prob(x, x, eps, t, t_prev)
    torch.testing.assert_close(kernel.mean(x, eps, 0, 0), x)     # diffusers' null step: "leading" with set_alpha_to_one=False


@pytest.mark.parametrize(("t", "t_prev", "ddim_eta"), [(999, 979, 1.0), (481, 461, 0.3), (1, 0, 1.0), (500, 481.5, 0.7)])
def test_log_prob_is_the_sum(t, t_prev, ddim_eta):
    kernel, (x, eps, noise) = DDIM(SCHEDULES["scaled_linear"], ddim_eta), noised(SCHEDULES["scaled_linear"], t)
    x_prev = kernel.step(x, eps, t, t_prev, noise)
    expected = torch.distributions.Normal(kernel.mean(x, eps, t, t_prev), kernel.std(t, t_prev)).log_prob(x_prev).flatten(1)
    ours = kernel.log_prob(x_prev, x, eps, t, t_prev)
    assert ours.shape == (4,)
    torch.testing.assert_close(ours, expected.sum(1), rtol=1e-11, atol=0)
    assert not torch.allclose(ours, expected.mean(1), rtol=0.5)  # planted: the mean over dimensions
    flat = kernel.log_prob(*(z.flatten(1) for z in (x_prev, x, eps)), t, t_prev)
    torch.testing.assert_close(flat, ours)


def test_gradient_of_log_prob():
    """d log p / d eps = c (x_prev - mean)/std^2: what a policy gradient is made of; and the score identity E[...] = 0 on +- noise."""
    kernel, (x, eps, noise) = DDIM(SCHEDULES["linear"]), noised(SCHEDULES["linear"], 500)
    eps.requires_grad_()
    std, weight = kernel.std(500, 480), kernel.mean(torch.zeros(1), torch.ones(1), 500, 480).item()
    gradients = [torch.autograd.grad(kernel.log_prob(kernel.step(x, eps, 500, 480, z).detach(), x, eps, 500, 480).sum(), eps)[0]
                 for z in (noise, -noise)]
    torch.testing.assert_close(gradients[0], weight / std * noise, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradients[0], -gradients[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "seen"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_is_left_at_the_door(dtype, seen):
    """The density of what the half-precision tensors say, in float32; planted: the same formula in half precision."""
    kernel = DDIM(SCHEDULES["scaled_linear"])
    x, eps, noise = (z.to(dtype) for z in noised(kernel.schedule, 41))
    x_prev = kernel.step(x, eps, 41, 21, noise)
    assert x_prev.dtype == torch.float32 == kernel.mean(x, eps, 41, 21).dtype
    ours, truth = (kernel.log_prob(*(z.to(to) for z in (x_prev, x, eps)), 41, 21) for to in (torch.float32, torch.float64))
    assert kernel.log_prob(x_prev, x, eps, 41, 21).dtype == torch.float32
    torch.testing.assert_close(kernel.log_prob(x_prev, x, eps, 41, 21), ours)
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=2e-3)
    z = (x_prev.to(dtype) - kernel.mean(x, eps, 41, 21).to(dtype)) / kernel.std(41, 21)
    planted = -0.5 * z.square().flatten(1).sum(1) + (truth + 0.5 * noise.double().square().flatten(1).sum(1))
    assert (planted - truth).abs().max() > seen


def one_step_gaps(schedule, tau, D, ddim_eta, eta):
    """|DDIM - Euler| of mean and std, steps D from tau, at fixed x and eps; Euler's coefficients are the library's."""
    x, eps = (torch.tensor([z], dtype=torch.float64) for z in (1.3, -0.7))
    f, g2, h, _ = schedule.rates(schedule.t(tau), eta)
    kernel, t, v = DDIM(schedule, ddim_eta), schedule.timestep(tau), schedule.v(tau)
    rows = []
    for step in D:
        t_prev = schedule.timestep(tau - step)
        euler = x + (-f * x - h * eps / v**0.5) * step
        rows.append([(kernel.mean(x, eps, t, t_prev) - euler).abs().item(), abs(kernel.std(t, t_prev) - eta * (g2 * step) ** 0.5)])
    return np.array(rows).T


def slope(D, gap):
    return np.polyfit(np.log(D), np.log(gap), 1)[0]


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), DiscreteVP.linear(10, 0.01, 0.4, 2.0)], ids=[*SCHEDULES, "short"])
def test_one_step_beside_euler(schedule):
    T = schedule.horizon
    D = T * np.array([4e-3, 2e-3, 1e-3, 5e-4])
    for tau in (0.31 * T, 0.65 * T):
        beta, v, rise = schedule.beta(tau), schedule.v(tau), (schedule.beta(tau + 1e-5) - schedule.beta(tau - 1e-5)) / 2e-5
        for eta in (0.0, 0.3, 0.7, 1.0):
            mean, std = one_step_gaps(schedule, tau, D, eta, eta)
            assert abs(slope(D, mean) - 2) < 0.1
            if eta:
                assert abs(slope(D, std) - 1.5) < 0.05
                predicted = 0.5 * D[-1] * (beta / 2 + rise / (2 * beta) + beta * (1 - v) / v) * eta * (beta * D[-1]) ** 0.5
                np.testing.assert_allclose(std[-1], predicted, rtol=0.02)
        mean, std = one_step_gaps(schedule, tau, D, 1.0, 0.5)    # planted: another eta
        assert slope(D, mean) < 1.2 and slope(D, std) < 0.7


COV, MEAN = np.array([0.3, 2.0]), np.array([1.0, -0.5])


def ddim_law(schedule, ddim_eta, times):
    """Mean and variances of the DDIM chain with the exact score of N(MEAN, diag COV), started at p_T: a linear recursion."""
    kernel, tau = DDIM(schedule, ddim_eta), [schedule.tau(t) for t in times]
    alpha, v = schedule.alpha(tau[0]), schedule.v(tau[0])
    m, P = alpha * MEAN, alpha**2 * COV + v
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for here, there in zip(tau[:-1], tau[1:], strict=True):
        at = schedule.timestep(here), schedule.timestep(there)
        on_x, on_eps = kernel.mean(one, zero, *at).item(), kernel.mean(zero, one, *at).item()
        alpha, v = schedule.alpha(here), schedule.v(here)
        gain = on_eps * v**0.5 / (alpha**2 * COV + v)            # eps = sqrt(v) (x - alpha m)/(alpha^2 C + v)
        m, P = on_x * m + gain * (m - alpha * MEAN), (on_x + gain) ** 2 * P + kernel.std(*at) ** 2
    return m, P


def euler_law(schedule, eta, times):
    problem = Problem(schedule, Gaussian(MEAN, np.diag(COV)), LinearReward([1.0, 1.0]), 1.0, eta=eta, start="exact")
    grid = TimeGrid(times)
    law = exact.evaluate(problem, problem.pretrained(grid), grid).terminal
    return law.mean, np.diag(law.cov)


def log_slope(gaps, D):
    """Slope of gap/D in log(1/D) between the two finest grids."""
    a, b = (gaps / D[:, None])[-2:]
    return (b - a) / np.log(D[-2] / D[-1])


@pytest.mark.parametrize("ddim_eta", [0.0, 0.5, 1.0])
def test_law_of_the_chain(ddim_eta):
    """Order 1 on grids that stop before data; down to data D log(1/D) with the predicted factor, which Euler's chain (planted) has not."""
    schedule = SCHEDULES["scaled_linear"]
    steps = np.array([200, 400, 800, 1600])
    D = 1 / steps
    laws = [ddim_law(schedule, ddim_eta, np.linspace(0, 1, n + 1)) for n in steps]
    np.testing.assert_allclose([m for m, _ in laws], [MEAN] * len(steps), rtol=1e-12)
    gaps = np.array([P - COV for _, P in laws])
    predicted = -((1 + ddim_eta**2) ** 2) / 4 * schedule.beta(0.0)
    np.testing.assert_allclose(log_slope(gaps, D), predicted, rtol=0.06)
    assert np.all(np.diff(np.abs(gaps), axis=0) < 0)

    euler = [euler_law(schedule, ddim_eta, np.linspace(0, 1, n + 1)) for n in steps]
    euler_gaps = np.array([P - COV for _, P in euler])
    np.testing.assert_allclose(np.log2(euler_gaps[:-1] / euler_gaps[1:])[-1], 1, atol=0.02)
    assert np.all(np.abs(log_slope(euler_gaps, D) / predicted) < 0.1)

    stopped = [[law(schedule, ddim_eta, np.linspace(0, 0.8, n + 1)) for n in steps] for law in (ddim_law, euler_law)]
    tau = schedule.tau(0.8)
    alpha, v = schedule.alpha(tau), schedule.v(tau)
    for moment, truth in ((0, alpha * MEAN), (1, alpha**2 * COV + v)):
        ours, eulers = (np.array([law[moment] for law in laws]) for laws in stopped)
        for gap in (ours - eulers, *([ours - truth] if moment else [])):
            np.testing.assert_allclose(np.log2(np.abs(gap[:-1] / gap[1:]))[-1], 1, atol=0.03)


@pytest.mark.parametrize(("name", "make"), [
    ("schedule", lambda k, x: DDIM(VP())), ("schedule", lambda k, x: DDIM(SimpleNamespace(alphas_cumprod=[0.9, 0.5]))),
    ("ddim_eta", lambda k, x: DDIM(k.schedule, -0.1)), ("ddim_eta", lambda k, x: DDIM(k.schedule, 1.1)),
    ("eps", lambda k, x: k.mean(x, x[:, :1], 500, 480)), ("noise", lambda k, x: k.step(x, x, 500, 480, x[:1])),
    ("x_prev", lambda k, x: k.log_prob(x[:1], x, x, 500, 480)), ("t_prev", lambda k, x: k.mean(x, x, 480, 500)),
    ("t_prev", lambda k, x: k.std(1000, 980)), ("t_prev", lambda k, x: k.std(19, -2)), ("t_prev", lambda k, x: k.std(-1, -1)),
    ("t_prev", lambda k, x: k.std(float("nan"), 3))])
def test_bad_inputs_are_named_in_one_line(name, make):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got ") as caught:
        make(DDIM(SCHEDULES["linear"]), torch.zeros(2, 3, 4, 4))
    assert "\n" not in str(caught.value)
