"""Forms through the state: exact where they are, of their order where they are not, and the numbers of theory.md, section 17."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

import ctrl
from ctrl import zoo
from ctrl.estimators import ActionAdvantage, AdjointMatching, Bias, Pathwise, QForm, ValueGradient
from ctrl.evidence import fitted_order
from ctrl.testing import ETAS, assert_unbiased, setups


def cross_mean(estimator, problem, policy, grid):
    return estimator(problem, policy, grid, ctrl.Noise.cross(problem, policy, grid)).mean


def gradient(problem, policy, grid):
    return ctrl.exact.evaluate(problem, policy, grid).gradient.theta


def reference(parameters):
    """Section 17's problem, grid and policy, with the parameters "shift" (2) or "scale" (first of 3)."""
    problem = zoo.gaussian_pull_2d()
    return problem, ctrl.BasisPolicy.scaled(problem, 0.9, [0.1, 0.1]), problem.grid(100)


# ------------------------------------------------------------------------------------------- the cross rule is a second judge


@given(setups())
def test_cross_and_signs_agree(setup):
    """2v paths give the expectation of 2^v for everything of total degree 2."""
    value = ctrl.exact.value(*setup)
    expected = gradient(*setup)
    for estimator in (Pathwise(), ValueGradient(value)):
        assert np.linalg.norm(cross_mean(estimator, *setup) - expected) <= 1e-10 * np.linalg.norm(expected)
    signs = ctrl.Noise.signs(*setup)
    for estimator in (Pathwise(last=1), AdjointMatching(), QForm(value)):
        assert np.linalg.norm(cross_mean(estimator, *setup) - estimator(*setup, signs).mean) <= 1e-10 * np.linalg.norm(expected)


# ------------------------------------------------------------------------------------------- truncated pathwise


def per_step(setup):
    """The same mean as an AffinePolicy: parameters of its own for every step."""
    parts = setup.policy.parts(setup.grid)
    return setup._replace(policy=ctrl.AffinePolicy(parts.K, parts.k))


@given(setups(etas=(0.0, *ETAS), max_steps=4))
def test_truncated_pathwise_lacks_the_early_steps(setup):
    """With parameters of its own for every step: exact for the last K steps, zero before."""
    problem, policy, grid = per_step(setup)
    exact = ctrl.exact.evaluate(problem, policy, grid).gradient
    scale = np.linalg.norm(exact.theta)
    for last in range(1, grid.steps + 2):
        mean = cross_mean(Pathwise(last), problem, policy, grid)
        K, k = mean[: policy.K.size].reshape(policy.K.shape), mean[policy.K.size :].reshape(policy.k.shape)
        early = max(grid.steps - last, 0)
        assert not K[:early].any() and not k[:early].any()
        assert np.max(np.abs(K[early:] - exact.K[early:])) <= 1e-10 * scale
        assert np.max(np.abs(k[early:] - exact.k[early:])) <= 1e-10 * scale


def test_truncated_pathwise_is_biased(bench, away):
    setup = bench()
    noise = ctrl.Noise.cross(*setup)
    bias = [away(Pathwise(last), *setup, noise) for last in (1, 2, 3)]
    assert bias[0] > 0.4 and bias[1] > 0.2 and bias[2] < 1e-10
    assert Pathwise(1).claim.bias is Bias.PRESENT and Pathwise().claim.bias is Bias.NONE
    with pytest.raises(ValueError, match="last"):
        Pathwise(0)


class TruncatedCostatesOnly(Pathwise):
    """Planted: the costs of all steps with the reward of the last ones."""

    def cotangents(self, run):
        u, early = super().cotangents(run), run.grid.steps - self.last
        u[:, :early] = run.kl_term[:, :early]
        return u


def test_planted_costs_of_the_early_steps_are_seen(bench):
    setup = bench()
    right, wrong = (cross_mean(e, *setup) for e in (Pathwise(1), TruncatedCostatesOnly(1)))
    assert np.linalg.norm(right - wrong) > 0.05 * np.linalg.norm(right)


# ------------------------------------------------------------------------------------------- lean adjoint


class PolicysJacobian(AdjointMatching):
    """Planted: the policy's Jacobian in the place of the pre-trained one, still without the cost's x-gradient."""

    def cotangents(self, run):
        c, out = run.coefficients, run.kl_term
        p = c.final_discount * run.problem.reward.gradient(run.states[:, -1])
        for i in reversed(range(run.grid.steps)):
            out[:, i] += c.h[i] * c.dt[i] * p
            slope = run.policy.jacobian_x(run.grid, i, run.states[:, i])
            p = (1 - c.dt[i] * c.f[i]) * p + c.h[i] * c.dt[i] * np.einsum("nji,nj->ni", slope, p)
        return out


@given(setups(etas=(0.0, *ETAS)))
def test_lean_adjoint_is_zero_at_the_optimum_and_biased_elsewhere(setup):
    """Its x-gradient of the value is right where mu is optimal (envelope); relative to what it is at the pre-trained policy."""
    problem, _, grid = setup
    optimum = ctrl.exact.optimum(problem, grid).policy
    scale = np.linalg.norm(cross_mean(AdjointMatching(), problem, problem.pretrained(grid), grid))
    assert np.linalg.norm(cross_mean(AdjointMatching(), problem, optimum, grid)) <= 1e-9 * scale


