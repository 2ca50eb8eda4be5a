r"""The methods in use, from one pre-trained model, with the same reward queries and the same noise, judged by regret.

    regret = J* - J,      SNR(n) = |E g|^2 / (tr Cov(g) / n)

Every trained model and every measurement is one file, written when it is finished; tables and figures are made from these files alone.
Terminal reward queries are what is made equal; what a method asks of the reward or of the networks besides is counted as it happens.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import matplotlib.ticker
import numpy as np
import pandas as pd
import torch
import tyro
from accelerate import Accelerator
from joblib import Parallel, delayed
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from safetensors.torch import load_file
from torch import Tensor

from ctrl import check
from ctrl.check import Array
from ctrl.files import environment, writable, write_json
from ctrl.noise import Noise
from ctrl.torch.chain import Reward, Run, sample
from ctrl.torch.finetune import Finetune, Training, queries_to_share
from ctrl.torch.methods import ALL, AdjointMatching, Choice, Method, Pathwise, ScoreFunction, TemporalDifference, ValueGradient
from ctrl.torch.objectives import Objective
from ctrl.torch.policy import WithoutAdapter
from ctrl.torch.task import Settings, Task, evaluate, prepare, progress, save_atomically
from ctrl.torch.yardstick import ideal_frontier

GRADIENTS = 2**31 + 2**16  # noise streams of the signal-to-noise batches: this one and those after it
ON_FRONTIER = (ValueGradient, Pathwise, AdjointMatching, TemporalDifference, ScoreFunction)
ETAS = (1.0, 0.5, 0.0)
SHARE = 0.8
TRUSTED_ESS = 50  # of the ideal frontier's weights


def name_of(method: Method) -> str:
    """value-gradient for ValueGradient(): the name on the command line and in tables."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(method).__name__).lower()


NAMES = tuple(name_of(method) for method in ALL)


# ------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Compare(Settings):
    """Compare the methods in use: the same pre-trained model, reward queries and noise; rows, a table and a figure, sorted by regret."""

    method: tyro.conf.Suppress[tyro.conf.Fixed[Choice]] = ValueGradient()
    reward_workers: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 0
    out: Path = Path("compare")
    """Folder of the comparison."""
    only: tuple[str, ...] = ()
    """Methods (default: all)."""
    parts: tuple[Literal["learning", "frontier", "transfer", "snr"], ...] = ("learning", "frontier", "transfer", "snr")
    """Learning curves, reward against KL, other samplers, signal-to-noise of gradients."""
    seeds: int = 3
    """Runs of each method, which differ in the noise of their updates."""
    kl_weights: tuple[float, ...] = (2.0, 1.0, 0.5, 0.25)
    """Of the frontier; runs of the first seed."""
    transfer_steps: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Sampler steps at which one fine-tuned model is sampled."""
    snapshot: int = 50
    """Updates of the value gradient before gradients are compared."""
    snr_sizes: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    """Paths in a batch whose gradient is taken."""
    snr_batches: int = 16
    """Batches of each size."""
    jobs: int = 1
    """Runs side by side."""
    threads: int | None = 1
    """CPU threads of torch in each run."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep what is finished in the folder, and do the rest."""

    elsewhere: ClassVar[tuple[str, ...]] = (*Settings.elsewhere, "method", "out", "only", "parts", "seeds", "kl_weights", "jobs", "resume")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("seeds", 1), ("snapshot", 1), ("snr_batches", 3), ("jobs", 1)):
            check.integer(name, getattr(self, name), at_least=least)
        for name, least in (("transfer_steps", 1), ("snr_sizes", 2)):
            for number in getattr(self, name):
                check.integer(name, number, at_least=least)
        for number in (self.kl_weight, *self.kl_weights):
            check.number("kl_weight", number, above=0)  # regret and frontier need an optimum
        if unknown := sorted(set(self.only) - set(NAMES)):
            raise ValueError(f"only: expected some of {', '.join(NAMES)}, got {', '.join(unknown)}")

    def made_quick(self) -> Self:
        return replace(super().made_quick(), seeds=min(self.seeds, 2), kl_weights=(1.0, 0.5), transfer_steps=(5, 10), snapshot=2,
                       snr_sizes=(4, 8, 16), snr_batches=4)

    def identity(self) -> dict[str, Any]:
        """Also the methods with their step sizes; which of the pieces are asked for is not part of it."""
        kept = {name: value for name, value in super().identity().items() if name not in self.elsewhere}
        return json.loads(json.dumps({**kept, "methods": {name_of(method): asdict(method) for method in ALL}}))

    @property
    def methods(self) -> list[Method]:
        return [method for method in ALL if not self.only or name_of(method) in self.only]

    def single(self, method: Method, seed: int, kl_weight: float) -> Finetune:
        """The settings of one run."""
        shared = {field.name: getattr(self, field.name) for field in fields(Settings)}
        return Finetune(**{**shared, "method": method, "seed": seed, "kl_weight": kl_weight})

    def run(self) -> int:
        """The command `ctrl compare`."""
        settings = self.made_quick() if self.quick else self
        print(table(compare(settings)["runs"], settings.kl_weight))
        return 0


