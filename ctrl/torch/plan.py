r"""What a run will hold and ask, before it starts: measured on a few paths, not guessed.

    bytes after operation t of an update  =  f_t + b_t n + c_t k + a_t m,      peak = max_t

n paths of the batch, k of them at a time (`micro_batch`), m of these in a forward pass with gradients (`at_once`). An update is the same sequence
of operations at every size, and each holds tensors of 0, n, k or m rows, or of the rows that are left for a last part; updates of two to twelve
paths therefore say what every operation holds at any size. Bytes are those of living storages, on a GPU those that its allocator counts.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctrl.torch.chain import CHUNK_NUMBERS, Problem, Reward, device_of, rows, simulate
from ctrl.torch.finetune import DEPLOYED_EVERY, Alone, Finetune, Training
from ctrl.torch.policy import NetworkPolicy
from ctrl.torch.pretrain import sampling_grid
from ctrl.torch.task import REFERENCE_AT_ONCE, REWARDED_AT_ONCE, Task

GIB = 2**30
DRAWN = 64  # paths of the pictures
Sizes = tuple[int, int, int]  # paths, paths at a time, paths in a forward pass with gradients

# (whether paths come in parts, whether parts pass in pieces): sizes with the same operations, two parts of two pieces at most. None of these is a
# single path, as tensors of one row are views where those of more are copies.
TRIALS: dict[tuple[bool, bool], tuple[Sizes, ...]] = {
    (False, False): ((2, 2, 2), (3, 3, 3)),
    (False, True): ((4, 4, 2), (5, 5, 3), (6, 6, 3)),
    (True, False): ((4, 2, 2), (5, 3, 3), (6, 3, 3)),
    (True, True): ((8, 4, 2), (10, 5, 3), (11, 6, 3), (12, 6, 3))}
DIVIDED: tuple[Sizes, ...] = ((4, 4, 4), (6, 6, 6))  # where all paths would pass at once, and pass in two halves: see `watch.Halves`


class Meter(TorchDispatchMode):
    """Bytes held at every operation inside, most during each: `marks`.

    held : tensors that are there before, which the CPU counts (a GPU's allocator knows them)
    Source: torch.utils._python_dispatch.   Checked: tests/test_torch_plan.py::test_meter_counts_what_lives
    """

    def __init__(self, device: torch.device, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.device, self.marks = device, [0]
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, Any] = {}
        self._total = 0
        self._mark: int | None = None  # of several operations that count as one
        for x in held:
            self._count(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        out = func(*args, **(kwargs or {}))
        if self.device.type == "cuda":
            now = torch.cuda.memory_stats_as_nested_dict(self.device)["allocated_bytes"]["all"]["peak"]
        else:
            for x in tree_leaves((args, kwargs, out)):
                if isinstance(x, Tensor):
                    self._count(x)
            now = self._total
        if self._mark is None:
            self.marks.append(now)
        else:
            self._mark = max(self._mark, now)
        return out

    def _count(self, x: Tensor) -> None:
        if x.layout != torch.strided or x.device.type != self.device.type:
            return
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            self._sizes[key] = size
            self._total += size
            self._watched[key] = weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        del self._watched[key]
        self._total -= self._sizes.pop(key)

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for watched in self._watched.values():  # what lives on needs no meter
            watched.detach()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside is one operation, however many there are: a reward may go from image to image."""
        if self._mark is not None:
            yield
            return
        self._mark = 0
        try:
            yield
        finally:
            self.marks.append(self._mark)
            self._mark = None


@dataclass(frozen=True)
class Phase:
    """A part of a run and what it holds at most, in bytes: fixed, for each path, each path at a time, and each path in a forward pass.

    Source: theory.md, section 7.   Checked: tests/test_torch_plan.py::test_words
    """

    name: str
    sizes: Sizes
    fixed: float
    per_path: float = 0.0
    per_held: float = 0.0
    per_forward: float = 0.0

    @property
    def peak(self) -> float:
        """Bytes."""
        return self.fixed + float(np.dot((self.per_path, self.per_held, self.per_forward), self.sizes))

    def __str__(self) -> str:
        n, k, m = self.sizes
        shares = [(self.per_path * n, f"{n} paths"), (self.per_held * k, f"{k} at a time"), (self.per_forward * m, f"{m} in a forward pass")]
        return f"{self.name:<11} {gib(self.peak)}: {gib(self.fixed)} whatever the paths" + "".join(
            f", {gib(share)} {whose}" for share, whose in shares if share > 0)


@dataclass(frozen=True)
class Asked:
    """Reward queries, images: of this plan, all updates (with predicted images where a value is learned), evaluation with pictures, yardstick.

    Source: theory.md, section 7.   Checked: tests/test_torch_plan.py::test_queries_are_those_of_a_run
    """

    plan: int
    updates: int
    evaluation: int
    yardstick: int

    def __str__(self) -> str:
        parts = {name: count for name, count in asdict(self).items() if count}
        return f"{sum(parts.values()):,} reward queries: " + ", ".join(f"{name} {count:,}" for name, count in parts.items())


@dataclass(frozen=True)
class Plan:
    """Estimated peak memory of a process, and what the whole run asks of reward and networks.

    phases : parts of the run      weights : bytes between updates: parameters, gradients, optimisers      total : the device's, None where unknown
    forwards : states that a denoiser sees, in all
    Source: theory.md, section 7.   Checked: tests/test_torch_plan.py::test_prediction_is_what_is_measured
    """

    phases: tuple[Phase, ...]
    weights: int
    asked: Asked
    forwards: int
    device: str
    total: int | None = None

    @property
    def largest(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def warning(self) -> str | None:
        """What to do where the device is too small; None where it is not, or where nothing is known of it."""
        if self.total is None or self.largest.peak <= self.total:
            return None
        return (f"memory: {self.largest.name} would need {gib(self.largest.peak)}, and {self.device} has {gib(self.total)}. Less is needed with "
                "--micro-batch (paths at a time), --at-once (states in a forward pass), --lora-rank (a small adapter is trained), --precision bf16")

    def __str__(self) -> str:
        lines = [f"plan: peak memory {gib(self.largest.peak)} ({self.device}), in {self.largest.name}; "
                 f"{gib(self.weights)} of it weights, gradients and optimiser"]
        lines += [f"      {phase}" for phase in self.phases]
        lines.append(f"      {self.asked}; {self.forwards:,} states through the network")
        return "\n".join(lines + ([self.warning] if self.warning else []))


def gib(size: float) -> str:
    """Bytes in GiB, or in MiB where they are few.

    Source: IEC 80000-13.   Checked: tests/test_torch_plan.py::test_words
    """
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def plan(task: Task, settings: Finetune, processes: int = 1) -> Plan:
    """What a run of this task will hold and ask; from updates of a few paths on the device where the task's model is.

    task : may be an outline, with an untrained model and without reference samples      processes : that share the paths
    Source: theory.md, section 7.   Checked: tests/test_torch_plan.py::test_prediction_is_what_is_measured
    """
    device, task = device_of(task.base), replace(task, reference=task.reference[:0])
    before = [_reference(task, settings, device)] if settings.reference_samples else []
    trial = Trial(task, settings, device)
    after = [trial.updates(processes), trial.evaluation(), *([trial.yardstick()] if settings.reference_samples and settings.kl_weight else [])]
    if device.type == "cpu":  # where what is saved is copied
        after.append(Phase("checkpoint", (0, 0, 0), trial.weights + _bytes(trial.training.tensors().values())))
    drawn = 4 * settings.reference_samples * task.problem.dim  # held for the yardstick
    phases = (*before, *(replace(phase, fixed=phase.fixed + drawn) for phase in after))
    asked, forwards = trial.asked(), trial.forwards()
    if device.type != "cuda":
        return Plan(phases, trial.weights, asked, forwards, device.type)
    return Plan(phases, trial.weights, asked, forwards, torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory)


def sizes_of(settings: Finetune, processes: int = 1) -> Sizes:
    """Paths of a process, those at a time, and those in a forward pass with gradients.

    Source: theory.md, section 7.   Checked: tests/test_torch_plan.py::test_a_plan_leaves_no_trace
    """
    n = -(-settings.paths // processes)
    k = min(n, settings.micro_batch or n)
    return n, k, min(k, max(1, settings.at_once // settings.steps))


class Trial:
    """A training in its stride, on paths as few as wanted, under a meter; it counts what it asks.

    Source: theory.md, section 7.   Checked: tests/test_torch_plan.py::test_queries_are_those_of_a_run
    """

    def __init__(self, task: Task, settings: Finetune, device: torch.device) -> None:
        self.task, self.settings, self.device = task, settings, device
        self.rewarded = self.passed = 0  # images and states of all trials
        self.each = (0, 0)  # those of an update, for each of its paths
        self.meter: Meter | None = None
        self.training = Training(task, settings, Alone(device))
        self.training.watched = False  # halves of parts are other operations at every size; `updates` adds what they hold
        self.training.problem = replace(self.training.problem, reward=self._counted(task.problem.reward))
        self.networks = {p.network for p in (self.training.policy, task.base) if isinstance(p, NetworkPolicy)}
        n = min(settings.paths, 2)
        self.update((n, n, n))  # what cannot work is refused; what is made once is made
        for optimiser in self.training.optimisers.values():
            _begin(optimiser)
        self.weights = torch.cuda.memory_allocated(device) if device.type == "cuda" else _bytes(self.held())

    def held(self) -> Iterator[Tensor]:
        """What lives between updates."""
        made, task = self.training, self.task
        for module in (made.policy, made.average, made.value, made.problem.pretrained, task.base, task.decode, task.judge):
            for x in () if module is None else (*module.parameters(), *module.buffers()):
                yield x
                if x.grad is not None:
                    yield x.grad
        for optimiser in made.optimisers.values():
            yield from (x for state in optimiser.state.values() for x in state.values())

    def _counted(self, reward: Reward) -> Reward:
        def counted(images: Tensor, context: Any) -> Tensor:
            self.rewarded += len(images)
            with nullcontext() if self.meter is None else self.meter.together():
                return reward(images, context)

        return counted

    def _pass(self, network: nn.Module, given: tuple[Any, ...]) -> None:
        self.passed += given[1].shape[0] * given[1].shape[1]

    def phase(self, name: str, sizes: Sizes, work: Callable[[Sizes], Any], divided: bool = False) -> Phase:
        """Its peak at `sizes`, from trials of few paths; these may be `divided` into halves."""
        n, k, m = sizes
        trials, timelines = DIVIDED if divided else TRIALS[k < n, m < k], []
        for trial in trials:
            gc.collect()
            with Meter(self.device, self.held()) as self.meter:
                work(trial)
            timelines.append(self.meter.marks)
        self.meter = None
        return fitted(name, sizes, trials, timelines)

    def updates(self, processes: int = 1) -> Phase:
        """All of an update: sampling, gradients, steps; with the halves of its gradient, which are its operations where one pass holds them."""
        n, _, m = sizes = sizes_of(self.settings, processes)
        if processes > 1 or m < n or n == 1:
            return self.with_halves(self.phase("updates", sizes, self.update))
        self.training.watched = True
        try:
            return self.phase("updates", sizes, self.update, divided=True)
        finally:
            self.training.watched = False

    def with_halves(self, found: Phase) -> Phase:
        """An update that also says its gradient's signal and noise, from two halves (see `watch.Halves`).

        Beside the rest it holds a leaf where gradients stop, and the first half's gradient: while pieces of the second pass, while parts do that
        find some of the second's there, or in one pass beside the second half's activations, where one of several processes has paths of both.
        """
        n, k, m = found.sizes
        leaf, first = 4 * self.settings.steps * self.task.problem.dim, float(_bytes(self.training.policy.trainable()))
        found = replace(found, per_path=found.per_path + leaf) if k == n else replace(found, per_held=found.per_held + leaf)
        if m == n:
            first = max(0.0, first - found.per_path * n / 2)
        elif k < n and -(-n // k) - n // 2 // k < 2:  # parts with paths of the second half
            first = 0.0
        return replace(found, fixed=found.fixed + first)

    def update(self, sizes: Sizes) -> None:
        """One of so many paths."""
        n, k, m = sizes
        before = self.rewarded, self.passed
        self.training.settings = replace(self.settings, paths=n, micro_batch=k, at_once=m * self.settings.steps)
        hooks = [network.register_forward_pre_hook(self._pass) for network in self.networks]
        try:
            self.training.update()
        finally:
            for hook in hooks:  # whoever copies the network would copy them, and all of this
                hook.remove()
        self.each = (self.rewarded - before[0]) // n, (self.passed - before[1]) // n

    def evaluation(self) -> Phase:
        """Of the averaged policy, with its KL, and of the pictures' paths where these are more."""
        grid, problem = sampling_grid(self.task.problem.schedule, self.settings.steps), self.training.problem

        def work(sizes: Sizes) -> None:
            n, k, _ = sizes
            paths = simulate(problem, self.training.average, grid, self.settings.noise(0, n), self.task.context(n), most=k)
            self.task.judged(paths.terminal)

        n = max(self.settings.samples, DRAWN)
        k = at_a_time(problem, grid.steps, min(n, self.task.most or n))
        return self.phase("evaluation", (n, k, k), work)

    def yardstick(self) -> Phase:
        """Rewards of the reference samples."""
        most = max(trial[0] for trial in TRIALS[False, False])
        x, asked = torch.zeros(most, *self.task.problem.shape, device=self.device), self.task.context(most)

        @torch.no_grad()
        def work(sizes: Sizes) -> None:
            self.training.problem.rewards(x[: sizes[0]], rows(asked, slice(sizes[0])))

        n = min(self.settings.reference_samples, self.task.most or REWARDED_AT_ONCE, REWARDED_AT_ONCE)
        return self.phase("yardstick", (n, n, n), work)

    def asked(self) -> Asked:
        """Reward queries of the whole run, these trials among them."""
        s = self.settings
        models = 3 if s.eta > 0 else 2  # the tuned one at two eta, the pre-trained one
        updates = s.iterations * s.paths * self.each[0] + self.deployed()
        return Asked(self.rewarded, updates, models * s.samples + 2 * DRAWN, s.reference_samples * (s.kl_weight > 0))

    def deployed(self) -> int:
        """Images of the deterministic sampler during the updates."""
        return -(-self.settings.iterations // DEPLOYED_EVERY) * self.settings.paths * (self.settings.eta > 0)

    def forwards(self) -> int:
        """States through a denoiser in the whole run: of the tuned model, its KL wants the pre-trained one beside it."""
        s = self.settings
        evaluation = s.steps * (s.samples * (5 if s.eta > 0 else 3) + 3 * DRAWN)
        updates = s.iterations * s.paths * self.each[1] + 2 * s.steps * self.deployed()
        return self.passed + updates + evaluation + s.reference_samples * s.reference_steps


def _reference(task: Task, settings: Finetune, device: torch.device) -> Phase:
    """Sampling of the pre-trained model, before anything is trained."""
    problem, grid = task.memoryless, sampling_grid(task.problem.schedule, settings.reference_steps)
    n = at_a_time(problem, grid.steps, min(settings.reference_samples, task.most or REFERENCE_AT_ONCE, REFERENCE_AT_ONCE))
    trials, timelines = TRIALS[False, False], []
    for paths, _, _ in trials:
        with Meter(device, (*task.base.parameters(), *task.base.buffers())) as meter:
            simulate(problem, problem.pretrained, grid, settings.noise(0, paths), task.context(paths))
        timelines.append(meter.marks)
    found = fitted("reference", (n, n, n), trials, timelines)
    host = 3 * 4 * settings.reference_samples * problem.dim if device.type == "cpu" else 0  # parts, the whole, a copy that is saved
    return replace(found, fixed=found.fixed + host)


def at_a_time(problem: Problem, steps: int, most: int) -> int:
    """Paths that `simulate` has at a time.

    Source: theory.md, section 1.   Checked: tests/test_torch_plan.py::test_evaluation_and_reference
    """
    return min(most, max(1, CHUNK_NUMBERS // (problem.dim * steps)))


def fitted(name: str, sizes: Sizes, trials: Sequence[Sizes], timelines: Sequence[Sequence[int]]) -> Phase:
    """The phase at other sizes: what each operation holds in terms of them, and the operation that then holds most.

    A last part has n - k rows in the trials, a last piece k - m or n - k - m: negative shares of k or m, which become those of a whole part or piece.
    Timelines of different lengths (a reward that goes from image to image in its backward pass) say their peaks alone.
    Source: theory.md, section 7.   Checked: tests/test_torch_plan.py::test_fit_of_known_timelines
    """
    by_parts, by_pieces = sizes[1] < sizes[0], sizes[2] < sizes[1]
    lines = timelines if len({len(line) for line in timelines}) == 1 else [[max(line)] for line in timelines]
    columns = [0, *([1] if by_parts else []), *([2] if by_pieces else [])]
    solved = np.linalg.solve(np.array([[1, *(trial[j] for j in columns)] for trial in trials], float), np.array(lines, float))
    share = np.zeros((4, solved.shape[1]))
    share[[0, *(j + 1 for j in columns)]] = np.round(solved, 3)
    fixed, n, k, m = share
    piece, first = np.minimum(m, 0), k >= 0 if by_parts else np.zeros_like(k, bool)  # of last pieces; whether of the first part
    m, k, n = m - 2 * piece, k + np.where(first, piece, -piece * by_parts), n + np.where(first, 0, piece)
    part = np.minimum(k, 0)
    n, k = n + part, k - 2 * part
    share[1:] = n, k, m
    at = int(np.argmax(fixed + np.array(sizes) @ share[1:]))
    return Phase(name, sizes, *(float(x) for x in share[:, at]))


def _begin(optimiser: torch.optim.Optimizer) -> None:
    """Gradients and moments are there from now on, as after the first update; nothing moves along a gradient of zero."""
    for group in optimiser.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimiser.step()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of different storages."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())
