"""Schedules against their own ODEs, the clock, grids and the coefficients of the generation SDE."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicSpline

from ctrl import OU, VE, VP, DiscreteVP, FlowMatching, Gaussian, LinearReward, Problem, SubVP, TimeGrid, exact

SCHEDULES = [
    VP(0.1, 10.0, 1.0), VP(0.3, 4.0, 2.5), VP(5.0, 0.5, 0.7), SubVP(0.1, 10.0, 1.0), SubVP(0.2, 3.0, 3.0),
    OU(1.0, 1.0), OU(2.5, 3.0), VE(0.01, 10.0, 1.0), VE(0.2, 5.0, 2.0), FlowMatching(0.9),
    DiscreteVP([0.3, 0.05, 0.7, 0.01, 0.2], 2.0), DiscreteVP.linear(30, 0.01, 0.3), DiscreteVP.squaredcos(20, 0.7)]
DIFFUSERS = {"linear": DiscreteVP.linear(), "scaled_linear": DiscreteVP.scaled_linear(), "squaredcos_cap_v2": DiscreteVP.squaredcos()}


def label(schedule):
    """A schedule in one short line."""
    return f"{type(schedule).__name__}({schedule.betas.size} betas)" if isinstance(schedule, DiscreteVP) else repr(schedule)


def ode_gap(schedule):
    """Largest gap between the closed alpha, v and alpha' = f alpha, v' = 2 f v + g^2 (alpha(0) = 1, v(0) = 0), relative."""
    def slope(tau, y):
        f = schedule.f(tau)
        return [f * y[0], 2 * f * y[1] + schedule.g2(tau)]

    at = np.linspace(0, schedule.horizon, 13)
    y = solve_ivp(slope, (0, schedule.horizon), [1.0, 0.0], "DOP853", at, rtol=1e-12, atol=1e-14, max_step=schedule.horizon / 120).y
    closed = np.array([[schedule.alpha(tau), schedule.v(tau)] for tau in at]).T
    return np.max(np.abs(y - closed) / np.maximum(np.abs(y), 1e-3))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
def test_closed_forms_solve_their_odes(schedule):
    assert ode_gap(schedule) < 1e-9


@dataclass(frozen=True)
class SubVPWithVPVariance(SubVP):
    def v(self, tau):
        return VP.v(self, tau)


@dataclass(frozen=True)
class WrongSign(VP):
    def f(self, tau):
        return 0.5 * self.beta(tau)


@dataclass(frozen=True)
class SlopeOfSigma(VE):
    """g^2 = d sigma/dtau in the place of d sigma^2/dtau."""

    def g2(self, tau):
        return VE.g2(self, tau) / (2 * np.sqrt(self.v(tau) + self.sigma_min**2))


class StepwiseBeta(DiscreteVP):
    """beta_k K/T for -log(1 - beta_k) K/T: B of the continuous limit with the nodes of the chain."""

    def beta(self, tau):
        return self.betas[min(int(tau * self.betas.size / self.horizon), self.betas.size - 1)] * self.betas.size / self.horizon


@pytest.mark.parametrize("planted", [SubVPWithVPVariance(0.1, 10.0), WrongSign(0.1, 10.0), SlopeOfSigma(0.01, 10.0),
                                     StepwiseBeta([0.3, 0.05, 0.7, 0.01, 0.2], 2.0)], ids=label)
def test_planted_schedules_break_their_odes(planted):
    assert ode_gap(planted) > 1e-2


def test_flow_grid():
    """Equal steps of the log noise-to-signal ratio; the first is stable at every eta <= 1, where one of a uniform grid would not be."""
    flow = FlowMatching(0.98)
    grid = flow.grid(40)
    tau = np.array([flow.tau(t) for t in grid.times])
    ratio = 0.5 * np.log([flow.v(x) / flow.alpha(x) ** 2 for x in tau])
    np.testing.assert_allclose(np.diff(ratio), np.diff(ratio)[0], rtol=1e-9)
    assert tau[0] == 0.98 and tau[-1] == pytest.approx(1e-3) and np.all(grid.dt < 2 * (1 - tau[:-1]))
    assert 0.98 / 20 > 2 * 0.02


def test_the_flow_is_the_velocity_field():
    """eta = 0 with the score of the data moves along E[eps - Y_0 | Y_tau]; at every eta the chain's law tends to that of the data."""
    law, flow = Gaussian([0.5], [[0.3]]), FlowMatching(0.9)
    for tau in (0.1, 0.5, 0.9):
        x = np.array([[0.7], [-1.0]])
        f, _, h, _ = flow.rates(flow.t(tau), 0.0)
        score = law.noised(flow.alpha(tau), flow.v(tau)).score(x)
        clean = (x + flow.v(tau) * score) / flow.alpha(tau)
        np.testing.assert_allclose(f * x - h * score, (x - flow.alpha(tau) * clean) / tau - clean, rtol=1e-12)
    for eta in (0.0, 0.7, 1.0):
        problem = Problem(flow, law, LinearReward([1.0]), 0.5, eta, start="exact")
        there = law.noised(flow.alpha(1e-3), flow.v(1e-3)).cov[0, 0]
        gaps = [abs(exact.evaluate(problem, problem.pretrained(grid), grid).terminal.cov[0, 0] - there) for grid in map(flow.grid, (1600, 3200))]
        assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.05), eta


