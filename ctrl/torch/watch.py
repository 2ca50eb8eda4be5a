r"""What a run is watched by, beside reward and KL: how far a batch's later epochs have gone, and how much of a gradient is signal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ctrl.torch.batch import Batch
from ctrl.torch.chain import Run
from ctrl.torch.objectives import ClippedRatio


class Halves:
    r"""The gradient of a batch, in the share of its first paths and that of the others, while the batch arrives in parts.

        d/dtheta mean_j loss_j = sum_j <d mean loss / d mu_j, d mu_j / dtheta>

    paths : of the first half; perhaps all of this process's, or none
    A part in which the halves meet is passed on from mu, the first paths' share first: the work of one part, in two calls of the network. The first
    share is taken from theta's gradient when it is complete, and joins the second in `join`: one gradient more in memory.
    Source: theory.md, section 7.   Checked: tests/test_torch_watch.py::test_two_halves_are_the_whole
    """

    def __init__(self, paths: int, theta: Sequence[nn.Parameter]) -> None:
        self.left, self.theta = paths, theta
        self.first: list[Tensor | None] = [None] * len(theta)

    def backward(self, batch: Batch, loss: Callable[[Run], Tensor], run: Run) -> Tensor:
        """As batch.backward(loss(run)), of the part that comes next."""
        cut, self.left = self.left, self.left - len(run)
        if not 0 < cut < len(run):
            losses = batch.backward(loss(run))
            if cut == len(run):
                self._take()
            return losses
        parts = slice(0, cut), slice(cut, len(run))
        run.divide(*parts)
        losses = loss(run)
        pull = torch.autograd.grad(losses.sum() / len(batch), run.mu)[0]
        for part, mu in zip(parts, run.passing, strict=True):
            mu.backward(pull[part])
            if part.stop == cut:
                self._take()
        return losses.detach()

    def _take(self) -> None:
        self.first = [p.grad for p in self.theta]
        for p in self.theta:
            p.grad = None

    def join(self, reduce: Callable[[Tensor], Tensor], share: float) -> dict[str, float]:
        """Leave the whole batch's gradient in theta, reduced over all processes; its signal and noise."""
        first, self.first = self.first, []

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for p, kept in zip(self.theta, first, strict=True):
                if kept is not None or p.grad is not None:
                    one, other = (reduce(torch.zeros_like(p) if g is None else g) for g in (kept, p.grad))
                    yield one, other
                    p.grad = one + other

        return gradient_signal(pairs(), share)


def gradient_signal(halves: Iterable[tuple[Tensor, Tensor]], share: float = 0.5) -> dict[str, float]:
    r"""Signal and noise of one batch's gradient g, from the shares of its first paths and of the others.

        g = c g_1 + (1 - c) g_2,      signal = <g_1, g_2>,      noise = c (1 - c) |g_1 - g_2|^2

    halves : c g_1 and (1 - c) g_2 of each parameter, the first c n paths and the others, c = `share` in (0, 1)
    E signal = |E g|^2 and E noise = tr Cov(g) for independent paths of one law, where E|g|^2 is the sum of both. One batch's signal may be negative:
    its standard deviation is 2 (tr Cov(g)^2)^{1/2} where the noise is Gaussian and the signal small. So divide mean signal by mean noise over
    many updates. Halves use n^2/4 of the n^2/2 pairs of paths: all pairs would have a standard deviation smaller by 2^{1/2}.
    A leave-one-out baseline couples the halves and adds |E sigma r|^2 / (n - 1)^2.
    Source: Hoeffding (1948), U-statistics.   Checked: tests/test_torch_watch.py::test_signal_and_noise_of_a_known_gradient
    """
    signal, distance = 0.0, 0.0
    for a, b in halves:
        one, other = a.double() / share, b.double() / (1 - share)
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
