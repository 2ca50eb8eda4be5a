r"""The optimum is the tilted law only where the noising forgets: the initial-law bias over beta_max and eta (theory.md, section 9).

a: KL(law of X_T under the optimum || tilt of the pre-trained law), continuous time, closed form, reference problem, start p_T; at eta = 1
also a chain of 200 steps, whose step-size error is easily taken for bias. b: the same over eta. c: terminal densities at beta_max = 2, a
mixture on the line, eta = 1, by quadrature: at lambda = .2 the optimum misses the tilt, the more the shorter the noising.

Expected:
    log10 bias, eta = 1, beta_max = 20        -9.954 +- 0.002
    log10 bias, eta = 1, beta_max = 10        -5.607 +- 0.001
    log10 bias, eta = 1, beta_max = 4         -2.919 +- 0.001
    log10 bias, eta = 1, beta_max = 2         -1.873 +- 0.001
    log10 bias, eta = 1, beta_max = 1         -1.2 +- 0.001
    log10 bias, eta = 0.5, beta_max = 20      -2.8371 +- 0.001
    log10 bias, eta = 0.5, beta_max = 1       -0.2766 +- 0.001
    log10 bias, eta = 1.5, beta_max = 20      -21.3 +- 0.05
    log10 chain minus bias, beta_max = 20     -4.158 +- 0.005
    bias on the line, beta_max = 2            0.05714 +- 0.0001
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import ctrl
import numpy as np
import pandas as pd
from ctrl import exact
from ctrl.exact.tilt import initial_bias, reversal_optimum
from ctrl.laws import Gaussian
from ctrl.theorems.style import GREY, RED

from paper_figures.house import look, page, publish, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = Path(__file__).stem
STRENGTHS = (1.0, 2.0, 4.0, 10.0, 20.0)
ETAS = (0.5, 1.0, 1.5)
FINITE = 200
SHORT = 2.0


def rows(quick: bool) -> pd.DataFrame:
    """panel, eta, beta_max, x, y, z: biases (y); on the line densities of the optimum (y) and of the tilt (z) over x."""
    out = []
    for beta in STRENGTHS:
        problem = replace(ctrl.zoo.gaussian_pull_2d(), schedule=ctrl.VP(0.1, beta), start="exact")
        etas = sorted({*ETAS, *(() if quick else np.round(np.linspace(0.25, 1.5, 26), 2).tolist())})
        out += [("bias", eta, beta, beta, initial_bias(replace(problem, eta=eta)).kl, np.nan) for eta in etas]
        end = exact.optimum(problem, problem.grid(FINITE)).truth.terminal
        out.append(("chain", 1.0, beta, beta, Gaussian(end.mean, end.cov).kl(initial_bias(problem).tilt), np.nan))
    line = replace(ctrl.zoo.mixture_bump_1d(), schedule=ctrl.VP(0.1, SHORT), start="exact")
    best = reversal_optimum(line)
    x = np.linspace(-2.4, 2.2, 93)
    tilted = np.exp(line.data.log_density(x[:, None]) + line.reward.value(x[:, None]) / line.kl_weight)
    tilted /= np.trapezoid(tilted, x)
    order = np.argsort(best.points.ravel())  # nodes of a rule whose weights vary: only the ratio of masses is smooth
    ratio = np.interp(x, best.points.ravel()[order], (best.masses / best.tilt).ravel()[order])
    curves = (ratio * tilted, tilted)
    out += [("line", 1.0, SHORT, *row) for row in zip(x, *curves, strict=True)]
    return pd.DataFrame([*out, ("line bias", 1.0, SHORT, SHORT, best.bias, np.nan)], columns=["panel", "eta", "beta_max", "x", "y", "z"])


def measured(rows: pd.DataFrame) -> dict[str, float]:
    """Logarithms of biases; the tolerances are the digits of theory.md."""
    at = rows[rows.panel != "line"].set_index(["panel", "eta", "beta_max"]).y
    asked = [(1.0, beta) for beta in STRENGTHS] + [(0.5, 20.0), (0.5, 1.0), (1.5, 20.0)]
    out = {f"log10 bias, eta = {eta:g}, beta_max = {beta:g}": float(np.log10(at["bias", eta, beta])) for eta, beta in asked}
    out["log10 chain minus bias, beta_max = 20"] = float(np.log10(at["chain", 1.0, 20.0] - at["bias", 1.0, 20.0]))
    return out | {"bias on the line, beta_max = 2": float(at["line bias", 1.0, SHORT])}


def draw(rows: pd.DataFrame) -> Figure:
    """Bias over beta_max, over eta, and what it looks like."""
    with page(3, 2.3, ratios=(1, 1, 1.1)) as (figure, (left, middle, right)):
        bias = rows[rows.panel == "bias"]
        for j, eta in enumerate(ETAS):
            mine = bias[bias.eta == eta]
            left.loglog(mine.beta_max, mine.y, **look(j), label=rf"$\eta={eta:g}$")
        chain = rows[rows.panel == "chain"]
        left.loglog(chain.beta_max, chain.y, color=RED, marker="x", ls=":", label=rf"$\eta=1$, chain of {FINITE} steps")
        left.set(xlabel=r"$\beta_{\max}$ (1/time)", ylabel="KL(optimum || tilt) (nats)", title="longer noising, less bias", ylim=(1e-23, 1e1))
        ticks(left, STRENGTHS)
        left.legend(loc="lower left")
        for j, beta in enumerate(STRENGTHS):
            mine = bias[bias.beta_max == beta]
            middle.semilogy(mine.eta, mine.y, **look(j) | {"markevery": 5}, label=rf"$\beta_{{\max}}={beta:g}$")
        middle.set(xlabel=r"stochasticity $\eta$", ylabel="KL(optimum || tilt) (nats)", title="more noise, less bias", ylim=(1e-23, 1e1))
        middle.legend(loc="lower left")
        line = rows[rows.panel == "line"]
        pre = np.exp(ctrl.zoo.mixture_bump_1d().data.log_density(line[["x"]].to_numpy()))
        right.plot(line.x, pre, color=GREY, ls=":", label="pre-trained")
        right.plot(line.x, line.z, **look(0, points=False), label=r"tilt $p\,e^{r/\lambda}/Z$")
        right.plot(line.x, line.y, **look(1, points=False), label="optimum")
        right.set(xlabel="state x", ylabel="density", title=rf"mixture, $\beta_{{\max}}={SHORT:g}$, $\eta=1$", ylim=(0, None))
        right.legend(loc="upper right")
    return figure


def main(out: Path, quick: bool) -> None:
    publish(NAME, __doc__, rows(quick), measured, draw, out)
