r"""What failures of fine-tuning look like: seven of them on real digits, each beside its healthy run, in the numbers that a run prints.

    python -m analysis.recipe_failures [--out DIR] [--seeds 0 1 2] [--workers 2] [--quick]      (about ten minutes on one core)

Digit 3, N = 30, 64 paths an update, lambda = .5 (`ctrl finetune`'s settings), one pre-trained model; seeds differ in the noise of the updates:

    no price       pathwise gradients with lambda = 0                                           large steps    PPO, ten times the step size
    stale batch    PPO, ten epochs on each batch without a clip                                 tight clip     PPO, clip 1e-4
    mean KL        PPO whose KL is a mean over pixels and steps: KL / (d N), outside the return; no baseline    score function of the bare return
    five steps     pathwise gradients at N = 5

Every finished run is one JSON file; a second call does what is missing. Regret is at lambda = .5 for all of them, on fresh noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ctrl.files import environment, writable, write_json
from ctrl.torch import methods, objectives
from ctrl.torch.chain import Run, simulate
from ctrl.torch.finetune import Alone, Finetune, Training
from ctrl.torch.pictures import BLUE, tile
from ctrl.torch.task import PICTURES, Task, evaluate, prepare

from analysis.sweep import Pool, sweep

VERMILION = "#D55E00"
BLOCK = 4  # updates in a row of the curves
IMAGES = 12


# ------------------------------------------------------------------------------------------- what is run


class MeanKL(objectives.ClippedRatio):
    """Planted: the KL as some public trainers have it, a mean over coordinates and steps, and not in the return."""

    def returns(self, run: Run) -> Tensor:
        return run.final[:, None].expand(-1, run.grid.steps)

    def loss(self, run: Run) -> Tensor:
        return super().loss(run) - run.cost.sum(1) + run.cost.mean(1) / run.problem.dim


@dataclass(frozen=True)
class PPOWithMeanKL(methods.PPO):
    """PPO whose price of a nat is lambda / (d N)."""

    def objective(self, value: Any) -> objectives.Objective:
        return MeanKL(clip=self.clip)


@dataclass(frozen=True)
class WithoutBaseline(methods.ScoreFunction):
    """REINFORCE with the bare return."""

    def objective(self, value: Any) -> objectives.Objective:
        return objectives.ScoreFunction(None)


@dataclass(frozen=True)
class Setup:
    """A run: a method, and where it departs from the settings of all."""

    method: methods.Method
    kl_weight: float | None = None
    steps: int | None = None


SETUPS = {
    "pathwise": Setup(methods.Pathwise()),
    "no price": Setup(methods.Pathwise(), kl_weight=0.0),
    "five steps": Setup(methods.Pathwise(), steps=5),
    "PPO": Setup(methods.PPO()),
    "large steps": Setup(methods.PPO(learning_rate=1e-2)),
    "stale batch": Setup(methods.PPO(epochs=10, clip=1e9)),
    "tight clip": Setup(methods.PPO(clip=1e-4)),
    "mean KL": Setup(PPOWithMeanKL()),
    "score function": Setup(methods.ScoreFunction()),
    "no baseline": Setup(WithoutBaseline())}
HEALTHY = ("pathwise", "PPO", "score function")


@dataclass(frozen=True)
class Panel:
    """A failure beside its healthy run: the number that tells it, and perhaps a second one, dashed."""

    title: str
    healthy: str
    failing: str
    number: str
    label: str
    second: str | None = None
    log: bool = False


PANELS = (
    Panel("no price of the KL", "pathwise", "no price", "kl_mean", "kl_mean (nats per image)", log=True),
    Panel("ten times the step size", "PPO", "large steps", "objective", "objective (dashed: reward)", "reward"),
    Panel("ten epochs on a batch, no clip", "PPO", "stale batch", "log_ratio_max", "log_ratio_max", log=True),
    Panel("clip 1e-4 in 64 dimensions", "PPO", "tight clip", "clipped_share", "clipped_share"),
    Panel("KL as a mean over pixels and steps", "PPO", "mean KL", "kl_mean", "kl_mean (dashed: as it reads)", "kl_read", log=True),
    Panel("no baseline", "score function", "no baseline", "snr", "signal / noise since the start"),
    Panel("trained at five steps", "pathwise", "five steps", "ode_reward", "ode_reward (dashed: reward)", "reward"))
KEPT = ("reward", "objective", "kl_mean", "kl_max", "judged_share", "gradient_norm", "gradient_signal", "gradient_noise", "log_ratio_mean",
        "log_ratio_max", "clipped_share", "ode_reward", "kl_read")


@dataclass(frozen=True)
class Study:
    """All failures, three seeds."""

    out: Path = Path("analysis/recipe_failures")
    """Where runs, rows and figures go."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the updates' noise."""
    start: Finetune = field(default_factory=lambda: Finetune(iterations=80, samples=1000, threads=1))
    """Settings of every run."""
    pool: Annotated[Pool, tyro.conf.arg(name="")] = field(default_factory=Pool)
    """Where the runs are computed."""
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Short runs from a poor model, where failures can be told all the same."""

    def __post_init__(self) -> None:
        if self.pool.backend == "threading" and self.pool.workers > 1:
            raise ValueError("backend: expected loky or dask (torch has one random generator for all threads of a process), got threading")

    @property
    def settings(self) -> Finetune:
        if not self.quick:
            return self.start
        small = self.start.made_quick()
        return replace(small, iterations=16, paths=32, samples=128, pretraining=replace(small.pretraining, iterations=400))

    def runs(self) -> dict[str, tuple[str, int]]:
        """(setup, seed) by the name of its file."""
        return {f"{name.replace(' ', '-')}-seed{seed}": (name, seed) for seed in self.seeds for name in SETUPS}


# ------------------------------------------------------------------------------------------- runs


@cache
def prepared(settings: Finetune) -> Task:
    """Once in each process."""
    torch.set_num_threads(settings.threads or 1)
    return prepare(settings)


def updates(training: Training) -> Iterator[dict[str, float]]:
    """Metrics of every update, with the deterministic sampler's reward once in a block."""
    for k in range(training.settings.iterations):
        watched = training.deterministic() if k % BLOCK == 0 else {}
        yield {**training.update(), **watched}


