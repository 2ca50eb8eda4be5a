r"""Every check has teeth: planted errors against the resolution of the check that rejects them (theory.md, sections 0 and 16).

A dot is a wrong formula that people write, tried on gaussian-pull-2d or mixture-bump-1d by the theorem that it breaks; its place is the
smallest share of it that the check still rejects with probability .999 (false alarms 1e-6): exact checks to rounding, Monte Carlo checks
with 50,000 paths. All are left of 1, where the whole error stands. Rows of `ctrl verify --quick`; a full run uses eight times the paths.

Expected:
    planted errors rejected, share          1 +- 0
    largest share needed, exact             0.2 +- 0.2
    largest share needed, Monte Carlo       0.5 +- 0.5
    median log10 share, exact               -8.5 +- 2
    median log10 share, Monte Carlo         -1 +- 0.6
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import ctrl
import numpy as np
import pandas as pd
from ctrl.theorems.style import BLUE, ORANGE
from ctrl.theorems.verdict import Case
from ctrl.verify import THEOREMS

from paper_figures.house import page, publish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = Path(__file__).stem
PROBLEMS = (ctrl.zoo.gaussian_pull_2d, ctrl.zoo.mixture_bump_1d)
QUICK = ("exploration", "optimal_tilt", "gibbs_exploration", "deterministic_sampler", "kl_estimators", "value_learning")


def rows(quick: bool) -> pd.DataFrame:
    """theorem, problem, planted, by (exact or Monte Carlo), share, caught: a row per planted error that has a resolution."""
    out = []
    for make in PROBLEMS[:1] if quick else PROBLEMS:
        case = Case(make.__name__, make(), quick=True, seed=0)
        for theorem in THEOREMS:
            if not quick or theorem.name in QUICK:
                out += [(row.theorem, row.problem, row.reason, "exact" if row.z is None else "Monte Carlo", row.resolution, bool(row.holds))
                        for row in theorem.checks(case) if row.check == "planted" and row.resolution is not None]
    return pd.DataFrame(out, columns=["theorem", "problem", "planted", "by", "share", "caught"])


def measured(rows: pd.DataFrame) -> dict[str, float]:
    """Whether all are caught, and by how much."""
    out = {"planted errors rejected, share": float(rows.caught.mean())}
    for by, mine in rows.groupby("by"):
        out |= {f"largest share needed, {by}": float(mine.share.max()), f"median log10 share, {by}": float(np.log10(mine.share).median())}
    return out


def draw(rows: pd.DataFrame) -> Figure:
    """A dot for each, in the rows of the theorems."""
    names = list(dict.fromkeys(rows.theorem))
    with page(1, 3.3) as (figure, (ax,)):
        for by, colour, marker, side in (("exact", BLUE, "o", -0.17), ("Monte Carlo", ORANGE, "s", 0.17)):
            mine = rows[rows.by == by]
            place = [names.index(name) + side + 0.05 * (j % 5 - 2) for j, name in enumerate(mine.theorem)]
            ax.plot(mine.share, place, marker, color=colour, markersize=2.6, mec="black", mew=0.25, label=f"{by} checks: {len(mine)} errors")
        ax.axvline(1, color="black", ls="--", lw=0.8)
        ax.set(xscale="log", xlabel="smallest share of the error that is rejected with probability .999 (dashed: the whole error)")
        ax.set_yticks(range(len(names)), [f"{name.replace('_', ' ')} ({(rows.theorem == name).sum()})" for name in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def main(out: Path, quick: bool) -> None:
    publish(NAME, __doc__, rows(quick), measured, draw, out)
