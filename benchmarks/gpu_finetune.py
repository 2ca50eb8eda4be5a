r"""Fine-tuning U-Nets, 10 million parameters on MNIST or Stable Diffusion's 860: images/s, updates/s, memory, FLOP utilisation, time to a reward.

    python benchmarks/gpu_finetune.py --data-dir DIR [--out FILE.csv] [--only WORD ...]      (MNIST's IDX files in DIR, one GPU)
    python benchmarks/gpu_finetune.py --latents [--out FILE.csv] ...                         (Stable Diffusion's U-Net, random weights, one GPU)
    python benchmarks/gpu_finetune.py --tiny [--latents]                                     (8x8 digits, any machine, half a minute)

    sampling   N network calls an image, without gradients, by precision, memory layout, compiler and batch
    updates    whole updates of value-gradient fine-tuning (sampling, losses, backward passes, Adam), in the same variants
    to share   every method, from one pre-trained model, until the judged share of its last 500 training images exceeds .8

    MFU = (model FLOPs an image) (images/s) / (peak FLOP/s),      a multiply-add is two

Model FLOPs are those of matrix products and convolutions, forward and backward, counted by torch on two paths; activations that are recomputed
to save memory do not count. Peaks are dense ones of data sheets, at the precision of the row; MFU is empty on other devices.
Warm-up (compilation, choice of kernels) is timed apart and, in training, undone by a checkpoint. The clock is read when the device is idle.
Every finished row is in the CSV file at once, and a second call goes on from there; the figure beside it is drawn from the rows.
Run on an H200, rows in benchmarks/gpu_finetune/ (`--rounds 2`): latents, 10 to 30 s a case at a batch of 8, 90 s at 64, 50 to compile a sampler, 7
to 28 for a plan; the two rows of 80 recomputed states were planned before a plan knew that such a pass goes in two halves. Images (before kernels
were searched only where asked), 5 to 35 s a case, half a minute more to compile a sampler, and more than two minutes to compile an update;
pre-training (1500 steps, only for the cases to a share, which have not been run) three minutes.
"""

from __future__ import annotations

import copy
import csv
import gc
import json
import os
import platform
import resource
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

import matplotlib

matplotlib.use("Agg")
import torch
import tyro
from accelerate import Accelerator
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ctrl.files import versions
from ctrl.schedule import DiscreteVP
from ctrl.torch.chain import Problem, sample
from ctrl.torch.compare import name_of
from ctrl.torch.finetune import Finetune, Training, queries_to_share, trainable_copy
from ctrl.torch.images import Images
from ctrl.torch.methods import ALL, Method, ScoreFunction, ValueGradient
from ctrl.torch.pictures import BLACK, BLUE, GREEN, ORANGE
from ctrl.torch.pipelines import DiffusersUNet
from ctrl.torch.plan import Trial, gib
from ctrl.torch.policy import NetworkPolicy, PredictsNoise
from ctrl.torch.pretrain import Pretraining, sampling_grid
from ctrl.torch.rewards import CallableImageReward
from ctrl.torch.task import Settings, Task, outline, prepare

WARM_UP = 2  # calls before the clock: compilation, choice of kernels, recording of graphs
COUNTED = 2  # paths on which FLOPs are counted: the least that has a leave-one-out baseline
SHAPES = 64  # that one network may be compiled for; dynamo's own limit is 8

Precision = Literal["fp32", "tf32", "bf16"]

