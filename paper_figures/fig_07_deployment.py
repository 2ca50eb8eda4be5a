r"""Trained by the SDE, deployed by the ODE: one action earns another reward at every stochasticity (theory.md, section 11).

a: E r at T over the eta of deployment, reference problem, N = 100, exact: only a score keeps it. b: J of the optimum trained at one eta and
deployed at another, less the optimum of the eta of deployment: exact regrets. c: the gap between eta = 1 and the ODE over D: it vanishes for
the pre-trained score (start p_T), at order 1, and for another action it has a limit that is not 0.

Expected:
    order of the gap, pre-trained         1 +- 0.02
    order, another action less its limit  1 +- 0.02
    limit, another action                 0.13277 +- 1e-5
    J* at eta = 1                         -1.3921577815 +- 1e-9
    J* at eta = 0                         -1.10004862 +- 1e-8
    E r of the policy at eta = 0.5        -2.697303368 +- 1e-8
    E r of the policy at eta = 0          -2.733375274 +- 1e-8
    least regret off the diagonal         0.06709 +- 1e-5
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import ctrl
import numpy as np
import pandas as pd
from ctrl import exact
from ctrl.evidence import fitted_order
from ctrl.theorems.deterministic_sampler import DEPLOYED, reward_gap, reward_gap_limit
from ctrl.theorems.verdict import Case

from paper_figures.house import look, page, publish, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = Path(__file__).stem
POLICIES = ("pre-trained", "another action", "optimum of 0", "optimum of 1")


def rows(quick: bool) -> pd.DataFrame:
    """panel, curve, x, y: expected rewards over eta; J over (trained, deployed); gaps over D, and their limit."""
    case = Case("gaussian_pull_2d", ctrl.zoo.gaussian_pull_2d(), quick, 0, steps=100)
    best = {eta: exact.optimum(case.at(eta).problem, case.grid) for eta in DEPLOYED}
    policies = (case.problem.pretrained(case.grid), case.policy, best[0.0].policy, best[1.0].policy)
    out = []
    for curve, policy in zip(POLICIES, policies, strict=True):
        out += [("reward", curve, eta, exact.evaluate(case.at(eta).problem, policy, case.grid).expected_reward)
                for eta in (DEPLOYED if quick else np.linspace(0.0, 1.5, 13).tolist())]
    for trained in DEPLOYED:
        J = {eta: exact.evaluate(case.at(eta).problem, best[trained].policy, case.grid).objective for eta in DEPLOYED}
        out += [("objective", f"{trained:g}", eta, objective) for eta, objective in J.items()]
    faithful = case.at(1.0, start="exact")
    for steps in (40, 80, 160, 320):
        grid = case.problem.grid(steps)
        out += [("gap", "pre-trained", 1 / steps, abs(reward_gap(faithful, 1.0, case.problem.pretrained(grid), grid))),
                ("gap", "another action", 1 / steps, reward_gap(replace(case, steps=steps), 1.0, case.policy, grid))]
    return pd.DataFrame([*out, ("limit", "another action", 0.0, reward_gap_limit(case, 1.0))], columns=["panel", "curve", "x", "y"])


def _regrets(rows: pd.DataFrame) -> pd.DataFrame:
    """J* of the column's eta less J of the row's optimum."""
    J = rows[rows.panel == "objective"].astype({"curve": float}).pivot_table("y", "curve", "x")
    return J.apply(lambda column: column[column.name] - column)


def measured(rows: pd.DataFrame) -> dict[str, float]:
    """Orders and limit of the gap, theory.md's optima, and the cheapest change of eta."""
    gap, limit = rows[rows.panel == "gap"], float(rows[rows.panel == "limit"].y.iloc[0])
    pre, other = (gap[gap.curve == curve] for curve in POLICIES[:2])
    reward, J = (rows[rows.panel == panel].set_index(["curve", "x"]).y for panel in ("reward", "objective"))
    regrets = _regrets(rows).to_numpy()
    return {"order of the gap, pre-trained": fitted_order(pre.x.to_numpy(), pre.y.to_numpy()).slope,
            "order, another action less its limit": fitted_order(other.x.to_numpy(), (other.y - limit).abs().to_numpy()).slope,
            "limit, another action": limit, "J* at eta = 1": float(J["1", 1.0]), "J* at eta = 0": float(J["0", 0.0]),
            "E r of the policy at eta = 0.5": float(reward["another action", 0.5]),
            "E r of the policy at eta = 0": float(reward["another action", 0.0]),
            "least regret off the diagonal": float(regrets[~np.eye(len(regrets), dtype=bool)].min())}


def draw(rows: pd.DataFrame) -> Figure:
    """Rewards, regrets and the gap's order."""
    from matplotlib.colors import LogNorm

    with page(3, 2.3, ratios=(1.1, 0.9, 1)) as (figure, (left, middle, right)):
        for j, curve in enumerate(POLICIES):
            mine = rows[(rows.panel == "reward") & (rows.curve == curve)]
            left.plot(mine.x, mine.y, **look(j) | {"markevery": 2}, label=curve.replace("of ", r"of $\eta=$"))
        left.set(xlabel=r"$\eta$ of deployment", ylabel="E r at T", title="one action, every sampler", ylim=(None, 1.2))
        left.legend(loc="upper left", ncols=2, handlelength=1.8)
        regret = _regrets(rows)
        middle.imshow(np.maximum(regret, 1e-9), norm=LogNorm(1e-3, 10), cmap="Greys", aspect="auto")
        for (i, j), x in np.ndenumerate(regret.to_numpy()):
            middle.text(j, i, "0" if abs(x) < 1e-12 else f"{x:.2g}", ha="center", va="center", fontsize=7, color="white" if x > 0.3 else "black")
        for name, labels in (("x", regret.columns), ("y", regret.index)):
            getattr(middle, f"set_{name}ticks")(range(len(labels)), [f"{eta:g}" for eta in labels])
        middle.grid(False)
        middle.set(xlabel=r"$\eta$ of deployment", ylabel=r"$\eta$ of training", title="regret of the optimum")
        gap, limit = rows[rows.panel == "gap"], float(rows[rows.panel == "limit"].y.iloc[0])
        for j, curve in enumerate(POLICIES[:2]):
            mine = gap[gap.curve == curve]
            right.loglog(mine.x, mine.y, **look(j), label=curve)
        right.loglog(mine.x, (mine.y - limit).abs(), **look(2), label="another, less its limit")
        right.axhline(limit, color="black", lw=0.8, label=f"limit {limit:.3f}")
        right.set(xlabel="step D (1/N)", ylabel=r"$|E\,r_{\eta=1}-E\,r_{\eta=0}|$", title="SDE-ODE reward gap", ylim=(None, 20))
        ticks(right, mine.x, [f"1/{1 / x:.0f}" for x in mine.x])
        right.legend(loc="upper left")
    return figure


def main(out: Path, quick: bool) -> None:
    publish(NAME, __doc__, rows(quick), measured, draw, out)
