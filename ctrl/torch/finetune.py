r"""Fine-tuning an image diffusion model: updates, checkpoints, run folder.

Per update: sample paths without gradients; one batched forward over all N n states; the objective's loss, and the martingale loss
where a value is learned; Adam. Noise is a pure function of (seed, update, path), so that a resumed or a distributed run is the same run.

    at_once       states of a forward pass with gradients: activations beyond it are recomputed in the backward pass
    micro_batch   paths at a time: sampling, rewards, losses and their gradients, which are summed before the step
    trajectories  between micro-batches: stored, or seeds, from which they are sampled again, by the policy that sampled first
"""

from __future__ import annotations

import copy
import gc
import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from math import cos, isfinite, pi
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed.nn  # now: imported later, by an optimiser, its default arguments would hold the process group, and its threads, to the end
import tyro
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ctrl import check
from ctrl.estimators import LeaveOneOut
from ctrl.files import environment, writable, write_json
from ctrl.noise import Noise
from ctrl.torch.batch import Batch, Joined
from ctrl.torch.chain import Run, rows, sample, simulate
from ctrl.torch.networks import ConvValueNetwork, Denoiser, UNetDenoiser, ValueNetwork
from ctrl.torch.methods import Method
from ctrl.torch.objectives import ClippedRatio, Objective, RewardWeighted, ScoreFunction
from ctrl.torch.pipelines import DiffusersNetwork, Prompts, save_tuned
from ctrl.torch.policy import NetworkPolicy, Policy, PredictsClean, WithoutAdapter
from ctrl.torch.pretrain import follow, load_denoiser, sampling_grid, save_denoiser
from ctrl.torch.prompts import PerPrompt, by_prompt
from ctrl.torch.task import (
    WATCHED, Settings, Task, digest, evaluation, measured, outline, prepare, progress, save_atomically, table_of_prompts)
from ctrl.torch.value import Ansatz, PlainValue, Value, martingale_loss
from ctrl.torch.watch import Halves, ratios

WARM_UP = 10  # updates over which the step size grows
DEPLOYED_EVERY = 25  # updates between looks at the deterministic sampler
PATIENCE = timedelta(hours=12)  # of the other processes, while the first one pre-trains


class TrainingStopped(RuntimeError):
    """A run that cannot go on: says where it stopped and what is kept."""


