r"""Digits: samples of the pre-trained and of ten tuned models, and the reward-KL frontier (analysis/digits_study, analysis/digits_compare).

a: eight images of the same noise from the base model and from the model tuned to each digit, the pixels of the study's committed picture.
b: reward against path KL for four weights lambda, digit 3, first seed, committed rows; line: the tilts, from samples of the pre-trained
model alone, which no model can cross; its slope is lambda. c: regret of eight methods, lambda = .5, three seeds, at 16,000 reward queries.

Expected:
    regret of pathwise                      0.319 +- 0.001
    regret of value-gradient                0.37 +- 0.001
    regret of score-function                1.212 +- 0.001
    runs above the frontier, beyond 3 s.e.  0 +- 0
    mean |slope / lambda - 1|, lambda < 2   0.0008 +- 0.0005
    mean brightness, base                   0.3227 +- 0.001
    rms pixel change, base to digit         0.2798 +- 0.001
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from ctrl.check import Array

from paper_figures.house import look, page, publish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = Path(__file__).stem
ANALYSIS = Path(__file__).parents[1] / "analysis"
SIDE, DRAWN, SHOWN = 8, 12, 8
ROWS = ("base", *"0123456789")
FRONTIER = ("pathwise", "value-gradient", "adjoint-matching", "temporal-difference", "score-function")
PIXELS = [f"p{k}" for k in range(SIDE**2)]


def rows(quick: bool) -> pd.DataFrame:
    """panel "image": 64 pixels in [0, 1]; "ideal": tilts; "run": runs of digits_compare."""
    images = pd.DataFrame([{"panel": "image", "curve": name, "seed": k, **dict(zip(PIXELS, image.ravel(), strict=True))}
                           for name, strip in zip(ROWS, _images(), strict=True) for k, image in enumerate(strip[:SHOWN])])
    compare = ANALYSIS / "digits_compare"
    ideal = pd.read_csv(compare / "ideal.csv")[["kl_weight", "kl", "kl_error", "reward", "reward_error"]]
    runs = pd.read_csv(compare / "runs.csv")[["method", "seed", "kl_weight", "kl_mean", "reward", "objective_error", "regret", "regret_error"]]
    runs = runs.rename(columns={"method": "curve", "kl_mean": "kl", "objective_error": "reward_error"})
    return pd.concat([images, ideal.assign(panel="ideal", curve="ideal"), runs.assign(panel="run")], ignore_index=True)


@cache
def _images() -> Array:
    """(11, 12, 8, 8) in [0, 1]: the centres of the pixels in the study's picture, whose strips are framed and have lines between images."""
    from matplotlib.image import imread

    picture = imread(ANALYSIS / "digits_study" / "samples.png")[..., :3].mean(axis=2)
    grey = np.abs(picture - 128 / 255) < 0.01
    columns = np.flatnonzero(grey.mean(axis=0) > 0.7)  # of the lines at the ends of strips and between images
    left, right = columns[0], columns[-1] + 1
    edges = np.flatnonzero(np.diff(np.concatenate([[0], grey[:, left + 1].astype(int), [0]])))
    tops, bottoms = edges[::2], edges[1::2]
    cells = np.array([k for k in range(1, DRAWN * (SIDE + 1)) if k % (SIDE + 1)])
    x = (left + (cells + 0.5) / (DRAWN * (SIDE + 1) + 1) * (right - left)).astype(int)
    strips = [picture[np.ix_((top + (np.arange(1, SIDE + 1) + 0.5) / (SIDE + 2) * (bottom - top)).astype(int), x)]
              for top, bottom in zip(tops, bottoms, strict=True)]
    return np.stack(strips).reshape(len(ROWS), SIDE, DRAWN, SIDE).swapaxes(1, 2)