# ------------------------------------------------------------------------------------------- pieces of work


class Counted:
    """A reward that counts the images it was asked about."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.images = reward, 0

    def __call__(self, images: Tensor, context: Any = None) -> Tensor:
        self.images += len(images)
        return self.reward(images, context)


@contextmanager
def states_through(training: Training) -> Iterator[list[int]]:
    """Counts the states that pass forward through the policy or the pre-trained network, recomputed ones too."""
    count = [0]

    def seen(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        count[0] += output.shape[0] * output.shape[1]

    hooks = [module.register_forward_hook(seen) for module in (training.policy, training.problem.pretrained)]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Part(ABC):
    """A piece of the comparison: a pure function of the settings, kept as one JSON file."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of its file."""

    @abstractmethod
    def compute(self, settings: Compare, task: Task) -> dict[str, Any]:
        """What goes into the file."""

    def path(self, settings: Compare, suffix: str = ".json") -> Path:
        return settings.out / "parts" / f"{self.name}{suffix}"

    def read(self, settings: Compare) -> dict[str, Any]:
        return json.loads(self.path(settings).read_text())

    def finish(self, settings: Compare, task: Task) -> None:
        write_json(self.path(settings), self.compute(settings, task))


@dataclass(frozen=True)
class Trained(Part):
    """One run of one method: metrics of every update, and the model judged on fresh noise."""

    method: Method
    seed: int
    kl_weight: float

    @property
    def name(self) -> str:
        return f"{name_of(self.method)}_seed{self.seed}_lambda{self.kl_weight:g}"

    def compute(self, settings: Compare, task: Task) -> dict[str, Any]:
        own, counted = settings.single(self.method, self.seed, self.kl_weight), Counted(task.problem.reward)
        task = replace(task, problem=replace(task.problem, kl_weight=self.kl_weight))
        training = Training(replace(task, problem=replace(task.problem, reward=counted)), own, Accelerator())
        rows, stopped = self._updates(training, counted, bar=settings.jobs == 1)
        final, lost = judged(task, training, own, rows)
        average = {key: x for key, x in training.tensors().items() if key.startswith("average.")}
        save_atomically(average, self.path(settings, ".safetensors"))
        share = queries_to_share(rows, SHARE) if rows and "judged_share" in rows[0] else None
        costs = {name: rows[-1][name] if rows else 0 for name in ("queries", "reward_evaluations", "network_evaluations", "seconds")}
        head = {"method": name_of(self.method), "seed": self.seed, "kl_weight": self.kl_weight, "updates": len(rows), "stopped": stopped or lost}
        return {"rows": rows, "final": {**head, **costs, "queries_to_share": share, "optimum": optimum(task), **final}}

    def _updates(self, training: Training, counted: Counted, bar: bool) -> tuple[list[dict[str, float]], str | None]:
        """Metrics with running totals, up to the last update that is finite; and why there are no more."""
        rows: list[dict[str, float]] = []
        seconds, total = 0.0, training.settings.iterations
        with progress(self.name, total, bar) as step, states_through(training) as states:
            while len(rows) < total:
                try:
                    row = training.update()
                except (ValueError, FloatingPointError) as error:
                    return rows, f"update {len(rows) + 1}: {error}"
                seconds += row["seconds"]
                rows.append({**row, "reward_evaluations": counted.images, "network_evaluations": states[0], "seconds": seconds})
                step(1, reward=row["reward"], kl=row["kl_mean"])
        return rows, None

    def restored(self, settings: Compare, task: Task) -> Training:
        """The training with the model that was kept."""
        training = Training(task, settings.single(self.method, self.seed, self.kl_weight), Accelerator())
        kept = load_file(self.path(settings, ".safetensors"))
        with torch.no_grad():
            for key, p in training.average.named_parameters():
                if f"average.{key}" in kept:
                    p.copy_(kept[f"average.{key}"])
        return training


