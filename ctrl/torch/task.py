"""What fine-tuning starts from: settings, data, pre-trained model, reward, judge and yardstick, and how a model is judged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ctrl import check
from ctrl.files import CACHE, user_object, writable
from ctrl.noise import Noise
from ctrl.schedule import VP
from ctrl.torch import images as data
from ctrl.torch import methods, preferences, rewards
from ctrl.torch.chain import Paths, Problem, rows, simulate
from ctrl.torch.classifiers import Classifier, ConvClassifier, MLPClassifier, train_classifier
from ctrl.torch.networks import Denoiser
from ctrl.torch.pipelines import Decoded, OfImages, Pretrained, Prompts, prompts_of
from ctrl.torch.policy import NetworkPolicy, Policy, PredictsClean
from ctrl.torch.pretrain import Pretraining, pretrain, sampling_grid
from ctrl.torch.prompts import by_prompt
from ctrl.torch.workers import Pooled
from ctrl.torch.yardstick import Yardstick, average, yardstick

SCHEDULE = VP()
ATTEMPTS = 3
EVALUATION, PRETRAINED, PICTURES, WATCHED = (2**31 + k for k in range(4))  # noise streams beside those of the updates, 0 ... 2^31 - 1
REFERENCE_AT_ONCE, REWARDED_AT_ONCE = 1000, 2000  # reference samples drawn and rewarded at a time, at most


@dataclass(frozen=True)
class ClassReward:
    """Log-probability of a class under a classifier trained on one half of the data; another classifier, of the other half, judges."""

    label: int = 3
    """The class."""


@dataclass(frozen=True)
class UserReward:
    """A function of your own, (images) or (images, context) -> (n,)."""

    function: str
    """FILE.py:NAME."""
    differentiable: bool = False
    """Whether torch can differentiate it."""
    attempts: int = ATTEMPTS
    """How often it is asked where it cannot be reached (OSError: a server, a file), after 1, 2, 4 ... seconds; or where its process dies."""

    def __post_init__(self) -> None:
        check.integer("attempts", self.attempts, at_least=1)

    def digest(self) -> str | None:
        """Of the file: another content is another reward."""
        file = Path(self.function.rpartition(":")[0])
        return sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else None


def _summary(kind: type) -> str:
    """The first paragraph of a docstring, for the command line's help."""
    return (getdoc(kind) or "").split("\n\n")[0]


RewardChoice = (
    Annotated[ClassReward, tyro.conf.subcommand("class")]
    | Annotated[rewards.Brightness, tyro.conf.subcommand("brightness", description=_summary(rewards.Brightness))]
    | Annotated[rewards.Contrast, tyro.conf.subcommand("contrast", description=_summary(rewards.Contrast))]
    | Annotated[rewards.Compressibility, tyro.conf.subcommand("compressibility", description=_summary(rewards.Compressibility))]
    | Annotated[rewards.Incompressibility, tyro.conf.subcommand("incompressibility", description=_summary(rewards.Incompressibility))]
    | Annotated[preferences.CLIPScore, tyro.conf.subcommand("clip-score", description=_summary(preferences.CLIPScore))]
    | Annotated[preferences.PickScore, tyro.conf.subcommand("pick-score", description=_summary(preferences.PickScore))]
    | Annotated[preferences.Aesthetic, tyro.conf.subcommand("aesthetic", description=_summary(preferences.Aesthetic))]
    | Annotated[preferences.LearnedImageReward, tyro.conf.subcommand("image-reward", description=_summary(preferences.LearnedImageReward))]
    | Annotated[UserReward, tyro.conf.subcommand("user")])


