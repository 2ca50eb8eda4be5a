r"""The eta-family shares its marginals: one exact score carries the noised laws back at every stochasticity (theory.md, section 2).

a: densities of X_t on the line (mixture, start p_T), exact chain by quadrature, on the noised data law. b: |p_N - p_data|/2 integrated, over
D: order 1 at every eta; with the gain g^2 for h it does not fall. c: with the prior start the terminal mean keeps a bias, in continuous
time, which scales like alpha(T)^(1 + eta^2) (Gaussian data; exact).

Expected:
    order in D, eta = 0               1 +- 0.05
    order in D, eta = 0.5             1 +- 0.05
    order in D, eta = 1               1 +- 0.05
    order in D, eta = 1.5             1 +- 0.05
    distance, gain g^2, finest        0.325 +- 0.005
    largest density gap, N = 100      0.014 +- 0.008
    exponent of alpha(T), eta = 0     1 +- 0.02
    exponent of alpha(T), eta = 0.5   1.25 +- 0.02
    exponent of alpha(T), eta = 1     2 +- 0.02
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import ctrl
import numpy as np
import pandas as pd
from ctrl import exact
from ctrl.check import Array
from ctrl.evidence import fitted_order
from ctrl.policy import CallablePolicy, Policy
from ctrl.theorems.reversal import longer_noising, measured_bias
from ctrl.theorems.style import GREY

from paper_figures.house import look, page, publish, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = Path(__file__).stem
ETAS = (0.0, 0.5, 1.0, 1.5)
SHOWN = (0.6, 0.85, 1.0)  # of the horizon
STEPS = 100


def rows(quick: bool) -> pd.DataFrame:
    """panel, eta, x, y, exact: densities at (t, x); distances over D; biases over alpha(T)."""
    return pd.DataFrame([*_densities(quick), *_distances(quick), *_biases()], columns=["panel", "eta", "t", "x", "y", "exact"])


def _mixture(eta: float) -> ctrl.Problem:
    return replace(ctrl.zoo.mixture_bump_1d(eta), start="exact")


def _densities(quick: bool) -> list[tuple[str, float, float, float, float, float]]:
    out, x = [], np.linspace(-2.6, 2.6, 53)
    for eta in (1.0,) if quick else ETAS:
        problem = _mixture(eta)
        times = problem.grid(STEPS).times
        for share in SHOWN:
            grid = ctrl.TimeGrid(times[: round(share * STEPS) + 1])
            y = np.interp(x, *_law(problem, problem.pretrained(grid), grid))
            p = np.exp(problem.marginal(float(grid.times[-1])).log_density(x[:, None]))
            out += [("density", eta, share, *row) for row in zip(x, y, p, strict=True)]
    return out


def _law(problem: ctrl.Problem, policy: Policy, grid: ctrl.TimeGrid) -> tuple[Array, Array]:
    """Points (n,) and density (n,) of X_N: on a lattice, and of transported points at eta = 0."""
    end = exact.quadrature.evaluate(problem, policy, grid).terminal
    assert end.points is not None and end.density is not None
    return end.points.ravel(), end.density


def _distances(quick: bool) -> list[tuple[str, float, float, float, float, float]]:
    """Total variation between the law of X_N and the data's, exact; at eta = .5 also with the gain g^2."""
    out = []
    for steps in (25, 50, 100) if quick else (25, 50, 100, 200, 400):
        for eta in ETAS:
            problem = _mixture(eta)
            pre = problem.pretrained(grid := problem.grid(steps))
            out.append(("distance", eta, 1.0, problem.horizon / steps, _distance(problem, pre, grid), np.nan))
            if eta == 0.5:
                wrong = CallablePolicy(partial(_scaled_score, problem), np.array([2 / (1 + eta**2)]), dim=1)
                out.append(("gain g^2", eta, 1.0, problem.horizon / steps, _distance(problem, wrong, grid), np.nan))
    return out


def _scaled_score(problem: ctrl.Problem, t: float, x: Array, theta: Array) -> Array:
    return theta[0] * problem.score(t, x)


