"""Two image classifiers of different architecture, one to reward and one to judge, and how both are trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ctrl import check
from ctrl.torch.images import Images

GROUPS = 4  # of channels, normalised together
Network = TypeVar("Network", bound=nn.Module)


class Classifier(nn.Module, ABC):
    """Images (n, c, h, w) in [-1, 1] to logits (n, classes): a linear head on smooth features.

    Shape (c, h, w), classes and seed (of the first weights) are all that it takes to build one again.
    """

    body: nn.Module
    head: nn.Module

    def __init__(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"shape: expected (c, h, w), got {shape}")
        c, h, w = (check.integer("shape", length, at_least=1) for length in shape)
        self.shape = c, h, w
        self.classes = check.integer("classes", classes, at_least=2)
        with _seeded(check.integer("seed", seed, at_least=0)):
            self._build()

    @abstractmethod
    def _build(self) -> None:
        """Create `body`, images -> features, and `head`, features -> logits."""

    def features(self, images: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, p): what the head sees; also the space of Frechet distances."""
        if images.shape[1:] != self.shape:
            raise ValueError(f"images: expected shape (n, {', '.join(map(str, self.shape))}), got {tuple(images.shape)}")
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's global CPU generator, seeded inside and as it was outside."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class MLPClassifier(Classifier):
    r"""Two hidden layers of 256, each silu(LayerNorm(W x + b)), and a linear head, for any shape.

        body : (n, c, h, w) -> (n, 256)      head : (n, 256) -> (n, classes)

    Source: digits.md, set-up (a classifier to reward, another architecture to judge).
    Checked: tests/test_torch_classifiers.py::test_accuracy_on_the_other_half
    """

    def _build(self) -> None:
        c, h, w = self.shape
        width = 256
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, width), nn.LayerNorm(width), nn.SiLU(),
                                  nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU())
        self.head = nn.Linear(width, self.classes)


class ConvClassifier(Classifier):
    r"""Convolutions of 24 (5x5) and 48 (3x3, stride 2) channels, means over 4x4 regions, a hidden layer of 128, and a linear head.

        body : (n, c, h, w) -> (n, 128), convolutions as silu(GroupNorm(conv(x)))      head : (n, 128) -> (n, classes)

    From 28 pixels up the first convolution strides too, so that the work does not grow with the image.
    Source: digits.md, set-up (a classifier to reward, another architecture to judge).
    Checked: tests/test_torch_classifiers.py::test_accuracy_on_the_other_half
    """

    def _build(self) -> None:
        c, h, w = self.shape
        self.body = nn.Sequential(
            nn.Conv2d(c, 24, 5, stride=max(1, min(h, w) // 14), padding=2), nn.GroupNorm(GROUPS, 24), nn.SiLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.GroupNorm(GROUPS, 48), nn.SiLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48 * 16, 128), nn.SiLU())
        self.head = nn.Linear(128, self.classes)


def train_classifier(network: Network, images: Images, *, steps: int = 400, batch: int = 128, learning_rate: float = 5e-3,
                     label_smoothing: float = 0.02, noise: float = 0.3, seed: int = 0, progress: bool = True) -> Network:
    r"""Train a classifier in place, on its own device, and return it in eval mode.

        minimise  E cross-entropy( logits(x + s z), smoothed label ),    z ~ N(0, I),   s ~ U[0, noise], one per image

    Adam, learning rate falling to 0 by a cosine; on a CPU the same network, seed and thread count give the same weights.
    Label smoothing e bounds the log-probabilities that a well-fitted classifier reports (about log(e / classes)), and with them a
    reward and its gradient. Noise helps on held-out digits (.3 more than .1); shifts by a pixel do not (the MLP loses 3 %).
    Source: digits.md, set-up.   Checked: tests/test_torch_classifiers.py::test_accuracy_on_the_other_half
    """
    check.integer("steps", steps, at_least=1)
    check.integer("batch", batch, at_least=1)
    check.number("learning_rate", learning_rate, above=0)
    check.number("noise", noise, at_least=0)
    if check.number("label_smoothing", label_smoothing, at_least=0) >= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing:g}")
    pixels, labels = _on_device(network, images)
    generator = torch.Generator(pixels.device).manual_seed(check.integer("seed", seed, at_least=0))
    optimiser = torch.optim.Adam(network.parameters(), learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    network.train()
    for _ in tqdm(range(steps), desc="classifier", disable=None if progress else True, leave=False, delay=1):
        index = torch.randint(len(pixels), (batch,), generator=generator, device=pixels.device)
        scale = noise * torch.rand(batch, 1, 1, 1, generator=generator, device=pixels.device)
        noisy = pixels[index] + scale * torch.randn(batch, *images.shape, generator=generator, device=pixels.device)
        loss = F.cross_entropy(network(noisy), labels[index], label_smoothing=label_smoothing)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        cosine.step()
    optimiser.zero_grad()  # or they would be held as long as the network
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: Images, batch: int = 1024) -> float:
    """Share of images whose largest logit is their label's; the network's mode is kept.

    Source: digits.md, set-up.   Checked: tests/test_torch_classifiers.py::test_accuracy_counts
    """
    check.integer("batch", batch, at_least=1)
    pixels, labels = _on_device(network, images)
    training = network.training
    network.eval()
    right = sum(int((network(x).argmax(1) == y).sum()) for x, y in zip(pixels.split(batch), labels.split(batch), strict=True))
    network.train(training)
    return right / len(images)


def _on_device(network: nn.Module, images: Images) -> tuple[Tensor, Tensor]:
    """Pixels and labels where the network is, once it is known to return one logit per class."""
    check.instance("network", network, nn.Module, "a torch module")
    check.instance("images", images, Images, "ctrl.torch Images")
    if images.labels is None:
        raise ValueError(f"images: expected labels to learn or to compare with, got none in {images.name}")
    device = next((p.device for p in network.parameters()), images.pixels.device)
    pixels = images.pixels.to(device)
    training = network.training
    with torch.no_grad():
        shape = tuple(network.eval()(pixels[:1]).shape)
    network.train(training)
    if shape != (1, images.classes):
        raise ValueError(f"network: expected one logit for each of {images.classes} classes of {images.name}, got shape {shape}")
    return pixels, images.labels.to(device)