def judged(task: Task, training: Training, settings: Settings, rows: Sequence[dict[str, float]]) -> tuple[dict[str, float], str | None]:
    """The averaged model on fresh noise; where that is not finite, the last finite batch, and why."""
    try:
        return finite(evaluate(task, training.average, pretrained_of(training), settings)), None
    except FloatingPointError as error:
        last = rows[-1] if rows else {}
        row = {name: last[name] for name in ("reward", "objective", "kl_mean", "kl_median", "kl_max", "judged_share") if name in last}
        return row | ({"regret": optimum(task) - row["objective"]} if row else {}), f"final evaluation: {error}"


def optimum(task: Task) -> float:
    """J*, against which all methods are held."""
    if task.yardstick is None:
        raise ValueError("reference_samples: expected at least 2 for a comparison by regret, got 0")
    return task.yardstick.objective


def finite(row: dict[str, float]) -> dict[str, float]:
    """The same numbers; FloatingPointError where one is not finite."""
    for name, x in row.items():
        if not np.isfinite(x):
            raise FloatingPointError(f"{name} is {x}")
    return row


def pretrained_of(training: Training) -> Any:
    """The reference of the averaged model: the base model, or its own weights without their adapter."""
    reference = training.problem.pretrained
    return WithoutAdapter(training.average) if isinstance(reference, WithoutAdapter) else reference


@dataclass(frozen=True)
class Transfer(Part):
    """One fine-tuned model, and the pre-trained one, sampled with other numbers of steps and another eta (theory.md, sections 11 and 12)."""

    model: Trained

    @property
    def name(self) -> str:
        return f"transfer_{self.model.name}"

    def compute(self, settings: Compare, task: Task) -> dict[str, Any]:
        task = replace(task, problem=replace(task.problem, kl_weight=self.model.kl_weight))
        training = self.model.restored(settings, task)
        base, own, rows = pretrained_of(training), settings.single(self.model.method, self.model.seed, self.model.kl_weight), []
        with progress("transfer", len(ETAS) * len(settings.transfer_steps), settings.jobs == 1) as step:
            for eta in ETAS:
                for steps in settings.transfer_steps:
                    for model, policy in (("fine-tuned", training.average), ("pre-trained", base)):
                        row: dict[str, Any] = {"model": model, "eta": eta, "steps": steps, "stopped": None}
                        try:
                            rows.append(row | finite(evaluate(task, policy, base, own, steps=steps, eta=eta)))
                        except FloatingPointError as error:  # a sampler too coarse for the model
                            rows.append(row | {"stopped": str(error)})
                    step()
        return {"rows": rows}


