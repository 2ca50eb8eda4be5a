"""Peers' formulas: right ones have no error, wrong ones that of their own estimator on whole paths, d coordinates are d times one; rows keep."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from analysis import peer_formulas as peers
from analysis.peer_formulas import FORMULAS, Coordinate, Place, compute, product, scaled, spaced
from analysis.sweep import sweep

import ctrl
from ctrl import exact
from ctrl.estimators import ClippedRatio
from ctrl.estimators import DDPO as PublishedDDPO
from ctrl.evidence import mean_test
from ctrl.exact.chain import LinearChain
from ctrl.noise import ArrayNoise, Noise
from ctrl.theorems.kl_estimators import LogRatio
from ctrl.theorems.path_kl import JointLaw, mismatched_eta_kl, reverse_kl, wrong_rates
from ctrl.theorems.policy_gradient import richardson
from ctrl.theorems.verdict import Case

PLACES = [Place(eta, spacing, steps, dim) for eta in (1.0, 0.5) for spacing in ("uniform", "uneven") for steps, dim in ((5, 1), (7, 16384), (100, 3))]
RIGHT = ("PathKL", "Complete", "Ratio")
ROUNDING, UNEVEN = 1e-10, Place(0.5, "uneven", 3, 2)


def row(key, at):
    return compute((key, at))


def whole(at, sampled=False):
    """All d coordinates: problem, policy, grid."""
    problem = product(at.dim, at.eta)
    return problem, scaled(problem, sampled), spaced(at.spacing, at.steps, problem.horizon)


def shared(gradient, dim):
    """From (scale, d shifts) to (scale, shift) over d."""
    return np.array([gradient[0], gradient[1:].sum()]) / dim


def error(measured, expected):
    return float(np.linalg.norm(measured - expected) / np.linalg.norm(expected))


# ---------------------------------------------------------------------------------------------------- right ones, and products


@pytest.mark.parametrize("at", PLACES, ids=str)
def test_the_right_formulas_have_no_error(at):
    """By the code that finds the others' errors."""
    for key in RIGHT:
        found = row(key, at)
        assert found["bias"] < ROUNDING and abs(found["cosine"] - 1) < ROUNDING
    assert abs(row("PathKL", at)["number"] - 1) < ROUNDING and abs(row("PathKL", at)["kl_cosine"] - 1) < ROUNDING


def test_every_wrong_formula_is_wrong_somewhere():
    """At eta = .5 on an uneven grid in several dimensions nothing is hidden."""
    at = Place(0.5, "uneven", 10, 16)
    for key in FORMULAS.keys() - set(RIGHT):
        found = row(key, at)
        assert max(found["bias"] or 0, abs((found["number"] or 1) - 1)) > 0.05, key


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("dim", [2, 3, 7])
def test_a_product_is_d_times_one_coordinate(dim, eta):
    """J, path KL, grad J, and the variance of the reward, against the chain in d dimensions."""
    at = Place(eta, "uneven", 9, dim)
    problem, policy, grid = whole(at)
    truth, one = exact.evaluate(problem, policy, grid), at.one
    assert truth.path_kl == pytest.approx(dim * one.truth.path_kl, rel=1e-12)
    assert truth.objective == pytest.approx(dim * one.truth.objective, rel=1e-12)
    assert error(shared(truth.gradient.theta, dim), one.gradient) < 1e-12
    reward = replace(problem, kl_weight=0.0)
    assert error(shared(exact.evaluate(reward, policy, grid).gradient.theta, dim), one.reward_slope) < 1e-12
    r, P = problem.reward.quadratic(dim), truth.terminal.cov
    pull = r.vector - r.matrix @ truth.terminal.mean
    assert math.sqrt(0.5 * np.sum((r.matrix @ P) ** 2) + pull @ P @ pull) == pytest.approx(math.sqrt(dim) * one.reward_std, rel=1e-12)
    # The log-ratio of whole paths, whose variance adds up and whose square does not.
    mean, variance, *_ = LogRatio.between(*(JointLaw.of(LinearChain(problem, p, grid)) for p in (policy, problem.pretrained(grid)))).cumulants
    assert row("SquaredLogRatio", at)["number"] == pytest.approx(0.5 * (variance + mean**2) / truth.path_kl, rel=1e-9)


# ---------------------------------------------------------------------------------------------------- the size of each error


