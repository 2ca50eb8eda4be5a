"""Rewards of images behind one face: images (n, c, h, w) in [-1, 1] and a context in, (n,) numbers out."""

from __future__ import annotations

import copy
import inspect
import io
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ctrl import check
from ctrl.torch.images import to_bytes

SMOOTHING = 1e-3  # of Contrast, in units of intensity: a quarter of one grey level in 256


class NotFinite(ValueError, FloatingPointError):
    """Pixels or rewards with NaN or infinity: a wrong value, and arithmetic that has failed, for those who ask for either.

    Source: theory.md, section 1.   Checked: tests/test_torch_rewards.py::test_non_finite_rewards_are_refused
    """


class ImageReward(ABC):
    """A reward r(x, c) of images x, given a context c: labels (n,), prompts, or whatever the reward wants.

    Subclasses define `value` (and `differentiable`); calling the reward checks what goes in and what comes out, so that a NaN
    stops here and a reward without a gradient is never mistaken for one with gradient zero.
    Source: theory.md, section 1 (context).   Checked: tests/test_torch_rewards.py::test_non_finite_rewards_are_refused
    """

    differentiable: bool = False

    @property
    def name(self) -> str:
        """What error messages call this reward."""
        return type(self).__name__

    @abstractmethod
    def value(self, images: Tensor, context: Any) -> Any:
        """r(x, c): a tensor (n,), or an array when not differentiable."""

    def __call__(self, images: Tensor, context: Any = None) -> Tensor:
        """Checked values, (n,), on the images' device, float32 (float64 of float64 images); a gradient only if differentiable."""
        check.instance("images", images, Tensor, "a tensor (n, c, h, w)")
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"images: expected a float tensor (n, c, h, w), got {images.dtype} {tuple(images.shape)}")
        self._require_finite("images: expected finite pixels", images.flatten(1).isfinite().all(1))
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            raw = self.value(images if self.differentiable else images.detach(), context)
            out = self.numbers(raw, images)
        self._require_finite("rewards: expected finite numbers", out.isfinite())
        if self.differentiable and torch.is_grad_enabled() and images.requires_grad and not out.requires_grad:
            raise ValueError(f"{self.name}: expected a reward that depends on the images through torch, got one without a gradient")
        return out

    def numbers(self, raw: Any, images: Tensor) -> Tensor:
        """What `value` returned, (n,) on the images' device, in float32 (float64 for images in float64)."""
        try:
            out = torch.as_tensor(raw, device=images.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.name}: expected a tensor or array of rewards, got {type(raw).__name__}: {error}") from None
        if out.shape != (len(images),) or out.is_complex():
            raise ValueError(f"{self.name}: expected real rewards of shape ({len(images)},), got {out.dtype} {tuple(out.shape)}")
        return out.to(torch.promote_types(images.dtype, torch.float32))

    def _require_finite(self, what: str, finite: Tensor) -> None:
        if not finite.all():
            raise NotFinite(f"{what}, got {int((~finite).sum())} of {len(finite)} with NaN or infinity, in {self.name}")


@dataclass(frozen=True, eq=False)
class ClassLogProbability(ImageReward):
    r"""Log-probability of a class under a classifier, in nats.

        r(x, c) = log softmax( logits(x) )_c,      c = label, or the context's own when label is None

    classifier : module, (n, c, h, w) -> (n, classes); a frozen copy is kept, in eval mode, and follows the images' device
    label      : class index, or None: context is then (n,) integers
    Differentiable in x.   Source: theory.md, section 1.   Checked: tests/test_torch_rewards.py::test_gradients_are_finite_differences
    """

    classifier: nn.Module
    label: int | None = None
    differentiable = True

    def __post_init__(self) -> None:
        check.instance("classifier", self.classifier, nn.Module, "a torch module")
        if self.label is not None:
            check.integer("label", self.label, at_least=0)
        object.__setattr__(self, "classifier", copy.deepcopy(self.classifier).eval().requires_grad_(False))

    def value(self, images: Tensor, context: Any) -> Tensor:
        first = next(self.classifier.parameters(), images)
        logits = self.classifier.to(images.device)(images.to(first.dtype))
        if logits.ndim != 2 or len(logits) != len(images):
            raise ValueError(f"classifier: expected logits ({len(images)}, classes), got {tuple(logits.shape)}")
        labels = self._labels(context, *logits.shape).to(images.device)
        return logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)

    def _labels(self, context: Any, n: int, classes: int) -> Tensor:
        """(n,) class indices, checked here: on a GPU a wrong index would stop the process."""
        if self.label is not None:
            name, labels = "label", torch.full((n,), self.label)
        elif context is None:
            raise ValueError(f"context: expected {n} class indices, as {self.name} has no label, got None")
        else:
            name, labels = "context", torch.as_tensor(context)
        if labels.shape != (n,) or labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"{name}: expected {n} class indices, got {labels.dtype} {tuple(labels.shape)}")
        if n and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"{name}: expected class indices in 0 ... {classes - 1}, got {int(labels.min())} ... {int(labels.max())}")
        return labels.long()


@dataclass(frozen=True)
class Brightness(ImageReward):
    r"""Mean intensity, from 0 (black) to 1 (white).

        r(x) = 1/d sum_j y_j,   y = (x + 1)/2,   d = c h w;        dr/dx_j = 1 / (2 d)

    Source: theory.md, section 1 (linear reward).   Checked: tests/test_torch_rewards.py::test_closed_form_gradients
    """

    differentiable = True

    def value(self, images: Tensor, context: Any) -> Tensor:
        return (images.flatten(1).mean(1) + 1) / 2