@dataclass(frozen=True)
class Snapshot(Part):
    """A policy on its way, and the value that it learned: where gradients are compared; its last finite state."""

    seed: int

    @property
    def name(self) -> str:
        return f"snapshot_seed{self.seed}"

    def training(self, settings: Compare, task: Task) -> Training:
        return Training(task, settings.single(ValueGradient(), self.seed, settings.kl_weight), Accelerator())

    def compute(self, settings: Compare, task: Task) -> dict[str, Any]:
        training, stopped = self.training(settings, task), None
        with progress(self.name, settings.snapshot, settings.jobs == 1) as step:
            while training.iteration < min(settings.snapshot, settings.iterations) and stopped is None:
                try:
                    training.update()
                    step()
                except (ValueError, FloatingPointError) as error:
                    stopped = str(error)
        training.save(self.path(settings, ".safetensors"))
        return {"updates": training.iteration, "stopped": stopped}


@dataclass(frozen=True)
class SignalToNoise(Part):
    """The gradient of one objective at the snapshot, over independent batches of several sizes, in all its coordinates.

    Of its own mean: of Adjoint Matching and of reward-weighted regression that is not grad J, and a learned V biases what it enters.
    """

    method: Method
    snapshot: Snapshot

    @property
    def name(self) -> str:
        return f"snr_{name_of(self.method)}"

    def compute(self, settings: Compare, task: Task) -> dict[str, Any]:
        training, rows = self.snapshot.training(settings, task), []
        training.load(self.snapshot.path(settings, ".safetensors"))
        with progress(self.name, sum(settings.snr_sizes) * settings.snr_batches, settings.jobs == 1) as step:
            for k, n in enumerate(settings.snr_sizes):
                first = GRADIENTS + k * settings.snr_batches
                noises = [training.settings.noise(first + b, n) for b in range(settings.snr_batches)]
                try:
                    rows.append({"method": name_of(self.method), "paths": n, "batches": len(noises), **self._measured(training, noises, step)})
                except (ValueError, FloatingPointError) as error:  # not every reward has a gradient
                    return {"rows": rows, "stopped": str(error)}
        return {"rows": rows, "stopped": None}

    def _measured(self, training: Training, noises: list[Noise], step: Callable[..., None]) -> dict[str, float]:
        objective, gradients = self.method.objective(training.value), []
        for noise in noises:
            gradients.append(batch_gradient(objective, sample(training.problem, training.policy, training.grid, noise)))
            step(noise.paths)
        return finite(signal_to_noise(torch.stack(gradients)))


def batch_gradient(objective: Objective, run: Run) -> Tensor:
    """The gradient of a batch's mean loss, (p,), as an optimiser would get it."""
    gradient = torch.autograd.grad(objective.loss(run).mean(), run.policy.trainable())  # type: ignore[attr-defined]
    return torch.cat([part.flatten() for part in gradient])


def signal_to_noise(gradients: Tensor) -> dict[str, float]:
    r"""Squared norm of the mean gradient, and the variance of one batch's, from M independent batches (M, p); nothing is projected.

        signal = sum_{a != b} <g_a, g_b> / M(M-1),     noise = sum_a |g_a|^2 / M - signal,     snr = signal / noise

    signal and noise are unbiased for |E g|^2 and tr Cov(g); |mean g|^2 would be too large by noise/M. snr_error: jackknife over batches.
    Source: Hoeffding (1948), U-statistics.   Checked: tests/test_torch_compare.py::test_signal_to_noise_of_a_known_gradient
    """
    inner = (gradients.double() @ gradients.double().T).cpu().numpy()

    def parts(products: Array) -> tuple[float, float]:
        count, own = len(products), float(np.trace(products))
        signal = (float(products.sum()) - own) / (count * (count - 1))
        return signal, own / count - signal

    def ratio(products: Array) -> float:
        signal, noise = parts(products)
        return signal / noise

    count = len(inner)
    others = [np.delete(np.delete(inner, b, 0), b, 1) for b in range(count)]
    spread = np.std([ratio(products) for products in others])
    signal, noise = parts(inner)
    return {"signal": signal, "noise": noise, "snr": signal / noise, "snr_error": float(spread * (count - 1) ** 0.5)}