def _distance(problem: ctrl.Problem, policy: Policy, grid: ctrl.TimeGrid) -> float:
    x, density = _law(problem, policy, grid)
    return float(0.5 * np.trapezoid(np.abs(density - np.exp(problem.data.log_density(x[:, None]))), x))


def _biases() -> list[tuple[str, float, float, float, float, float]]:
    out = []
    for eta in (0.0, 0.5, 1.0):
        problem = ctrl.zoo.gaussian_pull_2d(eta)
        for schedule in longer_noising(problem.schedule):
            bias = float(np.linalg.norm(measured_bias(replace(problem, schedule=schedule))))
            out.append(("bias", eta, 1.0, schedule.alpha(schedule.tau(0.0)), bias, np.nan))
    return out


def measured(rows: pd.DataFrame) -> dict[str, float]:
    """Fitted orders, the planted distance, and the largest gap of a density."""
    out = {}
    for panel, etas, what in (("distance", ETAS, "order in D"), ("bias", (0.0, 0.5, 1.0), "exponent of alpha(T)")):
        for eta in etas:
            mine = rows[(rows.panel == panel) & (rows.eta == eta)]
            out[f"{what}, eta = {eta:g}"] = fitted_order(mine.x.to_numpy(), mine.y.to_numpy()).slope
    density = rows[(rows.panel == "density") & (rows.eta == 1)]
    out["largest density gap, N = 100"] = float((density.y - density.exact).abs().max())
    return out | {"distance, gain g^2, finest": float(rows[rows.panel == "gain g^2"].y.iloc[-1])}


def draw(rows: pd.DataFrame) -> Figure:
    """Densities, distances and biases."""
    with page(3, 2.15, ratios=(1.25, 1, 1)) as (figure, (left, middle, right)):
        density = rows[rows.panel == "density"]
        for k, t in enumerate(SHOWN):
            here, up = density[density.t == t], 0.75 * k
            law = here[here.eta == here.eta.min()]
            left.plot(law.x, law.exact + up, color="black", lw=0.8, label="noised data law" if k == 0 else None)
            for j, eta in enumerate(sorted(set(here.eta))):
                mine = here[here.eta == eta].iloc[2 * j :: 8]
                left.plot(mine.x, mine.y + up, **look(j) | {"linestyle": "none"}, label=rf"$\eta={eta:g}$" if k == 0 else None)
        left.set(xlabel="state x", title=f"densities, N = {STEPS}", ylim=(-0.05, 3.0))
        left.set_yticks([0.75 * k for k in range(len(SHOWN))], [f"t = {t:g} T" for t in SHOWN])
        left.legend(ncols=2, loc="upper left")
        for j, eta in enumerate(ETAS):
            mine = rows[(rows.panel == "distance") & (rows.eta == eta)]
            middle.loglog(mine.x, mine.y, **look(j), label=rf"$\eta={eta:g}$")
        wrong = rows[rows.panel == "gain g^2"]
        middle.loglog(wrong.x, wrong.y, color=GREY, marker="x", ls=":", label=r"gain $g^2$")
        middle.set(xlabel="step D (1/N)", ylabel="total variation at T", title="order 1 in D", ylim=(None, 9))
        ticks(middle, wrong.x, [f"1/{1 / x:.0f}" for x in wrong.x])
        middle.legend(loc="upper left", ncols=2)
        bias = rows[rows.panel == "bias"]
        for j, eta in enumerate((0.0, 0.5, 1.0)):
            mine = bias[bias.eta == eta]
            power = rf"$\eta={eta:g}$: $\alpha^{{{1 + eta**2:g}}}$"
            right.loglog(mine.x, mine.y, **look(j), label=power)
        right.set(xlabel=r"signal left at the start, $\alpha(T)$", ylabel="bias of the mean at T", title="prior start", ylim=(None, 6))
        ticks(right, sorted(set(bias.x)), [f"{x:.2g}" for x in sorted(set(bias.x))])
        right.legend(loc="upper left")
    return figure


def main(out: Path, quick: bool) -> None:
    publish(NAME, __doc__, rows(quick), measured, draw, out)
