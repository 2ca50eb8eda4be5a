r"""Action noise pays for steps, the chain's own noise does not: there the gradient's variance has a limit (theory.md, section 7).

a: trace of one path's covariance of the gradient (shift) over N on the reference problem, from the committed study of 8 seeds of 16,384
paths, bands two standard deviations; circles: theory.md's numbers. Action noise grows like N. b: the exponent of N for every estimator of
the catalogue that claims to be unbiased, fitted on N = 20 ... 160; bars two standard errors of the fit. One random step of a likelihood
ratio grows, too: N times a term that shrinks like N^{-1/2}; the temporal difference still falls to its limit.

Expected:
    ActionNoise at N = 160                         9720 +- 200
    ScoreFunction at N = 160                       131.5 +- 4
    RewardToGo at N = 160                          128.5 +- 4
    Pathwise at N = 160                            2.85 +- 0.05
    TemporalDifference at N = 160                  1 +- 0.02
    ValueGradient at N = 160                       0.844 +- 0.015
    exponent of action noise                       0.95 +- 0.12
    exponent of action noise, reward-to-go         0.95 +- 0.12
    exponent of one random step of reward-to-go    0.95 +- 0.12
    largest exponent of the others                 0 +- 0.1
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import ctrl
import numpy as np
import pandas as pd
from analysis.estimator_variance import ENTRIES
from ctrl import exact
from ctrl.estimators import Bias, Entry, Given, Need, catalogue
from ctrl.evidence import fitted_power
from ctrl.policy import BasisPolicy
from ctrl.theorems.style import BLUE, ORANGE

from paper_figures.house import look, page, publish, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = Path(__file__).stem
STUDY = Path(__file__).parents[1] / "analysis" / "estimator_variance" / "rows.csv"
GROWING = ("action noise", "action noise, reward-to-go", "one random step of reward-to-go")
QUICK = (*GROWING, "score function", "reward-to-go", "temporal difference", "pathwise")


def rows(quick: bool) -> pd.DataFrame:
    """panel "study": the committed rows' traces; panel "catalogue": traces of every estimator over N."""
    study = pd.read_csv(STUDY)[["estimator", "steps", "seed", "trace_shift"]].rename(columns={"trace_shift": "trace"})
    entries = [entry for entry in catalogue() if _drawn(entry) and (not quick or entry.name in QUICK)]
    found = [{"panel": "catalogue", "estimator": entry.name, "steps": steps, "seed": 0, "trace": _trace(entry, steps, 2**11 if quick else 2**13)}
             for steps in ((20, 80) if quick else (20, 40, 80, 160)) for entry in entries]
    return pd.concat([study.assign(panel="study"), pd.DataFrame(found)], ignore_index=True)


def _drawn(entry: Entry) -> bool:
    return entry.claim.bias == Bias.NONE and not entry.needs & {Need.ADVANTAGE, Need.OLD_POLICY, Need.FISHER}


@cache
def _setup(steps: int) -> tuple[ctrl.Problem, BasisPolicy, ctrl.TimeGrid, Given]:
    """A constant shift of the reference problem's policy is its theta, as in theory.md's table."""
    problem = ctrl.zoo.gaussian_pull_2d()
    policy, grid = BasisPolicy.scaled(problem, scale=0.9, shift=[0.1, 0.1]), problem.grid(steps)
    return problem, policy, grid, Given(value=exact.value(problem, policy, grid))


def _trace(entry: Entry, steps: int, paths: int) -> float:
    problem, policy, grid, given = _setup(steps)
    policy = policy.with_exploration(np.eye(2)) if Need.EXPLORATION in entry.needs else policy
    covariance = entry.make(given)(problem, policy, grid, ctrl.Noise(seed=steps, paths=paths)).covariance
    return float(np.trace(covariance[1:, 1:]))  # theta: scale, then shift


def _exponents(rows: pd.DataFrame) -> pd.DataFrame:
    """Exponent and its standard error (0 from two N), index: the estimator."""
    out = {}
    for name, mine in rows[rows.panel == "catalogue"].groupby("estimator", sort=False):
        two = len(mine) == 2
        fit = None if two else fitted_power(mine.steps.to_numpy(), mine.trace.to_numpy())
        slope = float(np.diff(np.log(mine.trace))[0] / np.diff(np.log(mine.steps))[0]) if fit is None else fit.slope
        out[name] = {"exponent": slope, "error": 0.0 if fit is None else fit.standard_error}
    return pd.DataFrame(out).T


def measured(rows: pd.DataFrame) -> dict[str, float]:
    """Traces of the study at N = 160, and exponents."""
    at = rows[(rows.panel == "study") & (rows.steps == 160)].groupby("estimator").trace.mean()
    exponent = _exponents(rows).exponent
    out = {f"{name} at N = 160": float(trace) for name, trace in at.items()} | {f"exponent of {name}": float(exponent[name]) for name in GROWING}
    return out | {"largest exponent of the others": float(exponent.drop(list(GROWING)).max())}


def draw(rows: pd.DataFrame) -> Figure:
    """Traces over N, and exponents of N."""
    exponents = _exponents(rows).sort_values("exponent")
    study = rows[rows.panel == "study"]
    with page(2, 3.1, ratios=(1.15, 1)) as (figure, (left, right)):
        for j, entry in enumerate(ENTRIES):
            over = study[study.estimator == entry.name].groupby("steps").trace
            mean, spread = over.mean(), 2 * over.std()
            left.loglog(mean.index, mean, **look(j), label=entry.name)
            left.fill_between(mean.index, mean - spread, mean + spread, color=look(j)["color"], alpha=0.25, lw=0)
            left.plot(*zip(*entry.expected, strict=True), "o", mfc="none", mec="black", ms=6.5, mew=0.6)
        left.set(xlabel="steps N", ylabel="trace of the covariance of one path's gradient", title="reference problem", ylim=(0.5, 1.5e6))
        ticks(left, sorted(set(study.steps) - {160}))
        left.legend(loc="upper left", ncols=2)
        place = np.arange(len(exponents))
        grows = exponents.index.isin(GROWING)
        for chosen, colour, marker in ((~grows, BLUE, "o"), (grows, ORANGE, "s")):
            right.errorbar(exponents.exponent[chosen], place[chosen], xerr=2 * exponents.error[chosen], fmt=marker, color=colour, elinewidth=0.8)
        right.axvline(0, color="black", lw=0.8)
        right.axvline(1, color="black", lw=0.8, ls="--")
        right.set(xlabel="exponent of N in the trace", title="all that claim to be unbiased")
        right.set_yticks(place, [name.replace("one random step", "one step") for name in exponents.index], fontsize=7)
    return figure


def main(out: Path, quick: bool) -> None:
    publish(NAME, __doc__, rows(quick), measured, draw, out)
