r"""One model of images on every number of steps: what is tuned at N = 30 keeps share, KL and regret at N = 20 ... 100, and by the ODE.

Committed rows. a: share of images that an independent judge accepts, ten digits and three seeds of analysis/digits_study (points: runs;
line: mean), tuned at N = 30 by the value gradient. b: path KL in nats and regret of the same runs: neither grows with N, as a KL without its
time step would. c: digit 3 of analysis/digits_compare at three stochasticities, N = 5 ... 100: below ten steps the SDE fails first.

Expected:
    mean share at N = 20                  0.9505 +- 0.001
    mean share at N = 100                 0.963 +- 0.001
    largest change of a share, 20 to 100  0.032 +- 0.0005
    mean KL, N = 100 over N = 20          0.923 +- 0.001
    exponent of N in the mean KL          -0.0487 +- 0.001
    least ODE share                       0.8765 +- 0.0005
    share at N = 5, eta = 1               0.405 +- 0.001
    share at N = 5, ODE                   0.877 +- 0.001
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from ctrl.theorems.style import BLUE, GREY, ORANGE

from paper_figures.house import look, page, publish, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = Path(__file__).stem
ANALYSIS = Path(__file__).parents[1] / "analysis"
TRAINED, OTHERS = 30, (20, 50, 100)


def rows(quick: bool) -> pd.DataFrame:
    """panel "study": digit, seed, N, share, ODE share, KL, regret of runs tuned at N = 30; panel "transfer": eta, N, share, KL, regret."""
    study = pd.read_csv(ANALYSIS / "digits_study" / "rows.csv")
    study = study[study.steps == TRAINED]
    names = ["digit", "seed", "share", "kl", "regret", "ode_share"]
    parts = [study[["digit", "seed", "judged_share", "kl_mean", "regret"]].set_axis(names[:-1], axis=1).assign(steps=TRAINED)]
    for n in OTHERS:
        columns = ["digit", "seed", f"share_{n}", f"kl_{n}", f"regret_{n}", f"ode_share_{n}"]
        parts.append(study[columns].set_axis(names, axis=1).assign(steps=n))
    transfer = pd.read_csv(ANALYSIS / "digits_compare" / "transfer.csv")
    transfer = transfer[transfer.model == "fine-tuned"].rename(columns={"judged_share": "share", "kl_mean": "kl"})
    return pd.concat([pd.concat(parts).sort_values(["steps", "digit", "seed"]).assign(panel="study"),
                      transfer[["eta", "steps", "share", "kl", "regret"]].assign(panel="transfer")], ignore_index=True)


def measured(rows: pd.DataFrame) -> dict[str, float]:
    """Means and largest changes over N."""
    study, transfer = rows[rows.panel == "study"], rows[rows.panel == "transfer"].set_index(["steps", "eta"]).share
    share, kl = study.groupby("steps").share.mean(), study.groupby("steps").kl.mean()
    runs = study.groupby(["digit", "seed"]).share
    return {"mean share at N = 20": float(share[20]), "mean share at N = 100": float(share[100]),
            "largest change of a share, 20 to 100": float((runs.max() - runs.min()).max()), "mean KL, N = 100 over N = 20": float(kl[100] / kl[20]),
            "exponent of N in the mean KL": float(np.polyfit(np.log(kl.index), np.log(kl), 1)[0]), "least ODE share": float(study.ode_share.min()),
            "share at N = 5, eta = 1": float(transfer[5, 1.0]), "share at N = 5, ODE": float(transfer[5, 0.0])}


def draw(rows: pd.DataFrame) -> Figure:
    """Share, KL and regret over N; three stochasticities."""
    study, transfer = rows[rows.panel == "study"], rows[rows.panel == "transfer"]
    with page(3, 2.2) as (figure, (left, middle, right)):
        spread = 1 + 0.03 * (study.seed - 1)
        mean = study.groupby("steps")[["share", "ode_share", "kl", "regret"]].mean()
        left.semilogx(study.steps * spread, study.share, ".", color=GREY, ms=2, alpha=0.7, label="a run, SDE")
        left.semilogx(mean.index, mean.share, **look(0), label=r"mean, $\eta=1$")
        ode = mean.ode_share.dropna()
        left.semilogx(ode.index, ode, **look(1), label="mean, ODE")
        left.set(xlabel="steps N of sampling", ylabel="share of accepted images", title="ten digits, three seeds", ylim=(0.8, 1.0))
        left.legend(loc="lower right")
        for column, colour, marker, label in (("kl", BLUE, "o", "path KL (nats)"), ("regret", ORANGE, "s", "regret (reward units)")):
            middle.semilogx(study.steps * spread, study[column], ".", color=GREY, ms=2, alpha=0.7)
            middle.semilogx(mean.index, mean[column], color=colour, marker=marker, ls="-" if column == "kl" else "--", label=label)
        middle.set(xlabel="steps N of sampling", title="KL and regret do not grow", ylim=(0, 5))
        middle.legend(loc="upper left")
        for j, eta in enumerate((1.0, 0.5, 0.0)):
            mine = transfer[transfer.eta == eta].sort_values("steps")
            right.semilogx(mine.steps, mine.share, **look((0, 2, 1)[j]), label="ODE" if eta == 0 else rf"$\eta={eta:g}$")
        right.set(xlabel="steps N of sampling", ylabel="share of accepted images", title="digit 3, few steps", ylim=(0.3, 1.0))
        right.legend(loc="lower right")
        for ax in (left, middle):
            ticks(ax, (20, 30, 50, 100))
        ticks(right, (5, 10, 20, 50, 100))
    return figure


def main(out: Path, quick: bool) -> None:
    publish(NAME, __doc__, rows(quick), measured, draw, out)