@dataclass(frozen=True)
class Contrast(ImageReward):
    r"""Standard deviation of the intensity over pixels, each channel about its own mean; smooth at constant images.

        r(x) = sqrt(v + e^2) - e,   v = 1/d sum_j (y_j - m_j)^2,   y = (x + 1)/2,   d = c h w,   e = 1e-3
        dr/dx_j = (y_j - m_j) / (2 d sqrt(v + e^2)),     m_j: the mean of y over the channel of j

    The plain standard deviation has no derivative where v = 0; this one has 0 there, is 0 there, and is within e of it elsewhere.
    Source: theory.md, section 1 (any callable).   Checked: tests/test_torch_rewards.py::test_closed_form_gradients
    """

    differentiable = True

    def value(self, images: Tensor, context: Any) -> Tensor:
        y = (images + 1) / 2
        v = (y - y.mean((2, 3), keepdim=True)).square().flatten(1).mean(1)
        return (v + SMOOTHING**2).sqrt() - SMOOTHING


@dataclass(frozen=True)
class Compressibility(ImageReward):
    r"""How well an image compresses: minus the size of its JPEG file, in kilobytes.

        r(x) = - bytes( JPEG_quality( round(127.5 (clamp(x, -1, 1) + 1)) ) ) / 1000

    images : one channel (grey) or three (red, green, blue)      quality : 1 ... 100, Pillow's scale
    Not differentiable.   Source: 2305.13301, compressibility.   Checked: tests/test_torch_rewards.py::test_jpeg_sizes
    """

    quality: int = 95

    def __post_init__(self) -> None:
        _require_quality(self.quality)

    def value(self, images: Tensor, context: Any) -> Tensor:
        return -jpeg_kilobytes(images, self.quality)


@dataclass(frozen=True)
class Incompressibility(ImageReward):
    r"""How badly an image compresses: the size of its JPEG file, in kilobytes; minus `Compressibility`.

    images : one channel (grey) or three (red, green, blue)      quality : 1 ... 100, Pillow's scale
    Not differentiable.   Source: 2305.13301, incompressibility.   Checked: tests/test_torch_rewards.py::test_jpeg_sizes
    """

    quality: int = 95

    def __post_init__(self) -> None:
        _require_quality(self.quality)

    def value(self, images: Tensor, context: Any) -> Tensor:
        return jpeg_kilobytes(images, self.quality)


def _require_quality(quality: int) -> None:
    if check.integer("quality", quality, at_least=1) > 100:
        raise ValueError(f"quality: expected 1 ... 100, got {quality}")


def jpeg_kilobytes(images: Tensor, quality: int) -> Tensor:
    """Sizes of the images as JPEG files, in 1000 bytes: (n, 1 or 3, h, w) -> (n,), on the CPU.

    Source: 2305.13301, compressibility.   Checked: tests/test_torch_rewards.py::test_jpeg_sizes
    """
    from PIL import Image

    if images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected 1 or 3 channels for JPEG, got {images.shape[1]}")
    sizes = []
    for pixels in to_bytes(images).transpose(0, 2, 3, 1):
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])).save(file, "JPEG", quality=quality)
        sizes.append(file.tell())
    return torch.tensor(sizes) / 1000


def retried(function: Callable[..., Any], attempts: int, wait: float = 1.0) -> Callable[..., Any]:
    """The same function, asked again where it raises OSError (a server that does not answer): up to `attempts` times, after wait, 2 wait ... seconds.

    Source: design.md, runs.   Checked: tests/test_torch_rewards.py::test_rewards_out_of_reach_are_asked_again
    """
    if not callable(function) or isinstance(function, nn.Module):  # a network at hand is always in reach
        return function

    @wraps(function)
    def asked(*arguments: Any) -> Any:
        for k in range(attempts - 1):
            try:
                return function(*arguments)
            except OSError:
                time.sleep(wait * 2**k)
        return function(*arguments)

    return asked


@dataclass(frozen=True, eq=False)
class CallableImageReward(ImageReward):
    r"""Any r(x) or r(x, c): `function` maps images (n, c, h, w), and the context when its signature asks for it, to (n,).

    The context is the second argument when that is required or called `context`. Without `differentiable` the function may
    return NumPy and no gradient is taken; with it, the function must be torch throughout.
    Source: theory.md, section 1 (any callable).   Checked: tests/test_torch_rewards.py::test_callable_reward
    """

    function: Callable[..., Any]
    differentiable: bool = False

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(f"function: expected a callable, got {type(self.function).__name__}")
        self._arguments()

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def value(self, images: Tensor, context: Any) -> Any:
        return self.function(*(images, context)[:self._arguments()])

    def _arguments(self) -> int:
        """1 for (images), 2 for (images, context)."""
        function = self.function.forward if isinstance(self.function, nn.Module) else self.function
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError) as error:
            raise ValueError(f"function: expected a Python function (wrap it in one), got {self.name}: {error}") from None
        places = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        wanted = 1 + any(p.default is p.empty or p.name == "context" for p in places[1:2])
        try:
            signature.bind(*[None] * wanted)
        except TypeError as error:
            raise ValueError(f"function: expected (images) or (images, context), got {self.name}{signature}: {error}") from None
        return wanted
