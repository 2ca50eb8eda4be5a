r"""Networks for images: denoisers preconditioned by the data's own Gaussian fit, and the value's network.

    D(tau, x) = m + U [ c_skip z + c_out F(c_in z, level) ],      z = U'(x/alpha - m),   s^2 = v/alpha^2
    c_skip = l/(s^2 + l),   c_out = sqrt(s^2 l/(s^2 + l)),   c_in = 1/sqrt(s^2 + l)

(m, U diag(l) U') is the mean and covariance of the data, or U = 1 and l = their average: with F = 0 the denoiser is that Gaussian's
own. Karras et al. (2206.00364), table 1, per principal axis. Time enters once per grid step, never per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from math import gcd, pi, prod
from typing import Any

import torch
from torch import Tensor, nn

from ctrl.torch.images import Images
from ctrl.torch.policy import Times

FREQUENCIES = 16
TRAINED_TIMES = 1000  # diffusers' networks take times on the scale of their training steps


def noise_level(times: Times) -> Tensor:
    """The log of v/alpha^2, (k,), squeezed into [0, 1]: 0 for clean images, 1 for noise."""
    return 0.5 * (1 + (0.125 * (times.v.log() - 2 * times.alpha.log())).tanh())


class TimeFeatures(nn.Module):
    """Sines and cosines of the noise level, (k,) -> (k, 2 FREQUENCIES); smooth and bounded on a schedule's range."""

    width = 2 * FREQUENCIES

    def forward(self, times: Times) -> Tensor:
        level = noise_level(times)
        angle = 0.5 * pi * level[:, None] * torch.arange(1, FREQUENCIES + 1, device=level.device)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResidualMLP(nn.Module):
    r"""F: a perceptron whose layers are scaled and shifted by time (and class): h <- h + SiLU((W h + b) (1 + p(t)) + q(t)).

    (n, k, inputs), times (k,), labels (n,) or None -> (n, k, outputs); zero at the start of training.
    """

    def __init__(self, inputs: int, outputs: int, width: int = 256, depth: int = 3, classes: int = 0) -> None:
        super().__init__()
        self.time = TimeFeatures()
        self.first = nn.Linear(inputs, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.last = nn.Linear(width, outputs)
        self.embed = nn.Sequential(nn.Linear(self.time.width, width // 2), nn.SiLU(), nn.Linear(width // 2, 2 * depth * width))
        self.label = nn.Embedding(classes, 2 * depth * width) if classes else None
        for layer in (self.last, self.embed[2], self.label):
            for p in () if layer is None else layer.parameters():
                nn.init.zeros_(p)  # F = 0 and no modulation at the start

    def forward(self, times: Times, z: Tensor, labels: Tensor | None) -> Tensor:
        modulation = self.embed(self.time(times))
        if self.label is not None and labels is not None:
            modulation = modulation + self.label(labels)[:, None]
        scale, shift = modulation.chunk(2, dim=-1)
        scales, shifts = (1 + scale).chunk(1 + len(self.hidden), dim=-1), shift.chunk(1 + len(self.hidden), dim=-1)
        h = nn.functional.silu(self.first(z) * scales[0] + shifts[0])
        for layer, p, q in zip(self.hidden, scales[1:], shifts[1:], strict=True):
            h = h + nn.functional.silu(layer(h) * p + q)
        return self.last(h)


class Denoiser(nn.Module, ABC):
    r"""x0-prediction with the Gaussian fit of the data built in: (times, x (n, k, *shape), context) -> (n, k, *shape).

    The core learns what is not Gaussian, on inputs and targets of order 1.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, shape: tuple[int, ...], core: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.shape, self.options, self.core = tuple(shape), options, core
        self.register_buffer("mean", torch.zeros(prod(shape)))
        self.register_buffer("variance", torch.ones(prod(shape)))

    @abstractmethod
    def fit(self, images: Images) -> None:
        """Take mean and variance from the data."""

    @abstractmethod
    def scaled(self, times: Times, z: Tensor, context: Any) -> Tensor:
        """F on scaled inputs, (n, k, d) -> (n, k, d)."""

    def forward(self, times: Times, x: Tensor, context: Any = None) -> Tensor:
        z, c_in, c_skip, c_out = self._prepared(times, x)
        return self._image(c_skip * z + c_out * self.scaled(times, c_in * z, context)).reshape(x.shape)

    def loss(self, times: Times, x: Tensor, clean: Tensor, context: Any = None) -> Tensor:
        """|F - target|^2 per coordinate, (n, k): the denoising loss in units of c_out."""
        z, c_in, c_skip, c_out = self._prepared(times, x)
        target = (self._coordinates(clean.flatten(2)) - c_skip * z) / c_out
        return (self.scaled(times, c_in * z, context) - target).square().mean(-1)

    def _prepared(self, times: Times, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z, c_in, c_skip and c_out, (n, k, d) and (k, d)."""
        z = self._coordinates(x.flatten(2) / times.alpha[:, None])
        s2 = (times.v / times.alpha.square())[:, None]
        total = s2 + self.variance
        return z, total.rsqrt(), self.variance / total, (s2 * self.variance / total).sqrt()

    def _coordinates(self, y: Tensor) -> Tensor:
        return y - self.mean

    def _image(self, z: Tensor) -> Tensor:
        return z + self.mean


class MLPDenoiser(Denoiser):
    """A ResidualMLP on principal axes, each with its own variance: small images on a CPU.

    Source: Karras et al. (2206.00364), section 5.   Checked: tests/test_torch_networks.py::test_untrained_denoiser_is_the_gaussian_posterior
    """

    axes: Tensor

    def __init__(self, shape: tuple[int, ...], width: int = 256, depth: int = 3, classes: int = 0) -> None:
        d = prod(shape)
        super().__init__(shape, ResidualMLP(d, d, width, depth, classes), {"width": width, "depth": depth, "classes": classes})
        self.register_buffer("axes", torch.eye(d))

    def fit(self, images: Images, floor: float = 0.005) -> None:
        """Mean, principal axes and variances (at least `floor`) of the data."""
        x = images.pixels.flatten(1).double()
        variance, axes = torch.linalg.eigh(torch.cov(x.T))
        self.mean.copy_(x.mean(0))
        self.variance.copy_(variance.clamp(min=floor))
        self.axes.copy_(axes)

    def scaled(self, times: Times, z: Tensor, context: Any) -> Tensor:
        return self.core(times, z, context)

    def _coordinates(self, y: Tensor) -> Tensor:
        return _product(y - self.mean, self.axes)

    def _image(self, z: Tensor) -> Tensor:
        return _product(z, self.axes.T) + self.mean


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix in full precision also under autocast: divided by v, a rounded clean image would be no action."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ matrix


class UNetDenoiser(Denoiser):
    r"""A U-Net of diffusers on pixels, with one variance for all of them: large images, on a GPU.

    shape : (c, h, w)      channels : of the levels, each of half the side of the one before      depth : residual blocks a level
    Attention on the last level, whose side is h/2^(levels - 1). Contexts are not used.
    Source: Ho et al. (2006.11239), appendix B; Karras et al. (2206.00364), table 1.
    Checked: tests/test_torch_unet.py::test_untrained_denoiser_is_the_gaussian_posterior
    """

    def __init__(self, shape: tuple[int, ...], channels: Sequence[int] = (64, 128, 192), depth: int = 2) -> None:
        super().__init__(shape, _unet(shape, tuple(channels), depth), {"channels": list(channels), "depth": depth})
        for p in self.core.conv_out.parameters():  # type: ignore[union-attr]
            nn.init.zeros_(p)  # F = 0 at the start

    def fit(self, images: Images, floor: float = 0.005) -> None:
        """Mean of every pixel, and the average of their variances (at least `floor`)."""
        x = images.pixels.flatten(1)
        self.mean.copy_(x.mean(0))
        self.variance.fill_(max(floor, float(x.var(0, correction=0).mean())))

    def scaled(self, times: Times, z: Tensor, context: Any) -> Tensor:
        n = len(z)
        out, = self.core(z.reshape(-1, *self.shape), (TRAINED_TIMES * noise_level(times)).repeat(n), return_dict=False)
        return out.reshape(z.shape)


def _unet(shape: tuple[int, ...], channels: tuple[int, ...], depth: int) -> nn.Module:
    """diffusers' UNet2DModel, imported here alone."""
    from diffusers import UNet2DModel

    smallest = 2 ** (len(channels) - 1)
    if len(shape) != 3 or not channels or any(side % smallest for side in shape[1:]):
        raise ValueError(f"channels: expected levels that halve the sides of images (c, h, w), got {len(channels)} levels for shape {tuple(shape)}")
    plain = len(channels) - 1
    return UNet2DModel(  # type: ignore[return-value]
        sample_size=shape[1:], in_channels=shape[0], out_channels=shape[0], layers_per_block=depth, block_out_channels=channels,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        attention_head_dim=gcd(64, channels[-1]), norm_num_groups=gcd(32, *channels))


class ValueNetwork(nn.Module):
    """F of a value: a ResidualMLP on all coordinates, (times, x (n, k, *shape), labels) -> (n, k).

    Source: theory.md, section 13.   Checked: tests/test_torch_networks.py::test_value_network_starts_at_zero
    """

    def __init__(self, shape: tuple[int, ...], width: int = 128, depth: int = 2, classes: int = 0) -> None:
        super().__init__()
        self.core = ResidualMLP(prod(shape), 1, width, depth, classes)

    def forward(self, times: Times, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.core(times, x.flatten(2), context).squeeze(-1)


class ConvValueNetwork(nn.Module):
    r"""F of a value of large images: strided convolutions, scaled and shifted by time: h <- SiLU(norm(conv h) (1 + p(t)) + q(t)).

    shape : (c, h, w)      channels : of the layers, each of half the side of the one before
    (times, x (n, k, *shape), context) -> (n, k); contexts are not used.
    Source: theory.md, section 13.   Checked: tests/test_torch_unet.py::test_value_network
    """

    def __init__(self, shape: tuple[int, ...], channels: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        self.time, self.channels = TimeFeatures(), list(channels)
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(gcd(8, b), b))
                                    for a, b in pairwise([shape[0], *channels]))
        self.embed = nn.Sequential(nn.Linear(self.time.width, channels[-1]), nn.SiLU(), nn.Linear(channels[-1], 2 * sum(channels)))
        self.last = nn.Linear(channels[-1] * prod(-(-side // 2 ** len(channels)) for side in shape[1:]), 1)
        for layer in (self.last, self.embed[2]):
            for p in layer.parameters():
                nn.init.zeros_(p)  # the value is 0, and time without effect, at the start

    def forward(self, times: Times, x: Tensor, context: Any = None) -> Tensor:
        n, k = x.shape[:2]
        scale, shift = self.embed(self.time(times)).repeat(n, 1)[..., None, None].chunk(2, dim=1)
        h = x.flatten(0, 1)
        for layer, p, q in zip(self.layers, scale.split(self.channels, dim=1), shift.split(self.channels, dim=1), strict=True):
            h = nn.functional.silu(layer(h) * (1 + p) + q)
        return self.last(h.flatten(1)).reshape(n, k)