def test_closed_identities():
    for s in SCHEDULES:
        for tau in np.linspace(0, s.horizon, 7):
            if isinstance(s, SubVP):
                assert s.v(tau) == pytest.approx((1 - s.alpha(tau) ** 2) ** 2, rel=1e-12, abs=1e-15)
            elif isinstance(s, VE):
                assert s.alpha(tau) == 1
            elif isinstance(s, FlowMatching):
                assert s.v(tau) ** 0.5 + s.alpha(tau) == pytest.approx(1, rel=1e-14)
            else:
                assert s.v(tau) + s.alpha(tau) ** 2 == pytest.approx(1, rel=1e-14)
    ve = VE(0.01, 10.0)
    assert ve.v(1.0) == pytest.approx(10.0**2 - 0.01**2, rel=1e-12) == ve.prior_variance
    assert OU(2.0, 1.5).alpha(0.7) == VP(2.0, 2.0, 1.5).alpha(0.7)


def test_the_clock_runs_backwards():
    s = VP(0.1, 10.0, horizon=2.0)
    assert s.tau(0.0) == 2.0 and s.tau(2.0) == 0.0 and s.t(0.5) == 1.5 and s.tau(s.t(0.3)) == pytest.approx(0.3)
    assert s.tau(2.0 + 1e-15) == 0.0
    f, g2, _, _ = s.rates(0.0, 1.0)          # generation starts at the noisy end
    assert (f, g2) == (-5.0, 10.0) and s.rates(2.0, 1.0)[1] == pytest.approx(0.1)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
def test_coefficients(schedule, eta):
    """Every coefficient from its definition, on a grid that is not uniform and stops before the horizon."""
    T = schedule.horizon
    times = T * np.array([0.0, 0.1, 0.35, 0.4, 0.97])
    grid, rho = TimeGrid(times), 0.6
    c = schedule.coefficients(grid, eta, rho)
    tau = T - times[:-1]
    g2 = np.array([schedule.g2(x) for x in tau])
    h = (1 + eta**2) / 2 * g2
    np.testing.assert_allclose(c.dt, np.diff(times), rtol=1e-15)
    np.testing.assert_allclose(c.f, [schedule.f(x) for x in tau], rtol=1e-13)
    np.testing.assert_allclose(c.g2, g2, rtol=1e-13)
    np.testing.assert_allclose(c.h, h, rtol=1e-13)
    np.testing.assert_allclose(c.kappa, h**2 / (2 * eta**2 * g2) if eta else g2 / 2, rtol=1e-13)
    np.testing.assert_allclose(c.noise, eta * np.sqrt(g2) * np.sqrt(c.dt), rtol=1e-13)
    np.testing.assert_allclose(c.discount, np.exp(-rho * times[:-1]), rtol=1e-14)
    assert c.final_discount == pytest.approx(np.exp(-rho * times[-1]), rel=1e-14)
    if eta not in (0.0, 1.0):                # planted: the eta = 1 rate elsewhere
        assert np.all(np.abs(c.kappa / (g2 / 2) - 1) > 0.05)