@dataclass(frozen=True)
class Settings:
    """What the numbers of a run depend on: data, model, reward, sampler and updates."""

    method: methods.Choice = methods.ValueGradient()
    """What moves the policy."""
    reward: RewardChoice = ClassReward()
    """What is asked of the images."""
    data: Literal["digits", "mnist", "folder"] = "digits"
    """scikit-learn's digits, IDX files, or any folder of images (the last two in --data-dir)."""
    data_dir: Path | None = None
    """Where the data are."""
    pipeline: str | None = None
    """A pipeline of diffusers (folder or hub id) in the place of data and pre-training: DDPM, DDIM, Stable Diffusion (1, 2, 3)."""
    prompts: tuple[str, ...] = ()
    """What is asked of a pipeline with prompts: prompts, or a file with one a line; paths take them in turn."""
    prompt_template: str = "{}"
    """What each prompt is put into."""
    guidance: float = 1.0
    """Classifier-free guidance, as part of the action that is trained and sampled; 1: none."""
    image_size: int = 32
    """Side of the images of a folder, pixels."""
    kl_weight: float = 0.5
    """Reward units per nat."""
    eta: float = 1.0
    """Stochasticity of the sampler: 1 reverse SDE, 0 probability-flow ODE."""
    steps: int = 30
    """Sampler steps N."""
    paths: int = 64
    """Images sampled (and reward queries) per update, over all processes."""
    iterations: int = 250
    """Updates."""
    average: float = 0.99
    """Decay of the exponential average of the policy that is kept."""
    clip_norm: float = 1.0
    """Largest norm of the policy's gradient."""
    lora_rank: int = 0
    """Rank of a LoRA adapter; 0 trains all parameters."""
    lora_targets: tuple[str, ...] = ()
    """Ends of the names of the layers that it adapts, for instance to_q to_k to_v to_out.0; none: all linear layers."""
    plain_value: tyro.conf.FlagCreatePairsOff[bool] = False
    """A value network without the paper's skeleton."""
    precision: Literal["no", "bf16"] = "no"
    """Compute precision of the networks; states, log-densities and KL stay float32."""
    at_once: int = 2**16
    """States in one forward pass with gradients; beyond it activations are recomputed: less memory, the same numbers."""
    micro_batch: int | None = None
    """Paths (of a process) at a time; their gradients are summed before the step: what networks and reward hold does not grow with --paths."""
    trajectories: Literal["stored", "seeds"] = "stored"
    """What is kept of paths between micro-batches: their states, or their rewards alone, to sample them again from their noise."""
    pretraining: Pretraining = Pretraining()
    """How the model is trained before."""
    samples: int = 2000
    """Images of the final evaluation."""
    reference_samples: int = 20_000
    """Images of the pre-trained model behind the yardstick J*; 0 for no yardstick, as for models that take long to sample."""
    reference_steps: int = 100
    """Sampler steps of these."""
    reward_workers: int = 0
    """Processes that judge images side by side, where the reward's gradient is not asked for (under torchrun: of each process); 0: none."""
    seed: int = 0
    """Seed of everything random."""
    threads: int | None = None
    """CPU threads of torch (default: its own choice)."""
    cache: Path = CACHE
    """Where pre-trained networks and their samples are kept."""
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """A tiny run that only shows that everything works."""

    def __post_init__(self) -> None:
        for name in ("steps", "paths", "iterations", "reference_steps", "image_size", "at_once"):
            check.integer(name, getattr(self, name), at_least=1)
        check.integer("samples", self.samples, at_least=2)  # fewer have no standard error
        if check.integer("reference_samples", self.reference_samples, at_least=0) == 1:
            raise ValueError("reference_samples: expected none, or at least 2 for a standard error, got 1")
        if self.micro_batch is not None:
            check.integer("micro_batch", self.micro_batch, at_least=1)
        for name in ("epochs", "value_updates"):
            check.integer(f"method.{name}", getattr(self.method, name), at_least=1)
        for name in ("learning_rate", "value_learning_rate"):
            check.number(f"method.{name}", getattr(self.method, name), above=0)
        for name in ("kl_weight", "eta"):
            check.number(name, getattr(self, name), at_least=0)
        check.number("clip_norm", self.clip_norm, above=0)
        check.integer("lora_rank", self.lora_rank, at_least=0)
        if check.integer("reward_workers", self.reward_workers, at_least=0) and (self.method.differentiates or isinstance(self.reward, ClassReward)):
            what = "the class reward, whose classifier is here" if isinstance(self.reward, ClassReward) else (
                f"{type(self.method).__name__}, which asks for the reward's gradient")
            raise ValueError(f"reward_workers: expected 0 with {what}, got {self.reward_workers}")
        if check.integer("seed", self.seed, at_least=0) >= 2**31:
            raise ValueError(f"seed: expected an integer below 2^31, got {self.seed}")
        if self.threads is not None:
            check.integer("threads", self.threads, at_least=1)
        if not 0 <= check.number("average", self.average) < 1:
            raise ValueError(f"average: expected a decay in [0, 1), got {self.average:g}")
        if self.pipeline is not None and isinstance(self.reward, ClassReward):
            raise ValueError("reward: expected one that needs no classes with a pipeline (brightness, compressibility, user ...), got class")
        if self.pipeline is None and (self.prompts or self.guidance != 1):
            raise ValueError("pipeline: expected one for prompts or guidance, got None")
        if (self.data == "digits") != (self.data_dir is None):
            wanted = "none" if self.data == "digits" else "a folder"
            raise ValueError(f"data_dir: expected {wanted} with data = {self.data}, got {self.data_dir}")

    def made_quick(self) -> Self:
        """Smaller in everything, on one thread unless told; nothing that comes out means anything."""
        asked = max(1, len(prompts_of(self.prompts, self.prompt_template)))
        few = 256 // asked * asked if asked <= 128 else 0  # as many of each prompt
        return replace(self, iterations=min(self.iterations, 4), paths=min(self.paths, 16), steps=min(self.steps, 8), samples=64,
                       reference_samples=min(self.reference_samples, few), reference_steps=10, threads=self.threads or 1,
                       pretraining=replace(self.pretraining, iterations=60, batch=128, width=64))

    @property
    def most(self) -> int | None:
        """Paths at a time where they are sampled beside the updates: no more than these hold, where a reward or a decoder is the larger part."""
        return self.micro_batch or (None if self.pipeline is None else self.paths)

    def noise(self, stream: int, paths: int) -> Noise:
        """Noise of update `stream`, or of one of the streams beside the updates."""
        return Noise((self.seed << 32) + stream, paths)

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on, as JSON; where and how they are computed is not part of it."""
        named: dict[str, list[Any]] = {name: [type(part).__name__, asdict(part)] for name, part in (("method", self.method), ("reward", self.reward))}
        if isinstance(self.reward, UserReward):
            named["reward"].append(self.reward.digest())
        named["prompts"] = list(prompts_of(self.prompts, self.prompt_template))  # whatever their file is called, and says later
        fields = {name: value for name, value in asdict(self).items() if name not in self.elsewhere}
        return json.loads(json.dumps({**fields, **named}, default=str))

    elsewhere: ClassVar[tuple[str, ...]] = ("at_once", "micro_batch", "trajectories", "reward_workers", "threads", "cache")


@dataclass(frozen=True, eq=False)
class Task:
    r"""What fine-tuning starts from: the pre-trained model, the reward, the judge, and the yardstick.

    problem : its `pretrained` is the base model      judged : images -> (n,) bool, or None where the reward has no classes
    reference : samples of the base model on a fine grid, behind J*; none for no yardstick
    images : the data, None of a pipeline      prompts : of a pipeline that has some      decode : states to images, for the reward and pictures
    most : paths sampled, decoded and rewarded at a time beside the updates; None for as many as their states allow
    """

    images: data.Images | None
    problem: Problem
    base: NetworkPolicy
    judge: Classifier | None
    label: int | None
    reference: Tensor
    prompts: Prompts | None = None
    decode: Decoded = field(default_factory=Decoded)
    most: int | None = None

    def context(self, paths: int, first: int = 0) -> Prompts | None:
        """The prompts of so many paths from number `first` on, in turn."""
        return None if self.prompts is None else self.prompts.cycled(paths, first)

    def close(self) -> None:
        """End the processes of the reward, where it has some."""
        reward = self.problem.reward.reward if isinstance(self.problem.reward, OfImages) else self.problem.reward
        if isinstance(reward, Pooled):
            reward.close()

    def judged(self, images: Tensor) -> Tensor | None:
        """Whether the judge sees the wanted class, (n,), bool."""
        if self.judge is None:
            return None
        with torch.no_grad():
            return self.judge.to(images.device)(images).argmax(1) == self.label

    @property
    def memoryless(self) -> Problem:
        """What reference samples are drawn of: at eta = 1 and in full precision whatever the fine-tuning's, as J* belongs to the data's own tilt."""
        exact = NetworkPolicy(self.base.network, self.base.prediction)
        return replace(self.problem, pretrained=exact, eta=1.0, reward=lambda x, context: x.flatten(1).sum(1))

    @cached_property
    def reference_rewards(self) -> np.ndarray:
        """Rewards of the reference samples, (n,)."""
        with torch.no_grad():
            asked, size = self.context(len(self.reference)), min(self.most or REWARDED_AT_ONCE, REWARDED_AT_ONCE)
            parts = [self.problem.rewards(self.reference[a : a + size], rows(asked, slice(a, a + size))) for a in range(0, len(self.reference), size)]
        return torch.cat(parts).double().cpu().numpy()

    @cached_property
    def yardsticks(self) -> list[Yardstick]:
        """J* and what belongs to it, of each prompt (one without prompts); none without a price of the KL or without reference samples."""
        if self.problem.kl_weight == 0 or len(self.reference) == 0:
            return []
        each = 1 if self.prompts is None else len(self.prompts)
        return [yardstick(self.reference_rewards[j::each], self.problem.kl_weight) for j in range(each)]

    @cached_property
    def yardstick(self) -> Yardstick | None:
        """The yardsticks' average over prompts, or None."""
        return average(self.yardsticks) if self.yardsticks else None


