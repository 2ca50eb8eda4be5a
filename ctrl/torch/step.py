r"""A sampler step of a user's own, the times that it moves between, and a model whose laws are known: what `ctrl audit` works on.

    step(x, t, t_next, model, generator, x_next=None) -> (x_next, log_prob),     Y_t = alpha Y_0 + sigma eps

Data are Gaussian, coordinate by coordinate, so that the best prediction of every kind, and the law at every time, are closed formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from math import pi, prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ctrl import check
from ctrl.files import user_module

SHAPE = (3, 4, 4)
MEAN, COV = (1.0, -0.5), (0.3, 2.0)  # of the coordinates in turn; a variance of 1 would hide errors, VP keeps it whatever the step size
NOISELESS = 1e-6


class Level(NamedTuple):
    """Y_t = alpha Y_0 + sigma eps."""

    alpha: float
    sigma: float

    @property
    def noise(self) -> float:
        """sigma^2/(alpha^2 + sigma^2): from 1, pure noise, to 0, data."""
        return self.sigma**2 / (self.alpha**2 + self.sigma**2)

    def law(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean and variance of Y_t, each of the given shape."""
        m, c = (torch.tensor(values, dtype=torch.float64)[torch.arange(prod(shape)) % 2].reshape(tuple(shape)) for values in (MEAN, COV))
        return self.alpha * m, self.alpha**2 * c + self.sigma**2


class Jump(NamedTuple):
    """One step: from t, at the noise level `here`, to t_next, at `there`."""

    t: Any
    t_next: Any
    here: Level
    there: Level

    def __str__(self) -> str:
        return f"t = {float(self.t):g} -> {float(self.t_next):g}"


Output = Callable[[Tensor, Tensor, Level], Tensor]
# What a network may be trained to say, by the names that diffusers has for it, in terms of x0_hat, eps_hat and the noise level.
OUTPUTS: dict[str, Output] = {
    "epsilon": lambda x0, eps, at: eps,
    "sample": lambda x0, eps, at: x0,
    "v_prediction": lambda x0, eps, at: at.alpha * eps - at.sigma * x0,
    "flow_prediction": lambda x0, eps, at: eps - x0,
    "score": lambda x0, eps, at: -eps / at.sigma}


class Network(nn.Module):
    r"""The best prediction for the Gaussian data, and a departure from it with two parameters.

        model(x, t) = output( E[Y_0 | Y_t = x], E[eps | Y_t = x] ) + theta_0 tanh(x) + theta_1

    x : (n, *shape), any floating dtype, which the output has too      t : a time of the step, as a number or a tensor of any shape
    Computed in float64. ValueError for a t that is none of the step's times.
    Source: theory.md, sections 1 and 16.   Checked: tests/test_audit.py::test_networks_predictions_are_those_of_the_law
    """

    def __init__(self, levels: Mapping[float, Level], output: Output, theta: Sequence[float] = (0.0, 0.0)) -> None:
        super().__init__()
        self.levels, self.output = levels, output
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x: Tensor, t: Any) -> Tensor:
        at, y = self._level(t), x.double()
        (m, P), (m0, c) = at.law(x.shape[1:]), Level(1.0, 0.0).law(x.shape[1:])
        away = (y - m) / P
        best = self.output(m0 + at.alpha * c * away, at.sigma * away, at)
        return (best + self.theta[0] * y.tanh() + self.theta[1]).to(x.dtype)

    def _level(self, t: Any) -> Level:
        asked = float(torch.as_tensor(t).flatten()[0])
        if asked in self.levels:
            return self.levels[asked]
        known = min(self.levels, key=lambda s: abs(s - asked))
        if not abs(known - asked) <= 1e-5 * max(abs(asked), 1.0):
            raise ValueError(f"model: expected to be called at one of TIMES, in the step's own units, got {asked:g}")
        return self.levels[known]


class Moments(NamedTuple):
    """Mean and std of x_next, (g, *shape), and whether they are exact."""

    mean: Tensor
    std: Tensor
    exact: bool

    @property
    def noiseless(self) -> bool:
        return self.exact and self.std.max().item() <= NOISELESS


