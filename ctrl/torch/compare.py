r"""The methods in use, from one pre-trained model, with the same reward queries and the same noise, judged by regret.

    regret = J* - J,      SNR(n) = |E g|^2 / (tr Cov(g) / n)

Every trained model and every measurement is one file, written when it is finished; tables and figures are made from these files alone.
Terminal reward queries are what is made equal; what a method asks of the reward or of the networks besides is counted as it happens.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
import torch
import tyro
from accelerate import Accelerator
from joblib import Parallel, delayed
from safetensors.torch import load_file
from torch import Tensor

from ctrl import check
from ctrl.check import Array
from ctrl.files import environment, writable, write_json, write_text
from ctrl.noise import Noise
from ctrl.torch.chain import Reward
from ctrl.torch.compared import NAMES, ON_FRONTIER, draw, name_of, page, table
from ctrl.torch.finetune import Finetune, Training, queries_to_share
from ctrl.torch.methods import ALL, Choice, Method, TemporalDifference, ValueGradient
from ctrl.torch.pipelines import Prompts
from ctrl.torch.policy import WithoutAdapter
from ctrl.torch.task import Settings, Task, UserReward, digest, evaluate, evaluation, measured, prepare, progress, save_atomically, table_of_prompts

GRADIENTS = 2**31 + 2**16  # noise streams of the signal-to-noise batches: this one and those after it
ETAS = (1.0, 0.5, 0.0)
SHARE = 0.8
TRUSTED_ESS = 50  # of J* and of the ideal frontier
SAME = 1e-3  # relative difference of two means of rewards of the same paths, on whatever devices
TUNING = 2**30  # seeds of the search for learning rates: this one and those after it


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
    rates: tuple[float, ...] = ()
    """Factors on the methods' learning rates, of which a search chooses one for each method; none: no search, the rates of digits."""
    rate_seeds: int = 1
    """Runs of each factor, on seeds that no result uses."""
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
        for name, least in (("seeds", 1), ("rate_seeds", 1), ("snapshot", 1), ("snr_batches", 3), ("jobs", 1)):
            check.integer(name, getattr(self, name), at_least=least)
        for name, least in (("transfer_steps", 1), ("snr_sizes", 2)):
            for number in getattr(self, name):
                check.integer(name, number, at_least=least)
        for number in (self.kl_weight, *self.kl_weights):
            check.number("kl_weight", number, above=0)  # regret and frontier need an optimum
        for number in self.rates:
            check.number("rates", number, above=0)
        if len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates: expected different factors, got {' '.join(f'{x:g}' for x in self.rates)}")
        if self.seed + max(self.seeds, self.rate_seeds) > TUNING:
            raise ValueError(f"seed: expected an integer below 2^30 with all its runs, got {self.seed}")
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
        compare(settings)
        print((settings.out / "table.txt").read_text(), end="")
        return 0


# ------------------------------------------------------------------------------------------- pieces of work