# ------------------------------------------------------------------------------------------- the whole


def compare(settings: Compare) -> dict[str, pd.DataFrame]:
    """Run (or resume) a comparison; its frames, which are also its CSV files.

    runs : one row a trained model      learning : one a model and update      ideal : the best reward at each KL
    transfer : one a sampler      snr : one an objective and batch size
    Source: theory.md, sections 9, 11, 12 and 15.   Checked: tests/test_torch_compare.py::test_rows_are_consistent
    """
    begin(settings)
    task = _prepared(settings)
    learning, frontier, last = pieces(settings)
    snapshots = [part.snapshot for part in last if isinstance(part, SignalToNoise)]
    models = [part.model for part in last if isinstance(part, Transfer)]
    for stage in ([*learning, *frontier, *models, *snapshots[:1]], last):
        carry_out(settings, task, list(dict.fromkeys(stage)))
    frames = collect(settings, task, list(dict.fromkeys([*learning, *frontier])), last)
    for name, frame in frames.items():
        frame.to_csv(settings.out / f"{name}.csv", index=False)
    (settings.out / "table.txt").write_text(table(frames["runs"], settings.kl_weight) + "\n")
    draw(frames, settings.kl_weight).savefig(settings.out / "compare.png", dpi=150)
    return frames


def begin(settings: Compare) -> None:
    """The folder, with the settings that its numbers belong to; others are refused by name."""
    config = writable(settings.out) / "config.json"
    writable(settings.out / "parts")
    if config.exists() and not settings.resume:
        raise ValueError(f"out: expected a new folder (or --resume to go on with the comparison in it), got {settings.out}")
    if config.exists() and (then := json.loads(config.read_text())) != settings.identity():
        changed = [name for name, value in settings.identity().items() if then.get(name) != value]
        raise ValueError(f"resume: expected the settings of the comparison in {settings.out}, got other values of {', '.join(changed)}")
    write_json(config, settings.identity())
    surroundings = environment("torch", "accelerate", "safetensors")
    write_json(settings.out / "env.json", {**surroundings, "threads": torch.get_num_threads(), "jobs": settings.jobs})


def pieces(settings: Compare) -> tuple[list[Trained], list[Trained], list[Part]]:
    """Runs of the learning curves, runs of the frontier (which share some), and what looks at their models."""
    methods, first, asked = settings.methods, settings.seed, settings.parts
    learning = [Trained(method, first + k, settings.kl_weight) for k in range(settings.seeds) for method in methods if "learning" in asked]
    frontier = [Trained(method, first, kl_weight) for method in methods if "frontier" in asked and isinstance(method, ON_FRONTIER)
                for kl_weight in settings.kl_weights]
    last: list[Part] = [Transfer(Trained(methods[0], first, settings.kl_weight))] if "transfer" in asked else []
    return learning, frontier, last + [SignalToNoise(method, Snapshot(first)) for method in methods if "snr" in asked]


def carry_out(settings: Compare, task: Task, parts: Sequence[Part]) -> None:
    """Finish the parts that are not on disk yet, one after the other or side by side."""
    missing = [part for part in parts if not part.path(settings).exists()]
    with progress("compare", len(parts)) as step:
        step(len(parts) - len(missing))
        if settings.jobs == 1:
            for part in missing:
                part.finish(settings, task)
                step()
        else:
            for _ in Parallel(settings.jobs, return_as="generator_unordered")(delayed(_aside)(settings, part) for part in missing):
                step()


def _aside(settings: Compare, part: Part) -> None:
    part.finish(settings, _prepared(settings))


