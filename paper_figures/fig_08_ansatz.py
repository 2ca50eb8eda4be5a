r"""The value is the reward at the denoised state plus Jensen's gap, so a network need only learn the gap (theory.md, section 13).

mixture-bump-1d, eta = 1, pre-trained policy. a: V(T/2, x), r(x0_hat(T/2, x)) and two wrong x0_hat; circles: the posterior mean of r, by
quadrature of the data law. b: root mean square over the states that are visited, in deviations of V, of V less c_skip r(x0_hat): with
c_skip = 1 and of the skeleton cos(pi tau/2T). c: values learned from few paths, affine in x, with and without the skeleton; dotted: from all.

Expected:
    largest |V - posterior mean of r|, N = 160    0.0041 +- 0.001
    rms gap of r(x0_hat) at the end / at T/2      0.046 +- 0.005
    rms error, skeleton : plain, 256 paths        0.698 +- 0.03
    floor, skeleton : plain                       0.6724 +- 0.001
    least floor : learned                         0.93 +- 0.06
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import ctrl
import numpy as np
import pandas as pd
from ctrl import exact
from ctrl.theorems.style import PURPLE, RED
from ctrl.theorems.value import Solved
from ctrl.theorems.value_ansatz import COSINE, PLAIN, WRONG_DENOISERS, Batch, Class, World, denoised, posterior_reward
from ctrl.theorems.verdict import Case

from paper_figures.house import look, page, publish, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = Path(__file__).stem
STEPS, LEARNING_STEPS, REPEATS = 160, 20, 32
COUNTS = (16, 32, 64, 128, 256)
FAMILIES = {"plain": Class(PLAIN, 1), "skeleton": Class(COSINE, 1)}
STATES = ("V", "posterior", "r(x0_hat)", *(what for what, _ in WRONG_DENOISERS))


def rows(quick: bool) -> pd.DataFrame:
    """panel, curve, x, y, error: values over states; gaps over t; errors of learned values over the number of paths, and their floors."""
    case = Case("mixture_bump_1d", ctrl.zoo.mixture_bump_1d(), quick, 0, steps=STEPS)
    return pd.DataFrame([*_state(case), *_gaps(case), *_learned(case)], columns=["panel", "curve", "x", "y", "error"])


def _state(case: Case) -> list[tuple[str, str, float, float, float]]:
    problem, t, x = case.problem, 0.5 * case.problem.horizon, np.linspace(-2.5, 2.5, 61)[:, None]
    value = exact.value(problem, problem.pretrained(case.grid), case.grid)
    curves = [value(STEPS // 2, x), posterior_reward(problem, t, x), problem.reward.value(denoised(problem, t, x)),
              *(problem.reward.value(wrong(problem, t, x)) for _, wrong in WRONG_DENOISERS)]
    return [("state", name, float(at), float(y), 0.0) for name, curve in zip(STATES, curves, strict=True)
            for at, y in zip(x[:, 0], curve, strict=True)]


def _pretrained(case: Case, steps: int) -> World:
    short = replace(case, steps=steps)
    return World(Solved(short, case.problem.pretrained(short.grid), "pre-trained"))


def _gaps(case: Case) -> list[tuple[str, str, float, float, float]]:
    """Over every third time of the law's nodes; the unit is the deviation of V over time and states."""
    world, out = _pretrained(case, 40), []
    unit = float(np.sqrt(world.size / case.problem.horizon))
    for t, _, x, w, V in world.visits[::3]:
        r = case.problem.reward.value(denoised(case.problem, t, x))
        for name, skip in (("V - r(x0_hat)", 1.0), ("V - c_skip r(x0_hat)", COSINE.weights(case.problem, t)[0]), ("V", 0.0)):
            out.append(("gap", name, t, float(np.sqrt(w @ (V - skip * r) ** 2)) / unit, 0.0))
    return out