class Counted:
    """A reward that counts the images (of latents: decoded ones) it was asked about."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.images = reward, 0

    def __call__(self, images: Tensor, context: Any = None) -> Tensor:
        self.images += len(images)
        return self.reward(images, context)


@contextmanager
def states_through(training: Training) -> Iterator[list[int]]:
    """Counts the states that pass forward through the policy or the pre-trained network, recomputed ones too; with guidance each is two calls."""
    count = [0]

    def seen(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        count[0] += output.shape[0] * output.shape[1]

    pretrained = training.problem.pretrained
    own = () if isinstance(pretrained, WithoutAdapter) else (pretrained,)  # an adapter's reference is the policy again
    hooks = [module.register_forward_hook(seen) for module in (training.policy, *own)]
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
        rate = "" if self.method in ALL else f"_rate{self.method.learning_rate:g}"
        return f"{name_of(self.method)}{rate}_seed{self.seed}_lambda{self.kl_weight:g}"

    def compute(self, settings: Compare, task: Task) -> dict[str, Any]:
        own, counted = settings.single(self.method, self.seed, self.kl_weight), Counted(task.problem.reward)
        task = priced(task, self.kl_weight)
        training = Training(replace(task, problem=replace(task.problem, reward=counted)), own, Accelerator())
        rows, stopped = self._updates(training, counted, bar=settings.jobs == 1)
        final, prompts, lost = judged(task, training, own, rows)
        if self.seed < TUNING:  # what is tried is not looked at again
            average = {key: x for key, x in training.tensors().items() if key.startswith("average.")}
            save_atomically(average, self.path(settings, ".safetensors"))
        share = queries_to_share(rows, SHARE) if rows and "judged_share" in rows[0] else None
        costs = {name: rows[-1][name] if rows else 0 for name in ("queries", "reward_evaluations", "network_evaluations", "seconds")}
        head = {"method": name_of(self.method), "seed": self.seed, "kl_weight": self.kl_weight, "learning_rate": self.method.learning_rate,
                "base": digest(task.base), "updates": len(rows), "stopped": stopped or lost}
        return {"rows": rows, "prompts": prompts, "final": {**head, **costs, "queries_to_share": share, **optimum(task), **final}}

    def _updates(self, training: Training, counted: Counted, bar: bool) -> tuple[list[dict[str, Any]], str | None]:
        """Metrics with running totals, up to the last update that is finite; and why there are no more."""
        rows: list[dict[str, Any]] = []
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


def judged(task: Task, training: Training, settings: Settings, rows: Sequence[dict[str, Any]],
           ) -> tuple[dict[str, float], list[dict[str, Any]], str | None]:
    """The averaged model on fresh noise, as a whole and by prompt; where that is not finite, the last finite batch, and why."""
    try:
        paths = evaluation(task, training.average, pretrained_of(training), settings)
        return finite(measured(task, paths)), [row.pop("tuned") | row for row in table_of_prompts(task, tuned=paths)], None
    except FloatingPointError as error:
        last = rows[-1] if rows else {}
        row = {name: last[name] for name in ("reward", "objective", "kl_mean", "kl_median", "kl_max", "judged_share") if name in last}
        regret = {"regret": task.yardstick.objective - row["objective"]} if row and task.yardstick is not None else {}
        return row | regret, [], f"final evaluation: {error}"


def priced(task: Task, kl_weight: float) -> Task:
    """The task at another price of the KL; the reward is not asked again of the reference samples."""
    other = replace(task, problem=replace(task.problem, kl_weight=kl_weight))
    if len(task.reference):
        other.__dict__["reference_rewards"] = task.reference_rewards
    return other


def optimum(task: Task) -> dict[str, float]:
    """J*, against which all methods are held, where there are reference samples."""
    return {} if task.yardstick is None else {"optimum": task.yardstick.objective}


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
        task = priced(task, self.model.kl_weight)
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
    method: Method

    @property
    def name(self) -> str:
        return f"snapshot_seed{self.seed}"

    def training(self, settings: Compare, task: Task) -> Training:
        return Training(task, settings.single(self.method, self.seed, settings.kl_weight), Accelerator())

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
        training.objective, training.statistics = training.asked_of(self.method)
        gradients = []
        for noise in noises:
            gradients.append(batch_gradient(training, noise, training.task.context(noise.paths)))
            step(noise.paths)
        return finite(signal_to_noise(torch.stack(gradients)))


def batch_gradient(training: Training, noise: Noise, context: Prompts | None = None) -> Tensor:
    """The gradient of a batch's mean loss, (p,), as an optimiser would get it."""
    batch, theta = training.batch(noise, context), training.policy.trainable()
    training.optimiser.zero_grad()
    batch.each(lambda run: batch.backward(training.objective.loss(run)))
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in theta])


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
    transfer : one a sampler      snr : one an objective and batch size      prompts : one a model and prompt      rates : one a rate tried
    Source: theory.md, sections 9, 11, 12 and 15.   Checked: tests/test_torch_compare.py::test_rows_are_consistent
    """
    begin(settings)
    task = _prepared(settings)
    methods = able(settings, task)
    tried = trials(settings, methods)
    carry_out(settings, task, tried)
    rates = searched([part.read(settings)["final"] for part in tried])
    methods = [_chosen(rates, method) for method in methods]
    learning, frontier, last = pieces(settings, task, methods)
    snapshots = [part.snapshot for part in last if isinstance(part, SignalToNoise)]
    models = [part.model for part in last if isinstance(part, Transfer)]
    for stage in ([*learning, *frontier, *models, *snapshots[:1]], last):
        carry_out(settings, task, list(dict.fromkeys(stage)))
    trained = list(dict.fromkeys([*learning, *frontier]))
    fair([(part, part.read(settings)) for part in [*tried, *trained, *models]])
    frames = collect(settings, task, trained, last) | ({"rates": rates} if tried else {})
    for name, frame in frames.items():
        frame.to_csv(settings.out / f"{name}.csv", index=False)
    notes, figure = said(settings, task, frames), draw(frames, settings.kl_weight)
    write_text(settings.out / "table.txt", table(frames["runs"], settings.kl_weight, notes) + "\n")
    write_text(settings.out / "index.html", page(frames, settings.kl_weight, notes, facts(settings, task), figure))
    figure.savefig(settings.out / "compare.png", dpi=150)
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
    surroundings = environment("torch", "accelerate", "diffusers", "peft", "safetensors")
    write_json(settings.out / "env.json", {**surroundings, "threads": torch.get_num_threads(), "jobs": settings.jobs})


def able(settings: Compare, task: Task) -> list[Method]:
    """The methods that the reward allows: some ask for its gradient."""
    found = [method for method in settings.methods if not method.differentiates or differentiable(task)]
    if not found:
        raise ValueError(f"only: expected a method that does without the reward's gradient, which there is not, got {', '.join(settings.only)}")
    return found


def differentiable(task: Task) -> bool:
    """Whether the reward has a gradient, as far as it says."""
    return getattr(task.problem.reward, "differentiable", True)


def trials(settings: Compare, methods: Sequence[Method]) -> list[Trained]:
    """Runs of every learning rate that is tried, on seeds of their own; none where no run would use them."""
    if not {"learning", "frontier", "transfer"} & set(settings.parts):
        return []
    return [Trained(replace(method, learning_rate=factor * method.learning_rate), TUNING + settings.seed + k, settings.kl_weight)
            for method in methods for factor in settings.rates for k in range(settings.rate_seeds)]


def searched(finals: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The learning rates that were tried, with means over their seeds, and which was chosen: of the largest objective, none of whose runs stopped.

    Of a method whose every rate has a run that stopped: the least.
    Source: design.md, runs.   Checked: tests/test_torch_compare.py::test_learning_rates_are_searched
    """
    if not finals:
        return pd.DataFrame()
    names = ["objective", "reward", "kl_mean", "queries"]
    runs = pd.DataFrame(finals, columns=["method", "learning_rate", "stopped", *names])
    groups = runs.groupby(["method", "learning_rate"], sort=False)
    out = groups[names].mean().assign(seeds=groups.size(), stopped=groups["stopped"].count()).reset_index()
    worth = out["objective"].where(out["stopped"] == 0, -np.inf).fillna(-np.inf)
    order = out.assign(worth=-worth).sort_values(["worth", "learning_rate"])
    return out.assign(chosen=out.index.isin(order.groupby("method").head(1).index))


