"""The paper's figures: their quick rows are what their docstrings say, wrong rows are not, and the files are the same bytes every time."""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from paper_figures import all as every
from paper_figures.house import OUT, STYLE, WIDE, Expected, expected, finished, publish, unmet


@cache
def module(name):
    return import_module(f"paper_figures.{name}")


@cache
def quick(name):
    return module(name).rows(True)


@pytest.mark.parametrize("name", every.FIGURES)
def test_quick_rows_are_as_the_docstring_says(name):
    figure = module(name)
    assert expected(figure.__doc__) and unmet(figure.__doc__, figure.measured(quick(name))) == []


@pytest.mark.parametrize("name", every.FIGURES)
def test_committed_rows_are_as_the_docstring_says(name):
    """The full rows in the repository, and beside them both pictures, small enough for it."""
    rows = pd.read_csv(OUT / f"{name}.csv")
    assert unmet(module(name).__doc__, module(name).measured(rows)) == [] and finished(name, OUT)
    assert all((OUT / f"{name}.{kind}").stat().st_size < 300_000 for kind in ("csv", "png", "pdf"))


def scaled(where, column, factor):
    """Rows with one column of some rows times a number, or a function of the row."""
    def planted(rows):
        rows, chosen = rows.copy(), where(rows)
        rows.loc[chosen, column] *= factor(rows[chosen]) if callable(factor) else factor
        return rows
    return planted


# (figure, what is wrong, the rows with it, the numbers of the docstring that must then be missed)
PLANTED = [
    ("fig_01_marginals", "the gain g^2 taken for h", lambda rows: rows.assign(y=rows.y.where((rows.panel != "distance") | (rows.eta != 0.5), 0.32)),
     ["order in D, eta = 0.5"]),
    ("fig_01_marginals", "a bias that scales like alpha at eta = 1", scaled(lambda r: (r.panel == "bias") & (r.eta == 1), "y", lambda r: 1 / r.x),
     ["exponent of alpha(T), eta = 1"]),
    ("fig_02_exploration", "noise that does not vanish", lambda rows: rows.assign(rms=rows.injected), ["strong order"]),
    ("fig_02_exploration", "tr Sigma not charged", lambda rows: rows.assign(objective=rows.objective - rows.limit),
     ["J_sampled - J_mean at N = 640"]),
    ("fig_03_kl", "the KL without D", scaled(lambda r: r.panel == "over N", "path_kl", lambda r: r.x), ["path KL, eta = 1, N = 100"]),
    ("fig_03_kl", "path and terminal KL exchanged", lambda rows: rows.rename(columns={"path_kl": "other_kl", "other_kl": "path_kl"}),
     ["least path KL - marginal KL", "terminal KL, eta = 1, N = 100"]),
    ("fig_04_variance", "a score function that grows like N", scaled(lambda r: r.estimator == "score function", "trace", lambda r: r.steps),
     ["largest exponent of the others"]),
    ("fig_04_variance", "action noise divided by N",
     scaled(lambda r: r.estimator.isin(["action noise", "ActionNoise"]), "trace", lambda r: 1 / r.steps),
     ["exponent of action noise", "ActionNoise at N = 160"]),
    ("fig_05_planted", "an error that was not caught", lambda rows: rows.assign(caught=rows.index > 0), ["planted errors rejected, share"]),
    ("fig_06_tilt", "step size taken for bias", lambda rows: rows.assign(
        y=np.where((rows.panel == "bias") & (rows.eta == 1) & (rows.beta_max == 20), 0.5 * rows.y[rows.panel == "chain"].iloc[-1], rows.y)),
     ["log10 bias, eta = 1, beta_max = 20"]),
    ("fig_07_deployment", "the gap's limit taken for 0", scaled(lambda r: r.panel == "limit", "y", 0.0),
     ["limit, another action", "order, another action less its limit"]),
    ("fig_07_deployment", "one J for every eta of deployment", lambda rows: rows.assign(
        y=np.where(rows.panel == "objective", rows.y.where(rows.x == 1).groupby(rows.curve).transform("max"), rows.y)), ["J* at eta = 0"]),
    ("fig_08_ansatz", "r(x0_hat) for V (Jensen)", lambda rows: rows.assign(
        y=np.where((rows.panel == "state") & (rows.curve == "V"), np.resize(rows.y[rows.curve == "r(x0_hat)"], len(rows)), rows.y)),
     ["largest |V - posterior mean of r|, N = 160"]),
    ("fig_08_ansatz", "skeleton and plain exchanged", lambda rows: rows.replace({"curve": {"plain": "skeleton", "skeleton": "plain"}}),
     ["rms error, skeleton : plain, 256 paths", "floor, skeleton : plain"]),
    ("fig_09_regret", "a bias that a race on reward would not show", scaled(lambda r: r.algorithm == "NaturalGradient", "median", 100.0),
     ["left (%), reference, NaturalGradient", "rank of NaturalGradient, both"]),
    ("fig_10_engine", "float32 against float64", scaled(lambda r: r.bits == 64, "ratio", 2.0),
     ["NumPy, float64, d = 1", "C++ Philox, float64, d = 8"]),
    ("fig_10_engine", "a law that is off", scaled(lambda r: r.version == "NumPy", "largest_z", 10.0), ["largest z of a law"]),
    ("fig_11_digits", "a KL averaged over 64 pixels", scaled(lambda r: r.panel == "run", "kl", 1 / 64), ["runs above the frontier, beyond 3 s.e."]),
    ("fig_11_digits", "lambda and 1/lambda exchanged", scaled(lambda r: r.panel == "ideal", "kl_weight", lambda r: r.kl_weight**-2),
     ["mean |slope / lambda - 1|, lambda < 2"]),
    ("fig_12_steps", "a KL without D", scaled(lambda r: r.panel == "study", "kl", lambda r: r.steps / 30),
     ["exponent of N in the mean KL", "mean KL, N = 100 over N = 20"]),
    ("fig_12_steps", "SDE and ODE exchanged", lambda rows: rows.replace({"eta": {0.0: 1.0, 1.0: 0.0}}),
     ["share at N = 5, ODE", "share at N = 5, eta = 1"]),
]