def test_lean_adjoint_is_biased_and_its_planted_twin_misses_the_optimum(bench, away):
    setup = problem, _, grid = bench()
    assert away(AdjointMatching(), *setup, ctrl.Noise.cross(*setup)) > 0.02
    optimum = ctrl.exact.optimum(problem, grid).policy
    scale = np.linalg.norm(cross_mean(AdjointMatching(), problem, problem.pretrained(grid), grid))
    assert np.linalg.norm(cross_mean(PolicysJacobian(), problem, optimum, grid)) > 1e-2 * scale


@given(setups())
def test_lean_adjoint_is_unbiased_for_a_constant_shift(setup):
    shift = setup._replace(policy=ctrl.BasisPolicy.shift(setup.problem, np.linspace(0.2, -0.3, setup.problem.dim)))
    assert_unbiased(AdjointMatching(), *shift)


def test_numbers_of_section_17():
    """Lean adjoint and q form on gaussian-pull-2d, N = 100, by 404 paths."""
    problem, policy, grid = reference("scale")
    value = ctrl.exact.value(problem, policy, grid)
    scale, *shift = cross_mean(AdjointMatching(), problem, policy, grid)
    np.testing.assert_allclose([*shift, scale], [-2.51238495, -0.26243885, 4.9300641], rtol=0, atol=1e-7)
    scale, *shift = cross_mean(QForm(value), problem, policy, grid)
    np.testing.assert_allclose([*shift, scale], [-2.95091312, -0.25988506, 5.3608376], rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------------- q form


def q_bias(problem, policy, steps, values):
    """|E q form - grad J| of the chain, relative, for every number of steps; values(grid) -> V."""
    out = []
    for n in steps:
        grid = problem.grid(n)
        target = gradient(problem, policy, grid)
        out.append(np.linalg.norm(cross_mean(QForm(values(grid)), problem, policy, grid) - target) / np.linalg.norm(target))
    return np.array(out)


STEPS = np.array([40, 80, 160, 320])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("schedule", [ctrl.VP(0.1, 4.0), ctrl.SubVP(0.1, 4.0), ctrl.VE(0.3, 1.5)], ids=["VP", "sub-VP", "VE"])
def test_q_form_is_first_order(bench, schedule, eta):
    problem, policy, _ = bench(eta=eta, dim=1, discount=0.3)
    problem = replace(problem, schedule=schedule)
    policy = ctrl.BasisPolicy.of(problem, policy.basis, policy.theta)
    bias = q_bias(problem, policy, STEPS, lambda grid: ctrl.exact.value(problem, policy, grid))
    order = fitted_order(1 / STEPS, bias)
    assert bias[-1] > 1e-4 and abs(order.slope - 1) <= 0.05, (bias, order)


def test_planted_value_of_the_pretrained_policy_does_not_vanish(bench):
    problem, policy, _ = bench(dim=1)
    bias = q_bias(problem, policy, STEPS, lambda grid: ctrl.exact.value(problem, problem.pretrained(grid), grid))
    assert abs(fitted_order(1 / STEPS, bias).slope) < 0.05 and bias[-1] > 0.05


# ------------------------------------------------------------------------------------------- advantages of sampled actions


def chain_advantage(problem, policy, grid):
    """(Q_i - V_i)/D_i of the sampled chain."""
    value = ctrl.exact.value(problem, policy, grid)
    return lambda i, x, a: (value.action_value(i, x, a) - value(i, x)) / grid.dt[i]


@given(setups(etas=(0.0, *ETAS), sampled=True, max_patterns=2**11))
def test_action_advantages_of_the_chain_are_unbiased(setup):
    assert_unbiased(ActionAdvantage(chain_advantage(*setup)), *setup)


@given(setups(etas=(0.0, *ETAS), sampled=True, max_patterns=2**11))
def test_action_advantage_with_the_rate_q_is_the_q_form(setup):
    """Averaged over actions, whatever Sigma; hence O(D), like the q form."""
    signs, scale = ctrl.Noise.signs(*setup), np.linalg.norm(gradient(*setup))
    sampled = ActionAdvantage(ctrl.exact.advantage(*setup))(*setup, signs).mean
    closed = QForm(ctrl.exact.value(*setup))(*setup, signs).mean
    assert np.linalg.norm(sampled - closed) <= 1e-10 * scale


def test_planted_advantages_are_rejected(bench):
    """g^2 for h in the rate at eta != 1, the rate of continuous time for that of the chain, and e_i on top of the price in A."""
    setup = problem, policy, grid = bench(sampled=True, steps=2)
    right, c, value = chain_advantage(*setup), problem.coefficients(grid), ctrl.exact.value(*setup)

    def g2_for_h(i, x, a):
        return right(i, x, a) + (c.g2[i] - c.h[i]) * np.sum((a - policy.mean(grid, i, x)) * value.gradient(i, x), axis=1)

    class PriceTwice(ActionAdvantage):
        def cotangents(self, run):
            return super().cotangents(run) + run.kl_term

    for wrong in (ActionAdvantage(g2_for_h), ActionAdvantage(ctrl.exact.advantage(*setup)), PriceTwice(right)):
        with pytest.raises(AssertionError, match="biased"):
            assert_unbiased(wrong, *setup, tolerance=1e-2)
    with pytest.raises(ValueError, match="exploration"):
        ActionAdvantage(right)(*bench(), ctrl.Noise(0, 8))