def compute(study: Study, run: tuple[str, int]) -> dict[str, Any]:
    """One run: its curve in means over blocks, its kept model on fresh noise, and images of it."""
    (name, seed), start = run, study.settings
    setup, task = SETUPS[name], prepared(start)
    settings = replace(start, method=setup.method, seed=seed, steps=setup.steps or start.steps)  # type: ignore[arg-type]
    priced = task.problem if setup.kl_weight is None else replace(task.problem, kl_weight=setup.kl_weight)
    training = Training(replace(task, problem=priced), settings, Alone(torch.device("cpu")))
    rows = pd.DataFrame(list(updates(training)))
    if isinstance(setup.method, PPOWithMeanKL):
        rows["kl_read"] = rows["kl_mean"] / (task.problem.dim * settings.steps)
    blocks = rows.groupby(rows.index // BLOCK)
    curve = blocks[["iteration", "queries"]].max().join(blocks[[column for column in KEPT if column in rows]].mean())
    final = evaluate(task, training.average, task.base, settings)
    final["ode_reward"] = evaluate(task, training.average, task.base, settings, eta=0.0)["reward"]
    images = simulate(task.problem, training.average, training.grid, start.noise(PICTURES, IMAGES)).terminal
    return {"setup": name, "seed": seed, "curve": curve.to_dict("records"), "final": final, "images": images.flatten(1).mul(1000).round().tolist()}


def frames(found: list[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    """curves, finals and, of the first seed, samples (pixels in [-1, 1])."""
    curves = pd.DataFrame([{"setup": row["setup"], "seed": row["seed"], **block} for row in found for block in row["curve"]])
    sums = curves.groupby(["setup", "seed"], sort=False)[["gradient_signal", "gradient_noise"]].cumsum()
    curves["snr"] = sums["gradient_signal"] / sums["gradient_noise"]
    finals = [{"setup": row["setup"], "seed": row["seed"], **row["final"]} for row in found]
    first = found[0]["seed"]
    pixels = {(row["setup"], k): np.array(image) / 1000 for row in found if row["seed"] == first for k, image in enumerate(row["images"])}
    samples = pd.DataFrame(pixels).T.rename_axis(["setup", "image"]).reset_index()
    return {"curves": curves, "finals": pd.DataFrame(finals), "samples": samples}


def table(finals: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Means over seeds: the kept model on fresh noise, and the curves' extremes."""
    snr = curves.groupby(["setup", "seed"], sort=False)["snr"].last().groupby("setup").mean()
    columns = {"reward": ".3f", "ode_reward": ".3f", "judged_share": ".3f", "kl_mean": ".2f", "kl_max": ".1f", "regret": ".2f",
               "pair_distance": ".2f"}
    lines = [f"{'':<16}" + "".join(f"{head:>15}" for head in (*columns, "log_ratio_max", "clipped_share", "snr"))]
    highest = curves.groupby(["setup", "seed"], sort=False)[["log_ratio_max", "clipped_share"]].max().groupby("setup").mean()
    for name, row in finals.groupby("setup", sort=False).mean(numeric_only=True).iterrows():
        cells = [format(row[column], shape) for column, shape in columns.items()]
        cells += ["-" if np.isnan(x) else f"{x:.2f}" for x in highest.loc[name]] + [f"{snr[name]:.4f}"]
        lines.append(f"{name:<16}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- the figure


def draw(found: dict[str, pd.DataFrame], path: Path) -> None:
    """A panel a failure, with samples of the same noise from both models below it; and what reward alone would say."""
    columns = 4
    figure = Figure(figsize=(3.3 * columns, 7.6), layout="constrained")
    grid = figure.add_gridspec(4, columns, height_ratios=(3, 1, 3, 1))
    for k, panel in enumerate(PANELS):
        top, left = 2 * (k // columns), k % columns
        curve(figure.add_subplot(grid[top, left]), found["curves"], panel)
        strip(figure.add_subplot(grid[top + 1, left]), found["samples"], panel)
    reward_alone(figure.add_subplot(grid[2:, columns - 1]), found["finals"])
    lines = [Line2D([], [], color=colour, lw=1.8, label=label)
             for colour, label in ((BLUE, "healthy (upper images)"), (VERMILION, "failing (lower images)"))]
    figure.legend(handles=lines, loc="outside upper center", ncols=2, frameon=False, fontsize=10)
    figure.savefig(path, dpi=130)


def curve(axis: Axes, curves: pd.DataFrame, panel: Panel) -> None:
    """Mean over seeds, and the band from the least to the greatest."""
    for name, colour in ((panel.healthy, BLUE), (panel.failing, VERMILION)):
        for number, line in ((panel.number, "-"), (panel.second, "--")):
            rows = curves[curves["setup"] == name]
            if number is None or number not in rows or rows[number].isna().all():
                continue
            runs = rows.pivot(index="queries", columns="seed", values=number)
            axis.plot(runs.index, runs.mean(axis=1), line, color=colour, lw=1.6)
            axis.fill_between(runs.index, runs.min(axis=1), runs.max(axis=1), color=colour, alpha=0.2, lw=0)
    if panel.log:
        axis.set_yscale("log")
    axis.set_title(panel.title, fontsize=10)
    axis.set_ylabel(panel.label, fontsize=8)
    axis.set_xlabel("reward queries", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, lw=0.6)


def strip(axis: Axes, samples: pd.DataFrame, panel: Panel) -> None:
    """Healthy above, failing below, of the same noise."""
    images = np.concatenate([samples[samples["setup"] == name].drop(columns=["setup", "image"]) for name in (panel.healthy, panel.failing)])
    side = round(images.shape[1] ** 0.5)
    axis.imshow(tile(torch.from_numpy(images.reshape(-1, 1, side, side)), len(images) // 2), cmap="gray", vmin=0, vmax=1)
    axis.set_axis_off()


def reward_alone(axis: Axes, finals: pd.DataFrame) -> None:
    """Regret over reward: every run a point."""
    for name, rows in finals.groupby("setup", sort=False):
        colour, mean = BLUE if name in HEALTHY else VERMILION, rows[["reward", "regret"]].mean()
        axis.plot(rows["reward"], rows["regret"], "o" if name in HEALTHY else "s", color=colour, ms=4)
        left = -5 < mean["reward"] < -1  # where there is room
        axis.annotate(str(name), (rows["reward"].min() if left else rows["reward"].max(), mean["regret"]), (-3 if left else 5, -7 if left else 0),
                      textcoords="offset points", ha="right" if left else "left", va="center", fontsize=7, color=colour)
    axis.set_xlim(right=2.6)
    axis.set_xticks([-6, -4, -2, 0])
    axis.set_yscale("log")
    axis.set_title("reward alone would not tell", fontsize=10)
    axis.set_xlabel("reward of the kept model", fontsize=8)
    axis.set_ylabel("regret J* - J (reward units)", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, lw=0.6)


def main(study: Study) -> dict[str, pd.DataFrame]:
    """Compute what is missing, then write the rows, the table and the figure."""
    matplotlib.use("Agg")
    writable(study.out / "runs")
    prepared(study.settings)  # before processes of a pool would all begin with it
    found = frames(list(sweep(partial(compute, study), study.runs(), study.pool, study.out / "runs")))
    for name, frame in found.items():
        frame.to_csv(study.out / f"{name}.csv", index=False, float_format="%.5g")
    write_json(study.out / "env.json", {**environment("torch"), "threads": torch.get_num_threads(), "settings": study.settings.identity()})
    text = table(found["finals"], found["curves"])
    (study.out / "table.txt").write_text(text + "\n")
    print(text)
    draw(found, study.out / "failures.png")
    return found


if __name__ == "__main__":
    main(tyro.cli(Study))