_HOPPER = {"bf16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12}
_AMPERE = {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}
# Dense FLOP/s of NVIDIA's data sheets, by the exact name of the device: a slice of one (MIG) has another name, and no entry.
PEAKS: dict[str, dict[Precision, float]] = {
    "NVIDIA H200": _HOPPER, "NVIDIA H100 80GB HBM3": _HOPPER, "NVIDIA H100 PCIe": {"bf16": 756e12, "tf32": 378e12, "fp32": 51e12},
    "NVIDIA A100-SXM4-80GB": _AMPERE, "NVIDIA A100-SXM4-40GB": _AMPERE, "NVIDIA A100 80GB PCIe": _AMPERE, "NVIDIA A100-PCIE-40GB": _AMPERE}


# ------------------------------------------------------------------------------------------- how a network is computed


@dataclass(frozen=True)
class Compiler:
    """torch.compile's backend and mode."""

    backend: str = "inductor"
    mode: str | None = None

    @property
    def name(self) -> str:
        return "compiled" if self == Compiler() else f"compiled:{self.mode or self.backend}"


@dataclass(frozen=True)
class Tuning:
    """How the U-Net is computed; what it computes is the same up to rounding."""

    precision: Precision = "fp32"
    channels_last: bool = False
    compiler: Compiler | None = None
    recomputed: bool = False  # activations inside the U-Net, by diffusers' gradient checkpointing
    searched: bool = False  # cuDNN tries its kernels at every new shape and keeps the fastest, whatever memory it takes

    @property
    def name(self) -> str:
        return " ".join([self.precision, *["channels_last"] * self.channels_last, *([self.compiler.name] if self.compiler else []),
                         *["recomputed"] * self.recomputed, *["searched"] * self.searched])

    def policy(self, base: NetworkPolicy) -> NetworkPolicy:
        """A frozen copy of the base model in this memory layout and precision; copies of it keep both."""
        network = copy.deepcopy(base.network)
        if self.channels_last:
            network.core.to(memory_format=torch.channels_last)
        if self.recomputed:
            network.core.enable_gradient_checkpointing()
        return NetworkPolicy(network, base.prediction, torch.bfloat16 if self.precision == "bf16" else None).frozen()

    def compile(self, *policies: nn.Module) -> None:
        """Compile the U-Nets in place, one graph a shape: names of parameters, copies and files stay those of the plain network."""
        if self.compiler is not None:
            for policy in policies:
                policy.network.core.compile(backend=self.compiler.backend, mode=self.compiler.mode, fullgraph=True, dynamic=False)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The process' switches of this tuning; what was compiled inside is forgotten at the end."""
        tf32, cudnn = self.precision != "fp32", torch.backends.cudnn
        switches = [(torch.backends.cuda.matmul, "allow_tf32", tf32), (cudnn, "allow_tf32", tf32), (cudnn, "benchmark", self.searched)]
        before = [(where, name, getattr(where, name)) for where, name, _ in switches]
        try:
            for where, name, value in switches:
                setattr(where, name, value)
            with torch._dynamo.config.patch(recompile_limit=SHAPES):
                yield
        finally:
            for where, name, value in before:
                setattr(where, name, value)
            torch.compiler.reset()


def peak_flops(device: str, precision: Precision) -> float | None:
    """Dense FLOP/s that the device is sold with; None for one that is not in the table."""
    return PEAKS[device][precision] if device in PEAKS else None


def model_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and convolutions in a call, and in backward passes inside it; a multiply-add is two."""
    with sdpa_kernel(SDPBackend.MATH), _Counter() as counter:  # as matrix products, attention counts on every device
        call()
    return counter.total


class _Counter(TorchDispatchMode):
    """The sum of torch's own counts; its FlopCounterMode also follows modules, and fails where a gradient of a leaf is asked for."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


# ------------------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Row:
    """One case; a call is a batch that is sampled, or an update; rates are over all timed calls; empty: does not apply, or was not reached."""

    case: str
    work: str
    method: str
    tuning: str
    batch: int
    steps: int
    parameters: int
    warm_up_seconds: float | None = None
    calls: int | None = None
    images: int | None = None
    seconds: float | None = None
    slowest_over_fastest: float | None = None
    images_per_second: float | None = None
    calls_per_second: float | None = None
    network_flops: float | None = None  # of one forward pass on one state
    flops_per_image: float | None = None
    flops_per_second: float | None = None
    peak_flops: float | None = None
    mfu: float | None = None
    peak_memory_bytes: int | None = None  # allocated by torch on a GPU while timed; elsewhere the process' resident memory at its largest so far
    planned_memory_bytes: int | None = None  # what updates were to hold of a GPU, by ctrl.torch.plan; not where compiled or searched
    share: float | None = None  # judged, of the last update; so are the reward and the KL
    reward: float | None = None
    kl: float | None = None
    share_wanted: float | None = None
    queries_to_share: int | None = None
    seconds_to_share: float | None = None
    graphs: int | None = None  # that were compiled
    stopped: str = ""


@dataclass(frozen=True, eq=False)
class Bench:
    """What the cases share: the model and its task, made when they are first asked for, the device, and how often a call is timed."""

    settings: Finetune
    accelerator: Accelerator
    rounds: int

    @cached_property
    def untrained(self) -> Task:
        """The task with an untrained model, which takes as long to compute."""
        return outline(self.settings, self.accelerator.device)

    @cached_property
    def task(self) -> Task:
        with Tuning("tf32").applied():  # whatever the case that asks: pre-training is the longest piece of work
            return prepare(self.settings, self.accelerator.device, self.untrained)

    @property
    def data(self) -> str:
        return self.settings.data

    def update_flops(self, case: Trains) -> dict[str, float]:
        """Counted in a training of its own, as what is compiled cannot be counted."""
        training = self.training(case, COUNTED)
        return {"network_flops": self.network_flops(training.problem), "flops_per_image": model_flops(training.update) / COUNTED}

    @property
    def on_gpu(self) -> bool:
        return self.accelerator.device.type == "cuda"

    @property
    def device(self) -> str:
        return torch.cuda.get_device_name(self.accelerator.device) if self.on_gpu else self.accelerator.device.type

    def tuned(self, tuning: Tuning, task: Task) -> Task:
        """The task with its base model computed in another way."""
        base = tuning.policy(task.base)
        return replace(task, base=base, problem=replace(task.problem, pretrained=base))

    def training(self, case: Trains, paths: int) -> Training:
        return Training(self.tuned(case.tuning, case.task(self)), self.settings_of(case, paths), self.accelerator)

    def settings_of(self, case: Trains, paths: int) -> Finetune:
        return replace(self.settings, method=case.method, paths=paths, at_once=case.at_once, lora_rank=case.lora_rank, lora_targets=ATTENTION)

    def planned_memory(self, case: Trains) -> int | None:
        """Bytes of the GPU, from updates of two to six paths; a meter sees no compiled network, and no plan what a search will choose."""
        if not self.on_gpu or case.tuning.compiler is not None or case.tuning.searched:
            return None
        try:
            return self._planned(case)
        except torch.OutOfMemoryError:  # of three paths in a forward pass, where the case itself may have one
            return None
        finally:
            self.release()  # what a trial has held, which nothing names any more

    def _planned(self, case: Trains) -> int:
        task, settings = self.tuned(case.tuning, case.task(self)), self.settings_of(case, case.paths)
        return round(Trial(task, settings, self.accelerator.device).updates().peak)

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call, from an idle device to an idle device."""
        self.wait()
        began = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.accelerator.device)

    def forget_peak_memory(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.accelerator.device)

    def peak_memory(self) -> int:
        if self.on_gpu:
            return torch.cuda.max_memory_allocated(self.accelerator.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def release(self) -> None:
        """Return what a case has left on the device."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def network_flops(self, problem: Problem) -> int:
        """Of one forward pass of the U-Net on one state."""
        return passed_flops(problem, problem.pretrained.network, self.accelerator.device)


def passed_flops(problem: Problem, network: nn.Module, device: torch.device | str, backward: bool = False) -> int:
    """Of one forward pass of a policy's network on one state, with its backward pass to the parameters where it is asked for."""
    x = torch.zeros(1, 1, *problem.shape, device=device)
    times = problem.times(sampling_grid(problem.schedule, 1), x)[:1]
    return model_flops(lambda: network(times, x, None).sum().backward() if backward else network(times, x, None))


@dataclass(frozen=True, eq=False)
class Latents(Bench):
    """Stable Diffusion's U-Net with random weights on latents, and a reward that costs nothing: its shape, size and cost, without its images."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    side: int = 64
    prompt: tuple[int, int] = (77, 768)  # tokens, and numbers in each

    @property
    def data(self) -> str:
        return "latents"

    @cached_property
    def untrained(self) -> Task:
        from diffusers import UNet2DConditionModel

        device, plain, shape = self.accelerator.device, len(self.channels) - 1, (4, self.side, self.side)
        schedule = DiscreteVP.scaled_linear()
        with torch.random.fork_rng(devices=[device] if self.on_gpu else []), torch.device(device):
            torch.manual_seed(self.settings.seed)
            core = UNet2DConditionModel(
                sample_size=self.side, block_out_channels=self.channels, cross_attention_dim=self.prompt[1], attention_head_dim=8,
                down_block_types=("CrossAttnDownBlock2D",) * plain + ("DownBlock2D",),
                up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * plain)
            base = NetworkPolicy(DiffusersUNet(core, schedule, [torch.randn(self.prompt)]), PredictsNoise()).frozen()
        reward = CallableImageReward(lambda latents: latents.flatten(1).mean(1), differentiable=True)
        problem = Problem(schedule, base, reward, shape, self.settings.kl_weight, self.settings.eta)
        images = Images(torch.zeros(1, *shape, device="cpu"))
        return Task(images, problem, base, None, None, images.pixels[:0])

    @cached_property
    def counted(self) -> dict[int, dict[str, float]]:
        """`update_flops` by rank of the adapter, on which alone they depend."""
        return {}

    def update_flops(self, case: Trains) -> dict[str, float]:
        """Of score functions: a network for the sample, one for s, and mu with its gradient; counted on no device, where all fits."""
        if case.lora_rank in self.counted:
            return self.counted[case.lora_rank]
        base = copy.deepcopy(self.untrained.base).to("meta")
        with torch.device("meta"):
            policy, _ = trainable_copy(base, case.lora_rank, ATTENTION)
        network, sampled, trained = (passed_flops(self.untrained.problem, p.network, "meta", backward) for p, backward in (
            (base, False), (policy, False), (policy, True)))
        self.counted[case.lora_rank] = {"network_flops": network, "flops_per_image": self.settings.steps * (network + sampled + trained)}
        return self.counted[case.lora_rank]


@dataclass(frozen=True)
class Case(ABC):
    """A piece of work, and how its network is computed."""

    work: ClassVar[str]
    tuning: Tuning

    @property
    @abstractmethod
    def name(self) -> str:
        """Which no other case has."""

    @abstractmethod
    def blank(self, bench: Bench) -> Row:
        """What is known before."""

    @abstractmethod
    def measured(self, bench: Bench) -> Row:
        """What is known after."""

    def task(self, bench: Bench) -> Task:
        """Whose model is used: speed is that of an untrained one."""
        return bench.untrained


def rates(row: Row, bench: Bench, tuning: Tuning, seconds: Sequence[float], flops_per_image: float, **known: Any) -> Row:
    """The row with all that follows from the seconds of its calls, of `row.batch` images each."""
    images, total, peak = row.batch * len(seconds), sum(seconds), peak_flops(bench.device, tuning.precision)
    speed = images / total
    return replace(row, calls=len(seconds), images=images, seconds=total, slowest_over_fastest=max(seconds) / min(seconds),
                   images_per_second=speed, calls_per_second=len(seconds) / total, flops_per_image=flops_per_image,
                   flops_per_second=speed * flops_per_image, peak_flops=peak, mfu=speed * flops_per_image / peak if peak else None,
                   peak_memory_bytes=bench.peak_memory(), **known)


@dataclass(frozen=True)
class Sampling(Case):
    """Batches of images from the pre-trained model, their noise and rewards included."""

    work: ClassVar[str] = "sampling"
    batch: int

    @property
    def name(self) -> str:
        return f"sampling {self.tuning.name} x {self.batch}"

    def blank(self, bench: Bench) -> Row:
        return Row(self.name, self.work, "", self.tuning.name, self.batch, bench.settings.steps, size(self.task(bench).base))

    def measured(self, bench: Bench) -> Row:
        problem = bench.tuned(self.tuning, self.task(bench)).problem
        policy, grid = problem.pretrained, sampling_grid(problem.schedule, bench.settings.steps)

        def call(k: int, paths: int = self.batch) -> None:
            sample(problem, policy, grid, bench.settings.noise(k, paths))

        network = bench.network_flops(problem)
        flops = bench.settings.steps * network + model_flops(lambda: problem.rewards(torch.zeros(1, *problem.shape, device=bench.accelerator.device)))
        self.tuning.compile(policy)
        warm_up = bench.seconds(lambda: [call(k) for k in range(WARM_UP)])
        bench.forget_peak_memory()
        seconds = [bench.seconds(lambda k=k: call(WARM_UP + k)) for k in range(bench.rounds)]
        return rates(self.blank(bench), bench, self.tuning, seconds, flops, warm_up_seconds=warm_up, network_flops=network)


@dataclass(frozen=True)
class Trains(Case, ABC):
    """Updates of a method on so many paths each; at most `at_once` states in one forward pass with gradients."""

    method: Method
    paths: int
    at_once: int
    lora_rank: int = field(default=0, kw_only=True)

    def blank(self, bench: Bench) -> Row:
        return Row(self.name, self.work, name_of(self.method), self.tuning.name, self.paths, bench.settings.steps, size(self.task(bench).base))

    @abstractmethod
    def warm(self, training: Training) -> None:
        """A few updates before the clock."""

    def ready(self, bench: Bench) -> tuple[Training, dict[str, float]]:
        """A training that is compiled and warm; and what was found on the way."""
        found, training = dict(bench.update_flops(self)), bench.training(self, self.paths)
        self.tuning.compile(training.policy, training.problem.pretrained)
        found["warm_up_seconds"] = bench.seconds(lambda: self.warm(training))
        bench.forget_peak_memory()
        return training, found


@dataclass(frozen=True)
class Updates(Trains):
    """The first updates of a training."""

    work: ClassVar[str] = "updates"

    @property
    def name(self) -> str:
        adapter = f" LoRA {self.lora_rank}" * bool(self.lora_rank)
        return f"updates {name_of(self.method)}{adapter} {self.tuning.name} x {self.paths} (at once {self.at_once})"

    def warm(self, training: Training) -> None:
        for _ in range(1 if self.tuning.compiler is None else WARM_UP):  # Adam's moments are there after one
            training.update()

    def measured(self, bench: Bench) -> Row:
        planned = bench.planned_memory(self)
        training, found = self.ready(bench)
        row = replace(self.blank(bench), planned_memory_bytes=planned)
        return rates(row, bench, self.tuning, [bench.seconds(training.update) for _ in range(bench.rounds)], **found)


@dataclass(frozen=True)
class ToShare(Trains):
    """A training until the judged share of the last `over` (or more) training images first exceeds `share`, or to its last update."""

    work: ClassVar[str] = "to share"
    share: float
    over: int

    @property
    def name(self) -> str:
        return f"to share {self.share:g} {name_of(self.method)} {self.tuning.name} x {self.paths}"

    def task(self, bench: Bench) -> Task:
        return bench.task

    def warm(self, training: Training) -> None:
        """Undone by a checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            start = Path(folder) / "start.safetensors"
            training.save(start)
            for _ in range(WARM_UP):
                training.update()
            training.load(start)

    def measured(self, bench: Bench) -> Row:
        training, found = self.ready(bench)
        rows, seconds, queries, stopped = self.updates(training, bench)
        last = rows[-1] if rows else {}
        row = replace(self.blank(bench), share=last.get("judged_share"), reward=last.get("reward"), kl=last.get("kl_mean"), share_wanted=self.share,
                      queries_to_share=queries, seconds_to_share=None if queries is None else sum(seconds), stopped=stopped)
        return rates(row, bench, self.tuning, seconds, **found) if seconds else replace(row, **found)

    def updates(self, training: Training, bench: Bench) -> tuple[list[dict[str, float]], list[float], int | None, str]:
        """Metrics and seconds of every update, the queries that it took, and why there are no more where the method broke down."""
        rows: list[dict[str, float]] = []
        seconds: list[float] = []
        while training.iteration < training.settings.iterations:
            try:
                seconds.append(bench.seconds(lambda: rows.append(training.update())))
            except (ValueError, FloatingPointError) as error:
                return rows, seconds, None, f"update {len(rows) + 1}: {error}"
            queries = queries_to_share(rows, self.share, self.over)
            if queries is not None:
                return rows, seconds, queries, ""
        return rows, seconds, None, ""


def size(module: nn.Module) -> int:
    """How many parameters."""
    return sum(p.numel() for p in module.parameters())


def run(case: Case, bench: Bench) -> Row:
    """The case's row; where the device's memory is too small for it, a row that says so."""
    counters.clear()
    try:
        with case.tuning.applied():
            return replace(case.measured(bench), graphs=counters["stats"]["unique_graphs"])
    except torch.OutOfMemoryError:
        return replace(case.blank(bench), stopped="out of memory")
    finally:
        bench.release()


# ------------------------------------------------------------------------------------------- cases


BEST = Tuning("bf16", True, Compiler())
STAGES = (Tuning("fp32"), Tuning("tf32"), Tuning("bf16"), Tuning("bf16", True), Tuning("bf16", False, Compiler()), BEST)
UNET = Pretraining(iterations=1500, batch=512, learning_rate=5e-4, depth=2, channels=(64, 128, 192))
START = Finetune(steps=20, paths=128, iterations=200, pretraining=UNET, reference_samples=2000, reference_steps=50)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # what an adapter adapts
AT_ONCE = 1280  # states whose activations, 18 MiB each in fp32, are kept at a time
CASES: list[Case] = [
    *(Sampling(tuning, 1024) for tuning in STAGES), *(Sampling(BEST, batch) for batch in (64, 256, 4096)),
    Sampling(Tuning("bf16", True, Compiler(mode="reduce-overhead")), 64), Sampling(Tuning("bf16", True, Compiler(mode="max-autotune")), 4096),
    *(Updates(tuning, ValueGradient(), START.paths, AT_ONCE) for tuning in STAGES),
    Updates(BEST, ValueGradient(), START.paths, 2 * AT_ONCE), Updates(BEST, ValueGradient(), 8 * START.paths, 2 * AT_ONCE),
    *(ToShare(BEST, method, START.paths, AT_ONCE, share=0.8, over=500) for method in ALL)]

# Adam in steps that random weights survive; on the latents of an image at a time, N states.
SLOW = ScoreFunction(learning_rate=1e-5)
LATENTS_START = Finetune(steps=10, paths=8)
LATENTS_BATCHES = (8, 16, 32, 64)
LATENTS: list[Case] = [
    *(Sampling(Tuning("bf16"), batch) for batch in LATENTS_BATCHES),
    *(Updates(Tuning("bf16"), SLOW, batch, LATENTS_START.steps) for batch in LATENTS_BATCHES),
    *(Updates(Tuning("bf16"), SLOW, batch, LATENTS_START.steps, lora_rank=4) for batch in LATENTS_BATCHES),
    Updates(Tuning("bf16", searched=True), SLOW, 8, LATENTS_START.steps),
    Updates(Tuning("bf16", recomputed=True), SLOW, 8, LATENTS_START.steps),
    *(Updates(Tuning("bf16", recomputed=True), SLOW, 8, 8 * LATENTS_START.steps, lora_rank=rank) for rank in (0, 4)),
    Sampling(Tuning("fp32"), 8), Sampling(Tuning("tf32"), 8), Sampling(Tuning("bf16", True), 64), Sampling(Tuning("bf16", searched=True), 64),
    Sampling(BEST, 64)]

TINY_START = Finetune(steps=2, paths=8, iterations=3, quick=True, threads=1, reference_samples=16, reference_steps=2,
                      pretraining=Pretraining(iterations=20, batch=64, learning_rate=5e-3, depth=1, channels=(8,)))
TINY: list[Case] = [
    Sampling(Tuning(), 32), Sampling(Tuning("bf16", True), 32), Updates(Tuning(), ScoreFunction(), 8, 8),
    Updates(Tuning("bf16", True, Compiler("eager")), ScoreFunction(), 8, 16),  # traced as for the others, but needs no C++ compiler
    *(ToShare(Tuning(), replace(method, value_updates=2), 8, 16, share=0.1, over=16) for method in ALL)]
TINY_LATENTS: list[Case] = [Sampling(Tuning(), 4), Updates(Tuning("bf16"), SLOW, 4, 2), Updates(Tuning(recomputed=True), SLOW, 4, 8, lora_rank=2)]


# ------------------------------------------------------------------------------------------- rows and figure


def environment(case: Case, bench: Bench) -> dict[str, str]:
    """What a row's numbers depend on besides its case: settings, device, versions, seed; as the CSV file has it."""
    identity = {name: value for name, value in bench.settings.identity().items() if name != "data_dir"}
    settings = sha256(json.dumps([repr(case), bench.rounds, identity], sort_keys=True).encode()).hexdigest()[:12]
    about = {"data": bench.data, "settings": settings, "device": bench.device, "machine": f"{processor()}, {platform.machine()}",
             "cores": os.cpu_count(), **versions("torch", "diffusers", "accelerate"), "cuda": torch.version.cuda or "",
             "cudnn": torch.backends.cudnn.version() or "", "seed": bench.settings.seed}
    return {name: str(value) for name, value in about.items()}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def read(path: Path) -> list[dict[str, str]]:
    """The rows that are there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """A reader sees the old rows or the new ones."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def cells(row: Row) -> dict[str, str]:
    return {name: "" if value is None else str(value) for name, value in asdict(row).items()}


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Speed and utilisation of every case, and what each method took to the share, where there are such; from the rows of one device."""
    speed, methods = ([row for row in rows if (row["work"] == "to share") is share and row["images_per_second"]] for share in (False, True))
    heights = [max(2, len(part)) for part in (speed, methods) if part] or [2]
    figure, axes = plt.subplots(len(heights), 2, figsize=(10, 0.4 + 0.6 * len(heights) + 0.26 * sum(heights)), layout="constrained", sharey="row",
                                height_ratios=heights, squeeze=False)
    if speed:
        draw_speed(axes[0], speed)
    if methods:
        draw_shares(axes[-1], methods)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['data']}, U-Net of {int(rows[0]['parameters']) / 1e6:.3g} M parameters, N = {rows[0]['steps']}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_speed(axes: Sequence[Axes], rows: list[dict[str, str]]) -> None:
    names, colors = [row["case"] for row in rows], [BLUE if row["work"] == "sampling" else ORANGE for row in rows]
    bars(axes[0], names, [row["images_per_second"] for row in rows], colors, "images/s (blue: sampling; orange: updates)")
    bars(axes[1], names, [row["mfu"] for row in rows], colors, "model FLOP utilisation (share of the precision's peak)")
    if not any(row["mfu"] for row in rows):
        axes[1].set_xticks([])
        axes[1].text(0.5, 0.5, f"no peak FLOP/s is known of {rows[0]['device']}", ha="center", va="center", transform=axes[1].transAxes)


def draw_shares(axes: Sequence[Axes], rows: list[dict[str, str]]) -> None:
    for axis, reached, spent, what in zip(axes, ("seconds_to_share", "queries_to_share"), ("seconds", "images"), ("seconds", "reward queries"),
                                          strict=True):
        bars(axis, [row["method"] for row in rows], [row[reached] or row[spent] for row in rows],
             [GREEN if row[reached] else "none" for row in rows],
             f"{what} to a judged share above {rows[0]['share_wanted']}\n(outline: spent without reaching it)")


def bars(axis: Axes, labels: list[str], values: list[str], colors: list[str], label: str) -> None:
    """Horizontal bars, the first on top, each with its number; an empty value has none."""
    known = [(place, float(value), color) for place, (value, color) in enumerate(zip(values, colors, strict=True)) if value]
    drawn = axis.barh([place for place, *_ in known], [value for _, value, _ in known], color=[color for *_, color in known], edgecolor=BLACK, lw=0.8)
    axis.bar_label(drawn, [f"{float(f'{value:.3g}'):,g}" for _, value, _ in known], padding=3, fontsize=7)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.margins(x=0.2)
    axis.set_xlabel(label, fontsize=8)
    axis.tick_params(axis="x", labelsize=7)


def describe(row: dict[str, str]) -> str:
    """One line for the terminal."""
    if row["stopped"] and not row["images_per_second"]:
        return f"{row['case']}: {row['stopped']}"
    planned = f" ({gib(int(row['planned_memory_bytes']))} planned)" if row["planned_memory_bytes"] else ""
    parts = [f"{float(row['images_per_second']):.4g} images/s", f"{float(row['calls_per_second']):.3g} calls/s",
             gib(int(row["peak_memory_bytes"])) + planned, f"warm-up {float(row['warm_up_seconds']):.1f} s"]
    if row["mfu"]:
        parts.insert(1, f"MFU {float(row['mfu']):.3f}")
    if row["work"] == "to share":
        took = f"{row['queries_to_share']} queries, {float(row['seconds_to_share']):.1f} s" if row["queries_to_share"] else "not reached"
        parts.append(f"share {row['share_wanted']}: {took}{'; ' * bool(row['stopped'])}{row['stopped']}")
    return f"{row['case']}: " + ", ".join(parts)


def finish(cases: Sequence[Case], bench: Bench, rows: list[dict[str, str]], out: Path) -> list[str]:
    """Measure the cases that are not in `rows`, add them and write as they come; names of those that failed, which spoil no other."""
    failed = []
    for case in cases:
        if of_case(case, bench, rows):
            continue
        try:
            rows.append({**cells(run(case, bench)), **environment(case, bench)})
        except Exception:
            traceback.print_exc()
            failed.append(case.name)
            continue
        write(out, rows)
        print(describe(rows[-1]), flush=True)
    return failed


def of_case(case: Case, bench: Bench, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Its rows of this device, these versions, these settings, this seed."""
    about = environment(case, bench).items()
    return [row for row in rows if row["case"] == case.name and about <= row.items()]


def main(tiny: bool = False, latents: bool = False, data_dir: Path | None = None, out: Path = Path("gpu_finetune.csv"),
         only: tuple[str, ...] = (), rounds: int = 5, seed: int = 0, cache: Path = Settings.cache) -> None:
    """Measure what is missing from the rows, and draw them.

    Args:
        tiny: a small network on small images; what a machine without a GPU does anyway.
        latents: Stable Diffusion's U-Net with random weights, in the place of MNIST's.
        data_dir: folder of MNIST's IDX files, for the full configuration.
        out: the CSV file; the figure stands beside it.
        only: cases whose name has all of these words (default: all cases).
        rounds: timed calls of a case.
        seed: of everything random.
        cache: where the pre-trained network is kept.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if not tiny and accelerator.device.type != "cuda":
        print("no CUDA device: the tiny configuration")
        tiny = True
    bench, cases = _latents(tiny, accelerator, rounds, seed) if latents else _images(tiny, data_dir, accelerator, rounds, seed, cache)
    if bench.settings.threads is not None:
        torch.set_num_threads(bench.settings.threads)
    cases = [case for case in cases if all(word in case.name.split() for word in only)]
    if not cases:
        raise ValueError(f"only: expected words of some case's name, got {' '.join(only)}")
    rows = read(out)
    columns = [*(column.name for column in fields(Row)), *environment(cases[0], bench)]
    if rows and list(rows[0]) != columns:
        raise ValueError(f"out: expected a new file, or one with the columns {', '.join(columns)}, got another one in {out}")
    failed = finish(cases, bench, rows, out)
    found = [row for case in cases for row in of_case(case, bench, rows)]
    if found:
        draw(found, out.with_suffix(".png"))
    if failed:
        raise SystemExit(f"{len(failed)} of {len(cases)} cases failed: {'; '.join(failed)}")


def _images(tiny: bool, data_dir: Path | None, accelerator: Accelerator, rounds: int, seed: int, cache: Path) -> tuple[Bench, list[Case]]:
    if not tiny and data_dir is None:
        raise ValueError("data_dir: expected a folder with MNIST's IDX files, got none (or --tiny)")
    start = TINY_START if tiny else replace(START, data="mnist", data_dir=data_dir)
    return Bench(replace(start, seed=seed, cache=cache), accelerator, rounds), TINY if tiny else CASES


def _latents(tiny: bool, accelerator: Accelerator, rounds: int, seed: int) -> tuple[Bench, list[Case]]:
    if tiny:
        return Latents(replace(TINY_START, seed=seed), accelerator, rounds, channels=(32, 64), side=8, prompt=(3, 16)), TINY_LATENTS
    return Latents(replace(LATENTS_START, seed=seed), accelerator, rounds), LATENTS


if __name__ == "__main__":
    tyro.cli(main)
