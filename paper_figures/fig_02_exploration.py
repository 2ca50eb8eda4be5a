r"""Sampled actions follow the averaged policy: strong order 1/2, weak order 1, and only the cost moves at once (theory.md, section 3).

a: one path of the reference problem with sampled actions a ~ N(mu, Sigma), held for a step, and with mean actions, on the same Brownian
path. b: the root mean square of their difference at T on the same noise, and the difference of their covariances, both exact; injecting
noise h sqrt(D Sigma) instead never vanishes. c: J_sampled - J_mean, exact, tends to -lambda int kappa tr Sigma dt, and not to 0.

Expected:
    strong order                      0.5 +- 0.02
    weak order                        1 +- 0.04
    order, noise h sqrt(D Sigma)      0 +- 0.02
    limit of J_sampled - J_mean       -2.525 +- 1e-6
    J_sampled - J_mean at N = 640     -2.53 +- 0.02
    worst path gap, N = 20            1.5 +- 1
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import ctrl
import numpy as np
import pandas as pd
from ctrl.evidence import fitted_order
from ctrl.policy import BasisPolicy
from ctrl.theorems.exploration import Gaps, action_cost_limit, propagated, sampling_cov
from ctrl.theorems.style import GREY

from paper_figures.house import look, page, publish, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = Path(__file__).stem
STEPS = (20, 40, 80, 160, 320, 640)
FINE, COARSE = 320, 20
SIGMA = np.eye(2)


def rows(quick: bool) -> pd.DataFrame:
    """panel "path": sampled and mean first coordinate over t, on N steps; panel "gap": exact numbers over D, and the limit of J's gap."""
    problem = ctrl.zoo.gaussian_pull_2d()
    mean = BasisPolicy.scaled(problem, scale=0.9, shift=[0.1, 0.1])
    sampled = mean.with_exploration(SIGMA)
    out = []
    for steps in STEPS[2:] if quick else STEPS:
        grid = problem.grid(steps)
        gaps = Gaps.of(problem, sampled, grid)
        injected = float(np.trace(propagated(problem, sampled, grid, sampling_cov(problem, sampled, grid, power=1))))
        out.append({"panel": "gap", "steps": steps, "x": problem.horizon / steps, "rms": np.sqrt(gaps.square), "law": gaps.law,
                    "injected": np.sqrt(injected), "objective": gaps.objective, "limit": -problem.kl_weight * action_cost_limit(sampled, problem)})
    fine, noise = problem.grid(FINE), ctrl.Noise(seed=3, paths=1)
    for steps in (COARSE, FINE):
        grid = fine.coarsened(FINE // steps)
        here = noise if steps == FINE else noise.coarsened(fine, FINE // steps)
        states = [ctrl.simulate(problem, policy, grid, here, trajectory=True).states for policy in (sampled, mean)]
        assert states[0] is not None and states[1] is not None
        out += [{"panel": "path", "steps": steps, "x": t, "sampled": s, "mean": m}
                for t, s, m in zip(grid.times, states[0][0, :, 0], states[1][0, :, 0], strict=True)]
    return pd.DataFrame(out)


def measured(rows: pd.DataFrame) -> dict[str, float]:
    """Fitted orders, and where J's gap goes."""
    gap, coarse = rows[rows.panel == "gap"], rows[(rows.panel == "path") & (rows.steps == COARSE)]
    out = {what: fitted_order(gap.x.to_numpy(), gap[column].to_numpy()).slope
           for what, column in (("strong order", "rms"), ("weak order", "law"), ("order, noise h sqrt(D Sigma)", "injected"))}
    return out | {"limit of J_sampled - J_mean": float(gap.limit.iloc[0]), "J_sampled - J_mean at N = 640": float(gap.objective.iloc[-1]),
                  "worst path gap, N = 20": float((coarse.sampled - coarse["mean"]).abs().max())}


def draw(rows: pd.DataFrame) -> Figure:
    """Paths, orders, and the objective."""
    gap, path = rows[rows.panel == "gap"], rows[rows.panel == "path"]
    with page(3, 2.15, ratios=(1.25, 1, 1)) as (figure, (left, middle, right)):
        for k, steps in enumerate((COARSE, FINE)):
            mine, up = path[path.steps == steps], 3.5 * k
            left.plot(mine.x, mine["mean"] + up, color="black", lw=0.9, label="mean" if k == 0 else None)
            left.plot(mine.x, mine.sampled + up, color=look(1)["color"], ls="--", lw=0.9, label="sampled actions" if k == 0 else None)
            left.text(0.98, up + 1.7, f"N = {steps}", fontsize=7, ha="right")
        left.set(xlabel="generation time t / T", ylabel="first coordinate (shifted)", title="the same Brownian path", ylim=(None, 8.5))
        left.legend(loc="upper right", ncols=2, handlelength=1.6)
        for j, (column, label) in enumerate((("rms", "root mean square: 1/2"), ("law", "covariance: 1"))):
            middle.loglog(gap.x, gap[column], **look(j), label=label)
        middle.loglog(gap.x, gap.injected, color=GREY, marker="x", ls=":", label=r"noise $h\sqrt{D\Sigma}$: 0")
        middle.set(xlabel="step D (1/N)", ylabel="gap at T (state units)", title="orders in D", ylim=(None, 120))
        middle.legend(loc="upper left")
        right.semilogx(gap.x, gap.objective, **look(0), label="exact")
        right.axhline(float(gap.limit.iloc[0]), color="black", ls="--", lw=0.8, label=r"$-\lambda\int\kappa\,\mathrm{tr}\,\Sigma\,dt$")
        right.axhline(0, color=GREY, ls=":", label=r"$\mathrm{tr}\,\Sigma$ not charged")
        right.set(xlabel="step D (1/N)", ylabel=r"$J_{\mathrm{sampled}}-J_{\mathrm{mean}}$", title="the objective")
        right.legend(loc="center left")
        for ax in (middle, right):
            ticks(ax, gap.x[::2], [f"1/{n}" for n in gap.steps[::2]])
    return figure


def main(out: Path, quick: bool) -> None:
    publish(NAME, __doc__, rows(quick), measured, draw, out)