SIGNS = sorted(FORMULAS.keys() - {*RIGHT, "ReferenceStates", "OtherEta", "SquaredLogRatio", "K3Loss", "OwnMean", "DDPO", "Clipped", "ClippedTightly",
                                  "ClippedMean"} | {"PathKL", "Complete"})


@pytest.mark.parametrize("key", SIGNS)
def test_gradients_are_those_of_the_estimators_in_full(key):
    """All sign patterns of d = 2 coordinates: the estimator's mean is d times what the formula says of one coordinate."""
    at = replace(UNEVEN, steps=2) if key == "LateReturn" else UNEVEN
    problem, policy, grid = whole(at, key == "LateReturn")
    found = FORMULAS[key].estimator()(problem, policy, grid, Noise.signs(problem, policy, grid))
    assert error(shared(found.mean, at.dim), FORMULAS[key].gradient(at)) < ROUNDING


def test_gradients_that_need_more_than_signs():
    """k3 is an exponential and the std a square of the reward: nodes; a batch of two paths is a product of two rules."""
    at = Place(0.5, "uneven", 2, 1)
    problem, policy, grid = whole(at)
    for key, nodes, slack in (("K3Loss", 24, 1e-9), ("DDPO", 4, 1e-7)):  # DDPO adds 1e-8 to its std
        found = FORMULAS[key].estimator()(problem, policy, grid, Noise.gauss_hermite(problem, policy, grid, nodes=nodes)).mean
        assert error(found, FORMULAS[key].gradient(at)) < slack
    two = replace(at, dim=2)
    found = PublishedDDPO()(*(chain := whole(two)), Noise.gauss_hermite(*chain, nodes=4)).mean
    assert error(shared(found, 2), FORMULAS["DDPO"].gradient(two)) < 1e-7
    rule = Noise.signs(problem, policy, grid)
    first, second = (i.ravel() for i in np.meshgrid(*2 * [np.arange(rule.paths)]))
    pairs = np.stack([first, second], axis=1).ravel()
    noise = ArrayNoise(rule.start(1)[pairs], rule.steps(2, 1)[pairs], weights=np.full(len(pairs), 1 / len(pairs)))
    found = FORMULAS["OwnMean"].estimator()(problem, policy, grid, noise).mean
    assert error(found, FORMULAS["OwnMean"].gradient(at)) < ROUNDING


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_numbers_are_those_of_the_theorems_planted_errors(eta, monkeypatch):
    """Weights, the reverse KL and the mismatched eta against the theorem's own, in d = 3."""
    at = Place(eta, "uniform", 12, 3)
    problem, policy, grid = whole(at)
    case = Case("product", problem, steps=12, quick=True, seed=0)
    monkeypatch.setattr(Case, "policy", policy)  # the one of this study, in the place of a case's own
    squared = LinearChain(problem, policy, grid).mean_departure
    planted = {what: weights @ squared / case.truth.path_kl for what, weights, _ in wrong_rates(case)}
    names = {"g^2 for g^2/2": "WholeRate", "g^2/2 kept at eta != 1": "KeptRate", "time step missing in the sum": "StepLostInSum",
             "time step missing in the variance": "StepLostInVariance", "mean over dimensions": "DimensionMean",
             "unweighted |eps - eps_ref|^2": "NoiseSpace", "full log-SNR step for its half": "FullLogSNR"}
    for what, key in names.items():
        assert row(key, at)["number"] == pytest.approx(planted.pop(what), rel=1e-12)
    assert not planted
    assert row("ReferenceStates", at)["number"] == pytest.approx(reverse_kl(case) / case.truth.path_kl, rel=1e-12)
    assert row("OtherEta", at)["number"] == pytest.approx(mismatched_eta_kl(case, 1.1) / case.truth.path_kl, rel=1e-9)


@pytest.mark.parametrize("key", ["StepLostInSum", "NoiseSpaceMean", "OtherEta"])
def test_slopes_of_wrong_kls_by_differences(key):
    """Of the number, in both parameters; the reverse KL's, too, whose states do not move."""
    at, slope = UNEVEN, FORMULAS[key].slope(UNEVEN)

    def moved(theta, form):
        one = Coordinate(at.one.problem, at.one.policy.with_theta(theta), at.one.grid)
        return FORMULAS[form].kl(SimpleNamespace(one=one, eta=at.eta, steps=at.steps, dim=at.dim))

    for form, expected in ((key, slope), ("ReferenceStates", FORMULAS["ReferenceStates"].slope(at))):
        found = [richardson(lambda h, e=e, form=form: moved(at.one.policy.theta + h * e, form)) for e in np.eye(2)]
        assert error(np.array(found), expected) < 1e-8