@cache
def _prepared(settings: Compare) -> Task:
    """Once in each process."""
    if settings.threads is not None:
        torch.set_num_threads(check.integer("threads", settings.threads, at_least=1))
    return prepare(settings, Accelerator().device)


def collect(settings: Compare, task: Task, trained: Sequence[Trained], last: Sequence[Part]) -> dict[str, pd.DataFrame]:
    """The frames, from the files of the parts."""
    found = [(part, part.read(settings)) for part in trained]
    curves = [{"method": name_of(part.method), "seed": part.seed, "kl_weight": part.kl_weight, **row,
               "regret": kept["final"]["optimum"] - row["objective"]} for part, kept in found for row in kept["rows"]]
    frames = {"runs": pd.DataFrame([kept["final"] for _, kept in found], columns=None if found else ["method", "kl_weight"]),
              "learning": pd.DataFrame(curves)}
    if "frontier" in settings.parts:
        weights = sorted({*np.geomspace(0.1, 20, 60).tolist(), *settings.kl_weights}, reverse=True)
        best = [y for y in ideal_frontier(task.reference_rewards, weights) if y.ess >= min(TRUSTED_ESS, settings.reference_samples / 10)]
        names = ("kl_weight", "kl", "kl_error", "reward", "reward_error", "objective", "objective_error", "ess")
        frames["ideal"] = pd.DataFrame([{name: getattr(y, name) for name in names} for y in best])
    for name, kind in (("transfer", Transfer), ("snr", SignalToNoise)):
        if rows := [row for part in last if isinstance(part, kind) for row in part.read(settings)["rows"]]:
            frames[name] = pd.DataFrame(rows)
    return {name: frame for name, frame in frames.items() if name == "runs" or len(frame)}


# ------------------------------------------------------------------------------------------- the table


def summary(runs: pd.DataFrame, kl_weight: float) -> pd.DataFrame:
    """One row a method at one kl_weight, by regret: means over seeds, standard errors of these means, runs that stopped.

    Source: theory.md, section 15.   Checked: tests/test_torch_compare.py::test_table_is_sorted_by_regret
    """
    runs = runs[runs["kl_weight"] == kl_weight]
    if runs.empty:
        return pd.DataFrame()
    names = [name for name in runs.columns if name not in ("method", "seed", "kl_weight", "stopped") and runs[name].notna().any()]
    groups = runs.groupby("method")
    out = pd.concat([groups[names].mean(numeric_only=True), groups[names].sem(numeric_only=True).add_suffix("_sem")], axis=1)
    out = out.assign(seeds=groups.size(), stopped=groups["stopped"].count(), why=groups["stopped"].first())
    if "queries_to_share" in out:
        out["reached"] = groups["queries_to_share"].count()
    return out.sort_values("regret", na_position="last") if "regret" in out else out


def table(runs: pd.DataFrame, kl_weight: float) -> str:
    """The summary as text; mean over seeds +- its standard error."""
    rows = summary(runs, kl_weight)
    if rows.empty:
        return "no learning curves were asked for"
    heads = ("regret", "reward", "KL mean", "median", "max", "judged share", "queries to .8", "reward evals", "network evals", "seconds")
    columns = (("regret", 3, True), ("reward", 3, True), ("kl_mean", 2, True), ("kl_median", 2, False), ("kl_max", 1, False),
               ("judged_share", 3, True), ("queries_to_share", 0, False), ("reward_evaluations", 0, False), ("network_evaluations", 0, False),
               ("seconds", 0, False))
    best = f", J* = {rows['optimum'].max():.3f}" if "optimum" in rows else ""
    lines = [f"kl_weight {kl_weight:g}{best}; {rows['queries'].max():.0f} reward queries a run; mean over seeds +- standard error; by regret",
             f"{'method':<20}{'runs':>5}" + "".join(f"{head:>16}" for head in heads)]
    for method, row in rows.iterrows():
        cells = [_cell(row, name, digits, error) for name, digits, error in columns]
        lines.append(f"{method:<20}{row['seeds']:>5.0f}" + "".join(f"{cell:>16}" for cell in cells))
        if row["stopped"]:
            lines.append(f"{'':<20}{row['stopped']:.0f} of {row['seeds']:.0f} stopped at the last finite state shown: {row['why']}")
    return "\n".join(lines)