def _chosen(rates: pd.DataFrame, method: Method) -> Method:
    """The method at the learning rate that was chosen, where one was searched for."""
    if rates.empty:
        return method
    rate = rates[rates["chosen"] & (rates["method"] == name_of(method))]["learning_rate"]
    return replace(method, learning_rate=float(rate.iloc[0]))


def pieces(settings: Compare, task: Task, methods: Sequence[Method]) -> tuple[list[Trained], list[Trained], list[Part]]:
    """Runs of the learning curves, runs of the frontier (which share some), and what looks at their models."""
    first, asked = settings.seed, settings.parts
    learning = [Trained(method, first + k, settings.kl_weight) for k in range(settings.seeds) for method in methods if "learning" in asked]
    frontier = [Trained(method, first, kl_weight) for method in methods if "frontier" in asked and isinstance(method, ON_FRONTIER)
                for kl_weight in settings.kl_weights]
    last: list[Part] = [Transfer(Trained(methods[0], first, settings.kl_weight))] if "transfer" in asked else []
    snapshot = Snapshot(first, ValueGradient() if differentiable(task) else TemporalDifference())
    return learning, frontier, last + [SignalToNoise(method, snapshot) for method in methods if "snr" in asked]


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


def fair(found: Sequence[tuple[Trained, dict[str, Any]]]) -> None:
    """ValueError where runs of one seed were not asked the same: the model, reward queries and prompts of every update, prompts of the evaluation,
    and the first paths, which all sample from the pre-trained model on the same noise.

    Source: theory.md, section 15.   Checked: tests/test_torch_compare.py::test_unequal_runs_are_refused
    """
    first: dict[int, tuple[Trained, dict[str, Any]]] = {}
    for part, kept in found:
        one, other = first.setdefault(part.seed, (part, kept))
        for what, x, y in _differences(other, kept):
            raise ValueError(f"compare: expected the same of {one.name} and {part.name}, got {what}: {x} and {y}")