@dataclass(frozen=True, eq=False)
class Sampler:
    """A user's step with its jumps from noise to data, what its model predicts, and optionally its KL.

    coarser(k) is the same sampler with k times fewer steps.
    Source: theory.md, section 1.   Checked: tests/test_audit.py::test_faithful_steps_pass
    """

    name: str
    step: Callable[..., Any]
    jumps: tuple[Jump, ...]
    output: Output
    shape: tuple[int, ...]
    kl: Callable[..., Any] | None
    coarser: Callable[[int], Sampler]

    def network(self, theta: Sequence[float] = (0.0, 0.0)) -> Network:
        levels = {float(jump.t_next): jump.there for jump in self.jumps} | {float(jump.t): jump.here for jump in self.jumps}
        return Network(levels, self.output, theta)

    def axes(self, last: int) -> tuple[int, ...]:
        """The smallest shape with the step's number of axes, and `last` coordinates along the last."""
        return (*(1,) * (len(self.shape) - 1), last)

    def draw(self, x: Tensor, jump: Jump, model: nn.Module, seed: int, elsewhere: int | None = None) -> tuple[Tensor, Tensor]:
        """x_next from the noise of a seed, and its log_prob; torch's own generator is at that seed too, or at `elsewhere`."""
        torch.manual_seed(seed if elsewhere is None else elsewhere)
        return self._call(x, jump, model, seed, None)

    def score(self, x_next: Tensor, x: Tensor, jump: Jump, model: nn.Module) -> Tensor:
        """log_prob of a given x_next."""
        return self._call(x, jump, model, 2**31 - 1, x_next)[1]

    def _call(self, x: Tensor, jump: Jump, model: nn.Module, seed: int, x_next: Tensor | None) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        with _running(self.name, jump, x):
            out = self.step(x, jump.t, jump.t_next, model, generator, *([] if x_next is None else [x_next]))
        if not (isinstance(out, tuple) and len(out) == 2 and all(isinstance(part, Tensor) for part in out)):
            raise ValueError(f"{self.name}: expected two tensors, (x_next, log_prob), got {type(out).__name__}")
        if out[0].shape != x.shape or out[1].shape != x.shape[:1]:
            raise ValueError(f"{self.name}: expected x_next {tuple(x.shape)} and log_prob {tuple(x.shape[:1])} for x {tuple(x.shape)} (a step on "
                             f"states of another shape needs SHAPE beside it), got {tuple(out[0].shape)} and {tuple(out[1].shape)}")
        return out

    def divergence(self, x: Tensor, jump: Jump, model: nn.Module, reference: nn.Module) -> Tensor:
        """The user's KL, (n,)."""
        assert self.kl is not None
        with _running("kl", jump, x):
            out = self.kl(x, jump.t, jump.t_next, model, reference)
        if not isinstance(out, Tensor) or out.shape != x.shape[:1]:
            raise ValueError(f"kl: expected a tensor {tuple(x.shape[:1])} for x {tuple(x.shape)}, got {tuple(getattr(out, 'shape', ()))}")
        return out

    @torch.no_grad()
    def moments(self, points: Tensor, jump: Jump, model: nn.Module, draws: int, seed: int) -> Moments:
        r"""Mean and std of x_next given x = each of the points (g, *shape), by regression on the noise that the seed stands for.

            x_next = mean + std z,      z = torch.randn(x.shape, generator=generator)

        Exact to rounding where the step's noise is z, in float64 or float32; plain sample moments of `draws` draws where it is not.
        """
        x, shape = points.repeat_interleave(draws, 0), (len(points), draws)
        drawn = self.draw(x, jump, model, seed)[0]
        y = drawn.double().unflatten(0, shape)
        rounding = 16 * torch.finfo(drawn.dtype).eps * y.abs().max()
        for dtype in (torch.float64, torch.float32):
            z = torch.randn(x.shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).double().unflatten(0, shape)
            centred = z - z.mean(1, keepdim=True)
            slope = (centred * y).sum(1) / centred.square().sum(1)
            mean = y.mean(1) - slope * z.mean(1)
            if (y - mean[:, None] - slope[:, None] * z).abs().max() <= 1e-5 * slope.abs().max() + rounding:
                still = slope.abs().max() <= NOISELESS  # or one noise for all rows: another seed tells
                if not still or (self.draw(x, jump, model, seed + 1)[0].double().unflatten(0, shape) - y).abs().max() <= NOISELESS:
                    return Moments(mean, slope.abs(), True)
        return Moments(y.mean(1), y.std(1), False)