def _learned(case: Case) -> list[tuple[str, str, float, float, float]]:
    world = _pretrained(case, LEARNING_STEPS)
    batch, out = Batch.simulated(world, "paper figure", REPEATS, max(COUNTS)), []
    for name, family in FAMILIES.items():
        out.append(("floor", name, 0.0, world.floor(family), 0.0))
        for n in COUNTS:
            errors = batch.learned(family, n)
            rms = float(np.sqrt(errors.mean()))
            out.append(("learned", name, n, rms, float(errors.std(ddof=1) / np.sqrt(len(errors)) / (2 * rms))))
    return out


def measured(rows: pd.DataFrame) -> dict[str, float]:
    """V against the posterior mean, where Jensen's gap ends, and skeleton against plain."""
    at = rows.set_index(["panel", "curve"]).y
    gap = rows[rows.curve == "V - r(x0_hat)"].set_index("x").y
    middle = float(np.interp(0.5 * gap.index.max(), gap.index, gap))
    learned = rows[rows.panel == "learned"].pivot_table("y", "x", "curve")
    floor = {name: float(at["floor", name]) for name in FAMILIES}
    return {"largest |V - posterior mean of r|, N = 160": float(np.abs(at["state", "V"].to_numpy() - at["state", "posterior"].to_numpy()).max()),
            "rms gap of r(x0_hat) at the end / at T/2": float(gap.iloc[-1]) / middle,
            "rms error, skeleton : plain, 256 paths": float(learned.skeleton.iloc[-1] / learned.plain.iloc[-1]),
            "floor, skeleton : plain": floor["skeleton"] / floor["plain"],
            "least floor : learned": float(min((floor[name] / learned[name]).max() for name in FAMILIES))}


def draw(rows: pd.DataFrame) -> Figure:
    """V at T/2, the gap over time, and learning."""
    with page(3, 2.3, ratios=(1.1, 1, 1)) as (figure, (left, middle, right)):
        looks = ({**look(0, points=False), "lw": 1.6}, {"color": "black", "marker": "o", "mfc": "none", "ls": "none"}, look(1, points=False),
                 {"color": RED, "ls": "-."}, {"color": PURPLE, "ls": ":"})
        labels = ("V of the chain", r"E$[r(X_0)\,|\,x]$", r"$r(\hat x_0)$", r"no $1/\alpha$", r"$v$ for $\sqrt{v}$")
        for name, label, style in zip(STATES, labels, looks, strict=True):
            mine = rows[(rows.panel == "state") & (rows.curve == name)].iloc[:: 5 if name == "posterior" else 1]
            left.plot(mine.x, mine.y, label=label, **style)
        left.set(xlabel="state x", ylabel="reward units", title="t = T/2", ylim=(None, 1.75))
        left.legend(loc="upper right", ncols=2)
        names = {"V": "V (plain)", "V - c_skip r(x0_hat)": r"$V-c_{\mathrm{skip}}\,r(\hat x_0)$", "V - r(x0_hat)": r"$V-r(\hat x_0)$"}
        for j, (name, label) in enumerate(names.items()):
            mine = rows[(rows.panel == "gap") & (rows.curve == name)]
            middle.plot(mine.x, mine.y, **look((3, 1, 0)[j]), label=label)
        middle.set(xlabel="generation time t / T", ylabel="rms (deviations of V)", title="what is left to learn", ylim=(0, None))
        middle.set_ylim(top=1.45 * middle.get_ylim()[1])
        middle.legend(loc="upper left")
        for j, name in ((3, "plain"), (1, "skeleton")):
            mine = rows[(rows.panel == "learned") & (rows.curve == name)]
            right.errorbar(mine.x, mine.y, 2 * mine.error, capsize=1.5, elinewidth=0.8, **look(j), label=f"{name}, affine")
            right.axhline(float(rows[(rows.panel == "floor") & (rows.curve == name)].y.iloc[0]), color=look(j)["color"], lw=0.7, ls=":")
        right.set(xscale="log", yscale="log", xlabel="paths", ylabel="rms error of V (deviations)", title="learned from few paths")
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter("{x:g}")
        ticks(right, COUNTS)
        right.legend(loc="upper right")
    return figure


def main(out: Path, quick: bool) -> None:
    publish(NAME, __doc__, rows(quick), measured, draw, out)
