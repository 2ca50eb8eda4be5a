"""The symbolic derivations: every identity vanishes, every wrong formula does not, and numbers put in are the exact solver's."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sympy as sp
from hypothesis import given

import ctrl
from ctrl import exact, zoo
from ctrl.testing import setups

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("symbolic", ROOT / "analysis" / "symbolic.py")
symbolic = sys.modules["symbolic"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(symbolic)
ScalarChain, Identity, Planted, numbers, substitute = (
    symbolic.ScalarChain, symbolic.Identity, symbolic.Planted, symbolic.numbers, symbolic.substitute)

each_page = pytest.mark.parametrize(("steps", "title"), [
    pytest.param(steps, title, id=f"section {title[0]}, {steps} steps") for steps in (1, 2) for title in symbolic.SECTIONS])


@cache
def page(steps, title):
    return symbolic.SECTIONS[title](ScalarChain(steps))


def rows(steps, title, kind):
    return [row for row in page(steps, title) if isinstance(row, kind)]


@each_page
def test_every_identity_vanishes(steps, title):
    assert [row.statement for row in rows(steps, title, Identity) if row.difference != 0 or not row.holds] == []
    assert len(rows(steps, title, Identity)) >= 4


@each_page
def test_every_wrong_formula_is_rejected(steps, title):
    """Not zero; and zero where it is said to be unseen."""
    assert [row.identity.statement for row in rows(steps, title, Planted) if row.identity.difference == 0 or not row.holds] == []
    assert len(rows(steps, title, Planted)) >= 3


# What decides: the polynomial algebra under the identities.


def some_numbers(expression, seed=0):
    drawn = random.Random(seed)
    return {letter: sp.Rational(drawn.randint(1, 40), drawn.randint(10, 30)) for letter in sorted(expression.free_symbols, key=str)}


def test_terms_are_a_normal_form():
    x, y = sp.symbols("x y")
    wild = (x + 1 / y) ** 3 * (y - 2 / x**2) + sp.Rational(1, 3) * x
    letters, table = symbolic.terms(wild)
    assert sp.expand(symbolic.assembled(letters, table) - wild) == 0
    assert symbolic.terms((x + 1 / y) * y - x * y - 1)[1] == {} and symbolic.terms(sp.S.Zero)[1] == {}
    with pytest.raises(ValueError, match=r"reciprocals of letters only, got 1/\(x \+ 1\)"):
        symbolic.terms(1 / (x + 1))


def test_elimination_clears_denominators():
    x, y, z = sp.symbols("x y z")
    assert sp.expand(symbolic.eliminated(x / y**2 + y, y, z + 1) - (x + (z + 1) ** 3)) == 0
    assert symbolic.eliminated(x + y**2, y, z + 1) == x + (z + 1) ** 2
    assert symbolic.eliminated((x + y) * y - x * y - y**2, y, z) == 0


@pytest.mark.parametrize("order", range(7))
def test_moments_are_gaussian_integrals(order):
    m, s, t = sp.Rational(3, 5), sp.Rational(7, 10), sp.symbols("t", real=True)
    integral = sp.integrate(t**order * sp.exp(-((t - m) ** 2) / (2 * s**2)) / (s * sp.sqrt(2 * sp.pi)), (t, -sp.oo, sp.oo))
    assert sp.simplify(integral - symbolic.Law(m, s**2).moment(order)) == 0


def test_expectation_is_a_gauss_hermite_sum():
    """Three-node rule, exact to degree 5 in each variable, on the score-function sample: no moment formula in it."""
    chain = ScalarChain(1)
    sample = dict(symbolic.samples(chain))["score function: sum sigma_i G + e_i"]
    x0 = chain.states[0]
    nodes = ((0, sp.Rational(2, 3)), (sp.sqrt(3), sp.Rational(1, 6)), (-sp.sqrt(3), sp.Rational(1, 6)))
    values = some_numbers(sample + symbolic.P_start + symbolic.m_start)
    m, P, D, B = values[symbolic.m_start], values[symbolic.P_start], chain.step[0].D, chain.step[0].B
    by_nodes = sum(p * q * sample.xreplace(values | {x0: m + sp.sqrt(P) * u, B: sp.sqrt(values[D]) * v}) for u, p in nodes for v, q in nodes)
    assert sp.simplify(by_nodes - chain.mean(sample).xreplace(values)) == 0


@each_page
def test_both_sides_agree_in_numbers(steps, title):
    """Without `terms`: random rationals for elementary letters, their meaning for the others; equal as rationals."""
    for row in rows(steps, title, Identity):
        chain, both = row.chain, [sp.sympify(row.left), sp.sympify(row.right)]
        values = some_numbers(sum(both) + sum(chain.meanings.values()) + sum(chain.meanings), seed=1)
        for letter, meaning in reversed(chain.meanings.items()):
            values[letter] = meaning.xreplace(values)
        left, right = (side.xreplace(values) for side in both)
        assert left == right and left.is_Rational, row.statement


def test_a_wrong_identity_is_not_accepted_and_a_right_one_not_rejected():
    chain = ScalarChain(1)
    right = Identity(chain, 5, "J = E V_0", chain.objective, chain.mean(chain.value(0, chain.states[0])))
    wrong = replace(right, left=chain.objective * (1 + sp.Rational(1, 10**9)))
    assert right.holds and str(right).startswith("✓")
    assert not wrong.holds and str(wrong).startswith("✗ FAILS")
    assert not Planted(right, "nowhere", {}).holds
    blind = Planted(replace(right, left=chain.objective - symbolic.lam * chain.path_kl), "eta = 1", {symbolic.eta: sp.S.One})
    assert not blind.holds and str(blind).startswith("✗ FAILS"), "it is seen at eta = 1: at lambda = 0 it would not be"
    assert replace(blind, where={symbolic.lam: sp.S.Zero}).holds


def broken(title):
    return [row.statement for row in symbolic.SECTIONS[title](ScalarChain(1)) if isinstance(row, Identity) and not row.holds]


@pytest.mark.parametrize(("section", "method", "error"), [
    ("5", "back", lambda right: lambda u, later: right(u, later)._replace(z=right(u, later).z + symbolic.lam * u.kappa * u.D)),
    ("6", "cost", lambda right: lambda u, at, action: right(u, at, action) / u.D),
    ("7", "explicit", lambda right: lambda u, at, action: right(u, at, action) / 2),
    ("7", "score_noise", lambda right: lambda u, at: right(u, at) * symbolic.eta),
    ("9", "curvature", lambda right: lambda u, later: right(u, later) - symbolic.lam * u.kappa)])
def test_a_mistake_in_one_formula_breaks_its_section(monkeypatch, section, method, error):
    title = next(title for title in symbolic.SECTIONS if title.startswith(section))
    monkeypatch.setattr(symbolic.Step, method, error(getattr(symbolic.Step, method)))
    assert broken(title)


def test_a_wrong_kappa_breaks_girsanov(monkeypatch):
    def wrong(chain):
        return {u.kappa: u.g**2 / 2 for u in chain.step} | {u.h: (1 + symbolic.eta**2) * u.g**2 / 2 for u in chain.step}

    monkeypatch.setattr(ScalarChain, "meanings", property(wrong))
    assert len(broken("4  path KL: Girsanov on the chain")) == 3


# Numbers.


def close(formula, values, expected):
    np.testing.assert_allclose(substitute(formula, values), expected, rtol=1e-12, atol=1e-13)


def assert_exact(problem, policy, grid):
    """Everything that the exact solver says of an affine policy is the number in the symbolic form."""
    parts = policy.parts(grid)
    policy = ctrl.AffinePolicy(parts.K, parts.k, policy.exploration_cov(grid))
    chain, values = ScalarChain(grid.steps, exploration=policy.exploration is not None), numbers(problem, policy, grid)
    truth, V, q = (verb(problem, policy, grid) for verb in (exact.evaluate, exact.value, exact.advantage))
    for formula, number in ((chain.objective, truth.objective), (chain.expected_reward, truth.expected_reward), (chain.path_kl, truth.path_kl),
                            (chain.moments[-1].mean, truth.terminal.mean[0]), (chain.moments[-1].variance, truth.terminal.cov[0, 0])):
        close(formula, values, number)
    for i, u in enumerate(chain.step):
        close(sp.diff(chain.objective, u.K), values, truth.gradient.K[i, 0, 0])
        close(sp.diff(chain.objective, u.k), values, truth.gradient.k[i, 0])
    values |= {symbolic.x: 0.7, symbolic.a: -0.4}
    at, action = np.array([[0.7]]), np.array([[-0.4]])
    for i in range(grid.steps):
        close(chain.value(i), values, V(i, at)[0])
        close(chain.slope(i), values, V.gradient(i, at)[0, 0])
        close(chain.action_value(i), values, V.action_value(i, at, action)[0])
        close(chain.advantage(i), values, q(i, at, action)[0])
    best = exact.optimum(problem, grid)
    for i, star in enumerate(chain.best_steps):
        close(star.K, values, best.policy.K[i, 0, 0])
        close(star.k, values, best.policy.k[i, 0])


def pull_1d(eta=1.0, discount=0.0):
    """The first coordinate of the reference problem."""
    return ctrl.Problem(
        schedule=ctrl.VP(beta_min=0.1, beta_max=10.0, horizon=1.0), data=ctrl.Gaussian(mean=[1.0], cov=[[0.6]]),
        reward=ctrl.QuadraticReward(matrix=[[1.0]], center=[-0.5]), kl_weight=0.5, eta=eta, discount=discount)


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_numbers_are_the_exact_solvers(eta, steps):
    problem = pull_1d(eta)
    assert_exact(problem, ctrl.BasisPolicy.scaled(problem, scale=0.9, shift=[0.1]), ctrl.TimeGrid([0.0, 0.1, 0.25, 0.3][: steps + 1]))


@pytest.mark.parametrize("sampled", [False, True])
def test_numbers_everywhere(sampled):
    @given(setups(dim=1, max_steps=3, sampled=sampled))
    def everywhere(setup):
        assert_exact(*setup)

    everywhere()


def test_optimal_objective_in_numbers():
    problem = pull_1d(0.7, discount=0.3)
    grid = ctrl.TimeGrid([0.0, 0.1, 0.25])
    chain, values = ScalarChain(2), numbers(problem, problem.pretrained(grid), grid)
    best = exact.optimum(problem, grid)
    close(chain.best_values[0].mean(chain.moments[0]), values, best.objective)
    close(chain.optimally(chain.path_kl), values, best.path_kl)


def test_a_wrong_formula_is_another_number():
    problem, grid = pull_1d(0.7), ctrl.TimeGrid([0.0, 0.1])
    wrong = [row.identity for row in page(1, "4  path KL: Girsanov on the chain") if isinstance(row, Planted)]
    policy = ctrl.BasisPolicy.scaled(problem, scale=0.9, shift=[0.1])
    values, kl = numbers(problem, policy, grid), exact.evaluate(problem, policy, grid).path_kl
    assert min(abs(substitute(row.left, values) / kl - 1) for row in wrong) > 0.05


def test_refusals():
    problem = pull_1d()
    grid = problem.grid(2)
    pre = problem.pretrained(grid)
    for other in (zoo.gaussian_pull_2d(), zoo.mixture_bump_1d(), replace(problem, entropy_weight=0.1)):
        with pytest.raises(ValueError, match="problem: expected dimension 1, Gaussian data"):
            numbers(other, other.pretrained(grid), grid)
    with pytest.raises(ValueError, match="eta: expected eta > 0"):
        numbers(replace(problem, eta=0.0), pre, grid)
    with pytest.raises(ValueError, match="values: expected a number for every letter, got none for a, x"):
        substitute(symbolic.x * symbolic.a + symbolic.eta, numbers(problem, pre, grid))
    with pytest.raises(ValueError, match="steps: expected at least one step"):
        ScalarChain(0)


# What a reader sees.


def test_notebooks_show_latex():
    chain = ScalarChain(1)
    assert sp.latex(chain.path_kl).count(r"K^{pre}_{0}") >= 1 and r"\kappa_{0}" in sp.latex(chain.path_kl)
    identity, planted = page(1, "9  optimum: the linear-quadratic recursion")[0], page(1, "4  path KL: Girsanov on the chain")[-1]
    assert identity._repr_latex_().startswith("$") and r"\neq" in planted._repr_latex_() and " = " in identity._repr_latex_()


def test_the_page_is_printed_and_its_exit_status_is_its_verdict(capsys, monkeypatch):
    command = [sys.executable, "-m", "analysis.symbolic", "--steps", "1"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    lines = out.stdout.splitlines()
    assert lines[-1] == "All hold." and sum("✓ rejected" in line for line in lines) >= 15 and sum("✓" in line for line in lines) >= 40
    planted = replace(page(1, "5  value: the martingale and its PDE")[0], right=sp.S.Zero)
    monkeypatch.setattr(symbolic, "SECTIONS", {"5  broken": lambda chain: [planted]})
    assert symbolic.main(symbolic.Options(steps=1)) == 1 and "✗ FAILS" in capsys.readouterr().out