def _cell(row: pd.Series, name: str, digits: int, error: bool) -> str:
    """3.21+-0.04; for what some runs never reached, with how many did."""
    x = row.get(name, np.nan)
    if not np.isfinite(x):
        return "-"
    out = f"{x:.{digits}f}" + (f"+-{row[name + '_sem']:.{digits}f}" if error and np.isfinite(row[name + "_sem"]) else "")
    return out + (f" ({row['reached']:.0f}/{row['seeds']:.0f})" if name == "queries_to_share" and row["reached"] < row["seeds"] else "")


# ------------------------------------------------------------------------------------------- the figure

# Okabe and Ito: distinguishable without colour vision; methods also differ by line and marker.
STYLES: dict[str, dict[str, Any]] = {
    name: {"color": colour, "ls": line, "marker": marker} for name, colour, line, marker in zip(
        NAMES, ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999933"),
        ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2))), "os^DvPX*", strict=True)}
BLUE, GREY = STYLES[NAMES[0]]["color"], "#666666"
Panel = Callable[[Axes, dict[str, pd.DataFrame], float], None]


def draw(frames: dict[str, pd.DataFrame], kl_weight: float) -> Figure:
    """Regret, KL and judged share against reward queries; the frontier; transfer; signal-to-noise: of what is there."""
    share = "judged_share" in frames.get("learning", ())
    panels: list[tuple[str, Panel]] = [("learning", _curve("regret", "regret $J^* - J$ (reward units)")),
                                       ("learning", _curve("kl_mean", "path KL (nats per image)"))]
    panels += [("learning", _curve("judged_share", "judged share"))] if share else []
    panels += [("ideal", _frontier), ("transfer", _transfer(*(("judged_share", "judged share") if share else ("reward", "reward")))),
               ("transfer", _transfer("regret", "regret $J^* - J$ (reward units)")), ("snr", _snr)]
    panels = [(name, panel) for name, panel in panels if name in frames]
    columns = min(4, len(panels) + 1)
    figure = Figure(figsize=(4.1 * columns, 3.5 * -(-(len(panels) + 1) // columns)), layout="constrained")
    axes = figure.subplots(-(-(len(panels) + 1) // columns), columns, squeeze=False).ravel()
    for axis, (_, panel) in zip(axes, panels, strict=False):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, lw=0.6)
        panel(axis, frames, kl_weight)
    for axis in axes[len(panels):]:
        axis.set_axis_off()
    shown = {method for frame in frames.values() if "method" in frame for method in frame["method"]}
    lines = [Line2D([], [], label=name, lw=1.6, ms=5, **style) for name, style in STYLES.items() if name in shown]
    axes[len(panels)].legend(handles=lines, title=f"kl_weight {kl_weight:g} unless said", loc="center", frameon=False, handlelength=5)
    return figure


def _curve(name: str, label: str) -> Panel:
    """Means over seeds of running means over updates; bands from the least to the greatest seed."""
    def panel(axis: Axes, frames: dict[str, pd.DataFrame], kl_weight: float) -> None:
        at_weight = frames["learning"][frames["learning"]["kl_weight"] == kl_weight]
        for method, rows in at_weight.groupby("method", sort=False):
            runs = rows.pivot(index="queries", columns="seed", values=name).rolling(15, center=True, min_periods=1).mean()
            axis.plot(runs.index, runs.mean(axis=1), lw=1.6, ms=4, markevery=max(1, len(runs) // 6), **STYLES[method])
            axis.fill_between(runs.index, runs.min(axis=1), runs.max(axis=1), color=STYLES[method]["color"], alpha=0.15, lw=0)
        if name != "judged_share":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.5)))
            axis.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.5)))
        axis.set_xlabel("terminal reward queries (images)")
        axis.set_ylabel(label)
        axis.set_title("training batches, smoothed; band: least to greatest seed", fontsize=8)
    return panel