def outline(settings: Settings, device: torch.device | str = "cpu") -> Task:
    """The task with an untrained model at the data's mean and without reference samples: made in seconds, to try an update on."""
    if settings.pipeline is not None:
        return _of_pipeline(settings, device)
    images = _images(settings)
    reward, judge, label = _reward(settings, images, _Cache.of(settings, images))
    network = settings.pretraining.network(images)
    network.mean.copy_(images.pixels.flatten(1).mean(0))
    base = _policy(network, settings, device)
    problem = Problem(SCHEDULE, base, reward, images.shape, settings.kl_weight, settings.eta)
    return Task(images, problem, base, judge, label, reference=images.pixels[:0], most=settings.most)


def prepare(settings: Settings, device: torch.device | str = "cpu", outlined: Task | None = None) -> Task:
    """Data, networks and reference samples, from the cache where they are there; `outlined` saves reading the data again."""
    task = outlined or outline(settings, device)
    if task.images is None:
        return replace(task, reference=_Cache.named(settings, digest(task.base)).reference(task, settings).to(device))
    store = _Cache.of(settings, task.images)
    base = _policy(store.denoiser(task.images, settings, device), settings, device)
    task = replace(task, problem=replace(task.problem, pretrained=base), base=base)
    return replace(task, reference=store.reference(task, settings).to(device))