def measured(rows: pd.DataFrame) -> dict[str, float]:
    """Regrets, whether anybody crosses the frontier, its slope, and whether the pictures are pictures."""
    ideal, runs = rows[rows.panel == "ideal"].sort_values("kl"), rows[rows.panel == "run"]
    at = runs[runs.kl_weight == 0.5].groupby("curve").regret.mean()
    above = runs.reward - np.interp(runs.kl, ideal.kl, ideal.reward)
    error = np.hypot(runs.reward_error, np.interp(runs.kl, ideal.kl, ideal.reward_error))
    within = ideal[ideal.kl_weight < 2]
    slope = np.diff(within.reward) / np.diff(within.kl)
    weight = np.sqrt(within.kl_weight.to_numpy()[1:] * within.kl_weight.to_numpy()[:-1])
    images = rows[rows.panel == "image"]
    base, tuned = (images[images.curve == name][PIXELS].to_numpy(float) for name in ("base", "3"))
    return {**{f"regret of {name}": float(at[name]) for name in ("pathwise", "value-gradient", "score-function")},
            "runs above the frontier, beyond 3 s.e.": float((above > 3 * error).sum()),
            "mean |slope / lambda - 1|, lambda < 2": float(np.abs(slope / weight - 1).mean()),
            "mean brightness, base": float(base.mean()), "rms pixel change, base to digit": float(np.sqrt(np.mean((tuned - base) ** 2)))}


def draw(rows: pd.DataFrame) -> Figure:
    """Images, frontier, regrets."""
    with page(3, 2.8, ratios=(0.95, 1.15, 0.95)) as (figure, axes):
        left, middle, right = axes
        images = rows[rows.panel == "image"]
        strips = [images[images.curve == name][PIXELS].to_numpy(float).reshape(-1, SIDE, SIDE) for name in ROWS]
        left.imshow(_tiled(strips), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        left.set_yticks([(SIDE + 1) * k + SIDE / 2 for k in range(len(ROWS))], ROWS)
        left.set(xticks=[], title="same noise, tuned to")
        left.grid(False)
        left.tick_params(length=0)
        left.spines[:].set_visible(False)
        ideal, runs = rows[rows.panel == "ideal"].sort_values("kl"), rows[rows.panel == "run"]
        middle.plot(ideal.kl, ideal.reward, color="black", lw=1, label="ideal (tilts)")
        low, high = (ideal.reward + z * ideal.reward_error for z in (-2, 2))
        middle.fill_between(ideal.kl, low, high, color="black", alpha=0.2, lw=0)
        for j, name in enumerate(FRONTIER):
            mine = runs[(runs.curve == name) & (runs.seed == 0)].sort_values("kl_weight")
            middle.plot(mine.kl, mine.reward, **look(j), label=name)
        middle.set(xlabel="path KL (nats per image)", ylabel="E r (log-probability)", title=r"frontier, $\lambda=2,1,.5,.25$",
                   xlim=(0, 5.6), ylim=(-4.2, 0.1))
        middle.legend(loc="lower right")
        at = runs[runs.kl_weight == 0.5]
        order = at.groupby("curve").regret.mean().sort_values(ascending=False).index
        for k, name in enumerate(order):
            mine = at[at.curve == name]
            right.errorbar(mine.regret, k + 0.15 * (mine.seed - 1), xerr=2 * mine.regret_error, fmt="o", color=look(0)["color"], ms=2.4,
                           elinewidth=0.8)
        right.set_yticks(range(len(order)), order)
        right.set(xlabel=r"regret $J^*-J$", title=r"$\lambda=.5$, three seeds", xlim=(0, None))
    return figure


def _tiled(strips: list[Array]) -> Array:
    """Images in a row for every strip, lines of white between."""
    out = np.ones((len(strips) * (SIDE + 1) - 1, len(strips[0]) * (SIDE + 1) - 1))
    for i, strip in enumerate(strips):
        for j, image in enumerate(strip):
            out[i * (SIDE + 1) : i * (SIDE + 1) + SIDE, j * (SIDE + 1) : j * (SIDE + 1) + SIDE] = image
    return out


def main(out: Path, quick: bool) -> None:
    publish(NAME, __doc__, rows(quick), measured, draw, out)