def _frontier(axis: Axes, frames: dict[str, pd.DataFrame], kl_weight: float) -> None:
    """Reward against KL of every kl_weight, under the curve that no model can cross, whose slope is kl_weight."""
    ideal, runs = frames["ideal"], frames["runs"]
    runs = runs[(runs["seed"] == runs["seed"].min()) & runs["method"].isin([name_of(method) for method in ALL if isinstance(method, ON_FRONTIER)])]
    axis.plot(ideal["kl"], ideal["reward"], "--", color="black", lw=1.2, label="ideal, +- 2 s.e.")
    low, high = (ideal["reward"] + z * ideal["reward_error"] for z in (-2, 2))
    axis.fill_between(ideal["kl"], low, high, color="black", alpha=0.15, lw=0)
    for method, rows in runs.sort_values("kl_weight").groupby("method", sort=False):
        axis.plot(rows["kl_mean"], rows["reward"], lw=1, ms=5, **STYLES[method])
    for _, best in ideal[ideal["kl_weight"].isin(runs["kl_weight"])].iterrows():
        axis.plot(best["kl"], best["reward"], "o", color="black", ms=3)
        axis.annotate(f"{best['kl_weight']:g}", (best["kl"], best["reward"]), (-3, 3), textcoords="offset points", ha="right", fontsize=7)
    axis.set_xlabel("path KL (nats per image)")
    axis.set_ylabel("reward")
    axis.set_title("one point a kl_weight; the ideal's slope is kl_weight", fontsize=8)
    axis.legend(loc="lower right", fontsize=7, frameon=False)


def _transfer(name: str, label: str) -> Panel:
    """One model under other samplers."""
    def panel(axis: Axes, frames: dict[str, pd.DataFrame], kl_weight: float) -> None:
        for (model, eta), rows in frames["transfer"].groupby(["model", "eta"], sort=False):
            line, marker = {1.0: ("-", "o"), 0.5: ("-.", "s"), 0.0: (":", "^")}[eta]
            axis.plot(rows["steps"], rows[name], ls=line, marker=marker, color=BLUE if model == "fine-tuned" else GREY, ms=4, lw=1.2,
                      label=f"{model}, eta {eta:g}")
        axis.set_xscale("log")
        ticks = sorted(frames["transfer"]["steps"].unique())
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.set_xlabel("sampler steps N")
        axis.set_ylabel(label)
        axis.set_title("one model under other samplers", fontsize=8)
        axis.legend(fontsize=7, frameon=False)
    return panel


def _snr(axis: Axes, frames: dict[str, pd.DataFrame], kl_weight: float) -> None:
    """Measured on batches of each size, and the line n SNR(1) through the pooled estimates."""
    for method, rows in frames["snr"].groupby("method", sort=False):
        n, style = rows["paths"].to_numpy(), STYLES[method]
        above = rows[rows["snr"] > 0]
        low = np.minimum(above["snr_error"], 0.9 * above["snr"])
        axis.errorbar(above["paths"], above["snr"], [low, above["snr_error"]], lw=0, elinewidth=0.8, ms=4,
                      marker=style["marker"], color=style["color"])
        one = float((n * rows["signal"]).sum() / n.sum() / (n * rows["noise"]).mean())
        if one > 0:
            axis.plot(n, n * one, lw=1.2, color=style["color"], ls=style["ls"])
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axis.set_xlabel("paths in a batch n")
    axis.set_ylabel("SNR $|E g|^2 / (\\mathrm{tr}\\, \\mathrm{Cov}\\, g / n)$")
    axis.set_title("gradient at one snapshot; lines: n SNR(1)", fontsize=8)