def _differences(one: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What two runs were asked that is not the same; of updates and evaluations that both have."""
    if one["final"]["base"] != other["final"]["base"]:
        yield "the pre-trained model", one["final"]["base"], other["final"]["base"]
    for k, (x, y) in enumerate(zip(one["rows"], other["rows"], strict=False)):
        if x["queries"] != y["queries"]:
            yield f"reward queries of update {k + 1}", x["queries"], y["queries"]
        counts, others = ([(row["prompt"], row["paths"]) for row in update.get("prompts", ())] for update in (x, y))
        if counts != others:
            yield f"prompts of update {k + 1}", counts, others
        if k == 0:
            rewards, also = ([row["reward"], *(each["reward"] for each in row.get("prompts", ()))] for row in (x, y))
            if not np.allclose(rewards, also, rtol=SAME, atol=0):
                yield "rewards of the first paths", rewards, also
    counts, others = ([(row["prompt"], row["paths"]) for row in run["prompts"]] for run in (one, other))
    if counts != others and counts and others:  # none where an evaluation was not finite
        yield "prompts of the evaluation", counts, others


def collect(settings: Compare, task: Task, trained: Sequence[Trained], last: Sequence[Part]) -> dict[str, pd.DataFrame]:
    """The frames, from the files of the parts."""
    found = [(part, part.read(settings)) for part in trained]
    heads = [{"method": name_of(part.method), "seed": part.seed, "kl_weight": part.kl_weight} for part, _ in found]
    curves = [{**head, **{name: x for name, x in row.items() if name != "prompts"},
               **({"regret": kept["final"]["optimum"] - row["objective"]} if "optimum" in kept["final"] else {})}
              for head, (_, kept) in zip(heads, found, strict=True) for row in kept["rows"]]
    frames = {"runs": pd.DataFrame([kept["final"] for _, kept in found], columns=None if found else ["method", "kl_weight"]),
              "learning": pd.DataFrame(curves),
              "prompts": pd.DataFrame([{**head, **row} for head, (_, kept) in zip(heads, found, strict=True) for row in kept["prompts"]])}
    if "frontier" in settings.parts and len(task.reference):
        weights = sorted({*np.geomspace(0.1, 20, 60).tolist(), *settings.kl_weights}, reverse=True)
        least = min(TRUSTED_ESS, settings.reference_samples / 10 / (1 if task.prompts is None else len(task.prompts)))
        best = [y for kl_weight in weights if (y := priced(task, kl_weight).yardstick) is not None and y.ess >= least]
        names = ("kl_weight", "kl", "kl_error", "reward", "reward_error", "objective", "objective_error", "ess")
        frames["ideal"] = pd.DataFrame([{name: getattr(y, name) for name in names} for y in best])
    for name, kind in (("transfer", Transfer), ("snr", SignalToNoise)):
        if rows := [row for part in last if isinstance(part, kind) for row in part.read(settings)["rows"]]:
            frames[name] = pd.DataFrame(rows)
    return {name: frame for name, frame in frames.items() if name == "runs" or len(frame)}


# ------------------------------------------------------------------------------------------- in words


def said(settings: Compare, task: Task, frames: dict[str, pd.DataFrame]) -> list[str]:
    """What the numbers rest on, and what could not be done, a sentence each."""
    out = [_of_optimum(settings, task)]
    if "frontier" in settings.parts and len(task.reference) and "ideal" not in frames:
        out.append("no ideal frontier: no price of the KL has weights of enough reference samples")
    if "frontier" in settings.parts and (off := [name_of(method) for method in settings.methods if not isinstance(method, ON_FRONTIER)]):
        out.append(f"no runs at other prices of the KL: {', '.join(off)}")
    if task.judge is None:
        out.append("no judged share: a judge is there for classes of the data alone")
    if left := [name_of(method) for method in settings.methods if method.differentiates and not differentiable(task)]:
        out.append(f"left out, as the reward has no gradient: {', '.join(left)}")
    if "snr" in settings.parts and not differentiable(task):
        out.append("gradients are compared on the way of temporal-difference, which needs none of the reward's")
    if "rates" in frames:
        out.append(_of_rates(frames["rates"]))
    elif settings.pipeline is not None or settings.data != "digits":
        out.append("learning rates are those that suit digits, not searched for here (--rates .1 1 10)")
    if settings.seeds == 1:
        out.append("one seed: no standard errors over seeds")
    if "learning" in frames:
        before = frames["learning"].query("iteration == 1").groupby("seed")["reward"].first()
        out.append(f"before the first update: reward {before.mean():.3f}, the mean of {len(before)} batches of {settings.paths}; KL 0")
    return out


def _of_optimum(settings: Compare, task: Task) -> str:
    """J* and how far it can be trusted."""
    best = task.yardstick
    if best is None:
        return "no J*, no regret, no ideal frontier: no reference samples of the pre-trained model (--reference-samples); methods stand by objective"
    each = "" if task.prompts is None else f" (the least of {len(task.prompts)} prompts, {len(task.reference) // len(task.prompts)} samples each)"
    line = f"J* = {best.objective:.3f} +- {best.objective_error:.3f} of {len(task.reference)} reference samples, ESS {best.ess:.0f}{each}"
    low = f"; below an ESS of {TRUSTED_ESS} it tends to be too low, and with it every regret, by one number: the order of methods stands"
    return line + (low if best.ess < TRUSTED_ESS else "")


def _of_rates(rates: pd.DataFrame) -> str:
    """What the search found, and where it should go on."""
    found = []
    for method, rows in rates.groupby("method", sort=False):
        rate = rows[rows["chosen"]]["learning_rate"].iloc[0]
        end = "" if len(rows) == 1 else {rows["learning_rate"].max(): ", the largest", rows["learning_rate"].min(): ", the least"}.get(rate, "")
        found.append(f"{method} {rate:g} (of {len(rows)}{end})")
    queries = int((rates["queries"] * rates["seeds"]).groupby(rates["method"]).sum().max())
    return f"learning rates by objective on seeds that no result uses, {queries} more reward queries a method: {'; '.join(found)}"


def facts(settings: Compare, task: Task) -> dict[str, str]:
    """Of the page."""
    reward = settings.reward.function if isinstance(settings.reward, UserReward) else type(settings.reward).__name__
    out = {"model": settings.pipeline or f"{settings.data}, pre-trained here", "reward": reward}
    if task.prompts is not None:
        out |= {"prompts": f"{len(task.prompts)}, in turn", "guidance": f"{settings.guidance:g}"}
    out |= {"sampler": f"{settings.steps} steps, eta {settings.eta:g}", "batch": f"{settings.paths} images", "updates": f"{settings.iterations}",
            "trained": f"a LoRA adapter of rank {settings.lora_rank}" if settings.lora_rank else "all parameters"}
    made = environment("torch", "diffusers")
    return out | {"versions": ", ".join(f"{name} {made['versions'][name]}" for name in ("scores-as-actions", "torch", "diffusers"))}