class OffByOne(DiscreteVP):
    """tau = T t/K for timestep t: the schedule one step late."""

    def noise_time(self, timestep):
        return self.horizon * (timestep / self.betas.size)


def node_gap(schedule):
    """Largest relative gap between alpha^2 at timestep t and alphas_cumprod[t] by a plain product, t = 0 .. K - 1."""
    kept = np.cumprod(1 - schedule.betas)
    return max(abs(schedule.alpha(schedule.noise_time(t)) ** 2 / a - 1) for t, a in enumerate(kept))


@pytest.mark.parametrize("betas", [[0.3, 0.05, 0.7, 0.01, 0.2], *(s.betas for s in DIFFUSERS.values())], ids=["rough", *DIFFUSERS])
def test_discrete_nodes(betas):
    for horizon in (1.0, 2.7):
        s = DiscreteVP(betas, horizon)
        K = len(s.betas)
        assert node_gap(s) < 2e-12 and node_gap(OffByOne(betas, horizon)) > 1e-2
        assert s.integral(0.0) == 0.0 and s.alpha(0.0) == 1.0 and s.v(0.0) == 0.0
        kept = np.cumprod(1 - s.betas)
        np.testing.assert_allclose([s.v(s.noise_time(t)) for t in range(K)], 1 - kept, rtol=1e-11)
        for t in (-1, 0, K // 2, K - 1):
            assert s.timestep(s.noise_time(t)) == pytest.approx(t, abs=1e-9)
        assert s.noise_time(-1) == 0.0 and s.noise_time(K - 1) == horizon == s.tau(0.0)


@pytest.mark.parametrize("schedule", [DiscreteVP([0.3, 0.05, 0.7, 0.01, 0.2], 2.0), DiscreteVP([1e-4, 0.9, 1e-4]), *DIFFUSERS.values()],
                         ids=["rough", "rougher", *DIFFUSERS])
def test_discrete_rate_is_positive_and_continuous(schedule):
    """Also where the plain spline (planted) is not: for rough betas its beta is negative somewhere; for smooth ones it is the schedule."""
    K, T = len(schedule.betas), schedule.horizon
    nodes = T * np.arange(K + 1) / K
    tau = np.concatenate([(nodes[:-1, None] + T / K * np.linspace(0, 1, 12)).ravel(), [T]])
    beta = np.array([schedule.beta(x) for x in tau])
    assert np.all(beta > 0) and np.all(np.isfinite(beta))
    jumps = [schedule.beta(x * (1 + 1e-12)) / schedule.beta(x * (1 - 1e-12)) - 1 for x in nodes[1:-1]]
    assert np.max(np.abs(jumps)) < 1e-6
    spline = CubicSpline(nodes, np.append(0.0, np.cumsum(-np.log1p(-schedule.betas))))
    if K < 10:
        assert np.min(spline(tau, 1)) < 0
    else:
        smooth = tau < 0.95 * T              # the cosine schedule's cap is at its end
        np.testing.assert_allclose(beta[smooth], spline(tau[smooth], 1), rtol=1e-9)
        np.testing.assert_allclose([schedule.integral(x) for x in tau[smooth]], spline(tau[smooth]), rtol=1e-12)


def test_discrete_schedule_approaches_the_one_it_samples():
    """Nodes of VP's quadratic B give VP; for other smooth B, beta is third order in 1/K and B fourth."""
    def sampled(B, K):
        return DiscreteVP(-np.expm1(-np.diff([B(x) for x in 1.5 * np.arange(K + 1) / K])), 1.5)

    def gaps(K):
        s, tau = sampled(lambda x: x + np.sin(2 * x) / 3, K), np.linspace(0.3, 1.2, 3333)
        beta, B = np.array([(s.beta(x), s.integral(x)) for x in tau]).T
        return np.max(np.abs(beta - 1 - 2 * np.cos(2 * tau) / 3)), np.max(np.abs(B - tau - np.sin(2 * tau) / 3))

    orders = np.log(np.array(gaps(64)) / gaps(128)) / np.log(2)
    np.testing.assert_allclose(orders, [3, 4], atol=0.2)
    vp = VP(0.5, 4.0, 1.5)
    s = sampled(vp.integral, 64)
    for tau in np.linspace(0, 1.5, 100):
        assert s.integral(tau) == pytest.approx(vp.integral(tau), rel=1e-12) and s.beta(tau) == pytest.approx(vp.beta(tau), rel=1e-10)


def test_two_discrete_schedules_are_two():
    """Caches compare schedules: equal hashes and eq of unlike betas would hand out another schedule's laws."""
    law = Gaussian([1.0], [[0.5]])
    a, b = (Problem(DiscreteVP(betas), law, LinearReward([1.0]), 1.0) for betas in ([0.1, 0.2], [0.1, 0.8]))
    assert a.schedule != b.schedule and a.schedule == a.schedule
    assert a.marginal(0.5).cov != b.marginal(0.2).cov and a.marginal(0.0).cov[0, 0] == pytest.approx(1 - 0.5 * 0.9 * 0.8)
    assert b.marginal(0.0).cov[0, 0] == pytest.approx(1 - 0.5 * 0.9 * 0.2)


def test_the_chain_runs_on_a_discrete_schedule():
    """First order against the continuous limit, as on every schedule."""
    problem = Problem(DiscreteVP.linear(20, 0.01, 0.4), Gaussian([1.0], [[0.5]]), LinearReward([1.0]), 1.0, start="exact")
    chain = [exact.evaluate(problem, problem.pretrained(g), g).terminal for g in map(problem.grid, (400, 800))]
    gaps = np.array([[c.mean[0] - 1.0, c.cov[0, 0] - 0.5] for c in chain])
    np.testing.assert_allclose(gaps[0] / gaps[1], 2.0, atol=0.05)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_discrete_betas_are_those_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    ends = {"beta_start": 0.00085, "beta_end": 0.012} if name == "scaled_linear" else {}
    scheduler = diffusers.DDPMScheduler(beta_schedule=name, **ends)
    np.testing.assert_allclose(DIFFUSERS[name].betas, scheduler.betas.numpy(), rtol=3e-7)
    kept = scheduler.alphas_cumprod.numpy()
    np.testing.assert_allclose([DIFFUSERS[name].alpha(DIFFUSERS[name].noise_time(t)) ** 2 for t in range(1000)], kept, rtol=2e-5)
    few = diffusers.DDPMScheduler(50, beta_schedule=name)
    make = {"linear": DiscreteVP.linear, "scaled_linear": lambda n: DiscreteVP.scaled_linear(n, 1e-4, 0.02), "squaredcos_cap_v2":
            DiscreteVP.squaredcos}[name]
    np.testing.assert_allclose(make(50).betas, few.betas.numpy(), rtol=3e-7)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_discrete_schedule_of_a_scheduler(name):
    diffusers = pytest.importorskip("diffusers")
    for kind in (diffusers.DDPMScheduler, diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler):
        scheduler = kind(beta_schedule=name)
        s, kept = DiscreteVP.of(scheduler, horizon=3.0), scheduler.alphas_cumprod.double().numpy()
        np.testing.assert_allclose([s.alpha(s.noise_time(t)) ** 2 for t in range(1000)], kept, rtol=1e-12)
        np.testing.assert_allclose([s.v(s.noise_time(t)) for t in range(1000)], 1 - kept, rtol=1e-11)
        np.testing.assert_allclose(s.betas, scheduler.betas.numpy(), rtol=2e-3)        # the float32 product's rounding, over beta_k
        assert np.array_equal(s.grid(scheduler.timesteps).times, s.grid(np.arange(999, -1, -1)).times)
    for refused in (diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.DDIMScheduler(rescale_betas_zero_snr=True)):
        with pytest.raises(ValueError, match="^scheduler: expected"):
            DiscreteVP.of(refused)


def test_discrete_grid():
    s = DiscreteVP.linear(horizon=2.0)
    trailing, leading = np.arange(999, -1, -20), np.arange(980, -1, -20)
    grid = s.grid(trailing)
    assert grid.steps == 50 and grid.times[0] == 0 and grid.times[-1] == 2.0
    np.testing.assert_allclose([s.timestep(s.tau(t)) for t in grid.times], [*trailing, -1], atol=1e-9)
    stops = s.grid(trailing, last=0)
    np.testing.assert_allclose([s.timestep(s.tau(t)) for t in stops.times], [*trailing, 0], atol=1e-9)
    short = s.until(980)
    assert short.horizon == pytest.approx(2 * 0.981) and short.timestep(short.horizon) == pytest.approx(980)
    grid = short.grid(leading)
    np.testing.assert_allclose([short.timestep(short.tau(t)) for t in grid.times], [*leading, -1], atol=1e-9)
    for tau in (0.1, 1.0, 1.95):
        assert short.integral(tau) == pytest.approx(s.integral(tau), rel=1e-12) and short.beta(tau) == pytest.approx(s.beta(tau), rel=1e-9)
    assert short.beta(short.horizon) == pytest.approx(s.beta(short.horizon), rel=1e-5)


def test_discrete_grid_is_the_chain_of_diffusers():
    """Where diffusers' step ends and the next begins: alike for "leading" and exact "trailing"; otherwise diffusers itself is off by some."""
    diffusers = pytest.importorskip("diffusers")

    def gap(spacing, steps):
        scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        t = scheduler.timesteps.numpy()
        return np.max(np.abs(t[:-1] - 1000 // steps - t[1:]))

    assert [gap("leading", n) for n in (50, 30, 7)] == [0, 0, 0] and gap("trailing", 50) == 0
    assert gap("trailing", 30) > 0 and gap("linspace", 50) > 0


def test_time_grid():
    grid = TimeGrid.uniform(6, 1.5)
    assert grid.steps == 6 and grid.times[0] == 0 and grid.times[-1] == 1.5
    np.testing.assert_allclose(grid.dt, 0.25)
    assert not grid.times.flags.writeable
    np.testing.assert_array_equal(grid.coarsened(3).times, [0, 0.75, 1.5])
    mine = np.array([0.0, 1.0])
    held = TimeGrid(mine)
    mine[1] = 5.0
    assert held.times[1] == 1.0              # a copy, not a view


def test_geometric_grid():
    ve = VE(0.01, 10.0, 2.0)
    grid = ve.geometric_grid(50)
    assert grid.steps == 50 and grid.times[-1] == 2.0
    gap = np.array([ve.sigma_min * np.expm1(ve.log_ratio * ve.tau(t) / 2.0) for t in grid.times[:-1]])
    np.testing.assert_allclose(gap[1:] / gap[:-1], gap[1] / gap[0], rtol=1e-9)


BAD = [
    ("times", lambda: TimeGrid([0.0])),
    ("times", lambda: TimeGrid([])),
    ("times", lambda: TimeGrid([0.0, 0.5, 0.4])),
    ("times", lambda: TimeGrid([0.0, 0.5, 0.5])),
    ("times", lambda: TimeGrid([0.1, 0.5])),
    ("times", lambda: TimeGrid([0.0, np.nan])),
    ("times", lambda: TimeGrid([0.0, np.inf])),
    ("times", lambda: TimeGrid([[0.0, 1.0]])),
    ("times", lambda: TimeGrid("soon")),
    ("times", lambda: TimeGrid([0.0, 1.0j])),
    ("times", lambda: TimeGrid(np.array([0.0, 1.0 + 1.0j]))),
    ("times", lambda: TimeGrid([[0.0], [1.0, 2.0]])),
    ("steps", lambda: TimeGrid.uniform(0, 1.0)),
    ("steps", lambda: TimeGrid.uniform(-3, 1.0)),
    ("steps", lambda: TimeGrid.uniform(2.0, 1.0)),
    ("steps", lambda: TimeGrid.uniform(True, 1.0)),
    ("horizon", lambda: TimeGrid.uniform(3, 0.0)),
    ("factor", lambda: TimeGrid.uniform(6, 1.0).coarsened(4)),
    ("factor", lambda: TimeGrid.uniform(6, 1.0).coarsened(0)),
    ("beta_min", lambda: VP(beta_min=0.0)),
    ("beta_min", lambda: VP(beta_min=np.nan)),
    ("beta_max", lambda: VP(beta_max=-1.0)),
    ("beta_max", lambda: VP(beta_max="ten")),
    ("beta_max", lambda: VP(beta_max=np.ones((2, 2)))),
    ("horizon", lambda: SubVP(horizon=0.0)),
    ("beta", lambda: OU(beta=0.0)),
    ("horizon", lambda: OU(horizon=np.inf)),
    ("horizon", lambda: FlowMatching(1.0)),
    ("last", lambda: FlowMatching(0.9).grid(3, last=0.95)),
    ("sigma_min", lambda: VE(sigma_min=0.0)),
    ("sigma_max", lambda: VE(sigma_min=2.0, sigma_max=1.0)),
    ("horizon", lambda: VE(horizon=-1.0)),
    ("steps", lambda: VE().geometric_grid(1)),
    ("sigma_first", lambda: VE().geometric_grid(10, sigma_first=0.0)),
    ("sigma_first", lambda: VE().geometric_grid(10, sigma_first=20.0)),
    ("betas", lambda: DiscreteVP([0.1])),
    ("betas", lambda: DiscreteVP([0.1, 1.0])),
    ("betas", lambda: DiscreteVP([0.0, 0.1])),
    ("betas", lambda: DiscreteVP([0.1, np.nan])),
    ("betas", lambda: DiscreteVP([[0.1, 0.2]])),
    ("horizon", lambda: DiscreteVP([0.1, 0.2], horizon=0.0)),
    ("steps", lambda: DiscreteVP.linear(1)),
    ("steps", lambda: DiscreteVP.squaredcos(10.0)),
    ("beta_start", lambda: DiscreteVP.scaled_linear(beta_start=-0.1)),
    ("betas", lambda: DiscreteVP.linear(beta_end=1.5)),
    ("scheduler", lambda: DiscreteVP.of(VP())),
    ("scheduler", lambda: DiscreteVP.of(SimpleNamespace(alphas_cumprod=[0.9, 0.5, 0.0]))),
    ("scheduler", lambda: DiscreteVP.of(SimpleNamespace(alphas_cumprod=[0.9, 0.5, 0.5]))),
    ("scheduler", lambda: DiscreteVP.of(SimpleNamespace(alphas_cumprod="soon"))),
    ("timesteps", lambda: DiscreteVP.linear().grid([980, 960, 0])),
    ("timesteps", lambda: DiscreteVP.linear().grid([])),
    ("timesteps", lambda: DiscreteVP.linear().grid([999, 500, 500])),
    ("timesteps", lambda: DiscreteVP.linear().grid([999, 500, 0], last=0)),
    ("last", lambda: DiscreteVP.linear().grid([999, 500, 0], last=-20)),
    ("timestep", lambda: DiscreteVP.linear().until(1000)),
    ("timestep", lambda: DiscreteVP.linear().until(0)),
]


@pytest.mark.parametrize(("name", "make"), BAD, ids=range(len(BAD)))
def test_bad_inputs_are_named_in_one_line(name, make):
    with pytest.raises(ValueError) as caught:
        make()
    message = str(caught.value)
    assert message.startswith(f"{name}: expected") and ", got " in message and "\n" not in message