@dataclass(frozen=True)
class Finetune(Settings):
    """Fine-tune a diffusion model of real images by continuous-time reinforcement learning, and say how far from the optimum it ends."""

    out: Path = Path("finetune")
    """Run folder."""
    checkpoint_every: int = 25
    """Updates between checkpoints."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on from the last checkpoint in the run folder."""
    no_plan: tyro.conf.FlagCreatePairsOff[bool] = False
    """Begin without the updates of a few paths that say what the run will hold and ask; a resumed run has none."""
    tensorboard: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also write metrics for tensorboard (needs the package)."""

    elsewhere: ClassVar[tuple[str, ...]] = (*Settings.elsewhere, "out", "checkpoint_every", "resume", "no_plan", "tensorboard")

    def __post_init__(self) -> None:
        super().__post_init__()
        check.integer("checkpoint_every", self.checkpoint_every, at_least=1)

    def run(self) -> int:
        """The command `ctrl finetune`."""
        try:
            summary = finetune(self.made_quick() if self.quick else self)
        finally:  # or its threads may abort the process, as they let go of tensors when Python ends
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        if summary is not None:
            print(describe(summary))
        return 0


@dataclass(frozen=True)
class Alone:
    """What training asks of an Accelerator, for a process that works by itself among others."""

    device: torch.device
    process_index: ClassVar[int] = 0
    num_processes: ClassVar[int] = 1
    is_main_process: ClassVar[bool] = True

    def gather(self, x: Tensor) -> Tensor:
        return x

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x


class Training:
    """The state of a run, and its one move."""

    def __init__(self, task: Task, settings: Finetune, accelerator: Accelerator | Alone) -> None:
        self.task, self.settings, self.accelerator = task, settings, accelerator
        self.iteration, self.queries = 0, 0
        self.kept = 0  # the update of the last checkpoint
        self.moved = False  # whether theta or the value have moved in the update at hand
        self.watched = True  # whether updates say signal and noise of their gradient
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.policy, pretrained = trainable_copy(task.base, settings.lora_rank, settings.lora_targets)
            core = (ConvValueNetwork if isinstance(task.base.network, UNetDenoiser | DiffusersNetwork) else ValueNetwork)(task.problem.shape)
        self.problem = replace(task.problem, pretrained=pretrained)
        self.policy.to(accelerator.device)
        self.average = copy.deepcopy(self.policy)
        self.value: Value = (PlainValue(core) if settings.plain_value else Ansatz(core)).to(accelerator.device)
        self.objective, self.statistics = self.asked_of(settings.method)
        self.grid = sampling_grid(task.problem.schedule, settings.steps)
        self.optimiser = torch.optim.Adam(self.policy.trainable(), lr=1.0, betas=(0.9, 0.99))
        self.value_optimiser = torch.optim.Adam(self.value.parameters(), lr=1.0, betas=(0.9, 0.99))
        self.modules: dict[str, nn.Module] = {"policy": self.policy, "average": self.average}
        self.optimisers = {"optimiser": self.optimiser}
        if settings.method.learns_value:
            self.modules["value"], self.optimisers["value_optimiser"] = self.value, self.value_optimiser

    def asked_of(self, method: Method) -> tuple[Objective, PerPrompt | None]:
        """A method's objective with the value at hand; where there are prompts, with weights or a baseline of each."""
        objective = method.objective(self.value)
        if self.task.prompts is not None and isinstance(objective, RewardWeighted):
            return replace(objective, by_prompt=True), None
        if self.task.prompts is None or not (isinstance(objective, ScoreFunction) and isinstance(objective.baseline, LeaveOneOut)):
            return objective, None
        statistics = PerPrompt(len(self.task.prompts), self.settings.steps).to(self.accelerator.device)
        return replace(objective, baseline=statistics), statistics

    def update(self) -> dict[str, Any]:
        """One batch of paths, `epochs` steps of Adam; returns the metrics of the batch, sampled before the steps."""
        started, settings, k = time.perf_counter(), self.settings, self.iteration
        self.moved = False
        batch = self._batch(k)
        shape = min(1, (k + 1) / WARM_UP) * 0.5 * (1 + cos(pi * k / settings.iterations))
        self.optimiser.param_groups[0]["lr"] = settings.method.learning_rate * shape
        self.value_optimiser.param_groups[0]["lr"] = settings.method.value_learning_rate * max(shape, 0.1)
        losses, columns = self._step(batch, first=True)
        assert columns is not None
        row: dict[str, Any] = {**_finite({**self._metrics(columns), **losses}), **self._by_prompt(columns)}
        later = [self._step(batch, first=False)[1] for _ in range(settings.method.epochs - 1)]
        row |= self._ratios([gone for gone in later if gone is not None])
        if self.statistics is not None:
            batch.first(self.objective.remember)
        follow(self.average, self.policy, min(settings.average, (k + 1) / (k + 10)))
        self.iteration += 1
        self.queries += settings.paths
        return {"iteration": self.iteration, "queries": self.queries, **row, "seconds": time.perf_counter() - started}

    def _batch(self, k: int) -> Batch:
        """This process's paths of update k."""
        n = self.settings.paths
        part = self._part(n)
        return self.batch(self.settings.noise(k, n)[part], rows(self.task.context(n, k * n), part))

    def batch(self, noise: Noise, context: Prompts | None) -> Batch:
        """This process's paths of a batch, which know what couples them to all others."""
        method, stored = self.settings.method, self.settings.trajectories == "stored"
        again = not stored and (method.epochs > 1 or method.learns_value)  # sampled again after a step, by the policy before it
        before = [p.detach().clone() for p in self.policy.trainable()] if again else None

        def sampled(some: slice, joined: Joined, reward: Tensor | None) -> Run:
            with _swapped(self.policy, before):
                run = sample(self.problem, self.policy, self.grid, noise[some], rows(context, some), joined=joined, reward=reward)
            return replace(run, at_once=self.settings.at_once)

        batch = Batch(sampled, noise.paths, self.settings.micro_batch or noise.paths, stored=stored)
        if (coupling := self.objective.coupling) is not None:
            batch.everyone(self.accelerator.gather(torch.cat(batch.each(coupling)).contiguous()))
        return batch

    def _part(self, n: int) -> slice:
        """This process's paths of n."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return slice(rank * n // world, (rank + 1) * n // world)

    def deterministic(self) -> dict[str, float]:
        """Reward of the policy under the deterministic sampler (eta = 0), on as many images as in a batch, of fixed noise and prompts."""
        if self.settings.eta == 0:
            return {}
        n = self.settings.paths
        part = self._part(n)
        paths = simulate(replace(self.problem, eta=0.0), self.policy, self.grid, self.settings.noise(WATCHED, n)[part],
                         rows(self.task.context(n), part), most=self.task.most)
        return {"ode_reward": float(self.accelerator.gather(paths.reward).mean())}

    def sound(self) -> bool:
        """Whether the policy's images and KL are finite, whatever the reward says of them: a state that diverged replaces no good one."""
        unrewarded = replace(self.problem, reward=lambda x, context: 0 * x.flatten(1).sum(1))  # NaN where a pixel is not finite
        try:
            paths = simulate(unrewarded, self.policy, self.grid, self.settings.noise(self.iteration, self.settings.paths),
                             self.task.context(self.settings.paths, self.iteration * self.settings.paths), most=self.task.most)
        except FloatingPointError:
            return False
        return bool(paths.penalty.isfinite().all())

    def _step(self, batch: Batch, first: bool) -> tuple[dict[str, float], Tensor | None]:
        """One step of the policy and those of the value, each along the whole batch's gradient, and what is said of every path.

        The `first` step has signal and noise of its gradient, and `_columns`; later ones have how far the policy has gone, (n, 3), if by a ratio.
        """
        n, theta = self.settings.paths, self.policy.trainable()
        halves = Halves(min(max(n // 2 - self._part(n).start, 0), len(batch)), theta) if first and self.watched and n > 1 else None

        def policy(run: Run) -> tuple[Tensor, Tensor | None]:
            losses = batch.backward(self.objective.loss(run)) if halves is None else halves.backward(batch, self.objective.loss, run)
            if first:
                return losses, self._columns(run)
            return losses, ratios(self.objective, run) if isinstance(self.objective, ClippedRatio) else None

        def value(run: Run) -> Tensor:
            return batch.backward(martingale_loss(self.value, run))

        self.optimiser.zero_grad()
        losses, said = zip(*batch.each(policy), strict=True)
        out = self._descend(torch.cat(losses), self.optimiser, theta, self.settings.clip_norm, halves)
        for _ in range(self.settings.method.value_updates if self.settings.method.learns_value else 0):
            self.value_optimiser.zero_grad()
            out |= {"value_loss": self._descend(torch.cat(batch.each(value)), self.value_optimiser, list(self.value.parameters()))["loss"]}
        return out, None if said[0] is None else torch.cat(said)

    def _descend(self, losses: Tensor, optimiser: torch.optim.Optimizer, theta: list[nn.Parameter], clip: float = float("inf"),
                 halves: Halves | None = None) -> dict[str, float]:
        """One step of an optimiser along what was pulled; on every process, FloatingPointError and no step when loss or gradient are not finite."""
        n, signal = self.settings.paths, {}
        if halves is not None:
            signal = halves.join(self._joined, (n // 2) / n)
        else:
            for p in theta:
                p.grad = None if p.grad is None else self._joined(p.grad)
        norm = nn.utils.clip_grad_norm_(theta, clip)
        out = _finite({"loss": float(self.accelerator.gather(losses).mean()), "gradient_norm": float(norm), **signal})
        self.moved = True
        optimiser.step()
        return out

    def _joined(self, gradient: Tensor) -> Tensor:
        """Of all processes: every one has as many paths, so that the mean is the joined batch's."""
        return self.accelerator.reduce(gradient, "mean")

    def _ratios(self, later: list[Tensor]) -> dict[str, float]:
        """Of the later epochs of the whole batch; none where there is one epoch, or no ratio."""
        if not later:
            return {}
        mean, largest, clipped = self.accelerator.gather(torch.stack(later, 1)).flatten(0, 1).T
        return {"log_ratio_mean": float(mean.mean()), "log_ratio_max": float(largest.max()), "clipped_share": float(clipped.mean())}

    @torch.no_grad()
    def _columns(self, run: Run) -> Tensor:
        """Reward, objective, KL (nats), what the judge sees where there is one, and the prompt where there are some, (n, 3 to 5)."""
        judged = self.task.judged(run.states[:, -1])
        asked = [] if self.task.prompts is None else [run.prompt.float()]
        return torch.stack([run.reward, run.objective, run.kl, *([] if judged is None else [judged.float()]), *asked], 1)

    def _metrics(self, columns: Tensor) -> dict[str, float]:
        """Of the whole batch: reward, objective, KL (nats), judged share."""
        reward, objective, kl, *more = self.accelerator.gather(columns).T
        row = {"reward": reward.mean(), "objective": objective.mean(), "kl_mean": kl.mean(), "kl_median": kl.median(), "kl_max": kl.max()}
        return {name: float(x) for name, x in row.items()} | ({} if self.task.judge is None else {"judged_share": float(more[0].mean())})

    def _by_prompt(self, columns: Tensor) -> dict[str, Any]:
        """Of the whole batch, for each prompt: reward and KL (nats), with their standard deviations."""
        if self.task.prompts is None:
            return {}
        reward, _, kl, *_, asked = self.accelerator.gather(columns).cpu().T
        return {"prompts": by_prompt(asked.round().long(), reward=reward, kl=kl)}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next update depends on, besides `iteration`."""
        out: dict[str, Tensor] = {}
        kept = _kept(self.policy)
        for name, module in self.modules.items():
            out |= {f"{name}.{key}": p for key, p in module.named_parameters() if name == "value" or key in kept}
        if self.statistics is not None:
            out |= {f"statistics.{key}": x for key, x in self.statistics.state_dict().items()}
        for name, optimiser in self.optimisers.items():
            for index, state in optimiser.state_dict()["state"].items():
                out |= {f"{name}.{index}.{key}": x for key, x in state.items()}
        return out

    def save(self, path: Path) -> None:
        """Keep the state: written by the main process, known to all."""
        if self.accelerator.is_main_process:
            counts = {"iteration": self.iteration, "queries": self.queries}
            save_atomically(self.tensors(), path, {"counts": json.dumps(counts), "base": digest(self.task.base)})
        self.kept = self.iteration

    def load(self, path: Path) -> None:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            described = file.metadata()
        if described["base"] != digest(self.task.base):
            raise ValueError(f"resume: expected the pre-trained model that {path} began with, got another one from {self.settings.cache}")
        counts = json.loads(described["counts"])
        self.iteration, self.queries, self.kept = counts["iteration"], counts["queries"], counts["iteration"]
        kept = _kept(self.policy)
        with torch.no_grad():
            for name, module in self.modules.items():
                for key, p in module.named_parameters():
                    if name == "value" or key in kept:
                        p.copy_(tensors[f"{name}.{key}"])
        if self.statistics is not None:
            if "statistics.mean" not in tensors:
                raise ValueError(f"resume: expected a checkpoint with statistics of prompts, got {path} without (an older version's)")
            self.statistics.load_state_dict({key: tensors[f"statistics.{key}"] for key in self.statistics.state_dict()})
        for name, optimiser in self.optimisers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, x in tensors.items():
                if key.startswith(f"{name}."):
                    _, index, what = key.split(".")
                    state.setdefault(int(index), {})[what] = x
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})

    @contextmanager
    def stopping(self, doing: str, checkpoint: Path) -> Iterator[None]:
        """What cannot go on stops with its place, its method and what is kept; an error of other people's code says so beside where it was raised."""
        def said(why: str) -> str:
            last = f"{checkpoint} (update {self.kept})" if self.kept else "none yet"
            return f"{doing} of {type(self.settings.method).__name__}: {why}; last good checkpoint: {last}"

        try:
            yield
        except (ValueError, FloatingPointError, OSError) as error:
            raise TrainingStopped(said(str(error))) from error
        except Exception as error:
            error.add_note(said("training stopped"))
            raise


@contextmanager
def _swapped(policy: Policy, theta: list[Tensor] | None) -> Iterator[None]:
    """The policy with other parameters inside; None for its own."""
    pairs = [] if theta is None else list(zip(policy.trainable(), theta, strict=True))
    for p, other in pairs:
        p.data, other.data = other.data, p.data
    try:
        yield
    finally:
        for p, other in pairs:
            p.data, other.data = other.data, p.data


def _finite(numbers: dict[str, float]) -> dict[str, float]:
    for name, value in numbers.items():
        if not isfinite(value):
            raise FloatingPointError(f"{name} is {value}")
    return numbers


def _kept(policy: Policy) -> set[str]:
    """Names of the parameters that training moves."""
    return {key for key, p in policy.named_parameters() if p.requires_grad}


def trainable_copy(base: NetworkPolicy, lora_rank: int, lora_targets: tuple[str, ...] = ()) -> tuple[NetworkPolicy, Policy]:
    """(a policy to train that starts at the base model, its frozen reference): a full copy, or one network with a LoRA adapter."""
    network = copy.deepcopy(base.network)
    if lora_rank == 0:
        return NetworkPolicy(network.requires_grad_(True), base.prediction, base.autocast), base
    from peft import LoraConfig, get_peft_model

    targets = list(lora_targets) or "all-linear"
    try:
        adapted = get_peft_model(network, LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=targets))
    except ValueError as error:
        raise ValueError(f"lora_targets: expected ends of names of the network's layers, got {', '.join(lora_targets)}: {error}") from None
    policy = NetworkPolicy(adapted, base.prediction, base.autocast)
    return policy, WithoutAdapter(policy)


def finetune(settings: Finetune) -> dict[str, Any] | None:
    """Run (or resume) a fine-tuning; the summary on the main process, None on the others.

    Source: Scores as Actions (2409.08400); theory.md, sections 7 and 13.   Checked: tests/test_torch_finetune.py::test_run_folder
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    if settings.paths % accelerator.num_processes:
        raise ValueError(f"paths: expected a multiple of {accelerator.num_processes} processes, got {settings.paths}")
    folder = RunFolder(settings) if accelerator.is_main_process else None
    if settings.resume and (done := settings.out / "summary.json").exists():
        return json.loads(done.read_text()) if folder else None
    with closing(_prepared(settings, accelerator)) as task:
        training = Training(task, settings, accelerator)
        checkpoint = settings.out / "checkpoint.safetensors"
        if settings.resume and checkpoint.exists():
            training.load(checkpoint)
        if folder is not None:
            folder.begin(training.iteration)
        _train(training, folder, checkpoint)
        if folder is None:
            return None
        with training.stopping("evaluation", checkpoint):
            return folder.finish(training)


def _prepared(settings: Finetune, accelerator: Accelerator) -> Task:
    """The task, after a few updates of an untrained model on a few paths: what cannot work is refused before the long work, and a plan is printed."""
    with accelerator.main_process_first():
        outlined = outline(settings, accelerator.device)
    if settings.no_plan or (settings.resume and (settings.out / "checkpoint.safetensors").exists()):
        with suppress(FloatingPointError):  # of a model that is not the one to be trained
            Training(outlined, replace(settings, paths=min(settings.paths, 2)), Alone(accelerator.device)).update()
    else:
        _plan(outlined, settings, accelerator)
    with accelerator.main_process_first():  # the others find in the cache what the first has made
        return prepare(settings, accelerator.device, outlined)


def _plan(outlined: Task, settings: Finetune, accelerator: Accelerator) -> None:
    """Printed by the main process; every process tries, as none may go on alone."""
    from ctrl.torch.plan import plan

    try:
        planned = str(plan(outlined, settings, accelerator.num_processes))
    except FloatingPointError as error:  # perhaps of a model that is not trained yet
        planned = f"plan: none, as numbers of its trial are not finite: {error}"
    except torch.OutOfMemoryError:
        planned = "plan: none, as updates of two or three paths in a forward pass do not fit in memory; those of one may, see --at-once"
    gc.collect()  # a trial refers to itself, and holds as much as the run between its updates
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    if accelerator.is_main_process:
        print(planned)


def _train(training: Training, folder: RunFolder | None, checkpoint: Path) -> None:
    """Updates until the last, with their metrics and checkpoints."""
    settings = training.settings
    with progress(type(settings.method).__name__, settings.iterations, shown=folder is not None) as step:
        step(training.iteration)
        while training.iteration < settings.iterations:
            with training.stopping(f"update {training.iteration + 1}", checkpoint):
                row = _updated(training, folder, checkpoint)
                if folder is not None:
                    folder.add(row)
                if training.iteration % settings.checkpoint_every == 0 or training.iteration == settings.iterations:
                    training.save(checkpoint)
            step(1, reward=row["reward"], kl=row["kl_mean"], **({"share": row["judged_share"]} if "judged_share" in row else {}))


def _updated(training: Training, folder: RunFolder | None, checkpoint: Path) -> dict[str, Any]:
    """One update, now and then after a look at the deterministic sampler; when it fails before anything has moved, what was reached is kept,
    if it is worth that."""
    training.moved = False
    try:
        watched = training.deterministic() if training.iteration % DEPLOYED_EVERY == 0 else {}
        return {**training.update(), **watched}
    except Exception:
        if folder is not None and not training.moved and training.iteration > training.kept and training.sound():
            training.save(checkpoint)
        raise


class RunFolder:
    """config.json, env.json, metrics.jsonl, checkpoint, model, pictures and summary.json of one run."""

    def __init__(self, settings: Finetune) -> None:
        """Refuses, before any work, a folder of another run and a board that is not installed."""
        self.settings, self.out = settings, writable(settings.out)
        self.metrics, config = self.out / "metrics.jsonl", self.out / "config.json"
        if config.exists() and not settings.resume:
            raise ValueError(f"out: expected a new folder (or --resume to go on with the run in it), got {settings.out}")
        if config.exists() and (then := json.loads(config.read_text())) != settings.identity():
            changed = [k for k, v in settings.identity().items() if then.get(k) != v]
            raise ValueError(f"resume: expected the settings of the run in {settings.out}, got other values of {', '.join(changed)}")
        self.board = None
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.out / "tensorboard")

    def begin(self, iteration: int) -> None:
        """The folder is this run's; metrics later than the checkpoint belong to updates that will be done again."""
        for leftover in self.out.glob(".*.partial"):
            leftover.unlink()
        write_json(self.out / "config.json", self.settings.identity())
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        surroundings = environment("torch", "accelerate", "diffusers", "peft", "safetensors")
        write_json(self.out / "env.json", {**surroundings, "threads": torch.get_num_threads(), "device": device})
        rows = self.rows()
        partial = self.metrics.with_name(".metrics.jsonl.partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows if row["iteration"] <= iteration))
        os.replace(partial, self.metrics)

    def rows(self) -> list[dict[str, Any]]:
        """The metrics so far; a last line that was cut short is left out."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def add(self, row: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                if name == "prompts":  # a table
                    continue
                self.board.add_scalar(name, value, int(row["iteration"]))

    def finish(self, training: Training) -> dict[str, Any]:
        """Write the model, evaluate it, draw, and write the summary: what has a summary is finished."""
        from ctrl.torch import pictures

        settings, task, policy = self.settings, training.task, training.average
        save_policy(policy, task.base, self.out / "model")
        rows = self.rows()
        summary: dict[str, Any] = {"method": type(settings.method).__name__, "reward": type(settings.reward).__name__, "updates": training.iteration,
                                   "queries": training.queries, "seconds": sum(row["seconds"] for row in rows)}
        paths = {"tuned": evaluation(task, policy, task.base, settings), "pretrained": evaluation(task, task.base, task.base, settings)}
        if settings.eta > 0:
            paths["tuned_ode"] = evaluation(task, policy, task.base, settings, eta=0.0)
        summary |= {model: _finite(measured(task, of)) for model, of in paths.items()}
        if task.prompts is not None:
            summary["prompts"] = table_of_prompts(task, **paths)
        if (best := task.yardstick) is not None:
            summary["yardstick"] = {name: getattr(best, name) for name in ("objective", "objective_error", "reward", "kl", "ess")}
            judged = task.judged(task.reference)
            if judged is not None:
                summary["yardstick"]["judged_share"] = best.mean(judged.double().cpu().numpy())
        if "judged_share" in rows[-1]:
            summary["queries_to_share_0.8"] = queries_to_share(rows, 0.8)
        pictures.before_and_after(task, policy, task.base, settings, self.out)
        pictures.learning_curves(rows, summary, self.out / "curves.png")
        if task.prompts is not None:
            pictures.prompt_rewards(summary["prompts"], summary["reward"], self.out / "prompts.png")
        if self.board is not None:
            self.board.close()
        write_json(self.out / "summary.json", summary)
        return summary


def queries_to_share(rows: list[dict[str, float]], share: float, over: int = 500) -> int | None:
    """Reward queries until the judged share of the last `over` (or more) training images first exceeds `share`; None if never."""
    queries = np.array([0.0, *(row["queries"] for row in rows)])
    accepted = np.concatenate([[0.0], np.cumsum(np.diff(queries) * [row["judged_share"] for row in rows])])
    for k in range(1, len(queries)):
        first = int(np.searchsorted(queries, queries[k] - over, side="right")) - 1
        if first >= 0 and (accepted[k] - accepted[first]) / (queries[k] - queries[first]) > share:
            return int(queries[k])
    return None


def save_policy(policy: NetworkPolicy, base: NetworkPolicy, folder: Path) -> None:
    """The network as safetensors with its config: a denoiser, or a LoRA adapter with its base model in base/; of a pipeline what diffusers loads."""
    if isinstance(base.network, DiffusersNetwork):
        save_tuned(policy.network, folder)
        return
    if isinstance(policy.network, Denoiser):
        save_denoiser(policy.network, folder)
        return
    policy.network.save_pretrained(folder)  # type: ignore[operator]
    save_denoiser(base.network, folder / "base")  # type: ignore[arg-type]


def load_policy(folder: Path) -> NetworkPolicy:
    """A policy that `save_policy` wrote, frozen; safetensors only, no code is run from the file.

    Source: design.md, runs.   Checked: tests/test_torch_finetune.py::test_saved_model_is_the_model
    """
    if not (folder / "adapter_config.json").exists():
        return NetworkPolicy(load_denoiser(folder), PredictsClean()).frozen()
    from peft import PeftModel

    return NetworkPolicy(PeftModel.from_pretrained(load_denoiser(folder / "base"), folder), PredictsClean()).frozen()


def describe(summary: dict[str, Any]) -> str:
    """The summary as a small table."""
    lines = [f"{summary['method']}: {summary['updates']} updates, {summary['queries']} reward queries, {summary['seconds']:.0f} s",
             f"{'':<12}" + "".join(f"{head:>12}" for head in ("judged", "reward", "KL mean", "median", "max", "regret", "+-"))]
    keys = ("judged_share", "reward", "kl_mean", "kl_median", "kl_max", "regret", "regret_error")
    lines += [_cells(name, [row.get(key) for key in keys]) for name in ("pretrained", "tuned", "tuned_ode") if (row := summary.get(name))]
    if best := summary.get("yardstick"):
        cells = [best.get("judged_share"), best["reward"], best["kl"], None, None, 0.0, best["objective_error"]]
        lines.append(_cells("optimum", cells) + f"   (ESS {best['ess']:.0f})")
    return "\n".join(lines)


def _cells(name: str, numbers: list[float | None]) -> str:
    return f"{name:<12}" + "".join(f"{'-' if x is None else format(x, '.3f'):>12}" for x in numbers)