@pytest.mark.parametrize(("name", "what", "planted", "missed"), PLANTED, ids=[f"{name}: {what}" for name, what, _, _ in PLANTED])
def test_wrong_rows_are_rejected(name, what, planted, missed):
    """By the very comparison that right rows pass, in the numbers that the error concerns."""
    figure = module(name)
    said = unmet(figure.__doc__, figure.measured(planted(quick(name))))
    assert all(any(line.startswith(f"{want}: measured") for line in said) for want in missed), said


def test_every_figure_has_a_planted_error():
    assert {name for name, *_ in PLANTED} == set(every.FIGURES)


def test_docstrings_are_read():
    docstring = "Claim.\n\nExpected:\n    a slope, eta = 1   1 +- 0.05\n    b         -2e-3 +- 1e-4\n    no number here\n"
    assert expected(docstring) == {"a slope, eta = 1": Expected(1.0, 0.05), "b": Expected(-2e-3, 1e-4)}
    assert unmet(docstring, {"a slope, eta = 1": 0.96, "b": -0.0021}) == []
    assert sorted(line.split(":")[0] for line in unmet(docstring, {"a slope, eta = 1": 1.2, "c": 0.0})) == ["a slope, eta = 1", "b", "c"]
    assert len(unmet(docstring, {"a slope, eta = 1": float("nan"), "c": 0.0})) == 3
    for name in every.FIGURES:  # no line that looks like a number to expect is overlooked
        assert len(expected(module(name).__doc__)) == module(name).__doc__.count("+-")


def test_files_are_the_same_bytes_and_fit_the_page(tmp_path):
    figure = module("fig_03_kl")
    for folder in ("one", "two"):
        publish("fig", figure.__doc__, quick("fig_03_kl"), figure.measured, figure.draw, tmp_path / folder)
    files = sorted((tmp_path / "one").iterdir())
    assert [path.name for path in files] == ["fig.csv", "fig.pdf", "fig.png"]
    assert all(path.read_bytes() == (tmp_path / "two" / path.name).read_bytes() for path in files)
    pdf = (tmp_path / "one" / "fig.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf and b"CreationDate" not in pdf  # TrueType, embedded; no date
    width = float(re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ", pdf).group(1)) / 72
    assert width == pytest.approx(WIDE, abs=0.01)


def test_rows_that_are_wrong_are_not_drawn(tmp_path):
    figure = module("fig_03_kl")
    with pytest.raises(ValueError, match="expected the numbers of its docstring, got path KL"):
        publish("fig", figure.__doc__, quick("fig_03_kl").assign(path_kl=1.0), figure.measured, figure.draw, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["fig.csv"] and not finished("fig", tmp_path)


@pytest.mark.parametrize("name", every.FIGURES)
def test_figures_are_drawn_in_one_style(name):
    """8 pt (ticks and legends 7), at most a page of two columns, nothing global changed; different markers where colours differ."""
    before = dict(matplotlib.rcParams)
    figure = module(name).draw(quick(name))
    assert isinstance(figure, Figure) and figure.get_figwidth() <= WIDE and dict(matplotlib.rcParams) == before
    texts = [text for ax in figure.axes for text in (ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels())]
    assert {text.get_fontsize() for text in texts if text.get_text()} <= {7.0, 8.0} and STYLE.exists()
    for ax in figure.axes:
        looks = [(line.get_marker(), line.get_markerfacecolor() == "none", line.get_linestyle()) for line in ax.get_legend_handles_labels()[0]
                 if hasattr(line, "get_marker")]
        assert len(set(looks)) == len(looks), (name, ax.get_title(loc="left"), looks)


def test_the_loop_goes_on_and_says_what_failed(tmp_path, monkeypatch, capsys):
    settings = every.Settings(out=tmp_path, only=("fig_03_kl", "fig_12_steps"), quick=True)
    monkeypatch.setattr(module("fig_03_kl"), "rows", lambda quick: pd.DataFrame())
    assert every.main(settings) == 1
    assert "fig_03_kl" in (said := capsys.readouterr().out) and "FAILED" in said and finished("fig_12_steps", tmp_path / "quick")
    monkeypatch.setattr(module("fig_12_steps"), "rows", lambda quick: pytest.fail("a finished figure was drawn again"))
    monkeypatch.undo()
    assert every.main(every.Settings(out=tmp_path, only=("fig_12_steps",), quick=True)) == 0 and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="only: expected names out of fig_01"):
        every.Settings(only=("fig_99",))
