"""Every listed estimator is tested as what it claims to be: unbiased, of order D, or off by more than a stated amount."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import ctrl
from ctrl.estimators import Bias, Claim, Given, Need, RewardToGo, catalogue, fisher
from ctrl.evidence import fitted_order

# What a biased one is off by, at least, relative to grad J, on the bench in one dimension with two steps.
AT_LEAST = {
    "log-variance away from theta_old": 0.05, "pathwise, last step only": 0.2, "lean adjoint (Adjoint Matching)": 0.02,
    "KL: analytic in the return alone (reward folding)": 0.1, "KL: k3 in the return alone": 0.1, "KL: analytic as a loss alone": 0.01,
    "KL: k1 as a loss alone": 0.1, "KL: k2 as a loss alone": 0.01, "KL: k3 as a loss alone": 0.01, "ratio away from theta_old": 0.02,
    "clipped ratio away from theta_old (PPO)": 0.1, "DDPO as published": 0.1, "reward-weighted regression": 0.2, "finite difference": 1e-8}


@pytest.fixture(scope="module")
def tried(bench):
    """(entry, setup, given) for every entry, with sampled actions where it needs them."""
    out = []
    for entry in catalogue():
        setup = _, policy, grid = bench(dim=1, steps=2, sampled=Need.EXPLORATION in entry.needs)
        value, F = ctrl.exact.value(*setup), fisher(*setup, ctrl.Noise.gauss_hermite(*setup, nodes=3))
        advantage = lambda i, x, a, V=value, dt=grid.dt: (V.action_value(i, x, a) - V(i, x)) / dt[i]  # noqa: E731
        out.append((entry, setup, Given(value, advantage, policy.theta + np.array([0.1, -0.3]), F)))
    return out


def bias(entry, setup, given):
    """|mean - what it claims to be the mean| / |that|, by Gauss-Hermite nodes."""
    nodes = 4 if Need.EXPLORATION in entry.needs else 30
    g = ctrl.exact.evaluate(*setup).gradient.theta
    targets = {"grad J": g, "grad J of sampled actions": g, "F^-1 grad J": np.linalg.solve(given.fisher, g)}
    target = targets[entry.claim.of]
    estimate = entry.make(given)(*setup, ctrl.Noise.gauss_hermite(*setup, nodes=nodes))
    return float(np.linalg.norm(estimate.mean - target) / np.linalg.norm(target))


def holds(name, claim, error):
    """Whether an error is what the claim says: none to rounding, or more than is stated; O(D) is judged by its order elsewhere."""
    return {Bias.NONE: error <= 1e-9, Bias.PRESENT: error > AT_LEAST.get(name, np.inf), Bias.ORDER_D: error > 1e-9, Bias.UNSTATED: False}[claim.bias]


def test_every_claim_is_tested_as_what_it_is(tried):
    for entry, setup, given in tried:
        error = bias(entry, setup, given)
        assert holds(entry.name, entry.claim, error), (entry.name, error)
    biased = {entry.name for entry in catalogue() if entry.claim.bias is Bias.PRESENT}
    assert biased == set(AT_LEAST) and [entry.name for entry in catalogue() if entry.claim.bias is Bias.ORDER_D] == ["q form"]


def test_planted_claims_are_refuted(tried):
    """Every claim exchanged for its opposite fails the same judge."""
    for entry, setup, given in tried:
        opposite = replace(entry.claim, bias=Bias.PRESENT if entry.claim.bias is Bias.NONE else Bias.NONE)
        assert not holds(entry.name, opposite, bias(entry, setup, given)), entry.name


def test_order_d_claims_are_of_order_d(bench, away):
    problem, policy, _ = bench(dim=1)
    steps = np.array([40, 80, 160, 320])
    for entry in catalogue():
        if entry.claim.bias is Bias.ORDER_D:
            found = []
            for n in steps.tolist():
                setup = problem, policy, problem.grid(n)
                found.append(away(entry.make(Given(ctrl.exact.value(*setup))), *setup, ctrl.Noise.cross(*setup)))
            assert abs(fitted_order(1 / steps, np.array(found)).slope - 1) <= 0.05, entry.name


def test_the_catalogue_says_what_is_lacking(bench):
    names = [entry.name for entry in catalogue()]
    assert len(set(names)) == len(names) >= 30
    for eta, kl_weight, sampled in ((0.0, 0.5, False), (0.7, 0.0, True), (0.7, 0.5, False)):
        setup = problem, policy, _ = bench(dim=1, steps=2, eta=eta, kl_weight=kl_weight, sampled=sampled)
        for entry in catalogue():
            lacking = entry.lacking(Given(), problem, policy)
            assert lacking <= entry.needs
            if lacking:
                with pytest.raises(ValueError):
                    entry.make(Given())(*setup, ctrl.Noise(0, 8))
            else:
                assert entry.make(Given())(*setup, ctrl.Noise(0, 8)).mean.shape == policy.theta.shape


def test_claims_in_words():
    assert str(Claim(Bias.PRESENT, note="why")) == "biased for grad J (why)" and str(RewardToGo().claim) == "unbiased for grad J"


def test_who_says_nothing_claims_nothing():
    class Mine(ctrl.estimators.Estimator):
        def cotangents(self, run):
            return run.score_noise

    assert Mine().claim.bias is Bias.UNSTATED and not Mine().needs
