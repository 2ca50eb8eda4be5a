r"""Path KL is the left-point sum, bounds the terminal KL, and what else is written for it does not stay put (theory.md, section 4).

a: along generation, the path KL up to t and the KL of the marginals at t, exact, reference problem, N = 100. b: both at T over N: each
settles, in nats, at every eta. c: formulas in use, over the path KL of the same chain, d = 4, eta = .5: exact. The KL without its step D
grows like N, with D lost in the variance it shrinks like 1/N, an average over steps, too; those that do not depend on N are off by a factor.

Expected:
    path KL, eta = 1, N = 100                 0.176294751 +- 1e-8
    terminal KL, eta = 1, N = 100             0.102913961 +- 1e-8
    path KL, eta = 0.5, N = 100               0.278621913 +- 1e-8
    path KL, eta = 1.5, N = 100               0.20536023 +- 1e-8
    least path KL - marginal KL               0 +- 1e-12
    exponent in N: path KL (right)            0 +- 1e-9
    exponent in N: D missing in the sum       1 +- 1e-9
    exponent in N: D missing in the variance  -1 +- 1e-9
    factor: g² for g²/2                       1.28 +- 1e-9
    factor: full log-SNR step                 2 +- 1e-9
    factor: mean over dimensions              0.25 +- 1e-9
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import ctrl
import numpy as np
import pandas as pd
from analysis.peer_formulas import FORMULAS, Place
from ctrl import exact
from ctrl.exact.chain import LinearChain
from ctrl.laws import Gaussian
from ctrl.policy import BasisPolicy

from paper_figures.house import look, page, publish, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = Path(__file__).stem
ETAS = (0.5, 1.0, 1.5)
STEPS = (10, 20, 40, 100, 200, 400)
DIM = 4
DRAWN = {"StepLostInSum": 0, "NoiseSpace": 1, "WholeRate": 2, "FullLogSNR": 3, "DimensionMean": 4, "StepLostInVariance": 5}
ORDER = ("PathKL", *DRAWN)


def rows(quick: bool) -> pd.DataFrame:
    """panel, curve, eta, x, path_kl, other_kl: along t at N = 100; over N, with the terminal KL; wrong formulas over N, ratios to the path KL."""
    out = [row for eta in ETAS for row in _along(eta)]
    steps = STEPS[1:4] if quick else STEPS
    for eta in ETAS:
        problem, policy = _setup(eta)
        for n in steps:
            truth = exact.evaluate(problem, policy, problem.grid(n))
            out.append(("over N", "", eta, n, truth.path_kl, truth.terminal_kl))
    for key in ORDER:
        for n in steps:
            at = Place(0.5, "uniform", n, DIM)
            kl, right = FORMULAS[key].kl(at), FORMULAS["PathKL"].kl(at)
            assert kl is not None and right is not None
            out.append(("formulas", FORMULAS[key].name, 0.5, n, right, kl))
    return pd.DataFrame(out, columns=["panel", "curve", "eta", "x", "path_kl", "other_kl"])


def _setup(eta: float) -> tuple[ctrl.Problem, BasisPolicy]:
    problem = ctrl.zoo.gaussian_pull_2d(eta)
    return problem, BasisPolicy.scaled(problem, scale=0.9, shift=[0.1, 0.1])


def _along(eta: float) -> list[tuple[str, str, float, float, float, float]]:
    """Path KL of the first i steps, and the KL of the laws of X_i."""
    problem, policy = _setup(eta)
    grid = problem.grid(100)
    chain, c = LinearChain(problem, policy, grid), problem.coefficients(grid)
    (m, P), (n, R) = chain.moments, LinearChain(problem, problem.pretrained(grid), grid).moments
    path = np.concatenate([[0.0], np.cumsum(c.kappa * c.dt * chain.mean_departure)])
    return [("along t", "", eta, float(grid.times[i]), float(path[i]), Gaussian(m[i], P[i]).kl(Gaussian(n[i], R[i]))) for i in range(101)]


def measured(rows: pd.DataFrame) -> dict[str, float]:
    """theory.md's numbers at N = 100, the order of the two KLs, and what the formulas do with N."""
    at = rows[(rows.panel == "over N") & (rows.x == 100)].set_index("eta")
    out = {f"path KL, eta = {eta:g}, N = 100": float(at.path_kl[eta]) for eta in ETAS}
    out["terminal KL, eta = 1, N = 100"] = float(at.other_kl[1.0])
    both = rows[rows.panel != "formulas"]
    out["least path KL - marginal KL"] = float((both.path_kl - both.other_kl).min())
    for key in ("PathKL", "StepLostInSum", "StepLostInVariance"):
        mine = rows[rows.curve == FORMULAS[key].name]
        out[f"exponent in N: {FORMULAS[key].name}"] = float(np.polyfit(np.log(mine.x), np.log(mine.other_kl / mine.path_kl), 1)[0])
    for key in ("WholeRate", "FullLogSNR", "DimensionMean"):
        mine = rows[rows.curve == FORMULAS[key].name]
        out[f"factor: {FORMULAS[key].name}"] = float((mine.other_kl / mine.path_kl).iloc[-1])
    return out


def draw(rows: pd.DataFrame) -> Figure:
    """KL along t, over N, and as it is written elsewhere."""
    with page(3, 2.5, ratios=(1, 1, 1.1)) as (figure, (left, middle, right)):
        for j, eta in enumerate(ETAS):
            mine = rows[(rows.panel == "along t") & (rows.eta == eta)]
            left.plot(mine.x, mine.path_kl, **look(j, points=False), label=rf"path, $\eta={eta:g}$")
            left.plot(mine.x[::10], mine.other_kl[::10], **look(j) | {"linestyle": "none", "markerfacecolor": "none"},
                      label=rf"marginal, $\eta={eta:g}$")
            mine = rows[(rows.panel == "over N") & (rows.eta == eta)]
            middle.semilogx(mine.x, mine.path_kl, **look(j), label="path (full)" if eta == 1 else None)
            middle.semilogx(mine.x, mine.other_kl, **look(j) | {"markerfacecolor": "none"}, label="terminal (open)" if eta == 1 else None)
        left.set(xlabel="generation time t / T", ylabel="KL up to t (nats)", title="along generation, N = 100", ylim=(0, 0.42))
        left.legend(loc="upper left", ncols=1)
        middle.set(xlabel="steps N", ylabel="KL (nats)", title="the same KL on every grid", ylim=(0, 0.42))
        middle.legend(loc="upper right")
        right.axhline(1, color="black", lw=0.8)
        for key, j in DRAWN.items():
            mine = rows[rows.curve == FORMULAS[key].name]
            right.loglog(mine.x, mine.other_kl / mine.path_kl, **look(j), label=FORMULAS[key].name)
        right.set(xlabel="steps N", ylabel="claimed KL / path KL", title=rf"wrong KLs, $\eta=0.5$, d = {DIM}", ylim=(None, 3e7))
        right.legend(loc="upper left")
        for ax in (middle, right):
            ticks(ax, sorted(set(rows[rows.panel == "over N"].x)))
    return figure


def main(out: Path, quick: bool) -> None:
    publish(NAME, __doc__, rows(quick), measured, draw, out)
