"""The KL in the return and as a loss: all pairs of forms, each as good or as wrong as it says."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings

import ctrl
from ctrl.estimators import K1, K2, K3, Analytic, Bias, Estimator, KLForm, Run, ScoreFunction, runs
from ctrl.testing import assert_unbiased, setups

FORMS = (None, Analytic(), K1(), K2(), K3())
POLYNOMIAL = [(R, L) for R, L in product(FORMS, FORMS) if not isinstance(R, (K2, K3)) and not isinstance(L, K3)]


def name(form):
    return type(form).__name__ if form is not None else "none"


def only_run(problem, policy, grid, noise) -> Run:
    (run,) = runs(problem, policy, grid, noise)
    return run


class Cotangents(Estimator):
    """sum_i (d mu_i)' u_i for given u."""

    def __init__(self, u):
        self.u = u

    def cotangents(self, run):
        return self.u


def expected_pull(run, u):
    """E sum_i (d mu_i)' u_i by the rule of the run, (p,)."""
    return run.noise.weights @ Cotangents(u).samples(run)


# ------------------------------------------------------------------------------------------- the table of ctrl.estimators.kl


def table_errors(run):
    """Errors of the table's rows against E sum (d mu_i)'e_i, for (form, in the return) and (form, as a loss), relative."""
    e = expected_pull(run, run.kl_term)
    u2 = 2 * run.coefficients.kappa * run.coefficients.dt * np.sum(run.departure**2, axis=2)
    half = expected_pull(run, 0.5 * u2[:, :, None] * run.kl_term)
    in_return = {Analytic(): 0 * e, K1(): -e, K2(): -half, K3(): 0 * e}
    as_loss = {Analytic(): e, K1(): 0 * e, K2(): e, K3(): e}
    for form, target in in_return.items():
        yield name(form) + " in the return", expected_pull(run, form.cost(run)[:, :, None] * run.score_noise) - target, e
    for form, target in as_loss.items():
        yield name(form) + " as a loss", expected_pull(run, form.pull(run)) - target, e


@settings(max_examples=8)
@given(setups(dim=1, max_steps=2))
def test_the_four_by_five_table(setup):
    """Step by step, by 30 Gauss-Hermite nodes a variable; the per-step return of the row, not of the path."""
    run = only_run(*setup, ctrl.Noise.gauss_hermite(*setup, nodes=30))
    for what, error, e in table_errors(run):
        assert np.linalg.norm(error) <= 1e-8 * np.linalg.norm(e), what


def test_planted_rows_of_the_table_are_seen(bench):
    """A log-ratio with its sign exchanged, and D missing from kappa D, change the rows."""
    run = only_run(*bench(dim=1, steps=2), ctrl.Noise.gauss_hermite(*bench(dim=1, steps=2), nodes=30))
    run.__dict__["k1"] = -run.k1
    wrong = {what: np.linalg.norm(error) / np.linalg.norm(e) for what, error, e in table_errors(run)}
    assert wrong["K1 in the return"] > 0.5 and wrong["K2 as a loss"] > 0.5 and wrong["K3 as a loss"] > 0.5


# ------------------------------------------------------------------------------------------- whole forms


@given(setups(max_patterns=2**10))
def test_polynomial_forms_claimed_unbiased_are(setup):
    for R, L in POLYNOMIAL:
        if (form := KLForm(R, L)).claim.bias is Bias.NONE:
            assert_unbiased(form, *setup)


@given(setups(max_patterns=2**10))
def test_known_forms_are_the_score_function(setup):
    """Analytic twice is the score function, k1 in the return its sampled form: path by path."""
    run = only_run(*setup, ctrl.Noise.signs(*setup))
    for form, known in ((KLForm(Analytic(), Analytic()), ScoreFunction()), (KLForm(K1(), None), ScoreFunction(sampled_kl=True))):
        np.testing.assert_allclose(form.samples(run), known.samples(run), rtol=1e-12, atol=1e-12)


def test_k3_by_gauss_hermite_nodes(bench, away):
    """e^{-k1} is no polynomial: 30 nodes in one dimension, two steps; a wrong R or L is off by percents."""
    setup = bench(dim=1, steps=2, discount=0.4)
    noise = ctrl.Noise.gauss_hermite(*setup, nodes=30)
    for pair in ((K3(), K3()), (K3(), Analytic()), (Analytic(), K3()), (K3(), K2()), (Analytic(), K2())):
        assert KLForm(*pair).claim.bias is Bias.NONE
        assert away(KLForm(*pair), *setup, noise) <= 1e-9, [name(form) for form in pair]


@pytest.mark.parametrize("pair", list(product(FORMS, FORMS)), ids=lambda pair: " + ".join(map(name, pair)))
def test_every_pair_is_as_it_claims(bench, away, pair):
    """All 25: unbiased to 1e-9, or off by more than 0.2 %."""
    setup = bench(dim=1, steps=2)
    bias = away(KLForm(*pair), *setup, ctrl.Noise.gauss_hermite(*setup, nodes=24))
    assert bias <= 1e-9 if KLForm(*pair).claim.bias is Bias.NONE else bias > 2e-3, bias


def test_folding_and_detached_losses_are_the_planted_errors_of_the_theorem(bench):
    """In the mean: k3 in the return = (A); k2 and k3 as a loss = (B); k1 as a loss = (C) no KL at all."""
    setup = bench(dim=1, steps=2)
    noise = ctrl.Noise.gauss_hermite(*setup, nodes=30)
    mean = {pair: KLForm(*pair)(*setup, noise).mean for pair in product(FORMS, FORMS)}
    none, analytic, k1, k2, k3 = FORMS
    scale = np.linalg.norm(mean[analytic, analytic])
    same = [((k3, none), (analytic, none)), ((none, k2), (none, analytic)), ((none, k3), (none, analytic)), ((none, k1), (none, none))]
    assert all(np.linalg.norm(mean[a] - mean[b]) <= 1e-9 * scale for a, b in same)
    assert np.linalg.norm(mean[analytic, none] - mean[none, analytic]) > 1e-2 * scale
