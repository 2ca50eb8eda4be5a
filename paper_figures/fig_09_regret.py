r"""The regret race: thirteen algorithms on chains whose optimum is known, exact regret within the class (theory.md, section 15).

Committed rows of analysis/regret, ten seeds, every step size from one search. a, b: regret over reward queries, as a share of what can be
won, medians and 10-90 % of seeds, on the reference problem and on a mixture. c: what is left at the end for all thirteen. With the same
queries, natural gradients get furthest and DDPO as published is last on both; what gains on the quadratic reward (pathwise gradients,
Adjoint Matching, reward-weighted regression) does not on the mixture.

Expected:
    left (%), reference, NaturalGradient     0.093 +- 0.06
    left (%), reference, AdjointMatching     0.31 +- 0.2
    left (%), reference, ScoreFunction       1.02 +- 0.4
    left (%), reference, DDPO                10.5 +- 1
    left (%), mixture, NaturalGradient       0.46 +- 0.3
    left (%), mixture, DDPO                  16.3 +- 1
    rank of NaturalGradient, both            1 +- 0
    rank of DDPO, both                       13 +- 0
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from analysis.regret import ALGORITHMS, shares

from paper_figures.house import look, page, publish, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = Path(__file__).stem
ROWS = Path(__file__).parents[1] / "analysis" / "regret" / "rows.jsonl"
COURSES = {"gaussian_pull_2d": "reference", "mixture_bump_1d": "mixture"}
DRAWN = ("ScoreFunction", "DDPO", "ValueGradient", "Pathwise", "AdjointMatching", "NaturalGradient")
EVERY = 4  # updates from one drawn point to the next


def rows(quick: bool) -> pd.DataFrame:
    """course, algorithm, queries, and the quantiles low, median, high of the share of regret that is left; 10, 50 and 90 % of seeds."""
    out: list[tuple[str, str, float, float, float, float]] = []
    runs = pd.DataFrame([json.loads(line) for line in ROWS.read_text().splitlines()])
    for (course, name), mine in runs[runs.course.isin(list(COURSES))].groupby(["course", "algorithm"], sort=False):
        left = np.array([shares(within) for within in mine.within])
        quantiles = np.quantile(np.clip(left, 1e-5, 1e3), (0.1, 0.5, 0.9), axis=0, method="nearest")
        queries = np.median(np.array(list(mine.queries), dtype=np.float64), axis=0)
        chosen = sorted({*range(0, len(queries), EVERY if name in DRAWN else len(queries)), len(queries) - 1})
        out += [(COURSES[course], name, float(queries[k]), *quantiles[:, k].tolist()) for k in chosen]
    return pd.DataFrame(out, columns=["course", "algorithm", "queries", "low", "median", "high"])


def _ends(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.loc[rows.groupby(["course", "algorithm"]).queries.idxmax()]


def measured(rows: pd.DataFrame) -> dict[str, float]:
    """What is left at the end, and who is first and last on both problems."""
    left = _ends(rows).pivot(index="algorithm", columns="course", values="median")
    asked = [("reference", name) for name in ("NaturalGradient", "AdjointMatching", "ScoreFunction", "DDPO")]
    asked += [("mixture", name) for name in ("NaturalGradient", "DDPO")]
    ranks = left.rank()
    return {**{f"left (%), {course}, {name}": 100 * float(left[course][name]) for course, name in asked},
            "rank of NaturalGradient, both": float(ranks.loc["NaturalGradient"].mean()), "rank of DDPO, both": float(ranks.loc["DDPO"].mean())}


def draw(rows: pd.DataFrame) -> Figure:
    """Two races, and where all end."""
    ends = _ends(rows)
    with page(3, 2.8, ratios=(1, 1, 0.95)) as (figure, (left, middle, right)):
        for ax, course in ((left, "reference"), (middle, "mixture")):
            for j, name in enumerate(DRAWN):
                mine = rows[(rows.course == course) & (rows.algorithm == name)].iloc[1:]
                ax.loglog(mine.queries, mine["median"], **look(j) | {"markevery": 3}, label=name)
                ax.fill_between(mine.queries, mine.low, mine.high, color=look(j)["color"], alpha=0.15, lw=0)
            ax.axhline(0.01, color="black", lw=0.7, ls=":")
            ax.set(xlabel="reward queries (thousands)", title=f"{course} problem", ylim=(3e-4, 2))
            ticks(ax, (1000, 2000, 5000, 10000, 20000)[course == "mixture" :], ("1", "2", "5", "10", "20")[course == "mixture" :])
        left.set_ylabel("regret left, share of what can be won")
        left.legend(loc="lower left", handlelength=2.4)
        order = ends[ends.course == "reference"].sort_values("median", ascending=False).algorithm.tolist()
        for j, (course, shift) in enumerate((("reference", 0.15), ("mixture", -0.15))):
            mine = ends[ends.course == course].set_index("algorithm").loc[order]
            bars = 100 * np.stack([mine["median"] - mine.low, mine.high - mine["median"]])
            right.errorbar(100 * mine["median"], np.arange(len(order)) + shift, xerr=bars, elinewidth=0.8, label=course,
                           **look(j) | {"linestyle": "none"})
        right.set(xscale="log", xlabel="left at the end (%)", title=f"all {len(ALGORITHMS)}, 10-90 % of seeds")
        right.set_yticks(range(len(order)), order)
        right.set_ylim(-2.6, None)
        right.legend(loc="lower right", ncols=2)
    return figure


def main(out: Path, quick: bool) -> None:
    publish(NAME, __doc__, rows(quick), measured, draw, out)
