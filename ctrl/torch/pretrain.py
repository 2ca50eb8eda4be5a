r"""Pre-training by denoising score matching, and the cache that spares it next time.

    min over theta of E | F_theta(t, X_tau) - target |^2,     X_tau = alpha X_0 + sqrt(v) eps,     tau over the sampling grid's range
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ctrl import check
from ctrl.files import write_json
from ctrl.schedule import DiscreteVP, FlowMatching, Schedule, TimeGrid
from ctrl.torch.images import Images
from ctrl.torch.networks import Denoiser, MLPDenoiser, UNetDenoiser
from ctrl.torch.policy import Times

FINAL_TAU = 0.01  # sampling ends here: left-point Euler cannot use the last hundredth of noise time


def sampling_grid(schedule: Schedule, steps: int) -> TimeGrid:
    r"""The grid for images: N steps that get shorter towards the data, tau_i = e + (T - e)(u + u^2)/2, u = 1 - i/N.

    e = T/100; on a discrete schedule of K timesteps e = T/K, diffusers' timestep 0. Flows have a grid of their own.

    A uniform grid leaves noise from its last step, a quadratic one pays more KL in its first; this one has the least KL of one model at N = 20.
    Source: theory.md, section 12.   Checked: tests/test_torch_pretrain.py::test_sampling_grid
    """
    if isinstance(schedule, FlowMatching):
        return schedule.grid(steps)
    u = np.linspace(1, 0, steps + 1)
    final = 1 / schedule.betas.size if isinstance(schedule, DiscreteVP) else FINAL_TAU
    tau = schedule.horizon * (final + (1 - final) * (u + u**2) / 2)
    return TimeGrid([schedule.t(s) for s in tau])


@dataclass(frozen=True)
class Pretraining:
    """How the denoiser is trained: Adam with a warm-up and a cosine, an average of the weights at the end."""

    iterations: int = 6000
    """Optimiser steps."""
    batch: int = 512
    """Noised images a step."""
    learning_rate: float = 3e-3
    """Peak step size of Adam."""
    average: float = 0.999
    """Decay of the exponential average of the weights."""
    width: int = 256
    """Units of a layer."""
    depth: int = 3
    """Layers; of a UNet, residual blocks a level."""
    channels: tuple[int, ...] = ()
    """Channels of a UNet's levels; empty for the perceptron."""

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("batch", 1), ("width", 2), ("depth", 1)):
            check.integer(name, getattr(self, name), at_least=least)
        check.number("learning_rate", self.learning_rate, above=0)
        if not 0 <= check.number("average", self.average) < 1:
            raise ValueError(f"average: expected a decay in [0, 1), got {self.average:g}")

    def network(self, images: Images) -> Denoiser:
        """An untrained denoiser for such images."""
        return UNetDenoiser(images.shape, self.channels, self.depth) if self.channels else MLPDenoiser(images.shape, self.width, self.depth)


def pretrain(images: Images, schedule: Schedule, settings: Pretraining, seed: int, progress: Callable[[float], None] = lambda loss: None,
             device: torch.device | str = "cpu") -> Denoiser:
    """A denoiser of the images, trained from nothing on a device; the same bits for the same arguments on one machine's CPU.

    Source: Karras et al. (2206.00364), section 5.   Checked: tests/test_torch_pretrain.py::test_pretraining_denoises
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        network, pixels = settings.network(images), images.pixels.to(device)
        network.fit(images)
        network.to(device)
        average = copy.deepcopy(network)
        optimiser = torch.optim.Adam(network.parameters(), lr=1.0, betas=(0.9, 0.99), fused=True)
        for k in range(settings.iterations):
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * min(1, (k + 1) / 200) * 0.5 * (1 + cos(pi * k / settings.iterations))
            loss = _denoising_loss(network, pixels, schedule, settings.batch)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            follow(average, network, min(settings.average, (k + 1) / (k + 10)))
            progress(float(loss.detach()))
    return average.eval().requires_grad_(False)


def _denoising_loss(network: Denoiser, pixels: torch.Tensor, schedule: Schedule, batch: int, levels: int = 64) -> torch.Tensor:
    """The batch in `levels` stratified noise levels, denser towards the data."""
    u = (torch.arange(levels) + torch.rand(levels)) / levels
    tau = schedule.horizon * (FINAL_TAU + (1 - FINAL_TAU) * u**1.5).double()
    times = Times(TimeGrid.uniform(1, schedule.horizon), 0, *(torch.tensor([c(float(s)) for s in tau], dtype=torch.float32, device=pixels.device)
                                                              for c in (lambda s: s, schedule.alpha, schedule.v)))
    clean = pixels[torch.randint(len(pixels), (-(-batch // levels), levels), device=pixels.device)]
    c = (-1, *(1,) * (clean.ndim - 2))
    noised = times.alpha.reshape(c) * clean + times.v.sqrt().reshape(c) * torch.randn_like(clean)
    return network.loss(times, noised, clean).mean()


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) network, over parameters."""
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)


def save_denoiser(network: Denoiser, folder: Path) -> None:
    """config.json and model.safetensors, in the way of `save_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"kind": type(network).__name__, "shape": list(network.shape), **network.options})
    save_file({k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}, folder / "model.safetensors")


def load_denoiser(folder: Path) -> Denoiser:
    """What `save_denoiser` wrote."""
    options = json.loads((folder / "config.json").read_text())
    kinds: dict[str, Callable[..., Denoiser]] = {kind.__name__: kind for kind in (MLPDenoiser, UNetDenoiser)}
    if options.get("kind") not in kinds:
        raise ValueError(f"folder: expected a model of {', '.join(kinds)}, got {options.get('kind')!r} in {folder}")
    network = kinds[options.pop("kind")](tuple(options.pop("shape")), **options)
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network.eval()
