r"""What a run is watched by, beside reward and KL: how far a batch's later epochs have gone, and how much of a gradient is signal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ctrl.torch.batch import Batch
from ctrl.torch.chain import Run
from ctrl.torch.objectives import ClippedRatio


class Halves:
    r"""A run whose policy gradient arrives in two parts: the loss pulls at mu, and the policy passes that on, the first paths' part first.

        d/dtheta mean_j loss_j = sum_j <d mean loss / d mu_j, d mu_j / dtheta>

    cut : paths of the first part (none or all of them where another process has the rest)
    first : after `backward`, what the first part adds to the gradient
    The work of one part, in two calls of the network, and one gradient more in memory. Takes the place of `run.mu`.
    Source: theory.md, section 7.   Checked: tests/test_torch_watch.py::test_two_halves_are_the_whole
    """

    def __init__(self, run: Run, cut: int) -> None:
        self.parts = [part for part in (slice(0, cut), slice(cut, len(run))) if part.stop > part.start]
        self.cut, self.passing = cut, [run.mu_of(part) for part in self.parts]
        self.mu = torch.cat([mu.detach() for mu in self.passing]).requires_grad_()
        self.first: list[Tensor] = []
        run.__dict__["mu"] = self.mu

    def backward(self, loss: Tensor, theta: Sequence[nn.Parameter]) -> None:
        """As loss.backward()."""
        pull = torch.autograd.grad(loss, self.mu)[0]
        self.first = [torch.zeros_like(p) for p in theta]
        for part, mu in zip(self.parts, self.passing, strict=True):
            mu.backward(pull[part])
            if part.stop == self.cut:
                self.first = [kept if p.grad is None else p.grad.clone() for p, kept in zip(theta, self.first, strict=True)]


class FirstHalf:
    """The share of a batch's first paths in its gradient, noted while the batch arrives in parts.

    paths : of the first half, perhaps all of this process's or none      first : that share, once they have passed; zero until then
    Source: theory.md, section 7.   Checked: tests/test_torch_watch.py::test_two_halves_are_the_whole
    """

    def __init__(self, paths: int, theta: Sequence[nn.Parameter]) -> None:
        self.left, self.theta = paths, theta
        self.first = [torch.zeros_like(p) for p in theta]

    def backward(self, batch: Batch, loss: Callable[[Run], Tensor], run: Run) -> Tensor:
        """As batch.backward(loss(run)), of the part that comes next."""
        cut, self.left = self.left, self.left - len(run)
        if 0 < cut < len(run):
            halves = Halves(run, cut)
            losses = loss(run)
            halves.backward(losses.sum() / len(batch), self.theta)
            self.first = halves.first
            return losses.detach()
        losses = batch.backward(loss(run))
        if cut == len(run):
            self.first = [kept if p.grad is None else p.grad.clone() for p, kept in zip(self.theta, self.first, strict=True)]
        return losses


def gradient_signal(first: Sequence[Tensor], whole: Sequence[Tensor], share: float = 0.5) -> dict[str, float]:
    r"""Signal and noise of one batch's gradient g, from that of its first paths.

        g = c g_1 + (1 - c) g_2,      signal = <g_1, g_2>,      noise = c (1 - c) |g_1 - g_2|^2

    first : c g_1, the share in g of the first c n paths      whole : g      share : c, in (0, 1)
    E signal = |E g|^2 and E noise = tr Cov(g) for independent paths of one law, where E|g|^2 is the sum of both. One batch's signal may be negative:
    its standard deviation is 2 (tr Cov(g)^2)^{1/2} where the noise is Gaussian and the signal small. So divide mean signal by mean noise over
    many updates. Halves use n^2/4 of the n^2/2 pairs of paths: all pairs would have a standard deviation smaller by 2^{1/2}.
    A leave-one-out baseline couples the halves and adds |E sigma r|^2 / (n - 1)^2.
    Source: Hoeffding (1948), U-statistics.   Checked: tests/test_torch_watch.py::test_signal_and_noise_of_a_known_gradient
    """
    signal, distance = 0.0, 0.0
    for a, g in zip(first, whole, strict=True):
        one = a.double() / share
        other = (g.double() - a.double()) / (1 - share)
        signal, distance = signal + float((one * other).sum()), distance + float((one - other).square().sum())
    return {"gradient_signal": signal, "gradient_noise": share * (1 - share) * distance}


@torch.no_grad()
def ratios(objective: ClippedRatio, run: Run) -> Tensor:
    """Of each path over its steps: mean |log rho|, largest |log rho|, and the share of terms whose gradient the clip has cut, (n, 3).

    All 0 in the first epoch, where the policy is the one that sampled.
    Source: Schulman et al. (1707.06347).   Checked: tests/test_torch_watch.py::test_ratios_of_a_policy_that_moved
    """
    size = run.log_ratio.detach().abs()
    return torch.stack([size.mean(1), size.amax(1), objective.clipped(run).to(size).mean(1)], 1)