@contextmanager
def _running(name: str, jump: Jump, x: Tensor) -> Iterator[None]:
    """What a user's code raises is a ValueError of one line that says where."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name}: expected to run at {jump} with x {tuple(x.shape)}, got {type(error).__name__}: {error}") from error


# ---------------------------------------------------------------------------------------------------- from a file


def sampler_of(reference: str) -> Sampler:
    """The step called NAME in FILE.py, from "FILE.py:NAME": a function with what lies beside it, or a diffusers scheduler.

    TIMES, schedule, kl, PREDICTION, SHAPE and ETA are looked for on NAME first, then in the file.
    Source: DDPO (2305.13301) and its trainers' steps.   Checked: tests/test_audit.py::test_bad_files_are_named_in_one_line
    """
    name, module = user_module("step", reference)
    found = getattr(module, name, None)

    def beside(field: str, default: Any = None) -> Any:
        return getattr(found, field, getattr(module, field, default))

    shape = beside("SHAPE", SHAPE)
    if not (isinstance(shape, tuple) and shape and all(isinstance(size, int) and size > 0 for size in shape)):
        raise ValueError(f"SHAPE: expected a tuple of positive integers, got {shape!r}")
    kl = beside("kl")
    if kl is not None and not callable(kl):
        raise ValueError(f"kl: expected a function (x, t, t_next, model, reference) -> (n,), got {type(kl).__name__}")
    if hasattr(found, "set_timesteps"):
        return _scheduled(name, found, check.number("ETA", beside("ETA", 1.0), at_least=0), shape, kl)
    if not callable(found):
        raise ValueError(f"step: expected {name} to be a function (x, t, t_next, model, generator, x_next=None) or a diffusers scheduler, "
                         f"got {type(found).__name__}")
    return _stepping(name, found, _jumps(beside("TIMES"), beside("schedule")), _output(beside("PREDICTION", "epsilon")), shape, kl)


def _output(prediction: Any) -> Output:
    if prediction not in OUTPUTS:
        raise ValueError(f"PREDICTION: expected one of {', '.join(OUTPUTS)}, got {prediction!r}")
    return OUTPUTS[prediction]


def _jumps(times: Any, schedule: Any) -> tuple[Jump, ...]:
    """The steps between consecutive TIMES, each at its noise level."""
    if times is None or not callable(schedule):
        raise ValueError("step: expected TIMES and a function schedule() beside it, got "
                         + ("no TIMES" if times is None else f"schedule = {type(schedule).__name__}"))
    times = list(times)
    try:
        said = schedule()
    except Exception as error:
        raise ValueError(f"schedule: expected to run, got {type(error).__name__}: {error}") from error
    if isinstance(said, tuple) and len(said) == 2:
        alpha, sigma = (check.array("schedule", _host(part), (len(times),), "(N + 1,), one number for each of TIMES") for part in said)
    else:
        kept = check.array("schedule", _host(said), (len(times),), "(N + 1,), alphas_cumprod at each of TIMES (or a tuple alpha, sigma)")
        if np.any((kept < 0) | (kept > 1)):
            raise ValueError(f"schedule: expected alphas_cumprod in [0, 1], got [{kept.min():g}, {kept.max():g}]")
        alpha, sigma = np.sqrt(kept), np.sqrt(1 - kept)
    if len(times) < 2 or np.any(alpha < 0) or np.any(sigma < 0) or np.any(np.diff(np.arctan2(sigma, alpha)) >= 0):
        raise ValueError("TIMES: expected two or more, from noise to data (sigma/alpha of schedule() falling), got "
                         f"sigma/alpha = {', '.join(f'{s:.4g}/{a:.4g}' for a, s in list(zip(alpha, sigma, strict=True))[:4])} ...")
    levels = [Level(float(a), float(s)) for a, s in zip(alpha, sigma, strict=True)]
    return tuple(map(Jump, times, times[1:], levels, levels[1:]))


def _host(values: Any) -> Any:
    return values.detach().cpu() if isinstance(values, Tensor) else values


def _stepping(name: str, step: Callable[..., Any], jumps: tuple[Jump, ...], output: Output, shape: tuple[int, ...], kl: Any) -> Sampler:
    """A step that goes from any time to any later one: coarser grids leave times out, counted from the last, and keep the first."""
    ends = [*((jump.t, jump.here) for jump in jumps), (jumps[-1].t_next, jumps[-1].there)]

    def coarser(k: int) -> Sampler:
        kept = ends[::-1][::k][::-1]
        kept = kept if len(jumps) % k == 0 else [ends[0], *kept]
        return replace(fine, jumps=tuple(Jump(t, u, here, there) for (t, here), (u, there) in pairwise(kept)))

    fine = Sampler(name, step, jumps, output, shape, kl, coarser)
    return fine


# ---------------------------------------------------------------------------------------------------- diffusers' schedulers


def _scheduled(name: str, scheduler: Any, eta: float, shape: tuple[int, ...], kl: Any) -> Sampler:
    """A diffusers DDIMScheduler or DDPMScheduler whose timesteps are set; eta is DDIM's."""
    from diffusers import DDIMScheduler, DDPMScheduler

    ddim, ddpm = (isinstance(scheduler, kind) for kind in (DDIMScheduler, DDPMScheduler))
    if not (ddim or ddpm) or scheduler.num_inference_steps is None:
        raise ValueError(f"step: expected a DDIMScheduler or a DDPMScheduler after set_timesteps, got {type(scheduler).__name__}"
                         + (" before it" if ddim or ddpm else ""))
    kept, last = scheduler.alphas_cumprod.double(), float(scheduler.final_alpha_cumprod if ddim else 1.0)

    def level(t: int) -> Level:
        at = float(kept[t]) if t >= 0 else last
        return Level(at**0.5, (1 - at) ** 0.5)

    def at_steps(steps: int) -> Sampler:
        own = deepcopy(scheduler)
        if steps != scheduler.num_inference_steps:
            own.set_timesteps(steps)
        times = own.timesteps.tolist()
        stride = own.config.num_train_timesteps // steps
        later = [t - stride for t in times] if ddim else [*times[1:], -1]
        jumps = tuple(Jump(t, u, level(t), level(u)) for t, u in zip(times, later, strict=True))
        return Sampler(name, _density(own, {"eta": eta} if ddim else {}), jumps, _output(own.config.prediction_type), shape, kl,
                       lambda k: at_steps(max(steps // k, 1)))

    return at_steps(scheduler.num_inference_steps)


def _density(scheduler: Any, options: Mapping[str, float]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A scheduler's step with the log-density that it has: mean and std found from two of its draws whose noise is known."""

    def step(x: Tensor, t: int, t_next: int, model: nn.Module, generator: torch.Generator, x_next: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output = model(x, t)

        def moved(generator: torch.Generator) -> Tensor:
            return scheduler.step(output, t, x, generator=generator, **options).prev_sample

        (z0, y0), (z1, y1) = ((torch.randn(x.shape, generator=_seeded(seed), dtype=x.dtype), moved(_seeded(seed))) for seed in (0, 1))
        std = (((y1 - y0) * (z1 - z0)).sum() / (z1 - z0).square().sum()).detach().abs()
        mean = y0 - std * z0
        x_next = moved(generator).detach() if x_next is None else x_next
        if std <= NOISELESS:
            return x_next, torch.zeros(len(x), dtype=x.dtype)
        z = ((x_next - mean) / std).flatten(1)
        return x_next, -0.5 * z.square().sum(1) - z.shape[1] * (std.log() + 0.5 * np.log(2 * pi))

    return step


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