def _of_pipeline(settings: Settings, device: torch.device | str) -> Task:
    """The task of a pipeline: its model, its space, its prompts; the reward sees images."""
    assert settings.pipeline is not None
    autocast = torch.bfloat16 if settings.precision == "bf16" else None
    found = Pretrained.load(settings.pipeline, prompts_of(settings.prompts, settings.prompt_template), settings.guidance, autocast, device)
    asked = 1 if found.prompts is None else len(found.prompts)
    if settings.kl_weight > 0 and (settings.reference_samples % asked or 0 < settings.reference_samples < 2 * asked):
        raise ValueError(f"reference_samples: expected 0 or a multiple of {asked} prompts, at least two of each, got {settings.reference_samples}")
    reward = OfImages(_asked_of(settings), found.decode)
    problem = Problem(found.schedule, found.base, reward, found.shape, settings.kl_weight, settings.eta)
    return Task(None, problem, found.base, None, None, torch.empty(0, *found.shape), found.prompts, found.decode, settings.most)


def _unlabelled(chosen: RewardChoice) -> rewards.ImageReward:
    """A reward that needs no data."""
    if isinstance(chosen, UserReward):
        name, function = user_object("reward", chosen.function)
        if function is None:
            raise ValueError(f"reward: expected {name} in the file of {chosen.function}, got none of that name")
        return rewards.CallableImageReward(rewards.retried(function, chosen.attempts), chosen.differentiable)
    assert not isinstance(chosen, ClassReward)
    return chosen


