"""Schedules against their own ODEs, the clock, grids and the coefficients of the generation SDE."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from ctrl import OU, VE, VP, SubVP, TimeGrid

SCHEDULES = [
    VP(0.1, 10.0, 1.0), VP(0.3, 4.0, 2.5), VP(5.0, 0.5, 0.7), SubVP(0.1, 10.0, 1.0), SubVP(0.2, 3.0, 3.0),
    OU(1.0, 1.0), OU(2.5, 3.0), VE(0.01, 10.0, 1.0), VE(0.2, 5.0, 2.0)]


def ode_gap(schedule):
    """Largest gap between the closed alpha, v and alpha' = f alpha, v' = 2 f v + g^2 (alpha(0) = 1, v(0) = 0), relative."""
    def slope(tau, y):
        f = schedule.f(tau)
        return [f * y[0], 2 * f * y[1] + schedule.g2(tau)]

    at = np.linspace(0, schedule.horizon, 13)
    y = solve_ivp(slope, (0, schedule.horizon), [1.0, 0.0], "DOP853", at, rtol=1e-12, atol=1e-14).y
    closed = np.array([[schedule.alpha(tau), schedule.v(tau)] for tau in at]).T
    return np.max(np.abs(y - closed) / np.maximum(np.abs(y), 1e-3))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
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


@pytest.mark.parametrize("planted", [SubVPWithVPVariance(0.1, 10.0), WrongSign(0.1, 10.0), SlopeOfSigma(0.01, 10.0)], ids=repr)
def test_planted_schedules_break_their_odes(planted):
    assert ode_gap(planted) > 1e-2


def test_closed_identities():
    for s in SCHEDULES:
        for tau in np.linspace(0, s.horizon, 7):
            if isinstance(s, SubVP):
                assert s.v(tau) == pytest.approx((1 - s.alpha(tau) ** 2) ** 2, rel=1e-12, abs=1e-15)
            elif isinstance(s, VE):
                assert s.alpha(tau) == 1
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
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
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
    ("sigma_min", lambda: VE(sigma_min=0.0)),
    ("sigma_max", lambda: VE(sigma_min=2.0, sigma_max=1.0)),
    ("horizon", lambda: VE(horizon=-1.0)),
    ("steps", lambda: VE().geometric_grid(1)),
    ("sigma_first", lambda: VE().geometric_grid(10, sigma_first=0.0)),
    ("sigma_first", lambda: VE().geometric_grid(10, sigma_first=20.0)),
]


@pytest.mark.parametrize(("name", "make"), BAD, ids=range(len(BAD)))
def test_bad_inputs_are_named_in_one_line(name, make):
    with pytest.raises(ValueError) as caught:
        make()
    message = str(caught.value)
    assert message.startswith(f"{name}: expected") and ", got " in message and "\n" not in message
