"""All ten digits, three seeds: does fine-tuning by the value gradient reach what the yardstick allows?

    python -m analysis.digits_study [--out DIR] [--digits 0 3] [--seeds 0] [--workers 4] [--quick]      (about two minutes a run on one core)

For every digit and seed, from networks pre-trained with that seed: judged share, reward, KL and regret of the tuned model at the N that
it was trained with; the same model at other N and by the ODE; queries until the judged share exceeds .8; pair distance within the class.
Also training at N = 100 for three digits. Every finished run is one JSON file; a second call goes on where the first one stopped.
One run after the other with all of torch's threads, or many at a time with one each: on spawned processes or a dask cluster. torch's sums
round with its number of threads, so rows on a pool are bit for bit (seconds apart) those of one worker with --start.threads 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import pandas as pd
import torch
import tyro
from matplotlib import pyplot as plt

from ctrl.files import environment, writable, write_json
from ctrl.torch.chain import simulate
from ctrl.torch.finetune import Finetune, finetune, load_policy
from ctrl.torch.pictures import BLACK, BLUE, GREEN, ORANGE, tile
from ctrl.torch.pretrain import sampling_grid
from ctrl.torch.task import PICTURES, ClassReward, evaluate, pair_distance, prepare

from analysis.sweep import Pool, sweep

TRANSFER = (20, 50, 100)
FINE = (0, 3, 8)  # digits that are also trained at N = 100
BARS = {"judged_share": 0.90, "kl_mean": 3.7, "regret": 0.8}
FINE_REGRET = 0.4
Run = tuple[int, int, int]


@dataclass(frozen=True)
class Study:
    """All ten digits, three seeds."""

    out: Path = Path("analysis/digits_study")
    """Where runs, rows and figures go."""
    digits: tuple[int, ...] = tuple(range(10))
    """Digits."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each has its own pre-trained model, classifiers and noise."""
    fine_steps: int = 100
    """Sampler steps of the fine runs (digits 0, 3 and 8, first seed); 0 for none."""
    start: Finetune = field(default_factory=Finetune)
    """Settings of every run."""
    pool: Annotated[Pool, tyro.conf.arg(name="")] = field(default_factory=Pool)
    """Where the runs are computed."""
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Tiny runs that only show that everything works."""

    def __post_init__(self) -> None:
        if self.pool.backend == "threading" and self.pool.workers > 1:
            raise ValueError("backend: expected loky or dask (torch has one random generator for all threads of a process), got threading")

    def runs(self) -> dict[str, Run]:
        """(digit, seed, steps) by the name of its files, the first seed first."""
        plain = [(digit, seed, self.start.steps) for seed in self.seeds for digit in self.digits]
        fine = [(digit, self.seeds[0], self.fine_steps) for digit in self.digits if digit in FINE and self.fine_steps]
        return {_name(*run): run for run in plain[: len(self.digits)] + fine + plain[len(self.digits) :]}

    def settings(self, digit: int, seed: int, steps: int) -> Finetune:
        folder = self.out / "runs" / _name(digit, seed, steps)
        chosen = replace(self.start, reward=ClassReward(digit), seed=seed, steps=steps, out=folder, resume=True, no_plan=True)
        return chosen.made_quick() if self.quick else chosen


def _name(digit: int, seed: int, steps: int) -> str:
    return f"digit{digit}-seed{seed}-N{steps}"


def compute(study: Study, run: Run) -> dict[str, Any]:
    """One run's row."""
    digit, seed, _ = run
    settings = study.settings(*run)
    summary = finetune(settings)
    assert summary is not None
    task, policy = prepare(settings), load_policy(settings.out / "model")
    best, tuned = summary["yardstick"], summary["tuned"]
    row = {"digit": digit, "seed": seed, "steps": settings.steps, **tuned, "optimum_share": best["judged_share"], "optimum_kl": best["kl"],
           "optimum_reward": best["reward"], "ess": best["ess"], "base_share": summary["pretrained"]["judged_share"],
           "queries_to_0.8": summary["queries_to_share_0.8"], "queries": summary["queries"], "seconds": summary["seconds"],
           "pair_distance_ratio": tuned["pair_distance"] / pair_distance(task.reference[task.judged(task.reference)])}
    for n in TRANSFER:
        other = evaluate(task, policy, task.base, settings, steps=n)
        ode = evaluate(task, policy, task.base, settings, steps=n, eta=0.0)
        row |= {f"share_{n}": other["judged_share"], f"kl_{n}": other["kl_mean"], f"regret_{n}": other["regret"]}
        row[f"ode_share_{n}"] = ode["judged_share"]
    return row


