"""The path KL theorem on small cases: all holds, planted errors are there, and a broken formula makes it fail."""

import dataclasses

import numpy as np
import pytest

import ctrl
from ctrl import zoo
from ctrl.exact.chain import LinearChain
from ctrl.schedule import Schedule
from ctrl.theorems.path_kl import JointLaw, PathKL, dense_path_kl, mismatched_eta_kl, wrong_rates
from ctrl.theorems.verdict import Case


def small(problem: ctrl.Problem, name: str = "small") -> Case:
    return Case(name, problem, quick=True, seed=0, steps=20)


@pytest.mark.parametrize("make", [zoo.gaussian_pull_2d, zoo.mixture_bump_1d, zoo.digits_plane, zoo.double_well_2d])
def test_all_verdicts_hold(make):
    rows = list(PathKL().checks(small(make(), make.__name__)))
    assert [row.reason for row in rows if row.holds is False or "underpowered" in row.reason] == []
    assert {row.check for row in rows} >= {"exact", "monte_carlo", "planted", "skipped"}
    assert any(row.check == "limit" for row in rows) != small(make()).planar and any("= path KL" in row.reason for row in rows)
    assert sum(row.check == "planted" for row in rows) >= 12


@pytest.mark.parametrize("schedule", [ctrl.VE(0.1, 5.0), ctrl.SubVP(0.1, 10.0), ctrl.OU(3.0)])
@pytest.mark.parametrize("eta", [0.7, 1.0, 1.6])
def test_joint_path_law_for_every_schedule(schedule, eta):
    """KL of the whole path as one Gaussian vector equals the left-point sum: Girsanov on the chain, to rounding."""
    case = small(dataclasses.replace(zoo.gaussian_pull_2d(eta), schedule=schedule, start="exact"))
    here = JointLaw.of(LinearChain(case.problem, case.policy, case.grid))
    pre = JointLaw.of(LinearChain(case.problem, case.problem.pretrained(case.grid), case.grid))
    np.testing.assert_allclose(here.kl(pre), case.truth.path_kl, rtol=1e-10)
    assert here.kl(pre) >= case.truth.terminal_kl > 0


def test_a_mismatched_eta_grows_with_the_number_of_steps():
    case = small(zoo.gaussian_pull_2d())
    assert mismatched_eta_kl(case, 1.1) > 1.5 * case.truth.path_kl


def test_dense_lattice_needs_no_kappa():
    case = dataclasses.replace(small(zoo.mixture_bump_1d(0.5)), steps=6)
    np.testing.assert_allclose(dense_path_kl(case), case.truth.path_kl, rtol=1e-9)


def test_wrong_rates_say_where_they_are_invisible():
    at_one = {what: invisible for what, _, invisible in wrong_rates(small(zoo.mixture_bump_1d(1.0)))}
    assert at_one["g^2/2 kept at eta != 1"] and at_one["mean over dimensions"] and not at_one["time step missing in the sum"]
    assert not any(invisible for _, _, invisible in wrong_rates(small(zoo.gaussian_pull_2d(0.5))))


def test_a_broken_rate_makes_the_theorem_fail(monkeypatch):
    """kappa without its eta dependence, planted in the library itself: the joint path law must object."""
    right = Schedule.rates

    def broken(self, t, eta):
        f, g2, h, _ = right(self, t, eta)
        return f, g2, h, 0.5 * g2

    monkeypatch.setattr(Schedule, "rates", broken)
    rows = list(PathKL().checks(small(zoo.gaussian_pull_2d(), "broken")))
    failed = [row for row in rows if row.holds is False and row.check == "exact"]
    assert failed and all("measured" in row.reason and "against" in row.reason for row in failed)
    assert all("eta = 0.5" in row.reason for row in failed)


def test_the_noise_form_sees_a_wrong_variance(monkeypatch):
    """The half log-SNR rate is taken from alpha and v alone, so a v that does not belong to f and g shows."""
    case = small(zoo.gaussian_pull_2d(0.7))
    assert PathKL()._noise_form(case, "").holds is True
    right = ctrl.VP.v
    monkeypatch.setattr(ctrl.VP, "v", lambda self, tau: 0.99 * right(self, tau) + 0.01 * right(self, tau) ** 2)
    row = PathKL()._noise_form(case, "")
    assert row.holds is False and "measured" in row.reason