@dataclass(frozen=True)
class _Made:
    """A choice becomes a reward, in whichever process that is; what a user's file says must still be what it said."""

    chosen: RewardChoice
    digest: str | None

    @classmethod
    def of(cls, chosen: RewardChoice) -> _Made:
        return cls(chosen, chosen.digest() if isinstance(chosen, UserReward) else None)

    def __call__(self) -> rewards.ImageReward:
        if self != _Made.of(self.chosen):
            raise ValueError("reward: expected the user's file to stay as it is while a run asks it, got another content")
        return _unlabelled(self.chosen)


def _asked_of(settings: Settings) -> rewards.ImageReward:
    """The reward, here or in its processes."""
    reward = _unlabelled(settings.reward)
    if settings.reward_workers == 0:
        return reward
    attempts = settings.reward.attempts if isinstance(settings.reward, UserReward) else ATTEMPTS
    return Pooled(reward, _Made.of(settings.reward), settings.reward_workers, attempts)


def digest(module: nn.Module) -> str:
    """A name for a module's numbers."""
    return sha256(b"".join(x.cpu().contiguous().numpy().tobytes() for x in module.state_dict().values())).hexdigest()[:16]


def _policy(network: Denoiser, settings: Settings, device: torch.device | str) -> NetworkPolicy:
    return NetworkPolicy(network, PredictsClean(), torch.bfloat16 if settings.precision == "bf16" else None).to(device).frozen()


def _images(settings: Settings) -> data.Images:
    if settings.data_dir is None:
        return data.digits()
    return data.mnist(settings.data_dir) if settings.data == "mnist" else data.image_folder(settings.data_dir, settings.image_size)


def _fingerprint(images: data.Images) -> str:
    return sha256(images.pixels.numpy().tobytes() + (b"" if images.labels is None else images.labels.numpy().tobytes())).hexdigest()[:16]


def _reward(settings: Settings, images: data.Images, store: _Cache) -> tuple[rewards.ImageReward, Classifier | None, int | None]:
    chosen = settings.reward
    if not isinstance(chosen, ClassReward):
        return _asked_of(settings), None, None
    if images.labels is None:
        raise ValueError(f"reward: expected data with classes for a class reward, got {images.name}, which has none")
    if not 0 <= chosen.label < images.classes:
        raise ValueError(f"label: expected a class of the data (0 ... {images.classes - 1}), got {chosen.label}")
    classifier, judge = store.classifiers(images, settings)
    return rewards.ClassLogProbability(classifier, chosen.label), judge, chosen.label