def table(rows: pd.DataFrame) -> str:
    """Every bar of the study, met or missed, over all runs at the plain N."""
    plain, fine = rows[rows.steps == rows.steps.min()], rows[rows.steps > rows.steps.min()]
    n = plain.steps.min()
    shares = plain[["judged_share", *(f"share_{n}" for n in TRANSFER)]]
    kls = plain[["kl_mean", *(f"kl_{n}" for n in TRANSFER)]]
    found = {
        "judged share, least run, least digit's mean": f"{plain.judged_share.min():.3f}   {plain.groupby('digit').judged_share.mean().min():.3f}",
        "share of runs whose judged share is >= .95": f"{(plain.judged_share.round(6) >= 0.95).mean():.0%}",
        "optimum's judged share, least and mean": f"{plain.optimum_share.min():.3f}   {plain.optimum_share.mean():.3f}",
        f"KL, mean and largest (nats; optimum {plain.optimum_kl.mean():.2f})": f"{plain.kl_mean.mean():.2f}   {plain.kl_mean.max():.2f}",
        "regret, mean and largest (reward units)": f"{plain.regret.mean():.3f}   {plain.regret.max():.3f}",
        "queries to a judged share of .8, largest": f"{plain['queries_to_0.8'].max():.0f}",
        "pair distance within the class over the base model's, least": f"{plain.pair_distance_ratio.min():.3f}",
        "largest change of the share from N = 20 to 100": f"{(shares.max(axis=1) - shares.min(axis=1)).max():.3f}",
        f"largest change of KL from N = {n}, to N = 20 ... 100": f"{(kls.div(kls.kl_mean, axis=0) - 1).abs().max().max():.1%}",
        f"trained at N = {n}, sampled at N = 100: regret, mean and largest": f"{plain.regret_100.mean():.3f}   {plain.regret_100.max():.3f}",
        "ODE share, least": f"{plain[[f'ode_share_{n}' for n in TRANSFER]].min().min():.3f}"}
    if len(fine):
        found[f"trained at N = {fine.steps.max()}: regret, mean and largest"] = f"{fine.regret.mean():.3f}   {fine.regret.max():.3f}"
    return "\n".join(f"{what:<64}{numbers}" for what, numbers in found.items())


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Share, KL and regret of every run over the digits, beside the optimum and the bars."""
    plain, fine = rows[rows.steps == rows.steps.min()], rows[rows.steps > rows.steps.min()]
    panels = (("judged_share", "judged share", "optimum_share"), ("kl_mean", "path KL (nats per image)", "optimum_kl"),
              ("regret", "regret J* - J (reward units)", None))
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.5), layout="constrained")
    place = plain.digit + 0.15 * (plain.seed - plain.seed.mean())
    for axis, (name, label, optimum) in zip(axes, panels, strict=True):
        axis.plot(place, plain[name], "o", ms=4, color=BLUE, label=f"tuned and sampled at N = {plain.steps.min()}, one seed")
        if len(fine):
            axis.plot(fine.digit, fine[name], "D", ms=5, mfc="none", color=GREEN, label=f"tuned and sampled at N = {fine.steps.max()}")
        if optimum:
            axis.plot(place, plain[optimum], "_", ms=9, color=BLACK, label="optimum (yardstick)")
        else:
            axis.errorbar(place, plain.regret, 2 * plain.regret_error, fmt="none", color=BLUE, lw=0.8)
        axis.axhline(BARS[name], color=ORANGE, ls="--", lw=1, label="bar")
        axis.set(xlabel="digit (class of the reward)", ylabel=label, xticks=range(10))
        axis.set_ylim(**({"bottom": 0} if name != "judged_share" else {"top": 1.0}))
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def samples(study: Study, path: Path) -> None:
    """Twelve images of the same noise from the base model and from every tuned model of the first seed."""
    pictures, names = [], []
    for digit in study.digits:
        settings = study.settings(digit, study.seeds[0], study.start.steps)
        task, noise = prepare(settings), settings.noise(PICTURES, 12)
        grid = sampling_grid(task.problem.schedule, settings.steps)
        for name, policy in ([("base", task.base)] if not pictures else []) + [(str(digit), load_policy(settings.out / "model"))]:
            pictures.append(tile(simulate(task.problem, policy, grid, noise).terminal, 12))
            names.append(name)
    figure, axes = plt.subplots(len(pictures), 1, figsize=(6, 0.52 * len(pictures)), layout="constrained")
    for axis, name, picture in zip(axes, names, pictures, strict=True):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(study: Study) -> pd.DataFrame:
    """Compute what is missing, then write rows.csv, the table and the figures."""
    writable(study.out / "runs")
    rows = []
    for row in sweep(partial(compute, study), study.runs(), study.pool, study.out / "runs"):
        rows.append(row)
        print(f"digit {row['digit']} seed {row['seed']} N {row['steps']}: share {row['judged_share']:.3f}, KL {row['kl_mean']:.2f}, "
              f"regret {row['regret']:.3f}, > .8 after {row['queries_to_0.8']} queries, {row['seconds']:.0f} s", flush=True)
        frame = pd.DataFrame(rows).sort_values(["steps", "digit", "seed"])
        frame.to_csv(study.out / "rows.csv", index=False, float_format="%.6g")
    write_json(study.out / "env.json", {**environment("torch"), "threads": torch.get_num_threads(), "settings": study.start.identity()})
    (study.out / "table.txt").write_text(table(frame) + "\n")
    print(table(frame))
    draw(frame, study.out / "study.png")
    samples(study, study.out / "samples.png")
    return frame


if __name__ == "__main__":
    main(tyro.cli(Study))