@pytest.mark.parametrize("spacing", ["uniform", "uneven"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_sizes_in_closed_form(eta, spacing):
    """Factors of N, d and eta that theory.md predicts; without D the factor is one for all steps on a uniform grid alone."""
    for steps, dim in ((5, 1), (20, 4), (100, 16384)):
        at = Place(eta, spacing, steps, dim)
        number = {key: row(key, at)["number"] for key in FORMULAS}
        kappa = (1 + eta**2) ** 2 / (8 * eta**2)  # over g^2
        expected = {"WholeRate": 1 / kappa, "KeptRate": 0.5 / kappa, "FullLogSNR": 2.0, "DimensionMean": 1 / dim, "WholeMean": 1 / (steps * dim)}
        if spacing == "uniform":
            expected |= {"StepLostInSum": steps, "StepLostInVariance": 1 / steps}
        for key, factor in expected.items():
            assert number[key] == pytest.approx(factor, rel=1e-11)
            assert row(key, at)["kl_cosine"] == pytest.approx(1, abs=1e-12)
        for key in ("StepLostInSum", "StepLostInVariance"):
            assert (row(key, at)["kl_cosine"] < 1 - 1e-5) == (spacing == "uneven")
        score, e = at.one.T.sum(axis=0), at.one.e.sum(axis=0)
        for key, share in (("LogDensityMean", 1 / dim), ("LogDensityStepMean", 1 / steps), ("PlainGain", 2 * eta / (1 + eta**2)), ("OwnMean", 0.5)):
            assert error(FORMULAS[key].gradient(at), share * score + e) < 1e-12


def test_what_is_hidden_is_hidden():
    """Section 16: eta = 1 and d = 1; a constant shift; mu = s, where what is left is the scale alone."""
    at = Place(1.0, "uneven", 10, 1)
    for key in ("KeptRate", "PlainGain", "DimensionMean", "LogDensityMean"):
        assert row(key, at)["bias"] < ROUNDING
    one = at.one
    start = Coordinate(one.problem, one.policy.with_theta([1.0, 0.0]), one.grid)
    shifted = Coordinate(one.problem, one.policy.with_theta([1.0, 0.3]), one.grid)
    place = SimpleNamespace(one=start, eta=1.0, spacing="uneven", steps=10, dim=64)
    for key in ("Folded", "NoKL", "StepLoss"):
        assert error(FORMULAS[key].gradient(place), start.gradient) < ROUNDING
    for key in ("LogDensityMean", "LogDensityStepMean", "DDPO"):
        wrong = FORMULAS[key].gradient(place)
        assert error(wrong, start.gradient) > 0.5 and error(wrong / np.linalg.norm(wrong), start.gradient / np.linalg.norm(start.gradient)) < ROUNDING
    place.one = shifted
    assert error(FORMULAS["StepLoss"].gradient(place), shifted.gradient) < ROUNDING
    assert error(FORMULAS["Folded"].gradient(place), shifted.gradient) > 0.01
    assert FORMULAS["ReferenceStates"].kl(place) == pytest.approx(shifted.truth.path_kl, rel=1e-12)
    assert FORMULAS["ReferenceStates"].gradient(place)[1] == pytest.approx(shifted.gradient[1], rel=1e-10)


# ---------------------------------------------------------------------------------------------------- clipped ratios


@pytest.mark.parametrize(("key", "dim"), [("Clipped", 64), ("ClippedTightly", 1), ("ClippedTightly", 16), ("ClippedMean", 16), ("Ratio", 16)])
def test_clipped_ratios_against_paths(key, dim):
    """The integral over one line against the estimator on paths in d dimensions; it sees 13 % of grad J, and the clips' errors are 170 % and more."""
    at = Place(0.5, "uneven", 5, dim)
    problem, grid = product(dim, 0.5, peers.SLOPE), spaced("uneven", 5, 1.0)
    policy = ctrl.BasisPolicy.shift(problem, np.full(dim, peers.NEW))
    old, noise, form = np.full(dim, peers.OLD), Noise(7, 40_000), FORMULAS[key]
    if key == "ClippedMean":
        r = ctrl.simulate(problem, policy.with_theta(old), grid, noise).reward
        samples = r.std() * PublishedDDPO(theta_old=old, clip=form.clip)(problem, policy, grid, noise).samples.sum(axis=1) / dim + at.pair.pull
    else:
        samples = ClippedRatio(theta_old=old, clip=form.clip)(problem, policy, grid, noise).samples.sum(axis=1) / dim
    target = float(form.target(at)[0])
    test = mean_test(samples / target, float(form.gradient(at)[0]) / target)
    assert test.holds and test.resolves < 0.13
    if key != "Ratio":
        assert row(key, at)["bias"] > 1.7
        assert not mean_test(samples / target, 1.0).holds


def test_a_clip_is_a_function_of_d_times_the_update_squared():
    """Nothing is clipped where the update is small; where it is large, what is left points back to theta_old."""
    bias = [row("Clipped", Place(0.5, "uniform", 20, dim)) for dim in (1, 16, 64, 1024)]
    assert bias[0]["bias"] < 1e-3 and bias[0]["cosine"] == pytest.approx(1) and bias[-1]["bias"] > 1 and bias[-1]["cosine"] == pytest.approx(-1)
    at = Place(0.5, "uniform", 20, 64)
    assert at.pair.surrogate(1, 1.0, 0.999) == pytest.approx(at.pair.surrogate(1, 1.0, None), rel=1e-12)
    tight = [at.pair.surrogate(64, 1.0, clip) for clip in (1e-4, 1e-6, 1e-8)]
    assert abs(tight[2] - tight[1]) < 0.02 * abs(tight[1] - tight[0]) < 1e-2 * abs(tight[0])


# ---------------------------------------------------------------------------------------------------- the study


PLAN = peers.Study(steps=(5, 8), dims=(1, 64))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command on two spawned processes: its folder, and what it prints."""
    out = tmp_path_factory.mktemp("peers")
    command = [sys.executable, "-m", "analysis.peer_formulas", "--out", str(out), "--steps", "5", "8", "--dims", "1", "64", "--workers", "2"]
    return out, subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(peers.__file__).parent.parent).stdout


def test_rows_are_those_of_this_process_and_kept(run):
    """Bit for bit, in the order of the jobs; a second call computes what is missing alone, and gets the same numbers."""
    parts, jobs = run[0] / "parts", PLAN.jobs()
    assert {path.stem: json.loads(path.read_text()) for path in parts.iterdir()} == {name: compute(job) for name, job in jobs.items()}
    stamps = {path: path.stat().st_mtime_ns for path in parts.iterdir()}
    assert len(stamps) == len(FORMULAS) * 4 * 2 * 2
    gone = parts / "Folded-eta0.5-uneven-N8-d64.json"
    before = gone.read_text()
    gone.unlink()
    again = pd.DataFrame(sweep(compute, jobs, folder=parts))
    assert gone.read_text() == before and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items() if path != gone)
    pd.testing.assert_frame_equal(pd.read_csv(run[0] / "rows.csv"), again, rtol=1e-14)


def test_the_command_writes_and_prints_its_table(run):
    out, said = run
    assert said == (out / "table.txt").read_text() == peers.text(peers.table(pd.DataFrame(map(compute, PLAN.jobs().values()))))
    assert all(form.name in said and form.hidden in said and form.met in said for form in FORMULAS.values())
    assert (out / "figure.png").stat().st_size > 100_000 and (out / "env.json").exists()
    assert len(peers.Study(quick=True).sized().jobs()) < len(peers.Study().jobs()) / 4


def test_the_committed_rows_are_those_of_the_code():
    """Every thirtieth of them, and all formulas, places and dimensions are there."""
    rows = pd.read_csv(Path(peers.__file__).with_suffix("") / "rows.csv")
    study = peers.Study()
    assert len(rows) == len(study.jobs()) and set(rows.dim) == set(study.dims) and set(rows.steps) == set(study.steps)
    for kept in rows.iloc[::29].itertuples():
        found = row(kept.formula, Place(kept.eta, kept.spacing, kept.steps, kept.dim))
        for name in ("number", "bias", "cosine", "kl_cosine"):
            value = getattr(kept, name)
            assert (found[name] is None) == bool(np.isnan(value))
            assert found[name] is None or found[name] == pytest.approx(value, rel=1e-6, abs=1e-11)
