"""Every listed estimator is tested as what it claims to be: unbiased, of order D, or off by more than a stated amount."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

import ctrl
from ctrl.estimators import Bias, Claim, Given, Need, RewardToGo, catalogue, fisher
from ctrl.testing import ETAS, policies, problems, setups

# What a biased one is off by, at least, relative to grad J, on the bench in one dimension with two steps.
AT_LEAST = {
    "log-variance away from theta_old": 0.05, "pathwise, last step only": 0.2, "lean adjoint (Adjoint Matching)": 0.02,
    "KL: analytic in the return alone (reward folding)": 0.1, "KL: k3 in the return alone": 0.1, "KL: analytic as a loss alone": 0.01,
    "KL: k1 as a loss alone": 0.1, "KL: k2 as a loss alone": 0.01, "KL: k3 as a loss alone": 0.01, "ratio away from theta_old": 0.02,
    "clipped ratio away from theta_old (PPO)": 0.1, "DDPO as published": 0.1, "reward-weighted regression": 0.2, "finite difference": 1e-8}


def given_for(problem, policy, grid):
    """The exact value and advantage, an old policy near by, and a damped Fisher matrix (that of few steps may be singular)."""
    value = ctrl.exact.value(problem, policy, grid)

    def advantage(i, x, a):
        return (value.action_value(i, x, a) - value(i, x)) / grid.dt[i]

    F = fisher(problem, policy, grid, ctrl.Noise.gauss_hermite(problem, policy, grid, nodes=3)) + 0.1 * np.eye(policy.theta.size)
    return Given(value, advantage, policy.theta + np.resize([0.1, -0.3], policy.theta.size), F)


@pytest.fixture(scope="module")
def tried(bench):
    """(entry, setup, given) for every entry, with sampled actions where it needs them."""
    benches = {sampled: bench(dim=1, steps=2, sampled=sampled) for sampled in (False, True)}
    chosen = [(entry, benches[Need.EXPLORATION in entry.needs]) for entry in catalogue()]
    return [(entry, setup, given_for(*setup)) for entry, setup in chosen]


def bias(entry, setup, given, nodes=30):
    """|mean - what it claims to be the mean| / |that|, by Gauss-Hermite nodes (4 for action noise, which is polynomial)."""
    g = ctrl.exact.evaluate(*setup).gradient.theta
    target = {"grad J": g, "grad J of sampled actions": g, "F^-1 grad J": np.linalg.solve(given.fisher, g)}[entry.claim.of]
    noise = ctrl.Noise.gauss_hermite(*setup, nodes=4 if Need.EXPLORATION in entry.needs else nodes)
    return float(np.linalg.norm(entry.make(given)(*setup, noise).mean - target) / np.linalg.norm(target))


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


@settings(max_examples=8)
@hypothesis.given(setups(dim=1, max_steps=2), setups(dim=1, max_steps=2, sampled=True))
def test_unbiased_claims_on_random_problems(means, sampled):
    given = {setup: given_for(*setup) for setup in (means, sampled)}
    for entry in catalogue():
        if entry.claim.bias is Bias.NONE:
            setup = sampled if Need.EXPLORATION in entry.needs else means
            assert bias(entry, setup, given[setup], nodes=20) <= 1e-9, entry.name


@settings(max_examples=8)
@hypothesis.given(st.data())
def test_order_d_claims_on_random_problems(data):
    """The bias halves with the step."""
    problem = data.draw(problems(etas=(0.0, *ETAS)))
    policy, steps = data.draw(policies(problem)), (80, 160, 320)
    (entry,) = [entry for entry in catalogue() if entry.claim.bias is Bias.ORDER_D]
    chains = [(problem, policy, problem.grid(n)) for n in steps]
    errors = [relative_by_cross(entry.make(Given(ctrl.exact.value(*chain))), *chain) for chain in chains]
    assert np.all(np.abs(np.log2(errors[:-1]) - np.log2(errors[1:]) - 1) < 0.1), errors


def relative_by_cross(estimator, problem, policy, grid):
    target = ctrl.exact.evaluate(problem, policy, grid).gradient.theta
    mean = estimator(problem, policy, grid, ctrl.Noise.cross(problem, policy, grid)).mean
    return np.linalg.norm(mean - target) / np.linalg.norm(target)


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