@dataclass(frozen=True)
class _Cache:
    """Files named by what they depend on, written atomically."""

    folder: Path
    key: dict[str, Any]

    @classmethod
    def of(cls, settings: Settings, images: data.Images) -> _Cache:
        return cls.named(settings, _fingerprint(images))

    @classmethod
    def named(cls, settings: Settings, source: str) -> _Cache:
        """Of data, or of a model."""
        try:
            folder = writable(settings.cache.expanduser())
        except ValueError as error:
            raise ValueError(str(error).replace("out:", "cache:", 1)) from None
        return cls(folder, {"data": source, "seed": settings.seed, "torch": torch.__version__})

    def path(self, name: str, **key: Any) -> Path:
        digest = sha256(json.dumps({**self.key, **key}, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return self.folder / f"{name}-{digest}.safetensors"

    def tensors(self, path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if not path.exists():
            save_atomically(make(), path)
        return load_file(path)

    def denoiser(self, images: data.Images, settings: Settings, device: torch.device | str) -> Denoiser:
        path = self.path("denoiser", pretraining=asdict(settings.pretraining), schedule=asdict(SCHEDULE))
        network = settings.pretraining.network(images)

        def make() -> dict[str, Tensor]:
            with progress("pre-training", settings.pretraining.iterations) as step:
                trained = pretrain(images, SCHEDULE, settings.pretraining, settings.seed, lambda loss: step(1, loss=loss), device)
            return dict(trained.state_dict())

        network.load_state_dict(self.tensors(path, make))
        return network

    def classifiers(self, images: data.Images, settings: Settings) -> tuple[Classifier, Classifier]:
        """The reward's and the judge's, of different architecture and on disjoint halves."""
        halves, out = images.split(settings.seed), []
        steps, first = 50 if settings.quick else 400, 2 * settings.seed
        for name, kind, half, seed in (("reward", MLPClassifier, halves[0], first), ("judge", ConvClassifier, halves[1], first + 1)):
            network = kind(images.shape, images.classes, seed)

            def make(network: Classifier = network, half: data.Images = half, seed: int = seed, steps: int = steps) -> dict[str, Tensor]:
                return dict(train_classifier(network, half, seed=seed, steps=steps).state_dict())

            network.load_state_dict(self.tensors(self.path(name, kind=kind.__name__, steps=steps), make))
            out.append(network.eval().requires_grad_(False))
        return out[0], out[1]

    def reference(self, task: Task, settings: Settings) -> Tensor:
        if settings.reference_samples == 0:
            return torch.empty(0, *task.problem.shape)
        grid = sampling_grid(task.problem.schedule, settings.reference_steps)
        path = self.path("reference", pretraining=asdict(settings.pretraining), n=settings.reference_samples, times=grid.times.tolist(),
                         **({} if task.prompts is None else {"prompts": task.prompts.texts, "guidance": settings.guidance}))

        def make() -> dict[str, Tensor]:
            unrewarded = task.memoryless
            noise, parts, asked = settings.noise(PRETRAINED, settings.reference_samples), [], task.context(settings.reference_samples)
            with progress("sampling the pre-trained model", settings.reference_samples) as step:
                for first in range(0, settings.reference_samples, REFERENCE_AT_ONCE):
                    some = slice(first, first + REFERENCE_AT_ONCE)
                    part, context = noise[some], rows(asked, some)
                    parts.append(simulate(unrewarded, unrewarded.pretrained, grid, part, context, most=task.most).terminal.cpu())
                    step(part.paths)
            return {"images": torch.cat(parts)}

        return self.tensors(path, make)["images"]


def save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A reader sees the old file or the new one, whenever the process dies; OSError when the disk is full."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        host = {k: v.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for k, v in tensors.items()}  # no second copy on a GPU
        save_file(host, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def progress(what: str, total: int, shown: bool = True) -> Iterator[Callable[..., None]]:
    """A bar, on a terminal; `step(n, **numbers)` moves it."""
    with tqdm(total=total, desc=what, disable=None if shown else True, leave=False, delay=1) as bar:
        def step(n: int = 1, **numbers: float) -> None:
            bar.set_postfix(numbers, refresh=False)
            bar.update(n)

        yield step


def evaluate(task: Task, policy: Policy, pretrained: Policy, settings: Settings, *, steps: int | None = None,
             eta: float | None = None) -> dict[str, float]:
    r"""Reward, KL, objective and regret of a policy from `settings.samples` fresh images, with standard errors.

    regret = J* - J in reward units; at another number of steps or eta than it was trained with, the same policy is sampled on that chain.
    pair_distance: mean distance of two images that the judge gives to the class.
    Source: theory.md, sections 9, 11 and 12.   Checked: tests/test_torch_finetune.py::test_evaluation_of_the_pretrained_model
    """
    return measured(task, evaluation(task, policy, pretrained, settings, steps=steps, eta=eta))


def evaluation(task: Task, policy: Policy, pretrained: Policy, settings: Settings, *, steps: int | None = None, eta: float | None = None) -> Paths:
    """The fresh paths of an evaluation, of the prompts in turn."""
    problem = replace(task.problem, pretrained=pretrained, eta=settings.eta if eta is None else eta)
    return simulate(problem, policy, sampling_grid(problem.schedule, steps or settings.steps), settings.noise(EVALUATION, settings.samples),
                    task.context(settings.samples), most=task.most)


def measured(task: Task, paths: Paths) -> dict[str, float]:
    """The numbers of an evaluation."""
    n, j = len(paths.objective), float(paths.objective.mean())
    row = {"reward": float(paths.reward.mean()), "objective": j, "objective_error": float(paths.objective.std()) / n**0.5,
           "kl_mean": float(paths.penalty.mean()), "kl_median": float(paths.penalty.median()), "kl_max": float(paths.penalty.max())}
    if (best := task.yardstick) is not None:
        row |= {"regret": best.objective - j, "regret_error": float(np.hypot(best.objective_error, row["objective_error"]))}
    judged = task.judged(paths.terminal)
    if judged is not None:
        row |= {"judged_share": float(judged.float().mean()), "pair_distance": pair_distance(paths.terminal[judged])}
    return row


def table_of_prompts(task: Task, **models: Paths) -> list[dict[str, Any]]:
    """For each prompt that the evaluations asked: reward and KL (nats) of each model with standard errors, and regret where there is a yardstick.

    Source: theory.md, section 9.   Checked: tests/test_torch_pipelines.py::test_a_run_says_how_each_prompt_fared
    """
    if task.prompts is None:
        return []
    asked = torch.tensor([j % len(task.prompts) for j in range(len(next(iter(models.values())).reward))])
    table: dict[int, dict[str, Any]] = {}
    for model, paths in models.items():
        for row in by_prompt(asked, reward=paths.reward.cpu(), kl=paths.penalty.cpu(), objective=paths.objective.cpu()):
            number, root = row["prompt"], row["paths"] ** 0.5
            numbers = {name: row[name] for name in ("reward", "kl")}
            numbers |= {f"{name}_error": None if (std := row[f"{name}_std"]) is None else std / root for name in ("reward", "kl")}
            if task.yardsticks:
                best, std = task.yardsticks[number], row["objective_std"]
                numbers |= {"regret": best.objective - row["objective"],
                            "regret_error": None if std is None else float(np.hypot(best.objective_error, std / root))}
            table.setdefault(number, {"prompt": task.prompts.texts[number], "paths": row["paths"]})[model] = numbers
    return list(table.values())


def pair_distance(images: Tensor, most: int = 1000) -> float:
    """Mean Euclidean distance of two different images (of the first `most`); 0 for fewer than two."""
    x = images[:most].flatten(1)
    return float(torch.pdist(x).mean()) if len(x) > 1 else 0.0


